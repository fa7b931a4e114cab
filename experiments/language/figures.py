"""A picture of the weights by depth and kind of matrix."""

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

ROWS = {
    "norm 1": "norm1",
    "query": "attention/query",
    "key": "attention/key",
    "value": "attention/value",
    "out": "attention/out",
    "norm 2": "norm2",
    "up": "up",
    "down": "down",
}
OUTSIDE = {"embed": "embedding", "position": "positions", "norm": "last norm"}


def draw_weights(weights: dict[str, dict[str, float]], path: Path) -> None:
    """Draws weights by layer.

    Args:
      weights: {method: {group: weight}}, groups `blocks/<kind>[<layer>]` and those outside blocks.
      path: of the PNG.
    """
    count = len(weights)
    figure, axes = plt.subplots(
        1, count, figsize=(1.7 * count + 1.6, 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    largest = max(max(abs(np.log2(max(w, 2**-4))) for w in found.values())
                  for found in weights.values())  # fmt: skip
    image: Any = None
    for axis, (method, found) in zip(axes[0], weights.items(), strict=True):
        grid = table(found)
        image = axis.imshow(np.log2(np.maximum(grid, 2**-4)), cmap="RdBu", vmin=-largest,
                            vmax=largest, aspect="auto")  # fmt: skip
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                color = "white" if abs(np.log2(max(value, 2**-4))) > 2 else "black"
                axis.text(
                    column, row, f"{value:.1f}", ha="center", va="center", fontsize=6, color=color
                )
        axis.set_title(method, fontsize=9)
        axis.set_xlabel("layer", fontsize=8)
        axis.set_xticks(range(grid.shape[1]))
        axis.tick_params(labelsize=7)
    names = [*ROWS, *OUTSIDE.values()]
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=8)
    bar = figure.colorbar(image, ax=axes[0].tolist(), shrink=0.7)
    bar.set_label("log2 of the learned weight", fontsize=8)
    figure.suptitle("Learned weights by depth and kind; blue above one, red below", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(weights: dict[str, float]) -> np.ndarray:
    """Arranges weights by kind and layer.

    Args:
      weights: {group: weight}.

    Returns:
      Float [kinds, layers]; groups outside the blocks are in the first column, NaN elsewhere.
    """
    pattern = re.compile(r"blocks/(.+)\[(\d+)\]")
    matches = {name: pattern.fullmatch(name) for name in weights}
    depth = 1 + max(int(match[2]) for match in matches.values() if match)
    grid = np.full((len(ROWS) + len(OUTSIDE), depth), np.nan)
    kinds = list(ROWS.values())
    for name, match in matches.items():
        if match:
            grid[kinds.index(match[1]), int(match[2])] = weights[name]
        else:
            grid[len(ROWS) + list(OUTSIDE).index(name), 0] = weights[name]
    return grid
