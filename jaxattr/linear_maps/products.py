"""The places where a leaf is the matrix of a linear map, described so that they can be rewritten.

Three operations multiply by a parameter: `dot_general`, `conv_general_dilated`, and the look-up of
rows (`gather`, `dynamic_slice`), which is the product with a one-hot vector. Each is brought to

    y[s, t, o] = sum_i x[s, t, i] W[s, i, o]

with s numbering layers, t positions, i inputs and o outputs, by naming the axes of x, W and y.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jax.lax import GatherScatterMode

from jaxattr.linear_maps import declaring, derivatives
from jaxattr.linear_maps.labels import Dim, Dims, Label, axes, extent, flat, ordered, rearrange
from jaxattr.linear_maps.views import Factors, View, aval
from jaxattr.scales import widest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product(abc.ABC):
    """One place where x is multiplied by the matrix of a leaf; plain data, no arrays.

    Attributes:
      kind: 'dense', 'conv' or 'embedding'.
      operand: number of the operand x of the equation.
      y: labels of the result.
      ins: labels of the leaf that are summed over.
      outs: labels of the leaf that the result keeps.
      layers: labels of the leaf that x and the result share.
      positions: labels of x and y that the leaf lacks.
      dtype: what x and W are multiplied in.
      groups: feature groups of a convolution.
      x_axes: for each axis of the weight that of x which is paired with it, or None.
      y_axes: for each axis of the weight that of the result which it becomes, or None.
      back: what the weight's gradient takes for the cotangent; see `derivatives.Multiplied`.
    """

    kind: str
    operand: int
    y: Dims
    ins: Dim
    outs: Dim
    layers: Dim = ()
    positions: Dim
    dtype: Any
    groups: int = 1
    x_axes: tuple[int | None, ...]
    y_axes: tuple[int | None, ...]
    back: Callable[[Sequence[Any], jax.Array], jax.Array] | None = None

    def between(
        self, margins: Sequence[tuple[int, int]], x: jax.Array, y: jax.Array
    ) -> tuple[jax.Array, list[tuple[int, int, int]]] | None:
        """Narrows the operands to a weight that fills a part of an array of zeros.

        Args:
          margins: the zeros before and behind the weight, per axis.
          x: the operand for the whole array.
          y: the result for the whole array.

        Returns:
          x for the weight, and how its result is to be padded; None where it cannot be cut.
        """
        padding = [(0, 0, 0)] * y.ndim
        for margin, of_x, of_y in zip(margins, self.x_axes, self.y_axes, strict=False):
            if any(margin) and of_x is None and of_y is None:
                return None
            if any(margin) and of_x is not None:
                x = jax.lax.slice_in_dim(x, margin[0], x.shape[of_x] - margin[1], axis=of_x)
            if any(margin) and of_y is not None:
                padding[of_y] = (*margin, 0)
        return x, padding

    @abc.abstractmethod
    def inputs(self, x: jax.Array) -> jax.Array:
        """Returns x as [*layers, t, in]; a look-up returns ids [t], of which `in` means no row."""

    @abc.abstractmethod
    def project(self, x: jax.Array, matrix: jax.Array) -> jax.Array:
        """Returns `inputs(x) @ matrix`, [*layers, t, r], for a matrix [*layers, in, r]."""

    def expand(self, compressed: jax.Array, matrix: jax.Array | None) -> jax.Array:
        """Returns `compressed @ matrix^T`, laid out as the result, for a matrix [*layers, out, r].

        Args:
          compressed: [*layers, t, r].
          matrix: what spans the outputs, or None for the identity.
        """
        if matrix is not None:
            compressed = _multiply(compressed, matrix, 1)  # [*layers, t, out]
        return rearrange(compressed, self._canonical(self.outs), self.y)

    def cotangents(self, y: jax.Array) -> jax.Array:
        """Returns a cotangent of the result as [*layers, t, out], positions as in `inputs`."""
        return rearrange(y, self.y, self._canonical(self.outs))

    def low_rank(
        self, x: jax.Array, factors: Factors, transposed: bool, dtype: jax.typing.DTypeLike
    ) -> jax.Array:
        """Returns what the term A Z B^T of the matrix adds to the result.

        The products with A and B run in the model's precision, those with Z in the precision of Z.

        Args:
          x: the operand.
          factors: A, Z, B for the layers that this place covers.
          transposed: whether the matrix is applied the other way, so that B Z^T A^T is meant.
          dtype: dtype of the result.
        """
        a, z, b, bias = factors
        if transposed:
            a, z, b = b, jnp.swapaxes(z, -1, -2), a
        if a is None:
            compressed = self.project(x, z)
        else:
            compressed = self.project(x, a).astype(z.dtype)
            compressed = compressed if bias is None else compressed + bias.astype(z.dtype)
            compressed = _multiply(compressed, z, 0)  # [*layers, t, r']
        return self.expand(compressed.astype(dtype), b if b is None else b.astype(dtype))

    def _canonical(self, features: Dim) -> Dims:
        return (*((label,) for label in self.layers), self.positions, features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Dense(Product):
    """A `dot_general`; x has the labels `x`."""

    kind: str = "dense"
    x: Dims

    def inputs(self, x: jax.Array) -> jax.Array:
        return rearrange(x, self.x, self._canonical(self.ins)).astype(self.dtype)

    def project(self, x: jax.Array, matrix: jax.Array) -> jax.Array:
        return _multiply(self.inputs(x), matrix.astype(self.dtype), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Lookup(Product):
    """Rows picked by ids; the ids are a column of the operand, or all of it."""

    kind: str = "embedding"
    column: int | None
    out_of_range: str  # 'clip', or 'zero' where an id of no row has no part in the gradient

    def inputs(self, x: jax.Array) -> jax.Array:
        ids = (x if self.column is None else x[..., self.column]).reshape(-1)  # [t]
        # Of a short type the number of rows may be none: 256 is 0 among bytes.
        ids = ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids
        rows = extent(self.ins)
        if self.out_of_range == "clip":
            return jnp.clip(ids, 0, rows - 1)
        return jnp.where((ids >= 0) & (ids < rows), ids, rows)

    def project(self, x: jax.Array, matrix: jax.Array) -> jax.Array:
        return matrix.at[self.inputs(x)].get(mode="fill", fill_value=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows(Product):
    """Rows that are added to the operand, each at its own place: those that are looked up there."""

    kind: str = "embedding"

    def inputs(self, x: jax.Array) -> jax.Array:
        rows = extent(self.ins)
        return jnp.tile(jnp.arange(rows), extent(self.positions) // rows)

    def project(self, x: jax.Array, matrix: jax.Array) -> jax.Array:
        return jnp.tile(matrix, (extent(self.positions) // extent(self.ins), 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Conv(Product):
    """A convolution; each feature group of each output position counts as a position.

    The leaf is one matrix [in, out] although a group of outputs sees its own group of inputs:
    its gradient is the sum over positions and groups of inputs times own outputs.
    """

    kind: str = "conv"
    weight: Dims
    window: dict[str, Any]

    @property
    def _group(self) -> Label:
        return Label("group", self.groups)

    def inputs(self, x: jax.Array) -> jax.Array:
        spec = self.window["dimension_numbers"].rhs_spec
        filters = [self.weight[i] for i in spec[2:]]
        patches = jax.lax.conv_general_dilated_patches(
            x.astype(self.dtype),
            [extent(dim) for dim in filters],
            precision=jax.lax.Precision.HIGHEST,
            **self.window,
        )
        features = (self._group, *self.weight[spec[1]], *flat(filters))
        rows = (*self.positions, self._group)
        return rearrange(patches, self._with_features(features), (rows, self.ins))

    def project(self, x: jax.Array, matrix: jax.Array) -> jax.Array:
        rank = Label("rank", matrix.shape[-1])
        out = self.window["dimension_numbers"].rhs_spec[0]
        weight = (*self.weight[:out], (rank,), *self.weight[out + 1 :])
        kernel = rearrange(matrix.astype(self.dtype), (self.ins, (rank,)), weight)
        # Every group sees the same factor: group g's outputs are columns g*r to (g+1)*r.
        kernel = jnp.concatenate([kernel] * self.groups, axis=out)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype), kernel, feature_group_count=self.groups, **self.window
        )
        rows = (*self.positions, self._group)
        return rearrange(y, self._with_features((self._group, rank)), (rows, (rank,)))

    def expand(self, compressed: jax.Array, matrix: jax.Array | None) -> jax.Array:
        if self.groups > 1:
            grouped = compressed.reshape(-1, self.groups, compressed.shape[-1])  # [t, g, r]
            if matrix is None:
                own = grouped.reshape(*grouped.shape[:2], self.groups, -1)  # [t, g, g, out/g]
                compressed = jnp.einsum("tggo->tgo", own)
            else:
                matrix = matrix.reshape(self.groups, -1, matrix.shape[-1])  # [g, out/g, r]
                compressed = jnp.einsum("tgr,gor->tgo", grouped, matrix)
            compressed, matrix = compressed.reshape(-1, extent(self.outs)), None  # [t, out]
        return super().expand(compressed, matrix)

    def cotangents(self, y: jax.Array) -> jax.Array:
        rows = super().cotangents(y)  # [t, out]
        grouped = rows.reshape(rows.shape[0], 1, self.groups, -1)  # [t, 1, g, out/g]
        own = jnp.eye(self.groups, dtype=y.dtype)[None, :, :, None]
        return (grouped * own).reshape(-1, extent(self.outs))  # [t*g, out]

    def _with_features(self, features: Dim) -> Dims:
        spec = self.window["dimension_numbers"].out_spec
        return (*self.y[: spec[1]], features, *self.y[spec[1] + 1 :])


def describe(eqn: JaxprEqn, view: View, number: int) -> Product | None:
    """Describes the equation as a product with the leaf's matrix, where it is one.

    Args:
      eqn: an equation.
      view: its only operand that is a view.
      number: which operand that is.

    Returns:
      The product, or None.
    """
    rules = {
        "dot_general": _dot_general,
        "conv_general_dilated": _convolution,
        "gather": _gather,
        "dynamic_slice": _dynamic_slice,
        "add": _addition,
        "add_any": _addition,
        "jit": _declared,
        "pjit": _declared,
        "custom_jvp_call": _by_derivative,
        "custom_vjp_call": _by_derivative,
    }
    rule = rules.get(eqn.primitive.name)
    return rule(eqn, view, number) if rule else None


def _declared(eqn: JaxprEqn, view: View, number: int) -> Product | None:
    """The product of the last two operands: the last axis of x, the first of the weight."""
    x = len(eqn.invars) - 2
    if number != x + 1 or not declaring.is_declared(eqn):
        return None
    contracting = ((len(aval(eqn.invars[x]).shape) - 1,), (0,))
    return _dense(eqn, view, 1, x, (contracting, ((), ())))


def _by_derivative(eqn: JaxprEqn, view: View, number: int) -> Product | None:
    """A product with derivatives of its own, of which that in the weight is a product's."""
    found = derivatives.derivative(eqn).multiplied.get(number)
    if found is None:
        return None
    described = _dense(eqn, view, found.side, found.x, found.dimensions)
    dtype = widest(aval(eqn.invars[number]).dtype, aval(eqn.outvars[0]).dtype)
    return described and dataclasses.replace(described, dtype=dtype, back=found.back)


def _dot_general(eqn: JaxprEqn, view: View, number: int) -> Product | None:
    return _dense(eqn, view, number, 1 - number, eqn.params["dimension_numbers"])


def _dense(eqn: JaxprEqn, view: View, number: int, operand: int, dimensions: Any) -> Product | None:
    """A product with dimension numbers of a `dot_general`, in which the view has this number."""
    contracting, batch = dimensions
    mine = (*batch[number], *contracting[number])
    theirs = (*batch[1 - number], *contracting[1 - number])
    rest = [i for i in range(len(view.dims)) if i not in mine]
    ins = flat(view.dims[i] for i in contracting[number])
    outs = flat(view.dims[i] for i in rest)
    if not all(label.of_leaf for label in (*ins, *outs)):
        return None  # repeated along an axis that is summed over or kept
    if extent(ins) == extent(outs) == 1 < extent(flat(view.dims)):
        return None  # a scale that is written as an einsum: as a map, each entry were a layer
    shared = tuple(view.dims[i] for i in batch[number])
    shape = aval(eqn.invars[operand]).shape
    paired = {other: view.dims[i] for i, other in zip(mine, theirs, strict=True)}
    x = tuple(paired.get(i, _new(i, size)) for i, size in enumerate(shape))
    free = tuple(x[i] for i in range(len(x)) if i not in theirs)
    kept = tuple(view.dims[i] for i in rest)
    order = (*batch[number], *(rest if number == 0 else (None,) * len(free)), *rest)
    return _Dense(
        operand=operand,
        x=x,
        y=(*shared, *kept, *free) if number == 0 else (*shared, *free, *kept),
        ins=ordered(ins),
        outs=ordered(outs),
        layers=ordered(label for label in flat(shared) if label.of_leaf),
        positions=(*(label for label in flat(shared) if not label.of_leaf), *flat(free)),
        dtype=_compute_dtype(eqn),
        x_axes=tuple(theirs[mine.index(i)] if i in mine else None for i in range(len(view.dims))),
        y_axes=tuple(order.index(i) if i in order else None for i in range(len(view.dims))),
    )


def _convolution(eqn: JaxprEqn, view: View, number: int) -> Product | None:
    params = eqn.params
    lhs, rhs, out = params["dimension_numbers"]
    groups = params["feature_group_count"]
    leaf_only = all(label.of_leaf for label in flat(view.dims))
    if number != 1 or params["batch_group_count"] != 1 or not leaf_only:
        return None
    outs = view.dims[rhs[0]]
    if groups > 1 and outs != ordered(outs):
        return None
    y: list[Dim] = [_new(i, size) for i, size in enumerate(aval(eqn.outvars[0]).shape)]
    y[out[1]] = outs
    window = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
    return _Conv(
        operand=0,
        weight=view.dims,
        y=tuple(y),
        ins=ordered(flat(view.dims[i] for i in rhs[1:])),
        outs=ordered(outs),
        positions=flat(dim for i, dim in enumerate(y) if i != out[1]),
        dtype=_compute_dtype(eqn),
        groups=groups,
        window={name: params[name] for name in window},
        x_axes=tuple(lhs[1] if i == rhs[1] and groups == 1 else None for i in range(len(rhs))),
        y_axes=tuple(out[1] if i == rhs[0] and groups == 1 else None for i in range(len(rhs))),
    )


def _gather(eqn: JaxprEqn, view: View, number: int) -> Product | None:
    """A gather that takes whole rows: all axes but one are taken in full."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape, mode = aval(eqn.invars[0]).shape, GatherScatterMode.from_any(eqn.params["mode"])
    rows = [i for i, (size, full) in enumerate(zip(sizes, shape, strict=True)) if size != full]
    if number != 0 or len(rows) != 1 or sizes[rows[0]] != 1 or numbers.operand_batching_dims:
        return None
    row, start = rows[0], tuple(numbers.start_index_map)
    whole = mode in (GatherScatterMode.CLIP, GatherScatterMode.PROMISE_IN_BOUNDS)
    # A start along an axis that is taken in full is clipped to zero; otherwise it may drop a row.
    if row not in start or not (
        whole or (mode == GatherScatterMode.FILL_OR_DROP and start == (row,))
    ):
        return None
    y_shape = aval(eqn.outvars[0]).shape
    y: list[Dim] = [_new(i, size) for i, size in enumerate(y_shape)]
    positions = flat(dim for i, dim in enumerate(y) if i not in numbers.offset_dims)
    taken = [i for i in range(len(shape)) if i not in numbers.collapsed_slice_dims]
    y_axes: list[int | None] = [None] * len(shape)
    for i, axis in zip(numbers.offset_dims, taken, strict=True):
        y[i] = () if axis == row else view.dims[axis]
        y_axes[axis] = None if axis == row else i
    # Of `table[ids]`, which promises a row: a wrong id reads the nearest, which learns nothing.
    out_of_range = "clip" if mode == GatherScatterMode.CLIP else "zero"
    where = {"column": start.index(row), "out_of_range": out_of_range}
    return _lookup(eqn, view, row, tuple(y), y_axes, operand=1, positions=positions, **where)


def _dynamic_slice(eqn: JaxprEqn, view: View, number: int) -> Product | None:
    """One row of a matrix, picked by a traced index: the embedding of a single label."""
    shape, sizes = aval(eqn.invars[0]).shape, eqn.params["slice_sizes"]
    rows = [i for i, (size, full) in enumerate(zip(sizes, shape, strict=True)) if size != full]
    wide = [label for label in flat(view.dims) if label.size > 1]
    if number != 0 or len(rows) != 1 or sizes[rows[0]] != 1 or len(wide) != 2:
        return None
    y = tuple(() if i == rows[0] else dim for i, dim in enumerate(view.dims))
    y_axes = [None if i == rows[0] else i for i in range(len(shape))]
    where = {"operand": 1 + rows[0], "column": None, "out_of_range": "clip"}
    return _lookup(eqn, view, rows[0], y, y_axes, positions=(), **where)


def _addition(eqn: JaxprEqn, view: View, number: int) -> Product | None:
    """Learned positions: the leaf's last axis is added at the places that the others number."""
    digits = ordered(label for label in flat(view.dims) if label.of_leaf)
    last = axes(digits)[-1:]
    outs = tuple(label for label in digits if label.axis in last)
    ins = digits[: len(digits) - len(outs)]
    if extent(ins) == 1 or extent(outs) == 1:
        return None
    rows = {label: label._replace(axis=("row", label.axis)) for label in ins}
    y = tuple(tuple(rows.get(label, label) for label in dim) for dim in view.dims)
    copies = [label for label in flat(view.dims) if not label.of_leaf]
    return _Rows(
        operand=1 - number,
        y=y,
        ins=ins,
        outs=outs,
        positions=(*copies, *rows.values()),
        dtype=aval(eqn.outvars[0]).dtype,
        x_axes=(None,) * len(view.dims),
        y_axes=tuple(range(len(view.dims))),
    )


def _lookup(
    eqn: JaxprEqn, view: View, row: int, y: Dims, y_axes: Sequence[int | None], **where: Any
) -> Product | None:
    """A look-up of rows, unless the id is not the row's number in the leaf."""
    ins = view.dims[row]
    outs = flat(dim for i, dim in enumerate(view.dims) if i != row)
    if ins != ordered(ins) or not all(label.of_leaf for label in (*ins, *outs)):
        return None
    return _Lookup(
        y=y,
        ins=ins,
        outs=ordered(outs),
        dtype=aval(eqn.outvars[0]).dtype,
        x_axes=(None,) * len(y_axes),
        y_axes=tuple(y_axes),
        **where,
    )


def _new(number: int, size: int) -> Dim:
    """An axis that the leaf lacks."""
    return (Label(("new", number), size),) if size > 1 else ()


def _compute_dtype(eqn: JaxprEqn) -> Any:
    return widest(*(aval(v).dtype for v in eqn.invars[-2:]))


def _multiply(rows: jax.Array, matrix: jax.Array, summed: int) -> jax.Array:
    """Returns rows [*layers, t, f] times a matrix, [*layers, f, g] or transposed.

    As one operation: `jnp.matmul` is a program of its own, which is traced and derived at each use.
    """
    layers = tuple(range(rows.ndim - 2))
    contracting = (rows.ndim - 1,), (len(layers) + summed,)
    return jax.lax.dot_general(rows, matrix, (contracting, (layers, layers)))
