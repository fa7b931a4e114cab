"""Unrolled influence: does it say what models do that are trained again, with other weights?

python -m experiments.unrolling            # MLP and ViT on digits; five minutes of one core
python -m experiments.unrolling gpt        # a small GPT-2, tuned from its pretrained start

Prints the LDS of unrolled scores, of SOURCE, EK-FAC and TracIn against models of the very run that
was unrolled, with some examples left out of their batches, and against models of other runs.
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import jaxattr as ja
from experiments.digits import data, models, training
from experiments.ground_truth import minus
from experiments.language import study as language
from experiments.language import training as tuning
from jaxattr.counts import counted
from jaxattr.typing import OutputFn

LEFT_OUT = (0.05, 0.5)

SEGMENTS = ((1, 1), (3, 1), (3, 100))
"""Of SOURCE: how many, and how many times longer than the lengths of steps say. Adam moves weak
directions further than those."""


class Subject(NamedTuple):
    """A model to explain.

    Attributes:
      name: of it, with its settings.
      runs: the training that is explained, and the same from other keys; the last but for one run
        is unrolled too, and the last is what others are measured on.
      output: (params, example, key) -> scalar; larger = more of it.
      loss: of a training example.
      train: the training set.
      queries: that outputs are of.
      subsets: models to train again, for each share that is left out.
    """

    name: str
    runs: list[ja.TrainingRun]
    output: OutputFn
    loss: OutputFn
    train: Any
    queries: Any
    subsets: int


def classifier(name: str, learning_rate: float, eps_root: float, unrolled: int = 1) -> Subject:
    """A classifier of digits, trained by Adam whose root has a derivative everywhere.

    Args:
      name: key of `models.RECIPES`.
      learning_rate: at its peak; the recipe's is 5e-3 for the MLP, 1.5e-2 for the ViT.
      eps_root: what is added under Adam's root.
      unrolled: runs whose scores are averaged.
    """
    digits, model = data.load(train=300, evaluation=32), models.make_model(name)
    loss = training.loss(model)
    fit = training.step_by_step(model, digits.train, learning_rate=learning_rate, eps_root=eps_root)
    runs = [fit.run(jax.random.key(seed)) for seed in range(unrolled + 1)]
    title = f"{name}, learning rate {learning_rate:g}, eps_root {eps_root:g}"
    return Subject(title, runs, training.margin(model), loss, digits.train, digits.evaluation, 48)


def gpt(folder: Path, learning_rate: float = 5e-4, eps_root: float = 1e-6) -> Subject:
    """A small GPT-2, pretrained on the background and tuned on documents.

    Args:
      folder: where the pretrained parameters are kept.
      learning_rate: at its peak; that of the language study is 2e-3.
      eps_root: what is added under Adam's root.
    """
    subject = language.quick(folder)
    found = subject.corpus
    rows = jax.tree.map(lambda x: jnp.asarray(x[:256]), found.train)
    epochs, batch = 2, 16
    steps = epochs * len(rows["mask"]) // batch
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, eps_root=eps_root, weight_decay=0.01)
    )
    run = functools.partial(
        tuning.step_by_step, subject.logits_fn, rows, subject.start, optimizer,
        epochs=epochs, batch=batch,
    )  # fmt: skip
    queries = jax.tree.map(lambda x: x[:8], found.evaluation)
    title = f"gpt, learning rate {learning_rate:g}, eps_root {eps_root:g}"
    return Subject(
        title, [run(seed=0), run(seed=1)], minus(subject.loss), subject.loss, rows, queries, 16
    )


def study(subject: Subject, console: Console) -> Table:
    """Measures one model."""
    run, *others = subject.runs
    began = time.perf_counter()
    scores = {"unrolled": ja.unroll(run, subject.output, subject.queries)}
    spent = time.perf_counter() - began
    console.print(f"{subject.name}: {len(run)} steps unrolled in {spent:.0f} s")
    more = [ja.unroll(each, subject.output, subject.queries) for each in others[:-1]]
    if more:
        mean = np.mean([scores["unrolled"], *more], axis=0)
        scores[f"unrolled, mean of {1 + len(more)} runs"] = mean
    for number, times in SEGMENTS:
        name = f"SOURCE, {counted(number, 'segment')}" + (f", x {times}" if times > 1 else "")
        scores[name] = by_segments(subject, run, number, times)
    params = run.params(run.trained())
    for method in (ja.ekfac, ja.tracin):
        index = ja.build_index(method(subject.loss), params, subject.train, batch_size=32)
        scores[index.method.name if index.method else ""] = np.asarray(
            ja.score(index, subject.queries)
        )
    table = Table("LDS in %", *(f"{name}, {share:.0%} out" for share in LEFT_OUT for name in RUNS))
    found: dict[str, list[str]] = {name: [] for name in scores}
    for share in LEFT_OUT:
        masks = ja.evaluation.random_subsets(
            jax.random.key(5), run.size, subject.subsets, fraction=1 - share
        )
        for trained in (run, others[-1]):
            params = jax.vmap(trained.params)(trained.trained(masks))
            of_one = jax.tree.map(lambda leaf: leaf[:, None], params)
            outputs = ja.evaluation.outputs(subject.output, of_one, subject.queries)
            for method_name, values in scores.items():
                found[method_name].append(str(ja.lds(values, masks, outputs)))
    for method_name, cells in found.items():
        table.add_row(method_name, *cells)
    return table


def by_segments(subject: Subject, run: ja.TrainingRun, count: int, times: float) -> np.ndarray:
    """Scores of SOURCE, each segment at the checkpoint of its middle.

    Args:
      subject: the model.
      run: its training.
      count: number of segments.
      times: what learning rates are multiplied by.
    """
    indexes, state = [], run.start
    for steps in np.array_split(np.arange(len(run)), count):
        rates = []
        for number in steps:
            before, state = run.params(state), _after(run, state, int(number))
            rows = _rows(subject, run, int(number))
            rates.append(_rate(subject.loss, before, run.params(state), rows))
            if number == steps[len(steps) // 2]:
                middle = before
        method = ja.source(
            subject.loss, learning_rate=times * float(np.mean(rates)), steps=len(steps)
        )
        indexes.append(ja.build_index(method, middle, subject.train, batch_size=32))
    return ja.score_segments(indexes, subject.queries, params=run.params(state))


def _after(run: ja.TrainingRun, state: Any, number: int) -> Any:
    batch, _, weights = run.given(number)
    return run.forward(state, batch, weights)


def _rows(subject: Subject, run: ja.TrainingRun, number: int) -> Any:
    ids = run.given(number)[1]
    return jax.tree.map(lambda x: jnp.asarray(x)[ids], subject.train)


def _rate(loss: OutputFn, before: Any, after: Any, rows: Any) -> jax.Array:
    """The step over the gradient of the mean loss: Adam has no other learning rate."""
    moved = jax.tree.map(jnp.subtract, before, after)
    return optax.tree.norm(moved) / optax.tree.norm(_gradient(loss, before, rows))


@functools.partial(jax.jit, static_argnums=0)
def _gradient(loss: OutputFn, params: Any, batch: Any) -> Any:
    def mean(params: Any) -> jax.Array:
        return jnp.mean(jax.vmap(loss, in_axes=(None, 0, None))(params, batch, KEY))

    return jax.grad(mean)(params)


KEY = jax.random.key(0)
"""That losses take; none of them draws."""

RUNS = ("same run", "other run")


def main() -> None:
    """Runs the study."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.unrolling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subject", nargs="?", choices=("digits", "gpt"), default="digits")
    parser.add_argument("--folder", type=Path, default=Path("runs/unrolling"))
    given, console = parser.parse_args(), Console(width=140)
    if given.subject == "gpt":
        console.print(study(gpt(given.folder), console))
        return
    settings: tuple[tuple[Any, ...], ...] = (
        ("mlp", 5e-3, 1e-8, 3), ("mlp", 2e-3, 1e-5, 3), ("vit", 1.5e-2, 1e-8), ("vit", 2e-3, 1e-5)
    )  # fmt: skip
    for setting in settings:
        console.print(study(classifier(*setting), console))


if __name__ == "__main__":
    main()
