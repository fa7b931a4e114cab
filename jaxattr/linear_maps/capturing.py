"""What each linear map is applied to, and its cotangents: the two factors of a weight gradient."""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.linear_maps import analysis
from jaxattr.linear_maps.analysis import LinearMap, Use
from jaxattr.linear_maps.interpreter import Taps, Walk
from jaxattr.linear_maps.labels import Label, extent, ordered, rearrange
from jaxattr.linear_maps.products import Product
from jaxattr.linear_maps.rewriting import Rewriting, arguments, chosen_leaves, evaluate, leading
from jaxattr.linear_maps.views import View
from jaxattr.scales import widest
from jaxattr.typing import Example, Key, OutputFn, Params


class Captured(NamedTuple):
    """The two factors of a leaf's gradient for one use: dL/dW = sum over t of inputs^T cotangents.

    Attributes:
      inputs: what the matrix is applied to, float [t, in]; of an embedding the ids, int [t], where
        the id `size_in` stands for no row.
      cotangents: gradient of the loss with respect to the map's result, float [t, out].
      applied: whether this use applies the map, bool [], or [stack] for the layers; the others'
        inputs and cotangents are zero.

    The first two are [stack, t, ...] for a stacked leaf. Where the map is used transposed, the
    gradient is transposed too, so they change places: `inputs` holds the cotangents and vice versa.
    """

    inputs: jax.Array
    cotangents: jax.Array
    applied: jax.Array


def capture(
    loss: OutputFn,
    params: Params,
    example: Example,
    key: Key | None = None,
    *,
    leaves: Collection[str] | None = None,
) -> Callable[..., dict[str, tuple[Captured, ...]]]:
    """Makes a function that returns what each linear map is applied to, and its cotangents.

    Args:
      loss: scalar function of the parameters and ONE example.
      params: parameters, or their shapes.
      example: one example, or its shapes.
      key: what the loss takes as its key.
      leaves: the leaves to capture. Default: all that are linear maps.

    Returns:
      `captured(params, example, key)`: {leaf: one `Captured` per use}. Pure, fit for jit and vmap.
      t counts the positions that the map is applied at: tokens, output pixels, steps of a scan that
      does not run over the leaf's layers. A convolution with feature groups has a position per
      group, whose cotangents are zero outside the group's outputs.

    Guarantees: the uses' products inputs^T cotangents, summed, are the leaf's gradient exactly.
    Where the loss is not finite, cotangents are NaN: a label out of range has a gradient that is
    finite, and wrong.

    Raises:
      ValueError: if a leaf of `leaves` is no linear map; when called, if shapes are not those that
        were traced.

    Cost: one forward and one backward pass without weight gradients; all inputs are kept, also
      those inside a remat.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
      >>> def loss(params, x, key):
      ...     return jnp.sum((x @ params["w"]) ** 2)
      >>> (one,) = capture(loss, params, x)(params, x)["w"]
      >>> one.inputs.shape, one.cotangents.shape
      ((4, 3), (4, 2))
      >>> bool((one.inputs.T @ one.cotangents == jax.grad(loss)(params, x, None)["w"]).all())
      True
    """
    traced = analysis.trace(loss, params, example, key)
    chosen = chosen_leaves(traced, leaves)
    uses = {use.site: use for leaf in chosen for together in traced.uses[leaf] for use in together}

    def captured(
        params: Params, example: Example, key: Key | None = None
    ) -> dict[str, tuple[Captured, ...]]:
        args = arguments(traced, params, example, key)

        def with_sinks(sinks: Taps) -> tuple[jax.Array, Taps]:
            return evaluate(traced, args, {}, Walk(visitor=_Capture(chosen), sinks=sinks))

        sinks = {site: jnp.zeros(_sink_shape(use), use.result.dtype) for site, use in uses.items()}
        (value, inputs), cotangents = jax.value_and_grad(with_sinks, has_aux=True)(sinks)
        finite = jnp.isfinite(value)
        cotangents = jax.tree.map(lambda side: jnp.where(finite, side, jnp.nan), cotangents)
        return {
            leaf: tuple(
                _gather_layers(traced.found.maps[leaf], together, inputs, cotangents)
                for together in traced.uses[leaf]
            )
            for leaf in chosen
        }

    return captured


class _Capture(Rewriting):
    """The visitor that adds a zero, whose gradient is the cotangent, and records the inputs."""

    def product(
        self, view: View, product: Product, x: jax.Array, y: jax.Array, walk: Walk
    ) -> tuple[Any, Taps]:
        if view.leaf not in self.chosen:
            return y, {}
        scales = [scale.value for scale in view.scales]
        return y + walk.sinks[walk.site], {walk.site: (product.inputs(x), scales)}


def _sink_shape(use: Use) -> tuple[int, ...]:
    return (*(length for _, length in use.loops), *use.result.shape)


def _gather_layers(
    linear_map: LinearMap, together: tuple[Use, ...], inputs: Taps, cotangents: Taps
) -> Captured:
    """Brings what was recorded at the places of one use to [t, ...], or [stack, t, ...]."""
    pairs = []
    for use in together:
        to_rows = use.product.cotangents
        for _ in use.loops:
            to_rows = jax.vmap(to_rows)
        (left, values), right = inputs[use.site], to_rows(cotangents[use.site])
        use, left, right, values = _without_blocks(use, left, right, values)
        if use.product.kind == "embedding":
            left = jnp.minimum(left, extent(use.product.ins))[..., None]
        left, right = (right, left) if use.transposed else (left, right)
        left, right = _scaled(linear_map, use, values, left, right)
        sides = zip((left, right), (linear_map.in_axes, linear_map.out_axes), strict=True)
        pairs.append([_whole(use, linear_map, side, axes) for side, axes in sides])
    lookup = together[0].product.kind == "embedding"
    lefts, rights = zip(*pairs, strict=True)
    left = _by_layer(linear_map, together, lefts, linear_map.size_in if lookup else 0)
    right = _by_layer(linear_map, together, rights, 0)
    applied = np.ones(leading(linear_map), bool)
    if linear_map.stack is not None:
        numbers = np.concatenate([use.view.covered(linear_map.stack_axes) for use in together])
        applied = np.isin(np.arange(linear_map.stack), numbers)
    return Captured(left[..., 0] if lookup else left, right, jnp.asarray(applied))


def _without_blocks(
    use: Use, left: jax.Array, right: jax.Array, values: Sequence[jax.Array]
) -> tuple[Use, jax.Array, jax.Array, Sequence[jax.Array]]:
    """Puts the outputs of all blocks, whose inputs are the same, next to one another."""
    for block in use.view.blocks:
        number = [site for site, _ in use.loops].index(block.site)
        left, right = left.take(0, axis=number), jnp.moveaxis(right, number, -2)
        right = right.reshape(*right.shape[:-2], -1)
        values = [value.take(0, axis=number) for value in values]
        loops = (*use.loops[:number], *use.loops[number + 1 :])
        use = dataclasses.replace(use, loops=loops)
    return use, left, right, values


def _scaled(
    linear_map: LinearMap,
    use: Use,
    values: Sequence[jax.Array],
    left: jax.Array,
    right: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Multiplies inputs or cotangents by what the matrix was multiplied by; [*loops, ..., t, f]."""
    for scale, value in zip(use.view.scales, values, strict=True):
        of_inputs = analysis.scales_inputs(scale, linear_map, use.product.kind)
        axes = linear_map.in_axes if of_inputs else linear_map.out_axes
        by = use.view.factor(dataclasses.replace(scale, value=value), axes)  # [*loops, f]
        apart = (1,) * (left.ndim - by.ndim)
        by = by.reshape(*by.shape[:-1], *apart, by.shape[-1])
        left, right = (left * by, right) if of_inputs else (left, right * by)
    return left, right


def _whole(use: Use, linear_map: LinearMap, side: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Brings a side to all inputs or outputs of the map: those that are not used are zero."""
    rows = _rows(use, linear_map.stack_axes, side)
    if use.view.is_whole(axes):
        return rows
    covered = use.view.covered(axes)
    size = math.prod(use.view.shape[axis] for axis in axes)
    if jnp.issubdtype(rows.dtype, jnp.integer):
        return jnp.asarray(np.append(covered, size), rows.dtype)[rows]
    return jnp.zeros((*rows.shape[:-1], size), rows.dtype).at[..., covered].set(rows)


def _rows(use: Use, stack: tuple[int, ...], block: jax.Array) -> jax.Array:
    """Turns [*loops, *layers, t, f] into [layers, t, f] or, if there is no stack, [t, f]."""
    names = [use.scanned.get(site, ("loop", site)) for site, _ in use.loops]
    loops = [Label(name, length) for name, (_, length) in zip(names, use.loops, strict=True)]
    t, f = Label("t", block.shape[-2]), Label("f", block.shape[-1])
    source = tuple((label,) for label in (*loops, *use.product.layers, t, f))
    labels = (*loops, *use.product.layers)
    layers = ordered(label for label in labels if label.axis in stack)
    positions = (*(label for label in labels if label.axis not in stack), t)
    return rearrange(block, source, (layers, positions, (f,)) if stack else (positions, (f,)))


def _by_layer(
    linear_map: LinearMap, together: tuple[Use, ...], blocks: Sequence[jax.Array], nothing: int
) -> jax.Array:
    """Joins [layers, t, f] of several places to [stack, t, f]; other layers hold `nothing`."""
    if linear_map.stack is None:
        return blocks[0]
    numbers = [use.view.covered(linear_map.stack_axes) for use in together]
    if np.array_equal(numbers[0], np.arange(linear_map.stack)):
        return blocks[0]
    shape = linear_map.stack, *blocks[0].shape[1:]
    whole = jnp.full(shape, nothing, widest(*(block.dtype for block in blocks)))
    return whole.at[np.concatenate(numbers)].set(jnp.concatenate(blocks))
