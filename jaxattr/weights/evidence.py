"""What retrained models and noised copies say of weights, from one pass over the training set."""

from typing import Any

import jax
import numpy as np

from jaxattr.batches import leading_size
from jaxattr.counts import checked_ids
from jaxattr.index.index import Index
from jaxattr.index.queries import QueryFeatures, as_queries, query_features
from jaxattr.scores.subsets import Asked, SubsetSums, checked_masks, subset_sums
from jaxattr.weights.agreement import Evidence, LinearSums, SquaredSums, Sums
from jaxattr.weights.outcomes import Agreed, Outcomes, agreed, check_queries, variance_of_sums
from jaxattr.weights.report import ContributionStatistics

# Sums of squared scores are kept as products of contributions, up to so many bytes.
_PRODUCT_BYTES = 1 << 32


def gather(
    index: Index, queries: Any, outcomes: Outcomes, copies: tuple[Any, Any] | None
) -> tuple[Evidence, ContributionStatistics, Agreed]:
    """Goes over the training set once.

    Args:
      index: the index.
      queries: the learning queries, as in `learn_weights`.
      outcomes: of retrained models on them.
      copies: noised copies of training examples and the ids of those, or None.

    Returns:
      Evidence, float64, on the host; statistics of the contributions of the learning queries; and
      the outcomes.

    Raises:
      ValueError: if outcomes are of other queries or of another n, sources are no ids, or nothing
        is finite.
    """
    checked_masks(outcomes.masks, index.size)
    prepared = query_features(index, queries)
    check_queries(outcomes, queries, len(prepared.features))
    kept = np.setdiff1d(np.arange(len(prepared.features)), prepared.non_finite)
    if not len(kept):
        raise ValueError("No query has a finite gradient: there is nothing to learn from.")
    found = agreed(outcomes, kept)
    squared, q, m = index.link == "square", len(kept), len(index.layout.names)
    if squared:
        _check_products(len(found.masks), q, m)
    asked = [Asked(_only(prepared, kept), found.masks, products=squared)]
    if copies is not None:
        asked.append(_of_copies(index, copies))
    sums, *own = subset_sums(index, *asked)
    of_copies = _own(own[0], squared) if own else None
    evidence = Evidence(_sums(sums, found.masks), found.ranks, of_copies)
    statistics = ContributionStatistics(sums.squares, sums.largest, sums.examples).checked()
    return evidence, statistics, found


def _only(prepared: QueryFeatures, kept: np.ndarray) -> jax.Array:
    """Features of some queries; the very array if those are all, for which programs exist."""
    every = len(kept) == len(prepared.features)
    return prepared.features if every else prepared.features[kept]


def _sums(found: SubsetSums, masks: np.ndarray) -> Sums:
    if found.products is not None:
        return SquaredSums(found.products - found.products.mean(axis=0))
    beyond = found.sizes - found.sizes.mean()  # larger subsets have larger sums
    sums = found.sums + beyond[:, None, None] * found.mean
    gram = found.gram * variance_of_sums(masks, found.examples)
    gram += beyond.var() * found.mean[:, :, None] * found.mean[:, None]
    return LinearSums(sums - sums.mean(axis=0), gram)


def _own(found: SubsetSums, squared: bool) -> LinearSums:
    """What copies get of their sources; squares do not see the sign of a residual."""
    own = found.own  # [q, m]
    own = own * np.sign(own.sum(axis=1, keepdims=True)) if squared else own
    return LinearSums(own[None], found.gram / found.examples)


def _of_copies(index: Index, copies: tuple[Any, Any]) -> Asked:
    """The copies that are finite, and the ids of their sources."""
    if not isinstance(copies, tuple) or len(copies) != 2:
        raise ValueError(
            "copies must be a pair (batch, ids of the training examples that its rows are copies "
            f"of), got {type(copies).__name__}. ja.noised(train, ids, key) makes the batch."
        )
    batch, sources = copies
    batch = as_queries(index, batch)
    count = len(batch.features) if isinstance(batch, QueryFeatures) else leading_size(batch)
    sources = checked_ids(sources, index.size, f"The sources of {count} copies", count)
    prepared = query_features(index, batch)
    lost = np.union1d(prepared.non_finite, np.flatnonzero(np.isin(sources, index.non_finite)))
    kept = np.setdiff1d(np.arange(count), lost)
    if not len(kept):
        raise ValueError("No copy of a finite training example has a finite gradient.")
    return Asked(_only(prepared, kept), np.zeros((0, index.size), bool), sources[kept])


def _check_products(models: int, queries: int, groups: int) -> None:
    needed = models * queries * groups**2 * 8
    if needed > _PRODUCT_BYTES:
        raise ValueError(
            f"Scores of this index are squares, for which outcomes need {models} models x "
            f"{queries} queries x {groups}^2 groups, {needed / 2**30:.1f} GiB, of which "
            f"{_PRODUCT_BYTES >> 30} are allowed. Take fewer groups (groups=ja.by_layer), fewer "
            'queries, or link="identity".'
        )
