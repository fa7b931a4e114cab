"""The linear datamodelling score: do sums of scores predict what retrained models do?"""

import dataclasses
import warnings
from typing import Any

import numpy as np

from jaxattr import markup
from jaxattr.counts import real_numbers, whole_number
from jaxattr.scores.subsets import checked_masks, summed
from jaxattr.weights.outcomes import finite_models

# Resamples of fewer subsets are so few and so alike that their quantiles say nothing.
FEWEST_FOR_AN_INTERVAL = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class LDS:
    """Linear datamodelling score, as a correlation between -1 and 1.

    Attributes:
      mean: over queries.
      low: 2.5 % quantile of the mean over resampled subsets; NaN with fewer than 8 subsets, which
        are too few to say how far the mean is known.
      high: 97.5 % quantile; NaN with fewer than 8.
      per_query: Spearman correlation of each query; NaN where skipped, [q].
      skipped: queries without a correlation: their outputs or predictions are constant or not
        finite.
      resampled: the mean for each resample of the subsets; pairs up with any other LDS of the same
        subsets, [resamples]; NaN with fewer than 8 subsets.
    """

    mean: float
    low: float
    high: float
    per_query: np.ndarray
    skipped: int
    resampled: np.ndarray

    def __str__(self) -> str:
        known = f"[{100 * self.low:.1f}, {100 * self.high:.1f}]"
        interval = "(no interval)" if np.isnan(self.low) else known
        text = f"{100 * self.mean:.1f} % {interval}"
        return text + (f" ({self.skipped} queries skipped)" if self.skipped else "")

    def _repr_html_(self) -> str:
        """For notebooks: the mean with its interval, and how it spreads over queries."""
        known = self.per_query[np.isfinite(self.per_query)]
        points = np.quantile(known, (0, 0.25, 0.5, 0.75, 1)) if len(known) else np.array([])
        headings = ("lowest query", "lower quarter", "median", "upper quarter", "highest")
        spread = markup.table(headings[: len(points)], [[f"{100 * x:.1f} %" for x in points]])
        length = markup.bar(abs(self.mean), markup.ORANGE if self.mean < 0 else markup.BLUE)
        return f"<div><p>LDS {markup.escaped(self)} {length}</p>{spread}</div>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Difference of two scores on the same subsets.

    Attributes:
      mean: first minus second.
      low: 2.5 % quantile over the same resamples for both.
      high: 97.5 % quantile.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} % [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def lds(scores: Any, masks: Any, outputs: Any, *, resamples: int = 1000) -> LDS:
    """Correlates predicted with actual outputs of models trained on subsets.

    The prediction for a subset is the sum of the scores of its examples. The interval is over
    subsets (a percentile bootstrap of correlations of ranks, the ranks being taken once): it says
    how far the mean is known for these queries. It tends to be too narrow below some 24 subsets;
    with fewer than 8 there is none (NaN), and a mean that can take few values.

    Args:
      scores: float [q, n], larger = stronger proponent.
      masks: bool [m, n], or integers 0 and 1, which examples each model was trained on.
      outputs: float [m, q], larger = more of what the score attributes: a margin, or minus a loss.
      resamples: of the subsets.

    Returns:
      The score.

    Raises:
      TypeError: if scores or outputs are no real numbers.
      ValueError: if shapes do not match, masks are no masks, or there are fewer than 3 different
        subsets.

    Warns:
      UserWarning: with the models whose outputs are not finite where those of most are.

    References:
      Park et al. (2023), TRAK, arXiv:2303.14186, section 2.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> scores, masks = rng.normal(size=(4, 20)), rng.random((30, 20)) < 0.5
      >>> print(lds(scores, masks, masks @ scores.T))
      100.0 % [100.0, 100.0]
    """
    scores, masks = real_numbers("scores", scores), np.asarray(masks)
    masks = checked_masks(masks.astype(bool) if np.isin(masks, (0, 1)).all() else masks)
    if scores.ndim != 2 or scores.shape[1] != masks.shape[1]:
        raise ValueError(
            f"scores [q, n] and masks [m, n] need the same n, got {scores.shape} and {masks.shape}."
        )
    found = lds_of_predictions(summed(scores, masks), outputs, resamples=resamples)
    different = len(np.unique(masks, axis=0))
    if different < 3:
        raise ValueError(
            f"A rank correlation needs at least 3 subsets, got {different} different ones: two "
            "points are always in order or in reverse."
        )
    return found


def lds_of_predictions(predicted: Any, outputs: Any, *, resamples: int = 1000) -> LDS:
    """The same from predictions that were summed elsewhere.

    Args:
      predicted: float [q, m], sums of scores over each subset.
      outputs: float [m, q].
      resamples: of the subsets.

    Returns:
      The score.
    """
    predicted, actual = real_numbers("predicted", predicted), real_numbers("outputs", outputs).T
    if predicted.shape != actual.shape:
        raise ValueError(
            f"outputs must be [m, q] = {predicted.shape[::-1]}, got {actual.shape[::-1]}."
        )
    m = predicted.shape[1]
    lost = np.flatnonzero(~finite_models(actual.T))
    if len(lost):
        warnings.warn(
            f"Outputs of {len(lost)} of the {m} models are not finite, {lost[:10].tolist()} first, "
            "and a query with such a model has no correlation: leave these models out, of masks "
            "and of outputs.",
            UserWarning,
            stacklevel=3,
        )
    if m < 3:
        raise ValueError(f"A rank correlation needs at least 3 subsets, got {m}.")
    ranks = _ranks(predicted, actual)
    per_query = _correlations(ranks, np.ones((1, m)))[0]
    kept = np.isfinite(per_query)
    rows = np.random.default_rng(0).integers(m, size=(whole_number("resamples", resamples), m))
    counts = np.stack([np.bincount(row, minlength=m) for row in rows])
    resampled = _correlations(ranks[:, kept], counts)  # [resamples, q]
    resampled = np.array([finite_mean(correlations) for correlations in resampled])
    if m < FEWEST_FOR_AN_INTERVAL:
        resampled = np.full_like(resampled, np.nan)
    low, high = _ends(resampled)
    return LDS(
        mean=finite_mean(per_query),
        low=low,
        high=high,
        per_query=per_query,
        skipped=int((~kept).sum()),
        resampled=resampled,
    )


def paired_difference(first: LDS, second: LDS) -> Difference:
    """Difference of two scores, with the interval that shared subsets allow.

    Args:
      first: LDS of one set of scores.
      second: LDS of another, on the same masks and outputs.

    Returns:
      First minus second.

    Raises:
      TypeError: if either is none.
      ValueError: if the two differ in their resamples or queries, or in those they skipped.
    """
    if not (isinstance(first, LDS) and isinstance(second, LDS)):
        raise TypeError(
            f"Two scores as ja.lds makes them are needed, got {type(first).__name__} and "
            f"{type(second).__name__}."
        )
    if first.resampled.shape != second.resampled.shape or len(first.per_query) != len(
        second.per_query
    ):
        raise ValueError(
            f"Only scores of the same queries and resamples can be paired; got "
            f"{len(first.per_query)} and {len(second.per_query)} queries, "
            f"{len(first.resampled)} and {len(second.resampled)} resamples."
        )
    known = [np.isfinite(each.per_query) for each in (first, second)]
    alone = np.flatnonzero(known[0] != known[1])
    if len(alone):
        raise ValueError(
            f"{len(alone)} queries have a correlation in one of both scores alone, at positions "
            f"{alone[:10].tolist()}, so that the means are of other queries: leave these out of "
            "both."
        )
    low, high = _ends(first.resampled - second.resampled)
    return Difference(mean=first.mean - second.mean, low=low, high=high)


def _ends(resampled: np.ndarray) -> tuple[float, float]:
    """Of the 95 % interval; resamples in which no query has a correlation do not count."""
    known = resampled[np.isfinite(resampled)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


def finite_mean(values: np.ndarray) -> float:
    """Returns the mean of what is finite; NaN if nothing is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _ranks(predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Ranks of predicted and actual outputs, [2, q, m]; all the same where some are not finite."""
    from scipy import stats  # slow to import, and needed here alone

    both = np.stack([predicted, actual])
    finite = np.isfinite(both).all(axis=(0, 2))
    ranks = stats.rankdata(np.where(finite[:, None], both, 0), axis=2)
    # Centred ranks keep the sums below small and exact.
    return ranks - (ranks.shape[2] + 1) / 2


def _correlations(ranks: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Correlations [r, q] with subset s counted counts[r, s] times; NaN where undefined."""
    total = counts.sum(axis=1, keepdims=True)
    sums = [counts @ x.T for x in ranks]  # [r, q]
    squares = [counts @ (x**2).T - s**2 / total for x, s in zip(ranks, sums, strict=True)]
    product = counts @ (ranks[0] * ranks[1]).T - sums[0] * sums[1] / total
    norm = np.sqrt(np.maximum(squares[0], 0) * np.maximum(squares[1], 0))
    usable = norm > 1e-9 * total
    return np.where(usable, product / np.where(usable, norm, 1), np.nan)
