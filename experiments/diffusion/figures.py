"""Pictures of the study: who taught the model to draw this, and what it draws without them."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

import jaxattr as ja
from experiments import pictures
from experiments.diffusion.study import Removal, Subject, images_of
from experiments.ground_truth import Comparison
from jaxattr.evaluation import LDS

SHOWN_QUERIES, SHOWN_PROPONENTS = 8, 6


def draw_proponents(subject: Subject, index: ja.Index, result: Comparison, path: Path) -> None:
    """Draws generated images beside their top proponents, before and after weighting.

    Args:
      subject: the model.
      index: of the method.
      result: its figures.
      path: of the PNG.
    """
    queries = images_of(subject.evaluation["generated"])
    features = ja.query_features(index, queries)
    ratios = [1, 0.3, *[1] * SHOWN_PROPONENTS, 0.3, *[1] * SHOWN_PROPONENTS]
    figure, axes = plt.subplots(
        SHOWN_QUERIES, len(ratios), figsize=(11, 6.6), gridspec_kw={"width_ratios": ratios}
    )
    for axis in axes.flat:
        axis.axis("off")
    for side, weights in enumerate(("uniform", "learned")):
        top = ja.top_k(index, features, k=SHOWN_PROPONENTS, weights=result.weights[weights])
        start = 2 + side * (SHOWN_PROPONENTS + 1)
        for row, ids in enumerate(np.asarray(top.ids)[:SHOWN_QUERIES]):
            for place, number in enumerate(ids):
                pictures.draw_image(axes[row, start + place], subject.train["image"][number])
    for row, image in enumerate(queries["image"][:SHOWN_QUERIES]):
        pictures.draw_image(axes[row, 0], image, "generated" if row == 0 else "")
    assert index.method is not None
    figure.suptitle(
        f"Generated images, and the training images that taught the model the most about them "
        f"({index.method.name})\nleft: one weight for all parameters, LDS "
        f"{100 * result.lds['uniform'].mean:.1f} %     right: learned weights, LDS "
        f"{100 * result.lds['learned'].mean:.1f} %",
        fontsize=10,
    )
    pictures.save(figure, path)


def draw_removal(removal: Removal, path: Path) -> None:
    """Draws generated images, and what the same noise gives without some training images.

    Args:
      removal: the images.
      path: of the PNG.
    """
    columns = ["all images", *(f"without {name}" for name in removal.after)]
    rows = len(removal.before)
    figure, axes = plt.subplots(
        rows, len(columns), figsize=(2.1 * len(columns), 1.6 * rows + 0.8), squeeze=False
    )
    for row in range(rows):
        pictures.draw_image(axes[row, 0], removal.before[row], columns[0] if row == 0 else "")
        for column, (name, images) in enumerate(removal.after.items(), start=1):
            moved = removal.distance[name][row].mean()
            title = f"{columns[column]}\n" if row == 0 else ""
            pictures.draw_image(axes[row, column], images[row, 0], f"{title}moved by {moved:.2f}")
    figure.suptitle("The same noise, by models retrained without the images named", fontsize=10)
    pictures.save(figure, path)


def draw_damping(found: dict[str, dict[float, dict[str, LDS]]], path: Path) -> None:
    """Draws LDS over damping.

    Args:
      found: {method: {damping: {kind of queries: LDS}}}.
      path: of the PNG.
    """
    kinds = list(next(iter(next(iter(found.values())).values())))
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.4 * len(kinds), 3.4), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        for method, of_damping in found.items():
            values = [100 * lds[kind].mean for lds in of_damping.values()]
            axis.semilogx(list(of_damping), values, "o-", label=method)
        axis.set_title(f"{kind} queries")
        axis.set_xlabel("damping, in mean eigenvalues")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("LDS, %, on learning queries")
    axes[0, -1].legend(fontsize=8)
    pictures.save(figure, path)
