"""Says which training pictures gave generated ones their subject, their style and their background.

python -m experiments.attributes            # under ten minutes on two cores
python -m experiments.attributes --full     # twice the pictures, a larger model trained for longer
"""

import json
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import command_line, files
from experiments.attributes import figures, study
from experiments.attributes.study import ATTRIBUTES, TOP, Result, Retrieval
from jaxattr import evaluation
from jaxattr.weights.report import WeightWarning

Rows = dict[str, dict[str, Retrieval]]
"""{what scores: {attribute: retrieval}}."""


def main() -> None:
    """Runs the study."""
    arguments = command_line.parser("attributes", __doc__).parse_args()
    folder, console, started = arguments.folder, Console(), time.monotonic()
    warnings.simplefilter("ignore", WeightWarning)  # they stand in the file of results
    config = study.FULL if arguments.full else study.QUICK
    console.print(
        f"training {config.checkpoints} conditional model on {config.train} pictures, "
        f"{config.recipe.steps} steps"
    )
    subject = study.prepare(config, folder)
    results: dict[str, Result] = {}
    for name, method in study.methods(subject.denoiser, config).items():
        console.print(f"  {name}")
        index = study.index_of(subject, method)
        results[name] = study.measure(subject, index)
        path = folder / f"concepts_{name.split(',')[0].lower()}.png"
        figures.draw_concepts(subject, index, results[name], path)
    figures.draw_weights(results, folder / "weights.png")
    baselines = study.baselines(subject)
    console.print(table(results, baselines))
    name = "full.json" if arguments.full else "quick.json"
    with files.written_whole(folder / name) as partial:
        partial.write_text(json.dumps(as_json(results, baselines), indent=1))
    console.print(
        f"{time.monotonic() - started:.0f} s. In {folder}/: concepts_tracin.png, "
        f"concepts_d-trak.png, weights.png, {name}."
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
        f"pictures that have the attribute (precision@{TOP}, %, 95 % interval over queries), "
        f"whether any has (hit@{TOP}, %), share of all that have it (strict recall@{TOP}, %)",
        padding=(0, 0, 0, 1),
    )
    for heading in ("method", "scores", *ATTRIBUTES):
        shown.add_column(heading)
    for method, rows in _rows(results, baselines):
        for name, found in rows.items():
            shown.add_row(method, name, *(_cell(found[attribute]) for attribute in ATTRIBUTES))
        shown.add_section()
    return shown


def as_json(results: dict[str, Result], baselines: Rows) -> dict[str, Any]:
    """All figures, for a file."""
    matrix = {
        method: {
            name: {
                attribute: {field: float(np.mean(x)) for field, x in each._asdict().items()}
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
    return {"matrix": matrix, "weights": weights, "warnings": warned}


def _rows(results: dict[str, Result], baselines: Rows) -> Iterator[tuple[str, Rows]]:
    for method, result in results.items():
        yield method, result.table
    yield "similarity", baselines


def _cell(found: Retrieval) -> str:
    low, high = evaluation.mean_interval(found.precision)
    return (
        f"{100 * found.precision.mean():.0f} [{100 * low:.0f}, {100 * high:.0f}]  "
        f"hit {100 * found.hit.mean():.0f}  recall {100 * found.recall.mean():.1f}"
    )


if __name__ == "__main__":
    main()
