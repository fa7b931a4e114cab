"""What a device does to numbers: features and scores beside float64, as products are multiplied.

python -m experiments.benchmarks.precision
python -m experiments.benchmarks.precision --examples 8   # to try it on a CPU
"""

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jaxattr as ja
from experiments.benchmarks import models, timing
from experiments.benchmarks.models import Subject

EXACT = 1e-5
"""Goal of scores: relative to the largest of a query, beside the same product in float64."""

PRECISIONS = (
    ("float32, as products are by default", jnp.float32, None),
    ("float32, products as exact as they go", jnp.float32, "highest"),
    ("bfloat16", jnp.bfloat16, None),
)
"""(In words, type of the parameters, precision of products.)"""


def main() -> None:
    """Prints a line for each, as soon as it is known: programs in float64 compile for minutes."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--examples", type=int, default=64, help="a quarter are the queries too")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    console = Console(width=110, highlight=False)
    console.print(timing.machine())
    console.print("Largest error beside float64, relative; goal, or the top 10 of scores in common")
    for what, error, note in errors(arguments.examples):
        console.print(f"{what:<60} {error:.1e}  {note}")


def errors(examples: int) -> Iterator[tuple[str, float, str]]:
    """Errors of features and of scores, in units of the largest of an example or a query.

    Args:
      examples: training examples; the first quarter are the queries too.

    Yields:
      (What, error, verdict).
    """
    subject = models.gpt(examples, depth=1)
    for dtype in (jnp.float32, jnp.bfloat16):
        error = score_error(models.cast(subject, jnp.float32), examples, dtype)
        verdict = f"{EXACT:.0e} {'met' if error <= EXACT else 'MISSED'}"
        yield f"scores, rows in {np.dtype(dtype).name}", error, verdict
    for what, of in (("features", _features), ("EK-FAC's scores", _curved_scores)):
        exact = of(models.cast(subject, jnp.float64))
        for name, dtype, precision in PRECISIONS:
            with jax.default_matmul_precision(precision):
                found = of(models.cast(subject, dtype))
            scores = [x @ x.T if of is _features else x for x in (found, exact)]
            yield f"{what}, {name}", _error(found, exact), f"{_in_common(*scores):.2f}"


def score_error(subject: Subject, examples: int, dtype: Any) -> float:
    """Error of scores beside the float64 product of the very rows and queries.

    Args:
      subject: the model.
      examples: training examples.
      dtype: of the rows.
    """
    index = ja.build_index(
        ja.logra(subject.loss, rank=16),
        subject.params,
        subject.batch,
        groups=models.dense_layers,
        dtype=dtype,
    )
    queries = ja.query_features(index, jax.tree.map(lambda x: x[: examples // 4], subject.batch))
    rows = np.asarray(index.features, np.float64)
    product = np.asarray(queries.features, np.float64) @ rows.T
    return _error(np.asarray(ja.score(index, queries), np.float64), product)


def _features(subject: Subject) -> np.ndarray:
    index = ja.build_index(
        ja.tracin(subject.loss, projection=ja.projections.two_sided(16)),
        subject.params,
        subject.batch,
        groups=models.dense_layers,
    )
    return np.asarray(index.features, np.float64)


def _curved_scores(subject: Subject) -> np.ndarray:
    index = ja.build_index(
        ja.ekfac(subject.loss, rank=1 << 20),
        subject.params,
        subject.batch,
        groups=models.dense_layers,
    )
    queries = jax.tree.map(lambda x: x[: x.shape[0] // 4], subject.batch)
    return np.asarray(ja.score(index, queries), np.float64)


def _in_common(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the exact top 10 of each query that the found scores give as well."""
    tops = [np.argsort(-x, axis=1)[:, :10] for x in (found, exact)]
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(*tops, strict=True)]))


def _error(found: np.ndarray, exact: np.ndarray) -> float:
    return float((np.abs(found - exact).max(axis=1) / np.abs(exact).max(axis=1)).max())


if __name__ == "__main__":
    main()
