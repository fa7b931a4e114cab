"""What weights do for attribution of a GPT-2: LDS, tail-patch, and invented facts."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxattr as ja
from experiments import checkpoints, ground_truth
from experiments.ground_truth import Truth
from experiments.language import baselines, corpus, gpt2, text, training
from experiments.language.corpus import Corpus
from experiments.language.training import Recipe
from jaxattr import evaluation, language
from jaxattr.evaluation import LDS, Difference
from jaxattr.language import LogitsFn, Rows

# One letter per kind of matrix, as papers name them; norms and embeddings by themselves.
by_kind = ja.by_regex(
    {
        "q": "attention/query",
        "k": "attention/key",
        "v": "attention/value",
        "o": "attention/out",
        "up": "/up/",
        "down": "/down/",
        "embeddings": "^embed|^position",
        "norms": "norm",
    }
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Size of a study.

    Attributes:
      model: of the GPT-2; its vocabulary is the tokenizer's.
      train: documents to attribute to.
      queries: to learn weights from, and as many others to measure on.
      known: invented facts, each with a source and a distractor among the documents.
      pretraining: on the background documents.
      tuning: on the documents to attribute to, all or half of them.
      subsets: half-subsets to train on.
      seeds: models per subset.
      runs: whole repetitions, each with another model and other subsets.
      patched: queries for tail-patch.
      top: proponents per query for tail-patch.
    """

    model: gpt2.Config
    train: int = 512
    queries: int = 64
    known: int = 32
    pretraining: Recipe = Recipe(epochs=6, batch=16, rate=3e-3)
    tuning: Recipe = Recipe(epochs=6, batch=16, rate=2e-3)
    subsets: int = 24
    seeds: int = 1
    runs: int = 1
    patched: int = 32
    top: int = 10


SMALL = gpt2.Config(vocabulary=256, context=128, width=64, depth=3, heads=4, remat=False)
QUICK = Config(SMALL)
FULL = Config(SMALL, queries=128, subsets=48, runs=2, patched=64)


class Subject(NamedTuple):
    """A trained model with everything that is measured on it.

    Attributes:
      logits_fn: the network.
      loss: of one row.
      corpus: its data.
      start: parameters before tuning.
      params: after tuning on all documents.
      state: of the optimizer, at the end of it.
      optimizer: that did it.
      truth: of models tuned on halves.
    """

    logits_fn: LogitsFn
    loss: Any
    corpus: Corpus
    start: Any
    params: Any
    state: Any
    optimizer: Any
    truth: Truth


TWO_SIDED = ja.projections.two_sided(16)
METHODS: dict[str, Callable[[Subject], ja.Method]] = {
    "TracIn": lambda s: ja.tracin(s.loss, projection=TWO_SIDED),
    "GradCos": lambda s: ja.grad_cos(s.loss, projection=TWO_SIDED),
    "TRAK": lambda s: ja.trak(
        language.margin(s.logits_fn),
        residual=language.residual(s.logits_fn),
        projection=TWO_SIDED,
    ),
    "LoGRA": lambda s: ja.logra(s.loss, rank=16),
    "TrackStar": lambda s: ja.trackstar(
        s.loss, s.state, s.params, rank=16, rank_one=True, queries=s.corpus.learning
    ),
    "K-FAC": lambda s: ja.kfac(s.loss, rank=32, mask=lambda row: row["mask"]),
    "EK-FAC": lambda s: ja.ekfac(s.loss, rank=32, mask=lambda row: row["mask"]),
}


class Retrieval(NamedTuple):
    """How well the sources of the facts are found.

    Attributes:
      hits: whether the source comes first, [facts].
      mrr: mean reciprocal rank of the source.
      top: ids of the strongest, [facts, k].
    """

    hits: np.ndarray
    mrr: float
    top: np.ndarray


class Result(NamedTuple):
    """One method on one model.

    Attributes:
      lds: {name of weights: LDS on the evaluation queries}.
      difference: learned minus uniform.
      facts: {name of weights: retrieval of the facts' sources}.
      top_texts: {name of weights: proponents of the first evaluation queries [patched, k]}.
      weights: {name of weights: {group: weight}}.
      shares: {group: share of the scores after learning}.
      warnings: of learning.
    """

    lds: dict[str, LDS]
    difference: Difference
    facts: dict[str, Retrieval]
    top_texts: dict[str, np.ndarray]
    weights: dict[str, dict[str, float]]
    shares: dict[str, float]
    warnings: tuple[str, ...]


def prepare(
    config: Config, corpus: Corpus, folder: Path, run: int = 0, start: Any = None
) -> Subject:
    """Trains what is needed; what was trained before is read from `folder`.

    Args:
      config: size of the study.
      corpus: the data.
      folder: where checkpoints and ground truth are kept.
      run: number of the repetition, which seeds everything.
      start: pretrained parameters; or None, to pretrain on the background.

    Returns:
      The subject.
    """
    logits_fn = gpt2.logits_fn(config.model)
    seed = jax.random.key(run)
    digest = _digest(config, corpus, run, start)
    if start is None:
        start = _pretrained(config, corpus, logits_fn, seed, folder / f"pretrained-{digest}")
    n = len(corpus.texts)
    train = training.make_train(logits_fn, corpus.train, config.tuning, n)
    params, state = jax.jit(train)(jax.random.fold_in(seed, 1), jnp.arange(n), start)
    truth = ground_truth.load_or_make(
        folder / f"truth-{digest}.npz", lambda: _truth(config, corpus, logits_fn, start, seed)
    )
    optimizer = config.tuning.optimizer(n)
    loss = language.loss(logits_fn)
    return Subject(logits_fn, loss, corpus, start, params, state, optimizer, truth)


def quick(folder: Path) -> Subject:
    """The small model: pretrained on documentation, then tuned on what is attributed to.

    Args:
      folder: for all that is trained.

    Returns:
      The subject, of `QUICK`.
    """
    context = QUICK.model.context
    found = corpus.assemble(
        text.deduplicated(text.documentation(), 80, context - 1), text.Bytes(),
        context=context, train=QUICK.train, queries=QUICK.queries, known=QUICK.known,
    )  # fmt: skip
    return prepare(QUICK, found, folder)


def measure(subject: Subject, name: str, config: Config, groups: Any = ja.by_layer) -> Result:
    """Runs one method, with and without weights.

    Args:
      subject: the model.
      name: of the method.
      config: size of the study.
      groups: what gets a weight of its own.

    Returns:
      The figures.
    """
    corpus, truth = subject.corpus, subject.truth
    on_cpu = jax.default_backend() == "cpu"  # whose devices are for retraining
    index = ja.build_index(
        METHODS[name](subject),
        subject.params,
        corpus.train,
        groups=groups,
        batch_size=32,
        mesh=None if on_cpu else ground_truth.mesh_of_devices(),
    )
    learning = ja.query_features(index, corpus.learning)
    queries = ja.query_features(index, corpus.evaluation)
    questions = ja.query_features(index, corpus.questions)
    found = ground_truth.compare(index, learning, queries, truth)
    weights, lds, fit = found.weights, found.lds, found.fit
    compared = {kind: weights[kind] for kind in ("uniform", "learned")}
    return Result(
        lds=lds,
        difference=evaluation.paired_difference(lds["learned"], lds["uniform"]),
        facts={
            kind: _retrieval(ja.score(index, questions, weights=w), corpus, config.top)
            for kind, w in compared.items()
        },
        top_texts={
            kind: np.asarray(ja.top_k(index, queries, k=config.top, weights=w).ids)[
                : config.patched
            ]
            for kind, w in compared.items()
        },
        weights=weights,
        shares=fit.shares,
        warnings=tuple(fit.warnings),
    )


def measure_baselines(subject: Subject, config: Config) -> dict[str, Retrieval]:
    """Retrieval of the facts' sources by similarity, of texts or of what the model makes of them.

    Args:
      subject: the model.
      config: size of the study.

    Returns:
      {name: figures}; the last is chance.
    """
    corpus = subject.corpus
    texts, asked = corpus.texts, corpus.sentences
    of_train, of_questions = (_losses(subject, rows) for rows in (corpus.train, corpus.questions))
    scores = {
        "BM25": baselines.bm25(texts, asked),
        "BM25 without the answer": baselines.bm25(texts, corpus.prompts),
        "text embedding": baselines.embeddings(texts, asked),
        "activations": ja.score(activations(subject, config), corpus.questions),
        "loss similarity": -abs(of_questions[:, None] - of_train),
        "chance": np.random.default_rng(0).random((len(asked), len(texts))),
    }
    return {name: _retrieval(found, corpus, config.top) for name, found in scores.items()}


def activations(subject: Subject, config: Config) -> ja.Index:
    """Makes an index of the model's last activations, means over the targets that count.

    Args:
      subject: the model.
      config: size of the study.

    Returns:
      The index, whose scores are cosines.
    """
    hidden = gpt2.hidden_fn(config.model)

    def embed(params: Any, row: Any) -> jax.Array:
        mask = row["mask"].astype(jnp.float32)
        return mask @ hidden(params, row) / mask.sum()

    return ja.build_index(
        ja.embedding(embed, name="activations"),
        {"probe": jnp.zeros(config.model.width), "model": subject.params},
        subject.corpus.train,
        groups=ja.by_leaf(exclude="^model"),
        batch_size=32,
    )


def _losses(subject: Subject, rows: Rows) -> np.ndarray:
    """Mean loss per target of each row."""

    def mean_loss(row: Any) -> jax.Array:
        return subject.loss(subject.params, row, jax.random.key(0)) / row["mask"].sum()

    given = jax.tree.map(jnp.asarray, rows)
    return np.asarray(jax.jit(lambda rows: jax.lax.map(mean_loss, rows, batch_size=32))(given))


def _retrieval(scores: Any, corpus: Corpus, k: int) -> Retrieval:
    return Retrieval(
        evaluation.hit_at_k(scores, corpus.sources, 1),
        evaluation.mean_reciprocal_rank(scores, corpus.sources),
        evaluation.strongest(scores, k),
    )


def tail_patch(
    subject: Subject, queries: Rows, tops: dict[Any, np.ndarray]
) -> dict[Any, np.ndarray]:
    """Tail-patch of several lists of proponents at once.

    The step is AdamW's, with the state and the learning rate that training ended with.

    Args:
      subject: the model.
      queries: rows [q, t].
      tops: {name: ids [q, k]}.

    Returns:
      {name: change of the mean probability of the query's targets, [q, k]}.
    """
    ids = np.concatenate(list(tops.values()), axis=1)
    q = len(ids)

    def step_loss(params: Any, example: Any, key: Any) -> jax.Array:
        return subject.loss(params, example, key) / example["mask"].sum()

    changes = evaluation.tail_patch(
        step_loss,
        language.probability(subject.logits_fn),
        subject.params,
        subject.corpus.train,
        jax.tree.map(lambda x: x[:q], queries),
        ids,
        optimizer=subject.optimizer,
        optimizer_state=subject.state,
    )
    return dict(zip(tops, np.split(changes, len(tops), axis=1), strict=True))


def _digest(config: Config, corpus: Corpus, run: int, start: Any) -> str:
    """Names what was trained by everything that it depends on."""
    settings = [repr(config), run]
    arrays = jax.tree.leaves((corpus.background, corpus.train, corpus.evaluation, start))
    digest = hashlib.sha256(json.dumps(settings).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]


def _pretrained(
    config: Config, corpus: Corpus, logits_fn: LogitsFn, seed: jax.Array, path: Path
) -> Any:
    initial = gpt2.initial(config.model, seed)

    def pretrain() -> Any:
        count = len(corpus.background["mask"])
        train = training.make_train(logits_fn, corpus.background, config.pretraining, count)
        return jax.jit(train)(jax.random.fold_in(seed, 2), jnp.arange(count), initial)[0]

    return checkpoints.load_or_train(path, initial, pretrain)


def _truth(
    config: Config, corpus: Corpus, logits_fn: LogitsFn, start: Any, seed: jax.Array
) -> Truth:
    n = len(corpus.texts)
    train = training.make_train(logits_fn, corpus.train, config.tuning, n // 2)
    loss = language.loss(logits_fn)
    return ground_truth.retrained(
        lambda key, ids: train(key, ids, start)[0],
        ja.evaluation.random_subsets(jax.random.fold_in(seed, 3), n, config.subsets),
        jax.random.fold_in(seed, 4),
        ground_truth.minus(loss),
        corpus.learning,
        corpus.evaluation,
        seeds=config.seeds,
        at_once=4 * jax.device_count(),
    )
