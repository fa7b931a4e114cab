"""The 1,797 handwritten digits that come with scikit-learn, in three parts."""

from typing import NamedTuple

import numpy as np
from sklearn import datasets

Images = dict[str, np.ndarray]
"""{"image": float32 [n, 8, 8], pixels of about unit variance; "label": int [n]}."""


class Digits(NamedTuple):
    """Real images, split once and for all.

    Attributes:
      train: what models are trained on, and what is attributed to.
      learning: queries that weights are learned from.
      evaluation: queries that everything is measured on.
    """

    train: Images
    learning: Images
    evaluation: Images


def load(train: int = 1000, learning: int = 128, evaluation: int = 128) -> Digits:
    """Loads the digits; the same split whenever the sizes are the same.

    Args:
      train: number of training examples.
      learning: number of queries to learn weights from.
      evaluation: number of queries to measure on.

    Returns:
      The three parts, without overlap.
    """
    pixels, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    ends = np.cumsum([train, learning, evaluation])
    if ends[-1] > len(labels):
        raise ValueError(f"There are {len(labels)} digits, asked for {ends[-1]}.")
    images = ((pixels - pixels.mean()) / pixels.std()).reshape(-1, 8, 8).astype(np.float32)
    parts = np.split(order[: ends[-1]], ends[:-1])
    return Digits(*({"image": images[part], "label": labels[part]} for part in parts))
