"""What learned weights gain, measured on queries that they were not learned from."""

import warnings
from typing import Any, NamedTuple

import numpy as np

from jaxattr.evaluation.lds import LDS, Difference, lds_of_predictions, paired_difference
from jaxattr.index.index import Index
from jaxattr.index.queries import as_queries, query_features
from jaxattr.scores.subsets import subset_contributions, subset_products
from jaxattr.scores.weighting import weights_for
from jaxattr.weights.outcomes import Outcomes, check_queries, digests_of_queries, finite_models
from jaxattr.weights.report import WeightFit, WeightWarning


class MeasuredGain(NamedTuple):
    """LDS with and without learned weights.

    Attributes:
      uniform: LDS of uniform weights.
      learned: LDS of the learned ones.
      difference: learned minus uniform, with the interval that shared models allow.
    """

    uniform: LDS
    learned: LDS
    difference: Difference

    def __str__(self) -> str:
        return (
            f"LDS {self.uniform} with uniform weights, {self.learned} with learned ones: "
            f"{self.difference}"
        )


def measured_gain(index: Index, queries: Any, fit: WeightFit, outcomes: Outcomes) -> MeasuredGain:
    """Measures the gain in LDS of learned over uniform weights.

    Args:
      index: the index.
      queries: evaluation queries, other than those that weights were learned from.
      fit: of `ja.learn_weights` on the same index.
      outcomes: of models retrained on subsets, on these queries: other models than those that
        weights were learned from, and by convention of halves (`ja.outcomes(..., fraction=0.5)`).

    Returns:
      The scores and their difference.

    Raises:
      TypeError: if the fit is none.
      ValueError: if outcomes are of other queries or another training set, or weights of other
        groups.

    Warns:
      UserWarning: if weights were learned on another index.
      WeightWarning: if weights were learned from some of the queries, where those are arrays, or
        models are not finite, which are dropped.

    Cost: one pass over the training set; no [q, n] scores.
    """
    if not isinstance(fit, WeightFit):
        raise TypeError(
            f"fit must be what ja.learn_weights returned, got {type(fit).__name__}. The order is "
            "measured_gain(index, queries, fit, outcomes)."
        )
    w = np.asarray(weights_for(index, fit), np.float64)
    queries = as_queries(index, queries)
    _warn_of_overlap(queries, fit)
    prepared = query_features(index, queries)
    check_queries(outcomes, queries, len(prepared.features))
    kept = finite_models(outcomes.outputs)
    if not kept.all():
        warnings.warn(
            f"{(~kept).sum()} of {len(kept)} models are not finite and were dropped: "
            f"{np.flatnonzero(~kept)[:10].tolist()}.",
            WeightWarning,
            stacklevel=2,
        )
    masks, outputs = outcomes.masks[kept], outcomes.outputs[kept]
    squared = index.link == "square"
    sums = (subset_products if squared else subset_contributions)(index, prepared, masks)

    def of_weights(w: np.ndarray) -> LDS:
        predicted = sums @ w
        predicted = predicted @ w if squared else predicted
        return lds_of_predictions(predicted, outputs)

    uniform, learned = of_weights(np.ones(len(w))), of_weights(w)
    return MeasuredGain(uniform, learned, paired_difference(learned, uniform))


def _warn_of_overlap(queries: Any, fit: WeightFit) -> None:
    digests = digests_of_queries(queries)
    shared = [i for i, each in enumerate(digests) if each in fit.learned_from]
    if shared:
        warnings.warn(
            f"Weights were learned from {len(shared)} of the {len(digests)} evaluation queries, at "
            f"positions {shared[:10]}: what they gain there is no measure of what they gain "
            "elsewhere. Keep queries apart.",
            WeightWarning,
            stacklevel=3,
        )
