"""What a fit of weights reports: the weights, and whether to trust them."""

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class WeightWarning(UserWarning):
    """The learned weights look as if they should not be trusted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFit:
    """Learned weights and what tells whether to trust them.

    Attributes:
      weights: {group name: weight}, mean one.
      losses: the objective at each step, relative to the size of the loss at the start, [steps].
      loss: the loss on the queries that were learned from, (start, end); no penalty.
      held_out_loss: the same on queries that were held out; None if there were none.
      shares: {group name: share of the scores}: weight times the root mean square of the group's
        contributions, summing to one. Unlike the weights they do not depend on a group's scale.
      start_shares: the shares where learning started.
      entropy: of the shares; 1 is all equal, 0 a single group.
      tail_ratio: {group name: largest contribution relative to the root mean square, averaged over
        queries}. Near sqrt(n) means that single training examples are all there is.
      hub: id of the training example that is in the top k of the most queries.
      hub_share: in how many, as a share.
      passes: how often the training set was gone over.
      warnings: what a user should look at, in words.
    """

    weights: dict[str, float]
    losses: np.ndarray
    loss: tuple[float, float]
    held_out_loss: tuple[float, float] | None
    shares: dict[str, float]
    start_shares: dict[str, float]
    entropy: float
    tail_ratio: dict[str, float]
    hub: int
    hub_share: float
    passes: int
    warnings: tuple[str, ...]

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
            f"loss {self.loss[0]:.4f} -> {self.loss[1]:.4f}{held}; entropy {self.entropy:.2f}",
            "    weight  share  group",
            *(f"  {self.weights[name]:8.3f}  {self.shares[name]:4.0%}   {name}" for name in ranked),
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)


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

    def rms(self) -> np.ndarray:
        """Root mean square of each group's contributions, [m]."""
        return np.sqrt(self.squares.mean(axis=0) / self.n)

    def tail_ratios(self) -> np.ndarray:
        """Largest contribution relative to the root mean square, averaged over queries, [m]."""
        rms = np.sqrt(self.squares / self.n)
        return np.mean(self.largest / np.where(rms > 0, rms, 1), axis=0)


class Optimised(NamedTuple):
    """What optimisation leaves behind.

    Attributes:
      start: weights where learning started, [m].
      w: learned weights, mean one, [m].
      losses: the objective at each step.
      loss: on the queries that were learned from, (start, end); no penalty.
      held_out_loss: the same on queries that were held out; None if there were none.
      hub: id of the training example that is in the top k of the most queries.
      hub_share: in how many, as a share.
      top_k: number of training examples taken for the signal.
      passes: how often the training set was gone over.
    """

    start: np.ndarray
    w: np.ndarray
    losses: np.ndarray
    loss: tuple[float, float]
    held_out_loss: tuple[float, float] | None
    hub: int
    hub_share: float
    top_k: int
    passes: int


def named(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """Returns {name: float}."""
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def report(names: Sequence[str], found: Optimised, statistics: ContributionStatistics) -> WeightFit:
    """Makes the report, and warns of what is suspicious in it.

    Args:
      names: group names.
      found: the result of learning.
      statistics: of the contributions.

    Returns:
      The report.
    """
    shares = _shares(found.w, statistics)
    present = shares[shares > 0]
    entropy = -float(np.sum(present * np.log(present)))
    fit = WeightFit(
        weights=named(names, found.w),
        losses=found.losses,
        loss=found.loss,
        held_out_loss=found.held_out_loss,
        shares=named(names, shares),
        start_shares=named(names, _shares(found.start, statistics)),
        entropy=entropy / math.log(len(shares)) if len(shares) > 1 else 1.0,
        tail_ratio=named(names, statistics.tail_ratios()),
        hub=found.hub,
        hub_share=found.hub_share,
        passes=found.passes,
        warnings=(),
    )
    suspicions = tuple(_suspicions(fit, statistics, found.top_k))
    for message in suspicions:
        warnings.warn(message, WeightWarning, stacklevel=4)
    return dataclasses.replace(fit, warnings=suspicions)


def _shares(w: np.ndarray, statistics: ContributionStatistics) -> np.ndarray:
    strength = w * statistics.rms()
    return strength / strength.sum()


def _suspicions(fit: WeightFit, statistics: ContributionStatistics, top_k: int) -> Iterator[str]:
    if not np.isfinite(fit.losses).all():
        yield "the loss was not finite at some steps: lower the optimizer's learning rate."
    name = fit.largest
    before, after = fit.start_shares[name], fit.shares[name]
    if len(fit.weights) > 2 and after > max(0.5, before + 0.1):
        yield (
            f"collapse: group {name!r} went from {before:.0%} to {after:.0%} of the scores. Its "
            f"largest contributions are {fit.tail_ratio[name]:.1f} times their root mean square "
            f"(at most {math.sqrt(statistics.n):.1f}); a heavy-tailed group wins this loss without "
            "being informative. Exclude it, or raise l2 or top_k."
        )
    queries, chance = len(statistics.squares), top_k / statistics.n
    if queries >= 10 and fit.hub_share > max(0.5, 4 * chance):
        yield (
            f"hub: training example {fit.hub} is among the top {top_k} of {fit.hub_share:.0%} of "
            "the queries. Look at it; grad_cos or a kernel may suit better."
        )
    held_out = fit.held_out_loss
    if held_out is not None and held_out[1] - held_out[0] > 0.01 * abs(held_out[0]):
        yield (
            f"over-fitting: the held-out loss rose from {held_out[0]:.4f} to "
            f"{held_out[1]:.4f}. Use more queries, or raise l2."
        )
