"""Measures what learned weights gain over uniform ones, for every method in every domain.

python -m experiments.weights                         # digits: MLP, ViT, ResNet; half an hour on two cores
python -m experiments.weights gpt unet                # the small GPT, the diffusion model
python -m experiments.weights cifar2 --data cifar2.npz
python -m experiments.weights --variants              # other subsets, other groups, other queries
"""  # noqa: E501

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.weights import cells, figures, subjects, variants
from experiments.weights.cells import MODELS, Cell, Subject
from jaxattr import files
from jaxattr.weights.report import WeightWarning

TUNED_ON = "mlp"
"""The model family that settings were chosen on, before the others were looked at."""

SUBJECTS: dict[str, Callable[[argparse.Namespace], Subject]] = {
    "mlp": lambda given: subjects.classifier("mlp", given.folder),
    "vit": lambda given: subjects.classifier("vit", given.folder),
    "resnet": lambda given: subjects.classifier("resnet", given.folder),
    "cifar2": lambda given: subjects.cifar2(given.data, given.folder),
    "gpt": lambda given: subjects.gpt(given.folder),
    "unet": lambda given: subjects.unet(given.folder),
}


def main() -> None:
    """Runs the study."""
    # A device per core, for retraining: XLA leaves cores idle in the many small steps of one.
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    given, console, started = _arguments(), Console(width=150), time.monotonic()
    warnings.simplefilter("ignore", WeightWarning)
    if given.variants:
        console.print(variants.run(given.folder, console))
        return
    found: list[Cell] = []
    for name in given.subjects:
        console.print(f"[bold]{name}[/bold]: training")
        subject = SUBJECTS[name](given)
        console.print(f"  {subject.quarters.outcomes}")
        own = []
        for method, build in subject.indexes():
            own.append(cells.measure(subject, method, build()))
            console.print(f"  {method}: {own[-1].change['R = 64']}, said {own[-1].gain[64]}")
        found += own
        path = given.folder / f"{name}.json"
        with files.written_whole(path) as partial:
            partial.write_text(json.dumps([as_json(cell) for cell in own], indent=1))
    console.print(table(found))
    for line in summary(found):
        console.print(line)
    figures.draw(found, given.folder / "weights.png")
    console.print(
        f"{time.monotonic() - started:.0f} s. In {given.folder}/: weights.png, a .json for each "
        "model."
    )


def table(found: list[Cell]) -> Table:
    """Makes the table: LDS of uniform weights, and what the others gain or lose, in points.

    Args:
      found: all cells.

    Returns:
      A table for a terminal; `!` where the 95 % interval is below zero.
    """
    kinds = [kind for kind in found[0].change if kind != "uniform"]
    shown = Table(
        title="LDS in % with uniform weights, and what others add to it in points; `!` clearly "
        "worse (paired 95 % interval over subsets)",
        padding=(0, 0, 0, 1),
    )
    for heading in ("model", "method", "m", "uniform", *kinds, "said, R = 64", "fresh, R = 64"):
        shown.add_column(heading)
    for cell in found:
        changes = [_change(cell.change.get(kind), kind) for kind in kinds]
        gain, fresh = cell.gain[64], cell.fresh[64]
        shown.add_row(
            cell.subject, cell.method, str(cell.groups), f"{100 * cell.lds['uniform'].mean:.1f}",
            *changes, f"{100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]",
            f"{100 * fresh.mean:+.1f}",
        )  # fmt: skip
    return shown


def summary(found: list[Cell]) -> list[str]:
    """What the study is for, in sentences.

    Args:
      found: all cells.
    """
    lines = []
    untouched = [cell for cell in found if cell.subject != TUNED_ON]
    for title, some in (("all models", found), (f"all but {TUNED_ON}", untouched)):
        if not some:
            continue
        bound = np.mean([cell.change["fitted to truth"].mean for cell in some])
        for models in MODELS:
            kind = f"R = {models}"
            worse = [f"{c.subject} {c.method}" for c in some if c.change[kind].high < 0]
            share = np.mean([cell.change[kind].mean for cell in some]) / bound
            lines.append(
                f"{title}, {kind}: {share:.0%} of the gain of weights fitted to the truth, "
                f"{len(worse)} of {len(some)} clearly worse than uniform {worse or ''}"
            )
        paper = np.mean([cell.change["paper"].mean for cell in some]) / bound
        lines.append(f"{title}, the paper's objective: {paper:.0%}")
    for models in MODELS:
        held = {
            what: sum(
                cell.gain[models].low <= getattr(cell, field)[key].mean <= cell.gain[models].high
                for cell in found
            )
            for what, field, key in (
                ("models of quarters", "fresh", models),
                ("models of halves", "change", f"R = {models}"),
            )
        }  # fmt: skip
        lines += [
            f"R = {models}: the gain that is said holds what is measured on {what} and other "
            f"queries in {count} of {len(found)} cells"
            for what, count in held.items()
        ]
    return lines


def as_json(cell: Cell) -> dict[str, Any]:
    """The figures of a cell, for a file."""
    return {
        "subject": cell.subject,
        "method": cell.method,
        "groups": cell.groups,
        "lds": {k: [lds.mean, lds.low, lds.high] for k, lds in cell.lds.items()},
        "change": {k: [d.mean, d.low, d.high] for k, d in cell.change.items()},
        "gain": {str(models): vars(gain) for models, gain in cell.gain.items()},
        "fresh": {str(models): [d.mean, d.low, d.high] for models, d in cell.fresh.items()},
    }


def _change(change: Any, kind: str) -> str:
    if change is None:
        return "-"
    text = f"{100 * change.mean:+.1f}{'!' if change.high < 0 else ''}"
    return (
        f"{text} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]" if kind == "R = 64" else text
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subjects", nargs="*", default=[], help=", ".join(SUBJECTS))
    parser.add_argument("--data", type=Path, help="CIFAR-2 as an .npz file, for cifar2")
    parser.add_argument("--folder", type=Path, default=Path("runs/weights"), help="for all results")
    parser.add_argument("--variants", action="store_true", help="the second table")
    given = parser.parse_args()
    given.subjects = given.subjects or ["mlp", "vit", "resnet"]
    unknown = sorted(set(given.subjects) - set(SUBJECTS))
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}; choose of {', '.join(SUBJECTS)}")
    if "cifar2" in given.subjects and given.data is None:
        parser.error("cifar2 needs --data, an .npz file with x_train, y_train, x_test and y_test")
    return given


if __name__ == "__main__":
    main()
