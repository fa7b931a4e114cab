"""Chooses the defaults of `ja.learn_weights`: three models by three methods, for each setting.

python -m experiments.digits.defaults      # about ten minutes on two cores
"""

import argparse
import dataclasses
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

import jaxattr as ja
from experiments import command_line, ground_truth
from experiments.digits import study
from experiments.digits.study import Subject
from jaxattr.weights.report import WeightWarning

STARTS = ("uniform", "unit_rms")
TOP_KS = (5, 10, 20, 50)
L2S = (0.03, 0.1, 0.3)


def main() -> None:
    """Measures every setting and prints by how much it changes LDS, mean and worst."""
    parser = argparse.ArgumentParser(prog="python -m experiments.digits.defaults")
    parser.add_argument("--folder", type=Path, default=Path("runs/digits"), help="for all results")
    folder = parser.parse_args().folder
    warnings.simplefilter("ignore", WeightWarning)
    config = dataclasses.replace(
        study.QUICK, architectures=("vit", "resnet", "mlp"), train=1000, outcomes=8, copies=8
    )
    changes: dict[str, dict[str, float]] = {}
    console = command_line.console()
    for name in config.architectures:
        subject = study.prepare(name, config, folder)
        for method, choice in study.METHODS.items():
            changes[f"{name} {method}"] = change_by_setting(subject, choice.make(subject))
            console.print(f"{name} {method}: done")
            path = folder / "defaults.json"
            path.write_text(json.dumps(changes, indent=1))
    console.print(table(changes))
    console.print(f"Numbers in {path}.")


def change_by_setting(subject: Subject, method: ja.Method) -> dict[str, float]:
    """LDS with learned weights minus LDS with uniform weights, in points, for each setting.

    Args:
      subject: the architecture.
      method: the attribution method.

    Returns:
      {setting: change}.
    """
    index = study.index_of(method, subject.checkpoints, subject.digits.train)
    learning = ja.query_features(index, subject.digits.learning)
    weights = {
        "uniform": dict.fromkeys(index.layout.names, 1.0),
        "unit RMS": ground_truth.unit_rms_weights(index, learning),
    }
    for start, top_k, l2 in itertools.product(STARTS, TOP_KS, L2S):
        options: dict[str, Any] = {"start": start, "top_k": top_k, "l2": l2}
        weights[f"{start}, k {top_k}, l2 {l2}"] = ja.learn_weights(
            index, learning, **options
        ).weights
    queries = ja.query_features(index, subject.digits.evaluation)
    lds = dict(ground_truth.lds_of_weights(index, queries, subject.truth, weights))
    base = lds.pop("uniform").mean
    return {setting: 100 * (found.mean - base) for setting, found in lds.items()}


def table(changes: dict[str, dict[str, float]]) -> Table:
    """One row per setting, one column per model and method.

    Args:
      changes: {model and method: {setting: change}}.

    Returns:
      A table for a terminal.
    """
    shown = Table(title="LDS, learned minus uniform, in points")
    for heading in ("setting", "mean", "worst", *changes):
        shown.add_column(heading.replace(" ", "\n", 1), no_wrap=True)
    for setting in next(iter(changes.values())):
        values = [found[setting] for found in changes.values()]
        cells = [f"{value:+.1f}" for value in (np.mean(values), min(values), *values)]
        shown.add_row(setting, *cells)
    return shown


if __name__ == "__main__":
    main()
