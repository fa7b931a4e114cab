"""Packed rows of an invented language in files, read one at a time, as a pod's hosts do."""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.pod.model import VOCABULARY
from jaxattr import language

LENGTH, TOPICS = 16, 8


class RowFiles:
    """Rows in .npy files, a random-access source as grain's `MapDataset.source` takes them.

    Attributes:
      read: positions that were read, in turn.
    """

    def __init__(self, folder: Path, seconds: float = 0.0) -> None:
        """Opens the files; reading a row takes at least so many seconds, as from a bucket."""
        self._columns = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
        self._seconds = seconds
        self.read: list[int] = []

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self._columns["inputs"])

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        """Returns one row."""
        time.sleep(self._seconds)
        self.read.append(index)
        return {name: np.array(self._columns[name][index]) for name in sorted(self._columns)}


def packed(count: int, seed: int) -> language.Rows:
    """Makes rows of documents, each about one of a few topics: which token follows which.

    Args:
      count: rows.
      seed: of the documents; topics are the same for all.

    Returns:
      Packed rows, [count, LENGTH] each.
    """
    follows = np.random.default_rng(0).integers(1, VOCABULARY, (TOPICS, VOCABULARY, 2))
    numbers, documents = np.random.default_rng(seed), list[list[int]]()
    for _ in range(4 * count):  # each fills a quarter of a row, at least
        document, topic = [int(numbers.integers(1, VOCABULARY))], numbers.integers(TOPICS)
        for choice in numbers.integers(0, 2, numbers.integers(LENGTH // 4, 2 * LENGTH)):
            document.append(int(follows[topic, document[-1], choice]))
        documents.append(document)
    made = language.packed(documents, LENGTH, vocabulary=VOCABULARY)
    return {name: column[:count] for name, column in made.items()}


def write(rows: language.Rows, folder: Path) -> None:
    """Writes rows where `RowFiles` reads them.

    Args:
      rows: packed rows.
      folder: a new one.
    """
    folder.mkdir(parents=True)
    for name, column in rows.items():
        np.save(folder / f"{name}.npy", column)
