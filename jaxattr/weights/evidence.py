"""What retrained models and noised copies say of weights, from one pass over the training set."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.batches import leading_size
from jaxattr.index.index import Index
from jaxattr.index.queries import QueryFeatures, query_features
from jaxattr.scores.subsets import SubsetSums, checked_masks, subset_sums
from jaxattr.weights.agreement import Evidence, LinearSums, SquaredSums, Sums
from jaxattr.weights.outcomes import (
    Agreed,
    Outcomes,
    agreed,
    digest_of_queries,
    variance_of_sums,
)
from jaxattr.weights.report import ContributionStatistics

# Sums of squared scores are kept as products of contributions, up to so many bytes.
_PRODUCT_BYTES = 1 << 32


class Gathered(NamedTuple):
    """Evidence, and what is to be said of it.

    Attributes:
      evidence: float64, on the host.
      statistics: of the contributions of the learning queries.
      agreed: the outcomes.
    """

    evidence: Evidence
    statistics: ContributionStatistics
    agreed: Agreed


def gather(
    index: Index, queries: Any, outcomes: Outcomes, copies: tuple[Any, Any] | None
) -> Gathered:
    """Goes over the training set once.

    Args:
      index: the index.
      queries: the learning queries, as in `learn_weights`.
      outcomes: of retrained models on them.
      copies: noised copies of training examples and the ids of those, or None.

    Raises:
      ValueError: if outcomes are of other queries or of another n, sources are no ids, or nothing
        is finite.
    """
    checked_masks(outcomes.masks, index.size)
    prepared = query_features(index, queries)
    _check_queries(prepared, queries, outcomes)
    kept = np.setdiff1d(np.arange(len(prepared.features)), prepared.non_finite)
    if not len(kept):
        raise ValueError("No query has a finite gradient: there is nothing to learn from.")
    found = agreed(outcomes, kept)
    phi, own = prepared.features[kept], np.full(len(kept), -1)
    if copies is not None:
        noised, sources = _of_copies(index, copies)
        phi, own = jnp.concatenate([phi, noised]), np.concatenate([own, sources])
    squared = index.link == "square"
    if squared:
        _check_products(len(found.masks), len(phi), len(index.layout.names))
    sums = subset_sums(index, phi, found.masks, own=own, products=squared)
    q = len(kept)
    statistics = ContributionStatistics(sums.squares[:q], sums.largest[:q], sums.examples)
    evidence = Evidence(
        _sums(sums, found.masks, q),
        found.ranks,
        None if copies is None else LinearSums(sums.own[None, q:], sums.gram[q:] / sums.examples),
    )
    return Gathered(evidence, statistics, found)


def _sums(found: SubsetSums, masks: np.ndarray, q: int) -> Sums:
    if found.products is not None:
        products = found.products[:, :q]
        return SquaredSums(products - products.mean(axis=0))
    sums = found.sums[:, :q]
    gram = found.gram[:q] * variance_of_sums(masks, found.examples)
    return LinearSums(sums - sums.mean(axis=0), gram)


def _check_queries(prepared: QueryFeatures, queries: Any, outcomes: Outcomes) -> None:
    q = outcomes.outputs.shape[1]
    if q != len(prepared.features):
        raise ValueError(
            f"Outcomes are of {q} queries, and there are {len(prepared.features)}: pass the queries"
            " that the retrained models were asked, in their order."
        )
    found = None if isinstance(queries, QueryFeatures) else digest_of_queries(queries)
    if None not in (found, outcomes.queries) and found != outcomes.queries:
        raise ValueError(
            f"Outcomes are of {q} other queries than those that are given, though as many: pass "
            "the queries that ja.outcomes was given, in their order."
        )


def _of_copies(index: Index, copies: tuple[Any, Any]) -> tuple[jax.Array, np.ndarray]:
    """Features of the copies that are finite, and the ids of their sources."""
    if not isinstance(copies, tuple) or len(copies) != 2:
        raise ValueError(
            "copies must be a pair (batch, ids of the training examples that its rows are copies "
            f"of), got {type(copies).__name__}. ja.noised(train, ids, key) makes the batch."
        )
    batch, sources = copies
    sources = np.asarray(sources)
    count = len(batch.features) if isinstance(batch, QueryFeatures) else leading_size(batch)
    whole = np.issubdtype(sources.dtype, np.integer) and sources.shape == (count,)
    if not whole or not ((sources >= 0) & (sources < index.size)).all():
        raise ValueError(
            f"The sources of {count} copies must be ids of training examples, integers [{count}] "
            f"from 0 to {index.size - 1}; got {sources.dtype} {list(sources.shape)}"
            + (f" from {sources.min()} to {sources.max()}." if sources.size else ".")
        )
    prepared = query_features(index, batch)
    lost = np.union1d(prepared.non_finite, np.flatnonzero(np.isin(sources, index.non_finite)))
    kept = np.setdiff1d(np.arange(count), lost)
    if not len(kept):
        raise ValueError("No copy of a finite training example has a finite gradient.")
    return prepared.features[kept], sources[kept]


def _check_products(models: int, queries: int, groups: int) -> None:
    needed = models * queries * groups**2 * 8
    if needed > _PRODUCT_BYTES:
        raise ValueError(
            f"Scores of this index are squares, for which outcomes need {models} models x "
            f"{queries} queries x {groups}^2 groups, {needed / 2**30:.1f} GiB, of which "
            f"{_PRODUCT_BYTES >> 30} are allowed. Take fewer groups (groups=ja.by_layer), fewer "
            'queries, or link="identity".'
        )
