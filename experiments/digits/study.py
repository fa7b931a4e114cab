"""What weights do for an attribution method: measured against retrained models."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxattr as ja
from experiments import ground_truth
from experiments.digits import data, training
from experiments.digits.data import Digits
from experiments.digits.models import Model, make_model
from experiments.ground_truth import Truth
from jaxattr import evaluation
from jaxattr.evaluation import LDS
from jaxattr.kernels import MapsQueries
from jaxattr.weights.report import WeightFit


@dataclasses.dataclass(frozen=True)
class Config:
    """Size of a study.

    Attributes:
      architectures: keys of `models.ARCHITECTURES`.
      train: training examples.
      queries: queries to learn from, and as many others to measure on.
      subsets: half-subsets to retrain on.
      outcomes: models retrained on quarters, which weights are learned from.
      copies: noised training examples, which they are learned from too.
      seeds: models per subset.
      checkpoints: independently trained models that attribution averages over.
    """

    architectures: tuple[str, ...]
    train: int = 600
    queries: int = 128
    subsets: int = 64
    outcomes: int = 64
    copies: int = 128
    seeds: int = 1
    checkpoints: int = 2


QUICK = Config(("vit", "resnet"))
FULL = Config(
    ("vit", "resnet", "mlp"), train=1000, queries=256, subsets=256, seeds=2, checkpoints=4
)

EXACT = ja.projections.identity()  # these networks are small enough


class Choice(NamedTuple):
    """A method of the study.

    Attributes:
      make: a subject to the method.
      groups: what gets a weight of its own.
    """

    make: Callable[["Subject"], ja.Method]
    groups: Any = ja.by_leaf


METHODS: dict[str, Choice] = {
    "TracIn": Choice(lambda s: ja.tracin(training.loss(s.model), projection=EXACT)),
    "GradCos": Choice(lambda s: ja.grad_cos(training.loss(s.model), projection=EXACT)),
    "TRAK": Choice(
        lambda s: ja.trak(training.margin(s.model), projection=ja.projections.rademacher(256))
    ),
}
# These take a kernel and its bias as one matrix, so weights are by layer.
CURVATURE: dict[str, Choice] = {
    "LoGRA": Choice(lambda s: ja.logra(training.loss(s.model), rank=16), ja.by_layer),
    "LoGRA-PCA": Choice(
        lambda s: ja.logra(training.loss(s.model), rank=16, basis="pca"), ja.by_layer
    ),
    "TrackStar": Choice(
        lambda s: ja.trackstar(
            training.loss(s.model), s.states, s.checkpoints[0], rank=16, queries=s.digits.learning
        ),
        ja.by_layer,
    ),
    "K-FAC": Choice(lambda s: ja.kfac(training.loss(s.model)), ja.by_layer),
    "EK-FAC": Choice(lambda s: ja.ekfac(training.loss(s.model)), ja.by_layer),
    "EK-FAC, true Fisher": Choice(
        lambda s: ja.ekfac(training.loss(s.model), fisher="true", sample=training.sample(s.model)),
        ja.by_layer,
    ),
    "EK-FAC, 2x2 bands": Choice(lambda s: ja.ekfac(training.loss(s.model), bands=2), ja.by_layer),
    "DataInf": Choice(lambda s: ja.data_inf(training.loss(s.model), projection=EXACT), ja.by_layer),
}


class Subject(NamedTuple):
    """An architecture with everything that is measured on it.

    Attributes:
      model: the network.
      digits: the images.
      truth: outputs of models retrained on halves.
      outcomes: of models retrained on quarters, on the learning queries.
      copies: noised training examples, and their ids.
      checkpoints: models trained on all training examples.
      states: the optimizer's state at the end of each.
      misled: models trained with a tenth of the labels flipped.
      mislabelled: the training set with the flipped labels.
      flipped: which were flipped, bool [n].
    """

    model: Model
    digits: Digits
    truth: Truth
    outcomes: ja.Outcomes
    copies: tuple[Any, np.ndarray]
    checkpoints: list[Any]
    states: list[Any]
    misled: list[Any]
    mislabelled: data.Images
    flipped: np.ndarray


class Result(NamedTuple):
    """One method on one architecture.

    Attributes:
      lds: {name of weights: LDS on the evaluation queries}.
      difference: learned minus uniform.
      auc: {name of weights: AUC of finding flipped labels}; empty for a method that scales examples
        to unit norm, where self-influence says nothing.
      weights: {name of weights: {group: weight}}.
      group_lds: {group: LDS of its contributions alone}.
      fit: what learning reported.
    """

    lds: dict[str, LDS]
    difference: evaluation.Difference
    auc: dict[str, float]
    weights: dict[str, dict[str, float]]
    group_lds: dict[str, float]
    fit: WeightFit


def prepare(name: str, config: Config, folder: Path, images: Digits | None = None) -> Subject:
    """Trains what is needed; subsets are trained once and then read from `folder`.

    Args:
      name: key of `models.ARCHITECTURES`.
      config: size of the study.
      folder: where ground truth is kept.
      images: other than the digits.

    Returns:
      The subject.
    """
    model = make_model(name)
    digits = images or data.load(config.train, config.queries, config.queries)
    labels, flipped = evaluation.flip_labels(
        jax.random.key(3), digits.train["label"], classes=int(digits.train["label"].max()) + 1
    )
    mislabelled = digits.train | {"label": labels}
    return Subject(
        model,
        digits,
        _truth(model, digits, config, folder),
        _outcomes(model, digits, config, folder),
        _copies(digits.train, config),
        *_checkpoints(model, digits.train, mislabelled, config),
        mislabelled,
        flipped,
    )


def measure(subject: Subject, choice: Choice) -> Result:
    """Runs one method, with and without weights.

    Args:
      subject: the architecture.
      choice: the attribution method.

    Returns:
      The figures.
    """
    digits, truth = subject.digits, subject.truth
    method = choice.make(subject)
    index = index_of(method, subject.checkpoints, digits.train, choice.groups)
    learning = ja.query_features(index, digits.learning)
    queries = ja.query_features(index, digits.evaluation)
    found = ground_truth.compare(
        index, learning, queries, truth, outcomes=subject.outcomes, copies=subject.copies
    )
    groups = evaluation.group_lds(index, queries, truth.masks, truth.evaluation, resamples=1)
    return Result(
        lds=found.lds,
        difference=found.difference,
        auc=_mislabel_auc(subject, method, choice.groups, found.weights),
        weights=found.weights,
        group_lds={name: lds.mean for name, lds in groups.items()},
        fit=found.fit,
    )


def index_of(
    method: ja.Method, checkpoints: list[Any], train: data.Images, groups: Any = ja.by_leaf
) -> ja.Index:
    """Builds an index."""
    # As many per step as there are queries: one compiled program serves both.
    return ja.build_index(method, checkpoints, train, groups=groups, batch_size=128)


def _mislabel_auc(
    subject: Subject, method: ja.Method, groups: Any, weights: dict[str, dict[str, float]]
) -> dict[str, float]:
    if method.rule.normalize or isinstance(method.kernel, MapsQueries):
        return {}  # unit vectors: self-influence is one for all
    misled = index_of(method, subject.misled, subject.mislabelled, groups)
    return {
        name: ja.evaluation.mislabel_auc(
            ja.self_influence(misled, weights=weights[name]), subject.flipped
        )
        for name in ("uniform", "learned")
    }


def _checkpoints(
    model: Model, train: data.Images, mislabelled: data.Images, config: Config
) -> tuple[list[Any], list[Any], list[Any]]:
    """Trains on all examples with right and with flipped labels, both in one call.

    Returns:
      Models and optimizer states with right labels, and models with flipped ones.
    """
    n = len(train["label"])
    both = {name: np.concatenate([train[name], mislabelled[name]]) for name in train}
    masks = np.repeat(np.eye(2, dtype=bool), n, axis=1)
    train_fn = training.trainer(model, both, state=True)
    trained = ja.retrain(train_fn, masks, jax.random.key(2), seeds=config.checkpoints)
    params, states = jax.device_get(trained)  # slices of what is on a device are compiled, each

    def seeds_of(tree: Any, row: int) -> list[Any]:
        seeds = range(config.checkpoints)
        own = [jax.tree.map(lambda leaf, i=seed: leaf[row, i], tree) for seed in seeds]
        return jax.device_put(own)

    return seeds_of(params, 0), seeds_of(states, 0), seeds_of(params, 1)


def _copies(train: data.Images, config: Config) -> tuple[data.Images, np.ndarray]:
    ids = np.random.default_rng(5).choice(config.train, config.copies, replace=False)
    return ja.noised(train, ids, jax.random.key(5)), ids


def _outcomes(model: Model, digits: Digits, config: Config, folder: Path) -> ja.Outcomes:
    return ja.outcomes(
        training.trainer(model, digits.train),
        training.margin(model),
        digits.learning,
        config.train,
        key=jax.random.key(6),
        models=config.outcomes,
        at_once=64,
        mesh=ground_truth.mesh_of_devices(),
        path=folder / f"outcomes-{model.name}-{_digest(model, config)}.npz",
    )


def _digest(model: Model, config: Config) -> str:
    settings = dataclasses.asdict(config) | {"architectures": model.name}
    settings |= {"learning_rate": model.recipe.learning_rate, "epochs": model.recipe.epochs}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _truth(model: Model, digits: Digits, config: Config, folder: Path) -> Truth:
    path = folder / f"truth-{model.name}-{_digest(model, config)}.npz"

    def make() -> Truth:
        return ground_truth.retrained(
            training.trainer(model, digits.train),
            ja.evaluation.random_subsets(jax.random.key(0), config.train, config.subsets),
            jax.random.key(1),
            training.margin(model),
            digits.learning,
            digits.evaluation,
            seeds=config.seeds,
            at_once=64,
        )

    return ground_truth.load_or_make(path, make)
