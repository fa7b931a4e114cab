"""SOURCE: training as a few segments of gradient descent on a quadratic, one after the other."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.batches import leading_size, shapes_of_one
from jaxattr.features.whole_gradients import as_function_of, coordinates
from jaxattr.index.index import Index, check_index, report_non_finite
from jaxattr.index.queries import QueryFeatures
from jaxattr.inputs.data import as_batch
from jaxattr.inputs.outputs import check_output, runs
from jaxattr.kernels.segment import Segment
from jaxattr.keys import example_keys
from jaxattr.methods.method import Method
from jaxattr.scores.scoring import score
from jaxattr.typing import Batch, Params


def score_segments(
    indexes: Sequence[Index], queries: Batch, *, params: Params | None = None
) -> np.ndarray:
    r"""Scores of SOURCE over several segments of training, each with an index of its own.

    .. math:: \tau(q, n) = \nabla\ell(q)^\top \sum_s \Big[\prod_{r = S}^{s + 1} e^{-t_r H_r}\Big]
              \big(I - e^{-t_s H_s}\big) H_s^{-1} \nabla\ell_s(n)

    Gradients of queries go back from the last segment to the first, in the space of parameters, so
    that each segment has an eigenbasis of its own.

    Guarantees: exact for these curvatures where each basis is complete: layers with at most `rank`
    inputs (bias included) and outputs. Of larger ones, directions that a basis leaves out pass
    through a segment as they are.
    Cost: a score per segment; memory: a gradient of all parameters per query.

    Args:
      indexes: of `ja.source`, one per segment, the earliest first, each of one checkpoint within
        its segment, of the same loss, groups and training set.
      queries: a pytree of arrays [q, ...].
      params: the parameters at the end of training. Default: the checkpoint of the last index.

    Returns:
      Scores, float64 [q, n]. A query whose output or gradient is not finite has NaN. Training
      examples that are not finite in some segment score 0.

    Raises:
      TypeError: if the indexes are none of one.
      ValueError: if they are none of `ja.source`, have several checkpoints, were opened without
        their method, or differ in their training sets or layouts; if the loss fails for the
        queries or the parameters.

    Warns:
      NonFiniteWarning: with the ids of queries that are not finite.

    References:
      Bae et al. (2024), arXiv:2405.12186. Deviations: one checkpoint per segment, not the mean over
      several.
    """
    if isinstance(indexes, Index):
        raise TypeError(
            "indexes is one index, and one per segment is needed: pass a list, [index]."
        )
    if not isinstance(indexes, Iterable):
        raise TypeError(f"indexes must be a list of indexes, got {type(indexes).__name__}.")
    found = [(check_index(index), *_parts(index)) for index in indexes]
    if not found:
        raise ValueError("indexes is empty: one per segment is needed, the earliest first.")
    last, method, featurizer = found[-1]
    if any((one.size, one.layout) != (last.size, last.layout) for one, *_ in found):
        raise ValueError(
            "The indexes differ in their number of training examples or their groups: each must be "
            "of the same loss, groups and training set, at another checkpoint."
        )
    params = last.checkpoints[0] if params is None else params
    output, plan = method.rule.output, featurizer.plan
    queries = as_batch(queries, "queries", lambda example: runs(output, params, example))
    queries = jax.tree.map(jnp.asarray, queries)
    check_output(output, params, shapes_of_one(queries), featurizer.key)
    of_leaves, leaves = as_function_of(output, plan.rest | plan.covered, params)
    count = leading_size(queries)
    keys = example_keys(featurizer.key, -1 - jnp.arange(count))  # as queries of any index
    of_each = jax.vmap(jax.value_and_grad(of_leaves), in_axes=(None, 0, 0))
    values, gradients = jax.jit(of_each)(leaves, queries, keys)
    lost = np.flatnonzero(~np.isfinite(values))
    scores = np.zeros((count, last.size))
    for index, segment, featurizer in reversed(found):
        kernel: Any = segment.kernel
        to_features = coordinates(
            segment.rule.projection, featurizer.plan, index.drawn[0], index.fitted[0]
        )
        phi = jax.vmap(to_features)(gradients)
        bad = np.union1d(lost, np.flatnonzero(~jnp.isfinite(phi).all(axis=1)))
        scores += np.asarray(score(index, QueryFeatures(phi, bad, index.query_side)))
        _, to_parameters = jax.vjp(to_features, leaves)
        decay = kernel.decayed(index.operators[0], phi)
        gradients = jax.tree.map(jnp.add, gradients, jax.vmap(to_parameters)(decay)[0])
    finite = ~np.isnan(scores).any(axis=1)
    report_non_finite(np.flatnonzero(~finite), count, "queries")
    for index, *_ in found:  # and not what the other segments did
        scores[np.ix_(finite, index.non_finite)] = 0
    return scores


def _parts(index: Index) -> tuple[Method, Any]:
    method = index.method
    if method is None or not isinstance(method.kernel, Segment) or len(index.checkpoints) != 1:
        kind = "opened without its method" if method is None else f"of {method.name}"
        raise ValueError(
            f"Each segment needs an index of ja.source at one checkpoint; got one {kind} at "
            f"{len(index.checkpoints)}: ja.build_index(ja.source(loss, ...), params, train)."
        )
    return method, index.featurizer
