"""Scores: who taught the model this? Positive for proponents, negative for opponents."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from jaxattr.batches import leading_size, shapes_of_one
from jaxattr.counts import flag, whole_number
from jaxattr.features.plans import FeatureLayout
from jaxattr.index.index import Index, check_index, self_contributions
from jaxattr.index.queries import (
    QueryArrays,
    QueryFeatures,
    QueryFunctions,
    accepted_by,
    features_of_batch,
    functions_of,
    in_groups,
    query_features,
    state_of,
)
from jaxattr.inputs.arrays import placed
from jaxattr.inputs.data import as_batch
from jaxattr.scales import exponent_of, scaled, wide
from jaxattr.scores import ranking
from jaxattr.scores.candidates import checked_candidates, in_parts, warn_of_non_finite
from jaxattr.scores.ranking import TopK
from jaxattr.scores.weighting import weights_for
from jaxattr.scores.writing import warn_of_overflow, written
from jaxattr.sharding import DATA, Placement
from jaxattr.store.arrays import check_vacant
from jaxattr.store.folder import Folder
from jaxattr.store.rows import COLUMNS, EXAMPLES, FEATURES, SELF, SLAB, Rows, Slab, blocks_at_once
from jaxattr.typing import Batch, Features, Weights

_HEADROOM = 8
"""Powers of two by which rows made anew may grow from slab to slab."""


@overload
def score(
    index: Index,
    queries: Any,
    *,
    weights: Weights | None = None,
    path: None = None,
    queries_at_once: int | None = None,
) -> jax.Array: ...


@overload
def score(
    index: Index,
    queries: Any,
    *,
    weights: Weights | None = None,
    path: str | os.PathLike[str],
    queries_at_once: int | None = None,
) -> tensorstore.TensorStore: ...


def score(
    index: Index,
    queries: Any,
    *,
    weights: Weights | None = None,
    path: str | os.PathLike[str] | None = None,
    queries_at_once: int | None = None,
) -> jax.Array | tensorstore.TensorStore:
    r"""Scores every training example for every query.

    .. math:: \tau(q, n) = r_n \sum_c \eta_c \phi_c(q)^\top \mathrm{Diag}(w) K_c \phi_c(n)

    and its square for squared methods (DAS).

    Args:
      index: the index.
      queries: arrays, a list of examples, a random-access source, or `query_features(index, ...)`.
      weights: {group name: weight >= 0}, or what `learn_weights` returned. Default: one each, the
        base method.
      path: a new folder, local or a URL, to write the scores to as a zarr array, block by block;
        for more than fit memory. What a killed run left there is replaced.
      queries_at_once: whose features are in memory at once; each group of queries is a pass over
        the index. Default: as many as have room in a quarter of the device's memory (1 GiB on a
        CPU).

    Returns:
      Float [q, n], larger = stronger proponent; no hidden 1/n. Training examples that are not
      finite score 0; queries that are not finite have rows of NaN. On a mesh every device gets all.
      With `path`, the array on disk, a `tensorstore.TensorStore`: `scores[:, :10].read().result()`.

    Raises:
      ValueError: if a weight is missing, unknown, negative or not finite.
      StoreError: if the path is not empty or cannot be written.

    Cost: 2 q n c p operations beside the queries' features.

    References:
      Li et al. (2025), arXiv:2506.05647, Eq. 6.
    """
    check_index(index)
    w = index.place.whole(weights_for(index, weights))
    folder = None if path is None else Folder(path)
    if folder is not None:
        check_vacant(folder)  # before the queries' features, which may take long
    count, groups = in_groups(index, queries, queries_at_once)
    if folder is not None:
        scored = ((prepared, _scored(index, w, prepared, SLAB)) for prepared in groups)
        return written(index, count, scored, folder)
    # Not a loop, whose variable would hold a group while the next is made.
    found = list(map(functools.partial(_of_group, index, w), groups))
    scores = found[0] if len(found) == 1 else jnp.concatenate(found)
    _warn_of_overflow(scores)
    return scores


def _scored(
    index: Index, w: jax.Array, prepared: QueryFeatures, at_once: int | None = None
) -> Iterator[tuple[Slab, jax.Array]]:
    """Slabs of an index, of so many rows where that is given, with their scores [q, g, b]."""
    place, phi = index.place, index.place.whole(prepared.features)
    weigh = ranking.weigh_step(place, index.layout)
    step = ranking.score_step(place, index.link)
    bound, weighted = None, None
    for slab in _slabs(index, at_once):
        own = _exponent(index, slab)
        if bound is None or own > bound:
            # Queries are large: they are weighted again for features that are very much larger.
            bound = own if slab.exponent is None else own + _HEADROOM
            weighted = weigh(w, phi, place.whole(bound))
        yield slab._replace(arrays={}), place.gathered(step(weighted, slab.arrays))


def _of_group(index: Index, w: jax.Array, prepared: QueryFeatures) -> jax.Array:
    """Scores [q, n] of a group of queries."""
    slabs = _scored(index, w, prepared)
    return _joined(index, prepared, (scores[:, slab.fresh :] for slab, scores in slabs))


def contributions(index: Index, queries: Any) -> jax.Array:
    """Splits every score into what each group contributes; before the square of a squared method.

    Args:
      index: the index.
      queries: as in `score`.

    Returns:
      Float [q, n, m], groups in the order of `index.layout.names`. The sum over groups is the
      score; weighted, the weighted score. Of a squared method (DAS) it is the score's root.

    Cost: q n m numbers. `score` and `learn_weights` do not need them.
    """
    prepared = query_features(index, queries)
    step = compiled_contributions(index.place, index.layout)
    phi = index.place.whole(prepared.features)
    parts = []
    for slab in _slabs(index):
        exponent = index.place.whole(index.exponent) if slab.exponent is None else slab.exponent
        parts.append(index.place.gathered(step(phi, slab.arrays, exponent))[:, slab.fresh :])
    found = _joined(index, prepared, parts)
    _warn_of_overflow(found)
    return found


def top_k(
    index: Index,
    queries: Any,
    *,
    k: int = 10,
    weights: Weights | None = None,
    opponents: bool = False,
    among: Any = None,
    queries_at_once: int | None = None,
) -> TopK:
    """Finds the training examples with the largest scores; forms no [q, n] array.

    From disk, blocks are read while others are scored. On a mesh every device keeps its own best,
    which are merged at the end.

    In two stages, a cheap index finds candidates and a dear one ranks them: `ja.top_k(dear,
    queries, k=10, among=ja.top_k(cheap, queries, k=100))`. What the cheap one misses is lost.

    Args:
      index: the index.
      queries: as in `score`.
      k: how many, at most n.
      weights: as in `score`.
      opponents: the most negative scores instead, most negative first.
      among: ranks for each query these training examples alone: ids, integers [q, c], or the
        `TopK` of another index. -1 stands for none, and an id twice counts once. Only their rows
        are read: from disk, the chunks of `batch_size` examples that hold one. k is then at most c.
      queries_at_once: as in `score`.

    Returns:
      Ids and scores [q, k]. Ties go to the lower id. Examples that are not finite never appear.
      Where a query has fewer than k, the rest is missing: id -1, score NaN.

    Raises:
      ValueError: if k is no int between 1 and n, or weights or candidates are wrong.

    Warns:
      NonFiniteWarning: with the ids of candidates that have no finite gradient in this index.

    Cost: 2 q n c p operations beside the queries' features; with `among`, n is the number of
    different candidates of all queries. All training examples of an index in memory are scored
    at once where their features are not compressed and the scores are fewer than 34 million, else
    8,192.
    """
    ids = None if among is None else checked_candidates(among, check_index(index).size)
    k = _checked_k(k, check_index(index), opponents, ids)
    w = index.place.whole(weights_for(index, weights))
    count, groups = in_groups(index, queries, queries_at_once)
    if ids is not None:
        if len(ids) != count:
            raise ValueError(
                f"among must have a row of ids for each of the {count} queries, got "
                f"{list(ids.shape)}."
            )
        warn_of_non_finite(index, ids)
    sign = -1 if opponents else 1
    found: list[TopK] = []
    for prepared in groups:
        first = sum(len(each.ids) for each in found)
        own = None if ids is None else ids[first : first + len(prepared.features)]
        found.append(_best(index, w, prepared, k, sign, own))
        del prepared  # while the next group is made
    top = found[0] if len(found) == 1 else TopK(*map(jnp.concatenate, zip(*found, strict=True)))
    _warn_of_overflow(top.scores)
    return top


def _best(
    index: Index, w: jax.Array, prepared: QueryFeatures, k: int, sign: int, ids: np.ndarray | None
) -> TopK:
    """The strongest for a group of queries, among candidates [q, c] if any are given."""
    place, layout = index.place, index.layout
    phi, exponent = place.whole((prepared.features, index.exponent))
    if index.rows.resident and ids is None:
        count = blocks_at_once(index.rows.layout, SLAB)
        search = ranking.top_k_of_arrays(place, layout, index.link, k, count, sign)
        top = search(w, phi, _arrays(index.rows), exponent)
    else:
        absorbing, merging = ranking.absorb_step(place, index.link, sign)
        weighted = ranking.weigh_step(place, layout)(w, phi, exponent)
        best = ranking.empty(place, len(phi), k, wide(phi.dtype))
        if ids is None:
            for slab in _slabs(index):
                best = absorbing(best, weighted, slab.arrays, slab.first, slab.fresh)
        else:
            best = _best_among(index, ids, sign, best, weighted)
        top = merging(best, weighted.exponents)
    finite = np.isin(np.arange(len(phi)), prepared.non_finite, invert=True)
    return _mark_top(top, place.whole(finite))


def self_influence(index: Index, *, weights: Weights | None = None) -> jax.Array:
    """Scores every training example for itself: large for mislabelled and atypical examples.

    Args:
      index: the index.
      weights: as in `score`.

    Returns:
      Float [n]: r_n sum_c eta_c phi_c(n)^T Diag(w) K_c phi_c(n), or its square. NaN where not
      finite.
    """
    w = np.asarray(weights_for(check_index(index), weights))
    parts = []
    for slab in index.rows.slabs([SELF, EXAMPLES], SLAB):
        arrays = {name: index.place.host(x)[slab.fresh :] for name, x in slab.arrays.items()}
        selves = self_contributions(arrays[SELF])  # [g, b, m]
        residual = arrays[EXAMPLES][..., COLUMNS.residual].mean(axis=-1)
        parts.append(ranking.linked(index.link, residual * (selves @ w)).reshape(-1))
    with np.errstate(over="ignore"):
        values = np.concatenate(parts)[: index.size].astype(index.rows.layout.wide)
    values[index.non_finite] = np.nan
    _warn_of_overflow(values)
    return jnp.asarray(values)


def attributor(
    index: Index,
    *,
    weights: Weights | None = None,
    k: int = 10,
    opponents: bool = False,
) -> Callable[[Batch], TopK]:
    """Makes one jitted function from a batch to its strongest training examples.

    For use inside a training or serving loop: compiled once per batch shape, nothing goes through
    the host. On a mesh the batch may be sharded as the loop has it.

    Args:
      index: the index.
      weights: as in `score`.
      k: how many, at most n.
      opponents: the most negative scores instead.

    Returns:
      `attribute(batch, ids=None) -> TopK`, where ids are integers [b] that a stochastic output
      draws its randomness from (default -1, -2, ..., as in `score`).

    Raises:
      ValueError: if k is no int between 1 and n, weights are wrong, or the index keeps no features
        in memory (on disk: open it with `in_memory=True`; `store=False`).
    """
    k = _checked_k(k, check_index(index), opponents)
    rows = index.rows
    if not rows.resident:
        raise ValueError(
            "An attributor needs the rows of the index in memory, and those of this one are on "
            "disk, or not stored: open it with ja.open_index(path, ..., in_memory=True), build it "
            "without store=False, or use ja.top_k, which takes them in blocks."
        )
    w, exponent = index.place.whole((weights_for(index, weights), index.exponent))
    sign = -1 if opponents else 1
    count = blocks_at_once(rows.layout, SLAB)
    search = ranking.top_k_of_arrays(index.place, index.layout, index.link, k, count, sign)
    state = state_of(index)

    def attribute(batch: Batch, ids: jax.Array | None = None) -> TopK:
        if _may_be_examples(batch):
            batch = as_batch(batch, "batch", accepted_by(index))
        batch = jax.tree.map(placed, batch)
        ids = -1 - jnp.arange(leading_size(batch)) if ids is None else jnp.asarray(ids)
        run = _compiled_attributor(functions_of(index, shapes_of_one(batch)), search)
        return run(state, _arrays(rows), w, exponent, batch, ids)

    return attribute


def _may_be_examples(batch: Any) -> bool:
    """Whether a batch must be looked at first: a list, or arrays without a common axis."""
    leaves = jax.tree.leaves(batch)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return False
    sizes = {np.shape(leaf)[:1] for leaf in leaves}
    return isinstance(batch, list) or len(sizes) != 1 or () in sizes


@functools.lru_cache(maxsize=64)
def _compiled_attributor(functions: QueryFunctions, search: Any) -> Any:
    """The jitted function, the same for indexes of one method: a newer one compiles nothing."""

    @jax.jit
    def run(
        state: QueryArrays,
        train: dict,
        w: jax.Array,
        exponent: jax.Array,
        batch: Batch,
        ids: jax.Array,
    ) -> TopK:
        phi, finite = features_of_batch(functions, state, batch, ids)
        return _mark_top(search(w, phi, train, exponent), finite)

    return run


@functools.lru_cache(maxsize=32)
def compiled_contributions(place: Placement, layout: FeatureLayout) -> Any:
    """The compiled step (phi [q, c * p], slab, exponent) -> [q, g, b, m], b over `data`."""

    def of_shard(phi: Features, arrays: dict[str, jax.Array], exponent: jax.Array) -> jax.Array:
        g, b = arrays[EXAMPLES].shape[:2]
        exponents = (exponent_of(phi, axis=1) + exponent)[:, None]
        parts = ranking.local_contributions(place, layout, scaled(phi, -exponents), arrays)
        return scaled(parts, exponents[..., None]).reshape(parts.shape[0], g, b, -1)

    inputs = ((None, None), ranking.side_axes, ())
    return jax.jit(place.over_shards(of_shard, inputs, (None, None, DATA, None)))


def _best_among(
    index: Index, ids: np.ndarray, sign: int, best: TopK, weighted: ranking.Weighted
) -> TopK:
    """Absorbs the rows of candidates [q, c], and no others."""
    absorbing = ranking.absorb_asked_step(index.place, index.link, sign)
    for part in in_parts(index, ids, SLAB):
        arrays = index.rows.pick(index.rows.layout.side, part.ids)
        given = index.place.whole((part.ids.reshape(-1), part.asked))
        best = absorbing(best, weighted, arrays, *given)
    return best


def _arrays(rows: Rows) -> dict[str, jax.Array]:
    return {name: rows.arrays[name] for name in rows.layout.side}


def _slabs(index: Index, at_once: int | None = None) -> Iterator[Slab]:
    """An index in parts; by default one in memory at once, unless it must be widened first."""
    layout = index.rows.layout
    if at_once is None:
        whole = index.rows.resident and layout.dtypes[FEATURES] == layout.wide
        at_once = layout.blocks * layout.block if whole else SLAB
    return index.rows.slabs(layout.side, at_once)


def _exponent(index: Index, slab: Slab) -> np.ndarray:
    """All features of a slab are below 2 to this power, int32."""
    if slab.exponent is None or isinstance(slab.exponent, jax.core.Tracer):
        return index.exponent
    return index.place.host(slab.exponent)


def _warn_of_overflow(scores: Any) -> None:
    """Warns of scores that are infinite, where they have values: not under `jit` or `grad`."""
    if not isinstance(scores, jax.core.Tracer):
        warn_of_overflow(np.asarray(_infinite(scores)), scores.dtype)


@jax.jit
def _infinite(scores: jax.Array) -> jax.Array:
    """How many of each row are infinite, [q]; where they are, since all of them may be large."""
    return jnp.isinf(scores).sum(axis=tuple(range(1, scores.ndim)))


@jax.jit
def _mark_top(top: TopK, finite: jax.Array) -> TopK:
    there = finite[:, None] & (top.ids >= 0)
    return TopK(jnp.where(there, top.ids, -1), jnp.where(there, top.scores, jnp.nan))


def _joined(index: Index, prepared: QueryFeatures, parts: Iterable[jax.Array]) -> jax.Array:
    """Values [q, n, ...] of blocks [q, g, b, ...]; those of queries that are not finite are NaN."""
    found, lost = _flat(list(parts), index.size), prepared.non_finite
    return found.at[lost].set(jnp.nan) if len(lost) else found


@functools.partial(jax.jit, static_argnames="size")
def _flat(parts: list[jax.Array], size: int) -> jax.Array:
    """Joins blocks [q, g, b, ...] to [q, size, ...], in one copy."""
    flat = [x.reshape(len(x), x.shape[1] * x.shape[2], *x.shape[3:]) for x in parts]
    return jnp.concatenate(flat, axis=1)[:, :size]


def _checked_k(k: Any, index: Index, opponents: bool, candidates: np.ndarray | None = None) -> int:
    if flag("opponents", opponents) and index.link == "square":
        raise ValueError(
            "Scores of this index are squares, so there are no opponents: its smallest scores are "
            'of examples without influence. Build it with link="identity".'
        )
    k = whole_number("k", k, least=None)
    most, what = index.size, "training examples"
    if candidates is not None:
        most, what = candidates.shape[1], "candidates that among has for each query"
    if not 1 <= k <= most:
        raise ValueError(f"k must be between 1 and the {most} {what}, got {k}.")
    return k
