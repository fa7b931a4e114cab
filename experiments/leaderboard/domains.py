"""One model per domain, with everything that methods are measured by."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxattr as ja
from experiments.diffusion import study as diffusion
from experiments.digits import study as digits
from experiments.digits import training
from experiments.ground_truth import Truth, minus
from experiments.language import baselines, corpus
from experiments.language import study as language
from experiments.language import training as tuning
from experiments.weights import subjects
from jaxattr import evaluation
from jaxattr.evaluation.retraining import TrainFn
from jaxattr.typing import OutputFn


class Asked(NamedTuple):
    """An index and its queries.

    Attributes:
      made: the index of a method, or of scores that were made elsewhere.
      learning: queries to learn weights from; None for what has no weights.
      evaluation: queries that everything is measured on.
    """

    made: ja.Index
    learning: Any
    evaluation: Any


class Entry(NamedTuple):
    """A row of the table.

    Attributes:
      name: of the method.
      ask: makes it ready, all of its cost but the scores themselves.
    """

    name: str
    ask: Callable[[], Asked]


class Domain(NamedTuple):
    """A model.

    Attributes:
      name: of it.
      entries: the methods.
      truth: outputs of models retrained on halves.
      outcomes: makes those of models retrained on quarters, on the learning queries.
      queries: what everything is measured on.
      train_fn: as in `ja.retrain`.
      output: (params, example, key) -> scalar; larger = more of it.
      gradient_pass: gradients of all training examples at all checkpoints.
    """

    name: str
    entries: list[Entry]
    truth: Truth
    outcomes: Callable[[], ja.Outcomes]
    queries: Any
    train_fn: TrainFn
    output: OutputFn
    gradient_pass: Callable[[], Any]


EVERYTHING = 1 << 20
"""A rank that no side of a layer here is above."""

ITERATIONS = 10
"""Of ASTRA."""

ENSEMBLE = 8
"""Models of the ensemble of TRAK."""

UNROLLED_RUNS = 2
"""Training runs that are unrolled, for the mean of their scores."""

UNROLLED, UNROLLED_ONCE = f"unrolled, {UNROLLED_RUNS} runs", "unrolled, 1 run"
"""Names of the rows, of classifiers and of the GPT."""

UNROLLED_QUERIES = 12
"""Of the GPT: going back takes a gradient of each step for each query."""


def classifier(name: str, folder: Path) -> Domain:
    """A classifier of digits.

    Args:
      name: "vit" or "resnet".
      folder: for all that is trained.
    """
    config = digits.Config((name,))
    found = digits.prepare(name, config, folder)
    model, train = found.model, found.digits.train
    learning, asked = found.digits.learning, found.digits.evaluation
    loss = training.loss(model)

    def logits(params: Any, example: Any, key: Any = None) -> jax.Array:
        return model.apply(params, example["image"][None])[0]

    def of_logits(z: jax.Array, example: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(z, example["label"])

    def entry(name: str, method: ja.Method, groups: Any = ja.by_layer, **options: Any) -> Entry:
        build = functools.partial(
            digits.index_of, method, found.checkpoints, train, groups
        )  # fmt: skip
        return Entry(name, functools.partial(_asked, build, learning, asked, **options))

    exact, n, train_fn = digits.EXACT, config.train, training.trainer(model, train)
    refine = functools.partial(ja.astra, outputs=logits, loss=of_logits, iterations=ITERATIONS)
    everything = ja.ekfac(loss, rank=EVERYTHING)
    embedded = [
        Entry(label, functools.partial(_embedded, embed, found.checkpoints, train, asked, label))
        for label, embed in (("logits", logits), ("pixels", pixels))
    ]
    entries = [
        *embedded,
        entry("TracIn", ja.tracin(loss, projection=exact), ja.by_leaf),
        entry("GradCos", ja.grad_cos(loss, projection=exact), ja.by_leaf),
        entry("TRAK", digits.METHODS["TRAK"].make(found), ja.by_leaf),
        Entry(
            f"TRAK, {ENSEMBLE} models",
            functools.partial(
                _asked,
                lambda: digits.index_of(
                    digits.METHODS["TRAK"].make(found), _ensemble(train_fn, n), train
                ),
                learning,
                asked,
            ),
        ),
        entry("LoGRA", ja.logra(loss, rank=16)),
        entry("EK-FAC", everything),
        entry("EShampoo", ja.eshampoo(loss, rank=EVERYTHING)),
        entry("EK-FAC, 0.01", ja.ekfac(loss, rank=EVERYTHING, damping=ja.relative(0.01))),
        entry(
            "Fisher, all layers",
            ja.influence(loss, damping=ja.relative(4), curvature="fisher"),
        ),
        entry("ASTRA", everything, refine=refine),
        Entry(
            UNROLLED,
            lambda: _unrolled(
                [training.step_by_step(model, train).run(jax.random.key(seed))
                 for seed in range(UNROLLED_RUNS)],
                training.margin(model), train, asked,
            ),
        ),
    ]  # fmt: skip
    return Domain(
        name=name,
        entries=entries,
        truth=found.truth,
        outcomes=lambda: found.outcomes,
        queries=asked,
        train_fn=train_fn,
        output=training.margin(model),
        gradient_pass=_gradient_pass(loss, found.checkpoints, train, n),
    )


def gpt(folder: Path) -> Domain:
    """A small GPT-2, pretrained and then tuned on the documents that are attributed to.

    Args:
      folder: for all that is trained.
    """
    config, subject = language.QUICK, language.quick(folder)
    found = subject.corpus
    loss, learning, asked = subject.loss, found.learning, found.evaluation

    def logits(params: Any, example: Any, key: Any = None) -> jax.Array:
        return subject.logits_fn(params, example)

    def of_logits(z: jax.Array, example: Any) -> jax.Array:
        each = optax.softmax_cross_entropy_with_integer_labels(z, example["targets"])
        return jnp.sum(each * example["mask"])

    def entry(name: str, method: ja.Method, **options: Any) -> Entry:
        build = functools.partial(
            ja.build_index, method, subject.params, found.train, groups=ja.by_layer, batch_size=32
        )
        # Refined queries are dear here: weights are learned without.
        of_learning = None if options else learning
        return Entry(name, functools.partial(_asked, build, of_learning, asked, **options))

    refine = functools.partial(ja.astra, outputs=logits, loss=of_logits, iterations=6, examples=128)
    everything = ja.ekfac(loss, rank=EVERYTHING, mask=lambda row: row["mask"])
    entries = [
        *_of_words(found, asked),
        Entry("activations", functools.partial(_activations, subject, config, asked)),
        *(entry(name, language.METHODS[name](subject)) for name in language.METHODS),
        entry("EK-FAC, whole", everything),
        entry("EShampoo", ja.eshampoo(loss, rank=EVERYTHING)),
        entry(
            "Fisher, all layers",
            ja.influence(
                loss, damping=ja.relative(4), curvature="fisher", projection=language.TWO_SIDED
            ),
        ),
        entry("ASTRA", everything, refine=refine),
        Entry(
            UNROLLED_ONCE,
            lambda: _unrolled(
                [tuning.step_by_step(
                    subject.logits_fn, found.train, subject.start,
                    config.tuning.optimizer(config.train, eps_root=1e-6),
                    epochs=config.tuning.epochs, batch=config.tuning.batch, seed=0,
                )],
                minus(loss), found.train, jax.tree.map(lambda x: x[:UNROLLED_QUERIES], asked),
            ),
        ),
    ]  # fmt: skip
    return Domain(
        name="gpt",
        entries=entries,
        truth=subject.truth,
        outcomes=functools.cache(lambda: subjects.quarters_of_gpt(subject, folder).outcomes),
        queries=asked,
        train_fn=_any_size(subject, config),
        output=minus(loss),
        gradient_pass=_gradient_pass(loss, [subject.params], found.train, config.train),
    )


def unet(folder: Path) -> Domain:
    """A diffusion model of digits, asked about images that it has not seen.

    Args:
      folder: for all that is trained.
    """
    config, (found, subject) = diffusion.QUICK, diffusion.quick(folder)
    learning, asked = diffusion.held_out(subject)
    methods = diffusion.methods(subject.denoiser, config)
    loss = methods["TracIn"].rule.output

    def entry(name: str, method: ja.Method) -> Entry:
        build = functools.partial(diffusion.index_of, subject, method)
        return Entry(name, functools.partial(_asked, build, learning, asked))

    entries = [
        Entry("pixels", functools.partial(
            _embedded, pixels, subject.checkpoints, subject.train, asked, "pixels"
        )),
        *(entry(name, methods[name]) for name in ("TracIn", "TRAK", "D-TRAK", "DAS")),
        entry("LoGRA", ja.logra(loss, rank=16)),
        entry("EK-FAC", ja.ekfac(loss, rank=64)),
    ]  # fmt: skip
    return Domain(
        name="unet",
        entries=entries,
        truth=subject.truth["held-out"],
        outcomes=functools.cache(
            lambda: subjects.quarters_of_unet(subject, found, folder).outcomes
        ),
        queries=asked,
        train_fn=subject.train_fn,
        output=diffusion.minus_loss(subject.denoiser, config),
        gradient_pass=_gradient_pass(loss, subject.checkpoints, subject.train, config.train),
    )


def pixels(params: Any, example: Any) -> jax.Array:
    """An image as its own embedding."""
    return example["image"].reshape(-1)


def _asked(
    build: Callable[[], ja.Index],
    learning: Any,
    evaluated: Any,
    refine: Callable[[ja.Index, Any], Any] = ja.query_features,
) -> Asked:
    index = build()
    of_learning = None if learning is None else refine(index, learning)
    return Asked(index, of_learning, refine(index, evaluated))


def _ensemble(train_fn: TrainFn, n: int) -> list[Any]:
    """Models of all training examples."""
    found = jax.device_get(
        ja.retrain(train_fn, np.ones((1, n), bool), jax.random.key(9), seeds=ENSEMBLE)
    )
    return [jax.tree.map(lambda leaf, i=i: leaf[0, i], found) for i in range(ENSEMBLE)]


def _embedded(embed: Any, checkpoints: list[Any], train: Any, asked: Any, name: str) -> Asked:
    """Cosines of embeddings, of the first model."""
    one = jax.tree.map(lambda x: x[0], train)
    probe = jnp.zeros(jax.eval_shape(embed, checkpoints[0], one).shape)
    index = ja.build_index(
        ja.embedding(embed, name=name), {"probe": probe, "model": checkpoints[0]}, train,
        groups=ja.by_leaf(exclude="^model"),
    )  # fmt: skip
    return Asked(index, None, ja.query_features(index, asked))


def _unrolled(runs: list[ja.TrainingRun], output: OutputFn, train: Any, asked: Any) -> Asked:
    """Scores of going back through each run, their mean."""
    scores = np.mean([ja.unroll(run, output, asked) for run in runs], axis=0)
    index, queries = evaluation.index_of_scores(scores, train, asked, name="unrolled")
    return Asked(index, None, ja.query_features(index, queries))


def _activations(subject: language.Subject, config: language.Config, asked: Any) -> Asked:
    index = language.activations(subject, config)
    return Asked(index, None, ja.query_features(index, asked))


def _of_words(found: corpus.Corpus, asked: Any) -> list[Entry]:
    """What looks at the texts alone."""
    decoded = ["".join(found.tokenizer.pieces(row)) for row in _documents(asked)]

    def ask(name: str, scores: Callable[..., np.ndarray]) -> Asked:
        made = scores(found.texts, decoded)
        index, queries = evaluation.index_of_scores(made, found.train, asked, name=name)
        return Asked(index, None, ja.query_features(index, queries))

    return [
        Entry("BM25", functools.partial(ask, "BM25", baselines.bm25)),
        Entry("text embedding", functools.partial(ask, "text embedding", baselines.embeddings)),
    ]


def _documents(rows: Any) -> list[list[int]]:
    """The tokens of each row that are targets."""
    pairs = zip(rows["targets"], rows["mask"], strict=True)
    return [np.asarray(ids)[np.asarray(mask) > 0].tolist() for ids, mask in pairs]


def _any_size(subject: language.Subject, config: language.Config) -> TrainFn:
    """Tuning on any number of documents."""

    def train_fn(key: jax.Array, ids: jax.Array) -> Any:
        train = tuning.make_train(subject.logits_fn, subject.corpus.train, config.tuning, len(ids))
        return train(key, ids, subject.start)[0]

    return train_fn


def _gradient_pass(loss: OutputFn, checkpoints: list[Any], train: Any, n: int) -> Any:
    key, size = jax.random.key(0), 50

    @jax.jit
    def total(params: Any, batch: Any) -> Any:
        keys = jax.random.split(key, size)
        return jax.grad(
            lambda params: jax.vmap(loss, (None, 0, 0))(params, batch, keys).sum()
        )(params)  # fmt: skip

    def run() -> Any:
        for params in checkpoints:
            for start in range(0, n, size):
                rows = np.minimum(np.arange(start, start + size), n - 1)
                batch = jax.tree.map(lambda x, rows=rows: jnp.asarray(x[rows]), train)
                found = total(params, batch)
        return jax.block_until_ready(found)

    return run
