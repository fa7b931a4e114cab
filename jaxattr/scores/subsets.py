"""Contributions summed over subsets of the training set, and their spread, in one pass over it.

Scores are linear in the training side, so no [q, n, m] array is needed for what models that were
trained on subsets are predicted to do.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.index.index import Index
from jaxattr.index.queries import query_features
from jaxattr.scales import exponent_of, scaled, wide
from jaxattr.scores import scoring
from jaxattr.scores.ranking import counted_rows, slab_ids
from jaxattr.sharding import DATA, Placement
from jaxattr.store.rows import EXAMPLES, SLAB
from jaxattr.typing import Features

# Contributions of so many bytes are in memory at once, and training examples read from disk.
_SLAB_BYTES = 1 << 28


class Asked(NamedTuple):
    """Queries, and what is wanted of their contributions.

    Attributes:
      phi: query features [q, c * p], finite.
      masks: subsets, bool [s, n]; s may be zero.
      own: id of one training example for each query, [q]; None for none.
      products: whether sums of products over the subsets are wanted.
    """

    phi: Features
    masks: np.ndarray
    own: np.ndarray | None = None
    products: bool = False


class SubsetSums(NamedTuple):
    """Contributions of some queries over subsets and over all training examples, float64.

    Attributes:
      sums: over each subset, of contributions less their mean over all examples, [s, q, m].
      products: over each subset, of the products of contributions, [s, q, m, m]; None if they were
        not asked for.
      own: contribution of the one example that was named for a query, less the mean, [q, m].
      mean: over all examples, [q, m].
      gram: sum over all examples of products of contributions less their mean, [q, m, m].
      largest: largest absolute contribution, [q, m].
      examples: number of training examples that are finite, all that count here.
    """

    sums: np.ndarray
    products: np.ndarray | None
    own: np.ndarray
    mean: np.ndarray
    gram: np.ndarray
    largest: np.ndarray
    examples: int

    @property
    def squares(self) -> np.ndarray:
        """Sum of squared contributions over all examples, [q, m]."""
        return np.einsum("qmm->qm", self.gram) + self.examples * self.mean**2


def subset_sums(index: Index, *several: Asked) -> list[SubsetSums]:
    """Goes over the training set once, in memory or on disk, for one or more sets of queries.

    Args:
      index: the index.
      *several: queries, and what is wanted of them.

    Returns:
      The sums of each. On a mesh, and with several processes, every process gets all.

    Cost: 2 q n m (s + m) operations beside those of `score`; with products s times as many.
    """
    place, stored = index.place, index.rows.layout
    given = [_Given.of(index, asked) for asked in several]
    contribute = scoring.compiled_contributions(place, index.layout)
    start, absorb, merge = _compiled(place)
    numbers = sum(len(asked.phi) for asked in several) * len(index.layout.names)
    affordable = _SLAB_BYTES // (numbers * several[0].phi.dtype.itemsize)
    states: list[Any] = [None] * len(given)
    slabs = index.rows.slabs(stored.side, max(index.batch_size, min(affordable, SLAB)))
    for slab in slabs:
        arrays, blocks = slab.arrays, slab.arrays[EXAMPLES].shape[0]
        first = slab.first // stored.block
        for number, each in enumerate(given):
            parts = contribute(each.phi, arrays, index.exponent)  # [q, g, b, m]
            subsets = place.whole(each.chosen[:, first : first + blocks])
            examples = arrays[EXAMPLES]
            if states[number] is None:
                states[number] = start(parts, examples, subsets[:, :1, :1], each.products)
            states[number] = absorb(
                states[number], parts, examples, subsets, each.own, slab.first, slab.fresh
            )
    return [
        _finished(jax.tree.map(place.host, merge(state)), each.exponents)
        for state, each in zip(states, given, strict=True)
    ]


class _Given(NamedTuple):
    """What was asked, as a pass takes it.

    Attributes:
      phi: query features, so scaled that contributions are of size one.
      exponents: of that scale, int [q].
      chosen: subsets as rows are stored, bool [s, blocks, block].
      own: ids [q]; -1 for none.
      products: zeros [1] if sums of products are wanted, else None: its structure says so.
    """

    phi: jax.Array
    exponents: np.ndarray
    chosen: np.ndarray
    own: jax.Array
    products: jax.Array | None

    @classmethod
    def of(cls, index: Index, asked: Asked) -> "_Given":
        stored = index.rows.layout
        chosen = np.zeros((len(asked.masks), stored.blocks, stored.block), bool)
        chosen.reshape(len(chosen), stored.blocks * stored.block)[:, : index.size] = asked.masks
        own = np.full(len(asked.phi), -1) if asked.own is None else np.asarray(asked.own)
        phi, exponents = _of_size_one(asked.phi, index.exponent)
        phi, own = index.place.whole((phi, own.astype(np.int32)))
        return cls(
            phi, np.asarray(exponents), chosen, own, jnp.zeros(1) if asked.products else None
        )


def subset_contributions(index: Index, queries: Any, masks: Any) -> np.ndarray:
    """Sums of contributions over the training examples of each subset.

    Args:
      index: the index.
      queries: as in `score`.
      masks: bool [s, n].

    Returns:
      Float [q, s, m]; `@ weights` gives the predictions that LDS correlates. Of a squared method
      (DAS) it does not: see `subset_products`.
    """
    found, masks, lost = _of_queries(index, queries, masks, products=False)
    sizes = _sizes(index, masks)
    sums = np.moveaxis(found.sums + sizes[:, None, None] * found.mean[None], 0, 1)
    sums[lost] = np.nan
    return sums


def subset_products(index: Index, queries: Any, masks: Any) -> np.ndarray:
    """Sums over each subset of the products of contributions, for scores that are squares.

    Args:
      index: the index.
      queries: as in `score`.
      masks: bool [s, n].

    Returns:
      Float [q, s, m, m]; w^T (...) w is the sum of squared scores.
    """
    found, _, lost = _of_queries(index, queries, masks, products=True)
    assert found.products is not None
    products = np.moveaxis(found.products, 0, 1)
    products[lost] = np.nan
    return products


def checked_masks(masks: Any, n: int) -> np.ndarray:
    """Refuses what are no masks of n training examples.

    Args:
      masks: what a caller gave.
      n: number of training examples.

    Returns:
      Bool [s, n].

    Raises:
      ValueError: if they are anything else.
    """
    masks = np.asarray(masks)
    if masks.dtype != bool or masks.ndim != 2 or masks.shape[1] != n:
        raise ValueError(
            f"masks must be bool [subsets, {n}], one column per training example of the index, got "
            f"{masks.dtype} {list(masks.shape)}."
        )
    return masks


class _State(NamedTuple):
    """What a device has summed so far; all about a fixed shift near the mean, which keeps digits.

    Attributes:
      shift: that is taken off contributions, [q, m].
      sums: over subsets, [s, q, m].
      sizes: of the subsets, [s].
      products: of unshifted contributions, over subsets, [s, q, m, m]; None if not wanted.
      own: of the named examples, [q, m].
      total: over all examples, [q, m].
      gram: of products, over all examples, [q, m, m].
      largest: of unshifted contributions, [q, m].
      examples: how many.
    """

    shift: jax.Array
    sums: jax.Array
    sizes: jax.Array
    products: jax.Array | None
    own: jax.Array
    total: jax.Array
    gram: jax.Array
    largest: jax.Array
    examples: jax.Array


@functools.lru_cache(maxsize=16)
def _compiled(place: Placement) -> tuple[Any, Any, Any]:
    """The steps of a pass: start, absorb and merge; none depends on the number of groups."""
    own = (DATA,)  # every array of the state has a leading axis of devices
    parts, examples, masks = (None, None, DATA, None), (None, DATA), (None, None, DATA)
    start = place.over_shards(functools.partial(_start, place), (parts, examples, (), ()), own)
    absorb = place.over_shards(
        functools.partial(_absorb, place), (own, parts, examples, masks, (), (), ()), own
    )
    merge = place.over_shards(functools.partial(_merge, place), (own,), ())
    return jax.jit(start), jax.jit(absorb, donate_argnums=0), jax.jit(merge)


def _counted(parts: jax.Array, counted: jax.Array) -> jax.Array:
    """Contributions of a device's own rows, zero for those that do not count; [q, r, m]."""
    parts = parts.reshape(parts.shape[0], -1, parts.shape[-1])
    return jnp.where(counted[None, :, None], parts, 0).astype(wide(parts.dtype))


def _start(
    place: Placement,
    parts: jax.Array,
    examples: jax.Array,
    subsets: jax.Array,
    products: jax.Array | None,
) -> _State:
    """Nothing summed yet; the shift is the mean over the first slab."""
    counted = counted_rows(examples)
    parts = _counted(parts, counted)
    total, count = place.sum_shards((parts.sum(axis=1), counted.sum()))
    shift = total / jnp.maximum(count, 1).astype(total.dtype)
    (q, m), s = shift.shape, len(subsets)
    zeros = functools.partial(jnp.zeros, dtype=shift.dtype)
    state = _State(
        shift=shift,
        sums=zeros((s, q, m)),
        sizes=zeros(s),
        products=None if products is None else zeros((s, q, m, m)),
        own=zeros((q, m)),
        total=zeros((q, m)),
        gram=zeros((q, m, m)),
        largest=zeros((q, m)),
        examples=jnp.zeros((), jnp.int32),
    )
    return jax.tree.map(lambda x: x[None], state)


def _absorb(
    place: Placement,
    state: _State,
    parts: jax.Array,
    examples: jax.Array,
    subsets: jax.Array,
    own: jax.Array,
    first: Any,
    skip: Any,
) -> _State:
    """Takes a slab in; every array of the state has a leading axis of one device."""
    state = jax.tree.map(lambda x: x[0], state)
    g, b = examples.shape[:2]
    counted = counted_rows(examples) & jnp.repeat(jnp.arange(g) >= skip, b)
    parts = _counted(parts, counted)
    ids = slab_ids(place, (g, b), first).astype(own.dtype)
    chosen = (subsets.reshape(len(subsets), len(ids)) & counted[None]).astype(parts.dtype)
    named = ((ids[None] == own[:, None]) & counted[None]).astype(parts.dtype)  # [q, r]
    shifted = jnp.where(counted[None, :, None], parts - state.shift[:, None], 0)
    einsum = functools.partial(jnp.einsum, precision="highest")
    products = state.products
    if products is not None:
        # Per subset, so that the largest array is that of the contributions.
        def of_subset(mask: jax.Array) -> jax.Array:
            return einsum("qrm,qrk->qmk", parts * mask[None, :, None], parts)

        products = products + jax.lax.map(of_subset, chosen)
    state = state._replace(
        sums=state.sums + einsum("sr,qrm->sqm", chosen, shifted),
        sizes=state.sizes + chosen.sum(axis=1),
        products=products,
        own=state.own + einsum("qr,qrm->qm", named, shifted),
        total=state.total + shifted.sum(axis=1),
        gram=state.gram + einsum("qrm,qrk->qmk", shifted, shifted),
        largest=jnp.maximum(state.largest, jnp.abs(parts).max(axis=1)),
        examples=state.examples + counted.sum(dtype=jnp.int32),
    )
    return jax.tree.map(lambda x: x[None], state)


def _merge(place: Placement, state: _State) -> _State:
    """Sums over devices, the same on each."""
    state = jax.tree.map(lambda x: x[0], state)
    summed = place.sum_shards(state)
    return summed._replace(shift=state.shift, largest=place.largest_of_shards(state.largest))


def _finished(state: Any, exponents: np.ndarray) -> SubsetSums:
    """From about the shift to about the mean, and to the size that contributions have."""

    def sized(x: Any, axis: int, power: int = 1) -> np.ndarray:
        own = np.expand_dims(exponents, [i for i in range(np.ndim(x)) if i != axis])
        return np.ldexp(np.asarray(x, np.float64), own * power)

    shift, own, total = (sized(x, 0) for x in (state.shift, state.own, state.total))
    sums, gram = sized(state.sums, 1), sized(state.gram, 0, 2)
    count, sizes = int(state.examples), np.asarray(state.sizes, np.float64)
    mean = total / max(count, 1)  # less the shift
    return SubsetSums(
        sums=sums - sizes[:, None, None] * mean[None],
        products=None if state.products is None else sized(state.products, 1, 2),
        own=own - mean,
        mean=shift + mean,
        gram=gram - count * mean[:, :, None] * mean[:, None],
        largest=sized(state.largest, 0),
        examples=count,
    )


@jax.jit
def _of_size_one(phi: jax.Array, exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Query features so scaled that products of contributions stay within range; the exponents."""
    exponents = exponent_of(phi, axis=1) + exponent
    return scaled(phi, -exponents[:, None]), exponents


def _of_queries(
    index: Index, queries: Any, masks: Any, *, products: bool
) -> tuple[SubsetSums, np.ndarray, np.ndarray]:
    """Sums for all queries, the masks, and positions of queries that are not finite."""
    masks = checked_masks(masks, index.size)
    prepared = query_features(index, queries)
    found = subset_sums(index, Asked(prepared.features, masks, products=products))[0]
    return found, masks, prepared.non_finite


def _sizes(index: Index, masks: np.ndarray) -> np.ndarray:
    """How many finite training examples each subset holds, [s]."""
    finite = np.ones(index.size, bool)
    finite[index.non_finite] = False
    return (masks & finite).sum(axis=1)
