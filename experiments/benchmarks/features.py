"""What per-example features cost, relative to a plain batched gradient in the same process.

python -m experiments.benchmarks.features                # all models, batch 64
python -m experiments.benchmarks.features --model gpt --batch 16 --repeats 5
"""

import argparse
import re
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import jaxattr as ja
from experiments.benchmarks import models, timing
from experiments.benchmarks.models import Subject
from jaxattr import linear_maps

RANKS = dict.fromkeys(models.ALL, (8, 16, 32)) | {"resnet9": (8, 16, 21, 32)}
# (model, rank, what): largest ratio of time that was set as a goal.
GOALS = {
    ("gpt", 16, "dense layers"): 0.70,
    ("resnet9", 21, "linear maps"): 0.65,
    ("gpt", 16, "all"): 0.85,
    ("resnet9", 21, "all"): 0.85,
}


def main() -> None:
    """Prints one table per model."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.features", description=__doc__
    )
    parser.add_argument("--model", choices=sorted(models.ALL), action="append")
    parser.add_argument("--batch", type=int, default=64, help="examples per step")
    parser.add_argument("--microbatch", type=int, help="default: the batch")
    parser.add_argument("--rank", type=int, action="append", help="default: several")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--dense", action="store_true", help="beside vmap(grad) and dense signs")
    parser.add_argument("--grass", action="store_true", help="beside GraSS, FactGraSS and sjlt")
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(timing.machine())
    for name in arguments.model or sorted(models.ALL):
        subject = models.ALL[name](arguments.batch)
        found = measure(name, subject, arguments.rank or RANKS[name], arguments)
        console.print(table(name, subject, found))


def measure(
    name: str, subject: Subject, ranks: tuple[int, ...], arguments: argparse.Namespace
) -> dict[Any, timing.Timing]:
    """Times the gradient and all features of a model.

    Args:
      name: of the model.
      subject: the model.
      ranks: of the two-sided projections.
      arguments: of the command line.

    Returns:
      {"gradient": timing, (rank, "dense layers", "linear maps" or "all"): timing, ...}; "dense
      layers" are those of the blocks, without embeddings.
    """
    microbatch = arguments.microbatch or arguments.batch
    functions: dict[Any, Any] = {
        "gradient": timing.compiled(gradient(subject), subject.params, subject.batch)
    }
    for rank in ranks:
        projection = ja.projections.two_sided(rank)
        choices = [("linear maps", maps_only(subject)), ("all", ja.by_layer)]
        if name != "resnet9":
            choices.insert(0, ("dense layers", models.dense_layers))
        for what, groups in choices:
            functions[rank, what] = _featurize(subject, projection, groups, microbatch)
    if arguments.dense:
        dim = max(ranks) ** 2
        projection = ja.projections.rademacher(dim)
        functions[dim, "vmap(grad), dense signs"] = _featurize(
            subject, projection, ja.by_layer, None
        )
    if arguments.grass:
        rank = max(ranks)
        for called, projection in (
            ("FactGraSS", ja.projections.factgrass(rank)),
            ("GraSS", ja.projections.grass(rank**2)),
            ("sjlt", ja.projections.sjlt(rank**2, nonzeros=1)),
        ):
            functions[rank, f"all, {called}"] = _featurize(
                subject, projection, ja.by_layer, microbatch
            )
    return timing.take_turns(functions, arguments.repeats)


def gradient(subject: Subject) -> Callable[[Any, Any], Any]:
    """Returns the plain batched gradient: what one training step computes."""

    def total(params: Any, batch: Any) -> jax.Array:
        key = jax.random.key(0)
        return jax.vmap(subject.loss, in_axes=(None, 0, None))(params, batch, key).sum()

    return jax.grad(total)


def maps_only(subject: Subject) -> Callable[[Any], Any]:
    """Returns groups that leave out every parameter that belongs to no linear map."""
    example = jax.tree.map(lambda x: x[0], subject.batch)
    found = linear_maps.find(subject.loss, subject.params, example, jax.random.key(0))
    pattern = "|".join(f"^{re.escape(leaf)}$" for leaf in found.exact)
    return lambda params: ja.by_layer(params, exclude=pattern or None)


def table(name: str, subject: Subject, found: dict[Any, timing.Timing]) -> Table:
    """Makes the table of one model."""
    base = found.pop("gradient")
    size = sum(leaf.size for leaf in jax.tree.leaves(subject.params))
    b = jax.tree.leaves(subject.batch)[0].shape[0]
    assert base.memory is not None
    shown = Table(
        title=f"{name}: {size:,} parameters, batch {b}; plain gradient "
        f"{base.seconds.min() / b * 1000:.2f} ms per example, {base.memory >> 20} MiB. "
        "Ratios to it: median of the turns, lowest to highest."
    )
    for heading in ("rank or dim", "features of", "time", "spread", "memory", "goal"):
        shown.add_column(heading)
    for (rank, what), each in found.items():
        middle, low, high = each.ratio(base)
        goal = GOALS.get((name, rank, what))
        verdict = "" if goal is None else f"{goal} {'met' if middle <= goal else 'MISSED'}"
        memory = "-" if each.memory is None else f"{each.memory / base.memory:.2f}"
        shown.add_row(str(rank), what, f"{middle:.2f}", f"{low:.2f}-{high:.2f}", memory, verdict)
    return shown


def _featurize(
    subject: Subject, projection: Any, groups: Any, microbatch: int | None
) -> tuple[Callable[[], Any], int]:
    method = ja.tracin(subject.loss, projection=projection)
    example = jax.tree.map(lambda x: x[0], subject.batch)
    featurize = ja.featurizer(method, subject.params, example, groups=groups, microbatch=microbatch)
    return timing.compiled(
        lambda params, batch: featurize(params, batch), subject.params, subject.batch
    )


if __name__ == "__main__":
    main()
