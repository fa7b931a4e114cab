"""The models of the study: classifiers on digits and CIFAR-2, a small GPT, a diffusion model."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

import jaxattr as ja
from experiments.diffusion import data as pictures
from experiments.diffusion import study as diffusion
from experiments.diffusion import training as denoising
from experiments.digits import study as digits
from experiments.digits import training
from experiments.digits.data import Digits
from experiments.ground_truth import minus
from experiments.language import study as language
from experiments.language import training as tuning
from experiments.weights import cells
from experiments.weights.cells import Quarters, Subject

DIGITS = digits.Config(("vit", "resnet", "mlp"))
CLASSIFIER_METHODS = digits.METHODS | {
    name: digits.CURVATURE[name] for name in ("LoGRA", "EK-FAC", "EK-FAC, 2x2 bands")
}
LANGUAGE_METHODS = ("TracIn", "GradCos", "TRAK", "LoGRA", "EK-FAC")
DIFFUSION_METHODS = ("TracIn", "TRAK", "D-TRAK", "DAS")


def classifier(name: str, folder: Path, images: Digits | None = None) -> Subject:
    """A classifier of digits, or of other images.

    Args:
      name: "vit", "resnet", "mlp" or "cifar2".
      folder: for all that is trained.
      images: other than the digits.
    """
    config = DIGITS
    found = digits.prepare(name, config, folder, images)
    train_fn = training.trainer(found.model, found.digits.train)

    def indexes() -> Iterator[tuple[str, Callable[[], ja.Index]]]:
        for method, choice in CLASSIFIER_METHODS.items():
            yield method, functools.partial(
                digits.index_of, choice.make(found), found.checkpoints, found.digits.train,
                choice.groups,
            )  # fmt: skip

    return Subject(
        name=name,
        indexes=indexes,
        learning=found.digits.learning,
        evaluation=found.digits.evaluation,
        truth=found.truth,
        quarters=cells.quarters(
            train_fn, training.margin(found.model), found.digits.learning, found.digits.evaluation,
            config.train, folder / f"quarters-{name}", known=found.outcomes, at_once=64,
        ),
        copies=found.copies,
    )  # fmt: skip


def cifar2(path: Path, folder: Path) -> Subject:
    """A ResNet on two classes of CIFAR-10, at half their resolution.

    Args:
      path: of the images, as `experiments.diffusion` takes them.
      folder: for all that is trained.
    """

    def small(part: pictures.Images) -> dict[str, np.ndarray]:
        n, h, w, c = part["image"].shape
        pooled = part["image"].reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
        return {"image": 2 * pooled, "label": part["label"]}

    found = pictures.load(path, DIGITS.train, DIGITS.queries)
    return classifier("cifar2", folder, Digits(*map(small, found[:3])))


def gpt(folder: Path) -> Subject:
    """A small GPT-2, pretrained and then tuned on the documents that are attributed to.

    Args:
      folder: for all that is trained.
    """
    subject = language.quick(folder)
    found = subject.corpus

    def indexes() -> Iterator[tuple[str, Callable[[], ja.Index]]]:
        for method in LANGUAGE_METHODS:
            yield method, functools.partial(
                ja.build_index, language.METHODS[method](subject), subject.params, found.train,
                groups=ja.by_layer, batch_size=32,
            )  # fmt: skip

    return Subject(
        name="gpt",
        indexes=indexes,
        learning=found.learning,
        evaluation=found.evaluation,
        truth=subject.truth,
        quarters=quarters_of_gpt(subject, folder),
        copies=None,
    )


def quarters_of_gpt(subject: language.Subject, folder: Path) -> Quarters:
    """Models that are tuned on quarters of the documents.

    Args:
      subject: of `language.quick`.
      folder: for all that is trained.
    """
    found, config = subject.corpus, language.QUICK
    train = tuning.make_train(subject.logits_fn, found.train, config.tuning, config.train // 4)
    return cells.quarters(
        lambda key, ids: train(key, ids, subject.start)[0], minus(subject.loss), found.learning,
        found.evaluation, config.train, folder / "quarters-gpt", at_once=4 * jax.device_count(),
    )  # fmt: skip


def unet(folder: Path) -> Subject:
    """A diffusion model of digits, asked about images that it has not seen.

    Args:
      folder: for all that is trained.
    """
    config = diffusion.QUICK
    found, subject = diffusion.quick(folder)
    methods = diffusion.methods(subject.denoiser, config)

    def indexes() -> Iterator[tuple[str, Callable[[], ja.Index]]]:
        for method in DIFFUSION_METHODS:
            yield method, functools.partial(diffusion.index_of, subject, methods[method])

    learning, evaluated = diffusion.held_out(subject)
    ids = np.random.default_rng(5).choice(config.train, 64, replace=False)
    return Subject(
        name="unet",
        indexes=indexes,
        learning=learning,
        evaluation=evaluated,
        truth=subject.truth["held-out"],
        quarters=quarters_of_unet(subject, found, folder),
        copies=(ja.noised({"image": found.train["image"]}, ids, jax.random.key(5)), ids),
    )


def quarters_of_unet(subject: diffusion.Subject, found: pictures.Data, folder: Path) -> Quarters:
    """Models that are trained on quarters of the images, asked about images not seen.

    Args:
      subject: of `diffusion.QUICK`.
      found: its images.
      folder: for all that is trained.
    """
    config = diffusion.QUICK
    # As many passes over its examples as the real model makes.
    recipe = config.recipe._replace(steps=config.recipe.steps // 4)
    learning, evaluated = diffusion.held_out(subject)
    return cells.quarters(
        denoising.trainer(subject.model, found.train, recipe),
        diffusion.minus_loss(subject.denoiser, config), learning, evaluated, config.train,
        folder / "quarters-unet", at_once=config.at_once,
    )  # fmt: skip
