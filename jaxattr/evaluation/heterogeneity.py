"""How right each parameter group is by itself, and how right weights could be at best.

Scores are linear in the training side, so the score of a subset is that of its summed features: no
[q, n, m] array is needed here either. Squared scores are not: there the sums are of products of
contributions, [q, s, m, m].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxattr.counts import whole_number
from jaxattr.evaluation.lds import LDS, lds_of_predictions
from jaxattr.index.index import Index
from jaxattr.index.queries import query_features
from jaxattr.scores import ranking, scoring
from jaxattr.sharding import Placement
from jaxattr.store.rows import EXAMPLES, FEATURES


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
    masks = _checked(masks, index)
    prepared = query_features(index, queries)
    layout = index.rows.layout
    chosen = np.zeros((len(masks), layout.blocks * layout.block), bool)
    chosen[:, : index.size] = masks
    sums: jax.Array | float = 0.0
    for slab in index.rows.slabs([FEATURES, EXAMPLES], scoring.SLAB):
        skipped = slab.fresh * layout.block
        side = ranking.train_side(slab.arrays)
        rows = (side.features * side.residual[:, None])[skipped:]  # [r, c * p]
        start = slab.first + skipped
        picked = jnp.asarray(chosen[:, start : start + len(rows)], rows.dtype)
        sums = sums + jnp.matmul(picked, rows, precision="highest")  # [s, c * p]
    examples = jnp.ones((1, len(masks), layout.checkpoints, layout.widths[EXAMPLES]))
    subsets = jnp.asarray(sums).reshape(1, len(masks), layout.checkpoints, -1)
    arrays = {FEATURES: subsets, EXAMPLES: examples.astype(subsets.dtype)}
    parts = ranking.local_contributions(
        Placement(), index.layout, index.place.gathered(prepared.features), arrays
    )
    found = np.array(parts, np.float64)
    found[prepared.non_finite] = np.nan
    return found


def subset_products(index: Index, queries: Any, masks: Any) -> np.ndarray:
    """Sums over each subset of the products of contributions, for scores that are squares.

    Args:
      index: the index.
      queries: as in `score`.
      masks: bool [s, n].

    Returns:
      Float [q, s, m, m]; w^T (...) w is the sum of squared scores. Needs contributions [q, n, m].
    """
    chosen = [np.flatnonzero(mask) for mask in _checked(masks, index)]
    parts = np.asarray(scoring.contributions(index, queries), np.float64)
    sums = [[each[ids].T @ each[ids] for ids in chosen] for each in parts]
    return np.asarray(sums)


def group_lds(index: Index, queries: Any, masks: Any, outputs: Any) -> dict[str, LDS]:
    """LDS of each parameter group's contributions alone: the heterogeneity that weights exploit.

    Args:
      index: the index.
      queries: as in `score`.
      masks: bool [s, n].
      outputs: float [s, q], as in `lds`.

    Returns:
      {group name: LDS}.

    References:
      Li et al. (2025), arXiv:2506.05647, section 2.
    """
    if index.link == "square":
        sums = np.einsum("qsmm->qsm", subset_products(index, queries, masks))
    else:
        sums = subset_contributions(index, queries, masks)
    return {
        name: lds_of_predictions(sums[:, :, j], outputs)
        for j, name in enumerate(index.layout.names)
    }


def upper_bound_weights(
    index: Index, queries: Any, masks: Any, outputs: Any, *, steps: int = 300
) -> dict[str, float]:
    """Weights fitted to ground truth: what weighting could reach at best with labels like these.

    Maximises the mean over queries of the correlation between predictions and the RANKS of outputs,
    which is smooth, by Adam over softplus parameters, from the groups at unit root mean square and
    from uniform weights, of which the better end counts.
    Heuristic. Not for use as attribution weights: needs retrained models. Evaluate on queries other
    than these.

    Args:
      index: the index.
      queries: as in `score`.
      masks: bool [s, n].
      outputs: float [s, q], as in `lds`.
      steps: of Adam.

    Returns:
      {group name: weight}, mean one.
    """
    from scipy import stats  # slow to import, and needed here alone

    squared, steps = index.link == "square", whole_number("steps", steps)
    sums = (subset_products if squared else subset_contributions)(index, queries, masks)
    kept = np.isfinite(sums).all(axis=tuple(range(1, sums.ndim)))
    sums = sums[kept] - sums[kept].mean(axis=1, keepdims=True)  # [q, s, m] or [q, s, m, m]
    ranks = stats.rankdata(np.asarray(outputs, np.float64)[:, kept].T, axis=1)  # [q, s]
    ranks = ranks - ranks.mean(axis=1, keepdims=True)
    rank_norm = np.linalg.norm(ranks, axis=1, keepdims=True)
    ranks = ranks / np.where(rank_norm > 0, rank_norm, 1)
    gauge = _gauge(np.einsum("qsmm->qsm", sums) if squared else sums, 0.5 if squared else 1.0)
    if squared:
        correlation = _quadratic_correlation(sums * gauge[:, None] * gauge, ranks)
    else:
        correlation = _linear_correlation(sums * gauge, ranks)
    # The correlation has many maxima, so it is climbed from two places.
    uniform = np.where(gauge > 0, 1 / np.where(gauge > 0, gauge, 1), 0)
    starts = (np.ones_like(gauge), uniform / max(uniform.mean(), 1e-30))
    best = max((_ascend(correlation, start, steps) for start in starts), key=correlation)
    w = gauge * np.asarray(best, np.float64)
    w = w / w.mean()
    return {name: float(value) for name, value in zip(index.layout.names, w, strict=True)}


def _checked(masks: Any, index: Index) -> np.ndarray:
    masks = np.asarray(masks)
    if masks.dtype != bool or masks.ndim != 2 or masks.shape[1] != index.size:
        raise ValueError(
            f"masks must be bool [subsets, {index.size}], got {masks.dtype} of shape {masks.shape}."
        )
    return masks


def _gauge(sums: np.ndarray, power: float) -> np.ndarray:
    """Scales each group's sums [q, s, m] to unit root mean square."""
    scale = np.sqrt((sums**2).mean(axis=(0, 1))) ** power
    return np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0)


def _linear_correlation(sums: np.ndarray, ranks: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """W -> the mean correlation of w . sums [q, s, m] with ranks [q, s] of unit norm."""
    # Covariance and variance are a linear and a quadratic form.
    slope = jnp.asarray(np.einsum("qs,qsm->qm", ranks, sums), jnp.float32)
    square = jnp.asarray(np.einsum("qsm,qsk->qmk", sums, sums), jnp.float32)

    def correlation(w: jax.Array) -> jax.Array:
        norm = jnp.einsum("qmk,m,k->q", square, w, w)
        return jnp.mean(slope @ w / jnp.sqrt(jnp.maximum(norm, 1e-30)))

    return correlation


def _quadratic_correlation(sums: np.ndarray, ranks: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """The same of w^T sums w, for sums [q, s, m, m]."""
    sums_, ranks_ = jnp.asarray(sums, jnp.float32), jnp.asarray(ranks, jnp.float32)

    def correlation(w: jax.Array) -> jax.Array:
        predicted = jnp.einsum("qsmk,m,k->qs", sums_, w, w)
        norm = jnp.sqrt(jnp.maximum(jnp.sum(predicted**2, axis=1), 1e-30))
        return jnp.mean(jnp.sum(predicted * ranks_, axis=1) / norm)

    return correlation


def _ascend(
    correlation: Callable[[jax.Array], jax.Array], start: np.ndarray, steps: int
) -> jax.Array:
    """Weights after Adam on minus the mean correlation, over softplus parameters."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, steps))

    def step(state: tuple, _: None) -> tuple[tuple, None]:
        theta, optimizer_state = state
        gradient = jax.grad(lambda theta: -correlation(jax.nn.softplus(theta)))(theta)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return (optax.apply_updates(theta, updates), optimizer_state), None

    positive = np.maximum(start, 1e-3)
    theta = jnp.asarray(positive + np.log(-np.expm1(-positive)), jnp.float32)  # softplus inverted
    (theta, _), _ = jax.lax.scan(step, (theta, optimizer.init(theta)), length=steps)
    return jax.nn.softplus(theta)
