"""One checkpoint of an index, in two stages, each a stream of blocks.

The first computes features and sums the kernel's statistics, the second applies the kernel (the
identity needs the first alone). What an earlier run had finished is read back, as it was stored, so
that the statistics and all that follows are bit for bit the same.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.features.bases import NOTHING, Fits, Fitted
from jaxattr.features.featurizer import Featurizer
from jaxattr.features.plans import FeatureLayout
from jaxattr.fitting.hessians import curvature_products
from jaxattr.fitting.passes import (
    CleanFeatures,
    NumberedBatch,
    TrainingPass,
    over_power,
    typical_exponent,
    without_too_large,
)
from jaxattr.index.saving import load_fitted, load_operator, save_fitted, save_operator
from jaxattr.index.verifying import check_fitted
from jaxattr.kernels import Identity, Iterates, Kernel, MapsQueries, Surroundings, keeps_operator
from jaxattr.methods.method import Method
from jaxattr.scales import exponent_of, scaled
from jaxattr.sharding import DATA, Placement, barrier, failing_together, process
from jaxattr.sources import Source, as_source, track
from jaxattr.store.ledger import Ledger
from jaxattr.store.rows import (
    COLUMNS,
    DIGESTS,
    ERRORS,
    EXAMPLES,
    FEATURES,
    NO_SIZE,
    RAW,
    SELF,
    Make,
    Rows,
)
from jaxattr.typing import Features, Params


class BuildJob(NamedTuple):
    """What an index is made from.

    Attributes:
      method: the attribution method.
      featurizer: its featurizer.
      checkpoints: the parameters, placed.
      source: the data.
      block: examples per step.
      place: the devices.
    """

    method: Method
    featurizer: Featurizer
    checkpoints: tuple[Params, ...]
    source: Source
    block: int
    place: Placement

    def pass_over(self, number: int) -> TrainingPass:
        """The pass of one checkpoint over the data."""
        return TrainingPass(
            self.featurizer, self.checkpoints[number], number, self.source, self.block, self.place
        )


class BuiltCheckpoint(NamedTuple):
    """What is left of a checkpoint beside its rows.

    Attributes:
      fitted: what the basis was fitted to.
      operator: of the kernel; None where it is no longer needed.
      finite: which examples have finite features, bool [n].
    """

    fitted: Fitted
    operator: Any
    finite: np.ndarray


def build_checkpoint(
    job: BuildJob, over: TrainingPass, rows: Rows, ledger: Ledger | None
) -> BuiltCheckpoint:
    """Fits the basis, computes features, applies the kernel.

    Args:
      job: what the index is made from.
      over: the pass of this checkpoint.
      rows: where they are kept.
      ledger: on disk; else None.

    Returns:
      What is left beside the rows, which are written when this returns.
    """
    fitted = _fit(job, over, ledger)
    kernel, layout, number = job.method.kernel, job.featurizer.layout, over.number
    eta = job.method.weights_of(len(job.checkpoints))[number]
    blocks, first = rows.layout.blocks, _done(ledger, FEATURES, number)
    digests = DIGESTS in rows.layout.widths
    if isinstance(kernel, Identity):
        prepare = _compiled_identity(job.place, layout, eta)
        anew = over.anew(fitted)
        rows.made_by(FEATURES, number, lambda positions: prepare(anew(positions))[FEATURES])
        stream = over.features(fitted, "features", first=first, digests=digests)
        with failing_together():
            for block, clean in enumerate(stream, first):
                rows.write(block, number, prepare(clean))
            rows.flush()
        check_fitted(rows, fitted, number)
        return BuiltCheckpoint(fitted, (), _finite(rows, number))
    if ledger is not None and first == blocks:
        operator = load_operator(ledger.folder, number, job.place)
        if operator is not None or not keeps_operator(kernel):
            rows.finish(number)  # what a run left that was killed after its last block
            return BuiltCheckpoint(fitted, operator, _finite(rows, number))
    found = _operator(job, over, fitted, rows, ledger)
    apply, residual = apply_kernel(job.place, kernel, layout, eta)

    def mapped_at(positions: np.ndarray) -> jax.Array:
        phi = found.raw(positions).astype(rows.layout.wide)
        return apply(found.operator, phi, found.exponent)[1][FEATURES]

    rows.made_by(FEATURES, number, mapped_at)
    starts = range(first, blocks)
    with failing_together():
        for block in track(iter(starts), f"{kernel.name}, checkpoint {number}", blocks, first):
            phi = rows.read(RAW, block, number).astype(rows.layout.wide)
            mapped, values = apply(found.operator, phi, found.exponent)
            if residual is not None:
                values[ERRORS] = residual(found.operator, phi, mapped)
            rows.write(block, number, values)
        rows.flush()
    rows.finish(number)
    return BuiltCheckpoint(fitted, found.operator, found.finite)


class _Inverted(NamedTuple):
    """A kernel, ready to be applied.

    Attributes:
      operator: of the kernel.
      exponent: it is to be given features over 2 to this power.
      finite: which examples count, bool [n].
      raw: makes raw features of examples anew.
    """

    operator: Any
    exponent: int
    finite: np.ndarray
    raw: Make


def _operator(
    job: BuildJob, over: TrainingPass, fitted: Fitted, rows: Rows, ledger: Ledger | None
) -> _Inverted:
    """Computes what is missing of the features, and the kernel from all of them."""
    kernel, number = job.method.kernel, over.number
    first = _done(ledger, RAW, number)
    rows.begin(number)

    exponent = _unit_on_record(ledger, number) if first else None
    layout, sized = rows.layout, kernel.degree is not None
    store = _compiled_raw(job.place, layout.dtypes[RAW], layout.size, sized)

    def blocks() -> Iterator[tuple[Features, jax.Array]]:
        nonlocal exponent
        small = over_power(job.place, rows.layout.wide)
        for block in range(first):
            examples = rows.read(EXAMPLES, block, number)
            phi = small(rows.read(RAW, block, number), exponent=exponent)
            yield phi, examples[:, COLUMNS.finite] > 0
        digests = DIGESTS in rows.layout.widths
        stream = over.features(fitted, "features", first=first, digests=digests)
        for block, clean in enumerate(stream, first):
            if exponent is None:
                exponent = _unit(job, clean, ledger, number)
            values, kept = store(clean, exponent)
            rows.write(block, number, values)
            yield small(values[RAW], exponent=exponent), kept

    function = _kernel_sums(kernel, job.featurizer.layout, rows.layout.size, rows.layout.wide)
    statistics = over.sums(function, (), blocks())
    with failing_together():
        rows.flush()
    barrier("features written")
    check_fitted(rows, fitted, number)
    finite = _finite(rows, number)
    unit = exponent or 0
    anew = over.anew(fitted)

    def raw(positions: np.ndarray) -> jax.Array:  # as it was made for the statistics
        return store(anew(positions), unit)[0][RAW]

    rows.made_by(RAW, number, raw)
    operator = kernel.finalize(statistics, _surroundings(job, over, fitted, rows, finite, unit))
    operator = job.place.whole(job.place.agreed(operator))
    if keeps_operator(kernel) and ledger is not None:
        save_operator(ledger.folder, number, operator, job.place)
    return _Inverted(operator, unit, finite, raw)


def _unit(job: BuildJob, clean: CleanFeatures, ledger: Ledger | None, number: int) -> int:
    """The power of two that a kernel's features are given over, kept for a run that goes on."""
    if job.method.kernel.degree is None:
        return 0
    exponent = typical_exponent(job.place, clean.features, clean.kept)
    if ledger is not None and process()[0] == 0:
        ledger.folder.write(_unit_file(number), {"exponent": exponent})
    return exponent


def _unit_on_record(ledger: Ledger | None, number: int) -> int:
    found = None if ledger is None else ledger.folder.read(_unit_file(number))
    return 0 if found is None else int(found["exponent"])


def _unit_file(number: int) -> str:
    return f"raw-{number}/unit.json"  # goes when the raw features go


def _fit(job: BuildJob, over: TrainingPass, ledger: Ledger | None) -> Fitted:
    """Fits the method's basis to the checkpoint, or loads what an earlier run fitted."""
    if ledger is not None:
        loaded = load_fitted(ledger.folder, over.number, job.place)
        if loaded is not None:
            return loaded
    basis = job.featurizer.rule.projection.basis
    fitted = basis.fit(over) if isinstance(basis, Fits) else NOTHING
    fitted = job.place.whole(job.place.agreed(fitted))
    if ledger is not None:
        save_fitted(ledger.folder, over.number, fitted, job.place)
    return fitted


def _surroundings(
    job: BuildJob, over: TrainingPass, fitted: Fitted, rows: Rows, finite: np.ndarray, exponent: int
) -> Surroundings:
    layout, dtype = job.featurizer.layout, rows.layout.wide

    def over_unit(columns: slice) -> np.ndarray:
        return np.ldexp(rows.column(RAW, over.number, columns).astype(dtype), -exponent)

    def sums_of(sums: Any, data: Any, description: str) -> Any:
        other = over.of(as_source(data, description))
        clean = other.features(fitted, description, _as_queries)
        function = _sums_function(sums, layout, other.source.size, dtype)
        small = functools.partial(over_power(job.place, dtype), exponent=exponent)
        return over.sums(function, (), ((small(each.features), each.kept) for each in clean))

    return Surroundings(
        layout=layout,
        rows=over_unit,
        curvature=fitted.curvature_over(exponent),
        sums_of=sums_of,
        exponent=exponent,
        hessian=lambda: curvature_products(over, fitted, finite),
    )


def _as_queries(numbered: NumberedBatch) -> NumberedBatch:
    """Queries draw their randomness from -1, -2, ..."""
    return numbered._replace(ids=-1 - numbered.ids)


def _done(ledger: Ledger | None, name: str, checkpoint: int) -> int:
    return 0 if ledger is None else ledger.done(f"{name}/{checkpoint}")


def _finite(rows: Rows, number: int) -> np.ndarray:
    """Which examples have finite features at a checkpoint, [n]; raises if none has."""
    finite = rows.column(EXAMPLES, number)[:, COLUMNS.finite] > 0
    if not finite.any():
        raise ValueError(
            f"No training example has a finite gradient at checkpoint {number}: the parameters or "
            "the data are not finite, or the training diverged. Check the checkpoint."
        )
    return finite


@functools.lru_cache(maxsize=16)
def _kernel_sums(kernel: Kernel, layout: FeatureLayout, n: int, dtype: Any) -> Any:
    return _sums_function(kernel.sums, layout, n, dtype)


def _sums_function(sums: Any, layout: FeatureLayout, n: int, dtype: Any) -> Any:
    def of_block(shared: tuple[()], phi: Features, kept: jax.Array) -> Any:
        del shared
        return sums(layout, n, phi.astype(dtype), kept)

    return of_block


def _kept(clean: CleanFeatures) -> dict[str, jax.Array]:
    """What is kept of examples beside their features."""
    residual = clean.residual
    kept = {EXAMPLES: jnp.stack([residual, clean.kept.astype(residual.dtype)], axis=1)}  # [b, 2]
    return kept if clean.digests is None else kept | {DIGESTS: clean.digests}


@functools.lru_cache(maxsize=16)
def _compiled_identity(place: Placement, layout: FeatureLayout, eta: float) -> Any:
    def prepare(clean: CleanFeatures) -> dict[str, jax.Array]:
        phi = clean.features
        scaled = phi if eta == 1 else phi * eta
        selves = _self_contributions(layout, phi, scaled)
        return {FEATURES: scaled, SELF: selves} | _kept(clean)

    return place.jit(prepare, DATA)


@functools.lru_cache(maxsize=16)
def _compiled_raw(place: Placement, dtype: Any, n: int, sized: bool) -> Any:
    """The step (clean features, exponent) -> rows to keep, and which of them count."""

    def prepare(clean: CleanFeatures, exponent: jax.Array) -> tuple[dict, jax.Array]:
        if sized:
            phi, kept = without_too_large(clean.features, clean.kept, exponent, n)
            clean = clean._replace(features=phi, kept=kept)
        return {RAW: clean.features.astype(dtype)} | _kept(clean), clean.kept

    return place.jit(prepare, DATA)


@functools.lru_cache(maxsize=16)
def apply_kernel(
    place: Placement, kernel: Kernel, layout: FeatureLayout, eta: float
) -> tuple[Any, Any]:
    """The compiled steps that apply a kernel to features [b, p].

    Args:
      place: the devices.
      kernel: of the method.
      layout: the groups.
      eta: weight of the checkpoint.

    Returns:
      (operator, phi, exponent) -> K phi and the rows to keep, where the kernel is given phi over 2
      to this power; and (operator, phi, K phi) -> relative residuals, or None for kernels that do
      not iterate.
    """
    # Programs apart, since XLA fuses them into one that takes twice as long on a CPU.

    def apply(operator: Any, phi: Features, exponent: jax.Array) -> tuple[Features, Features]:
        small = scaled(phi, -exponent)
        own = kernel.of_queries(operator, small) if isinstance(kernel, MapsQueries) else phi
        return scaled(kernel.apply(operator, small), (kernel.degree or 0) * exponent), own

    def values(mapped: Features, of_queries: Features) -> dict[str, jax.Array]:
        scaled = mapped if eta == 1 else mapped * eta
        return {FEATURES: scaled, SELF: _self_contributions(layout, of_queries, scaled)}

    first, second = place.jit(apply, DATA), place.jit(values, DATA)

    def both(operator: Any, phi: Features, exponent: int) -> tuple[Features, dict[str, jax.Array]]:
        mapped, of_queries = first(operator, phi, exponent)
        return mapped, second(mapped, of_queries)

    if not isinstance(kernel, Iterates):
        return both, None
    measure = kernel.residual
    residual = place.jit(lambda *args: measure(*args)[:, None], DATA)
    return both, residual


def _self_contributions(layout: FeatureLayout, phi: Features, mapped: Features) -> jax.Array:
    """Contributions of examples to their own scores, with `SelfColumns`: products may be large."""
    of_phi, size = exponent_of(phi, axis=1), exponent_of(mapped, axis=1)
    products = scaled(phi, -of_phi[:, None]) * scaled(mapped, -size[:, None])
    columns = [products[:, part].sum(axis=1) for part in layout.slices.values()]
    size_or_none = jnp.where(mapped.any(axis=1), size, NO_SIZE)
    columns += [x.astype(phi.dtype) for x in (of_phi + size, size_or_none)]
    return jnp.stack(columns, axis=1)
