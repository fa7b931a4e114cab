"""Attributes images that a DDPM generates to the images it was trained on, and says how right that is.

python -m experiments.diffusion                     # digits, 8x8; eight to twenty minutes on two cores
python -m experiments.diffusion --full              # twice the halves and queries
python -m experiments.diffusion --data cifar2.npz --full        # CIFAR-2 at 32x32, on a GPU
python -m experiments.diffusion --data cifar2.npz               # the same files, as small as the default
"""  # noqa: E501

import argparse
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxattr as ja
from experiments import command_line, pictures
from experiments.diffusion import data, embeddings, figures, study
from experiments.diffusion.data import Data
from experiments.diffusion.study import KINDS, Config, Removal, Subject
from experiments.ground_truth import Comparison
from jaxattr import files
from jaxattr.evaluation import LDS
from jaxattr.weights.report import WeightWarning

ADAPTED = ("TracIn", "D-TRAK", "DAS")
# Measured in the study on a GPU alone: its fit to truth takes minutes.
SLOW = ("DAS, signed",)
DAMPED = ("D-TRAK", "DAS")
DAMPINGS = (0.01, 0.1, 1.0, 10.0, 100.0)
# What removes proponents, by which method and weights.
REMOVED = (("D-TRAK", "uniform"), ("D-TRAK", "learned"))

Results = dict[str, dict[str, Comparison]]
"""{kind of queries: {method: figures}}."""


def main() -> None:
    """Runs the study."""
    # A device per core, for retraining: XLA leaves cores idle in the many small steps of one.
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    arguments = _arguments()
    folder, console, started = arguments.folder, command_line.console(), time.monotonic()
    warnings.simplefilter("ignore", WeightWarning)  # they stand in the file of results
    config = study.config(full=arguments.full, color=arguments.data is not None)
    found = data.load(arguments.data, config.train, config.queries)
    everything: dict[str, Results] = {}
    for name in ("UNet", "adapters"):
        subject = _prepare(name, found, config, folder, console)
        slow = arguments.full and arguments.data is not None
        everything[name], indexes = _measure(subject, config, slow, console)
        if name == "UNet":
            results = everything[name]["generated"]
            for method in ("D-TRAK", "DAS"):
                path = folder / f"proponents_{method.lower()}.png"
                figures.draw_proponents(subject, indexes[method], results[method], path)
            damping = _damping(subject, indexes, console)
            removal, moved = _remove(subject, found, indexes, results, config, console)
    figures.draw_damping(damping, folder / "damping.png")
    figures.draw_removal(removal, folder / "removal.png")
    pictures.draw_lds(everything["UNet"], folder / "lds.png")
    for shown in (lds_table(everything), removal_table(moved)):
        console.print(shown)
    name = "full.json" if arguments.full else "quick.json"
    with files.written_whole(folder / name) as partial:
        partial.write_text(json.dumps(as_json(everything, damping, moved), indent=1))
    console.print(
        f"{time.monotonic() - started:.0f} s. In {folder}/: proponents_d-trak.png, "
        f"proponents_das.png, lds.png, damping.png, removal.png, {name}."
    )


def lds_table(everything: dict[str, Results]) -> Table:
    """Makes the table of LDS.

    Args:
      everything: {model: results}.

    Returns:
      A table for a terminal.
    """
    table = Table(
        title="LDS in %, 95 % interval over subsets below; weights learned from other queries of "
        "the same kind",
        padding=(0, 0, 0, 1),
    )
    first = next(iter(next(iter(next(iter(everything.values())).values())).values()))
    for heading in ("model", "queries", "method", *first.lds, "learned - uniform"):
        table.add_column(heading.replace(" ", "\n", 1))
    for model, results in everything.items():
        for kind, found in results.items():
            for method, result in found.items():
                cells = [pictures.interval(lds) for lds in result.lds.values()]
                change = pictures.interval(result.difference, "+")
                table.add_row(model, kind, method, *cells, change)
            table.add_section()
    return table


def removal_table(moved: dict[str, dict[str, np.ndarray]]) -> Table:
    """Makes the table of what removal does.

    Args:
      moved: {what was removed: {distance: [r]}}.

    Returns:
      A table for a terminal.
    """
    table = Table(title="Same noise, models retrained without some images: means over images")
    for heading in ("removed", *next(iter(moved.values()))):
        table.add_column(heading)
    for name, distances in moved.items():
        table.add_row(name, *(_mean(values) for values in distances.values()))
    return table


def as_json(
    everything: dict[str, Results],
    damping: dict[str, dict[float, dict[str, LDS]]],
    moved: dict[str, dict[str, np.ndarray]],
) -> dict[str, Any]:
    """All figures, for a file."""
    return {
        "lds": {
            model: {
                kind: {method: _result_as_json(result) for method, result in found.items()}
                for kind, found in results.items()
            }
            for model, results in everything.items()
        },
        "damping": {
            method: {
                str(value): {kind: lds.mean for kind, lds in found.items()}
                for value, found in of_damping.items()
            }
            for method, of_damping in damping.items()
        },
        "removal": {
            name: {distance: values.tolist() for distance, values in found.items()}
            for name, found in moved.items()
        },
    }


def _prepare(name: str, found: Data, config: Config, folder: Path, console: Console) -> Subject:
    console.print(
        f"[bold]{name}[/bold]: training {config.checkpoints} models, and "
        f"{config.subsets * config.seeds} on halves of the images"
    )
    return study.prepare(name, found, config, folder)


def _measure(
    subject: Subject, config: Config, slow: bool, console: Console
) -> tuple[Results, dict[str, ja.Index]]:
    results: Results = {kind: {} for kind in KINDS}
    indexes = {}
    for name, method in study.methods(subject.denoiser, config).items():
        if (subject.name == "adapters" and name not in ADAPTED) or (name in SLOW and not slow):
            continue
        console.print(f"  {name}")
        indexes[name] = study.index_of(subject, method)
        for kind, result in study.measure(subject, indexes[name]):
            results[kind][name] = result
            console.print(f"    {kind}: {result.lds['uniform']}, learned {result.difference}")
    return results, indexes


def _damping(
    subject: Subject, indexes: dict[str, ja.Index], console: Console
) -> dict[str, dict[float, dict[str, LDS]]]:
    console.print("  damping")
    # The indexes' own methods, whose programs are compiled already.
    chosen = {name: indexes[name].method for name in DAMPED}
    return {
        name: dict(study.damping_path(subject, method, DAMPINGS))
        for name, method in chosen.items()
        if method is not None
    }


def _remove(
    subject: Subject,
    found: Data,
    indexes: dict[str, ja.Index],
    results: dict[str, Comparison],
    config: Config,
    console: Console,
) -> tuple[Removal, dict[str, dict[str, np.ndarray]]]:
    """Removal, and how far images moved by it."""
    console.print(f"  removing {config.removed} proponents of {config.removals} generated images")
    queries, chosen = study.images_of(subject.evaluation["generated"]), {}
    for method, weights in REMOVED:
        top = ja.top_k(
            indexes[method], queries, k=config.removed, weights=results[method].weights[weights]
        )
        chosen[f"{method}, {weights}"] = np.asarray(top.ids)[: config.removals]
    rng, n = np.random.default_rng(0), len(subject.train["image"])
    chosen["random images"] = np.stack(
        [rng.choice(n, config.removed, replace=False) for _ in range(config.removals)]
    )
    removal = study.remove(subject, chosen, config)
    known = found.spare if len(found.spare["label"]) else found.train
    embed = embeddings.embedding(known["image"], known["label"])
    before = embed(removal.before)
    moved = {}
    for name, images in removal.after.items():
        seeds = np.stack([embed(images[:, seed]) for seed in range(images.shape[1])], axis=1)
        cosine = (seeds * before[:, None]).sum(axis=-1).mean(axis=1)
        moved[name] = {
            "l2 distance": removal.distance[name].mean(axis=1), "cosine of embeddings": cosine
        }  # fmt: skip
    return removal, moved


def _result_as_json(result: Comparison) -> dict[str, Any]:
    return {
        "lds": {name: [lds.mean, lds.low, lds.high] for name, lds in result.lds.items()},
        "learned_minus_uniform": vars(result.difference),
        "weights": result.weights["learned"],
        "warnings": result.fit.warnings,
    }


def _mean(values: np.ndarray) -> str:
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{values.mean():.3f} (s.e. {error:.3f})"


def _arguments() -> argparse.Namespace:
    parser = command_line.parser("diffusion", __doc__)
    parser.add_argument("--data", type=Path, help="an .npz file with x_train, y_train, ...")
    return parser.parse_args()


if __name__ == "__main__":
    main()
