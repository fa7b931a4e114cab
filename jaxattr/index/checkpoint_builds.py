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
    TrainingPass,
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
    RowLayout,
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
        params = self.place.whole(self.checkpoints[number])
        return TrainingPass(self.featurizer, params, number, self.source, self.block, self.place)


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
    kept = found.operator if keeps_operator(kernel) else None
    apply, residual = apply_kernel(job.place, kernel, layout, eta)
    anew = over.anew(fitted)
    made = _compiled_mapped(job.place, kernel, _RawForm.of(rows.layout, kernel), eta)
    rows.made_by(
        FEATURES,
        number,
        lambda positions: made(found.operator, found.exponent, *anew(positions)),
    )

    def self_contributions(positions: np.ndarray) -> jax.Array:
        phi = found.raw(positions).astype(rows.layout.wide)
        return apply(found.operator, phi, found.exponent)[1][SELF]

    if residual is None and rows.made_by(SELF, number, self_contributions):
        return BuiltCheckpoint(fitted, kept, found.finite)
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
    return BuiltCheckpoint(fitted, kept, found.finite)


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
    store = _compiled_raw(job.place, _RawForm.of(rows.layout, kernel))

    def blocks() -> Iterator[tuple[int | None, Features, jax.Array]]:
        nonlocal exponent
        for block in range(first):
            examples = rows.read(EXAMPLES, block, number)
            yield exponent, rows.read(RAW, block, number), examples[:, COLUMNS.finite] > 0
        digests = DIGESTS in rows.layout.widths
        stream = over.features(fitted, "features", first=first, digests=digests)
        for block, clean in enumerate(stream, first):
            if exponent is None:
                exponent = _unit(job, clean, ledger, number)
            values, kept = store(clean, exponent)
            rows.write(block, number, values)
            yield exponent, values[RAW], kept

    function = _kernel_sums(kernel, job.featurizer.layout, rows.layout.size, rows.layout.wide)
    statistics = over.sums(function, blocks())
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
    # Read once: kernels that ask for rows ask group by group, and hold them all as it is.
    whole = functools.cache(lambda: rows.column(RAW, over.number))

    def over_unit(columns: slice) -> np.ndarray:
        return np.ldexp(whole()[:, columns].astype(dtype), -exponent)

    def sums_of(sums: Any, data: Any, description: str) -> Any:
        other = over.of(as_source(data, description))
        # As queries, which draw their randomness from -1, -2, ...
        clean = other.features(fitted, description, lambda x: x._replace(ids=-1 - x.ids))
        function = _sums_function(sums, layout, other.source.size, dtype)
        return over.sums(function, ((exponent, each.features, each.kept) for each in clean))

    return Surroundings(
        layout=layout,
        rows=over_unit,
        curvature=fitted.curvature_over(exponent),
        sums_of=sums_of,
        exponent=exponent,
        hessian=lambda: curvature_products(over, fitted, finite),
    )


def _done(ledger: Ledger | None, name: str, checkpoint: int) -> int:
    return 0 if ledger is None else ledger.done(f"{name}/{checkpoint}")


def _finite(rows: Rows, number: int) -> np.ndarray:
    """Which examples have finite features at a checkpoint, [n]; raises if none has."""
    finite = rows.column(EXAMPLES, number)[:, COLUMNS.finite] > 0
    if not finite.any():
        raise ValueError(
            f"No training example has a finite gradient at checkpoint {number}: the parameters or "
            "the data are not finite, all labels are out of range, or the training diverged. Check "
            "the checkpoint."
        )
    return finite


@functools.lru_cache(maxsize=16)
def _kernel_sums(kernel: Kernel, layout: FeatureLayout, n: int, dtype: Any) -> Any:
    return _sums_function(kernel.sums, layout, n, dtype)


def _sums_function(sums: Any, layout: FeatureLayout, n: int, dtype: Any) -> Any:
    def of_block(exponent: jax.Array, phi: Features, kept: jax.Array) -> Any:
        return sums(layout, n, scaled(phi.astype(dtype), -exponent), kept)

    return of_block


def _kept(clean: CleanFeatures) -> dict[str, jax.Array]:
    """What is kept of examples beside their features."""
    residual = clean.residual
    kept = {EXAMPLES: jnp.stack([residual, clean.kept.astype(residual.dtype)], axis=1)}  # [b, 2]
    return kept if clean.digests is None else kept | {DIGESTS: clean.digests}


@functools.lru_cache(maxsize=16)
def _compiled_identity(place: Placement, layout: FeatureLayout, eta: float) -> Any:
    def prepare(clean: CleanFeatures) -> dict[str, jax.Array]:
        phi, scaled = clean.features, clean.features
        if eta != 1:  # which may take the largest past the range of floats
            kept = clean.kept & jnp.isfinite(phi * eta).all(axis=1)
            phi = jnp.where(kept[:, None], phi, 0)
            scaled, clean = phi * eta, clean._replace(kept=kept)
        selves = _self_contributions(layout, phi, scaled)
        return {FEATURES: scaled, SELF: selves} | _kept(clean)

    return place.jit(prepare, DATA)


class _RawForm(NamedTuple):
    """How raw features are kept.

    Attributes:
      dtype: they are rounded to.
      wide: dtype that a kernel computes with.
      n: number of training examples.
      sized: whether those that are too large for the kernel are left out.
    """

    dtype: Any
    wide: Any
    n: int
    sized: bool

    @classmethod
    def of(cls, layout: RowLayout, kernel: Kernel) -> "_RawForm":
        """Of the rows and the kernel of a method."""
        return cls(layout.dtypes[RAW], layout.wide, layout.size, kernel.degree is not None)

    def of_clean(self, clean: CleanFeatures, exponent: jax.Array) -> CleanFeatures:
        """Features as they are kept; jittable."""
        phi, kept = clean.features, clean.kept
        if self.sized:
            phi, kept = without_too_large(phi, kept, exponent, self.n)
        return clean._replace(features=phi.astype(self.dtype), kept=kept)


@functools.lru_cache(maxsize=16)
def _compiled_raw(place: Placement, form: _RawForm) -> Any:
    """The step (clean features, exponent) -> rows to keep, and which of them count."""

    def prepare(clean: CleanFeatures, exponent: jax.Array) -> tuple[dict, jax.Array]:
        clean = form.of_clean(clean, exponent)
        return {RAW: clean.features} | _kept(clean), clean.kept

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
        return _in_unit(kernel, operator, small, exponent), own

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

    def residual(*given: Any) -> jax.Array:
        found = measure(*given)[:, None]
        return jnp.where(jnp.isnan(found), jnp.inf, found)  # NaN stands for what was never written

    return both, place.jit(residual, DATA)


@functools.lru_cache(maxsize=16)
def _compiled_mapped(place: Placement, kernel: Kernel, form: _RawForm, eta: float) -> Any:
    """The step (operator, exponent, *clean features) -> eta K phi, for rows made anew."""

    def mapped(operator: Any, exponent: jax.Array, *clean: Any) -> Features:
        phi = form.of_clean(CleanFeatures(*clean), exponent).features.astype(form.wide)
        found = _in_unit(kernel, operator, scaled(phi, -exponent), exponent)
        return found if eta == 1 else found * eta

    same = form.dtype == form.wide  # then written over in place
    return place.jit(mapped, DATA, donate_argnums=(2,) if same else ())


def _in_unit(kernel: Kernel, operator: Any, small: Features, exponent: jax.Array) -> Features:
    """K phi, of phi over 2^exponent."""
    return scaled(kernel.apply(operator, small), (kernel.degree or 0) * exponent)


def _self_contributions(layout: FeatureLayout, phi: Features, mapped: Features) -> jax.Array:
    """Contributions of examples to their own scores, with `SelfColumns`: products may be large."""
    of_phi, size = exponent_of(phi, axis=1), exponent_of(mapped, axis=1)
    products = scaled(phi, -of_phi[:, None]) * scaled(mapped, -size[:, None])
    columns = [products[:, part].sum(axis=1) for part in layout.slices.values()]
    size_or_none = jnp.where(mapped.any(axis=1), size, NO_SIZE)
    columns += [x.astype(phi.dtype) for x in (of_phi + size, size_or_none)]
    return jnp.stack(columns, axis=1)
