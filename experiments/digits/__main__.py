"""Prints what learned weights do for attribution on real digits, and draws it.

python -m experiments.digits            # a ViT and a ResNet, two to four minutes on two cores
python -m experiments.digits --full     # more of everything, an MLP, and methods with curvature
"""

import json
import os
import time
import warnings
from typing import Any

import jax
from rich.table import Table

from experiments import command_line, pictures
from experiments.digits import figures, study
from experiments.digits.study import Choice, Result, Subject
from jaxattr.weights.report import WeightWarning


def main() -> None:
    """Runs the study."""
    # A device per core, for retraining: XLA leaves cores idle in the many small steps of one.
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    arguments = command_line.parser("digits", __doc__).parse_args()
    warnings.simplefilter("ignore", WeightWarning)  # they stand in the file of results
    config = study.FULL if arguments.full else study.QUICK
    methods = study.METHODS | (study.CURVATURE if arguments.full else {})
    console, started = command_line.console(), time.monotonic()
    results: dict[str, dict[str, Result]] = {}
    measured: dict[tuple[str, str], tuple[Subject, Choice]] = {}
    for name in config.architectures:
        console.print(
            f"[bold]{name}[/bold]: training {config.subsets} models on halves of the data, to "
            f"measure on, and {config.outcomes} on quarters, to learn weights from"
        )
        subject = study.prepare(name, config, arguments.folder)
        results[name] = {}
        for method, choice in methods.items():
            console.print(f"{name}: {method}")
            choice = made_once(subject, choice)
            results[name][method] = study.measure(subject, choice)
            console.print(f"  {results[name][method].fit.gain}")
            measured[name, method] = subject, choice
    console.print(table(results))
    path = arguments.folder / ("full.json" if arguments.full else "quick.json")
    path.write_text(json.dumps({name: as_json(found) for name, found in results.items()}, indent=1))
    case = figures.clearest(results)
    figures.draw_proponents(
        *measured[case],
        results[case[0]][case[1]],
        figures.headline(results),
        arguments.folder / "proponents.png",
    )
    figures.write_report(
        *measured[case], results[case[0]][case[1]], arguments.folder / "report.html"
    )
    figures.draw_groups(by_array(results), arguments.folder / "groups.png")
    pictures.draw_lds(results, arguments.folder / "lds.png")
    console.print(
        f"{time.monotonic() - started:.0f} s. In {arguments.folder}/: report.html, to look "
        f"through; proponents.png, groups.png, lds.png. Numbers in {path}."
    )


def made_once(subject: Subject, choice: Choice) -> Choice:
    """The same choice with its method made: what measuring it compiles also serves to draw it."""
    method = choice.make(subject)
    return choice._replace(make=lambda _: method)


def by_array(results: dict[str, dict[str, Result]]) -> dict[str, dict[str, Result]]:
    """The methods that have a group per parameter array, which one picture can compare."""
    return {
        name: {method: result for method, result in found.items() if method in study.METHODS}
        for name, found in results.items()
    }


def table(results: dict[str, dict[str, Result]]) -> Table:
    """Makes the table of LDS by weights, with intervals.

    Args:
      results: {architecture: {method: result}}.

    Returns:
      A table for a terminal.
    """
    first = next(iter(next(iter(results.values())).values()))
    shown = Table(
        title="LDS in % on held-back queries, 95 % interval over subsets below. AUC of finding "
        "flipped labels by self-influence: uniform, learned",
        padding=(0, 0, 0, 1),
    )
    for heading in ("model", "method", *first.lds, "learned - uniform", "AUC"):
        shown.add_column(heading.replace(" ", "\n", 1), no_wrap=True)
    for name, found in results.items():
        for method, result in found.items():
            cells = [pictures.interval(lds) for lds in result.lds.values()]
            auc = "\n".join(f"{value:.3f}" for value in result.auc.values()) or "-"
            change = pictures.interval(result.difference, "+")
            shown.add_row(name, method, *cells, change, auc)
    return shown


def as_json(found: dict[str, Result]) -> dict[str, Any]:
    """The figures of one architecture, for a file."""
    return {
        method: {
            "lds": {
                name: {"mean": lds.mean, "low": lds.low, "high": lds.high, "skipped": lds.skipped}
                for name, lds in result.lds.items()
            },
            "learned_minus_uniform": vars(result.difference),
            "estimated_gain": vars(result.fit.gain),
            "mislabel_auc": result.auc,
            "weights": result.weights,
            "group_lds": result.group_lds,
            "warnings": result.fit.warnings,
        }
        for method, result in found.items()
    }


if __name__ == "__main__":
    main()
