"""Other ways to the outcomes, and other groups: what each gains, beside the usual way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxattr as ja
from experiments import ground_truth
from experiments.digits import data, training
from experiments.digits import study as digits
from experiments.digits.study import Choice, Subject
from experiments.weights import cells
from experiments.weights.subjects import DIGITS
from jaxattr import evaluation
from jaxattr.evaluation import Difference

MODELS = ("vit", "resnet")
METHODS = ("TracIn", "TRAK")
BANDS = (1, 2, 4)


class Way(NamedTuple):
    """A way to outcomes.

    Attributes:
      queries: learning queries.
      outcomes: on them.
      copies: noised training examples and their ids, or None.
    """

    queries: Any
    outcomes: ja.Outcomes
    copies: Any


def run(folder: Path, console: Console) -> Table:
    """Measures every variant on every model.

    Args:
      folder: for all that is trained.
      console: to say what is being done.

    Returns:
      A table for a terminal.
    """
    found: dict[str, dict[str, Difference]] = {}
    for name in MODELS:
        subject = digits.prepare(name, DIGITS, folder)
        indexes = {
            method: digits.index_of(
                digits.METHODS[method].make(subject), subject.checkpoints, subject.digits.train
            )
            for method in METHODS
        }
        for way, given in _ways(subject, folder):
            for method, index in indexes.items():
                found.setdefault(way, {})[f"{name} {method}"] = _gained(index, subject, given)
            console.print(f"{name}: {way}", *map(str, found[way].values()))
        usual = Way(subject.digits.learning, subject.outcomes, subject.copies)
        for grouping, choice in _groupings():
            index = digits.index_of(
                choice.make(subject), subject.checkpoints, subject.digits.train, choice.groups
            )
            title = f"EK-FAC, {grouping}"
            found.setdefault(title, {})[f"{name} EK-FAC"] = _gained(index, subject, usual)
            groups = len(index.layout.names)
            console.print(f"{name}: {title}, {groups} groups", *map(str, found[title].values()))
    return _table(found)


def _ways(subject: Subject, folder: Path) -> Iterator[tuple[str, Way]]:
    """The usual way, and others of the same cost unless they say so."""
    name, train, queries = subject.model.name, subject.digits.train, subject.digits.learning
    n, usual = len(train["label"]), Way(queries, subject.outcomes, subject.copies)
    train_fn, margin = training.trainer(subject.model, train), training.margin(subject.model)
    short = training.trainer(subject.model, train, batch_size=12)

    def trained(
        title: str, queries: Any = queries, train_fn: Any = train_fn, **options: Any
    ) -> Way:
        outcomes = ja.outcomes(
            train_fn, margin, queries, n, key=jax.random.key(8), at_once=64,
            mesh=ground_truth.mesh_of_devices(), path=folder / f"variants-{name}" / f"{title}.npz",
            **({"models": 64} | options),
        )  # fmt: skip
        return Way(queries, outcomes, subject.copies)

    yield "64 quarters", usual
    yield "64 quarters, no copies", usual._replace(copies=None)
    yield "64 other quarters", trained("quarters")
    stratified = trained("stratified", strata=train["label"])
    yield "64 quarters, stratified by label", stratified
    counts = np.eye(10)[train["label"]]
    yield (
        "64 quarters, label counts taken out of outputs",
        usual._replace(outcomes=_without(subject.outcomes, subject.outcomes.masks @ counts)),
    )
    yield (
        "128 eighths, half the batch",
        trained("eighths", train_fn=short, models=128, fraction=0.125),
    )
    yield "64 quarters of a pool of half", trained("pool", pool=n // 2)
    more = data.load(DIGITS.train, 4 * DIGITS.queries, DIGITS.queries).learning
    evaluated = {tuple(image.ravel()) for image in subject.digits.evaluation["image"]}
    kept = [i for i, image in enumerate(more["image"]) if tuple(image.ravel()) not in evaluated]
    more = {field: values[kept] for field, values in more.items()}
    count = len(kept)
    yield (
        f"16 quarters, {len(queries['label'])} queries",
        usual._replace(outcomes=cells.first(subject.outcomes, 16)),
    )
    yield f"16 quarters, {count} queries", trained("queries", queries=more, models=16)


def _groupings() -> Iterator[tuple[str, Choice]]:
    for bands in BANDS:
        options = {} if bands == 1 else {"bands": bands}

        def make(subject: Subject, options: dict[str, Any] = options) -> ja.Method:
            return ja.ekfac(training.loss(subject.model), **options)

        yield ("by layer" if bands == 1 else f"{bands}x{bands} bands"), Choice(make, ja.by_layer)


def _without(outcomes: ja.Outcomes, known: np.ndarray) -> ja.Outcomes:
    """Outcomes less what is linear in something known of each subset, [s, k]."""
    centred = known - known.mean(axis=0)
    fitted = centred @ np.linalg.lstsq(centred, outcomes.outputs, rcond=None)[0]
    return ja.Outcomes(outcomes.masks, outcomes.outputs - fitted, outcomes.queries)


def _gained(index: ja.Index, subject: Subject, way: Way) -> Difference:
    fit = ja.learn_weights(index, way.queries, outcomes=way.outcomes, copies=way.copies)
    weights = {"uniform": dict.fromkeys(index.layout.names, 1.0), "learned": fit.weights}
    truth, queries = subject.truth, subject.digits.evaluation
    lds = dict(ground_truth.lds_of_weights(index, queries, truth, weights))
    return evaluation.paired_difference(lds["learned"], lds["uniform"])


def _table(found: dict[str, dict[str, Difference]]) -> Table:
    columns = [f"{name} {method}" for name in MODELS for method in (*METHODS, "EK-FAC")]
    shown = Table(title="LDS gained over uniform weights, in %, with paired 95 % intervals")
    for heading in ("outcomes or groups", *columns):
        shown.add_column(heading)
    for title, gained in found.items():
        cells = [str(gained[column]) if column in gained else "-" for column in columns]
        shown.add_row(title, *cells)
    return shown
