"""Commands that say who taught the model what it did, and how right that is."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np

import jaxattr as ja
from jaxattr.command import options, printing
from jaxattr.command.tasks import Task
from jaxattr.evaluation import measured_gain
from jaxattr.files import writable_file
from jaxattr.keys import key_or_default
from jaxattr.scores.ranking import TopK
from jaxattr.scores.tables import listed_names
from jaxattr.sharding import process
from jaxattr.weights.saving import fit_as_json, save_fit

_models = click.option("--models", type=int, default=64, show_default=True, help="To retrain.")
_number = click.option("--k", type=int, default=10, show_default=True, help="How many per query.")
_queries = click.option(
    "--queries", type=click.Path(path_type=Path), metavar="FILE.npz",
    help="Arrays [q, ...] by their names in an example. Default: those of the task.",
)  # fmt: skip


@click.command()
@options.of_built_task
@_models
@click.option(
    "--outcomes",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Where outcomes are kept, whole after every few models. Default: PATH.outcomes.npz.",
)
@click.option(
    "--without-outcomes", is_flag=True,
    help="Learn from the shape of the scores alone, though the task could retrain.",
)  # fmt: skip
def weights(
    task: Task,
    as_json: bool,
    path: str,
    models: int,
    outcomes: Path | None,
    without_outcomes: bool,
) -> None:
    """Learn how much each group counts; writes PATH.weights.json.

    If the task names train_fn and output, small models are retrained on quarters of the data, and
    weights are fitted to what those do: the fit then says how much weights gain. Queries are the
    task's learning_queries, or its queries.
    """
    index = options.opened_index(task, path)
    name = "queries" if task.get("learning_queries") is None else "learning_queries"
    queries = options.queries_of(task, None, name)
    found = None
    can_retrain = None not in (task.get("train_fn"), task.get("output"))
    if without_outcomes and outcomes:
        raise click.UsageError("--outcomes is of retrained models: leave --without-outcomes out.")
    if outcomes and not can_retrain:
        raise click.UsageError("--outcomes is of retrained models: name train_fn and output.")
    if can_retrain and not without_outcomes:
        kept = outcomes or options.beside(path, "outcomes.npz")
        found = _retrained(task, index, queries, kept, models, 0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ja.WeightWarning)  # the fit has them
        fit = ja.learn_weights(index, queries, outcomes=found)
    save_fit(options.weights_path(path), fit, index)
    for warning in fit.warnings:
        printing.note(f"warning: {warning}")
    printing.note(f"written to {options.weights_path(path)}")
    printing.result(fit_as_json(fit), dataclasses.replace(fit, warnings=()), as_json)


@click.command()
@options.of_built_task
@_queries
@_number
@click.option("--opponents", is_flag=True, help="The most negative scores instead.")
@click.option(
    "--csv", type=click.Path(path_type=Path), metavar="FILE", help="Write them there too."
)
@options.weighted
def top(
    task: Task,
    as_json: bool,
    path: str,
    queries: Path | None,
    k: int,
    opponents: bool,
    csv: Path | None,
    uniform: bool,
) -> None:
    """Name the training examples that taught the model most about each query."""
    index = options.opened_index(task, path)
    fit = options.learned_weights(index, path, uniform)
    ids = _ids(task, index.size)
    if csv is not None:
        writable_file(csv)
    asked = options.queries_of(task, queries)
    found = ja.top_k(index, asked, k=k, weights=fit, opponents=opponents)
    if csv is not None:
        if process()[0] == 0:
            found.to_csv(csv, ids=ids)
        printing.note(f"written to {csv}")
    listed = _listed(found, ids)
    printing.result({"opponents": opponents, "queries": listed}, _as_table(listed), as_json)


@click.command()
@options.of_built_task
@_queries
@click.option("--k", type=int, default=8, show_default=True, help="How many per query.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where the page goes. Default: PATH.report.html.",
)
@options.weighted
def report(
    task: Task,
    as_json: bool,
    path: str,
    queries: Path | None,
    k: int,
    out: Path | None,
    uniform: bool,
) -> None:
    """Make a page that shows each query beside its proponents and opponents."""
    index = options.opened_index(task, path, train=task.get("train"))
    fit = options.learned_weights(index, path, uniform)
    said = ("predictions",) if queries is None else ()  # of the task's own queries
    page = ja.report(
        index,
        options.queries_of(task, queries),
        weights=fit,
        k=k,
        title=task.path.stem,
        path=out or options.beside(path, "report.html"),
        **task.options("render", "labels", "decode", *said),
    )
    printing.result({"page": page}, f"The page is {Path(page).resolve()}", as_json)


@click.command()
@options.of_built_task
@_models
@options.weighted
def lds(task: Task, as_json: bool, path: str, models: int, uniform: bool) -> None:
    """Retrain models on halves of the data; say whether scores predict what those do.

    Prints the linear datamodelling score on the task's queries with uniform weights, and with
    learned ones if there are any. What was retrained is kept in PATH.lds.npz.
    """
    for name in ("train_fn", "output"):
        task.need(name, "models must be retrained to be asked")
    index = options.opened_index(task, path)
    queries = options.queries_of(task, None)
    fit = options.learned_weights(index, path, uniform)
    kept = options.beside(path, "lds.npz")
    outcomes = _retrained(task, index, queries, kept, models, 0.5)
    if fit is None:
        found = ja.lds(ja.score(index, queries), outcomes.masks, outcomes.outputs)
        document = {"uniform": _without_arrays(found)}
        printing.result(document, f"LDS {found} with uniform weights", as_json)
        return
    gain = measured_gain(index, queries, fit, outcomes)
    document = {name: _without_arrays(each) for name, each in gain._asdict().items()}
    printing.result(document, gain, as_json)


def _retrained(
    task: Task, index: ja.Index, queries: Any, kept: Path, models: int, fraction: float
) -> ja.Outcomes:
    """Models on random parts of the data, other ones for each fraction; kept where they resume."""
    key = key_or_default(task.get("key"))
    printing.note(f"retraining {models} models on {fraction:.0%} of the data each, kept in {kept}")
    found = ja.outcomes(
        task.get("train_fn"),
        task.get("output"),
        queries,
        index.size,
        key=jax.random.fold_in(key, round(1 / fraction)),
        models=models,
        fraction=fraction,
        mesh=task.get("mesh"),
        path=kept,
        params=task.get("checkpoints"),
    )
    printing.note(str(found))
    return found


def _ids(task: Task, size: int) -> list[Any] | None:
    """The user's own ids where the task has some."""
    ids = task.get("ids")
    names = None if ids is None else listed_names(ids)
    if names is not None and len(names) != size:
        raise ValueError(f"ids must have one for each of the {size} examples, got {len(names)}.")
    return names


def _listed(top: TopK, ids: list[Any] | None) -> list[dict[str, Any]]:
    """Per query what is there."""
    rows = zip(np.asarray(top.ids), np.asarray(top.scores), strict=True)
    there = [(found[found >= 0].tolist(), scores[found >= 0].tolist()) for found, scores in rows]
    return [
        {"query": q, "ids": found if ids is None else [ids[i] for i in found], "scores": scores}
        for q, (found, scores) in enumerate(there)
    ]


def _as_table(listed: list[dict[str, Any]]) -> str:
    lines = ["query  id (score), strongest first"]
    for each in listed:
        pairs = zip(each["ids"], each["scores"], strict=True)
        lines.append(f"{each['query']:5}  " + "  ".join(f"{i} ({x:.3g})" for i, x in pairs))
    return "\n".join(lines)


def _without_arrays(score: Any) -> dict[str, Any]:
    """The figures of an LDS, or of a difference of two."""
    return {name: x for name, x in vars(score).items() if not isinstance(x, np.ndarray)}
