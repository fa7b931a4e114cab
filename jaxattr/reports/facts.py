"""What the scores of a report are: method, weights, gain, warnings, and what they come from."""

import datetime
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxattr.index.index import Index, first_ids
from jaxattr.index.queries import QueryFeatures
from jaxattr.methods.method import citation
from jaxattr.methods.similarity import compares
from jaxattr.scores.weighting import weight_array
from jaxattr.typing import Weights
from jaxattr.weights.report import UNKNOWN_GAIN, WeightFit


class Group(NamedTuple):
    """A parameter group.

    Attributes:
      name: of the group.
      weight: learned or given.
      share: of the scores; None if it is not known.
      start_share: before learning; None likewise.
      parameters: how many.
    """

    name: str
    weight: float
    share: float | None
    start_share: float | None
    parameters: int


class Facts(NamedTuple):
    """What stands around the queries.

    Attributes:
      method: its name.
      link: as in `Method`.
      compares: whether scores say how alike examples are, and not what training on them did.
      weighting: what the weights are, in a few words.
      gain: of the weights over uniform ones, in words; None where there are none.
      tiles: (what, value, more) that are worth a large number.
      warnings: in words.
      groups: in the order of their names, numbers in these counted as such.
      provenance: (what, value).
      excluded: (parameter, why) of those in no group; None if that is not known.
      citation: BibTeX; empty if the method is not known.
    """

    method: str
    link: str
    compares: bool
    weighting: str
    gain: str | None
    tiles: tuple[tuple[str, str, str], ...]
    warnings: tuple[str, ...]
    groups: tuple[Group, ...]
    provenance: tuple[tuple[str, str], ...]
    excluded: tuple[tuple[str, str], ...] | None
    citation: str


def gather(index: Index, prepared: QueryFeatures, weights: Weights | None, version: str) -> Facts:
    """Gathers the facts.

    Args:
      index: the index.
      prepared: features of the queries.
      weights: as in `ja.report`.
      version: of this library.

    Returns:
      The facts.
    """
    fit = weights if isinstance(weights, WeightFit) else None
    method, kind = index.method, "uniform" if weights is None else "learned" if fit else "given"
    excluded = None if index.featurizer is None else index.featurizer.groups.excluded
    return Facts(
        method="method not given" if method is None else method.name,
        link=index.link,
        compares=compares(method),
        weighting=f"{kind} weights",
        gain=None if fit is None else UNKNOWN_GAIN if fit.gain is None else str(fit.gain),
        tiles=tuple(_tiles(index, prepared, fit)),
        warnings=tuple(_warnings(index, prepared, fit)),
        groups=_groups(index, weights, fit),
        provenance=tuple(_provenance(index, version)),
        excluded=excluded,
        citation="" if method is None else citation(method),
    )


def _tiles(
    index: Index, prepared: QueryFeatures, fit: WeightFit | None
) -> Iterator[tuple[str, str, str]]:
    method, q, lost = index.method, len(prepared.features), len(prepared.non_finite)
    if method is not None:
        yield "method", method.name, f"kernel: {method.kernel.name}"
    yield "queries", f"{q:,}", f"{lost} not finite" if lost else "all finite"
    left = f"{len(index.non_finite)} not finite, left out" if len(index.non_finite) else ""
    yield "training examples", f"{index.size:,}", left or "all finite"
    parameters = f"{sum(index.layout.sizes):,} parameters"
    yield "parameter groups", f"{len(index.layout.names):,}", parameters
    checkpoints = index.rows.layout.checkpoints
    yield "checkpoints", f"{checkpoints:,}", f"{index.layout.total:,} features each"
    if fit is not None and fit.gain is not None:
        gain = fit.gain
        low, high = (f"{100 * end:+.1f}" for end in (gain.low, gain.high))
        yield "gain in LDS", f"{100 * gain.mean:+.1f} %", f"95 % interval {low} to {high}"


def _warnings(index: Index, prepared: QueryFeatures, fit: WeightFit | None) -> Iterator[str]:
    if fit is not None:
        yield from fit.warnings
    for positions, total, what in (
        (index.non_finite, index.size, "training examples"),
        (prepared.non_finite, len(prepared.features), "queries"),
    ):
        if len(positions):
            yield (
                f"not finite: {len(positions)} of {total:,} {what} have gradients that are not "
                f"finite and are never ranked: {first_ids(positions)}."
            )
    errors = index.solve_errors
    if index.method is not None and errors is not None:
        kernel: Any = index.method.kernel  # one that iterates
        bad = np.flatnonzero(errors > kernel.largest_residual)
        if len(bad):
            yield (
                f"not converged: the solves of {len(bad)} of {len(errors):,} training examples "
                f"ended early: {first_ids(bad)}."
            )


def _groups(index: Index, weights: Weights | None, fit: WeightFit | None) -> tuple[Group, ...]:
    layout = index.layout
    values = np.asarray(weight_array(layout, weights))
    found = [
        Group(
            name,
            float(weight),
            None if fit is None else _known(fit.shares[name]),
            None if fit is None else _known(fit.start_shares[name]),
            size,
        )
        for name, weight, size in zip(layout.names, values, layout.sizes, strict=True)
    ]
    return tuple(sorted(found, key=lambda group: _natural(group.name)))


def _known(share: float) -> float | None:
    return share if math.isfinite(share) else None


def _natural(name: str) -> list[Any]:
    """Sorts layer 2 before layer 10, as the network has them."""
    return [(part.isdecimal(), int(part[-18:]) if part.isdecimal() else 0, part)
            for part in re.split(r"([0-9]+)", name)]  # fmt: skip


def _provenance(index: Index, version: str) -> Iterator[tuple[str, str]]:
    method, unknown = index.method, "not known: the index was opened without its method"
    yield "method", unknown if method is None else method.name
    yield "kernel", unknown if method is None else method.kernel.name
    yield "scores", "squares of sums" if index.link == "square" else "sums over groups"
    yield "training examples", f"{index.size:,}"
    yield "features per checkpoint", f"{index.layout.total:,}"
    yield "features stored as", index.precision
    yield "index", "in memory" if index.path is None else str(index.path)
    yield "devices", f"{index.place.shards} x {jax.default_backend()}"
    yield "made by", f"jaxattr {version}, JAX {jax.__version__}"
    yield "made on", f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
