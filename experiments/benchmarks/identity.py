"""What identity costs: python -m experiments.benchmarks.identity.

The digests of all training examples, and the seals of all chunks, beside the build of an index on
disk. The features are ready-made, so that nothing but reading, writing and digests takes time: with
gradients the share is smaller. GOAL is the most that they may take of the build.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console

import jaxattr as ja
from experiments.benchmarks import synthetic, timing
from jaxattr import identity
from jaxattr.store.folder import Folder
from jaxattr.store.seals import save_seals

GOAL, GROUPS, BLOCK = 0.05, 8, 2048


def main() -> None:
    """Builds an index and prints the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200_000, help="training examples")
    parser.add_argument("--p", type=int, default=1024, help="features, and numbers per example")
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(timing.machine())
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments.n, arguments.p, f"{folder}/index")
    build = found.pop("build")
    console.print(f"{arguments.n:,} examples of {arguments.p} numbers: built in {build:.1f} s")
    for name, seconds in found.items():
        console.print(f"  {name:20s} {seconds:6.2f} s  {seconds / build:6.2%} of the build")
    share = sum(found.values()) / build
    console.print(f"  together {share:.2%}; goal {GOAL:.0%} {'met' if share <= GOAL else 'MISSED'}")


def measure(n: int, p: int, path: str) -> dict[str, float]:
    """Times the build, and by themselves the parts of it that serve identity.

    Args:
      n: training examples.
      p: features.
      path: of the index.

    Returns:
      {what: seconds}.
    """
    index: Any = None

    def build() -> None:
        nonlocal index
        index = synthetic.index(n, p, GROUPS, path=path, batch_size=BLOCK)

    found = {"build": _seconds(build)}
    digest = jax.jit(identity.row_digests)
    block = {"x": jax.device_put(synthetic.Synthetic(BLOCK, p)[np.arange(BLOCK)])}
    jax.block_until_ready(digest(block))

    def digests() -> None:
        for _ in range(-(-n // BLOCK)):
            jax.block_until_ready(digest(block))

    found["digests of examples"] = _seconds(digests)
    opened = ja.open_index(path)
    chunks = opened.rows.chunks()  # type: ignore[attr-defined]
    found["seals of chunks"] = _seconds(lambda: save_seals(Folder(path), chunks))
    params = [synthetic.params(p, GROUPS)]
    found["parameters"] = _seconds(lambda: identity.digests_of_leaves(jax.tree.leaves(params)))
    return found


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
