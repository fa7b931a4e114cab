"""Scores of blocks of training examples, and the strongest of them: on each device its own.

Every function here is pure. Queries are on every device, training examples on one; nothing moves
but sums over columns, where those are spread, and the candidates of each device at the end.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.features.plans import FeatureLayout
from jaxattr.sharding import DATA, MODEL, Placement
from jaxattr.store.rows import COLUMNS, EXAMPLES, FEATURES, axes_of, pad_columns
from jaxattr.typing import Features, Link

QUERIES = (None, None, MODEL)
"""Mesh axes of query features [q, c, p]."""

SIDE = {name: axes_of(name) for name in (FEATURES, EXAMPLES)}
"""Mesh axes of the arrays of a slab."""


class TopK(NamedTuple):
    """The strongest training examples per query, strongest first.

    Attributes:
      ids: integers [q, k]; -1 where there is none (a query, or too many training examples, are
        not finite).
      scores: float [q, k]; NaN where there is none.
    """

    ids: jax.Array
    scores: jax.Array


class TrainSide(NamedTuple):
    """Rows of training examples.

    Attributes:
      features: eta_c K_c phi_c(n), [r, c * p].
      residual: r, zero for those that do not count, [r].
      counted: which are finite and no padding, bool [r].
    """

    features: Features
    residual: jax.Array
    counted: jax.Array


def train_side(arrays: dict[str, jax.Array]) -> TrainSide:
    """Reads a slab.

    Args:
      arrays: {"features": [g, b, c, p], "examples": [g, b, c, 2]}.

    Returns:
      Its rows, in order; float32 or wider.
    """
    features, examples = arrays[FEATURES], arrays[EXAMPLES]
    examples = examples.reshape(-1, *examples.shape[2:])  # [r, c, 2]
    counted = (examples[..., COLUMNS.finite] > 0).all(axis=1)
    residual = jnp.where(counted, examples[..., COLUMNS.residual].mean(axis=1), 0)
    wide = jnp.promote_types(features.dtype, jnp.float32)
    return TrainSide(features.reshape(len(counted), -1).astype(wide), residual, counted)


def weigh(layout: FeatureLayout, place: Placement, w: jax.Array, phi: Features) -> jax.Array:
    """Multiplies query features by their groups' weights, and lays them out as slabs are.

    Args:
      layout: the groups.
      place: the devices.
      w: weights [m].
      phi: [q, c * p].

    Returns:
      [q, c, p], p padded to divide over columns.
    """
    # Not jnp.repeat, which has the compiler fold a sum over all columns.
    columns = w[np.repeat(np.arange(len(layout.dims)), layout.dims)].astype(phi.dtype)  # [p]
    split = phi.reshape(phi.shape[0], -1, layout.total) * columns[None, None]
    return pad_columns(split, -(-layout.total // place.columns) * place.columns)


def linked(link: Link, scores: Any) -> Any:
    """Makes scores of sums of contributions.

    Args:
      link: of the method.
      scores: the sums.
    """
    return scores**2 if link == "square" else scores


def local_scores(place: Placement, link: Link, weighted: jax.Array, side: TrainSide) -> jax.Array:
    """Scores of a device's own training examples, [q, r]; inside `Placement.over_shards`.

    Args:
      place: the devices.
      link: of the method.
      weighted: query features [q, c, p], the device's own columns.
      side: the device's own rows.
    """
    flat = weighted.reshape(weighted.shape[0], -1)
    scores = place.sum_columns(jnp.matmul(flat, side.features.T, precision="highest"))
    return linked(link, scores * side.residual[None])  # [q, r]


def local_contributions(
    place: Placement, layout: FeatureLayout, phi: Features, arrays: dict[str, jax.Array]
) -> jax.Array:
    """Contributions of a device's own training examples; inside `Placement.over_shards`.

    Args:
      place: the devices.
      layout: the groups.
      phi: query features [q, c * p].
      arrays: of a slab.

    Returns:
      Float [q, r, m].
    """
    side = train_side(arrays)
    c = arrays[EXAMPLES].shape[2]
    train = side.features.reshape(len(side.counted), c, -1)  # [r, c, own columns]
    phi = weigh(layout, place, jnp.ones(len(layout.names), phi.dtype), phi)  # [q, c, p]
    own = train.shape[2]
    parts = []
    for columns in layout.slices.values():
        if place.columns == 1:
            pairs = [(phi[:, i, columns], train[:, i, columns]) for i in range(c)]
        else:
            # Columns of a group lie on several devices: the others' count as zero.
            position = place.column() * own + jnp.arange(own)
            inside = (position >= columns.start) & (position < columns.stop)
            mine = jax.lax.dynamic_slice_in_dim(phi, place.column() * own, own, axis=2)
            mine = jnp.where(inside[None, None], mine, 0)
            pairs = [(mine[:, i], train[:, i]) for i in range(c)]
        # Not one einsum over checkpoints and columns, which takes XLA four times as long on a CPU.
        parts.append(sum(jnp.matmul(a, b.T, precision="highest") for a, b in pairs))
    found = place.sum_columns(jnp.stack(parts, axis=-1))
    return found * side.residual[None, :, None]  # [q, r, m]


@functools.lru_cache(maxsize=32)
def score_step(place: Placement, layout: FeatureLayout, link: Link) -> Any:
    """The compiled step (w, phi [q, c * p], arrays of a slab) -> [q, g, b], b over `data`."""

    def of_shard(weighted: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
        g, b = arrays[EXAMPLES].shape[:2]
        scores = local_scores(place, link, weighted, train_side(arrays))
        return scores.reshape(-1, g, b)

    spread = place.over_shards(of_shard, (QUERIES, SIDE), (None, None, DATA))

    def step(w: jax.Array, phi: Features, arrays: dict[str, jax.Array]) -> jax.Array:
        return spread(weigh(layout, place, w, phi), arrays)

    return jax.jit(step)


def empty(place: Placement, q: int, k: int, dtype: Any) -> TopK:
    """No candidates yet: ids [shards, q, k] of -1, scores of -inf."""
    shape = (place.shards, q, k)
    return TopK(jnp.full(shape, -1, jnp.int32), jnp.full(shape, -jnp.inf, dtype))


def slab_ids(place: Placement, shape: tuple[int, int], first: Any) -> jax.Array:
    """Ids of a device's own rows of a slab, int [g * b]; inside `Placement.over_shards`.

    Args:
      place: the devices.
      shape: g, and the device's own b.
      first: id of the slab's first example.
    """
    g, b = shape
    block = b * place.shards
    ids = first + jnp.arange(g)[:, None] * block + place.shard() * b + jnp.arange(b)[None]
    return ids.reshape(-1)


def absorb(
    place: Placement,
    link: Link,
    sign: int,
    best: TopK,
    weighted: jax.Array,
    arrays: dict[str, jax.Array],
    first: Any,
    skip: Any,
) -> TopK:
    """Merges a slab into a device's best so far; inside `Placement.over_shards`.

    Args:
      place: the devices.
      link: of the method.
      sign: -1 for opponents.
      best: the device's own, [1, q, k].
      weighted: query features [q, c, p].
      arrays: of the slab, the device's own.
      first: id of the slab's first example.
      skip: blocks of the slab that were seen before.

    Returns:
      The best of both; ties go to the lower id.
    """
    side, (g, b) = train_side(arrays), arrays[EXAMPLES].shape[:2]
    scores = sign * local_scores(place, link, weighted, side)
    ids = slab_ids(place, (g, b), first)
    fresh = jnp.repeat(jnp.arange(g) >= skip, b)
    usable = (side.counted & fresh)[None] & jnp.isfinite(scores)
    k = best.ids.shape[-1]
    scores = jnp.where(usable, scores, -jnp.inf).astype(best.scores.dtype)
    if scores.shape[1] > k:
        scores, places = jax.lax.top_k(scores, k)
        ids = ids[places]
    else:
        ids = jnp.broadcast_to(ids[None], scores.shape)
    ids = jnp.where(scores > -jnp.inf, ids, -1)
    values, places = jax.lax.top_k(jnp.concatenate([best.scores[0], scores], axis=1), k)
    ids = jnp.concatenate([best.ids[0], ids.astype(best.ids.dtype)], axis=1)
    return TopK(jnp.take_along_axis(ids, places, axis=1)[None], values[None])


def merge(place: Placement, sign: int, best: TopK) -> TopK:
    """The best of all devices, on every device; inside `Placement.over_shards`.

    Args:
      place: the devices.
      sign: -1 for opponents.
      best: the device's own, [1, q, k].

    Returns:
      Ids and scores [q, k]; those that are missing have id -1.
    """
    ids, scores = best.ids[0], best.scores[0]
    if place.shards > 1:
        k = ids.shape[1]
        parts = place.gather_shards((ids, scores))  # [shards, q, k]
        ids, scores = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1) for x in parts)
        # By score, and the lower id where two are equal.
        scores, ids = jax.lax.sort((-scores, ids), num_keys=2)
        ids, scores = ids[:, :k], -scores[:, :k]
    return TopK(ids, sign * scores)


@functools.lru_cache(maxsize=32)
def top_k_of_arrays(
    place: Placement, layout: FeatureLayout, link: Link, k: int, count: int, sign: int
) -> Any:
    """A jittable function (w, phi, arrays) -> TopK over whole arrays in memory.

    Args:
      place: the devices.
      layout: the groups.
      link: of the method.
      k: how many.
      count: blocks that are scored at once.
      sign: -1 for opponents.
    """

    def of_shard(weighted: jax.Array, arrays: dict[str, jax.Array]) -> TopK:
        blocks, b = arrays[EXAMPLES].shape[:2]
        at_once = min(count, blocks)

        def step(i: jax.Array, best: TopK) -> TopK:
            # The last slab is moved back to be full; what was seen before does not count again.
            start = jnp.minimum(i * at_once, blocks - at_once)
            slab = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, at_once), arrays)
            first = start * b * place.shards
            return absorb(place, link, sign, best, weighted, slab, first, i * at_once - start)

        dtype = jnp.promote_types(weighted.dtype, arrays[EXAMPLES].dtype)
        none = jax.tree.map(lambda x: x[:1], empty(place, weighted.shape[0], k, dtype))
        best = jax.lax.fori_loop(0, -(-blocks // at_once), step, none)
        return merge(place, sign, best)

    spread = place.over_shards(of_shard, (QUERIES, SIDE), ())

    def run(w: jax.Array, phi: Features, arrays: dict[str, jax.Array]) -> TopK:
        return spread(weigh(layout, place, w, phi), arrays)

    return run


@functools.lru_cache(maxsize=32)
def absorb_step(
    place: Placement, layout: FeatureLayout, link: Link, sign: int
) -> tuple[Any, Any, Any]:
    """Compiled: (w, phi) -> weighted; (best, weighted, slab, first, skip) -> best; best -> TopK."""
    own = (DATA,)  # a leading axis of devices
    merging = place.over_shards(functools.partial(merge, place, sign), (own,), ())
    absorbing = place.over_shards(
        functools.partial(absorb, place, link, sign), (own, QUERIES, SIDE, (), ()), own
    )
    weighing = place.jit(functools.partial(weigh, layout, place), *QUERIES)
    return weighing, jax.jit(absorbing, donate_argnums=0), jax.jit(merging)
