"""A picture of what weights gain and lose, for all methods and models."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from experiments import pictures
from experiments.weights.cells import Cell

STYLES = {
    "paper": ("#bf8700", "s", "the paper's objective, no retraining"),
    "R = 16": ("#8cb4f5", "o", "outcomes of 16 models of quarters (4 trainings)"),
    "R = 64": ("#1f6feb", "o", "outcomes of 64 (16 trainings), with 95 % interval"),
    "fitted to truth": ("#57606a", "|", "fitted to the models that LDS is measured with"),
}


def draw(found: list[Cell], path: Path) -> None:
    """Draws the change of LDS against uniform weights.

    Args:
      found: all cells.
      path: of the PNG.
    """
    places = np.arange(len(found))[::-1]
    figure, axis = plt.subplots(figsize=(9, 1.9 + 0.27 * len(found)))
    axis.axvline(0, color="black", linewidth=0.8)
    for kind, (color, marker, label) in STYLES.items():
        changes = [cell.change[kind] for cell in found]
        means = [100 * change.mean for change in changes]
        axis.plot(means, places, marker, color=color, label=label, markersize=6)
        if kind == "R = 64":
            lows, highs = ([100 * getattr(c, end) for c in changes] for end in ("low", "high"))
            axis.hlines(places, lows, highs, color=color, linewidth=1)
    names = [
        f"{cell.subject}, {cell.method} ({100 * cell.lds['uniform'].mean:.0f} %)" for cell in found
    ]
    axis.set_yticks(places, names, fontsize=8)
    axis.set_xlabel("LDS minus that of uniform weights, points (in brackets: uniform weights' LDS)")
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("What weights add to each method: right of the line they help")
    figure.legend(loc="lower center", ncols=2, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.7 / figure.get_figheight(), 1, 1))
    pictures.save(figure, path, tight=False)
