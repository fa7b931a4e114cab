"""Scores written to disk block by block, where they are more than fit memory."""

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxattr.index.index import Index, NonFiniteWarning, first_ids
from jaxattr.index.queries import QueryFeatures
from jaxattr.sharding import barrier
from jaxattr.store.arrays import finish_scores, score_array, write_scores
from jaxattr.store.folder import Folder, on_first_process
from jaxattr.store.rows import SLAB, Slab, blocks_at_once

Scored = tuple[QueryFeatures, Iterator[tuple[Slab, jax.Array]]]
"""A group of queries, and slabs of at most `SLAB` examples with their scores [q, g, b]."""


def written(index: Index, queries: int, groups: Iterator[Scored], folder: Folder) -> Any:
    """Writes scores, block by block.

    Args:
      index: that they are of.
      queries: how many there are in all groups.
      groups: one after the other.
      folder: a new one.

    Returns:
      The array on disk, [q, n].
    """
    array, row, infinite = None, 0, np.zeros(queries, int)
    for prepared, blocks in groups:
        if array is None:
            shape = (queries, len(prepared.features))
            array = _made(index, shape, prepared.features.dtype, folder)
        for slab, scores in blocks:
            first = slab.first + slab.fresh * index.batch_size
            part = np.array(scores[:, slab.fresh :]).reshape(len(scores), -1)
            part = part[:, : index.size - first]
            part[prepared.non_finite] = np.nan
            infinite[row : row + len(part)] += np.isinf(part).sum(axis=1)
            on_first_process(functools.partial(write_scores, folder, array, (row, first), part))
        row += len(prepared.features)
    on_first_process(functools.partial(finish_scores, folder))
    barrier("scores written")
    if array is not None:
        warn_of_overflow(infinite, array.dtype.numpy_dtype)
    return array


def warn_of_overflow(infinite: np.ndarray, dtype: Any) -> None:
    """Warns of scores that are past the range of their type.

    Args:
      infinite: how many there are of each query, [q].
      dtype: of the scores.
    """
    if infinite.any():
        warnings.warn(
            f"{infinite.sum()} scores are past the range of {dtype} and are returned as infinite, "
            f"with their sign; they are ranked by their true size. Rows "
            f"{first_ids(np.flatnonzero(infinite))} of the result hold them. Scale the loss down, "
            "or look at examples with huge gradients.",
            NonFiniteWarning,
            stacklevel=4,
        )


def _made(index: Index, queries: tuple[int, int], dtype: Any, folder: Folder) -> Any:
    """The array, for all queries and so many at once: a chunk is written as a whole."""
    count, rows = queries
    chunk = (rows, blocks_at_once(index.rows.layout, SLAB) * index.batch_size)
    make = functools.partial(score_array, folder, (count, index.size), chunk, dtype)
    array = on_first_process(functools.partial(make, create=True))
    return make(create=False) if array is None else array
