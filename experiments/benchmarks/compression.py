"""What smaller stored features cost in rightness, and what they save.

python -m experiments.benchmarks.compression
python -m experiments.benchmarks.compression --model vit --subsets 32
"""

import argparse
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxattr as ja
from experiments.benchmarks import synthetic, timing
from experiments.digits import data, training
from experiments.digits.models import make_model
from jaxattr.evaluation import LDS, retraining
from jaxattr.store.rows import FEATURES

DTYPES = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "int8": jnp.int8,
    "float8": jnp.float8_e4m3fn,
}
K, GROUPS, CHECKPOINTS = 10, 16, 2
OVERLAP = 0.95  # of the top 10 in float32, int8
LOSS = 0.5  # of LDS, in points, int8 and float8
SIZE = 0.3  # of the bytes of float32


class Found(NamedTuple):
    """One method with its features stored as one type.

    Attributes:
      bytes: of the features of an example and checkpoint.
      overlap: share of the top 10 that float32 has too, averaged over queries.
      lds: of the scores.
    """

    bytes: int
    overlap: float
    lds: LDS


def main() -> None:
    """Prints both tables, and fails where a goal is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.compression", description=__doc__
    )
    parser.add_argument("--model", default="mlp", help="mlp, vit or resnet")
    parser.add_argument("--train", type=int, default=600, help="digits to train on")
    parser.add_argument("--subsets", type=int, default=64, help="models trained on halves of them")
    parser.add_argument("--n", type=int, default=50_000, help="examples that are timed")
    parser.add_argument("--p", type=int, default=2048, help="their features")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(timing.machine())
    found = measure(arguments)
    console.print(rightness_table(arguments, found))
    with tempfile.TemporaryDirectory() as folder:
        console.print(speed_table(arguments, speed(arguments, folder)))
    missed = list(misses(found))
    assert not missed, "; ".join(missed)


def measure(arguments: argparse.Namespace) -> dict[tuple[str, str], Found]:
    """Scores digits by methods whose features are stored in each way.

    Args:
      arguments: of the command line.

    Returns:
      {(method, type): what was found}.
    """
    model, digits = make_model(arguments.model), data.load(arguments.train, 128, 128)
    train_fn, margin = training.trainer(model, digits.train), training.margin(model)
    masks = retraining.random_subsets(jax.random.key(0), arguments.train, arguments.subsets)
    params = ja.retrain(train_fn, masks, jax.random.key(1), at_once=16)
    outputs = retraining.outputs(margin, params, digits.evaluation)
    everything = np.ones((1, arguments.train), bool)
    whole = ja.retrain(train_fn, everything, jax.random.key(2), seeds=CHECKPOINTS)
    checkpoints = [jax.tree.map(lambda x, i=i: x[0, i], whole) for i in range(CHECKPOINTS)]
    loss, exact = training.loss(model), ja.projections.identity()
    methods = {
        "TracIn": ja.tracin(loss, projection=exact),
        "GradCos": ja.grad_cos(loss, projection=exact),
        "TRAK": ja.trak(margin, projection=ja.projections.rademacher(256)),
        "LoGRA": ja.logra(loss, rank=16),
        "EK-FAC": ja.ekfac(loss),
    }
    found = {}
    for name, method in methods.items():
        best = None
        for kind, dtype in DTYPES.items():
            index = ja.build_index(method, checkpoints, digits.train, dtype=dtype)
            scores = ja.score(index, digits.evaluation)
            ids = np.asarray(jax.lax.top_k(scores, K)[1])
            best = ids if best is None else best
            overlap = np.mean(
                [len(np.intersect1d(*pair)) / K for pair in zip(ids, best, strict=True)]
            )
            layout = index.rows.layout
            parts = layout.parts(FEATURES)
            bytes_each = sum(layout.widths[x] * layout.dtypes[x].itemsize for x in parts)
            lds = ja.lds(scores, masks, outputs)
            found[name, kind] = Found(bytes_each, float(overlap), lds)
    return found


def misses(found: dict[tuple[str, str], Found]) -> Any:
    """Yields the goals that were missed, in words."""
    for (name, kind), each in found.items():
        exact = found[name, "float32"]
        if kind == "int8" and each.overlap < OVERLAP:
            yield f"{name}, {kind}: top-{K} overlap {each.overlap:.3f}, goal {OVERLAP}"
        loss = 100 * (exact.lds.mean - each.lds.mean)
        if loss > LOSS:
            yield f"{name}, {kind}: {loss:.2f} points of LDS lost, goal {LOSS}"
        if kind in ("int8", "float8") and each.bytes > SIZE * exact.bytes:
            yield f"{name}, {kind}: {each.bytes / exact.bytes:.2f} of the bytes, goal {SIZE}"


def speed(arguments: argparse.Namespace, folder: str) -> dict[str, timing.Timing]:
    """Times a top k over synthetic features, from memory and from disk.

    Args:
      arguments: of the command line.
      folder: for the indexes on disk.
    """
    n, p = arguments.n, arguments.p
    queries, functions = synthetic.queries(64, p), {}
    for kind, dtype in DTYPES.items():
        path = f"{folder}/{kind}"
        disk = synthetic.index(n, p, GROUPS, path=path, dtype=dtype)
        given = (synthetic.method(p, GROUPS), synthetic.params(p, GROUPS))
        memory = ja.open_index(path, *given, in_memory=True)
        phi = ja.query_features(memory, queries)
        for where, index in (("memory", memory), ("disk", disk)):
            functions[f"{kind}, {where}"] = (
                lambda index=index, phi=phi: jax.block_until_ready(ja.top_k(index, phi, k=K)),
                None,
            )
    return timing.take_turns(functions, arguments.repeats)


def rightness_table(arguments: argparse.Namespace, found: dict[tuple[str, str], Found]) -> Table:
    """Makes the table of what is lost."""
    shown = Table(
        title=f"{arguments.model} on {arguments.train} digits, {CHECKPOINTS} checkpoints, 128 "
        f"queries: bytes of features and scales, share of float32's top {K}, LDS in % over "
        f"{arguments.subsets} halves"
    )
    for heading in ("method", "stored as", "bytes", "top 10", "LDS", "less than float32"):
        shown.add_column(heading)
    for (name, kind), each in found.items():
        exact = found[name, "float32"]
        shown.add_row(
            name, kind, f"{each.bytes / exact.bytes:.3f}", f"{each.overlap:.3f}",
            f"{100 * each.lds.mean:.2f}", f"{100 * (exact.lds.mean - each.lds.mean):.2f}",
        )  # fmt: skip
    return shown


def speed_table(arguments: argparse.Namespace, found: dict[str, timing.Timing]) -> Table:
    """Makes the table of what it takes."""
    shown = Table(
        title=f"Top {K} of 64 queries among {arguments.n:,} examples with {arguments.p} features; "
        "ratios to float32: median of the turns, lowest to highest"
    )
    for heading in ("stored as, where", "seconds", "ratio", "spread"):
        shown.add_column(heading)
    for name, each in found.items():
        middle, low, high = each.ratio(found[f"float32, {name.partition(', ')[2]}"])
        seconds = f"{np.median(each.seconds):.2f}"
        shown.add_row(name, seconds, f"{middle:.2f}", f"{low:.2f}-{high:.2f}")
    return shown


if __name__ == "__main__":
    main()
