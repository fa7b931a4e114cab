"""What is known of an array that was derived from one parameter leaf by renaming axes alone."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal

from jaxattr.linear_maps import labels as labels_lib
from jaxattr.linear_maps.labels import Dims

Site: TypeAlias = tuple[int, ...]
"""Where an equation stands: its number in the traced loss, then in the inner program, ..."""


class Factors(NamedTuple):
    """The low-rank term A Z B^T that is added to a leaf, for the layers that a view still covers.

    Attributes:
      a: [*stack, in, r], or None for the identity.
      z: [*stack, r, r'].
      b: [*stack, out, r'], or None for the identity.
    """

    a: jax.Array | None
    z: jax.Array
    b: jax.Array | None

    def map(self, function: Callable[[jax.Array], jax.Array]) -> "Factors":
        """Applies a function to the arrays."""
        return Factors(*(None if x is None else function(x) for x in self))  # type: ignore


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """An array that holds entries of one leaf, and how they lie in it.

    Attributes:
      value: the array.
      factors: the low-rank term that belongs to it, or None where none is evaluated.
      leaf: name of the leaf.
      shape: shape of the leaf.
      dims: labels of the array's axes.
      ranges: per axis of the leaf, the indices that the view still covers.
      scans: (axis of the leaf, site of the scan) for each axis that a scan runs over.
      stack: axes of the leaf that number layers, as far as known: the leading axes of `factors`.
      lost: why the view can no longer be followed, or the empty string.
    """

    value: Any
    factors: Factors | None = None
    leaf: str = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dims: Dims = dataclasses.field(metadata={"static": True})
    ranges: tuple[range, ...] = dataclasses.field(metadata={"static": True})
    scans: tuple[tuple[int, Site], ...] = dataclasses.field(default=(), metadata={"static": True})
    stack: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    lost: str = dataclasses.field(default="", metadata={"static": True})

    def moved(self, value: jax.Array, dims: Dims) -> "View":
        """The view after an operation that renamed axes; axes of size one may have gone."""
        left = labels_lib.axes(labels_lib.flat(dims))
        gone = tuple(
            axis for axis in labels_lib.axes(labels_lib.flat(self.dims)) if axis not in left
        )
        position = tuple(i for i, axis in enumerate(self.stack) if axis in gone)
        factors = self.factors and self.factors.map(lambda x: jnp.squeeze(x, position))
        stack = tuple(axis for axis in self.stack if axis not in gone)
        return dataclasses.replace(self, value=value, dims=dims, factors=factors, stack=stack)

    def sliced(self, value: jax.Array, cuts: Sequence[slice]) -> "View | None":
        """The view after a slice, or None where it cuts an axis that is not in one piece."""
        dims, ranges, factors = list(self.dims), list(self.ranges), self.factors
        for i, (dim, cut) in enumerate(zip(self.dims, cuts, strict=True)):
            if len(range(labels_lib.extent(dim))[cut]) == labels_lib.extent(dim):
                continue
            if len(dim) != 1 or not isinstance(axis := dim[0].axis, int):
                return None
            if dim[0].size != len(ranges[axis]):
                return None
            ranges[axis] = ranges[axis][cut]
            dims[i] = (dim[0]._replace(size=len(ranges[axis])),)
            if factors and axis in self.stack:
                index = (slice(None),) * self.stack.index(axis) + (cut,)
                factors = factors.map(lambda x, index=index: x[index])  # type: ignore[misc]
        return dataclasses.replace(
            self, value=value, dims=tuple(dims), ranges=tuple(ranges), factors=factors
        )

    def for_scan(self) -> "View":
        """The view as a scan can run over it: arrays have the layers in front, or are left out."""
        axis = self._leading_axis()
        if axis not in self.stack:
            return dataclasses.replace(self, factors=None)
        position = self.stack.index(axis)
        factors = self.factors and self.factors.map(lambda x: jnp.moveaxis(x, position, 0))
        return dataclasses.replace(self, factors=factors)

    def scanned(self, site: Site) -> "View":
        """What is known of one step's slice of a view that a scan runs over; see `at_step`."""
        axis = self._leading_axis()
        if self.lost or (self.dims[0] and axis is None):
            return self.lose(self.value, self.lost or "scanned over a part of an axis")
        scans = self.scans if axis is None else (*self.scans, (axis, site))
        stack = tuple(other for other in self.stack if other != axis)
        factors = self.factors if stack == self.stack else None
        return dataclasses.replace(
            self, dims=self.dims[1:], scans=scans, stack=stack, factors=factors
        )

    def at_step(self, sliced: "View") -> "View":
        """The view of one step, given the slices of the arrays of `for_scan`."""
        factors = self.factors if sliced.factors is None else sliced.factors
        return dataclasses.replace(self, value=sliced.value, factors=factors)

    def lose(self, value: Any, reason: str) -> "View":
        """An array that stems from the leaf in a way that is not followed; fatal if it is used."""
        return dataclasses.replace(
            self, value=value, factors=None, dims=(), stack=(), lost=self.lost or reason
        )

    def _leading_axis(self) -> int | None:
        """The axis of the leaf that is the array's first, if that is one, in one piece."""
        dim = () if self.lost else self.dims[0]
        if len(dim) != 1 or not isinstance(axis := dim[0].axis, int):
            return None
        return axis if dim[0].size == len(self.ranges[axis]) else None


def aval(variable: Any) -> Any:
    """Returns shape and dtype of a variable of a program."""
    return variable.aval


_SAME = frozenset({"copy", "copy_p", "name", "sharding_constraint"})


def renamed(eqn: JaxprEqn, dims: Dims) -> Dims | None:
    """Labels of the result of an equation that moves entries and changes none, else None."""
    name, params, result = eqn.primitive.name, eqn.params, aval(eqn.outvars[0])
    if name in _SAME:
        return dims
    if name == "convert_element_type":
        return dims if jnp.issubdtype(result.dtype, jnp.floating) else None
    if name == "transpose":
        return tuple(dims[i] for i in params["permutation"])
    if name == "squeeze":
        gone = {i % len(dims) for i in params["dimensions"]}
        return tuple(dim for i, dim in enumerate(dims) if i not in gone)
    if name == "reshape" and params.get("dimensions") is None:
        return labels_lib.reshaped(dims, result.shape)
    if name == "broadcast_in_dim" and len(eqn.invars) == 1:
        return labels_lib.broadcast(dims, params["shape"], params["broadcast_dimensions"])
    return None


def follow(eqn: JaxprEqn, view: View, results: Sequence[jax.Array]) -> list[View] | None:
    """The views that an equation makes of a view, or None where it does not merely move entries.

    Args:
      eqn: an equation whose first operand is the view, and no other is one.
      view: the view.
      results: what the equation returns.

    Returns:
      One view per result.
    """
    if eqn.primitive.name == "unstack":
        axis, size = eqn.params["axis"], len(results)
        pieces = [_cut(view, axis, slice(i, i + 1)) for i in range(size)]
        kept = [i for i in range(len(view.dims)) if i != axis]
        return _all(
            piece and piece.moved(result, tuple(piece.dims[i] for i in kept))
            for piece, result in zip(pieces, results, strict=True)
        )
    if eqn.primitive.name == "split":
        limits = [0]
        for size in eqn.params["sizes"]:
            limits.append(limits[-1] + int(size))
        return _all(
            _cut(view, eqn.params["axis"], slice(start, limit), result)
            for start, limit, result in zip(limits, limits[1:], results, strict=False)
        )
    cuts = _cuts(eqn)
    if cuts is not None:
        return _all([view.sliced(results[0], cuts)])
    dims = renamed(eqn, view.dims)
    return None if dims is None else [view.moved(results[0], dims)]


def _cuts(eqn: JaxprEqn) -> list[slice] | None:
    """The slices that a `slice`, or a `dynamic_slice` at a known place, takes."""
    params = eqn.params
    if eqn.primitive.name == "slice":
        strides = params["strides"] or (None,) * len(params["start_indices"])
        return [
            slice(*cut)
            for cut in zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        ]
    if eqn.primitive.name != "dynamic_slice":
        return None
    cuts = []
    sizes = zip(aval(eqn.invars[0]).shape, params["slice_sizes"], eqn.invars[1:], strict=True)
    for full, size, start in sizes:
        if size == full:  # XLA clamps the start to zero
            cuts.append(slice(0, full))
        elif isinstance(start, Literal):
            first = min(max(int(start.val), 0), full - size)
            cuts.append(slice(first, first + size))
        else:
            return None
    return cuts


def _cut(view: View, axis: int, cut: slice, value: jax.Array | None = None) -> View | None:
    cuts = [slice(None)] * len(view.dims)
    cuts[axis] = cut
    return view.sliced(view.value if value is None else value, cuts)


def _all(views: Iterable[View | None]) -> list[View] | None:
    found = list(views)
    return None if any(view is None for view in found) else found  # type: ignore[return-value]
