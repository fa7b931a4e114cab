"""What weights without outcomes gain with other random projections of the same gradients.

python -m experiments.language.draws     # six draws, on the models of `experiments.language`
"""

import argparse
import os
import warnings
from pathlib import Path

import jax
from rich.table import Table

import jaxattr as ja
from experiments import command_line, ground_truth
from experiments.language import study
from experiments.language.study import Subject
from jaxattr.weights.report import WeightWarning

METHODS = ("TracIn", "GradCos")


def main() -> None:
    """Prints the table; the first draw is that of the study."""
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    parser = argparse.ArgumentParser(prog="python -m experiments.language.draws")
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=Path("runs/language"))
    given = parser.parse_args()
    warnings.simplefilter("ignore", WeightWarning)
    command_line.console().print(table(study.quick(given.folder), given.draws))


def table(subject: Subject, draws: int) -> Table:
    """Measures LDS with uniform weights, learned ones, and those fitted to the truth.

    Args:
      subject: the model.
      draws: of the projections, by the keys 0, 1, ...

    Returns:
      A table for a terminal, in %.
    """
    shown = Table(
        "method", "draw", "uniform", "learned", "fitted to truth", "learned - uniform",
        title="LDS in % with other random projections; 95 % intervals over subsets",
    )  # fmt: skip
    corpus = subject.corpus
    for name in METHODS:
        for draw in range(draws):
            index = ja.build_index(
                study.METHODS[name](subject), subject.params, corpus.train,
                batch_size=32, key=jax.random.key(draw),
            )  # fmt: skip
            learning, queries = (
                ja.query_features(index, rows) for rows in (corpus.learning, corpus.evaluation)
            )
            found = ground_truth.compare(index, learning, queries, subject.truth)
            cells = [f"{100 * found.lds[kind].mean:.1f}" for kind in found.lds]
            shown.add_row(name, str(draw), *cells, str(found.difference))
    return shown


if __name__ == "__main__":
    main()
