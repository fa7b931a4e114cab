"""Has the model learned to draw what it is asked for? Classifiers of drawn pictures say so."""

from typing import Any, NamedTuple

import numpy as np
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from experiments.attributes.drawing import Pictures


class Recognised(NamedTuple):
    """How often a classifier of an attribute is right.

    Attributes:
      drawn: of pictures that were drawn and not learned from.
      generated: of pictures that the model made, the attribute being what was asked for.
      chance: one over the number of values.
    """

    drawn: float
    generated: float
    chance: float


def recognised(
    train: Pictures, drawn: Pictures, generated: Pictures, name: str, values: int
) -> Recognised:
    """Trains a classifier of one attribute on the pixels of training pictures, and asks it.

    Args:
      train: the training pictures.
      drawn: other pictures that were drawn.
      generated: pictures that the model made.
      name: of the attribute.
      values: how many it has.

    Returns:
      How often it is right.
    """
    classifier = make_pipeline(StandardScaler(), SVC(C=10))
    classifier.fit(_pixels(train), train[name])

    def right(pictures: Pictures) -> float:
        return float(np.mean(classifier.predict(_pixels(pictures)) == pictures[name]))

    return Recognised(right(drawn), right(generated), 1 / values)


def _pixels(pictures: Pictures) -> Any:
    return pictures["image"].reshape(len(pictures["image"]), -1)
