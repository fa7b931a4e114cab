"""What a fit of weights reports: the weights, and whether to trust them."""

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxattr import markup


class WeightWarning(UserWarning):
    """The learned weights look as if they should not be trusted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gain:
    """What learned weights gain over uniform ones, estimated on models that were left out.

    In the unit of LDS, for models as those of the outcomes: the correlation, mean over queries, of
    what scores predict for a subset with the rank of what a model trained on it does.

    Attributes:
      mean: of the gain. Too large with few models, where nothing is to be gained: 1.5 points with
        16 and 3.2 with 8; go by `low`.
      low: lower end of a 95 % interval that holds what is measured with as many other models and
        queries.
      high: upper end.
      uniform: what uniform weights reach; an estimate, which may pass 1 where they all but do.
      uniform_low: lower end of its 95 % interval.
      uniform_high: upper end.
      models: that are finite.
      queries: that say something.
      dropped: models that are not finite.
      skipped: queries on which all models do the same, or none is finite.
      to_uniform: how much uniform weights count in the weights: 0 where the gain is beyond doubt, 1
        where there is none. With few models or queries that is itself uncertain: look at `low`.
    """

    mean: float
    low: float
    high: float
    uniform: float
    uniform_low: float
    uniform_high: float
    models: int
    queries: int
    dropped: int
    skipped: int
    to_uniform: float

    def __str__(self) -> str:
        shown = "" if self.low > 0 else "; not shown to be above zero, so uniform ones are safer"
        left = [
            f"{count} {what}"
            for count, what in ((self.dropped, "models dropped"), (self.skipped, "queries skipped"))
            if count
        ]
        return (
            f"gain {100 * self.mean:+.1f} % LDS [{100 * self.low:+.1f}, {100 * self.high:+.1f}] "
            f"over uniform weights' {100 * self.uniform:.1f} %{shown} ({self.models} retrained "
            f"models, {self.queries} queries{''.join(', ' + each for each in left)}; weights "
            f"were drawn {self.to_uniform:.0%} of the way to uniform)"
        )


# Of fewer learning queries the weights say little about others.
_FEW_QUERIES = 10

UNKNOWN_GAIN = (
    "gain over uniform weights: not known. Outcomes of small retrained models, "
    "learn_weights(..., outcomes=ja.outcomes(...)), give it, at the cost of 4 to 16 trainings."
)


_ONE_GROUP = (
    "one group: a single weight changes no ranking. Build the index with more: groups=ja.by_leaf."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFit:
    """Learned weights and what tells whether to trust them.

    Attributes:
      weights: {group name: weight}, mean one.
      gain: over uniform weights; None where they were learned without outcomes.
      losses: the objective at each step, relative to the size of the loss at the start, [steps];
        with outcomes, at the end for each strength of the pull.
      loss: the loss on the queries that were learned from, (start, end); no penalty. With outcomes
        minus the correlation that `gain` speaks of.
      held_out_loss: the same on queries that were held out; with outcomes on models that were.
        None if there were none.
      shares: {group name: share of the scores}: weight times the root mean square of the group's
        contributions, summing to one. Unlike the weights they do not depend on a group's scale.
      start_shares: the shares where learning started.
      entropy: of the shares; 1 is all equal, 0 a single group.
      tail_ratio: {group name: largest contribution relative to the root mean square, averaged over
        queries}. Near sqrt(n) means that single training examples are all there is.
      hub: id of the training example that is in the top k of the most queries; None with outcomes.
      hub_share: in how many, as a share.
      passes: how often the training set was gone over.
      warnings: what a user should look at, in words.
      learned_from: digests of the learning queries, where those are arrays.
      learned_on: the index's `query_side`: its method, groups, checkpoints and key.
    """

    weights: dict[str, float]
    gain: Gain | None
    losses: np.ndarray
    loss: tuple[float, float]
    held_out_loss: tuple[float, float] | None
    shares: dict[str, float]
    start_shares: dict[str, float]
    entropy: float
    tail_ratio: dict[str, float]
    hub: int | None
    hub_share: float | None
    passes: int
    warnings: tuple[str, ...]
    learned_from: frozenset[bytes] = frozenset()
    learned_on: str | None = None

    @property
    def largest(self) -> str:
        """The group with the largest share."""
        return max(self.shares, key=self.shares.__getitem__)

    def __str__(self) -> str:
        held = ""
        if self.held_out_loss is not None:
            held = f", held out {self.held_out_loss[0]:.4f} -> {self.held_out_loss[1]:.4f}"
        ranked = sorted(self.shares, key=lambda name: -self.shares[name])
        lines = [
            UNKNOWN_GAIN if self.gain is None else str(self.gain),
            f"loss {self.loss[0]:.4f} -> {self.loss[1]:.4f}{held}; entropy {self.entropy:.2f}",
            "    weight  share  group",
            *(f"  {self.weights[name]:8.3f}  {self.shares[name]:4.0%}   {name}" for name in ranked),
            *(f"warning: {warning}" for warning in self.warnings),
            *([_ONE_GROUP] if len(self.weights) == 1 else []),
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """For notebooks: the gain, the weights and shares as bars, and the warnings."""
        largest = max(self.weights.values()) or 1.0
        rows = [
            (
                name,
                markup.bar(self.weights[name] / largest),
                f"{self.weights[name]:.3f}",
                markup.bar(self.shares[name], markup.ORANGE),
                f"{self.shares[name]:.1%}",
            )
            for name in sorted(self.shares, key=lambda name: -self.shares[name])
        ]
        gain = markup.escaped(UNKNOWN_GAIN if self.gain is None else self.gain)
        headings = ("group", "weight", "", "share of the scores", "")
        return (
            f"<div><p>{gain}</p>{markup.listed(self.warnings)}"
            f'<div style="max-height:24em;overflow:auto">{markup.table(headings, rows)}</div></div>'
        )


class ContributionStatistics(NamedTuple):
    """Per query and group: sum of squares and largest absolute contribution, each [q, m].

    Attributes:
      squares: sums over training examples.
      largest: maxima over training examples.
      n: number of training examples.
    """

    squares: np.ndarray
    largest: np.ndarray
    n: int

    def checked(self) -> "ContributionStatistics":
        """Returns them; raises `ValueError` if all contributions are zero."""
        if not self.squares.any():
            raise ValueError("Every contribution is zero: there is nothing to weight.")
        return self

    def rms(self) -> np.ndarray:
        """Root mean square of each group's contributions, [m]."""
        return np.sqrt(self.squares.mean(axis=0) / self.n)

    def tail_ratios(self) -> np.ndarray:
        """Largest contribution relative to the root mean square, averaged over queries, [m]."""
        rms = np.sqrt(self.squares / self.n)
        return np.mean(self.largest / np.where(rms > 0, rms, 1), axis=0)


def report(
    names: Sequence[str],
    statistics: ContributionStatistics,
    start: np.ndarray,
    w: np.ndarray,
    *,
    top_k: int | None = None,
    **found: Any,
) -> WeightFit:
    """Makes the report, and warns of what is suspicious in it.

    Args:
      names: group names.
      statistics: of the contributions.
      start: weights where learning started, [m].
      w: learned weights, mean one, [m].
      top_k: number of training examples taken for the signal.
      **found: the fields of `WeightFit` that are no function of these.

    Returns:
      The report.
    """

    def named(values: np.ndarray) -> dict[str, float]:
        return dict(zip(names, values.tolist(), strict=True))

    shares = _shares(w, statistics)
    present = shares[shares > 0]
    entropy = -float(np.sum(present * np.log(present)))
    fit = WeightFit(
        weights=named(w),
        shares=named(shares),
        start_shares=named(_shares(start, statistics)),
        entropy=entropy / math.log(len(shares)) if len(shares) > 1 else 1.0,
        tail_ratio=named(statistics.tail_ratios()),
        warnings=(),
        **found,
    )
    suspicions = tuple(_suspicions(fit, statistics, top_k))
    for message in suspicions:
        warnings.warn(message, WeightWarning, stacklevel=4)
    return dataclasses.replace(fit, warnings=suspicions)


def _shares(w: np.ndarray, statistics: ContributionStatistics) -> np.ndarray:
    strength = w * statistics.rms()
    return strength / strength.sum()


def _suspicions(
    fit: WeightFit, statistics: ContributionStatistics, top_k: int | None
) -> Iterator[str]:
    if not np.isfinite(fit.losses).all():
        yield "the loss was not finite at some steps: lower the optimizer's learning rate."
    if fit.gain is None:
        yield from _suspicions_without_outcomes(fit, statistics, top_k or 1)
    else:
        yield from _suspicions_of_outcomes(fit.gain)


def _suspicions_of_outcomes(gain: Gain) -> Iterator[str]:
    if gain.uniform_high < 0:
        yield (
            "sign: the more scores predict for a subset, the less its model has of the outputs "
            f"(correlation {gain.uniform:.2f}). Outputs must be larger where scores are: a margin, "
            "or MINUS the loss."
        )
    elif gain.uniform_low < 0:
        yield (
            f"no hold: scores do not predict these {gain.models} models (correlation "
            f"{gain.uniform:.2f}, 95 % interval {gain.uniform_low:.2f} to {gain.uniform_high:.2f}),"
            " so weights have little to go by. Use more models or more queries, or train the "
            "models for longer."
        )
    if gain.dropped > 0.1 * (gain.dropped + gain.models):
        yield f"divergence: {gain.dropped} models are not finite and were dropped."


def _suspicions_without_outcomes(
    fit: WeightFit, statistics: ContributionStatistics, top_k: int
) -> Iterator[str]:
    name = fit.largest
    before, after = fit.start_shares[name], fit.shares[name]
    if len(fit.weights) > 2 and after > max(0.5, before + 0.1):
        yield (
            f"collapse: group {name!r} went from {before:.0%} to {after:.0%} of the scores. Its "
            f"largest contributions are {fit.tail_ratio[name]:.1f} times their root mean square "
            f"(at most {math.sqrt(statistics.n):.1f}); a heavy-tailed group wins this loss without "
            "being informative. Leave its parameters out, by exclude= of the groups, or raise l2 "
            "or top_k."
        )
    queries, chance = len(statistics.squares), top_k / statistics.n
    if queries < _FEW_QUERIES:
        yield (
            f"few queries: weights were learned from {queries}, and are those of these queries "
            f"alone. Use at least {_FEW_QUERIES}; they need no labels, and 100 or more are usual."
        )
    if queries >= 10 and (fit.hub_share or 0) > max(0.5, 4 * chance):
        yield (
            f"hub: training example {fit.hub} is among the top {top_k} of "
            f"{fit.hub_share or 0:.0%} of the queries. Look at it; grad_cos or a kernel "
            "may suit better."
        )
    held_out = fit.held_out_loss
    if held_out is not None and held_out[1] - held_out[0] > 0.01 * abs(held_out[0]):
        yield (
            f"over-fitting: the held-out loss rose from {held_out[0]:.4f} to "
            f"{held_out[1]:.4f}. Use more queries, or raise l2."
        )
