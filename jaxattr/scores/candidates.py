"""Candidates: the training examples that a query is ranked among, where that is not all of them."""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxattr.index.index import Index, NonFiniteWarning, first_ids
from jaxattr.inputs.wording import brief
from jaxattr.scores.ranking import TopK
from jaxattr.store.rows import by_shard


def checked_candidates(among: Any, n: int) -> np.ndarray:
    """Refuses what are no ids of training examples.

    Args:
      among: what a caller gave.
      n: number of training examples.

    Returns:
      Ids, int64 [q, c], -1 for none.

    Raises:
      ValueError: if they are anything else.
    """
    try:
        ids = np.asarray(among.ids if isinstance(among, TopK) else among)
    except ValueError:  # rows of different lengths
        ids = np.asarray(None)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        got = brief(repr(among), 60) if ids.ndim == 0 else f"{ids.dtype} {list(ids.shape)}"
        raise ValueError(
            "among must be integers [queries, candidates], ids of training examples, a row for "
            f"each query, filled up with -1 where it has fewer; got {got}. Such are the ids of a "
            "top k: ja.top_k(cheap_index, queries, k=100).ids."
        )
    wrong = (ids < -1) | (ids >= n)
    if wrong.any():
        raise ValueError(
            f"Ids in among must be between 0 and {n - 1}, the training examples of this index, or "
            f"-1 for none; got {ids[wrong][0]} for query {np.nonzero(wrong)[0][0]}. Do they come "
            "from an index of other data?"
        )
    return ids.astype(np.int64)


def warn_of_non_finite(index: Index, ids: np.ndarray) -> None:
    """Warns of candidates that have no score in this index, whatever they had in another.

    Args:
      index: that they are ranked by.
      ids: [q, c].
    """
    lost = np.intersect1d(ids, index.non_finite)
    if len(lost):
        warnings.warn(
            f"{len(lost)} of the {len(_union(ids))} candidates in among have no finite gradient in "
            f"this index, and are not ranked: ids {first_ids(lost)}.",
            NonFiniteWarning,
            stacklevel=3,
        )


class Picked(NamedTuple):
    """Candidates whose rows are read at once.

    Attributes:
      ids: int32 [shards, l], as `Rows.pick` takes them; ascending, -1 for none.
      asked: which of them are candidates of which query, bool [q, shards * l].
    """

    ids: np.ndarray
    asked: np.ndarray


def in_parts(index: Index, ids: np.ndarray, most: int) -> Iterator[Picked]:
    """Yields the candidates of all queries in ascending order, each of them once.

    Args:
      index: that they are ranked by.
      ids: [q, c].
      most: how many at once.
    """
    union = _union(ids)
    parts = [
        by_shard(union[start : start + most], index.rows.layout, index.place)
        for start in range(0, len(union), most)
    ]
    longest = max((len(own) for part in parts for own in part), default=0)
    # Of few lengths, since each is a program of its own.
    length = min(most, 1 << max(longest - 1, 0).bit_length())
    for part in parts:
        chosen = np.full((len(part), length), -1, np.int32)
        for shard, own in enumerate(part):
            chosen[shard, : len(own)] = own
        yield Picked(chosen, _asked(ids, chosen.reshape(-1)))


def _asked(ids: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Which of the chosen ids, -1 for none, are in which row of ids."""
    order = np.argsort(chosen, kind="stable")
    places = np.searchsorted(chosen, ids, sorter=order).clip(max=len(chosen) - 1)
    columns = order[places]
    there = (ids >= 0) & (chosen[columns] == ids)
    asked = np.zeros((len(ids), len(chosen)), bool)
    asked[np.nonzero(there)[0], columns[there]] = True
    return asked


def _union(ids: np.ndarray) -> np.ndarray:
    return np.unique(ids[ids >= 0])
