"""Scores of blocks of training examples, and the strongest of them: on each device its own.

Every function here is pure. Queries are on every device, training examples on one; nothing moves
but sums over columns, where those are spread, and the candidates of each device at the end.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.features.plans import FeatureLayout
from jaxattr.scales import exponent_of, scaled, wide, widest
from jaxattr.scores import tables
from jaxattr.sharding import DATA, MODEL, Placement
from jaxattr.store.compression import widen
from jaxattr.store.rows import COLUMNS, EXAMPLES, FEATURES, SCALES, axes_of, pad_columns
from jaxattr.typing import Features, Link

FEATURE_AXES = (None, None, MODEL)
"""Mesh axes of query features [q, c, p]."""


def side_axes(arrays: Mapping[str, Any]) -> dict[str, tuple[str | None, ...]]:
    """Mesh axes of the arrays of a slab."""
    return {name: axes_of(name) for name in arrays}


class TopK(NamedTuple):
    """The strongest training examples per query, strongest first.

    Attributes:
      ids: integers [q, k]; -1 where there is none (a query, or too many training examples, are
        not finite).
      scores: float [q, k]; NaN where there is none.
    """

    ids: jax.Array
    scores: jax.Array

    def to_pandas(self, ids: Sequence[Any] | None = None) -> Any:
        """Makes a long table: a row for each query and rank.

        Args:
          ids: your own names of the training examples, a sequence of n of any type, in the order
            of the training data. Default: their positions.

        Returns:
          A `pandas.DataFrame` with columns `query` (position), `rank` (from 1), `id` and `score`;
          with `ids`, also `position`. Places without an example, as those of queries that are not
          finite, have no row.

        Raises:
          ImportError: if pandas is not installed (`pip install 'jaxattr[tables]'`).
          ValueError: if ids are too few, or have no order.
        """
        return tables.to_pandas(tables.columns(self.ids, self.scores, ids))

    def to_csv(self, path: str | os.PathLike[str], ids: Sequence[Any] | None = None) -> None:
        """Writes the table of `to_pandas` as comma-separated values; needs no other package.

        Ids are written as they are: a spreadsheet takes one such as `=1+1` for a formula, so that
        a file with ids of people you do not trust is not to be opened in one.

        Args:
          path: of the file; one that is there is replaced when the new one is whole.
          ids: as in `to_pandas`.

        Raises:
          ValueError: if ids are too few, or the path cannot be written.
        """
        tables.to_csv(tables.columns(self.ids, self.scores, ids), path)

    def to_parquet(self, path: str | os.PathLike[str], ids: Sequence[Any] | None = None) -> None:
        """Writes the table of `to_pandas` as a Parquet file.

        Args:
          path: of the file; one that is there is replaced when the new one is whole.
          ids: as in `to_pandas`, of one type.

        Raises:
          ImportError: if pyarrow is not installed (`pip install 'jaxattr[tables]'`).
          ValueError: if ids are too few or of several types, or the path cannot be written.
        """
        tables.to_parquet(tables.columns(self.ids, self.scores, ids), path)

    def _repr_html_(self) -> str | None:
        """A table for notebooks; none inside jit, where there are no numbers yet."""
        if any(isinstance(x, jax.core.Tracer) or np.ndim(x) != 2 for x in self):
            return None
        return tables.to_html(np.asarray(self.ids), np.asarray(self.scores))


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


def train_side(place: Placement, arrays: dict[str, jax.Array]) -> TrainSide:
    """Reads a slab; inside `Placement.over_shards`.

    Args:
      place: the devices.
      arrays: {"features": [g, b, c, p], "examples": [g, b, c, 2]}, and scales [g, b, c, s] if
        features are compressed.

    Returns:
      Its rows, in order; float32 or wider.
    """
    features, examples = arrays[FEATURES], arrays[EXAMPLES]
    counted = counted_rows(examples)
    examples = examples.reshape(-1, *examples.shape[2:])  # [r, c, 2]
    residual = jnp.where(counted, examples[..., COLUMNS.residual].mean(axis=1), 0)
    if SCALES in arrays:
        features = widen(features, arrays[SCALES], place.column() * features.shape[-1])
    rows = features.reshape(len(counted), -1).astype(wide(features.dtype))
    return TrainSide(rows, residual, counted)


def counted_rows(examples: jax.Array) -> jax.Array:
    """Which rows of a slab are finite and no padding, bool [r].

    Args:
      examples: of the slab, [g, b, c, 2].
    """
    return (examples[..., COLUMNS.finite] > 0).all(axis=-1).reshape(-1)


# Products of features are below 2 to this power: as far up as sums of them stay finite, so that
# those with examples far smaller than the largest do not vanish.
_LARGEST = 90


# Scores of so many pairs may be held at once: 128 MiB in float32, five times that at k near n.
_WHOLE = 2**25


class Weighted(NamedTuple):
    """Weighted query features, so scaled that products with training examples do not overflow.

    Attributes:
      features: [q, c, p], p padded to divide over columns; times 2^exponents they are themselves.
      exponents: int32 [q].
    """

    features: jax.Array
    exponents: jax.Array


QUERIES = Weighted(FEATURE_AXES, (None,))  # type: ignore[arg-type]
"""Mesh axes of weighted query features."""


def weigh(
    layout: FeatureLayout, place: Placement, w: jax.Array, phi: Features, exponent: jax.Array
) -> Weighted:
    """Multiplies query features by their groups' weights, and lays them out as slabs are.

    Args:
      layout: the groups.
      place: the devices.
      w: weights [m].
      phi: [q, c * p].
      exponent: all features of training examples are below 2^exponent, int32.
    """
    # Not jnp.repeat, which has the compiler fold a sum over all columns.
    columns = w[np.repeat(np.arange(len(layout.dims)), layout.dims)].astype(phi.dtype)  # [p]
    own = exponent_of(phi, axis=1)
    small = scaled(lay_out(layout, place, phi), -own[:, None, None])
    weighted = small * pad_columns(columns[None, None], small.shape[-1])
    of_weights = exponent_of(weighted, axis=(1, 2))  # which may be large too
    lift = jnp.minimum(_LARGEST - exponent, _LARGEST) - of_weights
    return Weighted(scaled(weighted, lift[:, None, None]), own - lift)


def lay_out(layout: FeatureLayout, place: Placement, phi: Features) -> jax.Array:
    """Splits query features [q, c * p] as slabs are: [q, c, p], p padded to divide over columns."""
    split = phi.reshape(phi.shape[0], -1, layout.total)
    return pad_columns(split, -(-layout.total // place.columns) * place.columns)


def linked(link: Link, sums: Any) -> Any:
    """Makes scores of sums of contributions.

    Args:
      link: of the method.
      sums: of contributions.
    """
    return sums**2 if link == "square" else sums


def scores_of(link: Link, strengths: jax.Array, exponents: jax.Array) -> jax.Array:
    """Makes scores of what `local_strengths` returns; infinite where they leave their type.

    Args:
      link: of the method.
      strengths: [q, ...].
      exponents: of the queries, [q].
    """
    exponents = exponents.reshape(-1, *(1,) * (strengths.ndim - 1))
    return linked(link, scaled(strengths, exponents))


def local_strengths(place: Placement, link: Link, weighted: Weighted, side: TrainSide) -> jax.Array:
    """What a device's own training examples are ranked by; inside `Placement.over_shards`.

    Args:
      place: the devices.
      link: of the method.
      weighted: query features, the device's own columns.
      side: the device's own rows.

    Returns:
      [q, r]: sums of contributions, over 2^exponents of their query; their sizes where scores are
      their squares.
    """
    flat = weighted.features.reshape(len(weighted.features), -1)
    sums = place.sum_columns(jnp.matmul(flat, side.features.T, precision="highest"))
    sums = sums * side.residual[None]
    return jnp.abs(sums) if link == "square" else sums


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
    side = train_side(place, arrays)
    c = arrays[EXAMPLES].shape[2]
    train = side.features.reshape(len(side.counted), c, -1)  # [r, c, own columns]
    phi = lay_out(layout, place, phi)  # [q, c, p]
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
def weigh_step(place: Placement, layout: FeatureLayout) -> Any:
    """The compiled step (w, phi [q, c * p], exponent) -> weighted; see `weigh`."""
    return jax.jit(functools.partial(weigh, layout, place))


@functools.lru_cache(maxsize=32)
def score_step(place: Placement, link: Link) -> Any:
    """The compiled step (weighted, slab) -> [q, g, b], b over `data`."""

    def of_shard(weighted: Weighted, arrays: dict[str, jax.Array]) -> jax.Array:
        g, b = arrays[EXAMPLES].shape[:2]
        strengths = local_strengths(place, link, weighted, train_side(place, arrays))
        return scores_of(link, strengths, weighted.exponents).reshape(-1, g, b)

    return jax.jit(place.over_shards(of_shard, (QUERIES, side_axes), (None, None, DATA)))


def empty(place: Placement, q: int, k: int, dtype: Any) -> TopK:
    """No candidates yet: ids [shards, q, k] of -1, scores of -inf."""
    shape = (place.shards, q, k)
    return TopK(jnp.full(shape, -1, jnp.int32), jnp.full(shape, -jnp.inf, dtype))


def fresh_rows(
    place: Placement, shape: tuple[int, ...], first: Any, skip: Any
) -> tuple[jax.Array, jax.Array]:
    """A device's own rows of a slab; inside `Placement.over_shards`.

    Args:
      place: the devices.
      shape: g, and the device's own b.
      first: id of the slab's first example.
      skip: blocks of the slab that were seen before.

    Returns:
      Their ids, int [g * b]; and which were not seen before, bool.
    """
    g, b = shape
    block = b * place.shards
    blocks, rows = jnp.arange(g, dtype=jnp.int32), jnp.arange(b, dtype=jnp.int32)
    ids = first + blocks[:, None] * block + place.shard() * b + rows[None]
    return ids.reshape(-1), jnp.repeat(blocks >= skip, b)


def absorb(
    place: Placement,
    link: Link,
    sign: int,
    best: TopK,
    weighted: Weighted,
    arrays: dict[str, jax.Array],
    ids: jax.Array,
    asked: jax.Array,
) -> TopK:
    """Merges rows into a device's best so far; inside `Placement.over_shards`.

    Args:
      place: the devices.
      link: of the method.
      sign: -1 for opponents.
      best: the device's own, [1, q, k].
      weighted: query features.
      arrays: of a slab, the device's own.
      ids: of its rows, ascending, [r].
      asked: which of them count for which query, bool [q, r] or [1, r].

    Returns:
      The best of both, by their strengths; ties go to the lower id.
    """
    side = train_side(place, arrays)
    scores = sign * local_strengths(place, link, weighted, side)
    usable = side.counted[None] & asked & jnp.isfinite(scores)
    k = best.ids.shape[-1]
    scores = jnp.where(scores == 0, 0, scores)  # of equal ones -0 would come after 0
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


def merge(place: Placement, link: Link, sign: int, best: TopK, exponents: jax.Array) -> TopK:
    """The best of all devices, on every device; inside `Placement.over_shards`.

    Args:
      place: the devices.
      link: of the method.
      sign: -1 for opponents.
      best: the device's own, [1, q, k], with strengths for scores.
      exponents: of the queries, [q].

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
    return TopK(ids, scores_of(link, sign * scores, exponents))


@functools.lru_cache(maxsize=32)
def top_k_of_arrays(
    place: Placement, layout: FeatureLayout, link: Link, k: int, count: int, sign: int
) -> Any:
    """The compiled step (w, phi, arrays, exponent) -> TopK over whole arrays in memory.

    Args:
      place: the devices.
      layout: the groups.
      link: of the method.
      k: how many.
      count: blocks that are scored at once, where all are too many or must be widened.
      sign: -1 for opponents.
    """

    def of_shard(weighted: Weighted, arrays: dict[str, jax.Array]) -> TopK:
        blocks, b = arrays[EXAMPLES].shape[:2]
        stored = arrays[FEATURES].dtype
        as_it_is = SCALES not in arrays and stored == wide(stored)
        few = len(weighted.features) * blocks * b <= _WHOLE
        # A slab is copied, which takes longer than its product where queries are few.
        at_once = blocks if as_it_is and few else min(count, blocks)

        def step(i: jax.Array, best: TopK) -> TopK:
            # The last slab is moved back to be full; what was seen before does not count again.
            start = jnp.minimum(i * at_once, blocks - at_once)
            slab = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, at_once), arrays)
            first = start * b * place.shards
            ids, fresh = fresh_rows(place, (at_once, b), first, i * at_once - start)
            return absorb(place, link, sign, best, weighted, slab, ids, fresh[None])

        dtype = widest(weighted.features.dtype, arrays[EXAMPLES].dtype)
        none = jax.tree.map(lambda x: x[:1], empty(place, len(weighted.features), k, dtype))
        best = jax.lax.fori_loop(0, -(-blocks // at_once), step, none)
        return merge(place, link, sign, best, weighted.exponents)

    spread = place.over_shards(of_shard, (QUERIES, side_axes), ())

    @jax.jit
    def run(w: jax.Array, phi: Features, arrays: dict[str, jax.Array], exponent: jax.Array) -> TopK:
        return spread(weigh(layout, place, w, phi, exponent), arrays)

    return run


@functools.lru_cache(maxsize=32)
def absorb_step(place: Placement, link: Link, sign: int) -> tuple[Any, Any]:
    """Compiled steps of a top k that is found slab by slab.

    Returns:
      (best, weighted, slab, first, skip) -> best; and (best, exponents) -> TopK.
    """
    own = (DATA,)  # a leading axis of devices
    merging = place.over_shards(functools.partial(merge, place, link, sign), (own, (None,)), ())

    def of_slab(
        best: TopK, weighted: Weighted, arrays: dict[str, jax.Array], first: Any, skip: Any
    ) -> TopK:
        ids, fresh = fresh_rows(place, arrays[EXAMPLES].shape[:2], first, skip)
        return absorb(place, link, sign, best, weighted, arrays, ids, fresh[None])

    absorbing = place.over_shards(of_slab, (own, QUERIES, side_axes, (), ()), own)
    return jax.jit(absorbing, donate_argnums=0), jax.jit(merging)


@functools.lru_cache(maxsize=32)
def absorb_asked_step(place: Placement, link: Link, sign: int) -> Any:
    """The compiled step of a top k among chosen rows; the others are those of `absorb_step`.

    Returns:
      (best, weighted, slab of picked rows, ids [r], asked [q, r]) -> best.
    """
    inputs = ((DATA,), QUERIES, side_axes, (DATA,), (None, DATA))
    step = functools.partial(absorb, place, link, sign)
    return jax.jit(place.over_shards(step, inputs, (DATA,)), donate_argnums=0)
