"""Pictures: who gave a generated picture its attributes, and which layers say so."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

import jaxattr as ja
from experiments import pictures
from experiments.attributes import study
from experiments.attributes.study import ATTRIBUTES, VALUES, Result, Subject

SHOWN_QUERIES, SHOWN_PROPONENTS = 6, 5
# Parts of the network from its input to its output; the rest of a name is kept.
DEPTH = ("time", "conditions", "first", "down", "smaller", "middle1", "attention", "middle2", "up",
         "norm", "last")  # fmt: skip
COLORS = {"subject": "#cf222e", "style": "#1f6feb", "background": "#1a7f37",
          "all": "#9aa0a6"}  # fmt: skip


def draw_concepts(subject: Subject, index: ja.Index, result: Result, path: Path) -> None:
    """Draws generated pictures beside their proponents under the weights of each attribute.

    Args:
      subject: the model.
      index: of a method.
      result: its figures.
      path: of the PNG.
    """
    queries = subject.full
    features = ja.query_features(index, queries)
    sides = [*ATTRIBUTES, "uniform"]
    ratios = [1.3, *([0.4, *[1] * SHOWN_PROPONENTS] * len(sides))]
    figure, axes = plt.subplots(
        SHOWN_QUERIES, len(ratios), figsize=(18, 1.25 * SHOWN_QUERIES + 1),
        gridspec_kw={"width_ratios": ratios, "wspace": 0.12, "hspace": 0.45,
                     "left": 0.01, "right": 0.99, "bottom": 0.01, "top": 0.87},
    )  # fmt: skip
    for axis in axes.flat:
        axis.axis("off")
    for row in range(SHOWN_QUERIES):
        asked = [VALUES[name][queries[name][row]] for name in ATTRIBUTES]
        pictures.draw_image(axes[row, 0], queries["image"][row], " ".join(asked))
    for number, side in enumerate(sides):
        weights = None if side == "uniform" else result.fits[side].weights
        top = np.asarray(ja.top_k(index, features, k=SHOWN_PROPONENTS, weights=weights).ids)
        start = 2 + number * (SHOWN_PROPONENTS + 1)
        for row, ids in enumerate(top[:SHOWN_QUERIES]):
            for place, example in enumerate(ids):
                image = subject.train["image"][example]
                axis = axes[row, start + place]
                pictures.draw_image(axis, image, *_shared(subject, queries, row, example, side))
        shown = "uniform weights" if side == "uniform" else f"weights of the {side}"
        axes[0, start + SHOWN_PROPONENTS // 2].annotate(
            shown, (0.5, 1.5), xycoords="axes fraction", ha="center", fontsize=11,
            color=COLORS.get(side, "black"),
        )  # fmt: skip
    assert index.method is not None
    figure.suptitle(
        f"Generated pictures, and the training pictures that taught the model the most about them "
        f"({index.method.name}); named: what the two share",
        fontsize=12,
    )
    pictures.save(figure, path, tight=False)


def draw_generated(subject: Subject, path: Path, columns: int = 12) -> None:
    """Draws generated pictures under what was asked for.

    Args:
      subject: the model.
      path: of the PNG.
      columns: pictures in a row.
    """
    queries = subject.full
    rows = min(len(queries["image"]) // columns, 5)
    figure, axes = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.45 * rows))
    for row, axis in enumerate(axes.flat):
        asked = [VALUES[name][queries[name][row]] for name in ATTRIBUTES]
        pictures.draw_image(axis, queries["image"][row], "\n".join((asked[0], " ".join(asked[1:]))))
    pictures.save(figure, path)


def draw_weights(results: dict[str, Result], path: Path) -> None:
    """Draws the weights of each attribute by layer.

    Args:
      results: {method: figures}.
      path: of the PNG.
    """
    figure, axes = plt.subplots(
        len(results), 1, figsize=(12, 3.1 * len(results) + 0.8), sharex=True, squeeze=False
    )
    for axis, (method, result) in zip(axes[:, 0], results.items(), strict=True):
        layers: list[str] = []
        for number, (name, fit) in enumerate(result.fits.items()):
            by_layer = _by_layer(study.relative_weights(fit.weights))
            layers = list(by_layer)
            places = np.arange(len(layers)) + 0.2 * (number - 1.5)
            axis.bar(places, list(by_layer.values()), 0.2, color=COLORS[name], label=name)
        axis.set_title(f"{method}: mean weight of a layer's arrays, log2 (0: as uniform)")
        axis.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=8)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=9)
    pictures.save(figure, path)


def _shared(
    subject: Subject, queries: dict[str, np.ndarray], row: int, example: int, side: str
) -> tuple[str, str]:
    """What a training picture shares with a query, in words, and a colour for it."""
    shared = [name for name in ATTRIBUTES if subject.train[name][example] == queries[name][row]]
    if side == "uniform":
        return f"shares {len(shared)}", "#57606a"
    return (VALUES[side][queries[side][row]] if side in shared else ""), COLORS[side]


def _by_layer(weights: dict[str, float]) -> dict[str, float]:
    layers: dict[str, list[float]] = {}
    for name, weight in weights.items():
        parts = name.split("/")
        part = parts[0].rstrip("12") if parts[0].startswith("time") else parts[0]
        layer = part if len(parts) < 3 or parts[0] == "attention" else f"{part}/{parts[1]}"
        layers.setdefault(layer, []).append(weight)
    ordered = sorted(layers, key=_place)
    return {layer: float(np.mean(layers[layer])) for layer in ordered}


def _place(layer: str) -> tuple[int, str]:
    part = layer.split("/")[0]
    return (DEPTH.index(part) if part in DEPTH else len(DEPTH)), layer
