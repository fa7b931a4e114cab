"""Weights per parameter group, learned from unlabelled queries.

The loss is a pure function of a weight pytree (see `loss`); `learn_weights` is an Optax loop over
it. The loss does not see the scale of w; results have mean one, so that ones are the base method.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxattr.index.index import Index
from jaxattr.index.queries import query_features
from jaxattr.scales import exponent_of, scaled
from jaxattr.scores import scoring
from jaxattr.store.rows import EXAMPLES, FEATURES
from jaxattr.typing import Key
from jaxattr.weights import shortlists
from jaxattr.weights.loss import Signal, certain, check_signal, loss_of_list, signs_of
from jaxattr.weights.report import ContributionStatistics, Found, WeightFit, named, report
from jaxattr.weights.shortlists import Shortlist

Start = Literal["unit_rms", "uniform"]


def unit_rms_weights(index: Index, queries: Any) -> dict[str, float]:
    """Weights that scale every group's contributions to the same root mean square; nothing learned.

    Args:
      index: the index.
      queries: as in `score`.

    Returns:
      {group name: weight}, mean one; zero for a group without any contribution.
    """
    problem = _from_index(index, queries, None, 1, "top_k")
    return named(
        index.layout.names, _unit_rms(_statistics(problem, problem.listed(_ones(problem))))
    )


def learn_weights(
    index: Index,
    queries: Any,
    *,
    top_k: int = 20,
    l2: float = 0.1,
    signal: Signal | None = None,
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
      signal: see `self_supervised_loss`. Default: "top_k"; of a squared method (DAS) "top_k_abs",
        which ranks as the squares do and stays linear in the weights.
      start: where learning starts, and what it is pulled to.
      optimizer: any `optax.GradientTransformation`, over theta. Default: Adam with a cosine
        schedule from 0.05 to 0 over `steps`.
      steps: number of updates; the top k are found anew at each.
      batch_size: queries per step. Default: all.
      held_out: share of the queries that is not learned from, but reported on.
      key: key of the split into held-out queries and of the minibatches.
      materialize: whether to keep the contributions [q, n, m], or to go over the training set
        again whenever the strongest examples may have changed (see `jaxattr.shortlists`), from
        memory or from disk. Same result; default: to keep them if they fit 512 MiB.

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
    if signal is None:
        signal = "top_k_abs" if index.link == "square" else "top_k"
    problem = _from_index(index, queries, materialize, top_k, signal)
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
    contributions = jnp.asarray(contributions)
    contributions = scaled(contributions, -exponent_of(contributions))
    problem = _Problem(
        functools.partial(shortlists.everything, contributions), *contributions.shape
    )
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
    """Scores as a linear function of the weights.

    Attributes:
      listed: weights [m] -> the shortlist of all queries under them.
      queries: q.
      examples: n.
      groups: m.
    """

    listed: Callable[[jax.Array], Shortlist]
    queries: int
    examples: int
    groups: int


# Contributions of up to so many bytes are kept whole; of slabs, and of shortlists, half as many.
_MATERIALIZE_BYTES = 1 << 29

# Examples on a shortlist, at least, and relative to the top k.
_SHORTEST, _PER_TOP = 512, 16


def _from_index(
    index: Index, queries: Any, materialize: bool | None, top_k: int, signal: Signal
) -> _Problem:
    prepared = query_features(index, queries)
    kept = np.setdiff1d(np.arange(prepared.features.shape[0]), prepared.non_finite)
    if not len(kept):
        raise ValueError("No query has a finite gradient: there is nothing to learn from.")
    # The loss sees no scale; squares of contributions stay within range.
    phi = prepared.features[kept]
    phi = scaled(phi, -exponent_of(phi) - index.exponent)
    groups = len(index.layout.names)
    if materialize is None:
        numbers = len(kept) * index.size * groups
        materialize = numbers * phi.dtype.itemsize <= _MATERIALIZE_BYTES
    if materialize:
        parts = scoring.contributions(
            index, prepared._replace(features=phi, non_finite=np.zeros(0, np.int64))
        )
        return _Problem(
            functools.partial(shortlists.everything, parts), len(kept), index.size, groups
        )
    phi = index.place.whole(phi)
    listed = functools.partial(_pass_over, index, phi, top_k, signs_of(signal))
    return _Problem(listed, len(kept), index.size, groups)


def _pass_over(
    index: Index, phi: jax.Array, top_k: int, signs: tuple[int, ...], w: jax.Array
) -> Shortlist:
    """Makes the shortlist of all queries: one pass over the training set."""
    layout, place = index.layout, index.place
    numbers = len(phi) * len(layout.names) * phi.dtype.itemsize
    affordable = _MATERIALIZE_BYTES // 2 // numbers
    length = max(top_k, min(affordable, max(_SHORTEST, _PER_TOP * top_k)) // place.shards)
    start, absorb, merge = shortlists.compiled_pass(place, layout, length, signs)
    state = start(place.whole(jnp.asarray(w)), phi)
    rows = max(index.batch_size, min(affordable, scoring.SLAB))
    for slab in index.rows.slabs([FEATURES, EXAMPLES], rows):
        state = absorb(state, phi, slab.arrays, slab.first, slab.fresh)
    return merge(state)


def _ones(problem: _Problem) -> jax.Array:
    return jnp.ones(problem.groups)


def _statistics(problem: _Problem, listed: Shortlist) -> ContributionStatistics:
    squares, largest = np.asarray(listed.squares, np.float64), np.asarray(listed.largest)
    if not np.isfinite(squares).all():
        raise ValueError("The contributions are not all finite: leave the bad rows out first.")
    if not squares.any():
        raise ValueError("Every contribution is zero: there is nothing to weight.")
    return ContributionStatistics(squares, largest.astype(np.float64), problem.examples)


def _unit_rms(statistics: ContributionStatistics) -> np.ndarray:
    rms = statistics.rms()
    scale = np.where(rms > 0, 1 / np.where(rms > 0, rms, 1), 0)
    return scale / scale.mean()


def _fit(
    problem: _Problem, names: tuple[str, ...], options: _Options, key: Key | None
) -> WeightFit:
    q = problem.queries
    _check_options(options, problem.examples)
    split_key, batch_key = jax.random.split(jax.random.key(0) if key is None else key)
    order = np.asarray(jax.random.permutation(split_key, q))
    held = int(q * options.held_out)
    learned_from, held_from = jnp.asarray(order[held:]), jnp.asarray(order[:held])

    listed, passes = problem.listed(_ones(problem)), 1
    statistics = _statistics(problem, listed)
    gauge = np.ones(len(names))
    if options.start == "unit_rms":
        gauge = _unit_rms(statistics)
        listed, passes = _listed_at(problem, listed, gauge, options, passes)
    begin = [_loss(listed.rows(rows), gauge, options) for rows in (learned_from, held_from)]

    run, carry = _optimiser(len(names), gauge, begin[0], options, len(learned_from), batch_key)
    while True:
        carry = run(listed.rows(learned_from), carry)
        w = gauge * np.asarray(jax.nn.softmax(carry.theta), np.float64)
        w = w / w.mean()
        if int(carry.step) == options.steps:
            break
        listed, passes = problem.listed(jnp.asarray(w)), passes + 1

    listed, passes = _listed_at(problem, listed, w, options, passes)
    end = [_loss(listed.rows(rows), w, options) for rows in (learned_from, held_from)]
    hub, hub_share = _hub(listed, w, options)
    found = Found(
        gauge, w, np.asarray(carry.losses), (begin[0], end[0]),
        (begin[1], end[1]) if held else None, hub, hub_share, options.top_k, passes,
    )  # fmt: skip
    return report(names, found, statistics)


def _listed_at(
    problem: _Problem, listed: Shortlist, w: np.ndarray, options: _Options, passes: int
) -> tuple[Shortlist, int]:
    """A shortlist that is certain at some weights; and how many passes there were."""
    if bool(certain(listed, jnp.asarray(w), options.top_k, options.signal)):
        return listed, passes
    return problem.listed(jnp.asarray(w)), passes + 1


class _Carry(NamedTuple):
    """The state of the optimisation.

    Attributes:
      theta: logits [m].
      optimizer: the optimizer's state.
      step: number of updates made.
      losses: the objective before each update, [steps].
      certain: whether the shortlist still holds the strongest examples.
    """

    theta: jax.Array
    optimizer: Any
    step: jax.Array
    losses: jax.Array
    certain: jax.Array


def _optimiser(
    m: int, gauge: np.ndarray, start: float, options: _Options, q: int, key: Key
) -> tuple[Callable[[Shortlist, _Carry], _Carry], _Carry]:
    """Makes the jitted loop, that stops when it is done or another pass is due; and its start."""
    optimizer = options.optimizer
    if optimizer is None:
        optimizer = optax.adam(optax.cosine_decay_schedule(0.05, options.steps))
    scale = abs(start) or 1.0
    keys = jax.random.split(key, options.steps)

    def weights(theta: jax.Array) -> jax.Array:
        return jnp.asarray(gauge) * m * jax.nn.softmax(theta)

    def objective(theta: jax.Array, listed: Shortlist) -> jax.Array:
        loss = loss_of_list(listed, weights(theta), options.top_k, options.signal)
        spread = jnp.mean((m * jax.nn.softmax(theta)) ** 2) - 1  # squared coefficient of variation
        return loss / scale + options.l2 * spread

    def update(listed: Shortlist, carry: _Carry) -> _Carry:
        chosen = listed
        if options.batch_size is not None and options.batch_size < q:
            drawn = jax.random.choice(keys[carry.step], q, (options.batch_size,), replace=False)
            chosen = listed.rows(drawn)
        loss, gradient = jax.value_and_grad(objective)(carry.theta, chosen)
        updates, state = optimizer.update(gradient, carry.optimizer, carry.theta)
        theta = optax.apply_updates(carry.theta, updates)
        still_certain = certain(listed, weights(theta), options.top_k, options.signal)
        losses = carry.losses.at[carry.step].set(loss.astype(carry.losses.dtype))
        return _Carry(theta, state, carry.step + 1, losses, still_certain)

    @jax.jit
    def run(listed: Shortlist, carry: _Carry) -> _Carry:
        return jax.lax.while_loop(
            lambda carry: (carry.step < options.steps) & carry.certain,
            functools.partial(update, listed),
            # The pass was made with these very weights.
            carry._replace(certain=jnp.asarray(True)),
        )

    theta = jnp.zeros(m)
    losses = jnp.full(options.steps, jnp.nan, theta.dtype)
    carry = _Carry(theta, optimizer.init(theta), jnp.asarray(0), losses, jnp.asarray(True))
    return run, carry


def _loss(listed: Shortlist, w: np.ndarray, options: _Options) -> float:
    if not listed.ids.shape[1]:
        return 0.0
    return float(loss_of_list(listed, jnp.asarray(w), options.top_k, options.signal))


def _hub(listed: Shortlist, w: np.ndarray, options: _Options) -> tuple[int, float]:
    """The example that is among the strongest of the most queries, and of what share of them."""
    signs = signs_of(options.signal)
    scores = shortlists.signed_scores(listed, jnp.asarray(w), signs)  # [l, q, s]
    lists = [listed.ids[0 if listed.complete else i] for i in range(len(signs))]
    if options.signal != "top_k_abs":
        scores, lists = scores[:1], lists[:1]
    places = jax.lax.top_k(jnp.concatenate(list(scores), axis=-1), options.top_k)[1]
    ids = np.asarray(jnp.take_along_axis(jnp.concatenate(lists, axis=-1), places, axis=1))
    found, counts = np.unique(ids[ids >= 0], return_counts=True)
    return int(found[counts.argmax()]), float(counts.max() / len(ids))


def _check_options(options: _Options, n: int) -> None:
    check_signal(options.signal, options.top_k, n)
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
