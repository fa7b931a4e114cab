"""What scores and top-k cost, relative to the bare matrix product in the same process.

python -m experiments.benchmarks.scoring
python -m experiments.benchmarks.scoring --n 20000 --p 1024 --repeats 3
"""

import argparse
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import jaxattr as ja
from experiments.benchmarks import synthetic, timing

# From disk, what counts is the disk: see store.py.
GOALS = {"score": 1.15, "top_k": 1.3, "attributor": 1.3}
GROUPS = 16


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.scoring", description=__doc__
    )
    parser.add_argument("--q", type=int, default=256, help="queries")
    parser.add_argument("--n", type=int, default=100_000, help="training examples")
    parser.add_argument("--p", type=int, default=4096, help="features")
    parser.add_argument("--k", type=int, default=10, help="of the top-k")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(timing.machine())
    with tempfile.TemporaryDirectory() as folder:
        console.print(table(arguments, measure(arguments, folder)))


def measure(arguments: argparse.Namespace, folder: str) -> dict[str, timing.Timing]:
    """Times the bare product and everything that uses it, in turns.

    Args:
      arguments: of the command line.
      folder: for the index on disk.
    """
    index = synthetic.index(arguments.n, arguments.p, GROUPS, path=f"{folder}/index")
    memory = ja.open_index(
        f"{folder}/index",
        synthetic.method(arguments.p, GROUPS),
        synthetic.params(arguments.p, GROUPS),
        in_memory=True,
    )
    queries = synthetic.queries(arguments.q, arguments.p)
    phi = ja.query_features(memory, queries)
    weights = {name: 1.0 + i / GROUPS for i, name in enumerate(memory.layout.names)}
    train = next(memory.rows.slabs(["features"], memory.size)).arrays["features"]
    train = train.reshape(-1, arguments.p)
    batch = jax.tree.map(jnp.asarray, queries)
    attribute = ja.attributor(memory, weights=weights, k=arguments.k)
    bare = jax.jit(lambda a, b: jnp.matmul(a, b.T, precision="highest"))

    def done(x: Any) -> Any:
        return jax.block_until_ready(x)

    options: dict[str, Any] = {"k": arguments.k, "weights": weights}
    return timing.take_turns(
        {
            "bare product": (lambda: done(bare(phi.features, train)), None),
            "score": (lambda: done(ja.score(memory, phi, weights=weights)), None),
            "top_k": (lambda: done(ja.top_k(memory, phi, **options)), None),
            "attributor": (lambda: done(attribute(batch)), None),
            "top_k from disk": (lambda: done(ja.top_k(index, phi, **options)), None),
        },
        arguments.repeats,
    )


def table(arguments: argparse.Namespace, found: dict[str, timing.Timing]) -> Table:
    """Makes the table."""
    base = found.pop("bare product")
    shown = Table(
        title=f"{arguments.q} queries x {arguments.n:,} examples x {arguments.p} features; bare "
        f"product {1000 * base.seconds.min():.1f} ms. Ratios to it: median, lowest to highest."
    )
    for heading in ("what", "time", "spread", "goal"):
        shown.add_column(heading)
    for name, each in found.items():
        middle, low, high = each.ratio(base)
        goal = GOALS.get(name)
        verdict = "" if goal is None else f"{goal} {'met' if middle <= goal else 'MISSED'}"
        shown.add_row(name, f"{middle:.2f}", f"{low:.2f}-{high:.2f}", verdict)
    return shown


if __name__ == "__main__":
    main()
