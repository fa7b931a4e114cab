"""A row of the table: quality with and without weights, and what it costs."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxattr as ja
from experiments import ground_truth
from experiments.leaderboard.domains import Asked, Domain, Entry
from jaxattr import evaluation, files
from jaxattr.store.rows import FEATURES


@dataclasses.dataclass(frozen=True)
class Figures:
    """A method on a model.

    Attributes:
      domain: name of the model.
      method: name of the method.
      lds: {kind of weights: [mean, low, high]}.
      gain: LDS of learned weights minus that of uniform ones, [mean, low, high]; None without.
      qld: {kind of weights: fall of the output without the strongest, [mean, low, high]}.
      passes: seconds of it, without compiling, over those of a gradient pass.
      bytes: stored for each training example.
    """

    domain: str
    method: str
    lds: dict[str, list[float]]
    gain: list[float] | None
    qld: dict[str, list[float]]
    passes: float
    bytes: float


def measure(domain: Domain, entry: Entry, folder: Path) -> Figures:
    """Measures one method, all but QLD; what was measured before is read.

    Args:
      domain: the model.
      entry: the method.
      folder: where figures and scores are kept.
    """
    path = _path(domain, entry.name, folder, "json")
    if path.exists():
        return Figures(**json.loads(path.read_text()))
    with timed() as spent:
        ready = entry.ask()
        scores = jax.block_until_ready(ja.score(ready.made, ready.evaluation))
    each: dict[str, Any] = {"uniform": np.asarray(scores)}
    if ready.learning is not None and len(ready.made.layout.names) > 1:
        fit = ja.learn_weights(ready.made, ready.learning, outcomes=domain.outcomes())
        each["learned"] = np.asarray(ja.score(ready.made, ready.evaluation, weights=fit))
    lds = {kind: _lds(domain, found) for kind, found in each.items()}
    gain = None
    if "learned" in lds:
        change = evaluation.paired_difference(lds["learned"], lds["uniform"])
        gain = [change.mean, change.low, change.high]
    found = Figures(
        domain=domain.name,
        method=entry.name,
        lds={kind: [value.mean, value.low, value.high] for kind, value in lds.items()},
        gain=gain,
        qld={},
        passes=spent() / _seconds_of_pass(domain),
        bytes=_bytes(ready),
    )
    with files.written_whole(_path(domain, entry.name, folder, "npz")) as partial:
        np.savez(partial, **each)
    _keep(found, path)
    return found


ROWS_AT_ONCE = 4
"""Methods whose removals are trained together: random draws once, and not too much to lose."""


def with_qld(
    domain: Domain, rows: list[Figures], folder: Path, *, removed: float, asked: int
) -> list[Figures]:
    """Retrains without each query's strongest, for scores that `measure` kept; once.

    Args:
      domain: the model.
      rows: what was measured of each method so far.
      folder: as in `measure`.
      removed: share of the training set that is removed.
      asked: queries.
    """
    kept = {row.method: np.load(_path(domain, row.method, folder, "npz")) for row in rows}
    missing = [row for row in rows if not set(kept[row.method].files) <= set(row.qld)]
    done = {row.method: row for row in rows}
    for first in range(0, len(missing), ROWS_AT_ONCE):
        some = missing[first : first + ROWS_AT_ONCE]
        cells = [(row.method, kind) for row in some for kind in kept[row.method].files]
        scores = [kept[method][kind] for method, kind in cells]
        first_few = min(asked, *map(len, scores))
        falls = _falls(domain, [each[:first_few] for each in scores], removed)
        found = dict(zip(cells, falls, strict=True))
        for row in some:
            own = {kind: found[row.method, kind] for kind in kept[row.method].files}
            done[row.method] = dataclasses.replace(row, qld=own)
            _keep(done[row.method], _path(domain, row.method, folder, "json"))
    return list(done.values())


def differences(
    domain: Domain, entries: tuple[Entry, Entry], folder: Path
) -> dict[str, evaluation.Difference]:
    """The LDS of one method minus that of another with uniform weights, with paired intervals.

    Of the queries that both have scores of, the first ones.

    Args:
      domain: the model.
      entries: both methods.
      folder: as in `measure`.

    Returns:
      {kind of the first one's weights: difference}.
    """
    first, second = (np.load(_path(domain, entry.name, folder, "npz")) for entry in entries)
    asked = min(len(each["uniform"]) for each in (first, second))
    base = _lds(domain, second["uniform"][:asked])
    return {
        kind: evaluation.paired_difference(_lds(domain, first[kind][:asked]), base)
        for kind in first.files
    }


def _lds(domain: Domain, scores: np.ndarray) -> evaluation.LDS:
    """Of the first queries, as many as have scores."""
    truth = domain.truth
    return ja.lds(scores, truth.masks, truth.evaluation[..., : len(scores)])


def _path(domain: Domain, method: str, folder: Path, ending: str) -> Path:
    name = method.replace(", ", "-").replace(" ", "-")
    return folder / f"{domain.name}-{name}.{ending}"


def _keep(figures: Figures, path: Path) -> None:
    with files.written_whole(path) as partial:
        partial.write_text(json.dumps(dataclasses.asdict(figures), indent=1))


def _falls(domain: Domain, each: list[np.ndarray], removed: float) -> list[list[float]]:
    """[mean, low, high] over queries of each method's fall, from the same random draws."""
    asked = len(each[0])
    queries = jax.tree.map(
        lambda x: np.tile(x[:asked], (len(each), *[1] * (x.ndim - 1))), domain.queries
    )
    found = evaluation.removal(
        domain.train_fn, domain.output, np.concatenate(each), queries, jax.random.key(8),
        fractions=(removed,), opponents=False, at_once=16, mesh=ground_truth.mesh_of_devices(),
    ).proponents[0]  # fmt: skip
    parts = np.split(found.per_query, len(each))
    return [[float(part.mean()), *evaluation.mean_interval(part)] for part in parts]


def _bytes(asked: Asked) -> float:
    layout = asked.made.rows.layout
    width = layout.widths[FEATURES] * np.dtype(layout.dtypes[FEATURES]).itemsize
    return float(width * layout.checkpoints)


_PASSES: dict[str, float] = {}


def _seconds_of_pass(domain: Domain) -> float:
    """The shorter of two gradient passes, after one that compiles; measured once."""
    if domain.name not in _PASSES:
        domain.gradient_pass()
        _PASSES[domain.name] = min(_seconds(domain.gradient_pass) for _ in range(2))
    return _PASSES[domain.name]


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Seconds of what is done inside, less those in which JAX traced and compiled."""
    compiling = [0.0]

    def note(event: str, duration_secs: float, **kwargs: Any) -> None:
        del kwargs
        if event.startswith("/jax/core/compile/"):
            compiling[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(note)
    started, ended = time.perf_counter(), [0.0]
    try:
        yield lambda: max(ended[0] - started - compiling[0], 0.0)
    finally:
        ended[0] = time.perf_counter()
        jax.monitoring.unregister_event_duration_listener(note)
