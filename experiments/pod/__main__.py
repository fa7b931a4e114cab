"""A rehearsal of a TPU pod on one machine: four hosts of two devices, one of which is killed.

python -m experiments.pod                         # parameters in bfloat16; three to five minutes
python -m experiments.pod --dtype float32
python -m experiments.pod --activations bfloat16  # arithmetic too, which misses the limits

One process on one device trains a small Llama and saves its state through Orbax. It then builds
indexes on disk by EK-FAC and LoGRA, learns weights, finds the top k, and scores token by token. A
job of four processes does the same from the checkpoint, with parameters over a mesh of 4 x 2 (FSDP
and tensor parallel), and each reads its own rows. While it builds the first index one process is
killed by SIGKILL; the job is started again, and goes on. What both find is compared. The exit
status says whether it agrees within LIMITS.
"""

import argparse
import collections
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.pod import data, launching, paper
from experiments.pod.worker import BLOCK, METHODS

HOSTS, DEVICES, ROWS, QUERIES, BLOCKS = 4, 2, 256, 6, 6
SECONDS = 600.0

# With activations in bfloat16 it is missed: scores differ by 3e-2, weights by 1e-1. Sums over the
# axis `model` are of rounded parts then; one device is 1.5e-2 from its own scores in float32.
LIMITS = {"float32": 1e-5, "bfloat16": 1e-3}
"""{type of parameters: largest difference, over the largest number}."""


class Check(NamedTuple):
    """One thing that was looked at.

    Attributes:
      what: it is.
      found: what came out.
      wanted: what should have.
      met: whether it did.
    """

    what: str
    found: str
    wanted: str
    met: bool


def main() -> None:
    """Runs both jobs, and prints what was compared."""
    given, console, started = _arguments(), Console(width=130), time.monotonic()
    folder = given.folder / f"{given.dtype}-{given.activations}"
    shutil.rmtree(folder, ignore_errors=True)
    data.write(data.packed(ROWS, seed=1), folder / "rows")
    data.write(data.packed(QUERIES, seed=2), folder / "queries")
    types = ["--dtype", given.dtype, "--activations", given.activations]
    done = rehearse(folder, types, given.hosts, console)
    checks = [
        *compare(folder, LIMITS[given.dtype]),
        *went_on(folder, done, given.hosts),
        own_rows(folder),
    ]
    title = f"parameters in {given.dtype}, activations in {given.activations}"
    console.print(verdicts(title, checks, given.hosts))
    console.print(programs(folder))
    console.print(paper.plan(paper.Case()))
    console.print(f"{time.monotonic() - started:.0f} s. All of it is in {folder}/.")
    sys.exit(not all(check.met for check in checks))


def rehearse(folder: Path, types: Sequence[str], count: int, console: Console) -> dict[str, int]:
    """Runs the job on one device, and on the pod: killed once, and started again.

    Args:
      folder: of rows and queries; for all results.
      types: arguments of the workers.
      count: hosts of the pod.
      console: where it says how far it is.

    Returns:
      {stage of the first index: blocks that were finished when it was killed}.
    """
    arguments, began = ["--folder", str(folder), *types], time.monotonic()

    def run(name: str, hosts: int, devices: int, until: Callable) -> dict[str, int] | None:
        job = launching.start(arguments, folder / name, hosts, devices)
        try:
            return until(job)
        finally:
            launching.end(job)
            console.print(f"{time.monotonic() - began:4.0f} s: {name}, {hosts} x {devices} ended")

    pod = folder / "pod"
    run("alone", 1, 1, lambda job: launching.finish(job, folder / "alone", SECONDS))
    done = run(
        "pod", count, DEVICES,
        lambda job: launching.kill_one(job, pod / METHODS[0], BLOCKS, SECONDS),
    )  # fmt: skip
    console.print(f"       host {count - 1} was killed; finished blocks {done}; starting again")
    run("pod", count, DEVICES, lambda job: launching.finish(job, pod, SECONDS))
    return done or {}


def compare(folder: Path, limit: float) -> list[Check]:
    """Compares what the pod found with what one device found.

    Args:
      folder: of both.
      limit: largest difference, over the largest number.
    """
    with np.load(folder / "alone/found.npz") as one, np.load(folder / "pod/found.npz") as other:
        alone, pod = dict(one), dict(other)
    checks = []
    for name, expected in alone.items():
        method, what = name.split("/")
        if what == "ids":
            swaps, gap = swapped(pod[name], expected, alone[f"{method}/weighted"])
            text = f"{swaps} of {expected.size} differ, their scores by {gap:.1e}"
            checks.append(Check(name, text, f"<= {limit:.0e}", gap <= limit))
        else:
            difference = float(np.abs(pod[name] - expected).max() / np.abs(expected).max())
            checks.append(Check(name, f"{difference:.1e}", f"<= {limit:.0e}", difference <= limit))
    return checks


def swapped(got: np.ndarray, expected: np.ndarray, scores: np.ndarray) -> tuple[int, float]:
    """Counts ids that differ, and says by how much the scores of those do.

    Args:
      got: ids [q, k].
      expected: ids [q, k].
      scores: of all, [q, n].

    Returns:
      How many; and the largest difference between scores at one place, over the largest score.
    """
    one, other = (np.take_along_axis(scores, ids, axis=1) for ids in (got, expected))
    gap = np.abs(one - other).max() / np.abs(scores).max()
    return int((got != expected).sum()), float(gap)


def went_on(folder: Path, done: dict[str, int], hosts: int = HOSTS) -> list[Check]:
    """Whether the job was killed in the middle of the features, and did not begin anew.

    Args:
      folder: of both jobs.
      done: what `rehearse` returned.
      hosts: of the pod.
    """
    total = ROWS // BLOCK
    text = ", ".join(f"{count} of {total} blocks of {stage}" for stage, count in done.items())
    middle = any(0 < count < total for count in done.values())
    # Rows of finished blocks are read once, to compare them with the record; others, to go on. Row
    # 0 says what rows look like.
    counts = [collections.Counter(read) for read in _reads(folder, METHODS[0])]
    again = sum(many > 1 for count in counts for row, many in count.items() if row > 0)
    return [
        Check(f"finished when host {hosts - 1} was killed", text, "some, not all", middle),
        Check("rows read twice after that", str(again), "0", again == 0),
    ]


def own_rows(folder: Path) -> Check:
    """Whether each host read its own rows for the index that was built in one go.

    Args:
      folder: of both jobs.
    """
    reads = [set(read) - {0} for read in _reads(folder, METHODS[1])]
    most, union = max(len(each) for each in reads), set.union(*reads)
    shared = sum(len(each) for each in reads) - len(union)
    met = shared == 0 and union == set(range(1, ROWS))
    return Check(
        "rows that a host read", f"{most} of {ROWS}, {shared} of them by two hosts",
        "its own, and the first", met,
    )  # fmt: skip


def verdicts(title: str, checks: Sequence[Check], hosts: int = HOSTS) -> Table:
    """Makes the table of checks.

    Args:
      title: of the table.
      checks: its rows.
      hosts: of the pod.

    Returns:
      A table for a terminal.
    """
    shown = Table(title=f"{hosts} hosts of {DEVICES} devices, and one device; {title}")
    for heading in ("what", "largest difference", "wanted", "verdict"):
        shown.add_column(heading)
    for check in checks:
        shown.add_row(check.what, check.found, check.wanted, "met" if check.met else "MISSED")
    return shown


def programs(folder: Path) -> Table:
    """Makes the table of what moves between chips in a step.

    Args:
      folder: of both jobs.

    Returns:
      A table for a terminal.
    """
    shown = Table(title="Collectives in a step, as compiled for this mesh; all lower for TPU")
    for heading in ("index", "step", "collectives", "lowered for TPU"):
        shown.add_column(heading)
    for name in METHODS:
        found = json.loads((folder / f"pod/{name}-steps.json").read_text())
        for step, counts in found.items():
            size = counts.pop("bytes for TPU")
            text = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
            shown.add_row(name, step, text or "none", f"{size / 1e3:,.0f} kB")
    return shown


def _reads(folder: Path, method: str) -> list[list[int]]:
    """Positions that each host of the pod read for an index."""
    paths = sorted((folder / "pod").glob("reads-*.json"))
    return [json.loads(path.read_text())[method] for path in paths]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.pod",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    types = ("bfloat16", "float32")
    parser.add_argument("--dtype", choices=types, default="bfloat16", help="of parameters")
    parser.add_argument("--activations", choices=types, default="float32", help="and arithmetic")
    parser.add_argument("--hosts", type=int, default=HOSTS, help="of the pod; two at least")
    parser.add_argument("--folder", type=Path, default=Path("runs/pod"), help="for all results")
    given = parser.parse_args()
    if (given.dtype, given.activations) == ("float32", "bfloat16"):
        parser.error("activations in bfloat16 go with parameters in bfloat16")
    return given


if __name__ == "__main__":
    main()
