"""Finding wrong labels: examples whose influence on themselves is large are suspicious."""

from typing import Any

import jax
import numpy as np

from jaxattr.counts import real_number, real_numbers, whole_number
from jaxattr.keys import check_key
from jaxattr.typing import Key


def flip_labels(
    key: Key, labels: Any, *, fraction: float = 0.1, classes: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Replaces some labels by other ones, to be found again.

    Args:
      key: PRNG key.
      labels: integers [n], from 0 to classes - 1.
      fraction: share of labels to flip, above 0 and at most 1.
      classes: number of classes. Default: the largest label plus one.

    Returns:
      New labels [n], and which were flipped, bool [n]. A flipped label is never the old one.

    Raises:
      ValueError: if the fraction flips nothing, there is only one class, or labels are no integers
        from 0 to classes - 1.

    Example:
      >>> labels, flipped = flip_labels(jax.random.key(0), np.arange(10), fraction=0.3)
      >>> int(flipped.sum()), bool((labels[flipped] != np.arange(10)[flipped]).all())
      (3, True)
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "biu":
        raise ValueError(f"labels must be integers [n], got {labels.dtype} {list(labels.shape)}.")
    labels = labels.astype(np.int64)
    classes = int(labels.max()) + 1 if classes is None else whole_number("classes", classes)
    if classes < 2:
        raise ValueError(f"Flipping a label needs at least 2 classes, got {classes}.")
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise ValueError(
            f"labels must be from 0 to {classes - 1}, as there are {classes} classes; got "
            f"{labels[outside][:10].tolist()} at positions {outside[:10].tolist()}. Leave examples "
            "without a label out, or say how many classes there are."
        )
    share = real_number("fraction", fraction)
    count = round(share * len(labels)) if 0 < share <= 1 else 0  # of NaN, none
    if not count:
        raise ValueError(f"A fraction of {fraction} flips {count} of {len(labels)} labels.")
    generator = np.random.default_rng(np.asarray(jax.random.key_data(check_key(key))))
    flipped = np.zeros(len(labels), bool)
    flipped[generator.choice(len(labels), count, replace=False)] = True
    shift = np.where(flipped, generator.integers(1, classes, size=len(labels)), 0)
    return (labels + shift) % classes, flipped


def mislabel_auc(self_influence: Any, mislabelled: Any) -> float:
    """Area under the ROC curve of finding mislabelled examples by their self-influence.

    Args:
      self_influence: float [n], as `ja.self_influence` returns it. NaN counts as the smallest.
      mislabelled: bool [n].

    Returns:
      Probability that a mislabelled example scores above a well-labelled one, ties one half.

    Raises:
      ValueError: if all or none are mislabelled, shapes differ, or values differ by no more
        than rounding, as those of methods that scale gradients to unit norm.

    Example:
      >>> mislabel_auc([0.1, 0.2, 3.0], [False, False, True])
      1.0
    """
    from scipy import stats  # slow to import, and needed here alone

    values, wrong = real_numbers("self_influence", self_influence), np.asarray(mislabelled)
    if values.ndim != 1 or values.shape != wrong.shape or wrong.dtype != bool:
        raise ValueError(
            f"mislabelled must be bool [n], and self_influence {list(values.shape)} one number "
            f"each, got {wrong.dtype} {list(wrong.shape)}."
        )
    positives = int(wrong.sum())
    negatives = len(wrong) - positives
    if not positives or not negatives:
        raise ValueError(f"Needed some examples of each kind, got {positives} mislabelled.")
    known = values[np.isfinite(values)]
    if len(known) and 0 < np.ptp(known) <= 1e-5 * np.abs(known).max():
        raise ValueError(
            f"self_influence is {known[0]:.6g} for all examples, up to rounding, and so says "
            "nothing of labels: GradCos and TrackStar scale gradients to unit norm. Take that of "
            "another method."
        )
    ranks = stats.rankdata(np.where(np.isnan(values), -np.inf, values))
    above = ranks[wrong].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))
