"""Features of the parts of queries, such as tokens, of which the outputs add up."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.batches import leading_size, shapes_of_one
from jaxattr.features.expectations import refuse_unit_norm
from jaxattr.features.featurizer import Featurized
from jaxattr.identity import Program
from jaxattr.index.index import Index
from jaxattr.index.queries import (
    QueryArrays,
    QueryFeatures,
    QueryFunctions,
    accepted_by,
    features_of_batch,
    featurizer_of,
    state_of,
)
from jaxattr.inputs.data import as_batch
from jaxattr.kernels import Kernel, MapsQueries
from jaxattr.sources import track
from jaxattr.typing import Batch, Example, Features


def part_features(index: Index, queries: Any, split: Callable[[Example], Batch]) -> QueryFeatures:
    """Features of the parts of each query, such as its tokens, to be scored like queries.

    Args:
      index: the index that they will be scored against.
      queries: a pytree of arrays [q, ...].
      split: one query -> a pytree of arrays [t, ...], t parts whose outputs add up to the query's.

    Returns:
      Features [q * t, c * p], the parts of the first query first; those of a query add up to its
      own features. Where the method scales queries to unit norm, the parts of a query are scaled
      together. Queries that are not finite are marked in all of their parts.

    Raises:
      ValueError: if the index was opened without its method and checkpoints, or parts do not add
        up: squared scores, unit norm per draw.
    """
    queries = as_batch(queries, "queries", accepted_by(index))
    one = shapes_of_one(jax.tree.map(jnp.asarray, queries))
    featurize, method = featurizer_of(index, one)
    refuse_unit_norm(featurize.rule.output, "Scoring the parts of a query")
    if index.link == "square":
        raise ValueError("Squares of parts do not add up: scores of this index are squares.")
    state, q = state_of(index), leading_size(queries)
    cut = Program(split, (one,))
    step = _part_step(featurize.unscaled(), featurize.rule.normalize, method.kernel, cut)
    found, finite = [], []
    for number in track(iter(range(q)), "queries by parts", q):
        one = jax.tree.map(lambda x, number=number: jnp.asarray(x[number]), queries)
        features, whole = step(state, one, jnp.asarray(-1 - number))
        found.append(features)
        finite.append(np.full(len(features), bool(whole)))
    lost = np.flatnonzero(~np.concatenate(finite))
    return QueryFeatures(jnp.concatenate(found), lost, index.query_side)


@functools.lru_cache(maxsize=16)
def _part_step(step: Any, normalize: bool, kernel: Kernel, split: Any) -> Any:
    """The jitted (state, one query, id) -> features of its parts, and whether they are finite."""

    def scaled_step(*arguments: Any) -> Featurized:
        got = step(*arguments)
        return got._replace(features=_unit_sum(got.features)) if normalize else got

    together = _ScaledTogether(kernel) if isinstance(kernel, MapsQueries) else None
    functions = QueryFunctions(scaled_step, together)

    @jax.jit
    def run(state: QueryArrays, query: Example, number: jax.Array) -> tuple[Features, jax.Array]:
        parts = split(query)
        ids = jnp.full(leading_size(parts), number)
        features, finite = features_of_batch(functions, state, parts, ids)
        return features, finite.all()

    return run


class _ScaledTogether(NamedTuple):
    """A kernel that scales the parts of a query together."""

    kernel: MapsQueries

    def of_queries(self, operator: Any, phi: Features) -> Features:
        return _unit_sum(self.whiten(operator, phi))

    def whiten(self, operator: Any, phi: Features) -> Features:
        return self.kernel.whiten(operator, phi)


def _unit_sum(phi: Features) -> Features:
    """Scales rows together, so that their sum has unit norm; a sum of zero stays."""
    norm = jnp.linalg.norm(phi.sum(axis=0))
    return phi / jnp.where(norm == 0, 1, norm)
