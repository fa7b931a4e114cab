r"""Weights per parameter group, learned from unlabelled queries.

Li et al. (2025, arXiv:2506.05647) maximise, over the simplex, the mean of each query's largest
scores relative to the norm of all of them:

.. math:: L(w) = E_q\Big[-\frac{\frac1k \sum_{n \in \mathrm{top}_k} s_n}{\|s\|_2}\Big]
          + \lambda \|w\|_2^2, \qquad s = \tau(q, \cdot; w)

The loss is a pure function of a weight pytree; `learn_weights` is an Optax loop over it. The loss
does not see the scale of w; results have mean one, so that ones are the base method.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxattr import scoring
from jaxattr.index import Index, query_features
from jaxattr.plans import FeatureLayout
from jaxattr.typing import Key
from jaxattr.weight_fits import ContributionStatistics, Found, WeightFit, named, report

Signal = Literal["top_k", "top_k_abs", "top_minus_bottom"]
Start = Literal["unit_rms", "uniform"]


def self_supervised_loss(
    weights: Any,
    contributions: jax.Array,
    *,
    top_k: int = 20,
    l2: float = 0.0,
    signal: Signal = "top_k",
) -> jax.Array:
    r"""The paper's loss, a pure function of a weight pytree.

    Guarantees: invariant to the scale of the weights if `l2` is zero; with non-negative signal
    between -1/sqrt(k) and 0. The set of the top k is piecewise constant in the weights, so the
    gradient is that of the set found with the present ones.

    Args:
      weights: a pytree of m scalars, such as {group name: weight}, whose leaves are in the order of
        the groups (group names are sorted, as the keys of a dict pytree are).
      contributions: float [q, n, m], as `ja.contributions` returns them.
      top_k: number of training examples taken for the signal, at most n.
      l2: weight of ||w||^2.
      signal: "top_k", the paper's; "top_k_abs", of absolute scores; "top_minus_bottom", half the
        distance between the means of the k largest and the k smallest.

    Returns:
      A scalar, the mean over queries.

    Example:
      >>> import jax.numpy as jnp
      >>> contributions = jnp.array([[[3.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
      >>> print(self_supervised_loss({"a": 1.0, "b": 0.0}, contributions, top_k=1))
      -1.0
    """
    w = jnp.stack([jnp.asarray(leaf) for leaf in jax.tree.leaves(weights)])
    w = w.astype(contributions.dtype)
    if contributions.ndim != 3 or contributions.shape[-1] != len(w):
        raise ValueError(
            f"contributions must be [q, n, m] with m = {len(w)} weights, got shape "
            f"{contributions.shape}."
        )
    _check_signal(signal, top_k, contributions.shape[1])
    scores = jnp.matmul(contributions, w, precision="highest")  # [q, n]
    return _loss_of_scores(scores, top_k, signal) + l2 * jnp.sum(w**2)


def unit_rms_weights(index: Index, queries: Any) -> dict[str, float]:
    """Weights that scale every group's contributions to the same root mean square; nothing learned.

    Args:
      index: the index.
      queries: as in `score`.

    Returns:
      {group name: weight}, mean one; zero for a group without any contribution.
    """
    problem = _from_index(index, queries, materialize=None)
    return named(index.layout.names, _unit_rms(_statistics(problem)))


def learn_weights(
    index: Index,
    queries: Any,
    *,
    top_k: int = 20,
    l2: float = 0.1,
    signal: Signal = "top_k",
    start: Start = "uniform",
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 200,
    batch_size: int | None = None,
    held_out: float = 0.2,
    key: Key | None = None,
    materialize: bool | None = None,
) -> WeightFit:
    r"""Learns one weight per group from queries without labels.

    Weights are :math:`w_j \propto g_j \, \mathrm{softmax}(\theta)_j` from :math:`\theta = 0`, where
    g is one (`start="uniform"`, the paper) or scales each group to unit root mean square
    (`start="unit_rms"`). The objective is the loss relative to its size at the start,
    plus l2 times the squared coefficient of variation of the softmax: a unit that depends on
    neither m, n nor k.

    Args:
      index: the index.
      queries: as in `score`; not those that the weights will be evaluated on.
      top_k: number of training examples taken for the signal, at most n; no more than two or three
        times as many as a query has true proponents.
      l2: strength of the pull towards the start, >= 0.
      signal: see `self_supervised_loss`.
      start: where learning starts, and what it is pulled to.
      optimizer: any `optax.GradientTransformation`, over theta. Default: Adam with a cosine
        schedule from 0.05 to 0 over `steps`.
      steps: number of updates; the top k are found anew at each.
      batch_size: queries per step. Default: all.
      held_out: share of the queries that is not learned from, but reported on.
      key: key of the split into held-out queries and of the minibatches.
      materialize: whether to keep the contributions [q, n, m], or to recompute scores from
        features at each step. Same result; default: what is cheaper.

    Returns:
      The weights with diagnostics.

    Raises:
      ValueError: if an argument is out of its range, or no query is finite.

    Warns:
      WeightWarning: for each entry of `WeightFit.warnings`.

    References:
      Li et al. (2025), arXiv:2506.05647, section 3. Deviation: the unit of l2. The defaults are
      from a study of three models by three methods, see BUILD_NOTES.md.
    """
    problem = _from_index(index, queries, materialize)
    options = _Options(top_k, l2, signal, start, optimizer, steps, batch_size, held_out)
    return _fit(problem, index.layout.names, options, key)


def fit_weights(
    contributions: jax.Array,
    names: Sequence[str] | None = None,
    *,
    top_k: int = 20,
    l2: float = 0.1,
    signal: Signal = "top_k",
    start: Start = "uniform",
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 200,
    batch_size: int | None = None,
    held_out: float = 0.2,
    key: Key | None = None,
) -> WeightFit:
    """Learns weights from contributions that were computed elsewhere, by any library.

    Args:
      contributions: float [q, n, m].
      names: the m group names. Default: "0", "1", ...
      top_k: see `learn_weights`, as for all that follow.
      l2: see there.
      signal: see there.
      start: see there.
      optimizer: see there.
      steps: see there.
      batch_size: see there.
      held_out: see there.
      key: see there.

    Returns:
      The weights with diagnostics.
    """
    if contributions.ndim != 3:
        raise ValueError(f"contributions must be [q, n, m], got shape {contributions.shape}.")
    names = tuple(map(str, range(contributions.shape[2]))) if names is None else tuple(names)
    if len(names) != contributions.shape[2]:
        raise ValueError(f"Got {len(names)} names for {contributions.shape[2]} groups.")
    problem = _Problem(_by_contributions, _identity, jnp.asarray(contributions), ())
    options = _Options(top_k, l2, signal, start, optimizer, steps, batch_size, held_out)
    return _fit(problem, names, options, key)


class _Options(NamedTuple):
    top_k: int
    l2: float
    signal: Signal
    start: Start
    optimizer: optax.GradientTransformation | None
    steps: int
    batch_size: int | None
    held_out: float


class _Problem(NamedTuple):
    """Scores as a linear function of the weights, in one of two representations.

    Attributes:
      scores: (w [m], rows of per_query, shared) -> [b, n].
      contributions: (rows of per_query, shared) -> [b, n, m].
      per_query: array with a leading query axis.
      shared: arrays of the training side.
    """

    scores: Callable[[jax.Array, jax.Array, Any], jax.Array]
    contributions: Callable[[jax.Array, Any], jax.Array]
    per_query: jax.Array
    shared: Any

    def rows(self, positions: jax.Array | np.ndarray) -> "_Problem":
        return self._replace(per_query=self.per_query[jnp.asarray(positions)])


_MATERIALIZE_BYTES = 1 << 29


def _from_index(index: Index, queries: Any, materialize: bool | None) -> _Problem:
    prepared = query_features(index, queries)
    kept = np.setdiff1d(np.arange(prepared.features.shape[0]), prepared.non_finite)
    if not len(kept):
        raise ValueError("No query has a finite gradient: there is nothing to learn from.")
    phi = prepared.features[kept]
    layout, shared = index.layout, (index.features, index.residual)
    if materialize is None:
        numbers = len(kept) * index.size * len(layout.names)
        smaller = len(layout.names) < phi.shape[1]
        materialize = smaller and numbers * phi.dtype.itemsize <= _MATERIALIZE_BYTES
    problem = _Problem(
        functools.partial(_by_features, layout),
        functools.partial(_split_features, layout),
        phi,
        shared,
    )
    if not materialize:
        return problem
    return _Problem(_by_contributions, _identity, problem.contributions(phi, shared), ())


def _by_contributions(w: jax.Array, rows: jax.Array, shared: Any) -> jax.Array:
    del shared
    return jnp.matmul(rows, w.astype(rows.dtype), precision="highest")  # [b, n]


def _identity(rows: jax.Array, shared: Any) -> jax.Array:
    del shared
    return rows


def _by_features(layout: FeatureLayout, w: jax.Array, rows: jax.Array, shared: Any) -> jax.Array:
    return scoring.scores_of_features(layout, w, rows, *shared)


def _split_features(layout: FeatureLayout, rows: jax.Array, shared: Any) -> jax.Array:
    return scoring.contributions_of_features(layout, rows, *shared)


def _statistics(problem: _Problem) -> ContributionStatistics:
    """Runs over the contributions a few queries at a time."""

    @jax.jit
    def of(rows: jax.Array, shared: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        parts = problem.contributions(rows, shared)
        return (parts**2).sum(axis=1), jnp.abs(parts).max(axis=1), parts[:, :, 0].sum()

    size = jax.eval_shape(problem.contributions, problem.per_query[:1], problem.shared)
    at_once = max(1, _MATERIALIZE_BYTES // (size.size * size.dtype.itemsize))
    found = [
        of(problem.per_query[start : start + at_once], problem.shared)
        for start in range(0, len(problem.per_query), at_once)
    ]
    squares, largest = (
        np.concatenate([np.asarray(f[i], np.float64) for f in found]) for i in (0, 1)
    )
    if not np.isfinite(squares).all():
        raise ValueError("The contributions are not all finite: leave the bad rows out first.")
    if not squares.any():
        raise ValueError("Every contribution is zero: there is nothing to weight.")
    return ContributionStatistics(squares, largest, size.shape[1])


def _unit_rms(statistics: ContributionStatistics) -> np.ndarray:
    rms = statistics.rms()
    scale = np.where(rms > 0, 1 / np.where(rms > 0, rms, 1), 0)
    return scale / scale.mean()


def _fit(
    problem: _Problem, names: tuple[str, ...], options: _Options, key: Key | None
) -> WeightFit:
    q = len(problem.per_query)
    statistics = _statistics(problem)
    _check_options(options, statistics.n, q)
    split_key, batch_key = jax.random.split(jax.random.key(0) if key is None else key)
    order = np.asarray(jax.random.permutation(split_key, q))
    held = int(q * options.held_out)
    learned_from, held_from = problem.rows(order[held:]), problem.rows(order[:held])
    gauge = np.ones(len(names)) if options.start == "uniform" else _unit_rms(statistics)
    theta, losses = _optimise(learned_from, gauge, options, batch_key)
    w = gauge * np.asarray(jax.nn.softmax(theta), np.float64)
    w = w / w.mean()

    def ends(part: _Problem) -> tuple[float, float]:
        return _loss(part, gauge, options), _loss(part, w, options)

    held_out_loss = ends(held_from) if held else None
    hub, hub_share = _hub(problem, w, options.top_k)
    found = Found(
        gauge, w, np.asarray(losses), ends(learned_from), held_out_loss, hub, hub_share,
        options.top_k,
    )  # fmt: skip
    return report(names, found, statistics)


def _optimise(
    problem: _Problem, gauge: np.ndarray, options: _Options, key: Key
) -> tuple[jax.Array, jax.Array]:
    q, m = len(problem.per_query), len(gauge)
    optimizer = options.optimizer
    if optimizer is None:
        optimizer = optax.adam(optax.cosine_decay_schedule(0.05, options.steps))
    scale = abs(_loss(problem, gauge, options)) or 1.0

    def objective(theta: jax.Array, rows: jax.Array, shared: Any) -> jax.Array:
        shares = m * jax.nn.softmax(theta)  # mean one
        scores = problem.scores(jnp.asarray(gauge) * shares, rows, shared)
        spread = jnp.mean(shares**2) - 1  # squared coefficient of variation
        return _loss_of_scores(scores, options.top_k, options.signal) / scale + options.l2 * spread

    @jax.jit
    def run(per_query: jax.Array, shared: Any) -> tuple[jax.Array, jax.Array]:
        def step(state: tuple, step_key: Key) -> tuple[tuple, jax.Array]:
            theta, optimizer_state = state
            rows = per_query
            if options.batch_size is not None and options.batch_size < q:
                drawn = jax.random.choice(step_key, q, (options.batch_size,), replace=False)
                rows = per_query[drawn]
            loss, gradient = jax.value_and_grad(objective)(theta, rows, shared)
            updates, optimizer_state = optimizer.update(gradient, optimizer_state, theta)
            return (optax.apply_updates(theta, updates), optimizer_state), loss

        theta = jnp.zeros(m)
        keys = jax.random.split(key, options.steps)
        (theta, _), losses = jax.lax.scan(step, (theta, optimizer.init(theta)), keys)
        return theta, losses

    return run(problem.per_query, problem.shared)


def _loss_of_scores(scores: jax.Array, top_k: int, signal: Signal) -> jax.Array:
    def strongest(s: jax.Array) -> jax.Array:
        return jax.lax.top_k(s, top_k)[0].mean(axis=-1)  # [q]

    if signal == "top_k":
        found = strongest(scores)
    elif signal == "top_k_abs":
        found = strongest(jnp.abs(scores))
    else:
        found = (strongest(scores) + strongest(-scores)) / 2
    squares = jnp.sum(scores**2, axis=-1)
    # A query whose scores are all zero has no signal; the inner `where` keeps its gradient finite.
    norm = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    return -jnp.mean(jnp.where(squares > 0, found / norm, 0))


def _loss(problem: _Problem, w: np.ndarray, options: _Options) -> float:
    scores = problem.scores(jnp.asarray(w), problem.per_query, problem.shared)
    return float(_loss_of_scores(scores, options.top_k, options.signal))


def _hub(problem: _Problem, w: np.ndarray, top_k: int) -> tuple[int, float]:
    scores = problem.scores(jnp.asarray(w), problem.per_query, problem.shared)
    ids = np.asarray(jax.lax.top_k(scores, top_k)[1])
    found, counts = np.unique(ids, return_counts=True)
    return int(found[counts.argmax()]), float(counts.max() / len(ids))


def _check_signal(signal: str, top_k: int, n: int) -> None:
    if signal not in ("top_k", "top_k_abs", "top_minus_bottom"):
        raise ValueError(
            f'signal must be "top_k", "top_k_abs" or "top_minus_bottom", got {signal!r}.'
        )
    if not 1 <= top_k <= n:
        raise ValueError(f"top_k must be between 1 and the {n} training examples, got {top_k}.")


def _check_options(options: _Options, n: int, q: int) -> None:
    _check_signal(options.signal, options.top_k, n)
    if options.start not in ("unit_rms", "uniform"):
        raise ValueError(f'start must be "unit_rms" or "uniform", got {options.start!r}.')
    if not (math.isfinite(options.l2) and options.l2 >= 0):
        raise ValueError(f"l2 must be finite and at least 0, got {options.l2}.")
    if options.steps < 1:
        raise ValueError(f"steps must be at least 1, got {options.steps}.")
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {options.batch_size}.")
    if not 0 <= options.held_out < 1:
        raise ValueError(f"held_out must be at least 0 and below 1, got {options.held_out}.")
