"""The rehearsal of a pod: its verdicts, and a run of it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grain")

from experiments.pod import __main__ as pod
from experiments.pod import paper

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_rehearsal_agrees_with_one_device(tmp_path):
    command = [sys.executable, "-m", "experiments.pod", "--dtype", "float32", "--hosts", "2"]
    ran = subprocess.run(
        [*command, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "MISSED" not in ran.stdout and ran.stdout.count("met") >= 14


def found(folder, ids, scores):
    folder.mkdir()
    weighted = np.array([[4.0, 3.0, 2.99999, 1.0]])
    np.savez(folder / "found.npz", **{"m/ids": ids, "m/scores": scores, "m/weighted": weighted})


def test_ids_may_swap_only_where_scores_tie(tmp_path):
    found(tmp_path / "alone", [[0, 1]], [1.0, 2.0])
    found(tmp_path / "pod", [[0, 2]], [1.0, 2.002])
    verdicts = {check.what: check.met for check in pod.compare(tmp_path, 1e-5)}
    assert verdicts == {"m/ids": True, "m/scores": False, "m/weighted": True}
    assert pod.compare(tmp_path, 1e-2)[1].met
    assert not pod.compare(tmp_path, 1e-6)[0].met


def test_the_plan_counts_what_is_stored():
    case = paper.Case()
    assert paper.features(case) == 57_344
    assert paper.bytes_per_row(case) == 57_344 + 896 * 4
    assert paper.hours(case) == pytest.approx(118.5, rel=1e-3)


def test_a_job_that_begins_anew_is_seen(tmp_path):
    (tmp_path / "pod").mkdir()
    path = tmp_path / "pod/reads-0.json"
    path.write_text(json.dumps({pod.METHODS[0]: [0, 0, 1, 2, 3]}))
    assert [check.met for check in pod.went_on(tmp_path, {"raw/0": 2})] == [True, True]
    path.write_text(json.dumps({pod.METHODS[0]: [0, 1, 2, 3, 1]}))
    assert [check.met for check in pod.went_on(tmp_path, {"raw/0": 0})] == [False, False]
