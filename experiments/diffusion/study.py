"""How well each method predicts diffusion models that are trained on halves of the images.

One subject is a whole UNet, another the adapters beside a UNet that stays as it is. Queries are of
two kinds: images that the model generated, and images that it has not seen.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxattr as ja
from experiments import checkpoints, ground_truth
from experiments.diffusion import data, process, schedule, training
from experiments.diffusion.data import Data
from experiments.diffusion.training import Recipe
from experiments.diffusion.unet import Model, UNetConfig, make_model
from experiments.ground_truth import Comparison, Truth
from jaxattr import diffusion, evaluation
from jaxattr.diffusion import Denoiser
from jaxattr.evaluation import LDS
from jaxattr.index.queries import QueryFeatures
from jaxattr.typing import OutputFn

KINDS = ("generated", "held-out")
# The same seeds for all, so that models differ by their data and not by their luck.
TRAINING_SEED = 1
# Steps of the sampler.
JOURNEY = 50
ADAPTER_RANK = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """Size of the study.

    Attributes:
      train: training images.
      queries: of each kind and purpose.
      subsets: of half of the training images.
      seeds: models per subset.
      checkpoints: models trained on everything, that scores are averaged over.
      timesteps: at which features are taken.
      noises: per timestep, of the losses that are to be predicted.
      dim: of the projection of each parameter array.
      unet: shape of the network.
      recipe: how it is trained.
      adapters: the same for adapters.
      removals: generated images whose proponents are removed, one after the other.
      removed: proponents that are removed of each.
      removal_seeds: models that are retrained without them.
      at_once: models trained at once.
    """

    train: int = 400
    queries: int = 48
    subsets: int = 24
    seeds: int = 1
    checkpoints: int = 2
    timesteps: int = 10
    noises: int = 2
    dim: int = 256
    unet: UNetConfig = UNetConfig()
    recipe: Recipe = Recipe(500, learning_rate=3e-3)
    adapters: Recipe = Recipe(200, learning_rate=1e-2)
    removals: int = 4
    removed: int = 80
    removal_seeds: int = 1
    at_once: int = 24


QUICK = Config()
FULL = dataclasses.replace(QUICK, queries=96, subsets=48, removals=8)
# For --data cifar2.npz --full, on a GPU: 9.5 million parameters, data and subsets of Zheng et al.
CIFAR = dataclasses.replace(
    FULL, train=5000, queries=500, subsets=64, seeds=3, checkpoints=1, timesteps=10, dim=1024,
    unet=UNetConfig(3, (96, 192, 256), heads=8), removals=16, removed=1000, removal_seeds=3,
    recipe=Recipe(40_000, 128, 2e-4, 0.9999), adapters=Recipe(5_000, 64, 1e-3), at_once=1,
)  # fmt: skip


def config(*, full: bool, color: bool) -> Config:
    """Returns the size of a study.

    Args:
      full: whether it is the larger one.
      color: whether images are CIFAR-10's, 32x32 in colour, and not digits.
    """
    if not color:
        return FULL if full else QUICK
    small = QUICK.unet._replace(channels=3, widths=(32, 64), patch=4)
    return CIFAR if full else dataclasses.replace(QUICK, unet=small)


class Subject(NamedTuple):
    """A model with everything that is measured on it.

    Attributes:
      name: what tables show.
      model: the network.
      denoiser: the same for `jaxattr`, as a function of what is trained.
      train: the training images.
      checkpoints: models trained on all of them.
      learning: {kind: queries that weights are learned from}; the generated ones with trajectory.
      evaluation: {kind: queries that everything is measured on}.
      truth: {kind: outputs of models retrained on subsets}.
      train_fn: (key, ids) -> params.
      generate: (params, noise) -> samples.
    """

    name: str
    model: Model
    denoiser: Denoiser
    train: data.Images
    checkpoints: list[Any]
    learning: dict[str, dict[str, np.ndarray]]
    evaluation: dict[str, dict[str, np.ndarray]]
    truth: dict[str, Truth]
    train_fn: Callable[[jax.Array, jax.Array], Any]
    generate: Callable[[Any, jax.Array], process.Samples]


def prepare(name: str, found: Data, config: Config, folder: Path) -> Subject:
    """Trains what is needed; models are trained once and then read from `folder`.

    Args:
      name: "UNet", or "adapters" for low-rank adapters that learn the upper half of the labels
        beside a UNet that knows the lower half.
      found: the images.
      config: size of the study.
      folder: where models and ground truth are kept.

    Returns:
      The subject.
    """
    adapting = name == "adapters"
    cache, base, recipe = _Cache(folder, (name, config)), None, config.recipe
    if adapting:
        middle = np.median(found.train["label"])
        base = _base(config, _chosen(found.train, found.train["label"] < middle), cache)
        found = Data(*(_chosen(part, part["label"] >= middle) for part in found))
        recipe = config.adapters
    model = make_model(config.unet._replace(adapter_rank=ADAPTER_RANK if adapting else 0))
    train_fn = training.trainer(model, found.train, recipe, adapters_of=base)

    def whole(params: Any) -> Any:
        return params if base is None else (base, params)

    def generate(params: Any, noise: jax.Array) -> process.Samples:
        return process.sample(model, whole(params), noise, {}, JOURNEY)

    plain = process.denoiser(model)
    denoiser = plain._replace(predict=lambda params, *rest: plain.predict(whole(params), *rest))
    n = len(found.train["image"])
    trained = _whole_models(train_fn, n, config, cache)
    count = min(len(found.learning["image"]), len(found.evaluation["image"]))
    queries = _queries(
        generate, trained[0], found.learning["image"][:count], found.evaluation["image"][:count]
    )
    return Subject(
        name=name,
        model=model,
        denoiser=denoiser,
        train={"image": found.train["image"]},
        checkpoints=trained,
        learning={kind: pair[0] for kind, pair in queries.items()},
        evaluation={kind: pair[1] for kind, pair in queries.items()},
        truth=_truth(train_fn, denoiser, queries, n, config, cache),
        train_fn=train_fn,
        generate=generate,
    )


def quick(folder: Path) -> tuple[Data, Subject]:
    """The digits and the UNet of a quick study.

    Args:
      folder: for all that is trained.
    """
    found = data.load(None, QUICK.train, QUICK.queries)
    return found, prepare("UNet", found, QUICK, folder)


def held_out(subject: Subject) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Images that the model has not seen: to learn weights from, and to measure on.

    Args:
      subject: the model.
    """
    learning, evaluated = subject.learning["held-out"], subject.evaluation["held-out"]
    return images_of(learning), images_of(evaluated)


def _chosen(images: data.Images, mask: np.ndarray) -> data.Images:
    return {name: values[mask] for name, values in images.items()}


def methods(denoiser: Denoiser, config: Config) -> dict[str, ja.Method]:
    """Makes all methods.

    Args:
      denoiser: the model.
      config: size of the study.

    Returns:
      {name: method}.
    """
    timesteps = range(0, schedule.STEPS, schedule.STEPS // config.timesteps)

    def expected(name: Any, unit_norm: bool = False) -> OutputFn:
        output = diffusion.output(denoiser, name)
        return ja.expectation(output, timesteps=timesteps, unit_norm=unit_norm)

    loss, projection = expected("loss"), ja.projections.rademacher(config.dim)
    even, journey = expected("loss", unit_norm=True), diffusion.journey(denoiser, steps=JOURNEY)
    profile = diffusion.error_profile(denoiser, timesteps=range(5, schedule.STEPS, 20))
    mean = expected("mean", unit_norm=True)
    trak = ja.d_trak(loss, projection=projection)
    return {
        "TracIn": ja.tracin(loss, projection=projection),
        "TracIn, even": ja.tracin(even, projection=projection),
        "TRAK": dataclasses.replace(trak, name="TRAK"),
        "Journey-TRAK": ja.journey_trak(loss, journey, projection=projection),
        "D-TRAK": ja.d_trak(expected("squared_norm"), projection=projection),
        "DAS": ja.das(mean, residual=profile, projection=projection),
        "DAS, signed": ja.das(mean, residual=profile, link="identity", projection=projection),
    }


def index_of(subject: Subject, method: ja.Method) -> ja.Index:
    """Builds an index of the training images, with a group per parameter array."""
    return ja.build_index(method, subject.checkpoints, subject.train, **_index_options(subject))


def _index_options(subject: Subject) -> dict[str, Any]:
    # As many per step as there are queries: one compiled program serves both.
    block = len(subject.evaluation["held-out"]["image"])
    return {"groups": ja.by_leaf, "batch_size": block}


def measure(subject: Subject, index: ja.Index) -> Iterator[tuple[str, Comparison]]:
    """Measures one method, with and without weights.

    Args:
      subject: the model.
      index: of the method.

    Yields:
      Kind of queries, and figures.
    """
    needs_trajectory = index.method is not None and index.method.query_output is not None
    for kind, truth in subject.truth.items():
        if kind == "held-out" and needs_trajectory:
            continue
        learning, queries = (
            ja.query_features(index, each[kind] if needs_trajectory else images_of(each[kind]))
            for each in (subject.learning, subject.evaluation)
        )
        most = QUICK.subsets if index.link == "square" else None
        yield kind, ground_truth.compare(index, learning, queries, truth, most=most)


def images_of(queries: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Queries without their trajectories: they share a compiled program with training images."""
    return {"image": queries["image"]}


def damping_path(
    subject: Subject, method: ja.Method, values: tuple[float, ...]
) -> Iterator[tuple[float, dict[str, LDS]]]:
    """LDS of a method over dampings, in units of the mean eigenvalue; uniform weights.

    Args:
      subject: the model.
      method: with a Gram kernel.
      values: the dampings.

    Yields:
      Damping, and {kind: LDS on the LEARNING queries}, by which it may be chosen.
    """
    path = evaluation.damping_path(
        method, subject.checkpoints, subject.train, [ja.relative(value) for value in values],
        **_index_options(subject),
    )  # fmt: skip
    features: dict[str, QueryFeatures] = {}
    for damping, index in path:
        found = {}
        for kind, truth in subject.truth.items():
            if kind not in features:  # they do not depend on the damping
                features[kind] = ja.query_features(index, images_of(subject.learning[kind]))
            scores = ja.score(index, features[kind])
            found[kind] = ja.lds(scores, truth.masks, truth.learning)
        yield damping.value, found


class Removal(NamedTuple):
    """What generated images become when training images are removed.

    Attributes:
      before: images [r, h, w, c].
      after: {what was removed: images from the same noise, [r, seeds, h, w, c]}.
      distance: {what was removed: l2 distance of each, [r, seeds]}.
    """

    before: np.ndarray
    after: dict[str, np.ndarray]
    distance: dict[str, np.ndarray]


def remove(subject: Subject, chosen: dict[str, np.ndarray], config: Config) -> Removal:
    """Retrains without the proponents of generated images, and generates those again.

    Args:
      subject: the model.
      chosen: {name: ids of the training images to remove, [r, k]}; row i belongs to the i-th
        generated evaluation query.
      config: size of the study.

    Returns:
      The images, before and after.
    """
    n, names = len(subject.train["image"]), list(chosen)
    kept = np.ones((len(names) * config.removals, n), bool)
    rows = np.concatenate([chosen[name][: config.removals] for name in names])
    np.put_along_axis(kept, rows, False, axis=1)
    params = ja.retrain(
        subject.train_fn, kept, jax.random.key(TRAINING_SEED), seeds=config.removal_seeds,
        at_once=config.at_once, mesh=ground_truth.mesh_of_devices(),
    )  # fmt: skip
    first = len(subject.learning["generated"]["image"])
    noise = _noise(subject.train["image"].shape[1:], first + config.removals)[first:]

    def generate(run: tuple[Any, jax.Array]) -> jax.Array:
        params, noise = run
        return jax.vmap(lambda params: subject.generate(params, noise[None]).image[0])(params)

    repeated = jnp.tile(noise, (len(names), 1, 1, 1))
    images = np.asarray(jax.jit(lambda runs: jax.lax.map(generate, runs))((params, repeated)))
    after = dict(zip(names, np.split(images, len(names)), strict=True))
    before = subject.evaluation["generated"]["image"][: config.removals]
    distance = {
        name: np.linalg.norm((images - before[:, None]).reshape(*images.shape[:2], -1), axis=-1)
        for name, images in after.items()
    }
    return Removal(before, after, distance)


class _Cache(NamedTuple):
    """Where models and ground truth are kept, under a name that their settings decide."""

    folder: Path
    settings: Any

    def path(self, name: str) -> Path:
        text = json.dumps(self.settings, sort_keys=True, default=dataclasses.asdict)
        return self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _base(config: Config, train: data.Images, cache: _Cache) -> Any:
    """A UNet for adapters to stand beside."""
    model = make_model(config.unet)
    train_fn = training.trainer(model, train, config.recipe)
    ids = jnp.arange(len(train["image"]))
    key = jax.random.key(4)
    return checkpoints.load_or_train(
        cache.path("base"),
        jax.eval_shape(model.init, key),
        lambda: jax.jit(train_fn)(key, ids),
    )


def _whole_models(
    train_fn: Callable[[jax.Array, jax.Array], Any], n: int, config: Config, cache: _Cache
) -> list[Any]:
    """Models trained on everything, from the seeds that the subsets have too."""
    everything = np.ones((1, n), bool)
    shapes = jax.eval_shape(train_fn, jax.random.key(0), jnp.arange(n))
    seeds = config.checkpoints
    params = checkpoints.load_or_train(
        cache.path("models"),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, seeds, *x.shape), x.dtype), shapes),
        lambda: ja.retrain(
            train_fn, everything, jax.random.key(TRAINING_SEED), seeds=seeds,
            at_once=config.at_once, mesh=ground_truth.mesh_of_devices(),
        ),
    )  # fmt: skip
    return [jax.tree.map(lambda x, i=i: x[0, i], params) for i in range(seeds)]


def _noise(shape: tuple[int, ...], count: int) -> jax.Array:
    """What the count images are generated from; the first are the same whatever the count."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(3), jnp.arange(count))
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _queries(
    generate: Callable[[Any, jax.Array], process.Samples],
    params: Any,
    learning: np.ndarray,
    evaluated: np.ndarray,
) -> dict[str, list[dict[str, np.ndarray]]]:
    """{kind: [those to learn from, those to measure on]}."""
    count = len(learning)
    samples = generate(params, _noise(learning.shape[1:], 2 * count))
    made = {name: np.asarray(value) for name, value in samples._asdict().items()}
    return {
        "generated": [{name: x[rows] for name, x in made.items()}
                      for rows in (slice(count), slice(count, None))],
        "held-out": [{"image": learning}, {"image": evaluated}],
    }  # fmt: skip


def minus_loss(denoiser: Denoiser, config: Config) -> OutputFn:
    """What models of subsets are asked: minus the loss of an image, over timesteps and noises."""
    loss = ja.expectation(
        diffusion.loss(denoiser), timesteps=range(25, schedule.STEPS, 50), draws=config.noises
    )
    return ground_truth.minus(loss)


def _truth(
    train_fn: Callable[[jax.Array, jax.Array], Any],
    denoiser: Denoiser,
    queries: dict[str, list[dict[str, np.ndarray]]],
    n: int,
    config: Config,
    cache: _Cache,
) -> dict[str, Truth]:
    """Minus the loss of all queries, under models trained on subsets."""

    def images(use: int) -> dict[str, np.ndarray]:
        return {"image": np.concatenate([queries[kind][use]["image"] for kind in KINDS])}

    def make() -> Truth:
        masks = evaluation.random_subsets(jax.random.key(0), n, config.subsets)
        return ground_truth.retrained(
            train_fn, masks, jax.random.key(TRAINING_SEED), minus_loss(denoiser, config),
            images(0), images(1),
            seeds=config.seeds, at_once=config.at_once,
        )  # fmt: skip

    both = ground_truth.load_or_make(cache.path("truth").with_suffix(".npz"), make)
    halves = [np.split(outputs, 2, axis=1) for outputs in both[1:]]
    return {kind: Truth(both.masks, halves[0][i], halves[1][i]) for i, kind in enumerate(KINDS)}
