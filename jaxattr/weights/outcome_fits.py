"""Weights fitted to retrained models, and what is gained by them, by cross-fitting.

The fit is repeated for several strengths of the pull towards uniform weights and with every fold of
the models left out. On the models that were left out each strength gains so much; how often it
gains the most, of all strengths and of uniform weights, when models are drawn again with
replacement, is how much it counts in the logarithms of the weights that are returned. So the pull
is chosen by the data, and the less gain can be shown, the nearer the weights are to uniform ones.
"""

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxattr.index.index import Index
from jaxattr.weights.agreement import Evidence, Strengths, outcome_loss
from jaxattr.weights.evidence import gather
from jaxattr.weights.outcomes import Outcomes
from jaxattr.weights.report import Gain, WeightFit, report

# Lambda of the pull towards uniform weights; each fit starts where the one before ended. Uniform
# weights, where the first starts, stand for an infinite one.
PULLS = (0.32, 0.1, 0.032, 0.01)
CAUTION = 1.0  # tau: standard errors that are taken off the gain
COPIES = 0.5  # mu: how strongly noised copies count
FOLDS = 8
_RESAMPLES = 1000
# Variances that the interval of the gain is made of: of these models and queries, of those that it
# is measured with, and as much again for what both leave out (BUILD_NOTES.md).
_DRAWS = 3
# The gradient of the objective, whose size is about one, is zero for all purposes.
_TOLERANCE = 1e-10


def fit_to_outcomes(
    index: Index,
    queries: Any,
    outcomes: Outcomes,
    copies: tuple[Any, Any] | None,
    optimizer: optax.GradientTransformation | None,
    steps: int,
) -> WeightFit:
    """Learns weights from outcomes of retrained models; see `learn_weights`.

    Args:
      index: the index.
      queries: the learning queries.
      outcomes: of retrained models on them.
      copies: noised copies of training examples and the ids of those, or None.
      optimizer: over the logarithms of weights. Default: L-BFGS.
      steps: updates, at most.

    Returns:
      The weights with diagnostics.
    """
    evidence, statistics, agreed = gather(index, queries, outcomes, copies)
    names = index.layout.names
    found = cross_fitted(evidence, optimizer, steps)
    models, asked = agreed.ranks.shape
    gain = Gain(
        **found.gain._asdict(), uniform=found.uniform.mean, uniform_low=found.uniform.low,
        uniform_high=found.uniform.high, models=models, queries=asked - agreed.skipped,
        dropped=agreed.dropped, skipped=agreed.skipped, to_uniform=found.to_uniform,
    )  # fmt: skip
    w = np.exp(found.theta)
    return report(
        names, statistics, np.ones(len(names)), w / w.mean(), losses=found.losses,
        loss=(-found.uniform.mean, -found.reached),
        held_out_loss=(-found.uniform.mean, -found.uniform.mean - found.gain.mean),
        hub=None, hub_share=None, passes=1, gain=gain,
    )  # fmt: skip


class Estimate(NamedTuple):
    """A mean over models and queries, with a 95 % interval over both.

    Attributes:
      mean: the estimate.
      low: lower end.
      high: upper end.
    """

    mean: float
    low: float
    high: float


class CrossFitted(NamedTuple):
    """Weights and what they gain.

    Attributes:
      theta: logarithms of weights, mean zero, [m].
      gain: of agreement over uniform weights, on models that were left out; its interval is for
        what is measured with as many other models and queries.
      uniform: agreement of uniform weights.
      reached: agreement of the weights on the models that they are fitted to.
      to_uniform: how much uniform weights count in them, between 0 and 1.
      losses: of all models, at the end of the fit for each pull.
    """

    theta: np.ndarray
    gain: Estimate
    uniform: Estimate
    reached: float
    to_uniform: float
    losses: np.ndarray


def cross_fitted(
    evidence: Evidence, optimizer: optax.GradientTransformation | None = None, steps: int = 200
) -> CrossFitted:
    """Fits with all models and without each fold, and joins what the pulls give.

    Args:
      evidence: float64, on the host.
      optimizer: over theta. Default: L-BFGS.
      steps: updates, at most.

    Returns:
      Weights and gain. The same for the same evidence.

    Cost: 9 x 4 fits of some 60 steps, of 6 q m (m + s) operations each. In float64, as single
    precision leaves weights uncertain by 1e-3; on the host's CPU, if JAX was left one.
    """
    # Optax takes the standard promotion of types for granted.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), _on_host():
        evidence = jax.tree.map(jnp.asarray, evidence)
        models, m = len(evidence.ranks), evidence.sums[0].shape[-1]
        folds = np.arange(models) % FOLDS
        included = np.stack([*(folds != fold for fold in range(FOLDS)), np.ones(models, bool)])
        counted = jnp.asarray(included, jnp.float64)
        found = _path(evidence, counted, optimizer=optimizer, steps=steps)
        theta, losses = map(np.asarray, found)  # [folds + 1, pulls, m]
        uniform = _shares(evidence, np.zeros((1, m)))[0]  # [s, q]
        gains = np.stack(
            [_shares(evidence, theta[fold]) - uniform for fold in range(FOLDS)]
        )  # [folds, pulls, s, q]
        left_out = gains[folds, :, np.arange(models)].mean(axis=2)  # [s, pulls]
        by_model = uniform.mean(axis=1)
        counts = _how_much(left_out, by_model)  # [pulls]
        joined = np.zeros_like(uniform)
        for fold in range(FOLDS):
            # A fold has no say of its own in how much the pulls count where it is measured on. The
            # others' fits have seen it, though: of few models the gain comes out too large.
            own = _how_much(left_out[folds != fold], by_model[folds != fold])
            there = np.tensordot(own, theta[fold], 1)
            joined[folds == fold] = (_shares(evidence, there[None])[0] - uniform)[folds == fold]
        final = np.tensordot(counts, theta[-1], 1)
        return CrossFitted(
            theta=final,
            gain=_estimate(joined, draws=_DRAWS),
            uniform=_estimate(uniform),
            reached=float(_shares(evidence, final[None])[0].mean()),
            to_uniform=float(1 - counts.sum()),
            losses=losses[-1],
        )


@functools.partial(jax.jit, static_argnames=("optimizer", "steps"))
def _path(
    evidence: Evidence,
    included: jax.Array,
    *,
    optimizer: optax.GradientTransformation | None,
    steps: int,
) -> tuple[jax.Array, jax.Array]:
    """Minimises the loss for each choice of models [k, s] and, one after the other, each pull."""
    zero = jnp.zeros(evidence.sums[0].shape[-1], jnp.float64)

    def of_models(models: jax.Array) -> tuple[jax.Array, jax.Array]:
        def of_pull(theta: jax.Array, pull: jax.Array) -> tuple[jax.Array, tuple]:
            strengths = Strengths(models, jnp.asarray(CAUTION), jnp.asarray(COPIES), pull)

            def loss(theta: jax.Array) -> jax.Array:
                return outcome_loss(jnp.exp(theta - theta.mean()), evidence, strengths)

            theta = _minimised(loss, theta, optimizer, steps)
            theta = theta - theta.mean()
            return theta, (theta, loss(theta))

        return jax.lax.scan(of_pull, zero, jnp.asarray(PULLS, zero.dtype))[1]

    # One after the other: side by side, all would wait for the line search of the slowest.
    return jax.lax.map(of_models, included)


def _minimised(
    loss: Callable[[jax.Array], jax.Array],
    theta: jax.Array,
    optimizer: optax.GradientTransformation | None,
    steps: int,
) -> jax.Array:
    """Where the loss has no gradient, or that is as far as the steps go."""
    chosen = optax.with_extra_args_support(optax.lbfgs() if optimizer is None else optimizer)

    def evaluate(theta: jax.Array, state: Any) -> tuple[jax.Array, jax.Array]:
        if optimizer is None:  # its line search has just been there
            return optax.value_and_grad_from_state(loss)(theta, state=state)
        return jax.value_and_grad(loss)(theta)

    def update(carry: tuple) -> tuple:
        theta, state, step, _ = carry
        value, gradient = evaluate(theta, state)
        updates, state = chosen.update(
            gradient, state, theta, value=value, grad=gradient, value_fn=loss
        )
        return optax.apply_updates(theta, updates), state, step + 1, jnp.abs(gradient).max()

    def unfinished(carry: tuple) -> jax.Array:
        return (carry[2] < steps) & (carry[3] > _TOLERANCE)

    start = (theta, chosen.init(theta), 0, jnp.asarray(jnp.inf, theta.dtype))
    return jax.lax.while_loop(unfinished, update, start)[0]


@jax.jit
def _shares_of(evidence: Evidence, theta: jax.Array) -> jax.Array:
    def one(theta: jax.Array) -> jax.Array:
        return jnp.asarray(evidence.ranks) * evidence.sums.predictions(jnp.exp(theta))

    return jax.lax.map(one, theta)


def _shares(evidence: Evidence, theta: np.ndarray) -> np.ndarray:
    """What each model and each query that counts adds to the agreement, [k, s, q]."""
    counted = np.asarray(jnp.any(evidence.ranks != 0, axis=0))
    return np.asarray(_shares_of(evidence, jnp.asarray(theta)))[:, :, counted]


def _on_host() -> AbstractContextManager[Any]:
    """The host's CPU; the default device where JAX_PLATFORMS leaves the CPU out."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


def _how_much(gains: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """How much each pull counts; what is missing to one is what uniform weights count.

    How often the pull gains most when models are drawn again, zero being what uniform weights gain.
    Less where neither the scores themselves nor the gain are two standard errors above zero: where
    scores say nothing of the models, neither do weights.

    Args:
      gains: of each model by each pull, [s, pulls].
      uniform: agreement of uniform weights with each model, [s].
    """
    models, pulls = gains.shape
    counts = np.random.default_rng(0).multinomial(models, np.full(models, 1 / models), _RESAMPLES)
    resampled = np.concatenate([np.zeros((_RESAMPLES, 1)), counts @ gains], axis=1)
    best = np.bincount(resampled.argmax(axis=1), minlength=pulls + 1)[1:] / _RESAMPLES
    surest = max(_in_errors(uniform), _in_errors(gains @ best), 0)
    return best * min(1, surest / 2) ** 2


def _in_errors(values: np.ndarray) -> float:
    """The mean of values in units of its standard error; zero if all are the same."""
    error = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() / error) if error > 0 else 0.0


def _estimate(shares: np.ndarray, draws: int = 1) -> Estimate:
    """The mean of shares [s, q], with an interval over both models and queries drawn anew.

    Args:
      shares: of each model and query.
      draws: 1 for the interval of the mean itself; 2 for one that holds the mean over as many other
        models and queries, which are drawn as well; more to be on the safe side.
    """
    from scipy import stats  # slow to import, and needed here alone

    (s, q), mean = shares.shape, shares.mean()
    by_model, by_query = shares.mean(axis=1) - mean, shares.mean(axis=0) - mean
    rest = shares - mean - by_model[:, None] - by_query[None]
    of_models, of_queries, of_rest = (
        float(np.sum(x**2)) / max(freedom, 1)
        for x, freedom in ((by_model, s - 1), (by_query, q - 1), (rest, (s - 1) * (q - 1)))
    )
    # Both ways of drawing anew draw the rest anew too: it is taken off once.
    variance = max(of_models / s + of_queries / q - of_rest / (s * q), of_models / s)
    reach = float(stats.t.ppf(0.975, s - 1)) * np.sqrt(draws * variance)
    return Estimate(float(mean), float(mean - reach), float(mean + reach))
