"""Which training pictures gave a generated picture its subject, its style, its background?

Weights are learned for each attribute by itself, from queries that ask for that attribute alone.
They are judged on pictures that were asked for with all three: do the strongest proponents under
the weights of one attribute share that attribute? The parameters that hold the labels, one vector
for each value of an attribute, are left out: they would answer by the label alone.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxattr as ja
from experiments import checkpoints
from experiments.attributes import drawing, recognition
from experiments.attributes.drawing import Pictures
from experiments.attributes.recognition import Recognised
from experiments.diffusion import process, schedule, training
from experiments.diffusion.training import Recipe
from experiments.diffusion.unet import Model, UNetConfig, make_model
from jaxattr import diffusion, evaluation
from jaxattr.diffusion import Denoiser
from jaxattr.index.queries import QueryFeatures
from jaxattr.typing import GroupWeights
from jaxattr.weights.report import WeightFit

VALUES = {
    "subject": drawing.SUBJECTS,
    "style": drawing.STYLES,
    "background": drawing.BACKGROUNDS,
}
ATTRIBUTES = tuple(VALUES)
# The value that stands for "not asked for".
OPEN = {name: len(values) for name, values in VALUES.items()}
TOP = 10
# Of the sampler.
STEPS, GUIDANCE = 25, 2.0
# The parameters that are labels: a vector for each value of an attribute.
LABELS = "^conditions/"


@dataclasses.dataclass(frozen=True)
class Config:
    """Size of the study.

    Attributes:
      train: training pictures.
      repeats: queries to learn from for each value of each attribute.
      full: generated pictures with all three attributes, to measure on.
      spare: drawn pictures that nothing is learned from, to see whether pictures are recognised.
      checkpoints: models, that scores are averaged over.
      timesteps: at which features are taken.
      dim: of the projection of each parameter array.
      unet: shape of the network.
      recipe: how it is trained.
    """

    train: int = 1500
    repeats: int = 8
    full: int = 96
    spare: int = 300
    checkpoints: int = 1
    timesteps: int = 6
    dim: int = 128
    unet: UNetConfig = UNetConfig(
        3, (48, 96), patch=2, conditions=tuple(OPEN.items()), predicts_image=True
    )
    recipe: Recipe = Recipe(6000, 32, 3e-3, 0.998, dropped=0.3)


QUICK = Config()
FULL = dataclasses.replace(
    QUICK, train=3000, repeats=16, full=192, timesteps=12, dim=256,
    recipe=QUICK.recipe._replace(steps=10_000, learning_rate=2e-3, averaging=0.999),
)  # fmt: skip


class Subject(NamedTuple):
    """A conditional model with everything that is measured on it.

    Attributes:
      model: the network.
      denoiser: the same for `jaxattr`.
      train: the training pictures.
      checkpoints: the trained models.
      learning: {attribute: generated queries that ask for it alone, to learn weights from; "all":
        the same that ask for all attributes}.
      full: generated pictures that were asked for with all attributes.
      recognised: {attribute: how often a classifier sees in those what was asked for}.
    """

    model: Model
    denoiser: Denoiser
    train: Pictures
    checkpoints: list[Any]
    learning: dict[str, Pictures]
    full: Pictures
    recognised: dict[str, Recognised]


def prepare(config: Config, folder: Path) -> Subject:
    """Trains the model, once, and generates the queries.

    Args:
      config: size of the study.
      folder: where the model is kept.

    Returns:
      The subject.
    """
    model, train = make_model(config.unet), drawing.draw(config.train, 0)
    settings = json.dumps([config.train, config.checkpoints, config.unet, config.recipe])
    path = folder / f"model-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    keys = jax.random.split(jax.random.key(0), config.checkpoints)
    trainee = make_model(config.unet._replace(patches=False))  # the same, faster to train alone
    trained = checkpoints.load_or_train(
        path,
        [jax.eval_shape(model.init, key) for key in keys],
        lambda: [training.train_one(trainee, train, config.recipe, key) for key in keys],
    )
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained)):
        raise ValueError(f"The model at {path} has parameters that are not finite: it diverged.")
    generate = Generator(model, trained[0])
    asked = drawing.draw(config.full, 1)
    full = generate(asked, 1)
    spare = drawing.draw(config.spare, 2)
    return Subject(
        model=model,
        denoiser=process.denoiser(model),
        train=train,
        checkpoints=trained,
        learning={name: generate.alone(name, config.repeats) for name in ATTRIBUTES}
        | {"all": generate(drawing.draw(config.full // 2, 3), 2 + len(ATTRIBUTES))},
        full=full,
        recognised={
            name: recognition.recognised(train, spare, full, name, OPEN[name])
            for name in ATTRIBUTES
        },
    )


class Generator(NamedTuple):
    """Makes queries.

    Attributes:
      model: the network.
      params: its parameters.
    """

    model: Model
    params: Any

    def __call__(self, asked: Mapping[str, np.ndarray], seed: int) -> Pictures:
        """Generates a picture for each request, of which the attributes matter alone."""
        count = len(asked[ATTRIBUTES[0]])
        noise = jax.random.normal(jax.random.key(seed), (count, drawing.SIZE, drawing.SIZE, 3))
        asked = {name: np.asarray(asked[name], np.int32) for name in ATTRIBUTES}
        made = process.sample(
            self.model, self.params, noise, jax.tree.map(jnp.asarray, asked), STEPS, GUIDANCE
        )
        return {"image": np.asarray(made.image), **asked}

    def alone(self, name: str, repeats: int) -> Pictures:
        """Generates pictures with each value of one attribute, the others left open."""
        values = np.repeat(np.arange(OPEN[name], dtype=np.int32), repeats)
        return self(_alone(name, values), 2 + ATTRIBUTES.index(name))


def ask_alone(queries: Pictures, name: str) -> Pictures:
    """Leaves all attributes of queries open but one.

    Args:
      queries: pictures with attributes.
      name: of the attribute that stays.

    Returns:
      The same pictures.

    Raises:
      ValueError: if there is no query, or one has no value for the attribute.
    """
    missing = [attribute for attribute in ATTRIBUTES if attribute not in queries]
    if missing:
        raise ValueError(f"The queries have no {' and no '.join(missing)}.")
    if not len(queries[name]):
        raise ValueError(f"There are no queries for {name}: nothing to learn weights from.")
    left_open = np.flatnonzero(queries[name] == OPEN[name])
    if len(left_open):
        raise ValueError(
            f"{len(left_open)} queries leave {name} open, at positions {left_open[:10].tolist()}: "
            f"they ask for nothing that {name} could be attributed by."
        )
    return queries | _alone(name, queries[name])


def _alone(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """Values of one attribute, the others left open."""
    return {other: np.full_like(values, OPEN[other]) for other in ATTRIBUTES} | {name: values}


def methods(denoiser: Denoiser, config: Config) -> dict[str, ja.Method]:
    """Makes the methods that are compared.

    Args:
      denoiser: the model.
      config: size of the study.

    Returns:
      {name: method}.
    """
    timesteps = range(schedule.STEPS // config.timesteps // 2, schedule.STEPS,
                      schedule.STEPS // config.timesteps)  # fmt: skip
    projection = ja.projections.rademacher(config.dim)
    even = ja.expectation(diffusion.loss(denoiser), timesteps=timesteps, unit_norm=True)
    squares = ja.expectation(diffusion.output(denoiser), timesteps=timesteps)
    means = ja.expectation(diffusion.output(denoiser, "mean"), timesteps=timesteps, unit_norm=True)
    return {
        "TracIn, even": ja.tracin(even, projection=projection),
        "D-TRAK": ja.d_trak(squares, projection=projection),
        "DAS": ja.das(means, projection=projection),
    }


class Retrieval(NamedTuple):
    """How many of the strongest proponents share an attribute, one number per query.

    Attributes:
      precision: share of the top 10 that does, [q].
      hit: whether any of them does, [q].
      recall: share of all training pictures that share it which are in the top 10, [q].
    """

    precision: np.ndarray
    hit: np.ndarray
    recall: np.ndarray


def retrieval(scores: Any, train: Pictures, queries: Pictures, name: str) -> Retrieval:
    """Measures scores against one attribute.

    Args:
      scores: float [q, n].
      train: the training pictures.
      queries: with a value for the attribute.
      name: of the attribute.
    """
    relevant = queries[name][:, None] == train[name][None]
    return Retrieval(
        evaluation.precision_at_k(scores, relevant, TOP),
        evaluation.hit_at_k(scores, relevant, TOP),
        evaluation.recall_at_k(scores, relevant, TOP),
    )


class Gain(NamedTuple):
    """Precision under some weights minus precision under others, by query.

    Attributes:
      mean: over queries.
      low: 2.5 % quantile of the mean over resampled queries.
      high: 97.5 % quantile.
    """

    mean: float
    low: float
    high: float


class Result(NamedTuple):
    """One method.

    Attributes:
      table: {what scores: {attribute: retrieval on the fully specified pictures}}.
      fits: {attribute: its weights; "all": weights that know of no attribute}.
    """

    table: dict[str, dict[str, Retrieval]]
    fits: dict[str, WeightFit]

    @property
    def gains(self) -> dict[str, dict[str, Gain]]:
        """{what is compared: {attribute: what the first of the two gain}}."""
        own = {name: self.table[f"w_{name}"][name] for name in ATTRIBUTES}
        alone = self.table["own w, attribute alone"], self.table["uniform, attribute alone"]
        return {
            "own w - uniform": _gains(own, self.table["uniform"]),
            "own w - uniform, attribute alone": _gains(*alone),
            "w_all - uniform": _gains(self.table["w_all"], self.table["uniform"]),
            "own w - w_all": _gains(own, self.table["w_all"]),
        }


def _gains(some: dict[str, Retrieval], others: dict[str, Retrieval]) -> dict[str, Gain]:
    found = {}
    for name in ATTRIBUTES:
        paired = some[name].precision - others[name].precision
        found[name] = Gain(float(paired.mean()), *evaluation.mean_interval(paired))
    return found


def measure(subject: Subject, index: ja.Index) -> Result:
    """Learns weights for each attribute, and measures them on all.

    Args:
      subject: the model.
      index: of a method.

    Returns:
      The figures.
    """
    alone = {f"{name} alone": ask_alone(subject.full, name) for name in ATTRIBUTES}
    features = _features(index, subject.learning | {"full": subject.full} | alone)
    fits = {name: ja.learn_weights(index, features[name]) for name in subject.learning}

    full = features["full"]
    table = {"uniform": _of_all(subject, ja.score(index, full))}
    for name, fit in fits.items():
        table[f"w_{name}"] = _of_all(subject, ja.score(index, full, weights=fit.weights))
    scores = {name: ja.score(index, features[f"{name} alone"]) for name in ATTRIBUTES}
    table["uniform, attribute alone"] = _of_each(subject, scores)
    scores = {
        name: ja.score(index, features[f"{name} alone"], weights=fits[name].weights)
        for name in ATTRIBUTES
    }
    table["own w, attribute alone"] = _of_each(subject, scores)
    return Result(table, fits)


def baselines(subject: Subject) -> dict[str, dict[str, Retrieval]]:
    """Retrieval by similarity of the pictures, without attribution.

    Args:
      subject: the model.

    Returns:
      {kind of embedding: {attribute: retrieval}}.
    """
    pixels = [x["image"].reshape(len(x["image"]), -1) for x in (subject.full, subject.train)]
    middles = [_middle(subject, x["image"]) for x in (subject.full, subject.train)]
    scores = {
        "chance": _random_scores(subject),
        "pixels": _cosine(*pixels),
        "middle of the UNet": _cosine(*middles),
    }
    return {name: _of_all(subject, each) for name, each in scores.items()}


def index_of(subject: Subject, method: ja.Method, *, labels: bool = False) -> ja.Index:
    """Builds an index of the training pictures, with a group per parameter array.

    Args:
      subject: the model.
      method: of attribution.
      labels: whether the vectors that stand for the attributes' values are groups, too.
    """
    groups = functools.partial(ja.by_leaf, exclude=None if labels else LABELS)
    return ja.build_index(method, subject.checkpoints, subject.train, groups=groups, batch_size=50)


def relative_weights(weights: GroupWeights) -> dict[str, float]:
    """Base-2 logarithms of weights, for pictures; weights below 1/16 count as that."""
    return {name: float(np.log2(max(float(w), 1 / 16))) for name, w in weights.items()}


def _features(index: ja.Index, parts: dict[str, Pictures]) -> dict[str, QueryFeatures]:
    """Features of several sets of queries at once, so that one compiled program serves all."""
    names = ("image", *ATTRIBUTES)
    joined = {name: np.concatenate([part[name] for part in parts.values()]) for name in names}
    found = ja.query_features(index, joined)
    ends = np.cumsum([len(part["image"]) for part in parts.values()])
    split = {}
    for name, end in zip(parts, ends, strict=True):
        start = end - len(parts[name]["image"])
        lost = found.non_finite[(found.non_finite >= start) & (found.non_finite < end)] - start
        split[name] = found._replace(features=found.features[start:end], non_finite=lost)
    return split


def _of_each(subject: Subject, scores: dict[str, Any]) -> dict[str, Retrieval]:
    """Retrieval of each attribute on the fully specified pictures, by scores of its own."""
    return {
        name: retrieval(each, subject.train, subject.full, name) for name, each in scores.items()
    }


def _of_all(subject: Subject, scores: Any) -> dict[str, Retrieval]:
    """The same by the same scores for all."""
    return _of_each(subject, dict.fromkeys(ATTRIBUTES, scores))


def _middle(subject: Subject, images: np.ndarray) -> np.ndarray:
    """What the network sees in nearly clean images, nothing asked for."""
    count = len(images)
    asked = {name: jnp.full(count, values) for name, values in OPEN.items()}
    embed = jax.jit(subject.model.embed)
    timesteps = jnp.full(count, schedule.STEPS // 10)
    return np.asarray(embed(subject.checkpoints[0], jnp.asarray(images), timesteps, asked))


def _cosine(queries: np.ndarray, train: np.ndarray) -> np.ndarray:
    mean = train.mean(axis=0)
    pair = [x - mean for x in (queries, train)]
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in pair]
    return unit[0] @ unit[1].T


def _random_scores(subject: Subject) -> np.ndarray:
    shape = len(subject.full["image"]), len(subject.train["image"])
    return np.random.default_rng(0).random(shape)
