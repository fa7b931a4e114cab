"""Weights per parameter group, learned from unlabelled queries.

The loss is a pure function of weights (see `loss`); `learn_weights` is an Optax loop over it. The
loss does not see the scale of w; results have mean one, so that ones are the base method.
"""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np
import optax

from jaxattr.counts import real_number, whole_number
from jaxattr.index.index import Index, check_index
from jaxattr.index.queries import QueryFeatures, as_queries, query_features
from jaxattr.keys import key_or_default
from jaxattr.scales import exponent_of, scaled
from jaxattr.scores import scoring
from jaxattr.store.rows import SLAB
from jaxattr.typing import Key
from jaxattr.weights import optimising, shortlists
from jaxattr.weights.optimising import AtWeights, FitOptions
from jaxattr.weights.outcome_fits import fit_to_outcomes
from jaxattr.weights.outcomes import Outcomes, digests_of_queries, outcomes_of_scores
from jaxattr.weights.report import ContributionStatistics, WeightFit, report
from jaxattr.weights.shortlists import Shortlist

Start = Literal["unit_rms", "uniform"]

# Training examples that are taken for the signal, unless told otherwise.
_TOP_K = 20


def learn_weights(
    index: Index,
    queries: Any,
    *,
    outcomes: Outcomes | None = None,
    reference: Any = None,
    copies: tuple[Any, Any] | None = None,
    top_k: int | None = None,
    l2: float = 0.1,
    start: Start = "uniform",
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 200,
    held_out: float = 0.2,
    key: Key | None = None,
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
        times as many as a query has true proponents. Default: 20, or n if there are fewer. Those
        with the largest scores; of a squared method (DAS) with the largest absolute ones.
      l2: strength of the pull towards the start, >= 0.
      start: where learning starts, and what it is pulled to: "uniform" or "unit_rms".
      optimizer: any `optax.GradientTransformation`, over theta. Default: Adam with a cosine
        schedule from 0.05 to 0 over `steps`.
      steps: number of updates; the top k are found anew at each.
      held_out: share of the queries that is not learned from, but reported on.
      key: key of the split into held-out queries.

    Returns:
      The weights with diagnostics.

    Raises:
      ValueError: if an argument is out of its range, or no query is finite; if outcomes or
        a reference are of other queries or another training set, or an option does not go with
        them.

    Warns:
      WeightWarning: for each entry of `WeightFit.warnings`.

    Cost: one pass over the training set with outcomes, and one or a few without: contributions
    [q, n, m] of more than 512 MiB are not kept, but those of each query's strongest examples, until
    others may have become the strongest. 2 q n m^2 operations beside those of `score`.

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
        if not isinstance(outcomes, Outcomes):
            raise TypeError(
                "outcomes must be what ja.outcomes(train_fn, output, queries, n, key=key) "
                f"returned, or ja.Outcomes(...); got {type(outcomes).__name__}."
            )
        _check_goes_with_outcomes(
            top_k=(top_k, None), l2=(l2, 0.1), start=(start, "uniform"),
            held_out=(held_out, 0.2), key=(key, None),
        )  # fmt: skip
        steps = whole_number("steps", steps)
        fit = fit_to_outcomes(index, queries, outcomes, copies, optimizer, steps)
        return _knowing(fit, queries, index)
    if copies is not None:
        raise ValueError(
            "copies complement outcomes, and there are none: alone they mislead. Pass outcomes= "
            "too, or leave copies out."
        )
    n, squared = check_index(index).size, index.link == "square"
    top_k = min(_TOP_K, n) if top_k is None else top_k
    _check_options(top_k, l2, start, held_out, n)
    options = FitOptions(top_k, squared, optimizer, whole_number("steps", steps))
    key = key_or_default(key)
    return _knowing(_fit(index, queries, options, start, l2, held_out, key), queries, index)


def _knowing(fit: WeightFit, queries: Any, index: Index) -> WeightFit:
    digests = frozenset(digests_of_queries(queries))
    return dataclasses.replace(fit, learned_from=digests, learned_on=index.query_side)


# Contributions of up to so many bytes are kept whole; else those of slabs, and of shortlists.
_WHOLE_BYTES, _LIST_BYTES = 1 << 29, 1 << 28

# Examples on a shortlist, at least, and relative to the top k.
_SHORTEST, _PER_TOP = 512, 16


def _features(index: Index, queries: Any) -> jax.Array:
    """Features of the finite queries, over a power of two."""
    prepared = query_features(index, queries)
    kept = np.setdiff1d(np.arange(prepared.features.shape[0]), prepared.non_finite)
    if not len(kept):
        raise ValueError("No query has a finite gradient: there is nothing to learn from.")
    return index.place.whole(_of_size_one(prepared.features, index.exponent, kept))


@jax.jit
def _of_size_one(phi: jax.Array, exponent: jax.Array, kept: jax.Array) -> jax.Array:
    """Some queries over a power of two, so that squares stay within range: no loss sees it."""
    phi = phi[kept]
    return scaled(phi, -exponent_of(phi) - exponent)


def _listed(index: Index, phi: jax.Array, top_k: int, w: Any) -> Shortlist:
    """The shortlist of all queries under weights [m]: one pass over the training set."""
    numbers = len(phi) * len(index.layout.names) * phi.dtype.itemsize
    if numbers * index.size <= _WHOLE_BYTES:
        whole = QueryFeatures(phi, np.zeros(0, np.int64), index.query_side)
        found = shortlists.everything(scoring.contributions(index, whole), w)
        # Those without a score are not above those with scores below zero.
        lost = index.non_finite
        return found._replace(ids=found.ids.at[:, lost].set(-1)) if len(lost) else found
    layout, place = index.layout, index.place
    affordable = _LIST_BYTES // numbers
    length = max(top_k, min(affordable, max(_SHORTEST, _PER_TOP * top_k)) // place.shards)
    squared = index.link == "square"
    start, absorb, merge = shortlists.compiled_pass(place, layout, length, squared, top_k)
    state = start(place.whole(w), phi)
    rows = max(index.batch_size, min(affordable, SLAB))
    for slab in index.rows.slabs(index.rows.layout.side, rows):
        state = absorb(state, phi, slab.arrays, slab.first, slab.fresh)
    return merge(state)


def _statistics(listed: Shortlist, n: int) -> ContributionStatistics:
    squares = np.einsum("qmm->qm", np.asarray(listed.gram, np.float64))
    return ContributionStatistics(squares, np.asarray(listed.largest, np.float64), n).checked()


def _unit_rms(statistics: ContributionStatistics) -> np.ndarray:
    rms = statistics.rms()
    scale = np.where(rms > 0, 1 / np.where(rms > 0, rms, 1), 0)
    return scale / scale.mean()


def _fit(
    index: Index, queries: Any, options: FitOptions, start: Start, l2: float, held_out: float,
    key: Key,
) -> WeightFit:  # fmt: skip
    names, phi = index.layout.names, _features(index, queries)
    q, m, held = len(phi), len(names), int(len(phi) * held_out)
    order, loop = optimising.begin(key, q, m, options)
    order = np.asarray(order)
    rows = (order[held:], order[:held])  # learned from, held out

    listed, passes = _listed(index, phi, options.top_k, np.ones(m)), 1
    statistics = _statistics(listed, index.size)
    gauge = np.ones(m) if start == "uniform" else _unit_rms(statistics)

    def at_certain(w: np.ndarray) -> AtWeights:
        """What some weights come to, by a shortlist that is certain there."""
        nonlocal listed, passes
        found = optimising.at_weights(listed, rows, w, *options[:2])
        if not found.certain:
            listed, passes = _listed(index, phi, options.top_k, w), passes + 1
            found = optimising.at_weights(listed, rows, w, *options[:2])
        return found

    before = at_certain(gauge)
    loss_at_start = float(before.losses[0])
    while True:
        loop = optimising.run(listed, rows[0], loop, gauge, loss_at_start, float(l2), options)
        theta = np.asarray(loop.theta, np.float64)
        w = gauge * np.exp(theta - theta.max())
        w = w / w.mean()
        if int(loop.step) == options.steps:
            break
        listed, passes = _listed(index, phi, options.top_k, w), passes + 1

    after = at_certain(w)
    learned, of_others = zip(*(map(float, each.losses) for each in (before, after)), strict=True)
    hub, hub_share = optimising.hub(np.asarray(after.strongest))
    return report(
        names, statistics, gauge, w, losses=np.asarray(loop.losses), loss=learned,
        held_out_loss=of_others if held else None, hub=hub, hub_share=hub_share,
        gain=None, top_k=options.top_k, passes=passes,
    )  # fmt: skip


def _check_goes_with_outcomes(**options: tuple[Any, Any]) -> None:
    """Refuses options that were given and would be ignored; each is (value, default)."""
    given = [name for name, (value, default) in options.items() if value != default]
    if given:
        raise ValueError(
            f"{', '.join(given)} belong to the objective without outcomes: with outcomes only "
            "copies, optimizer and steps apply. Leave out one or the other."
        )


def _check_options(top_k: int, l2: float, start: str, held_out: float, n: int) -> None:
    if not 1 <= whole_number("top_k", top_k, least=None) <= n:
        raise ValueError(f"top_k must be between 1 and the {n} training examples, got {top_k}.")
    if start not in ("unit_rms", "uniform"):
        raise ValueError(f'start must be "unit_rms" or "uniform", got {start!r}.')
    real_number("l2", l2, least=0)
    if not 0 <= real_number("held_out", held_out) < 1:
        raise ValueError(f"held_out must be at least 0 and below 1, got {held_out}.")
