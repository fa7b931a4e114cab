"""What the store reads and writes per second, beside the disk's own bandwidth.

python -m experiments.benchmarks.store
python -m experiments.benchmarks.store --n 20000 --path /some/other/disk
"""

import argparse
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import timing
from jaxattr.sharding import Placement
from jaxattr.store.disk_rows import DiskRows
from jaxattr.store.folder import Folder
from jaxattr.store.rows import FEATURES, RowLayout

GOAL = 0.8


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.store", description=__doc__
    )
    parser.add_argument("--n", type=int, default=200_000, help="rows")
    parser.add_argument("--p", type=int, default=1024, help="columns")
    parser.add_argument("--block", type=int, default=2048, help="rows per chunk")
    parser.add_argument("--path", help="folder on the disk; default: a temporary one")
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(timing.machine())
    with tempfile.TemporaryDirectory(dir=arguments.path) as folder:
        console.print(table(arguments, measure(arguments, pathlib.Path(folder))))


def measure(arguments: argparse.Namespace, folder: pathlib.Path) -> dict[str, dict[str, float]]:
    """Measures bytes per second; caches of the disk are dropped, if that is allowed, before reads.

    Args:
      arguments: of the command line.
      folder: an empty one.

    Returns:
      {what: {"write": bytes per second, "read": bytes per second}}.
    """
    rows = np.random.default_rng(0).standard_normal((arguments.block, arguments.p), np.float32)
    blocks = arguments.n // arguments.block
    found = {"plain files, synced": _plain(folder / "plain", rows, blocks)}
    for dtype in (jnp.float32, jnp.bfloat16):
        name = np.dtype(dtype).name
        found[f"store, {name}"] = _store(folder / name, rows, blocks, dtype)
    return found


def _plain(folder: pathlib.Path, rows: np.ndarray, blocks: int) -> dict[str, float]:
    folder.mkdir()
    size = rows.nbytes * blocks

    def write() -> None:
        for block in range(blocks):
            with open(folder / f"{block}", "wb") as file:
                file.write(rows.tobytes())
                os.fsync(file.fileno())

    def read() -> None:
        for block in range(blocks):
            np.fromfile(folder / f"{block}", np.float32)

    return {"write": size / _seconds(write), "read": size / _cold(read)}


def _store(folder: pathlib.Path, rows: np.ndarray, blocks: int, dtype: Any) -> dict[str, float]:
    block, width = rows.shape
    layout = RowLayout(blocks * block, block, 1, {FEATURES: width}, {FEATURES: np.dtype(dtype)})
    store = DiskRows(Folder(folder), layout, Placement())
    store.create(FEATURES)
    values = {FEATURES: jnp.asarray(rows, dtype)}
    size = blocks * rows.size * np.dtype(dtype).itemsize

    def write() -> None:
        for number in range(blocks):
            store.write(number, 0, values)
        store.flush()

    def read() -> None:
        for slab in store.slabs([FEATURES], 8192):
            slab.arrays[FEATURES].block_until_ready()

    found = {"write": size / _seconds(write), "read": size / _cold(read)}
    return found | {"read, cached": size / _seconds(read)}


def _seconds(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _cold(function: Callable[[], None]) -> float:
    """Seconds without the operating system's cache, where it lets itself be emptied."""
    os.sync()
    try:
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        print("The cache cannot be emptied here: reads are from memory.")
    return _seconds(function)


def table(arguments: argparse.Namespace, found: dict[str, dict[str, float]]) -> Table:
    """Makes the table."""
    base = found["plain files, synced"]
    shown = Table(
        title=f"{arguments.n:,} rows x {arguments.p}, {arguments.block} rows per chunk; MB per "
        "second, and the ratio to plain files"
    )
    for heading in ("what", "write", "read", "read, cached", "goal"):
        shown.add_column(heading)
    for name, each in found.items():
        cells = [
            f"{each[what] / 1e6:,.0f} ({each[what] / base[what]:.2f})" for what in ("write", "read")
        ]
        cells.append(f"{each['read, cached'] / 1e6:,.0f}" if "read, cached" in each else "-")
        met = min(each[what] / base[what] for what in ("write", "read")) >= GOAL
        shown.add_row(name, *cells, "" if each is base else f"{GOAL} {'met' if met else 'MISSED'}")
    return shown


if __name__ == "__main__":
    main()
