"""Scores written to disk block by block, where they are more than fit memory."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxattr.index.index import Index
from jaxattr.index.queries import QueryFeatures
from jaxattr.sharding import barrier
from jaxattr.store import Folder, finish_scores, on_first_process, score_array, write_scores
from jaxattr.store.rows import Slab, blocks_at_once

# Examples whose scores are written at once, a column each.
COLUMNS = 8192


def written(
    index: Index, prepared: QueryFeatures, blocks: Iterator[tuple[Slab, jax.Array]], folder: Folder
) -> Any:
    """Writes scores, block by block.

    Args:
      index: that they are of.
      prepared: the queries' features.
      blocks: slabs of at most `COLUMNS` examples, and their scores [q, g, b].
      folder: a new one.

    Returns:
      The array on disk, [q, n].
    """
    q, dtype = len(prepared.features), prepared.features.dtype
    columns = blocks_at_once(index.rows.layout, COLUMNS) * index.batch_size
    make = functools.partial(score_array, folder, q, index.size, columns, dtype)
    array = on_first_process(functools.partial(make, create=True))
    array = make(create=False) if array is None else array
    for slab, scores in blocks:
        start = slab.first + slab.fresh * index.batch_size
        part = np.array(scores[:, slab.fresh :]).reshape(q, -1)[:, : index.size - start]
        part[prepared.non_finite] = np.nan
        on_first_process(functools.partial(write_scores, folder, array, start, part))
    on_first_process(functools.partial(finish_scores, folder))
    barrier("scores written")
    return array
