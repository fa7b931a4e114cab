"""The rewritten losses: with a low-rank term, or a zero, at every linear map."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxattr.linear_maps import analysis, interpreter
from jaxattr.linear_maps.analysis import LinearMap, LinearMaps, Traced
from jaxattr.linear_maps.interpreter import Taps, Walk
from jaxattr.linear_maps.products import Product
from jaxattr.linear_maps.views import Factors, Scale, Site, View
from jaxattr.typing import Example, Key, OutputFn, Params


class WithBias(NamedTuple):
    """A in two parts, so that no program need cut it.

    Attributes:
      inputs: [in, r], or [stack, in, r].
      bias: [1, r], or [stack, 1, r].
    """

    inputs: jax.Array
    bias: jax.Array


Bases: TypeAlias = Mapping[str, tuple[jax.Array | WithBias | None, jax.Array | None]]
"""{leaf: (A [in, r], B [out, r'])}, each [stack, ...] for a stacked leaf; None is the identity.

A with one row more than the map has inputs covers its bias too, as one more input that is always 1.
"""

Bottlenecks: TypeAlias = Mapping[str, jax.Array]
"""{leaf: Z [r, r']}, [stack, r, r'] for a stacked leaf; its values are not read."""


def find(loss: OutputFn, params: Params, example: Example, key: Key | None = None) -> LinearMaps:
    """Finds the linear maps of a loss by tracing it once; nothing is computed.

    Args:
      loss: scalar function of the parameters and ONE example.
      params: parameters, or their shapes.
      example: one example, or its shapes.
      key: what the loss takes as its key.

    Returns:
      For each leaf the linear map that it is, or why it is none. Every leaf is named once: in
      `maps`, in `exact`, or as the bias of a map.

    Guarantees: a leaf is in `maps` only if each of its uses is a product with the whole matrix,
      the same matrix or its transpose in all of them.

    Raises:
      ValueError: if the loss does not return one scalar.

    Cost: one trace.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "scale": jnp.ones(3)}
      >>> def loss(params, x, key):
      ...     return jnp.sum(params["scale"] * jnp.tanh(x @ params["w"] + params["b"]))
      >>> found = find(loss, params, jnp.ones(2))
      >>> found.maps["w"].bias, found.exact
      ('b', {'scale': 'used by mul'})
    """
    return analysis.trace(loss, params, example, key).found


def bottleneck(
    loss: OutputFn,
    params: Params,
    example: Example,
    key: Key | None = None,
    *,
    leaves: Collection[str] | None = None,
) -> Callable[..., jax.Array]:
    """Rewrites a loss so that its gradient in a small Z is a projected weight gradient.

    Args:
      loss: scalar function of the parameters and ONE example.
      params: parameters, or their shapes.
      example: one example, or its shapes.
      key: what the loss takes as its key.
      leaves: the leaves to rewrite. Default: all that are linear maps.

    Returns:
      `rewritten(params, bases, z, example, key)`: the loss, as a function of Z too: that of the
      weights W + A Z B^T at Z = 0, for each leaf of `z`. Pure, and fit for jit and vmap.

    Guarantees: dL/dZ = A^T (dL/dW) B, without error other than rounding; with the bias included
      A^T [dL/dW; dL/db] B. The values in `z` are never read, only its shapes and dtypes: the loss
      and its gradient are those at Z = 0 whatever they are. So there is no second derivative in Z
      to be had; all derivatives that take one in Z at most are exact.

    Raises:
      ValueError: if a leaf of `leaves` is no linear map; when called, if shapes are not those that
        were traced, or bases and z do not fit the maps.

    Cost: a backward pass without weight gradients, and t (in r + r r' + r' out) multiplications per
      use. No array of the size of W is formed per example.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> params, x = {"w": jnp.ones((3, 2))}, jnp.array([1.0, 2.0, 3.0])
      >>> def loss(params, x, key):
      ...     return jnp.sum((x @ params["w"]) ** 2)
      >>> rewritten = bottleneck(loss, params, x)
      >>> bases = {"w": (jnp.ones((3, 1)), jnp.ones((2, 1)))}  # A^T (dL/dW) B sums dL/dW
      >>> z = {"w": jnp.zeros((1, 1))}
      >>> jax.grad(rewritten, argnums=2)(params, bases, z, x)["w"].tolist()
      [[144.0]]
      >>> jax.grad(loss)(params, x, None)["w"].sum().item()
      144.0
    """
    traced = analysis.trace(loss, params, example, key)
    chosen = chosen_leaves(traced, leaves)
    plain = {leaf for leaf in chosen if _is_plain(traced, leaf)}

    def rewritten(
        params: Params, bases: Bases, z: Bottlenecks, example: Example, key: Key | None = None
    ) -> jax.Array:
        args = arguments(traced, params, example, key)
        numbers = {name: number for number, name in enumerate(traced.names)}
        followed: dict[str, View] = {}
        for leaf in z:
            if leaf not in chosen:
                raise ValueError(f"z has {leaf!r}, but only these are rewritten: {chosen}.")
            linear_map, number = traced.found.maps[leaf], numbers[leaf]
            factors = _factors(linear_map, bases, z[leaf])
            joined = leaf in plain and factors.a is not None
            of_bias = None if joined else _of_bias(factors)
            factors = factors if joined else factors._replace(bias=None)
            followed[leaf] = _with_factors(linear_map, args[number], factors)
            if linear_map.bias is not None and of_bias is not None:
                bias = args[numbers[linear_map.bias]]
                of_bias = _as_bias(linear_map, of_bias, bias.shape).astype(bias.dtype)
                args[numbers[linear_map.bias]] = bias + (of_bias - jax.lax.stop_gradient(of_bias))
        visitor = _Bottleneck(set(z), traced.found.maps, _transposed(traced))
        return evaluate(traced, args, followed, Walk(visitor=visitor))[0]

    return rewritten


def matrix(linear_map: LinearMap, leaf: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Returns the matrix that a leaf, or an array of its shape such as its gradient, stands for.

    Args:
      linear_map: the map.
      leaf: array of the leaf's shape.
      bias: array of the bias's shape, which becomes the last row; or None.

    Returns:
      [in, out], or [in + 1, out] with a bias; [stack, ...] for a stacked leaf.

    Raises:
      TypeError or ValueError: if the arrays do not have the leaf's and the bias's shapes.

    Guarantees: entries are moved, none is changed.

    Cost: a transpose.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.arange(6.0).reshape(2, 3)}
      >>> found = find(lambda p, x, key: jnp.sum(p["w"] @ x), params, jnp.ones(3))
      >>> matrix(found.maps["w"], params["w"]).tolist()
      [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    """
    order = (*linear_map.stack_axes, *linear_map.in_axes, *linear_map.out_axes)
    rows = leaf.transpose(order).reshape(
        *leading(linear_map), linear_map.size_in, linear_map.size_out
    )
    if bias is None:
        return rows
    axes = linear_map.bias_stack_axes
    last = jnp.moveaxis(bias, axes, range(len(axes)))
    last = last.reshape(*leading(linear_map), 1, linear_map.size_out)
    return jnp.concatenate([rows, last], axis=-2)


@dataclasses.dataclass(frozen=True)
class Rewriting(interpreter.Visitor):
    """A visitor of a loss in which the chosen leaves were found to be linear maps.

    The others are followed too, as they were when these were found, and nothing is done to them.
    """

    chosen: Collection[str]

    def reject(self, view: View, reason: str) -> None:
        """Raises for a chosen leaf: `find` would have met the use."""
        if view.leaf in self.chosen:
            raise AssertionError(f"{view.leaf} was found to be a linear map, but is {reason}.")


@dataclasses.dataclass(frozen=True)
class _Bottleneck(Rewriting):
    """The visitor that adds the low-rank term."""

    maps: Mapping[str, LinearMap]
    transposed: Mapping[Site, bool]

    def product(
        self, view: View, product: Product, x: jax.Array, y: jax.Array, walk: Walk
    ) -> tuple[Any, Taps]:
        if view.factors is None:
            return y, {}
        linear_map, transposed = self.maps[view.leaf], self.transposed[walk.site]
        (a, z, b, bias), shape, dtype = view.factors, y.shape, y.dtype
        known, outline = (view.scales, view.steps), view.outline()

        # The term is linear in Z, and Z is zero: its value is nothing, and so is its derivative in
        # x. Saying so spares a pass forwards through B and one backwards through A.
        @jax.custom_jvp
        def term(*primals: Any) -> jax.Array:
            return jnp.zeros(shape, dtype)

        @term.defjvp
        def _derivative(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
            _, x, a, b, bias, (scales, steps) = primals
            covering = dataclasses.replace(outline, scales=scales, steps=steps)
            factors = _of_entries(covering, linear_map, Factors(a, tangents[0], b, bias))
            return term(*primals), product.low_rank(x, factors, transposed, dtype)

        return y + term(z, x, a, b, bias, known), {}


def _of_entries(view: View, linear_map: LinearMap, factors: Factors) -> Factors:
    """The low-rank term for the entries that a view covers, multiplied as they were.

    A side that is the identity leaves its part to Z.
    """
    of_inputs = [scale for scale in view.scales if {*scale.axes} <= {*linear_map.in_axes}]
    of_outputs = [scale for scale in view.scales if not {*scale.axes} <= {*linear_map.in_axes}]

    def rows(axes: tuple[int, ...], scales: list[Scale], matrix: jax.Array) -> jax.Array:
        if not view.is_whole(axes):
            matrix = matrix[..., view.covered(axes), :]
        for block, step in zip(view.blocks, view.steps, strict=True):
            if block.axis in axes:
                shape = *matrix.shape[:-2], block.number, -1, matrix.shape[-1]
                matrix = jnp.take(matrix.reshape(shape), step, axis=-3)
        for scale in scales:
            matrix = matrix * view.factor(scale, axes).astype(matrix.dtype)[:, None]
        return matrix

    a, z, b, bias = factors
    inputs = rows(linear_map.in_axes, of_inputs, z if a is None else a)
    a, z = (None, inputs) if a is None else (inputs, z)
    outputs = rows(linear_map.out_axes, of_outputs, jnp.swapaxes(z, -1, -2) if b is None else b)
    z, b = (jnp.swapaxes(outputs, -1, -2), None) if b is None else (z, outputs)
    return Factors(a, z, b, bias)


def chosen_leaves(traced: Traced, leaves: Collection[str] | None) -> list[str]:
    """Returns the leaves to rewrite, checked."""
    found = traced.found
    chosen = sorted(found.maps if leaves is None else leaves)
    biases = {linear_map.bias: leaf for leaf, linear_map in found.maps.items()}
    for leaf in chosen:
        if leaf not in found.maps:
            of = biases.get(leaf)
            why = f"it is the bias of {of}" if of else found.exact.get(leaf, "there is none")
            raise ValueError(
                f"Leaf {leaf!r} is no linear map: {why}. Linear maps: {sorted(found.maps)}."
            )
    return chosen


def arguments(traced: Traced, params: Params, example: Example, key: Key | None) -> list[Any]:
    """Returns the arguments of the traced program, checked against it."""
    args = [jnp.asarray(arg) for arg in jax.tree.leaves((params, example, key))]
    got = [f"{arg.dtype}{list(arg.shape)}" for arg in args]
    needed = [f"{aval.dtype}{list(aval.shape)}" for aval in traced.program.in_avals]
    if got != needed:
        wrong = [pair for pair in zip(got, needed, strict=False) if pair[0] != pair[1]]
        raise ValueError(
            "A rewritten loss takes arrays of the shapes and dtypes that it was made for. Got "
            f"{len(got)} arrays, needed {len(needed)}; (got, needed) that differ: {wrong[:3]}."
        )
    return args


def evaluate(
    traced: Traced, args: Sequence[Any], followed: Mapping[str, View], walk: Walk
) -> tuple[jax.Array, Taps]:
    """Evaluates the traced loss.

    Args:
      traced: the loss.
      args: its arguments.
      followed: the views of the chosen leaves.
      walk: what to do where leaves are used.

    Returns:
      The loss, and what the visitor recorded.
    """
    views = [
        followed.get(name) or analysis.view(name, leaf)
        for name, leaf in zip(traced.names, args, strict=False)
    ]
    results, taps = interpreter.evaluate(traced.program, [*views, *args[len(views) :]], walk)
    return interpreter.plain(results[0]), taps


def _transposed(traced: Traced) -> dict[Site, bool]:
    groups = [together for uses in traced.uses.values() for together in uses]
    return {use.site: use.transposed for together in groups for use in together}


def leading(linear_map: LinearMap) -> tuple[int, ...]:
    """Returns the leading axis of a map's factors: its layers, if it is stacked."""
    return () if linear_map.stack is None else (linear_map.stack,)


def _is_plain(traced: Traced, leaf: str) -> bool:
    """Whether what the last row of A adds to the bias can be added to the map's own results.

    It then takes part in the products with Z and B that are there; as the bias is added to each
    result, and to nothing else, that is the same.
    """
    linear_map = traced.found.maps[leaf]
    axes = (*linear_map.in_axes, *linear_map.out_axes)
    return not any(
        use.transposed
        or use.view.scales
        or use.view.blocks
        or use.view.margins
        or not use.view.is_whole(axes)
        for together in traced.uses[leaf]
        for use in together
    )


def _factors(linear_map: LinearMap, bases: Bases, z: jax.Array) -> Factors:
    """Checks A, Z, B and splits off the last row of A, or of Z where A is the identity."""
    if linear_map.leaf not in bases:
        raise ValueError(f"z has {linear_map.leaf!r}, but bases have only {sorted(bases)}.")
    a, b = bases[linear_map.leaf]
    if isinstance(a, WithBias):
        a, bias = a
        _check_factors(linear_map, linear_map.size_in, a, z, b)
        return Factors(a, z, b, bias)
    rows = z.shape[-2] if a is None else a.shape[-2]
    with_bias = linear_map.bias is not None and rows == linear_map.size_in + 1
    _check_factors(linear_map, linear_map.size_in + with_bias, a, z, b)
    if not with_bias:
        return Factors(a, z, b)
    if a is None:
        return Factors(None, z[..., :-1, :], b, z[..., -1:, :])
    return Factors(a[..., :-1, :], z, b, a[..., -1:, :])


def _of_bias(factors: Factors) -> jax.Array | None:
    """What the last row of A adds to the bias, [*stack, 1, out].

    Added to the bias itself, it needs no rule: it is exact wherever the bias is used.
    """
    a, z, b, bias = factors
    if bias is None:
        return None
    row = bias if a is None else bias @ z
    return row if b is None else row @ jnp.swapaxes(b, -1, -2)


def _as_bias(linear_map: LinearMap, row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Lays what is added to each layer's bias, [*stack, 1, out], out as the bias is."""
    axes = linear_map.bias_stack_axes
    others = [n for axis, n in enumerate(shape) if axis not in axes]
    layers_first = row.reshape(*(shape[axis] for axis in axes), *others)
    return jnp.moveaxis(layers_first, range(len(axes)), axes)


def _check_factors(
    linear_map: LinearMap, rows: int, a: jax.Array | None, z: jax.Array, b: jax.Array | None
) -> None:
    lead, (left, right) = leading(linear_map), z.shape[-2:]
    shapes = {"A": (*lead, rows, left), "Z": (*lead, left, right)}
    shapes["B"] = (*lead, linear_map.size_out, right)
    for (name, shape), array in zip(shapes.items(), (a, z, b), strict=True):
        fits = shape[-2] == shape[-1] if array is None else array.shape == shape
        if not fits:
            got = "the identity" if array is None else list(array.shape)
            raise ValueError(
                f"{name} of {linear_map.leaf!r} must have shape {list(shape)}, got {got}."
            )


def _with_factors(linear_map: LinearMap, leaf: jax.Array, factors: Factors) -> View:
    if linear_map.stack is not None:
        shape = [leaf.shape[axis] for axis in linear_map.stack_axes]
        factors = factors.map(lambda x: x.reshape(*shape, *x.shape[1:]))
    return analysis.view(linear_map.leaf, leaf, factors=factors, stack=linear_map.stack_axes)
