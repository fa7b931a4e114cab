"""Scores that were made elsewhere, as an index: the same `top_k`, the same report."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.batches import leading_size
from jaxattr.groups import by_leaf
from jaxattr.index.building import build_index
from jaxattr.index.index import Index
from jaxattr.inputs.data import as_batch
from jaxattr.methods.similarity import embedding
from jaxattr.scales import widened
from jaxattr.typing import Batch, Example, Params

FIELD = "given_scores"


def index_of_scores(
    scores: Any, train: Batch, queries: Batch, *, name: str = "given scores"
) -> tuple[Index, Batch]:
    """Makes an index whose scores are those that are given, for these queries.

    For baselines that know neither gradients nor embeddings (BM25, the distance of losses) and for
    other libraries' scores. Each training example gets its scores as a field, and each query its
    number as a unit vector: their inner products are the scores.

    Args:
      scores: float [q, n], larger = more alike.
      train: the training examples, a dict of arrays [n, ...], for the report.
      queries: a dict of arrays [q, ...].
      name: of the method, for tables and reports.

    Returns:
      The index, in memory, and the queries to ask it: `ja.top_k(index, queries)`,
      `ja.report(index, queries)`.

    Raises:
      ValueError: if scores are not finite or not [q, n], or the data are no dicts.

    Cost: q n numbers.

    Example:
      >>> import jaxattr as ja
      >>> train, queries = {"x": np.arange(3.0)}, {"x": np.array([0.9])}
      >>> gap = abs(queries["x"][:, None] - train["x"])
      >>> index, asked = index_of_scores(gap.mean(axis=1, keepdims=True) - gap, train, queries)
      >>> print(ja.top_k(index, asked, k=2).ids)
      [[1 0]]
    """
    scores = widened(scores)
    train, queries = _with_names(train, "train"), _with_names(queries, "queries")
    wanted = (leading_size(queries), leading_size(train))
    if scores.shape != wanted or scores.dtype.kind not in "iuf":
        raise ValueError(
            f"scores must be real numbers [q, n] = {list(wanted)}, got {scores.dtype} "
            f"{list(scores.shape)}."
        )
    with np.errstate(over="ignore"):
        columns = scores.T.astype(jnp.result_type(float))
    lost = np.argwhere(~np.isfinite(columns.T))
    if len(lost):
        raise ValueError(
            f"{len(lost)} scores are not finite in {columns.dtype}, the first of query "
            f"{lost[0, 0]} and training example {lost[0, 1]}: leave those out, or give a number "
            "that is less than all others."
        )
    index = build_index(
        embedding(_field, cosine=False, name=name),
        {"probe": jnp.zeros(len(scores), columns.dtype), "model": {}},
        {**train, FIELD: columns},
        groups=by_leaf(),
    )
    return index, {**queries, FIELD: np.eye(len(scores), dtype=columns.dtype)}


def _field(params: Params, example: Example) -> jax.Array:
    return example[FIELD]


def _with_names(data: Any, role: str) -> dict[str, Any]:
    batch = as_batch(data, role)
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"{role} must be a dict of arrays, got {type(data).__name__}: give it a name, "
            f'{{"x": {role}}}.'
        )
    return dict(batch)
