"""What compiling features takes beside vmap(grad): python -m experiments.benchmarks.compiling.

The models are as deep as GPT-2, Llama 3.2 1B, ViT-B and ResNet-9, and narrow: compiling depends on
the number of operations, not on their size. Each is compiled both ways in turn, from the user's
function to the first result: per-example gradients, and features by LoGRA. GOAL is the most that
the second may take of the first; the exit status says whether it was met by all.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxattr as ja
from experiments.benchmarks import models, timing
from experiments.benchmarks.models import Subject

GOAL = 1.3
MODELS: dict[str, Callable[[int], Subject]] = {
    "gpt": functools.partial(models.gpt, depth=12, width=64, length=32),
    "llama": functools.partial(models.llama, depth=16, width=64, length=32),
    "resnet9": functools.partial(models.resnet9, width=16),
    "vit": functools.partial(models.vit, depth=12, width=48),
}


def main() -> None:
    """Prints one row per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), action="append")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4, help="examples per step")
    parser.add_argument("--repeats", type=int, default=3, help="turns; the least of each counts")
    given = parser.parse_args()
    shown = Table(
        title=f"processor seconds to trace and compile, batch {given.batch}, rank {given.rank}"
    )
    for heading in ("model", "parameters", "vmap(grad)", "features", "ratio", f"goal {GOAL}"):
        shown.add_column(heading)
    met = []
    for name in given.model or sorted(MODELS):
        subject = MODELS[name](given.batch)
        ways = (gradients, functools.partial(features, given.rank))
        base, ours = np.min(
            [[seconds(way, subject) for way in ways] for _ in range(given.repeats)], axis=0
        )
        met.append(ours <= GOAL * base)
        size = sum(leaf.size for leaf in jax.tree.leaves(subject.params))
        figures = (f"{size:,}", f"{base:.2f}", f"{ours:.2f}", f"{ours / base:.2f}")
        shown.add_row(name, *figures, "met" if met[-1] else "MISSED")
    console = Console(width=120)
    console.print(timing.machine())
    console.print(shown)
    sys.exit(not all(met))


def seconds(way: Callable[[Subject], Callable[[], Any]], subject: Subject) -> float:
    """Processor time of a first call beyond a second, when nothing was compiled before."""
    jax.clear_caches()
    started = time.process_time()
    call = way(subject)
    jax.block_until_ready(call())
    first = time.process_time()
    jax.block_until_ready(call())
    return first - started - (time.process_time() - first)


def gradients(subject: Subject) -> Callable[[], Any]:
    """Returns the call that computes the gradient of each example."""
    each = jax.jit(jax.vmap(jax.grad(subject.loss), in_axes=(None, 0, None)))
    return lambda: each(subject.params, subject.batch, jax.random.key(0))


def features(rank: int, subject: Subject) -> Callable[[], Any]:
    """Returns the call that computes the features of LoGRA."""
    example = jax.tree.map(lambda x: x[0], subject.batch)
    method = ja.tracin(subject.loss, projection=ja.projections.two_sided(rank))
    featurize = ja.featurizer(method, subject.params, example)
    return lambda: featurize(subject.params, subject.batch)


if __name__ == "__main__":
    main()
