"""What a pass over a corpus takes on a device, at GPT-2's shape.

python -m experiments.benchmarks.accelerator
python -m experiments.benchmarks.accelerator --rows 2 --batch 1 --depth 1   # to try it on a CPU
"""

import argparse
import functools
import time
from collections.abc import Callable
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
    parser.add_argument("--rows", type=int, default=1024, help="rows of the pass")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--depth", type=int, default=12, help="layers of GPT-2's width")
    parser.add_argument("--batch", type=int, default=16, help="rows per step, divides the rows")
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
    for heading in (
        "what",
        "ms per row",
        "of its gradient",
        "s per call",
        f"{whole:,} rows: minutes",
    ):
        shown.add_column(heading)
    for dtype in (jnp.float32, jnp.bfloat16):
        subject = models.cast(models.gpt2(rows, length=length, depth=depth), dtype)
        spent = _seconds(subject, min(arguments.batch, rows))
        for name, (each, call) in spent.items():
            shown.add_row(
                f"{name}, {np.dtype(dtype).name}",
                f"{1000 * each:.2f}",
                f"{each / spent[GRADIENT][0]:.2f}",
                f"{call:.2f}",
                f"{(call + each * whole) / 60:.2f}",
            )
    return shown


GRADIENT = "a plain gradient"


def _seconds(subject: Subject, batch: int) -> dict[str, tuple[float, float]]:
    """Of gradients of the mean loss, batch by batch, and of an index; programs compiled before.

    Args:
      subject: the model.
      batch: rows per step; half of the rows at most.

    Returns:
      {what: (seconds per row, seconds per call)}; a call traces the user's function and inverts
      the kernel. Rows are the difference of two calls: with half of 1,024 rows a block of 256
      features is inverted as with all, and fewer rows than features are inverted otherwise.
    """

    def gradients(params: Any, batches: Any) -> Any:
        def total(sums: Any, batch: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, features.gradient(subject)(params, batch)), None

        return jax.lax.scan(total, jax.tree.map(jnp.zeros_like, params), batches)[0]

    rows = len(subject.batch)
    batches = subject.batch.reshape(-1, batch, *subject.batch.shape[1:])
    plain, _ = timing.compiled(gradients, subject.params, batches)
    method = ja.logra(subject.loss, rank=16)

    def build(count: int) -> None:
        index = ja.build_index(method, subject.params, subject.batch[:count], batch_size=batch)
        jax.block_until_ready(index.rows.arrays)

    half = rows // 2
    short, long = (_second_time(functools.partial(build, count)) for count in (half, rows))
    each = (long - short) / (rows - half)
    return {
        GRADIENT: (_second_time(plain) / rows, 0.0),
        "LoGRA index": (each, short - each * half),
    }


def _second_time(run: Callable[[], Any]) -> float:
    run()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
