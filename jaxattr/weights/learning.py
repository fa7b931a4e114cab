"""Weights per parameter group, learned from unlabelled queries.

The loss is a pure function of a weight pytree (see `loss`); `learn_weights` is an Optax loop over
it. The loss does not see the scale of w; results have mean one, so that ones are the base method.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxattr.counts import whole_number
from jaxattr.index.index import Index, check_index
from jaxattr.index.queries import as_queries, query_features
from jaxattr.keys import check_key
from jaxattr.scales import exponent_of, scaled
from jaxattr.scores import scoring
from jaxattr.store.rows import SLAB
from jaxattr.typing import Key
from jaxattr.weights import optimising, shortlists
from jaxattr.weights.loss import Signal, check_signal, signs_of
from jaxattr.weights.optimising import AtWeights, FitOptions, Start
from jaxattr.weights.outcome_fits import fit_to_outcomes
from jaxattr.weights.outcomes import Outcomes, digests_of_queries, outcomes_of_scores
from jaxattr.weights.report import ContributionStatistics, Optimised, WeightFit, named, report
from jaxattr.weights.shortlists import Shortlist


def unit_rms_weights(index: Index, queries: Any) -> dict[str, float]:
    """Weights that scale every group's contributions to the same root mean square; nothing learned.

    Args:
      index: the index.
      queries: a pytree of arrays, a random-access source, or `query_features(index, ...)`.

    Returns:
      {group name: weight}, mean one; zero for a group without any contribution.
    """
    scores = _from_index(index, queries, None, 1, "top_k")
    listed = scores.listed(np.ones(scores.groups))
    return named(index.layout.names, _unit_rms(_statistics(scores, listed)))


def learn_weights(
    index: Index,
    queries: Any,
    *,
    outcomes: Outcomes | None = None,
    reference: Any = None,
    copies: tuple[Any, Any] | None = None,
    top_k: int | None = None,
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

    With `outcomes` of small retrained models, weights are fitted to what scores predict of them
    (`weights.agreement.outcome_loss`), are the nearer to uniform ones the less gain can be shown,
    and `fit.gain` says how much they gain: where `fit.gain.low` is not above zero, uniform weights
    are safer. Of the options only `copies`, `optimizer` (default: Optax's
    L-BFGS) and `steps` apply then.

    With `reference`, scores that are held to be right and cost more than the index, such as those
    of `ja.unroll`, weights are fitted to their sums over random halves, as if those were models
    that did what the reference says: `fit.gain` is then one of agreement with the reference, and
    knows nothing of how right that is.

    Without either, the objective is the paper's, which is not safe: it can make a method worse, and
    cannot say whether it does. Weights are :math:`w_j \propto g_j \, \mathrm{softmax}(\theta)_j`
    from :math:`\theta = 0`, where g is one (`start="uniform"`, the paper) or scales each group to
    unit root mean square (`start="unit_rms"`). The objective is the loss relative to its start,
    plus l2 times the squared coefficient of variation of the softmax: a unit that depends on
    neither m, n nor k.

    Args:
      index: the index.
      queries: a pytree of arrays, a random-access source, or `query_features(index, ...)`; not
        those that the weights will be evaluated on.
      outcomes: of models retrained on subsets, on these queries; see `ja.outcomes`.
      reference: scores [q, n] of these queries, larger = stronger proponent, in place of outcomes.
      copies: noised copies of training examples and the ids of those, `(batch, ids)`; with
        outcomes alone, which they complement. See `ja.noised`.
      top_k: number of training examples taken for the signal, at most n; no more than two or three
        times as many as a query has true proponents. Default: 20, or n if there are fewer.
      l2: strength of the pull towards the start, >= 0.
      signal: "top_k", the mean of the largest scores; "top_k_abs", of the largest absolute scores;
        "top_minus_bottom", half the distance between the means of the largest and the smallest.
        Default: "top_k"; of a squared method (DAS) "top_k_abs", which ranks as the squares do and
        stays linear in the weights.
      start: where learning starts, and what it is pulled to: "uniform" or "unit_rms".
      optimizer: any `optax.GradientTransformation`, over theta. Default: Adam with a cosine
        schedule from 0.05 to 0 over `steps`.
      steps: number of updates; the top k are found anew at each.
      batch_size: queries per step. Default: all.
      held_out: share of the queries that is not learned from, but reported on.
      key: key of the split into held-out queries and of the minibatches.
      materialize: whether to keep the contributions [q, n, m]; or those of each query's strongest
        examples alone, and to go over the training set again, in memory or on disk, whenever
        others may have become the strongest. Same result; default: to keep them if they fit
        512 MiB.

    Returns:
      The weights with diagnostics.

    Raises:
      ValueError: if an argument is out of its range, or no query is finite; if outcomes or
        a reference are of other queries or another training set, or an option does not go with
        them.

    Warns:
      WeightWarning: for each entry of `WeightFit.warnings`.

    Cost: one pass over the training set with outcomes, and one or a few without; 2 q n m^2
    operations beside those of `score`.

    References:
      Li et al. (2025), arXiv:2506.05647, section 3. Deviation: the unit of l2. The defaults are
      from a study of three models by three methods, see BUILD_NOTES.md. Outcomes are ours.
    """
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer must be one of Optax, optax.adam(0.05) say, got {optimizer!r}.")
    queries = as_queries(index, queries)
    if reference is not None:
        if outcomes is not None:
            raise ValueError("Weights are fitted to outcomes or to a reference: leave one out.")
        outcomes = outcomes_of_scores(reference, check_index(index).size)
    if outcomes is not None:
        _check_outcomes(outcomes)
        _check_goes_with_outcomes(
            top_k=(top_k, None), l2=(l2, 0.1), signal=(signal, None), start=(start, "uniform"),
            batch_size=(batch_size, None), held_out=(held_out, 0.2), key=(key, None),
            materialize=(materialize, None),
        )  # fmt: skip
        steps = whole_number("steps", steps)
        fit = fit_to_outcomes(index, queries, outcomes, copies, optimizer, steps)
        return _knowing(fit, queries, index)
    if copies is not None:
        raise ValueError(
            "copies complement outcomes, and there are none: alone they mislead. Pass outcomes= "
            "too, or leave copies out."
        )
    top_k = min(_TOP_K, check_index(index).size) if top_k is None else top_k
    if signal is None:
        signal = "top_k_abs" if index.link == "square" else "top_k"
    scores = _from_index(index, queries, materialize, top_k, signal)
    options = FitOptions(top_k, l2, signal, start, optimizer, steps, batch_size, held_out)
    return _knowing(_fit(scores, index.layout.names, options, key), queries, index)


def _knowing(fit: WeightFit, queries: Any, index: Index) -> WeightFit:
    digests = frozenset(digests_of_queries(queries))
    return dataclasses.replace(fit, learned_from=digests, learned_on=index.query_side)


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
      contributions: real numbers [q, n, m].
      names: the m group names. Default: "0", "1", ...
      top_k: number of training examples taken for the signal, at most n.
      l2: strength of the pull towards the start, >= 0.
      signal: "top_k", the mean of the largest scores; "top_k_abs", of the largest absolute scores;
        "top_minus_bottom", half the distance between the means of the largest and the smallest.
      start: where learning starts, and what it is pulled to: "uniform" or "unit_rms".
      optimizer: any `optax.GradientTransformation`, over theta. Default: Adam with a cosine
        schedule from 0.05 to 0 over `steps`.
      steps: number of updates.
      batch_size: queries per step. Default: all.
      held_out: share of the queries that is not learned from, but reported on.
      key: key of the split into held-out queries and of the minibatches.

    Returns:
      The weights with diagnostics.

    Raises:
      ValueError: if an argument is out of its range, a name occurs twice, or contributions are
        complex, not finite, or all zero.

    Warns:
      WeightWarning: for each entry of `WeightFit.warnings`.
    """
    if contributions.ndim != 3:
        raise ValueError(f"contributions must be [q, n, m], got shape {contributions.shape}.")
    names = tuple(map(str, range(contributions.shape[2]))) if names is None else tuple(names)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if len(names) != contributions.shape[2] or repeated:
        raise ValueError(
            f"Each of the {contributions.shape[2]} groups needs a name of its own, got {len(names)}"
            f" names{', of which some occur twice: ' if repeated else ''}{', '.join(repeated)}."
        )
    contributions = _of_size_one(_as_floats(contributions), np.int32(0))
    scores = _Scores(functools.partial(shortlists.everything, contributions), *contributions.shape)
    options = FitOptions(top_k, l2, signal, start, optimizer, steps, batch_size, held_out)
    return _fit(scores, names, options, key)


class _Scores(NamedTuple):
    """Scores of the learning queries as a linear function of the weights.

    Attributes:
      listed: weights [m] -> the shortlist of all queries under them; a pass over the training set.
      queries: q.
      examples: n.
      groups: m.
    """

    listed: Callable[[Any], Shortlist]
    queries: int
    examples: int
    groups: int


# Training examples that are taken for the signal, unless told otherwise.
_TOP_K = 20

# Contributions of up to so many bytes are kept whole; of slabs, and of shortlists, half as many.
_MATERIALIZE_BYTES = 1 << 29

# Examples on a shortlist, at least, and relative to the top k.
_SHORTEST, _PER_TOP = 512, 16


def _from_index(
    index: Index, queries: Any, materialize: bool | None, top_k: int, signal: Signal
) -> _Scores:
    prepared = query_features(index, queries)
    kept = np.setdiff1d(np.arange(prepared.features.shape[0]), prepared.non_finite)
    if not len(kept):
        raise ValueError("No query has a finite gradient: there is nothing to learn from.")
    phi = _of_size_one(prepared.features, index.exponent, kept)
    groups = len(index.layout.names)
    if materialize is None:
        numbers = len(kept) * index.size * groups
        materialize = numbers * phi.dtype.itemsize <= _MATERIALIZE_BYTES
    if materialize:
        parts = scoring.contributions(
            index, prepared._replace(features=phi, non_finite=np.zeros(0, np.int64))
        )
        return _Scores(
            functools.partial(shortlists.everything, parts), len(kept), index.size, groups
        )
    phi = index.place.whole(phi)
    listed = functools.partial(_pass_over, index, phi, top_k, signs_of(signal))
    return _Scores(listed, len(kept), index.size, groups)


def _as_floats(contributions: Any) -> Any:
    if jnp.issubdtype(contributions.dtype, jnp.complexfloating):
        raise ValueError(f"contributions must be real, got {contributions.dtype}.")
    if contributions.dtype in (np.float32, np.float64):
        return contributions
    return np.asarray(contributions, jnp.result_type(float))


@jax.jit
def _of_size_one(x: jax.Array, exponent: jax.Array, kept: jax.Array | None = None) -> jax.Array:
    """Over a power of two, and another one, so that squares stay within range: no loss sees it."""
    x = x if kept is None else x[kept]
    return scaled(x, -exponent_of(x) - exponent)


def _pass_over(
    index: Index, phi: jax.Array, top_k: int, signs: tuple[int, ...], w: Any
) -> Shortlist:
    """Makes the shortlist of all queries: one pass over the training set."""
    layout, place = index.layout, index.place
    numbers = len(phi) * len(layout.names) * phi.dtype.itemsize
    affordable = _MATERIALIZE_BYTES // 2 // numbers
    length = max(top_k, min(affordable, max(_SHORTEST, _PER_TOP * top_k)) // place.shards)
    start, absorb, merge = shortlists.compiled_pass(place, layout, length, signs, top_k)
    state = start(place.whole(w), phi)
    rows = max(index.batch_size, min(affordable, SLAB))
    for slab in index.rows.slabs(index.rows.layout.side, rows):
        state = absorb(state, phi, slab.arrays, slab.first, slab.fresh)
    return merge(state)


def _statistics(scores: _Scores, listed: Shortlist) -> ContributionStatistics:
    squares, largest = np.asarray(listed.squares, np.float64), np.asarray(listed.largest)
    if not np.isfinite(squares).all():
        raise ValueError("The contributions are not all finite: leave the bad rows out first.")
    if not squares.any():
        raise ValueError("Every contribution is zero: there is nothing to weight.")
    return ContributionStatistics(squares, largest.astype(np.float64), scores.examples)


def _unit_rms(statistics: ContributionStatistics) -> np.ndarray:
    rms = statistics.rms()
    scale = np.where(rms > 0, 1 / np.where(rms > 0, rms, 1), 0)
    return scale / scale.mean()


def _fit(
    scores: _Scores, names: tuple[str, ...], options: FitOptions, key: Key | None
) -> WeightFit:
    _check_options(options, scores.examples)
    held = int(scores.queries * options.held_out)
    key = jax.random.key(0) if key is None else check_key(key)
    order, keys, loop = optimising.begin(key, scores.queries, scores.groups, options)
    rows = (order[held:], order[:held])  # learned from, held out

    listed, passes = scores.listed(np.ones(scores.groups)), 1
    statistics = _statistics(scores, listed)
    gauge = np.ones(scores.groups) if options.start == "uniform" else _unit_rms(statistics)
    listed, before, passes = _at_certain(gauge, scores, listed, rows, options, passes)

    while True:
        loop = optimising.run(listed, rows[0], loop, keys, gauge, before.losses[0], options)
        theta = np.asarray(loop.theta, np.float64)
        w = gauge * np.exp(theta - theta.max())
        w = w / w.mean()
        if int(loop.step) == options.steps:
            break
        listed, passes = scores.listed(w), passes + 1

    _, after, passes = _at_certain(w, scores, listed, rows, options, passes)
    learned, held_out = zip(before.losses, after.losses, strict=True)
    found = Optimised(
        gauge, w, np.asarray(loop.losses), learned, held_out if held else None,
        *optimising.hub(after.strongest), options.top_k, passes,
    )  # fmt: skip
    return report(names, found, statistics)


def _at_certain(
    w: np.ndarray,
    scores: _Scores,
    listed: Shortlist,
    rows: tuple[np.ndarray, np.ndarray],
    options: FitOptions,
    passes: int,
) -> tuple[Shortlist, AtWeights, int]:
    """A shortlist that is certain at some weights, what they come to, and passes so far."""
    found = optimising.at_weights(listed, rows, w, options)
    if found.certain:
        return listed, found, passes
    listed = scores.listed(w)
    return listed, optimising.at_weights(listed, rows, w, options), passes + 1


def _check_outcomes(outcomes: Any) -> None:
    if not isinstance(outcomes, Outcomes):
        raise TypeError(
            "outcomes must be what ja.outcomes(train_fn, output, queries, n, key=key) returned, or "
            f"ja.Outcomes(...); got {type(outcomes).__name__}."
        )


def _check_goes_with_outcomes(**options: tuple[Any, Any]) -> None:
    """Refuses options that were given and would be ignored; each is (value, default)."""
    given = [name for name, (value, default) in options.items() if value != default]
    if given:
        raise ValueError(
            f"{', '.join(given)} belong to the objective without outcomes: with outcomes only "
            "copies, optimizer and steps apply. Leave out one or the other."
        )


def _check_options(options: FitOptions, n: int) -> None:
    check_signal(options.signal, options.top_k, n)
    if options.start not in ("unit_rms", "uniform"):
        raise ValueError(f'start must be "unit_rms" or "uniform", got {options.start!r}.')
    if not (math.isfinite(options.l2) and options.l2 >= 0):
        raise ValueError(f"l2 must be finite and at least 0, got {options.l2}.")
    whole_number("steps", options.steps)
    if options.batch_size is not None:
        whole_number("batch_size", options.batch_size)
    if not 0 <= options.held_out < 1:
        raise ValueError(f"held_out must be at least 0 and below 1, got {options.held_out}.")
