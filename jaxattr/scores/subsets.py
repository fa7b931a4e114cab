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
from jaxattr.scores.ranking import counted_rows, fresh_rows
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
      sizes: how many finite training examples each subset holds, [s].
      products: over each subset, of the products of contributions, [s, q, m, m]; None if they were
        not asked for.
      own: contribution of the one example that was named for a query, less the mean, [q, m].
      mean: over all examples, [q, m].
      gram: sum over all examples of products of contributions less their mean, [q, m, m].
      largest: largest absolute contribution, [q, m].
      examples: number of training examples that are finite, all that count here.
    """

    sums: np.ndarray
    sizes: np.ndarray
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
    numbers = sum(len(asked.phi) for asked in several) * len(index.layout.names)
    affordable = _SLAB_BYTES // (numbers * several[0].phi.dtype.itemsize)
    found: list[_Sums | None] = [None] * len(given)
    for slab in index.rows.slabs(stored.side, max(index.batch_size, min(affordable, SLAB))):
        examples, first = slab.arrays[EXAMPLES], slab.first // stored.block
        for number, (asked, each) in enumerate(zip(several, given, strict=True)):
            parts = contribute(each.phi, slab.arrays, index.exponent)  # [q, g, b, m]
            subsets = place.whole(each.chosen[:, first : first + len(examples)])
            step = _compiled(place, asked.products)
            sums = step(parts, examples, subsets, each.own, slab.first, slab.fresh)
            on_host = jax.tree.map(lambda x: place.host(x).astype(np.float64), sums)
            found[number] = _joined(found[number], on_host)
    return [
        _finished(sums, each.exponents)
        for sums, each in zip(found, given, strict=True)
        if sums is not None
    ]


class _Given(NamedTuple):
    """What was asked, as a pass takes it.

    Attributes:
      phi: query features, so scaled that contributions are of size one.
      exponents: of that scale, int [q].
      chosen: subsets as rows are stored, bool [s, blocks, block].
      own: ids [q]; -1 for none.
    """

    phi: jax.Array
    exponents: np.ndarray
    chosen: np.ndarray
    own: jax.Array

    @classmethod
    def of(cls, index: Index, asked: Asked) -> "_Given":
        stored = index.rows.layout
        chosen = np.zeros((len(asked.masks), stored.blocks, stored.block), bool)
        chosen.reshape(len(chosen), stored.blocks * stored.block)[:, : index.size] = asked.masks
        own = np.full(len(asked.phi), -1) if asked.own is None else np.asarray(asked.own)
        phi, exponents = _of_size_one(asked.phi, index.exponent)
        phi, own = index.place.whole((phi, own.astype(np.int32)))
        return cls(phi, np.asarray(exponents), chosen, own)


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
    found, lost = _of_queries(index, queries, masks, products=False)
    sums = np.moveaxis(found.sums + found.sizes[:, None, None] * found.mean[None], 0, 1)
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
    found, lost = _of_queries(index, queries, masks, products=True)
    assert found.products is not None
    products = np.moveaxis(found.products, 0, 1)
    products[lost] = np.nan
    return products


def summed(scores: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Sums scores over subsets, and has no order where there is none.

    Sums of scores that are all the same differ in their last bits, and would be ranked by them.

    Args:
      scores: float64 [q, n].
      masks: bool [s, n].

    Returns:
      Float64 [q, s].
    """
    counted = masks.T.astype(np.float64)
    sums = scores @ counted
    rounding = scores.shape[1] * np.finfo(np.float64).eps * (np.abs(scores) @ counted).max(axis=1)
    same = np.ptp(sums, axis=1) <= rounding
    sums[same] = sums[same, :1]
    return sums


def checked_masks(masks: Any, n: int | None = None) -> np.ndarray:
    """Refuses what are no masks of training examples.

    Args:
      masks: what a caller gave.
      n: number of training examples, if it is known.

    Returns:
      Bool [s, n].

    Raises:
      ValueError: if they are anything else.
    """
    if isinstance(masks, jax.Array) and jnp.issubdtype(masks.dtype, jax.dtypes.prng_key):
        raise ValueError("masks come before the key; got a key in their place.")
    masks = np.asarray(masks)
    if masks.dtype != bool or masks.ndim != 2 or n not in (None, masks.shape[1]):
        raise ValueError(
            f"masks must be bool [subsets, {'n' if n is None else n}], one column per training "
            f"example, got {masks.dtype} {list(masks.shape)}. If those are ids of the examples in "
            "each subset, make a mask of each: mask = np.zeros(n, bool); mask[ids] = True."
        )
    return masks


class _Sums(NamedTuple):
    """What some examples add up to; about a shift, which keeps digits where it is near the mean.

    Attributes:
      shift: that is taken off contributions, [q, m].
      sums: over subsets, [s, q, m].
      sizes: of the subsets, [s].
      products: of unshifted contributions, over subsets, [s, q, m, m]; None if not wanted.
      own: of the named examples, [q, m].
      named: which of those were there, 1 or 0, [q].
      total: over all examples, [q, m].
      gram: of products, over all examples, [q, m, m].
      largest: of unshifted contributions, [q, m].
      examples: how many.
    """

    shift: Any
    sums: Any
    sizes: Any
    products: Any
    own: Any
    named: Any
    total: Any
    gram: Any
    largest: Any
    examples: Any

    def about(self, shift: np.ndarray) -> "_Sums":
        """The same about another shift."""
        d = self.shift - shift  # [q, m]
        mixed = self.total[:, :, None] * d[:, None]
        gram = self.gram + mixed + mixed.swapaxes(1, 2)
        return self._replace(
            shift=shift,
            sums=self.sums + self.sizes[:, None, None] * d,
            own=self.own + self.named[:, None] * d,
            total=self.total + self.examples * d,
            gram=gram + self.examples * d[:, :, None] * d[:, None],
        )


@functools.lru_cache(maxsize=16)
def _compiled(place: Placement, products: bool) -> Any:
    """The step (contributions, slab, subsets, named examples, first, skip) -> `_Sums`."""
    inputs = ((None, None, DATA, None), (None, DATA), (None, None, DATA), (), (), ())
    step = functools.partial(_of_slab, place, products)
    return jax.jit(place.over_shards(step, inputs, ()))


def _of_slab(
    place: Placement,
    products: bool,
    parts: jax.Array,
    examples: jax.Array,
    subsets: jax.Array,
    own: jax.Array,
    first: Any,
    skip: Any,
) -> _Sums:
    """Sums over a slab, about its mean; the same on every device."""
    ids, fresh = fresh_rows(place, examples.shape[:2], first, skip)
    counted = counted_rows(examples) & fresh
    parts = parts.reshape(parts.shape[0], -1, parts.shape[-1])  # [q, r, m]
    parts = jnp.where(counted[None, :, None], parts, 0).astype(wide(parts.dtype))
    total, count = place.sum_shards((parts.sum(axis=1), counted.sum()))
    # About the mean, unless it is that of a few outliers: the others would lose their digits to it.
    squares = place.sum_shards((parts**2).sum(axis=1))
    number = jnp.maximum(count, 1).astype(total.dtype)
    shift = jnp.where(2 * total**2 > number * squares, total / number, 0)
    chosen = (subsets.reshape(len(subsets), len(ids)) & counted[None]).astype(parts.dtype)
    named = ids.astype(own.dtype)[None] == own[:, None]  # [q, r]
    named = (named & counted[None]).astype(parts.dtype)
    shifted = jnp.where(counted[None, :, None], parts - shift[:, None], 0)
    einsum = functools.partial(jnp.einsum, precision="highest")

    def of_subset(mask: jax.Array) -> jax.Array:
        return einsum("qrm,qrk->qmk", parts * mask[None, :, None], parts)

    summed = place.sum_shards(
        {
            "sums": einsum("sr,qrm->sqm", chosen, shifted),
            "sizes": chosen.sum(axis=1),
            # Per subset, so that the largest array is that of the contributions.
            "products": jax.lax.map(of_subset, chosen) if products else None,
            "own": einsum("qr,qrm->qm", named, shifted),
            "named": named.sum(axis=1),
            "total": shifted.sum(axis=1),
            "gram": einsum("qrm,qrk->qmk", shifted, shifted),
        }
    )
    largest = place.largest_of_shards(jnp.abs(parts).max(axis=1))
    return _Sums(shift=shift, largest=largest, examples=count, **summed)


def _joined(before: _Sums | None, more: _Sums) -> _Sums:
    """Sums over both, about the shift of the first."""
    if before is None:
        return more
    added = jax.tree.map(np.add, before, more.about(before.shift))
    return added._replace(shift=before.shift, largest=np.maximum(before.largest, more.largest))


def _finished(found: _Sums, exponents: np.ndarray) -> SubsetSums:
    """About the mean, and of the size that contributions have."""

    def sized(x: np.ndarray, axis: int, power: int = 1) -> np.ndarray:
        own = np.expand_dims(exponents, [i for i in range(np.ndim(x)) if i != axis])
        return np.ldexp(x, own * power)

    found = found.about(found.shift + found.total / max(found.examples, 1))
    return SubsetSums(
        sums=sized(found.sums, 1),
        sizes=found.sizes,
        products=None if found.products is None else sized(found.products, 1, 2),
        own=sized(found.own, 0),
        mean=sized(found.shift, 0),
        gram=sized(found.gram, 0, 2),
        largest=sized(found.largest, 0),
        examples=int(found.examples),
    )


@jax.jit
def _of_size_one(phi: jax.Array, exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Query features so scaled that products of contributions stay within range; the exponents."""
    exponents = exponent_of(phi, axis=1) + exponent
    return scaled(phi, -exponents[:, None]), exponents


def _of_queries(
    index: Index, queries: Any, masks: Any, *, products: bool
) -> tuple[SubsetSums, np.ndarray]:
    """Sums for all queries, and positions of queries that are not finite."""
    masks = checked_masks(masks, index.size)
    prepared = query_features(index, queries)
    found = subset_sums(index, Asked(prepared.features, masks, products=products))[0]
    return found, prepared.non_finite
