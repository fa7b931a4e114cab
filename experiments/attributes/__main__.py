"""Says which training pictures gave generated ones their subject, their style and their background.

python -m experiments.attributes            # some ten minutes of processor time
python -m experiments.attributes --full     # twice the pictures, a model trained for longer
"""

import json
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from rich.table import Table

from experiments import command_line
from experiments.attributes import figures, study
from experiments.attributes.study import ATTRIBUTES, TOP, Result, Retrieval, Subject
from jaxattr import evaluation, files
from jaxattr.weights.report import WeightWarning

Rows = dict[str, dict[str, Retrieval]]
"""{what scores: {attribute: retrieval}}."""


def main() -> None:
    """Runs the study."""
    arguments = command_line.parser("attributes", __doc__).parse_args()
    folder, console, started = arguments.folder, command_line.console(), time.monotonic()
    warnings.simplefilter("ignore", WeightWarning)  # they stand in the file of results
    config = study.FULL if arguments.full else study.QUICK
    console.print(
        f"training {config.checkpoints} conditional model on {config.train} pictures, "
        f"{config.recipe.steps} steps"
    )
    subject = study.prepare(config, folder)
    figures.draw_generated(subject, folder / "generated.png")
    console.print(recognition_table(subject))
    methods = study.methods(subject.denoiser, config)
    results: dict[str, Result] = {}
    for name, method in methods.items():
        console.print(f"  {name}")
        index = study.index_of(subject, method)
        results[name] = study.measure(subject, index)
        path = folder / f"concepts_{name.split(',')[0].lower()}.png"
        figures.draw_concepts(subject, index, results[name], path)
    figures.draw_weights(results, folder / "weights.png")
    first = next(iter(methods))
    console.print(f"  {first}, with the labels")
    index = study.index_of(subject, methods[first], labels=True)
    results[f"{first}, with the labels"] = study.measure(subject, index)
    baselines = study.baselines(subject)
    console.print(table(results, baselines))
    console.print(gains_table(results))
    name = "full.json" if arguments.full else "quick.json"
    with files.written_whole(folder / name) as partial:
        partial.write_text(json.dumps(as_json(subject, results, baselines), indent=1))
    console.print(
        f"{time.monotonic() - started:.0f} s. In {folder}/: generated.png, concepts_*.png, "
        f"weights.png, {name}."
    )


def table(results: dict[str, Result], baselines: Rows) -> Table:
    """Makes the matrix of attributes by weights.

    Args:
      results: {method: figures}.
      baselines: retrieval by similarity.

    Returns:
      A table for a terminal.
    """
    shown = Table(
        title=f"Generated pictures with all three attributes: share of the top {TOP} training "
        f"pictures that have the attribute (precision@{TOP}, %), and whether any has (hit@{TOP}, "
        "%), with 95 % intervals over queries",
        padding=(0, 0, 0, 1),
    )
    for heading in ("method", "scores", *ATTRIBUTES):
        shown.add_column(heading)
    for method, rows in _rows(results, baselines):
        for name, found in rows.items():
            shown.add_row(method, name, *(_cell(found[attribute]) for attribute in ATTRIBUTES))
        shown.add_section()
    return shown


def gains_table(results: dict[str, Result]) -> Table:
    """Makes the table of what weights gain.

    Args:
      results: {method: figures}.

    Returns:
      A table for a terminal.
    """
    shown = Table(
        title=f"What weights gain in precision@{TOP}, in points, 95 % interval over the same "
        "queries; own w: of each attribute; w_all: learned from pictures with all attributes"
    )
    for heading in ("method", "difference", *ATTRIBUTES):
        shown.add_column(heading)
    for method, result in results.items():
        for compared, gains in result.gains.items():
            shown.add_row(method, compared, *(_interval(g._asdict(), "+") for g in gains.values()))
    return shown


def recognition_table(subject: Subject) -> Table:
    """Makes the table that says whether the model draws what it is asked for.

    Args:
      subject: the model.

    Returns:
      A table for a terminal.
    """
    shown = Table(title="How often a classifier of training pictures is right (%)")
    for heading in ("attribute", "drawn pictures", "generated pictures", "chance"):
        shown.add_column(heading)
    for name, found in subject.recognised.items():
        shown.add_row(name, *(f"{100 * share:.0f}" for share in found))
    return shown


def as_json(subject: Subject, results: dict[str, Result], baselines: Rows) -> dict[str, Any]:
    """All figures, for a file."""
    matrix = {
        method: {
            name: {
                attribute: {field: _summary(x) for field, x in each._asdict().items()}
                for attribute, each in found.items()
            }
            for name, found in rows.items()
        }
        for method, rows in _rows(results, baselines)
    }
    weights = {
        method: {name: fit.weights for name, fit in result.fits.items()}
        for method, result in results.items()
    }
    warned = {
        method: {name: fit.warnings for name, fit in result.fits.items()}
        for method, result in results.items()
    }
    gains = {
        method: {
            compared: {attribute: gain._asdict() for attribute, gain in found.items()}
            for compared, found in result.gains.items()
        }
        for method, result in results.items()
    }
    recognised = {name: found._asdict() for name, found in subject.recognised.items()}
    return {"recognised": recognised, "matrix": matrix, "gains": gains, "weights": weights,
            "warnings": warned}  # fmt: skip


def _summary(values: np.ndarray) -> dict[str, float]:
    low, high = evaluation.mean_interval(values)
    return {"mean": float(np.mean(values)), "low": low, "high": high}


def _rows(results: dict[str, Result], baselines: Rows) -> Iterator[tuple[str, Rows]]:
    for method, result in results.items():
        yield method, result.table
    yield "similarity", baselines


def _cell(found: Retrieval) -> str:
    precision, hit = (_interval(_summary(x)) for x in (found.precision, found.hit))
    return f"{precision}  hit {hit}"


def _interval(found: Mapping[str, float], sign: str = "") -> str:
    """Mean, low and high in %."""
    mean, low, high = (100 * found[end] for end in ("mean", "low", "high"))
    return f"{mean:{sign}.0f} [{low:{sign}.0f}, {high:{sign}.0f}]"


if __name__ == "__main__":
    main()
