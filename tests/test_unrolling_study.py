"""The study of unrolled influence, in small."""

import io

import jax
import pytest
from rich.console import Console

from experiments import unrolling


@pytest.mark.slow
def test_every_method_is_measured_on_both_runs():
    subject = unrolling.classifier("mlp", 2e-3, 1e-5)
    queries = jax.tree.map(lambda x: x[:4], subject.queries)
    told = io.StringIO()
    shown = unrolling.study(subject._replace(queries=queries, subsets=6), Console(file=told))
    names, *columns = (list(column.cells) for column in shown.columns)
    source = ["SOURCE, 1 segment", "SOURCE, 3 segments", "SOURCE, 3 segments, x 100"]
    assert names == ["unrolled", *source, "EK-FAC", "TracIn"]
    assert len(columns) == 4 and all(cell.count("%") == 1 for cells in columns for cell in cells)
    assert "120 steps unrolled" in told.getvalue()
