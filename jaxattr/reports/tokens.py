"""A score, split over the tokens of both sides: what each of them contributes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxattr.index.index import Index
from jaxattr.index.parts import part_features, part_products
from jaxattr.index.queries import QueryFeatures
from jaxattr.kernels import Identity
from jaxattr.language import check_targets, token_of, tokens_of
from jaxattr.scores.candidates import in_parts
from jaxattr.scores.weighting import weight_array
from jaxattr.sources import Source, track
from jaxattr.store.rows import COLUMNS, EXAMPLES, FEATURES, SLAB, values_of
from jaxattr.typing import Weights

# A split whose sum is further from the score, relative to the size of its parts, is none.
_TOLERANCE = 0.02

# Tokens whose features cost what a pass in forward mode costs at most, unit norm included.
_PASSES = 8


class Pair(NamedTuple):
    """A query and a training example that it found.

    Attributes:
      query: its position.
      train: the id of the example.
      score: of the pair.
    """

    query: int
    train: int
    score: float


def of_queries(
    index: Index, queries: Source, weights: Weights | None, pairs: Sequence[Pair]
) -> dict[Pair, np.ndarray]:
    """Splits scores over the tokens of the queries.

    Args:
      index: the index.
      queries: rows of tokens.
      weights: of groups.
      pairs: whose scores.

    Returns:
      {pair: contribution of each target [t]}; pairs whose contributions do not add up to their
      score, since the loss is no sum over targets, are left out.

    Cost: a pass in forward mode per pair, or a forward and backward pass per token where there are
      few; reads the rows of the examples, whose features, c * p numbers each, are in memory.
    """
    rows, w = _train_rows(index, {pair.train for pair in pairs}), _columns(index, weights)
    found: dict[Pair, np.ndarray] = {}
    for query, wanted in track(_by("query", pairs), "tokens of queries", len(pairs)):
        vectors = np.stack([rows[pair.train] * w for pair in wanted])
        found |= zip(wanted, _products(index, queries, query, vectors), strict=True)
    return _adding_up(found)


def of_examples(
    index: Index, train: Source, queries: QueryFeatures, weights: Weights | None,
    pairs: Sequence[Pair],
) -> dict[Pair, np.ndarray]:  # fmt: skip
    """Splits scores over the tokens of training examples, where the kernel is the identity.

    Args:
      index: the index.
      train: rows of tokens.
      queries: features of all queries.
      weights: of groups.
      pairs: whose scores.

    Returns:
      As `of_queries`; empty where the kernel is another, which mixes the tokens.

    Cost: as `of_queries`, for the tokens of the training examples.
    """
    if index.method is None or not isinstance(index.method.kernel, Identity):
        return {}
    # Training examples go through the method's own output, not through that of queries.
    side = dataclasses.replace(index, method=dataclasses.replace(index.method, query_output=None))
    eta = index.method.weights_of(len(index.checkpoints))
    w = _columns(index, weights) * np.repeat(eta, index.layout.total)
    phi = {q: np.asarray(queries.features[q], np.float64) * w for q in {x.query for x in pairs}}
    found: dict[Pair, np.ndarray] = {}
    for number, wanted in track(_by("train", pairs), "tokens of training examples", len(pairs)):
        vectors = np.stack([phi[pair.query] for pair in wanted])
        found |= zip(wanted, _products(side, train, number, vectors), strict=True)
    return _adding_up(found)


def can_split(index: Index) -> bool:
    """Whether scores of an index are sums over tokens that can be computed."""
    return index.method is not None and index.link == "identity"


def _products(index: Index, source: Source, position: int, vectors: np.ndarray) -> np.ndarray:
    """Products of the features of each token of one row with vectors [k, c * p]: [k, t]."""
    batch: Mapping[str, Any] = source.read(np.array([position]))
    check_targets(batch)
    row = {name: np.asarray(field)[0] for name, field in batch.items()}
    if _PASSES * len(vectors) > len(row["mask"]):
        return vectors @ np.asarray(part_features(index, batch, tokens_of).features, np.float64).T
    return part_products(index, row, token_of, len(row["mask"]), vectors)


def _columns(index: Index, weights: Weights | None) -> np.ndarray:
    """The weight of each feature, [c * p]."""
    w = np.asarray(weight_array(index.layout, weights), np.float64)
    return np.tile(np.repeat(w, index.layout.dims), index.rows.layout.checkpoints)


def _train_rows(index: Index, ids: set[int]) -> dict[int, np.ndarray]:
    """r_n eta_c K_c phi_c(n) of some training examples, each [c * p]."""
    found: dict[int, np.ndarray] = {}
    for part in in_parts(index, np.array([list(ids)]), SLAB):
        arrays, chosen = index.rows.pick(index.rows.layout.side, part.ids), part.ids.reshape(-1)
        features = index.place.host(values_of(FEATURES, arrays))[0, ..., : index.layout.total]
        residual = index.place.host(arrays[EXAMPLES])[0, ..., COLUMNS.residual].mean(axis=1)
        rows = features.reshape(len(chosen), -1).astype(np.float64) * residual[:, None]
        found |= {int(i): row for i, row in zip(chosen, rows, strict=True) if i >= 0}
    return found


def _by(side: str, pairs: Sequence[Pair]) -> list[tuple[int, list[Pair]]]:
    numbers = sorted({getattr(pair, side) for pair in pairs})
    return [(number, [x for x in pairs if getattr(x, side) == number]) for number in numbers]


def _adding_up(found: dict[Pair, np.ndarray]) -> dict[Pair, np.ndarray]:
    return {
        pair: values
        for pair, values in found.items()
        if abs(values.sum() - pair.score) <= _TOLERANCE * np.abs(values).sum()
    }
