"""Per-example gradient features: one slice of columns per parameter group.

    phi(x) = [ P_1 g_1(x) | ... | P_m g_m(x) ]        g(x) = d output(params, x) / d params

The gradient of each example is taken exactly (`vmap(grad)`), a microbatch at a time, and projected
before the next microbatch is touched, so memory is set by the microbatch and not by the batch.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxattr import groups as groups_lib
from jaxattr import projections
from jaxattr.groups import GroupLayout, Groups
from jaxattr.projections import Projection
from jaxattr.typing import Batch, Example, Features, Key, OutputFn, Params


@dataclasses.dataclass(frozen=True)
class FeatureLayout:
    """Which columns of the features belong to which group.

    Attributes:
      names: group names, sorted.
      sizes: parameters per group.
      dims: features per group.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    dims: tuple[int, ...]

    @property
    def total(self) -> int:
        """Number of features p."""
        return sum(self.dims)

    @property
    def slices(self) -> dict[str, slice]:
        """The columns of each group."""
        slices, start = {}, 0
        for name, dim in zip(self.names, self.dims, strict=True):
            slices[name] = slice(start, start + dim)
            start += dim
        return slices


class FeatureRule(NamedTuple):
    """How one example becomes features.

    Attributes:
      output: scalar function of one example, whose gradient is the feature.
      projection: applied to each group's gradient.
      normalize: whether the features of an example, all groups together, get unit norm.
      residual: scalar of one example that multiplies its column of scores, or None for one.
    """

    output: OutputFn
    projection: Projection
    normalize: bool = False
    residual: OutputFn | None = None


class Featurized(NamedTuple):
    """Features of a batch and what comes with them.

    Attributes:
      features: float [b, p].
      residual: float [b].
    """

    features: Features
    residual: jax.Array


@dataclasses.dataclass(frozen=True)
class Featurizer:
    """Maps a batch to its features; pure and jittable. Made by `featurizer`.

    Attributes:
      layout: which columns belong to which group.
      groups: which parameters belong to which group.
    """

    layout: FeatureLayout
    groups: GroupLayout
    with_residual: Callable[[Params, Batch, jax.Array, jax.Array], Featurized]

    def __call__(
        self,
        params: Params,
        batch: Batch,
        ids: jax.Array | None = None,
        checkpoint: int | jax.Array = 0,
    ) -> Features:
        """Computes features.

        Args:
          params: the parameters, of the structure that the featurizer was made for.
          batch: a pytree of arrays [b, ...].
          ids: integers [b], the examples' identities: a stochastic loss draws its randomness from
            them and the run's key alone. Default: 0, 1, ...
          checkpoint: number of the checkpoint; each has a projection of its own.

        Returns:
          Features [b, p], float32 or wider. Rows of examples whose gradient is not finite are not
          finite: whoever ranks them must look.
        """
        if ids is None:
            ids = jnp.arange(leading_size(batch))
        return self.with_residual(params, batch, jnp.asarray(ids), jnp.asarray(checkpoint)).features


def featurize_with(
    rule: FeatureRule,
    params: Params,
    example: Example,
    *,
    groups: Groups = groups_lib.by_layer,
    key: Key | None = None,
    microbatch: int | None = None,
) -> Featurizer:
    """Makes a featurizer from a rule.

    Args:
      rule: how one example becomes features.
      params: parameters, or their shapes.
      example: ONE example, or its shapes.
      groups: see `jaxattr.groups.resolve`.
      key: key of the projections and of stochastic outputs. Default: `jax.random.key(0)`.
      microbatch: examples whose gradients are in memory at once. Default: as many as fit 256 MiB.

    Returns:
      The featurizer.

    Raises:
      ValueError: if the output is not a float scalar, the parameters are not float arrays, or the
        groups are no partition of them.
    """
    layout = groups_lib.resolve(groups, params)
    key = jax.random.key(0) if key is None else key
    check_output(rule.output, params, example, key)
    if microbatch is not None and microbatch < 1:
        raise ValueError(f"microbatch must be at least 1, got {microbatch}.")
    microbatch = microbatch or _default_microbatch(sum(layout.sizes))
    dims = tuple(rule.projection.dim(size) for size in layout.sizes)

    step = functools.partial(_compiled_step(rule, layout, microbatch), key)
    return Featurizer(FeatureLayout(layout.names, layout.sizes, dims), layout, step)


def leading_size(batch: Batch) -> int:
    """Returns the size of the leading axis that all arrays of a batch share.

    Args:
      batch: a pytree of arrays [b, ...].

    Returns:
      b.

    Raises:
      ValueError: if there is no array, a scalar, or two arrays differ.
    """
    shapes = {
        name: jnp.shape(leaf)
        for name, leaf in zip(groups_lib.leaf_names(batch), jax.tree.leaves(batch), strict=True)
    }
    scalars = [name for name, shape in shapes.items() if not shape]
    if scalars or len({shape[0] for shape in shapes.values() if shape}) != 1:
        raise ValueError(
            "All arrays of a data set need the same leading axis, one row per example. "
            f"Got shapes {shapes}."
        )
    return next(iter(shapes.values()))[0]


def check_output(output: OutputFn, params: Params, example: Example, key: Key) -> None:
    """Checks that a function of one example returns a float scalar.

    Args:
      output: the function.
      params: parameters, or their shapes.
      example: ONE example, or its shapes.
      key: any key.

    Raises:
      ValueError: if the result is not one float scalar.
    """
    result = jax.eval_shape(output, params, example, key)
    leaves = jax.tree.leaves(result)
    if len(leaves) == 1 and leaves[0].shape == () and jnp.issubdtype(leaves[0].dtype, jnp.floating):
        return
    got = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves]
    raise ValueError(
        f"The function {getattr(output, '__name__', output)!r} must map ONE example, without a "
        f"batch axis, to one float scalar; it returned {', '.join(got) or 'nothing'}. If the model "
        "wants a batch, add the axis inside (x[None]) and sum or index the result; return no "
        "auxiliary values."
    )


@functools.lru_cache(maxsize=16)
def _compiled_step(
    rule: FeatureRule, layout: GroupLayout, microbatch: int
) -> Callable[[Key, Params, Batch, jax.Array, jax.Array], Featurized]:
    """The jitted step; an index of other data by the same method compiles nothing anew."""

    def step(
        key: Key, params: Params, batch: Batch, ids: jax.Array, checkpoint: jax.Array
    ) -> Featurized:
        def chunk(batch: Batch, ids: jax.Array) -> Featurized:
            gradients = _gradients(rule.output, layout, params, batch, _example_keys(key, ids))
            phi = _project(rule.projection, layout, jax.random.fold_in(key, checkpoint), gradients)
            phi = _unit_norm(phi) if rule.normalize else phi
            return Featurized(phi, _residual(rule.residual, params, batch, _example_keys(key, ids)))

        return _in_microbatches(chunk, microbatch)(batch, ids)

    return jax.jit(step)


def _gradients(
    output: OutputFn, layout: GroupLayout, params: Params, batch: Batch, keys: Key
) -> dict[str, jax.Array]:
    """Per-example gradients {leaf name: [b, *shape]} of the leaves that are in a group."""
    names, structure = groups_lib.leaf_names(params), jax.tree.structure(params)
    leaves = dict(zip(names, jax.tree.leaves(params), strict=True))
    grouped = {name: leaf for name, leaf in leaves.items() if name in layout.leaves}

    def of_grouped(grouped: dict[str, jax.Array], example: Example, key: Key) -> jax.Array:
        merged = [grouped.get(name, leaves[name]) for name in names]
        return output(jax.tree.unflatten(structure, merged), example, key)

    return jax.vmap(jax.grad(of_grouped), in_axes=(None, 0, 0))(grouped, batch, keys)


def _project(
    projection: Projection, layout: GroupLayout, key: Key, gradients: dict[str, jax.Array]
) -> Features:
    wide = {
        name: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        for name, leaf in gradients.items()
    }
    columns = [
        projection.project(projections.group_key(key, name), members)
        for name, members in zip(layout.names, groups_lib.split(layout, wide), strict=True)
    ]
    dtype = jnp.result_type(*columns)
    return jnp.concatenate([column.astype(dtype) for column in columns], axis=1)  # [b, p]


def _unit_norm(phi: Features) -> Features:
    # Dividing by the largest entry first keeps the squares from under- and overflowing.
    largest = jnp.max(jnp.abs(phi), axis=1, keepdims=True)
    phi = phi / jnp.where(largest == 0, 1, largest)
    norm = jnp.linalg.norm(phi, axis=1, keepdims=True)
    return phi / jnp.where(norm == 0, 1, norm)


def _residual(residual: OutputFn | None, params: Params, batch: Batch, keys: Key) -> jax.Array:
    if residual is None:
        return jnp.ones(keys.shape[0])
    return jax.vmap(residual, in_axes=(None, 0, 0))(params, batch, keys)


def _example_keys(key: Key, ids: jax.Array) -> Key:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(projections.group_key(key, "loss"), ids)


def _in_microbatches(
    chunk: Callable[[Batch, jax.Array], Featurized], size: int
) -> Callable[[Batch, jax.Array], Featurized]:
    """Runs `chunk` over microbatches; a last one that is not full repeats the first examples."""

    def run(batch: Batch, ids: jax.Array) -> Featurized:
        b = ids.shape[0]
        fitted = math.ceil(b / math.ceil(b / size))  # evens the microbatches out: least padding
        padding = -b % fitted
        rows = jnp.arange(b + padding) % b
        batch, ids = jax.tree.map(lambda x: x[rows] if padding else x, (batch, ids))
        mapped = optax.microbatching.microbatch(
            chunk,
            argnums=(0, 1),
            microbatch_size=fitted,
            accumulator=optax.microbatching.AccumulationType.CONCAT,
        )
        return jax.tree.map(lambda x: x[:b], mapped(batch, ids))

    return run


def _default_microbatch(parameters: int) -> int:
    gradient_bytes = 4 * max(parameters, 1)
    return max(1, min(256, (256 << 20) // gradient_bytes))
