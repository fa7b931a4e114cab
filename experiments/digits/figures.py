"""Pictures of the study: which digits taught the model, and where in the network that shows."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

import jaxattr as ja
from experiments import pictures
from experiments.digits import study
from experiments.digits.study import Result, Subject
from experiments.pictures import LEARNED, UNIFORM

SHOWN_QUERIES = 6
SHOWN_PROPONENTS = 6


def draw_proponents(subject: Subject, result: Result, path: Path) -> None:
    """Draws queries beside their top proponents, before and after weighting.

    Args:
      subject: the architecture.
      result: of TracIn on it.
      path: of the PNG.
    """
    digits = subject.digits
    method = study.METHODS["TracIn"].make(subject)
    index = study.index_of(method, subject.checkpoints, digits.train)
    rows = _hard_queries(subject)
    queries = {name: values[rows] for name, values in digits.evaluation.items()}
    tops = [
        np.asarray(ja.top_k(index, queries, k=SHOWN_PROPONENTS, weights=result.weights[name]).ids)
        for name in ("uniform", "learned")
    ]
    columns = 2 * SHOWN_PROPONENTS + 3
    ratios = [1.3, 0.25, *[1] * SHOWN_PROPONENTS, 0.25, *[1] * SHOWN_PROPONENTS]
    figure, axes = plt.subplots(
        SHOWN_QUERIES, columns, figsize=(12, 6.2), gridspec_kw={"width_ratios": ratios}
    )
    for row, axis_row in enumerate(axes):
        for axis in axis_row:
            axis.axis("off")
        label = int(queries["label"][row])
        _draw_digit(axis_row[0], queries["image"][row], f"query: {label}", "black")
        for side, top in enumerate(tops):
            for place, identity in enumerate(top[row]):
                axis = axis_row[2 + side * (SHOWN_PROPONENTS + 1) + place]
                found = int(digits.train["label"][identity])
                color = "black" if found == label else "#d1242f"
                _draw_digit(axis, digits.train["image"][identity], str(found), color)
    lds = result.lds
    figure.suptitle(
        f"The training digits that taught a {subject.model.name} the most about the hardest "
        "queries (TracIn)\n"
        f"left: one weight for all parameters, LDS {100 * lds['uniform'].mean:.1f} %"
        f"     right: learned weights, LDS {100 * lds['learned'].mean:.1f} %"
        "     red: another label",
        fontsize=11,
    )
    pictures.save(figure, path)


def draw_groups(results: dict[str, dict[str, Result]], path: Path) -> None:
    """Draws each group's LDS alone, and its share of the scores before and after learning.

    Args:
      results: {architecture: {method: result}}.
      path: of the PNG.
    """
    methods = list(next(iter(results.values())))
    groups = [len(next(iter(found.values())).group_lds) for found in results.values()]
    figure, axes = plt.subplots(
        len(results),
        2 * len(methods),
        figsize=(4.6 * len(methods), 1.6 + 0.17 * sum(groups)),
        gridspec_kw={"height_ratios": groups},
        squeeze=False,
    )
    for (name, found), axis_row in zip(results.items(), axes, strict=True):
        for column, method in enumerate(methods):
            pair = axis_row[2 * column : 2 * column + 2]
            _draw_group_bars(pair, found[method], f"{name}, {method}", named=column == 0)
    figure.suptitle(
        "LDS of each parameter array alone, and its share of the scores: grey uniform weights, "
        "blue learned",
        fontsize=11,
    )
    pictures.save(figure, path)


def _draw_group_bars(axes: Any, result: Result, title: str, *, named: bool) -> None:
    names = sorted(result.group_lds, key=_natural, reverse=True)
    places = np.arange(len(names))
    axes[0].barh(places, [100 * result.group_lds[name] for name in names], color="#57606a")
    axes[0].set_title(f"{title}\nLDS alone, %", fontsize=8)
    shares = _uniform_shares(result)
    axes[1].barh(places + 0.2, [100 * shares[name] for name in names], 0.4, color=UNIFORM)
    learned = [100 * result.fit.shares[name] for name in names]
    axes[1].barh(places - 0.2, learned, 0.4, color=LEARNED)
    axes[1].set_title("share of the scores, %", fontsize=8)
    for axis in axes:
        axis.set_ylim(-0.7, len(names) - 0.3)
        axis.set_yticks(places, [""] * len(names))
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    if named:
        axes[0].set_yticks(places, names, fontsize=6)


def _uniform_shares(result: Result) -> dict[str, float]:
    """Shares with all weights one; learned shares are weight times root mean square."""
    strength = {
        name: result.fit.shares[name] / weight if weight else 0.0
        for name, weight in result.weights["learned"].items()
    }
    total = sum(strength.values())
    return {name: value / total for name, value in strength.items()}


def _hard_queries(subject: Subject) -> np.ndarray:
    """The queries with the lowest margins, one per label: there, proponents are worth a look."""
    labels = subject.digits.evaluation["label"]
    order = np.argsort(subject.truth.evaluation.mean(axis=0))
    first = {int(labels[row]): row for row in order[::-1]}
    return np.array([row for row in order if first[int(labels[row])] == row][:SHOWN_QUERIES])


def _natural(name: str) -> list[Any]:
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in name.split("/")]


def _draw_digit(axis: Any, image: np.ndarray, title: str, color: str) -> None:
    axis.imshow(image, cmap="gray_r", interpolation="nearest")
    axis.set_title(title, fontsize=8, color=color, pad=2)
