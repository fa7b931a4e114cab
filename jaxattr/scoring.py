"""Scores: who taught the model this? Positive for proponents, negative for opponents."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.features import leading_size
from jaxattr.index import Index, QueryFeatures, State, features_of_batch, query_features, state_of
from jaxattr.plans import FeatureLayout
from jaxattr.typing import Batch, Features, Weights


class TopK(NamedTuple):
    """The strongest training examples per query, strongest first.

    Attributes:
      ids: integers [q, k]; -1 where there is none (a query, or too many training examples, are
        not finite).
      scores: float [q, k]; NaN where there is none.
    """

    ids: jax.Array
    scores: jax.Array


def uniform_weights(index: Index) -> dict[str, float]:
    """Returns weights of one, which give the base method's scores bit for bit.

    Args:
      index: the index.

    Returns:
      {group name: 1.0}.
    """
    return dict.fromkeys(index.layout.names, 1.0)


def score(index: Index, queries: Any, *, weights: Weights | None = None) -> jax.Array:
    r"""Scores every training example for every query.

    .. math:: \tau(q, n) = r_n \sum_c \eta_c \phi_c(q)^\top \mathrm{Diag}(w) K_c \phi_c(n)

    Args:
      index: the index.
      queries: a pytree of arrays, a random-access source, or `query_features(index, ...)`.
      weights: {group name: weight >= 0}. Default: one each, the base method.

    Returns:
      Float [q, n], larger = stronger proponent; no hidden 1/n. Training examples that are not
      finite score 0; queries that are not finite have rows of NaN.

    Raises:
      ValueError: if a weight is missing, unknown, negative or not finite.

    Cost: 2 q n c p operations beside the queries' features.

    References:
      Li et al. (2025), arXiv:2506.05647, Eq. 6.
    """
    w = weight_array(index.layout, weights)
    prepared = query_features(index, queries)
    scores = scores_of_features(index.layout, w, prepared.features, index.features, index.residual)
    return _mark_queries(scores, prepared)


def contributions(index: Index, queries: Any) -> jax.Array:
    """Splits every score into what each group contributes.

    Args:
      index: the index.
      queries: as in `score`.

    Returns:
      Float [q, n, m], groups in the order of `index.layout.names`. The sum over groups is the
      score; weighted, the weighted score.

    Cost: q n m numbers. `score` and `learn_weights` do not need them.
    """
    prepared = query_features(index, queries)
    parts = contributions_of_features(
        index.layout, prepared.features, index.features, index.residual
    )
    return _mark_queries(parts, prepared)


def top_k(
    index: Index,
    queries: Any,
    *,
    k: int = 10,
    weights: Weights | None = None,
    opponents: bool = False,
    block_size: int = 8192,
) -> TopK:
    """Finds the training examples with the largest scores; forms no [q, n] array.

    Args:
      index: the index.
      queries: as in `score`.
      k: how many, at most n.
      weights: as in `score`.
      opponents: the most negative scores instead, most negative first.
      block_size: training examples scored at once; sets the memory, q * block_size numbers.

    Returns:
      Ids and scores [q, k]. Ties go to the lower id. Examples that are not finite never appear.

    Raises:
      ValueError: if k is not between 1 and n, or weights are wrong.
    """
    _check_k(k, index)
    w = weight_array(index.layout, weights)
    prepared = query_features(index, queries)
    sign = -1 if opponents else 1
    top = _streaming_top_k(
        index.layout, k, block_size, sign, w, prepared.features, *_train_side(index)
    )
    return _mark_top(top, jnp.asarray(_finite_rows(prepared)))


def self_influence(index: Index, *, weights: Weights | None = None) -> jax.Array:
    """Scores every training example for itself: large for mislabelled and atypical examples.

    Args:
      index: the index.
      weights: as in `score`.

    Returns:
      Float [n]: r_n sum_c eta_c phi_c(n)^T Diag(w) K_c phi_c(n). NaN where not finite.
    """
    w = weight_array(index.layout, weights).astype(index.self_contributions.dtype)
    values = index.residual * jnp.matmul(index.self_contributions, w, precision="highest")
    return values.at[index.non_finite].set(jnp.nan)


def attributor(
    index: Index,
    *,
    weights: Weights | None = None,
    k: int = 10,
    opponents: bool = False,
    block_size: int = 8192,
) -> Callable[[Batch], TopK]:
    """Makes one jitted function from a batch to its strongest training examples.

    For use inside a training or serving loop: compiled once per batch shape, nothing goes through
    the host.

    Args:
      index: the index.
      weights: as in `score`.
      k: how many, at most n.
      opponents: the most negative scores instead.
      block_size: training examples scored at once.

    Returns:
      `attribute(batch, ids=None) -> TopK`, where ids are integers [b] that a stochastic output
      draws its randomness from (default -1, -2, ..., as in `score`).
    """
    _check_k(k, index)
    w = weight_array(index.layout, weights)
    sign = -1 if opponents else 1

    @jax.jit
    def run(state: State, train: tuple, w: jax.Array, batch: Batch, ids: jax.Array) -> TopK:
        phi, finite = features_of_batch(index, state, batch, ids)
        top = _streaming_top_k(index.layout, k, block_size, sign, w, phi, *train)
        return _mark_top(top, finite)

    def attribute(batch: Batch, ids: jax.Array | None = None) -> TopK:
        ids = -1 - jnp.arange(leading_size(batch)) if ids is None else jnp.asarray(ids)
        return run(state_of(index), _train_side(index), w, batch, ids)

    return attribute


def weight_array(layout: FeatureLayout, weights: Weights | None) -> jax.Array:
    """Orders weights as the groups are ordered, after checking them.

    Args:
      layout: the groups.
      weights: {group name: weight}, or None for one each.

    Returns:
      Float [m].

    Raises:
      ValueError: if a weight is missing, unknown, negative or not finite.
    """
    if weights is None:
        return jnp.ones(len(layout.names))
    unknown = sorted(set(weights) - set(layout.names))
    missing = sorted(set(layout.names) - set(weights))
    if unknown or missing:
        raise ValueError(
            f"Weights must name exactly the index's groups. Missing: {missing}; unknown: {unknown}."
        )
    values = jnp.stack([jnp.asarray(weights[name]) for name in layout.names])
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if values.ndim != 1:
        raise ValueError(f"Each weight must be a scalar, got shape {values.shape[1:]}.")
    if not isinstance(values, jax.core.Tracer):
        bad = ~np.isfinite(values) | (np.asarray(values) < 0)
        if bad.any():
            got = {layout.names[i]: float(values[i]) for i in np.flatnonzero(bad)}
            raise ValueError(f"Weights must be finite and at least 0, got {got}.")
    return values


def _expand(layout: FeatureLayout, w: jax.Array, phi: Features) -> Features:
    """Repeats each group's weight over its columns, and those over the checkpoints."""
    # Not jnp.repeat, which has the compiler fold a sum over all columns.
    columns = w[np.repeat(np.arange(len(layout.dims)), layout.dims)]
    return jnp.tile(columns, phi.shape[1] // layout.total).astype(phi.dtype)  # [c * p]


@functools.partial(jax.jit, static_argnums=0)
def scores_of_features(
    layout: FeatureLayout, w: jax.Array, phi: Features, train: Features, residual: jax.Array
) -> jax.Array:
    """Scores [q, n] of query features against the training side; pure.

    Args:
      layout: the groups.
      w: weights [m], unchecked.
      phi: query features [q, c * p].
      train: K phi of the training examples [n, c * p].
      residual: [n].

    Returns:
      Float [q, n].
    """
    weighted = phi * _expand(layout, w, phi)[None]
    return jnp.matmul(weighted, train.T, precision="highest") * residual[None]  # [q, n]


@functools.partial(jax.jit, static_argnums=0)
def contributions_of_features(
    layout: FeatureLayout, phi: Features, train: Features, residual: jax.Array
) -> jax.Array:
    """Contributions [q, n, m] of query features against the training side; pure.

    Args:
      layout: the groups.
      phi: query features [q, c * p].
      train: K phi of the training examples [n, c * p].
      residual: [n].

    Returns:
      Float [q, n, m].
    """

    def split(x: Features) -> Features:
        return x.reshape(x.shape[0], -1, layout.total)  # [b, c, p]

    phi, train = split(phi), split(train)
    parts = [
        jnp.einsum("qcp,ncp->qn", phi[:, :, columns], train[:, :, columns], precision="highest")
        for columns in layout.slices.values()
    ]
    return jnp.stack(parts, axis=-1) * residual[None, :, None]  # [q, n, m]


def _train_side(index: Index) -> tuple[Features, jax.Array, jax.Array]:
    finite = jnp.ones(index.size, bool).at[index.non_finite].set(False)
    return index.features, index.residual, finite


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _streaming_top_k(
    layout: FeatureLayout,
    k: int,
    block_size: int,
    sign: int,
    w: jax.Array,
    phi: Features,
    train: Features,
    residual: jax.Array,
    finite: jax.Array,
) -> TopK:
    """Keeps the k best of the blocks seen so far; missing ones are -1 with score -inf."""
    n, q = train.shape[0], phi.shape[0]
    block_size = min(block_size, n)

    def merge(i: jax.Array, best: TopK) -> TopK:
        # The last block is moved back to be full; what was seen before is masked out.
        start = jnp.minimum(i * block_size, n - block_size)
        rows, r, kept = (
            jax.lax.dynamic_slice_in_dim(x, start, block_size) for x in (train, residual, finite)
        )
        ids = start + jnp.arange(block_size)
        scores = sign * scores_of_features(layout, w, phi, rows, r)  # [q, block]
        usable = (kept & (ids >= i * block_size))[None] & jnp.isfinite(scores)
        scores = jnp.concatenate([best.scores, jnp.where(usable, scores, -jnp.inf)], axis=1)
        ids = jnp.broadcast_to(ids[None].astype(best.ids.dtype), (q, block_size))
        ids = jnp.concatenate([best.ids, jnp.where(usable, ids, -1)], axis=1)
        values, places = jax.lax.top_k(scores, k)
        return TopK(jnp.take_along_axis(ids, places, axis=1), values)

    dtype = jnp.result_type(phi, train, residual)
    start = TopK(jnp.full((q, k), -1), jnp.full((q, k), -jnp.inf, dtype))
    best = jax.lax.fori_loop(0, -(-n // block_size), merge, start)
    return TopK(best.ids, sign * best.scores)


def _mark_top(top: TopK, finite: jax.Array) -> TopK:
    there = finite[:, None] & (top.ids >= 0)
    return TopK(jnp.where(there, top.ids, -1), jnp.where(there, top.scores, jnp.nan))


def _finite_rows(prepared: QueryFeatures) -> np.ndarray:
    finite = np.ones(prepared.features.shape[0], bool)
    finite[prepared.non_finite] = False
    return finite


def _mark_queries(scores: jax.Array, prepared: QueryFeatures) -> jax.Array:
    return scores.at[prepared.non_finite].set(jnp.nan) if len(prepared.non_finite) else scores


def _check_k(k: int, index: Index) -> None:
    if not 1 <= k <= index.size:
        raise ValueError(f"k must be between 1 and the {index.size} training examples, got {k}.")
