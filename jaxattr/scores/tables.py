"""The strongest training examples as long tables, with the names that users have for them."""

import csv
import importlib
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from jaxattr.files import written_whole
from jaxattr.markup import number, table

SHOWN = 10
"""Queries, and training examples of each, that a notebook shows."""


def columns(ids: Any, scores: Any, names: Sequence[Any] | None) -> dict[str, Any]:
    """Makes the columns of the long table.

    Args:
      ids: int [q, k]; -1 where there is none.
      scores: float [q, k].
      names: of the training examples, by position; None for none.

    Returns:
      {name: a value per row}, rows of one query together, strongest first.

    Raises:
      ValueError: if there are fewer names than training examples, or they are no sequence.
    """
    ids, scores = np.asarray(ids), np.asarray(scores)
    there = ids >= 0
    query, place = np.nonzero(there)
    made: dict[str, Any] = {"query": query, "rank": place + 1, "id": ids[there]}
    if names is not None:
        known, largest = listed_names(names), int(ids.max(initial=-1))
        if len(known) <= largest:
            raise ValueError(
                f"ids must name every training example: got {len(known)}, and the result holds "
                f"example {largest}."
            )
        made |= {"id": [known[position] for position in ids[there]], "position": ids[there]}
    return made | {"score": scores[there]}


def to_pandas(made: Mapping[str, Any]) -> Any:
    """Returns a `pandas.DataFrame`.

    Args:
      made: as `columns` makes it.

    Raises:
      ImportError: if pandas is not installed.
    """
    pandas, ids = _needed("pandas"), made["id"]
    if len(set(map(type, ids))) > 1:
        # Of whole numbers beside None or floats pandas makes floats, which round long ones.
        made = {**made, "id": pandas.Series(list(ids), dtype=object)}
    return pandas.DataFrame(dict(made))


def to_csv(made: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a file of comma-separated values, with a line of headings.

    Args:
      made: as `columns` makes it.
      path: of the file; one that is there is replaced.

    Raises:
      ValueError: if the path is that of a folder or a URL, or cannot be written.
    """
    with (
        written_whole(path) as partial,
        partial.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(made)
        writer.writerows(zip(*made.values(), strict=True))


def to_parquet(made: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a Parquet file.

    Args:
      made: as `columns` makes it.
      path: of the file; one that is there is replaced.

    Raises:
      ImportError: if pyarrow is not installed.
      ValueError: if ids are of several types, or the path cannot be written.
    """
    arrow, parquet = _needed("pyarrow"), _needed("pyarrow.parquet")
    try:
        rows = arrow.table(dict(made))
    except arrow.ArrowException as error:
        raise ValueError(
            f"ids must be of one type that Parquet knows, such as all strings: {error}."
        ) from error
    with written_whole(path) as partial:
        parquet.write_table(rows, partial)


def to_html(ids: np.ndarray, scores: np.ndarray) -> str:
    """Makes a table for a notebook: the first queries, a row each.

    Args:
      ids: [q, k].
      scores: [q, k].
    """
    q, k = ids.shape
    shown = min(k, SHOWN)
    rows = [
        (query, *(_cell(*pair) for pair in zip(ids[query, :shown], scores[query], strict=False)))
        for query in range(min(q, SHOWN))
    ]
    headings = ["query", *(f"rank {rank}" for rank in range(1, shown + 1))]
    more = f"; the first {len(rows)} and {shown} are shown" if q > SHOWN or k > SHOWN else ""
    caption = f"{k} strongest training examples of {q} queries, as #id: score{more}"
    return table(headings, rows, caption)


def listed_names(names: Any) -> list[Any]:
    """Returns a user's names of training examples in their order, each as it is.

    Args:
      names: a sequence, or an array or column of one axis.

    Raises:
      ValueError: if they are anything else, such as a set, which has no order.
    """
    ordered = hasattr(names, "__len__") and hasattr(names, "__getitem__")
    if not ordered or isinstance(names, str | bytes | Mapping) or getattr(names, "ndim", 1) != 1:
        shape = f" of {names.ndim} axes" if hasattr(names, "ndim") else ""
        raise ValueError(
            "ids must be a sequence with a name for each training example, in the order of the "
            f"training data; got a {type(names).__name__}{shape}. Make a list of them."
        )
    return list(names)


def _cell(position: int, score: float) -> str:
    return f"#{position}: {number(score)}" if position >= 0 else "none"


def _needed(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"This table needs {package}, which is not installed: pip install 'jaxattr[tables]'. "
            "TopK.to_csv needs no package."
        ) from error
