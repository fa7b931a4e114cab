"""What a device does to numbers and to time: precision beside float64, and a pass at GPT-2's shape.

python -m experiments.benchmarks.accelerator
python -m experiments.benchmarks.accelerator --rows 2 --depth 1   # to try it on a CPU
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxattr as ja
from experiments.benchmarks import models, timing
from experiments.benchmarks.models import Subject

EXACT = 1e-5
"""Goal of scores: relative to the largest of a query, beside the same product in float64."""

TOKENS = 2_400_000
"""Of WikiText-2's training set, by GPT-2's tokenizer."""


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--examples", type=int, default=64, help="of the precision table")
    parser.add_argument("--rows", type=int, default=256, help="rows of the pass")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--depth", type=int, default=12, help="layers of GPT-2's width")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    console = Console(width=110)
    console.print(timing.machine())
    console.print(precision_table(arguments.examples))
    console.print(pass_table(arguments.rows, arguments.length, arguments.depth))


def precision_table(examples: int) -> Table:
    """Errors of features and of scores, in units of the largest of an example or a query.

    Args:
      examples: training examples; the first quarter are the queries too.
    """
    subject = models.gpt(examples, depth=2)
    exact = _features(_cast(subject, jnp.float64))
    shown = Table(title="Precision: largest error beside float64, relative")
    for heading in ("what", "error", "goal"):
        shown.add_column(heading)
    for name, dtype, precision in (
        ("features, float32, as products are by default", jnp.float32, None),
        ("features, float32, products as exact as they go", jnp.float32, "highest"),
        ("features, bfloat16", jnp.bfloat16, None),
    ):
        with jax.default_matmul_precision(precision):
            shown.add_row(name, f"{_error(_features(_cast(subject, dtype)), exact):.1e}", "")
    for dtype in (jnp.float32, jnp.bfloat16):
        error = score_error(_cast(subject, jnp.float32), examples, dtype)
        verdict = f"{EXACT:.0e} {'met' if error <= EXACT else 'MISSED'}"
        shown.add_row(f"scores, rows in {np.dtype(dtype).name}", f"{error:.1e}", verdict)
    return shown


def score_error(subject: Subject, examples: int, dtype: Any) -> float:
    """Error of scores beside the float64 product of the very rows and queries.

    Args:
      subject: the model.
      examples: training examples.
      dtype: of the rows.
    """
    index = ja.build_index(
        _method(subject), subject.params, subject.batch, groups=models.dense_layers, dtype=dtype
    )
    queries = ja.query_features(index, jax.tree.map(lambda x: x[: examples // 4], subject.batch))
    rows = np.asarray(index.features, np.float64)
    product = np.asarray(queries.features, np.float64) @ rows.T
    return _error(np.asarray(ja.score(index, queries), np.float64), product)


def pass_table(rows: int, length: int, depth: int) -> Table:
    """Seconds of features at GPT-2's shape (LoGRA, rank 16), beside plain gradients.

    Args:
      rows: of the pass that is timed.
      length: tokens per row.
      depth: layers.
    """
    whole = -(-TOKENS // length)
    shown = Table(title=f"{depth} layers of GPT-2's width, {rows} rows of {length} tokens")
    for heading in ("what", "ms per row", f"WikiText-2, {whole:,} rows: minutes"):
        shown.add_column(heading)
    for dtype in (jnp.float32, jnp.bfloat16):
        subject = _cast(models.gpt2(rows, length=length, depth=depth), dtype)
        for name, seconds in _seconds(subject).items():
            each = seconds / rows
            label = f"{name}, {np.dtype(dtype).name}"
            shown.add_row(label, f"{1000 * each:.1f}", f"{each * whole / 60:.1f}")
    return shown


def _seconds(subject: Subject) -> dict[str, float]:
    """Of a gradient of the mean loss, row by row, and of an index; programs compiled before."""

    def gradients(params: Any, batch: Any) -> Any:
        key = jax.random.key(0)

        def total(sums: Any, example: Any) -> tuple[Any, None]:
            found = jax.grad(subject.loss)(params, example, key)
            return jax.tree.map(jnp.add, sums, found), None

        return jax.lax.scan(total, jax.tree.map(jnp.zeros_like, params), batch)[0]

    plain, _ = timing.compiled(gradients, subject.params, subject.batch)
    method = _method(subject)

    def build() -> None:
        index = ja.build_index(method, subject.params, subject.batch, batch_size=8)
        jax.block_until_ready(index.rows.arrays)

    spent = {}
    for name, run in (("a plain gradient of each", plain), ("LoGRA index", build)):
        run()
        started = time.perf_counter()
        run()
        spent[name] = time.perf_counter() - started
    return spent


def _method(subject: Subject) -> ja.Method:
    return ja.logra(subject.loss, rank=16)


def _features(subject: Subject) -> np.ndarray:
    index = ja.build_index(
        ja.tracin(subject.loss, projection=ja.projections.two_sided(16)),
        subject.params,
        subject.batch,
        groups=models.dense_layers,
    )
    return np.asarray(index.features, np.float64)


def _cast(subject: Subject, dtype: Any) -> Subject:
    """The model with parameters of another type."""

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return subject._replace(params=jax.tree.map(cast, subject.params))


def _error(found: np.ndarray, exact: np.ndarray) -> float:
    return float((np.abs(found - exact).max(axis=1) / np.abs(exact).max(axis=1)).max())


if __name__ == "__main__":
    main()
