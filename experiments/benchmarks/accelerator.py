"""What a pass over a corpus takes on a device, at GPT-2's shape.

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
from experiments.benchmarks import features, models, timing
from experiments.benchmarks.models import Subject

TOKENS = 2_400_000
"""Of WikiText-2's training set, by GPT-2's tokenizer."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=256, help="rows of the pass")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--depth", type=int, default=12, help="layers of GPT-2's width")
    parser.add_argument("--batch", type=int, default=16, help="rows per step; divides the rows")
    arguments = parser.parse_args()
    console = Console(width=110)
    console.print(timing.machine())
    console.print(pass_table(arguments))
    if held := (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"):
        console.print(f"Most memory of the device: {held / 2**30:.1f} GiB")


def pass_table(arguments: argparse.Namespace) -> Table:
    """Seconds of features at GPT-2's shape (LoGRA, rank 16), beside a training step's gradients.

    Args:
      arguments: of the command line.
    """
    rows, length, depth = arguments.rows, arguments.length, arguments.depth
    whole = -(-TOKENS // length)
    shown = Table(title=f"{depth} layers of GPT-2's width, {rows} rows of {length} tokens")
    for heading in ("what", "ms per row", "of its gradient", f"{whole:,} rows: minutes"):
        shown.add_column(heading)
    for dtype in (jnp.float32, jnp.bfloat16):
        subject = models.cast(models.gpt2(rows, length=length, depth=depth), dtype)
        spent = _seconds(subject, min(arguments.batch, rows))
        for name, seconds in spent.items():
            shown.add_row(
                f"{name}, {np.dtype(dtype).name}",
                f"{1000 * seconds / rows:.2f}",
                f"{seconds / spent[GRADIENT]:.2f}",
                f"{seconds / rows * whole / 60:.2f}",
            )
    return shown


GRADIENT = "a plain gradient"


def _seconds(subject: Subject, batch: int) -> dict[str, float]:
    """Of gradients of the mean loss, batch by batch, and of an index; programs compiled before."""

    def gradients(params: Any, batches: Any) -> Any:
        def total(sums: Any, batch: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, features.gradient(subject)(params, batch)), None

        return jax.lax.scan(total, jax.tree.map(jnp.zeros_like, params), batches)[0]

    batches = subject.batch.reshape(-1, batch, *subject.batch.shape[1:])
    plain, _ = timing.compiled(gradients, subject.params, batches)
    method = ja.logra(subject.loss, rank=16)

    def build() -> None:
        index = ja.build_index(method, subject.params, subject.batch, batch_size=batch)
        jax.block_until_ready(index.rows.arrays)

    spent = {}
    for name, run in ((GRADIENT, plain), ("LoGRA index", build)):
        run()
        started = time.perf_counter()
        run()
        spent[name] = time.perf_counter() - started
    return spent


if __name__ == "__main__":
    main()
