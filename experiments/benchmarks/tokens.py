"""What scores of single tokens cost: in forward mode, beside features of every token.

python -m experiments.benchmarks.tokens
python -m experiments.benchmarks.tokens --length 64 --k 4
"""

import argparse
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

import jaxattr as ja
from experiments.benchmarks import timing
from experiments.benchmarks.models import GPT
from jaxattr import language
from jaxattr.index.parts import part_products

VOCABULARY, ROWS = 512, 16
FEATURES, FORWARD = "features of every token", "forward mode"
LENGTH = 128
GOAL = 0.5  # of the time with features


def main() -> None:
    """Prints the table, and fails where the goal is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.tokens", description=__doc__
    )
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens per row")
    parser.add_argument("--k", type=int, default=10, help="training examples per query")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(timing.machine())
    found = {name: measure(method, arguments) for name, method in METHODS.items()}
    table = Table("method", FEATURES, FORWARD, "ratio")
    for name, times in found.items():
        seconds = [f"{np.median(each.seconds):.3f} s" for each in times.values()]
        table.add_row(name, *seconds, f"{times[FORWARD].ratio(times[FEATURES])[0]:.3f}")
    console.print(table)
    worst = max(times[FORWARD].ratio(times[FEATURES])[0] for times in found.values())
    # The goal is for rows as long as the default ones: of short ones there is less to save.
    assert worst <= GOAL or arguments.length < LENGTH, (
        f"forward mode took {worst:.2f} of the features, goal {GOAL}"
    )


METHODS: Mapping[str, Callable[[Any], ja.Method]] = {
    "TracIn, rank 16": functools.partial(ja.tracin, projection=ja.projections.two_sided(16)),
    "GradCos, rank 16": functools.partial(ja.grad_cos, projection=ja.projections.two_sided(16)),
    "LoGRA, rank 16": ja.logra,
    "EK-FAC": ja.ekfac,
}


def measure(
    method: Callable[[Any], ja.Method], arguments: argparse.Namespace
) -> dict[str, timing.Timing]:
    """Times both ways to the same scores of one query's tokens.

    Args:
      method: of a loss.
      arguments: of the command line.
    """
    length = arguments.length
    model = GPT(vocabulary=VOCABULARY, width=256, depth=4, length=length, heads=4, rngs=nnx.Rngs(0))
    graph, params, *rest = nnx.split(model, nnx.Param, ...)

    def logits(params: Any, row: Any) -> Any:
        return nnx.merge(graph, params, *rest)(row["inputs"])

    ids = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, length + 1)).tolist()
    rows = language.rows(ids, length, vocabulary=VOCABULARY)
    index = ja.build_index(method(language.loss(logits)), params, rows)
    query = {name: field[:1] for name, field in rows.items()}
    one = {name: field[0] for name, field in rows.items()}
    vectors = np.asarray(index.features[: arguments.k], np.float64)

    def by_features() -> np.ndarray:
        phi = np.asarray(language.token_features(index, query).features, np.float64)
        return vectors @ phi.T

    def forward() -> np.ndarray:
        return part_products(index, one, language.token_of, length, vectors)

    difference = np.abs(by_features() - forward()).max() / np.abs(by_features()).max()
    assert difference < 1e-3, f"they differ by {difference:.2g}"
    return timing.take_turns(
        {FEATURES: (by_features, None), FORWARD: (forward, None)}, arguments.repeats
    )


if __name__ == "__main__":
    main()
