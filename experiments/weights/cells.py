"""What every kind of weights does for one method on one model: a row of the study's table."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats

import jaxattr as ja
from experiments import ground_truth
from experiments.ground_truth import Truth
from jaxattr import evaluation
from jaxattr.evaluation import LDS, Difference
from jaxattr.evaluation.retraining import TrainFn
from jaxattr.typing import OutputFn
from jaxattr.weights.report import Gain

MODELS = (64, 32, 16)


class Quarters(NamedTuple):
    """Models that weights are learned from, and others of the same kind.

    Attributes:
      outcomes: on the learning queries.
      fresh: of other models, on the evaluation queries: what `fit.gain` is an estimate for.
    """

    outcomes: ja.Outcomes
    fresh: ja.Outcomes


class Subject(NamedTuple):
    """A model with everything that is measured on it.

    Attributes:
      name: of the row.
      indexes: yields the name of a method and a function that builds its index.
      learning: queries to learn weights from.
      evaluation: queries to measure on.
      truth: outputs of models retrained on halves.
      quarters: outputs of models retrained on quarters.
      copies: noised training examples and their ids, or None.
    """

    name: str
    indexes: Callable[[], Iterator[tuple[str, Callable[[], ja.Index]]]]
    learning: Any
    evaluation: Any
    truth: Truth
    quarters: Quarters
    copies: tuple[Any, np.ndarray] | None


class Cell(NamedTuple):
    """One method on one model.

    Attributes:
      subject: name of the model.
      method: name of the method.
      groups: how many weights.
      lds: {kind of weights: LDS on the evaluation queries, against models of halves}.
      change: {kind of weights: its LDS minus that of uniform weights}.
      gain: {models: what the fit says that it gains}.
      fresh: {models: what it gains on other models of quarters, and the evaluation queries}.
    """

    subject: str
    method: str
    groups: int
    lds: dict[str, LDS]
    change: dict[str, Difference]
    gain: dict[int, Gain]
    fresh: dict[int, Difference]


def quarters(
    train_fn: TrainFn,
    output: OutputFn,
    learning: Any,
    evaluated: Any,
    n: int,
    path: Path,
    *,
    known: ja.Outcomes | None = None,
    **options: Any,
) -> Quarters:
    """Trains the models of quarters, once.

    Args:
      train_fn: as in `ja.outcomes`, as all that follow.
      output: see there.
      learning: queries to learn weights from.
      evaluated: queries to measure on.
      n: number of training examples.
      path: folder to keep outputs in.
      known: outcomes on the learning queries, if they are there.
      **options: see there.
    """
    options |= {"models": MODELS[0], "mesh": ground_truth.mesh_of_devices()}
    if known is None:
        known = ja.outcomes(
            train_fn, output, learning, n, key=jax.random.key(6), path=path / "learning.npz",
            **options,
        )  # fmt: skip
    fresh = ja.outcomes(
        train_fn, output, evaluated, n, key=jax.random.key(7), path=path / "fresh.npz", **options
    )
    return Quarters(known, fresh)


def first(outcomes: ja.Outcomes, models: int) -> ja.Outcomes:
    """The first of some models."""
    return ja.Outcomes(outcomes.masks[:models], outcomes.outputs[:models], outcomes.queries)


def measure(subject: Subject, method: str, index: ja.Index) -> Cell:
    """Learns all kinds of weights, and measures them.

    Args:
      subject: the model.
      method: name of the method.
      index: of the method.
    """
    learning = ja.query_features(index, subject.learning)
    queries = ja.query_features(index, subject.evaluation)
    truth, names = subject.truth, index.layout.names
    fits = {
        models: ja.learn_weights(
            index, learning, outcomes=first(subject.quarters.outcomes, models),
            copies=subject.copies,
        )
        for models in MODELS
    }  # fmt: skip
    weights = {
        "unit RMS": ground_truth.unit_rms_weights(index, learning),
        "paper": ja.learn_weights(index, learning).weights,
        **{f"R = {models}": fit.weights for models, fit in fits.items()},
        "fitted to truth": ja.learn_weights(
            index, learning, outcomes=ja.Outcomes(truth.masks, truth.learning)
        ).weights,
    }
    halves = _Predicted.of(index, queries, truth.masks)
    others = _Predicted.of(index, queries, subject.quarters.fresh.masks)
    base = halves.lds(np.ones(len(names)), truth.evaluation)
    lds = {"uniform": base}
    for kind, found in weights.items():
        lds[kind] = halves.lds(np.array([found[name] for name in names]), truth.evaluation)
    if index.link == "identity":
        parts = np.asarray(ja.contributions(index, queries))
        for kind, scores in aggregated(parts).items():
            lds[kind] = ja.lds(scores, truth.masks, truth.evaluation)
    output = subject.quarters.fresh.outputs
    same = others.lds(np.ones(len(names)), output)
    fresh = {
        models: evaluation.paired_difference(
            others.lds(np.array([fit.weights[name] for name in names]), output), same
        )
        for models, fit in fits.items()
    }
    return Cell(
        subject=subject.name,
        method=method,
        groups=len(names),
        lds=lds,
        change={kind: evaluation.paired_difference(each, base) for kind, each in lds.items()},
        gain={models: fit.gain for models, fit in fits.items() if fit.gain is not None},
        fresh=fresh,
    )


def aggregated(parts: np.ndarray) -> dict[str, np.ndarray]:
    """Scores by other ways of putting layers together than a weighted sum.

    Vitel and Chhabra (2025), arXiv:2511.04715: the mean of the ranks that each group gives; votes,
    of each group for its strongest tenth, which count by their place there. Deviation: groups of
    parameters where they have layers.

    Args:
      parts: contributions [q, n, m].

    Returns:
      {name: scores [q, n]}.
    """
    n = parts.shape[1]
    ranks = stats.rankdata(parts, axis=1)  # n for the strongest
    votes = np.maximum(ranks - (n - max(1, n // 10)), 0)
    return {"Rank": ranks.mean(axis=2), "Vote": votes.mean(axis=2)}


class _Predicted(NamedTuple):
    """What scores predict for subsets, as a function of the weights.

    Attributes:
      sums: [q, s, m], or of products [q, s, m, m].
    """

    sums: np.ndarray

    @classmethod
    def of(cls, index: ja.Index, queries: Any, masks: np.ndarray) -> "_Predicted":
        squared = index.link == "square"
        sums = evaluation.subset_products if squared else evaluation.subset_contributions
        return cls(sums(index, queries, masks))

    def lds(self, w: np.ndarray, outputs: np.ndarray) -> LDS:
        predicted = self.sums @ w
        return evaluation.lds_of_predictions(
            predicted if predicted.ndim == 2 else predicted @ w, outputs
        )
