"""Arrays in a folder of their own, for other readers of zarr: scores, and copies of features."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from jaxattr.store.folder import Folder, StoreError, first_line, writing

# Is there while scores are written.
_UNFINISHED = "unfinished.json"


def check_vacant(folder: Folder) -> None:
    """Refuses a folder that scores cannot be written to.

    Args:
      folder: where to: must be empty, or hold scores that were not finished.

    Raises:
      StoreError: if something else is there.
    """
    if folder.names() and folder.read(_UNFINISHED) is None:
        raise StoreError(f"{folder.path} is not empty: give a new path for the scores.")


def score_array(
    folder: Folder, shape: tuple[int, int], chunk: tuple[int, int], dtype: Any, create: bool
) -> Any:
    """Makes an array [q, n] for scores, or opens it.

    Args:
      folder: where; see `check_vacant`. Scores that were not finished are deleted.
      shape: q, n.
      chunk: rows and columns that are written at once.
      dtype: of the scores.
      create: whether to make it.

    Returns:
      A TensorStore, NaN where nothing was written.

    Raises:
      StoreError: if something is there already, or it cannot be written.
    """
    if create:
        check_vacant(folder)
        folder.delete_under("")  # what a killed run left
        folder.write(_UNFINISHED, dict(zip(("queries", "examples"), shape, strict=True)))
    spec = _spec(folder, shape, dtype, chunk, {"fill_value": math.nan})
    with writing(folder.path):
        return ts.open(spec, create=create, open=not create).result()


def write_scores(folder: Folder, array: Any, start: tuple[int, int], part: np.ndarray) -> None:
    """Writes a part of what `score_array` made.

    Args:
      folder: where it is.
      array: the array.
      start: the first row and column.
      part: scores [rows, columns].

    Raises:
      StoreError: if they cannot be written.
    """
    try:
        rows, columns = (slice(a, a + b) for a, b in zip(start, part.shape, strict=True))
        array[rows, columns].write(part).result()
    except ValueError as error:
        raise StoreError(
            f"Cannot write scores to {folder.path}: {first_line(error)}. They are not whole: "
            "see that there is space left, and score again."
        ) from None


def finish_scores(folder: Folder) -> None:
    """Says that all that `score_array` made room for is written.

    Args:
      folder: where it is.
    """
    folder.delete(_UNFINISHED)


def save_rows(
    target: Folder,
    shape: tuple[int, int, int],
    dtype: Any,
    block: int,
    blocks: Iterable[np.ndarray],
    attributes: Mapping[str, Any],
) -> None:
    """Writes rows to a zarr array of their own, block by block.

    Args:
      target: where to; must be empty.
      shape: [n, c, width].
      dtype: of the array.
      block: rows per chunk.
      blocks: rows [block, c, width]; of the last, those past the end are left out.
      attributes: what the array says of itself, as JSON.

    Raises:
      StoreError: if something is there already, or it cannot be written.
    """
    if target.names():
        raise StoreError(f"{target.path} is not empty: give a new path for the copy.")
    spec = _spec(target, shape, dtype, (block, *shape[1:]), {"attributes": dict(attributes)})
    with writing(target.path):
        array = ts.open(spec, create=True).result()
        for number, rows in enumerate(blocks):
            start = number * block
            stop = min(start + block, shape[0])
            array[start:stop].write(rows[: stop - start]).result()


def _spec(
    folder: Folder, shape: Sequence[int], dtype: Any, chunk: Sequence[int], more: dict[str, Any]
) -> dict[str, Any]:
    """The TensorStore description of an array; chunks are no larger than it is."""
    chunks = [min(pair) for pair in zip(chunk, shape, strict=True)]
    metadata = {
        "shape": shape,
        "data_type": np.dtype(dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
    }
    return {"driver": "zarr3", "kvstore": folder.spec(""), "metadata": metadata | more}
