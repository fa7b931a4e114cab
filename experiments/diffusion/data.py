"""Images to train on: scikit-learn's digits, or two classes of CIFAR-10 from a file."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn import datasets

Images = dict[str, np.ndarray]
"""{"image": float32 [n, h, w, c] between -1 and 1, "label": int [n]}."""


class Data(NamedTuple):
    """Real images, split once and for all.

    Attributes:
      train: what models are trained on, and what is attributed to.
      learning: held-out queries that weights are learned from.
      evaluation: held-out queries that everything is measured on.
      spare: the rest.
    """

    train: Images
    learning: Images
    evaluation: Images
    spare: Images


def load(path: Path | None, train: int, queries: int) -> Data:
    """Loads images; the same split whenever the sizes are the same.

    Args:
      path: of an .npz file with x_train uint8 [n, 32, 32, 3], y_train, x_test and y_test. Default:
        the digits that come with scikit-learn, 8x8.
      train: number of training images.
      queries: number of queries of either kind.

    Returns:
      The parts, without overlap.

    Raises:
      ValueError: if the file holds something else, or there are too few images.
    """
    images, labels = _digits() if path is None else _read(path)
    order = np.random.default_rng(0).permutation(len(labels))
    ends = np.cumsum([train, queries, queries])
    if ends[-1] > len(labels):
        raise ValueError(f"There are {len(labels)} images, asked for {ends[-1]}.")
    parts = np.split(order, ends)
    return Data(*({"image": images[part], "label": labels[part]} for part in parts))


def _digits() -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = datasets.load_digits(return_X_y=True)
    return (pixels / 8 - 1).reshape(-1, 8, 8, 1).astype(np.float32), labels


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.exists():
        raise ValueError(f"There is no file {path}.")
    with np.load(path) as stored:
        missing = {"x_train", "y_train", "x_test", "y_test"} - set(stored.files)
        if missing:
            raise ValueError(f"{path} has no {', '.join(sorted(missing))}.")
        images = np.concatenate([stored["x_train"], stored["x_test"]])
        labels = np.concatenate([stored["y_train"], stored["y_test"]])
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f"{path} must hold images uint8 [n, h, w, c], got {images.dtype} {list(images.shape)}."
        )
    return (images / 127.5 - 1).astype(np.float32), labels.reshape(-1)
