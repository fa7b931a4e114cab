"""Retrieval: do the strongest proponents hold what the query asks for?"""

from typing import Any

import numpy as np

from jaxattr.counts import real_numbers, whole_number


def strongest(scores: Any, k: int) -> np.ndarray:
    """Returns the ids of the k best training examples of each query, from an array of scores.

    Args:
      scores: float [q, n]; `ja.top_k` needs none.
      k: how many.

    Returns:
      Integers [q, k]. Ties go to the lower id, as in `ja.top_k`; -1 where all others
      are NaN.

    Raises:
      ValueError: if k is no int between 1 and n, or scores are no real numbers [q, n].
    """
    scores, k = np.asarray(scores), whole_number("k", k, least=None)
    if scores.ndim != 2 or np.iscomplexobj(scores):
        raise ValueError(
            f"scores must be real numbers [q, n], got {scores.dtype} {list(scores.shape)}."
        )
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(
            f"k must be between 1 and the {scores.shape[1]} training examples, got {k}."
        )
    # Minus an integer may be no integer of its type; its complement is, in reverse order.
    descending = ~scores if scores.dtype.kind in "biu" else -scores
    ids = np.argsort(descending, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(scores, ids, axis=1)
    return np.where(found == found, ids, -1)  # NaN, which comes last


def ranks(scores: Any, relevant: Any) -> np.ndarray:
    """Returns the rank of the best relevant training example of each query, from 1.

    Args:
      scores: float [q, n], larger = stronger proponent.
      relevant: bool [q, n], which training examples answer each query.

    Returns:
      Integers [q]. Ties go to the lower id, as in `ja.top_k`; what is not finite comes last: of a
      query without finite scores the rank is n.

    Raises:
      ValueError: if shapes differ, or a query has no relevant example.
    """
    scores, relevant = _checked(scores, relevant)
    order = strongest(scores, scores.shape[1])
    first = np.take_along_axis(relevant, order, axis=1).argmax(axis=1) + 1
    return np.where(relevant.any(axis=1), first, scores.shape[1])


def mean_reciprocal_rank(scores: Any, relevant: Any) -> float:
    """Mean over queries of one over the rank of the best relevant example.

    Args:
      scores: float [q, n], larger = stronger.
      relevant: bool [q, n], which examples hold what a query asks for.

    Returns:
      Between 0 and 1.
    """
    return float((1 / ranks(scores, relevant)).mean())


def hit_at_k(scores: Any, relevant: Any, k: int) -> np.ndarray:
    """Whether any relevant example is among the k best: one of two things called recall@k.

    Args:
      scores: float [q, n], larger = stronger.
      relevant: bool [q, n], which examples hold what a query asks for.
      k: how many.

    Returns:
      Bool [q].
    """
    return _found(scores, relevant, k) > 0


def recall_at_k(scores: Any, relevant: Any, k: int) -> np.ndarray:
    """Share of the relevant examples that are among the k best: the other one, the strict.

    Args:
      scores: float [q, n], larger = stronger.
      relevant: bool [q, n], which examples hold what a query asks for.
      k: how many; below the number of relevant examples it cannot reach 1.

    Returns:
      Float [q].
    """
    found = _found(scores, relevant, k)
    return found / np.asarray(relevant, bool).sum(axis=1)


def precision_at_k(scores: Any, relevant: Any, k: int) -> np.ndarray:
    """Share of the k best that are relevant; for when there are many more than k of those.

    Args:
      scores: float [q, n], larger = stronger.
      relevant: bool [q, n], which examples hold what a query asks for.
      k: how many.

    Returns:
      Float [q].
    """
    return _found(scores, relevant, k) / k


def mean_interval(values: Any) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean over queries.

    Args:
      values: one per query, [q].

    Returns:
      Low and high. Of values that are all the same, both are that value: no interval is known.

    Raises:
      ValueError: if values are not one finite number per query.

    Example:
      >>> mean_interval([1.0, 1.0, 1.0])
      (1.0, 1.0)
    """
    values = real_numbers("values", values)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be one number per query, got shape {list(values.shape)}.")
    missing = np.flatnonzero(~np.isfinite(values))
    if len(missing):
        raise ValueError(
            f"{len(missing)} values are not finite, at positions {missing[:10].tolist()}: leave "
            "them out, and say how many they were."
        )
    rows = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(values[rows].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def _found(scores: Any, relevant: Any, k: int) -> np.ndarray:
    scores, relevant = _checked(scores, relevant)
    return np.take_along_axis(relevant, strongest(scores, k), axis=1).sum(axis=1)


def _checked(scores: Any, relevant: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scores, -inf where not finite; and which are of relevant examples and finite."""
    scores, relevant = real_numbers("scores", scores), real_numbers("relevant", relevant)
    if (relevant % 1 != 0).any():  # such as similarities, all of which would count
        raise ValueError(
            "relevant must be bool [q, n], which training examples answer each query, or whole "
            "numbers; got fractions or NaN."
        )
    relevant = relevant.astype(bool)
    if scores.ndim != 2 or scores.shape != relevant.shape:
        raise ValueError(
            "scores and relevant must both be [q, n], got shapes "
            f"{list(scores.shape)} and {list(relevant.shape)}."
        )
    lonely = np.flatnonzero(~relevant.any(axis=1))
    if len(lonely):
        raise ValueError(
            f"{len(lonely)} queries have no relevant training example, at positions "
            f"{lonely[:10].tolist()}: leave them out."
        )
    finite = np.isfinite(scores)
    return np.where(finite, scores, -np.inf), relevant & finite
