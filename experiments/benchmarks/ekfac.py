"""What each stage of EK-FAC costs, relative to a plain gradient pass over the same examples.

python -m experiments.benchmarks.ekfac                # a GPT, 64 examples, its 16 dense layers
python -m experiments.benchmarks.ekfac --busy         # and beside other work on every core
"""

import argparse
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import jaxattr as ja
from experiments.benchmarks import features, models, timing
from experiments.benchmarks.models import Subject
from jaxattr.fitting import eigenbases
from jaxattr.typing import OutputFn

QUERIES = 16
BUSY = 4.0
"""Goal of eigenvectors where all cores have other work: half of each core, and some for waiting."""


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.ekfac", description=__doc__
    )
    parser.add_argument("--model", choices=sorted(models.ALL), default="gpt")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2, help="the best is shown")
    parser.add_argument("--busy", action="store_true", help="also beside a process per core")
    arguments = parser.parse_args()
    subject = models.ALL[arguments.model](arguments.examples)
    found = best_stages(subject, arguments.batch, arguments.repeats)
    shown = Table(title=f"EK-FAC, {arguments.model}, {arguments.examples} examples; seconds")
    for heading in ("stage", "seconds", "of a gradient pass"):
        shown.add_column(heading)
    for stage, seconds in found.items():
        shown.add_row(stage, f"{seconds:.2f}", f"{seconds / found['plain gradient']:.2f}")
    console = Console(width=100)
    console.print(timing.machine())
    console.print(shown)
    if arguments.busy:
        with _busy():
            beside = best_stages(subject, arguments.batch, arguments.repeats)
        ratios = {stage: beside[stage] / seconds for stage, seconds in found.items()}
        console.print("Beside a busy process per core, over the above:")
        console.print(", ".join(f"{stage} {ratio:.2f}" for stage, ratio in ratios.items()))
        assert ratios["eigenvectors"] <= BUSY, f"eigenvectors wait for others: goal {BUSY}"


def best_stages(subject: Subject, batch: int, repeats: int) -> dict[str, float]:
    """Seconds of each stage, the shortest of some repeats after a warm-up.

    Args:
      subject: the model and its examples.
      batch: examples per step.
      repeats: how many.

    Returns:
      {stage: seconds}; "plain gradient" is a pass over all examples.
    """
    method = ja.ekfac(subject.loss, rank=1 << 20)
    runs = [_stages(subject, method, batch) for _ in range(repeats + 1)][1:]
    return {stage: min(run[stage] for run in runs) for stage in runs[0]}


@contextmanager
def _busy() -> Iterator[None]:
    command = [sys.executable, "-c", "while True: pass"]
    others: list[subprocess.Popen] = []
    try:
        others.extend(subprocess.Popen(command) for _ in range(os.cpu_count() or 1))
        yield
    finally:
        for each in others:
            each.kill()
            each.wait()


def _stages(subject: Subject, method: ja.Method, batch: int) -> dict[str, float]:
    spent: dict[str, float] = {}
    names = {"_covariances": "covariances", "_eigen": "eigenvectors"}
    with _timed(eigenbases, names, spent):
        started = time.perf_counter()
        index = ja.build_index(
            method, subject.params, subject.batch, groups=models.dense_layers, batch_size=batch
        )
        jax.block_until_ready(index.rows.arrays)  # `features` are copied to the host
        total = time.perf_counter() - started
    spent["features and eigenvalues"] = total - sum(spent.values())
    queries = jax.tree.map(lambda x: x[:QUERIES], subject.batch)
    started = time.perf_counter()
    jax.block_until_ready(ja.score(index, queries))
    spent[f"scores of {QUERIES} queries"] = time.perf_counter() - started
    del index
    spent["plain gradient"] = _gradient_pass(subject, batch)
    return spent


@functools.lru_cache(maxsize=4)
def _compiled_gradient(loss: Hashable) -> Callable[..., Any]:
    return jax.jit(features.gradient(Subject(cast(OutputFn, loss), None, None)))


def _gradient_pass(subject: Subject, batch: int) -> float:
    step, n = (
        _compiled_gradient(cast(Hashable, subject.loss)),
        jax.tree.leaves(subject.batch)[0].shape[0],
    )
    started = time.perf_counter()
    for start in range(0, n, batch):
        part = jax.tree.map(lambda x, s=start: jnp.asarray(x[s : s + batch]), subject.batch)
        jax.block_until_ready(step(subject.params, part))
    return time.perf_counter() - started


@contextmanager
def _timed(module: Any, names: dict[str, str], spent: dict[str, float]) -> Iterator[None]:
    """Adds up the time spent in some functions of a module."""
    originals = {name: getattr(module, name) for name in names}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = jax.block_until_ready(originals[name](*arguments))
            label = names[name]
            spent[label] = spent.get(label, 0.0) + time.perf_counter() - started
            return result

        return call

    try:
        for name in names:
            setattr(module, name, wrapped(name))
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


if __name__ == "__main__":
    main()
