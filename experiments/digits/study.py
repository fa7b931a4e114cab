"""What weights do for an attribution method: measured against retrained models."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import jaxattr as ja
from experiments.digits import data, training
from experiments.digits.data import Digits
from experiments.digits.models import Model, make_model
from jaxattr import evaluation, scoring, weighting
from jaxattr.evaluation import LDS


@dataclasses.dataclass(frozen=True)
class Config:
    """Size of a study.

    Attributes:
      architectures: keys of `models.ARCHITECTURES`.
      train: training examples.
      queries: queries to learn from, and as many others to measure on.
      subsets: half-subsets to retrain on.
      seeds: models per subset.
      checkpoints: independently trained models that attribution averages over.
    """

    architectures: tuple[str, ...]
    train: int = 1000
    queries: int = 128
    subsets: int = 64
    seeds: int = 1
    checkpoints: int = 2


QUICK = Config(("vit", "resnet"), queries=100, subsets=32)
FULL = Config(("vit", "resnet", "mlp"), queries=256, subsets=256, seeds=2, checkpoints=4)

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


class Truth(NamedTuple):
    """What retrained models say.

    Attributes:
      masks: bool [subsets, n].
      learning: margins of the learning queries, [subsets, q].
      evaluation: margins of the evaluation queries, [subsets, q].
    """

    masks: np.ndarray
    learning: np.ndarray
    evaluation: np.ndarray


class Subject(NamedTuple):
    """An architecture with everything that is measured on it.

    Attributes:
      model: the network.
      digits: the images.
      truth: outputs of models retrained on subsets.
      checkpoints: models trained on all training examples.
      states: the optimizer's state at the end of each.
      misled: models trained with a tenth of the labels flipped.
      mislabelled: the training set with the flipped labels.
      flipped: which were flipped, bool [n].
    """

    model: Model
    digits: Digits
    truth: Truth
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
    fit: ja.WeightFit


def prepare(name: str, config: Config, folder: Path) -> Subject:
    """Trains what is needed; subsets are trained once and then read from `folder`.

    Args:
      name: key of `models.ARCHITECTURES`.
      config: size of the study.
      folder: where ground truth is kept.

    Returns:
      The subject.
    """
    model, digits = make_model(name), data.load(config.train, config.queries, config.queries)
    labels, flipped = evaluation.flip_labels(jax.random.key(3), digits.train["label"], classes=10)
    mislabelled = digits.train | {"label": labels}
    return Subject(
        model,
        digits,
        _truth(model, digits, config, folder),
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
    fit = ja.learn_weights(index, learning)
    alone = evaluation.group_lds(index, learning, truth.masks, truth.learning)
    best = max(alone, key=lambda name: alone[name].mean)
    uniform = scoring.uniform_weights(index)
    weights = {
        "uniform": uniform,
        "unit RMS": weighting.unit_rms_weights(index, learning),
        "learned": fit.weights,
        "best group": dict.fromkeys(uniform, 0.0) | {best: 1.0},
        "upper bound": evaluation.upper_bound_weights(index, learning, truth.masks, truth.learning),
    }
    lds = dict(lds_of_weights(index, queries, truth, weights))
    groups = evaluation.group_lds(index, queries, truth.masks, truth.evaluation)
    return Result(
        lds=lds,
        difference=evaluation.paired_difference(lds["learned"], lds["uniform"]),
        auc=_mislabel_auc(subject, method, choice.groups, weights),
        weights=weights,
        group_lds={name: found.mean for name, found in groups.items()},
        fit=fit,
    )


def index_of(
    method: ja.Method, checkpoints: list[Any], train: data.Images, groups: Any = ja.by_leaf
) -> ja.Index:
    """Builds an index."""
    # As many per step as there are queries: one compiled program serves both.
    return ja.build_index(method, checkpoints, train, groups=groups, batch_size=100)


def lds_of_weights(
    index: ja.Index, queries: Any, truth: Truth, weights: dict[str, dict[str, float]]
) -> Iterator[tuple[str, LDS]]:
    """LDS for several weights at the cost of one.

    Args:
      index: the index.
      queries: the evaluation queries, or their features.
      truth: outputs of retrained models.
      weights: {name: weights}.

    Yields:
      Name and LDS.
    """
    sums = evaluation.subset_contributions(index, queries, truth.masks)  # [q, s, m]
    for name, w in weights.items():
        array = np.array([w[group] for group in index.layout.names])
        yield name, evaluation.lds_of_predictions(sums @ array, truth.evaluation)


def _mislabel_auc(
    subject: Subject, method: ja.Method, groups: Any, weights: dict[str, dict[str, float]]
) -> dict[str, float]:
    if method.rule.normalize or method.kernel.of_queries is not None:
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
    params, states = ja.retrain(train_fn, masks, jax.random.key(2), seeds=config.checkpoints)

    def seeds_of(tree: Any, row: int) -> list[Any]:
        seeds = range(config.checkpoints)
        return [jax.tree.map(lambda leaf, i=seed: leaf[row, i], tree) for seed in seeds]

    return seeds_of(params, 0), seeds_of(states, 0), seeds_of(params, 1)


def _truth(model: Model, digits: Digits, config: Config, folder: Path) -> Truth:
    settings = dataclasses.asdict(config) | {"architectures": model.name}
    settings |= {"learning_rate": model.recipe.learning_rate, "epochs": model.recipe.epochs}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"truth-{model.name}-{digest}.npz"
    if path.exists():
        stored = np.load(path)
        return Truth(*(stored[field] for field in Truth._fields))
    masks = ja.random_subsets(jax.random.key(0), config.train, config.subsets)
    params = ja.retrain(
        training.trainer(model, digits.train),
        masks,
        jax.random.key(1),
        seeds=config.seeds,
        at_once=64,
        mesh=jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,)),
    )
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), digits.learning, digits.evaluation)
    margins = np.asarray(evaluation.outputs(training.margin(model), params, both))
    truth = Truth(masks, *np.split(margins, 2, axis=1))
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **truth._asdict())
    partial.replace(path)
    return truth
