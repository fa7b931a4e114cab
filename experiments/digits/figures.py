"""Pictures of the study: which digits taught the model, and where in the network that shows."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import jax
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from scipy import stats

import jaxattr as ja
from experiments import pictures
from experiments.digits import study
from experiments.digits.data import Images
from experiments.digits.study import Choice, Result, Subject
from experiments.pictures import LEARNED, UNIFORM, Measured

SHOWN_QUERIES, SHOWN_EACH = 4, 6
OTHER, PLAIN = "#d1242f", "#8c959f"  # borders: another label than the query's, and the same
SIDES = {"uniform": UNIFORM, "learned": LEARNED}
# Of the picture of proponents, in inches.
WIDTH, LINE, BLOCK, HEADER, FOOTER, CELL, DIGIT = 12.8, 1.0, 2.14, 1.05, 0.85, 0.87, 0.62
BAR = "#57606a"
SMALLEST_SHARE = 0.1  # of the scores, in %; what is below is drawn there

Results = Mapping[str, Mapping[str, Measured]]


class Strongest(NamedTuple):
    """The training examples that matter most to one query, strongest first.

    Attributes:
      proponents: ids.
      opponents: ids.
    """

    proponents: np.ndarray
    opponents: np.ndarray


def clearest(results: Results) -> tuple[str, str]:
    """Finds the case with the clearest gain of learned over uniform weights.

    Args:
      results: {architecture: {method: result}}.

    Returns:
      Architecture and method: those with the largest lower end of the interval of the difference,
      or the largest difference where there are no intervals.
    """

    def gain(cell: tuple[str, str]) -> list[float]:
        found = results[cell[0]][cell[1]].difference
        return [-math.inf if math.isnan(value) else value for value in (found.low, found.mean)]

    return max(((name, method) for name, found in results.items() for method in found), key=gain)


def headline(results: Results) -> str:
    """Says what was measured in the clearest case, and whether any case gains for certain.

    Args:
      results: {architecture: {method: result}}.

    Returns:
      Two lines, which say no more than the figures do.
    """
    name, method = clearest(results)
    shown = results[name][method]
    low, high = (100 * end for end in (shown.difference.low, shown.difference.high))
    differences = [each.difference for found in results.values() for each in found.values()]
    gains = sum(each.low > 0 for each in differences)
    losses = sum(each.high < 0 for each in differences)
    verdict = (
        f"Learned weights gain in {gains or 'none'} of {len(differences)} cases and lose in "
        f"{losses or 'none'} (95 % intervals beyond zero). "
        f"{'The clearest gain' if gains else 'The closest to a gain'}:"
    )
    if all(math.isnan(each.low) for each in differences):
        verdict = "Too few retrained models to say whether learned weights gain anything. Shown:"
    known = "no interval" if math.isnan(low) else f"95 % interval {low:+.1f} to {high:+.1f}"
    before, after = (100 * shown.lds[side].mean for side in SIDES)
    return (
        f"{verdict} {method} on {name}\n"
        f"LDS {before:.1f} % with uniform weights, {after:.1f} % with learned weights: "
        f"{100 * shown.difference.mean:+.1f} points ({known})"
    )


def strongest(scores: np.ndarray, count: int, *, signed: bool) -> Strongest:
    """Picks what to show of one query's scores.

    Args:
      scores: [n].
      count: how many of each kind.
      signed: whether scores have signs; if not there are no opponents, and twice as many others.

    Returns:
      The ids; fewer where fewer have the sign.
    """
    order = np.argsort(-scores, kind="stable")
    proponents = order[scores[order] > 0][: count if signed else 2 * count]
    order = np.argsort(scores, kind="stable")
    return Strongest(proponents, order[scores[order] < 0][: count if signed else 0])


def agreement(result: Result) -> float:
    """Rank correlation of groups' LDS alone with their learned weights; NaN if either is constant.

    Args:
      result: of a method.

    Returns:
      Between -1 and 1: positive if learning gives more weight to groups that predict better.
    """
    pairs = np.array([(lds, result.weights["learned"][g]) for g, lds in result.group_lds.items()])
    if (np.ptp(pairs, axis=0) == 0).any():
        return math.nan
    return float(stats.spearmanr(pairs).statistic)


def draw_proponents(
    subject: Subject, choice: Choice, result: Result, title: str, path: Path
) -> None:
    """Draws queries beside their top proponents and opponents, before and after weighting.

    Args:
      subject: the architecture.
      choice: the attribution method.
      result: its figures.
      title: two lines.
      path: of the PNG.
    """
    digits = subject.digits
    index = study.index_of(choice.make(subject), subject.checkpoints, digits.train, choice.groups)
    # All queries, as when they were measured: that program is compiled.
    features = ja.query_features(index, digits.evaluation)
    scores = {
        side: np.asarray(ja.score(index, features, weights=result.weights[side])) for side in SIDES
    }
    rows, signed = _hard_queries(subject), index.link != "square"
    train, queries = (
        _between_0_and_1(part, digits.train) for part in (digits.train, digits.evaluation)
    )
    predicted = _predicted(subject, digits.evaluation["image"][rows])
    height = HEADER + BLOCK * len(rows) + FOOTER
    figure = plt.figure(figsize=(WIDTH, height))
    for place, row in enumerate(rows):
        top, label = height - HEADER - BLOCK * place, int(queries["label"][row])
        _draw_query(figure, top, queries["image"][row], int(row), label, int(predicted[place]))
        before = strongest(scores["uniform"][row], SHOWN_EACH, signed=signed)
        for line, (side, each) in enumerate(scores.items()):
            chosen = strongest(each[row], SHOWN_EACH, signed=signed)
            _draw_line(figure, top - LINE * line, side, train, each[row], chosen, before, label)
    _draw_words(figure, title, len(subject.checkpoints), signed=signed)
    pictures.save(figure, path, tight=False)


def write_report(subject: Subject, choice: Choice, result: Result, path: Path) -> None:
    """Writes a page of all evaluation queries with their top proponents and opponents.

    Args:
      subject: the architecture.
      choice: the attribution method.
      result: its figures.
      path: of the page.
    """
    digits = subject.digits
    ja.report(
        study.index_of(choice.make(subject), subject.checkpoints, digits.train, choice.groups),
        digits.evaluation,
        weights=result.fit,
        predictions=[str(label) for label in _predicted(subject, digits.evaluation["image"])],
        title="Which digits taught the model this?",
        path=path,
    )


def draw_groups(results: dict[str, dict[str, Result]], path: Path) -> None:
    """Draws each group's LDS alone, and its share of the scores before and after learning.

    Args:
      results: {architecture: {method: result}}.
      path: of the PNG.
    """
    methods = list(next(iter(results.values())))
    groups = [len(next(iter(found.values())).group_lds) for found in results.values()]
    height = 1.5 + 0.5 * len(results) + 0.145 * sum(groups)
    figure, axes = plt.subplots(
        len(results), 2 * len(methods), figsize=(WIDTH, height), sharex="col", squeeze=False,
        gridspec_kw={"height_ratios": groups}, layout="constrained",
    )  # fmt: skip
    for (name, found), axis_row in zip(results.items(), axes, strict=True):
        for column, method in enumerate(methods):
            pair = axis_row[2 * column : 2 * column + 2]
            _draw_group_bars(pair, found[method], f"{name}, {method}", named=column == 0)
    figure.suptitle(
        "Does learning give more of the scores to the parameter arrays that predict best by "
        "themselves?\nThen blue is to the right of grey where bars are long, and the rank "
        "correlation r of bars with learned weights is positive",
        fontsize=11,
    )  # fmt: skip
    handles = [
        Patch(color=BAR, label="LDS of the array's contributions alone"),
        _dot(UNIFORM, "its share of the scores, uniform weights"),
        _dot(LEARNED, "the same, learned weights"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    pictures.save(figure, path, tight=False)


def _draw_group_bars(axes: Any, result: Result, title: str, *, named: bool) -> None:
    names = sorted(result.group_lds, key=_natural, reverse=True)
    places = np.arange(len(names))
    axes[0].barh(places, [100 * result.group_lds[name] for name in names], color=BAR)
    axes[0].axvline(0, color="black", linewidth=0.6)
    axes[0].set_title(f"{title}\nr = {agreement(result):+.2f}", fontsize=8.5, loc="left")
    axes[0].set_xlabel("LDS alone, %", fontsize=8)
    shares = _uniform_shares(result)
    before, after = (
        np.array([max(100 * each[name], SMALLEST_SHARE) for name in names])
        for each in (shares, result.fit.shares)
    )
    axes[1].hlines(places, before, after, color=PLAIN, linewidth=1)
    axes[1].scatter(before, places, s=12, color=UNIFORM, zorder=3)
    axes[1].scatter(after, places, s=12, color=LEARNED, zorder=3)
    axes[1].set_xscale("log")
    axes[1].set_xlim(0.8 * SMALLEST_SHARE, 100)
    axes[1].set_xticks([0.1, 1, 10, 100], ["<0.1", "1", "10", "100"])
    axes[1].set_xlabel("share of the scores, %", fontsize=8)
    for axis in axes:
        axis.set_ylim(-0.7, len(names) - 0.3)
        axis.set_yticks(places, [""] * len(names))
        axis.tick_params(labelsize=8, labelbottom=True)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        for start, stop in _layers(names)[::2]:
            axis.axhspan(start - 0.5, stop - 0.5, color="#f0f2f4", zorder=0)
    if named:
        axes[0].set_yticks(places, names, fontsize=7)


def _layers(names: list[str]) -> list[tuple[int, int]]:
    """Where each layer's arrays begin and end."""
    layers = [name.split("/")[: 2 if name.startswith("blocks") else 1] for name in names]
    starts = [
        place for place in range(len(names)) if place == 0 or layers[place - 1] != layers[place]
    ]
    return list(zip(starts, [*starts[1:], len(names)], strict=True))


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


def _predicted(subject: Subject, images: np.ndarray) -> np.ndarray:
    """The labels that the attributed models find most probable, on average."""
    model = subject.model
    probabilities = jax.jit(lambda params, images: jax.nn.softmax(model.apply(params, images)))
    found = [np.asarray(probabilities(params, images)) for params in subject.checkpoints]
    return np.mean(found, axis=0).argmax(axis=1)


def _left(kind: int, position: int) -> float:
    """Where a panel begins: proponents, then opponents."""
    return 1.85 + CELL * (position + kind * SHOWN_EACH) + 0.25 * kind


def _add_axis(figure: Any, left: float, bottom: float, size: float) -> Any:
    width, height = figure.get_size_inches()
    axis = figure.add_axes((left / width, bottom / height, size / width, size / height))
    axis.set_xticks([])
    axis.set_yticks([])
    return axis


def _between_0_and_1(images: Images, train: Images) -> Images:
    """The same brightness for the same ink in every panel."""
    low, high = train["image"].min(), train["image"].max()
    return images | {"image": (images["image"] - low) / (high - low)}


def _draw_digit(axis: Any, image: np.ndarray, color: str, width: float) -> None:
    axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
    axis.spines[:].set(color=color, linewidth=width)


def _draw_query(
    figure: Any, top: float, image: np.ndarray, row: int, label: int, predicted: int
) -> None:
    axis = _add_axis(figure, 0.15, top - 1.15, 1.15)
    _draw_digit(axis, image, "black", 1.2)
    color = "black" if predicted == label else OTHER
    lines = [(f"query #{row}: label {label}", "black"), (f"predicted: {predicted}", color)]
    for number, (line, ink) in enumerate(lines):
        place = (0.5, -0.05 - 0.15 * number)
        axis.text(
            *place, line, transform=axis.transAxes, fontsize=9, color=ink, ha="center", va="top"
        )


def _draw_line(
    figure: Any,
    top: float,
    side: str,
    train: Images,
    scores: np.ndarray,
    chosen: Strongest,
    before: Strongest,
    label: int,
) -> None:
    """Draws what one query's scores say with one kind of weights."""
    width, height = figure.get_size_inches()
    strip = (1.48 / width, (top - 0.93) / height)
    figure.add_artist(Rectangle(strip, 0.2 / width, 0.93 / height, color=SIDES[side], linewidth=0))
    place = (1.58 / width, (top - 0.465) / height)
    ink = "white" if side == "learned" else "black"
    figure.text(*place, side, rotation=90, ha="center", va="center", color=ink, fontsize=9)
    shares = 100 * scores / np.abs(scores).max()
    sign = "+" if len(chosen.opponents) else ""
    for kind, (ids, known) in enumerate(zip(chosen, before, strict=True)):
        for position, identity in enumerate(ids):
            axis = _add_axis(figure, _left(kind, position), top - DIGIT, DIGIT)
            found = int(train["label"][identity])
            border = (PLAIN, 0.8) if found == label else (OTHER, 2.2)
            _draw_digit(axis, train["image"][identity], *border)
            axis.set_xlabel(
                f"{found} · #{identity}\n{shares[identity]:{sign}.0f} %",
                fontsize=8,
                labelpad=3,
                linespacing=1.1,
                color="black" if identity in known else LEARNED,
                weight="normal" if identity in known else "bold",
            )


def _draw_words(figure: Any, title: str, models: int, *, signed: bool) -> None:
    """The title, what the columns are, and what colours and numbers mean."""
    width, height = figure.get_size_inches()
    figure.suptitle(title, fontsize=12, y=1 - 0.1 / height, va="top")
    headings = ["proponents: training on these moved the model towards the query's label"]
    headings += ["opponents: these moved it away from that label"]
    if not signed:
        headings = ["most influential training digits; these scores are squares, without a sign"]
    for kind, heading in enumerate(headings):
        place = (_left(kind, 0) / width, 1 - (HEADER - 0.1) / height)
        figure.text(*place, heading, fontsize=9, va="bottom")
    handles = [
        Patch(color=UNIFORM, label="one weight for all parameters"),
        Patch(color=LEARNED, label="learned weights"),
        Patch(facecolor="white", edgecolor=PLAIN, label="same label as the query"),
        Patch(facecolor="white", edgecolor=OTHER, linewidth=2.2, label="another label"),
        Line2D([], [], linestyle="", label="bold blue: not among these with uniform weights"),
    ]
    figure.legend(
        handles=handles, loc="lower center", ncols=5, fontsize=9, frameon=False,
        bbox_to_anchor=(0.5, 0.42 / height), handlelength=1.2, columnspacing=1.5,
    )  # fmt: skip
    lines = [
        "Below each training digit: its label · its id, and its score as a share of the largest "
        f"score of its line. Predicted: by the mean of the {models} models attributed.",
        "Queries: the hardest ones of different labels. LDS: rank correlation between sums of "
        "scores and what models retrained on halves of the data do.",
    ]
    figure.text(0.5, 0.1 / height, "\n".join(lines), fontsize=9, ha="center", va="bottom")


def _dot(color: str, label: str) -> Line2D:
    return Line2D([], [], linestyle="", marker="o", markersize=5, color=color, label=label)


def _natural(name: str) -> list[Any]:
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in name.split("/")]
