"""Arrays in a folder of their own, for other readers of zarr: scores, and copies of features."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from jaxattr.store.folder import Folder, StoreError, cannot_write, first_line

# Is there while scores are written.
_UNFINISHED = "unfinished.json"


def score_array(
    folder: Folder, queries: int, size: int, block: int, dtype: Any, create: bool
) -> Any:
    """Makes an array [q, n] for scores, or opens it.

    Args:
      folder: where; must be empty, or hold scores that were not finished, which are deleted.
      queries: q.
      size: n.
      block: columns per chunk.
      dtype: of the scores.
      create: whether to make it.

    Returns:
      A TensorStore, NaN where nothing was written.

    Raises:
      StoreError: if something is there already, or it cannot be written.
    """
    if create:
        if folder.names() and folder.read(_UNFINISHED) is None:
            raise StoreError(f"{folder.path} is not empty: give a new path for the scores.")
        folder.delete_under("")  # what a killed run left
        folder.write(_UNFINISHED, {"queries": queries, "examples": size})
    metadata = {
        "shape": [queries, size],
        "data_type": np.dtype(dtype).name,
        "fill_value": math.nan,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [queries, min(block, size)]},
        },
    }
    spec = {"driver": "zarr3", "kvstore": folder.spec("")}
    try:
        return ts.open(spec | {"metadata": metadata}, create=create, open=not create).result()
    except ValueError as error:
        raise cannot_write(folder.path, error) from None


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


def copy_array(folder: Folder, name: str, target: Folder, attributes: Mapping[str, Any]) -> None:
    """Copies an array of an index to a folder of its own, where any reader of zarr finds it.

    Args:
      folder: of the index.
      name: of the array.
      target: where to; must be empty.
      attributes: what the copy says of itself, as JSON.

    Raises:
      StoreError: if something is there already, or it cannot be written.
    """
    _refuse_contents(target)
    spec = {"driver": "zarr3", "kvstore": folder.spec(name)}
    try:
        source = ts.open(spec, open=True).result()
        metadata = source.spec().to_json()["metadata"] | {"attributes": dict(attributes)}
        made = {"driver": "zarr3", "kvstore": target.spec(""), "metadata": metadata}
        ts.open(made, create=True).result().write(source).result()
    except ValueError as error:
        raise cannot_write(target.path, error) from None


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
    _refuse_contents(target)
    grid = {"name": "regular", "configuration": {"chunk_shape": [min(block, shape[0]), *shape[1:]]}}
    metadata = {
        "shape": shape,
        "data_type": np.dtype(dtype).name,
        "chunk_grid": grid,
        "attributes": dict(attributes),
    }
    spec = {"driver": "zarr3", "kvstore": target.spec(""), "metadata": metadata}
    try:
        array = ts.open(spec, create=True).result()
        for number, rows in enumerate(blocks):
            start = number * block
            stop = min(start + block, shape[0])
            array[start:stop].write(rows[: stop - start]).result()
    except ValueError as error:
        raise cannot_write(target.path, error) from None


def _refuse_contents(target: Folder) -> None:
    if target.names():
        raise StoreError(f"{target.path} is not empty: give a new path for the copy.")
