"""Pictures and table cells that several studies share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from jaxattr.evaluation import LDS, Difference

UNIFORM, LEARNED = "#9aa0a6", "#1f6feb"


class Measured(Protocol):
    """A method with its LDS under several weights."""

    @property
    def lds(self) -> dict[str, LDS]:
        """{name of weights: LDS}; those fitted to ground truth come last."""
        ...

    @property
    def difference(self) -> Difference:
        """Learned minus uniform."""
        ...


def draw_lds(results: Mapping[str, Mapping[str, Measured]], path: Path) -> None:
    """Draws the LDS of every method before and after learning, beside a fit to ground truth.

    Args:
      results: {model, or kind of queries: {method: result}}; not all need have all methods.
      path: of the PNG.
    """
    methods = max((list(found) for found in results.values()), key=len)[::-1]
    places = np.arange(len(methods))
    figure, axes = plt.subplots(
        1,
        len(results),
        figsize=(2.2 + 3.6 * len(results), 2.1 + 0.42 * len(methods)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    fitted = list(next(iter(next(iter(results.values())).values())).lds)[-1]
    styles = {"uniform": (0.16, UNIFORM), "learned": (-0.16, LEARNED)}
    for axis, (name, found) in zip(axes[0], results.items(), strict=True):
        there = np.array([place for place, method in enumerate(methods) if method in found])
        measured = [found[method].lds for method in methods if method in found]
        for weights, (offset, color) in styles.items():
            lds = [each[weights] for each in measured]
            means = np.array([100 * each.mean for each in lds])
            spread = np.array([[100 * each.low, 100 * each.high] for each in lds]).T
            axis.errorbar(
                means,
                there + offset,
                xerr=np.abs(spread - means[None]),
                fmt="o",
                color=color,
                capsize=2,
                label=f"{weights} weights",
            )
        axis.plot(
            [100 * each[fitted].mean for each in measured],
            there,
            "|",
            color="#57606a",
            markersize=14,
            markeredgewidth=2,
            label=f"{fitted} (needs the retrained models)",
        )
        axis.set_title(name)
        axis.set_xlabel("LDS, %")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_yticks(places, methods)
    axes[0, 0].set_ylim(-0.6, len(methods) - 0.4)
    handles = axes[0, 0].get_legend_handles_labels()[0]
    handles = handles[1:] + handles[:1]  # as the figures are ordered: fitted to ground truth, last
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(
        "How well scores predict models retrained on half of the data\n"
        "LDS with 95 % intervals over these models; right is better"
    )
    save(figure, path, tight=False)


def draw_image(axis: Any, image: np.ndarray, title: str = "", color: str = "black") -> None:
    """Draws one image between -1 and 1, grey or in colour.

    Args:
      axis: where.
      image: [h, w, 1] or [h, w, 3].
      title: above it.
      color: of the title.
    """
    shown = np.clip((np.asarray(image) + 1) / 2, 0, 1)
    grey = {"cmap": "gray_r", "vmin": 0, "vmax": 1} if shown.shape[-1] == 1 else {}
    axis.imshow(shown[..., 0] if grey else shown, interpolation="nearest", **grey)
    axis.set_title(title, fontsize=7, color=color, pad=2)
    axis.axis("off")


def save(figure: Any, path: Path, *, tight: bool = True) -> None:
    """Writes a figure and closes it.

    Args:
      figure: of matplotlib.
      path: of the PNG.
      tight: whether to lay it out anew.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if tight:
        figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def interval(found: Any, sign: str = "") -> str:
    """A table cell: mean and ends of an interval, in %.

    Args:
      found: with `mean`, `low` and `high`.
      sign: "+" to show it.
    """
    mean, low, high = (100 * each for each in (found.mean, found.low, found.high))
    return f"{mean:{sign}.1f}\n{low:{sign}.0f}..{high:{sign}.0f}"
