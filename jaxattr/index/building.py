"""Building an index: features of the training set, the kernel's statistics, the kernel applied.

Per checkpoint two stages, each a stream of blocks: the first computes features and sums the
kernel's statistics, the second applies the kernel (the identity needs the first alone). On disk a
ledger counts the finished blocks of each stage. What a run that was killed had finished is read
back, as it was stored, so that the statistics and all that follows are bit for bit the same.
"""

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxattr import groups as groups_lib
from jaxattr.counts import flag
from jaxattr.features.bases import Fits
from jaxattr.groups import Groups
from jaxattr.index import provenance
from jaxattr.index.budgets import BuildRequest, check_device, looking_at
from jaxattr.index.checkpoint_builds import BuildJob, build_checkpoint
from jaxattr.index.index import ConvergenceWarning, Index, Recorded, first_ids, report_non_finite
from jaxattr.index.margins import warn_of_losses
from jaxattr.index.saving import (
    COMPLETE,
    MANIFEST,
    BesideRows,
    Closed,
    examples_at_first,
    examples_on_record,
    load_finished,
    read_closed,
    read_manifest,
    refuse_others,
    save_finished,
    with_first,
)
from jaxattr.index.verifying import Verify, check_rereading, data_differences, how_much
from jaxattr.inputs.wording import name_of, shapes
from jaxattr.kernels import Identity, Iterates, Kernel, keeps_operator
from jaxattr.keys import key_or_default
from jaxattr.methods.method import Method
from jaxattr.sharding import barrier, placement, process
from jaxattr.sources import announce
from jaxattr.store.disk_rows import DiskRows
from jaxattr.store.folder import Folder, StoreError, on_first_process
from jaxattr.store.lease import Lease
from jaxattr.store.ledger import Ledger, finished
from jaxattr.store.recomputed_rows import RecomputedRows
from jaxattr.store.rows import (
    COLUMNS,
    DIGESTS,
    ERRORS,
    EXAMPLES,
    FEATURES,
    NO_SIZE,
    RAW,
    SELF,
    SELF_COLUMNS,
    MemoryRows,
    RowLayout,
    Rows,
)
from jaxattr.store.seals import SEALS, save_seals
from jaxattr.typing import Key, Params


def build_index(
    method: Method,
    checkpoints: Params | Sequence[Params],
    train: Any,
    *,
    groups: Groups = groups_lib.by_layer,
    key: Key | None = None,
    batch_size: int = 256,
    microbatch: int | None = None,
    memory: int | None = None,
    mesh: Mesh | None = None,
    path: str | os.PathLike[str] | None = None,
    dtype: Any = None,
    store: bool = True,
    extend: bool = False,
    verify: Verify | None = None,
) -> Index:
    """Featurises a training set and applies the method's kernel to it, in memory or on disk.

    On disk, the same call again goes on where a run was killed, repeating at most the block that
    was in flight, and ends with bit for bit the same index; when it is finished, it only opens it.

    Args:
      method: `ja.tracin(loss)`, `ja.trak(margin)`, ...
      checkpoints: one params pytree, or a list or tuple of them. Params that are themselves a list
        or tuple go in as `[params]`. On a mesh they may be sharded, and stay so.
      train: a pytree of arrays with a common leading axis, a list of examples, or a random-access
        source (`__len__`, `__getitem__`). Position n is the example's id. With several hosts each
        reads only its own examples.
      groups: `by_layer`, `by_leaf`, a layout, or a pytree of labels.
      key: key of projections and of stochastic outputs. Default: `jax.random.key(0)`.
      batch_size: examples per step, and per chunk on disk.
      microbatch: examples whose gradients are in memory at once, per device. Default: as many as
        have room in a quarter of the device's memory (1 GiB on a CPU), activations included.
      memory: instead of `microbatch`: bytes per device for parameters, feature step, statistics
        and, unless it is on disk, the index. The largest microbatch that fits is found by
        compiling the step; see `ja.plan`.
      mesh: devices to use, with an axis "data" for examples and optionally an axis "model" for the
        columns of features in memory. Default: the default device.
      path: a new folder, or one that an earlier run began; local, or a URL such as gs://...
        Default: in memory.
      dtype: of the stored features: float32 (the default; float64 where they are), bfloat16 (half
        the size), int8 (a quarter; a scale per 64 columns of a row, so that each feature is off by
        at most 0.4 % of the largest of them) or float8_e4m3fn (a quarter; a scale per row, each
        feature off by at most 6 % of itself). With these two a kernel is fitted to bfloat16.
      store: False keeps no features, in memory or on disk: they are made anew, a block at a time,
        by each call that needs them, at the cost of a pass over the data; the first `ja.top_k` or
        `ja.self_influence` takes one more. So `train` must stay as it is. For features that are
        too long to be kept, such as whole gradients (`ja.projections.identity()`, exact EK-FAC).
        Blocks are as large as their features have room; queries' features are held as ever.
      extend: `train` has grown since the index was finished: adds the new examples, for methods
        whose kernel is the identity and whose basis, if any, is not fitted to the data.
      verify: how much of `train` is compared, example by example, with what an index that is there
        already was made from: "all", the default for arrays in memory; or "sample", 64 examples,
        evenly spread, the default for sources: other changes go unseen. What is read anyway is
        always compared.

    Returns:
      The index; n * c * p numbers.

    Raises:
      TypeError: if the method, the checkpoints or the data are something else.
      ValueError: if checkpoints differ in structure, the data are empty or ragged, the output is
        no scalar, the groups are no partition, a kernel is singular, no gradient is finite, a mesh
        or a dtype does not fit, or the memory does not suffice.
      StoreError: if the folder cannot be written, is in use by another job, is damaged, or was
        made from other arguments, parameters or data, all of which are named.

    Warns:
      NonFiniteWarning: with the ids of training examples that were left out.
      UserWarning: if TRAK was given what looks like a loss, a function draws random numbers that do
        not come from its key, gradients are zero, two checkpoints are the same arrays, or a list of
        checkpoints may be one model's parameters.
      UserWarning: if `ja.influence`'s damped Hessian has negative eigenvalues.
      ConvergenceWarning: with the ids of those whose solve did not converge.
      TruncationWarning: if leading eigenvectors hold little of the curvature.
    """
    place = placement(mesh)
    if verify not in (None, "all", "sample"):
        raise ValueError(f'verify must be "all" or "sample", got {verify!r}.')
    if not isinstance(store, bool | np.bool_):
        raise TypeError(f"store must be True or False, got {store!r}: a folder goes in as path=.")
    if flag("extend", extend) and path is None:
        raise ValueError("extend=True adds to an index on disk: give its path.")
    if not store and (path is not None or dtype is not None):
        raise ValueError("store=False keeps no features: leave path and dtype out.")
    key, on_disk = key_or_default(key), path is not None
    with looking_at(method, checkpoints, train) as (parameters, source):
        key, parameters = place.whole(key), place.shared(tuple(parameters))
        request = BuildRequest(method, parameters, source, groups, key, place, on_disk, dtype)
        featurize = request.settle(batch_size, microbatch, memory)
        batch_size = batch_size if store else request.smaller(featurize, batch_size)
    announce(f"{source.size:,} training examples of {shapes(source.example)}")
    folder = None if path is None else Folder(path)
    block = request.block(featurize, batch_size, _begun(folder, extend))
    layout = request.rows(featurize, block)
    job = BuildJob(method, featurize, parameters, source, block, place)
    if not store:
        return _build(job, RecomputedRows(layout, place), None)
    if folder is None:
        check_device(layout.bytes_in_memory(place), place, "The index in memory")
        return _build(job, MemoryRows(layout, place), None)
    with contextlib.ExitStack() as stack:  # the first process holds the lease for all
        lease = on_first_process(lambda: stack.enter_context(Lease(folder)))
        return _build_on_disk(job, folder, layout, extend, how_much(verify, source), lease)


def _begun(folder: Folder | None, extend: bool) -> int | None:
    """Examples that an index was begun with, which may be fewer than a block; None for these."""
    there = None if folder is None else read_manifest(folder)
    if folder is None or there is None:
        return None
    examples = examples_on_record(folder, there)
    assert examples is not None
    begun = examples_at_first(there, examples)
    return begun if extend or begun != examples else None


def _build(job: BuildJob, rows: Rows, ledger: Ledger | None) -> Index:
    found = [
        build_checkpoint(job, job.pass_over(number), rows, ledger)
        for number in range(len(job.checkpoints))
    ]
    warn_of_losses(job, rows, found[0].fitted)
    # Not where it would take a pass, nor of solves, which are reported by themselves.
    if not isinstance(rows, RecomputedRows) and not isinstance(job.method.kernel, Iterates):
        _warn_of_zeros(job, rows)
    finite, errors = functools.reduce(np.logical_and, [one.finite for one in found]), None
    kernel = job.method.kernel
    if isinstance(kernel, Iterates):
        each = [rows.column(ERRORS, c)[:, 0] for c in range(len(found))]
        errors = functools.reduce(np.maximum, each)
    result = BesideRows(
        tuple(one.fitted for one in found),
        tuple(one.operator for one in found if keeps_operator(kernel)),
        np.flatnonzero(~finite),
        errors,
    )
    return _index(job, rows, result, ledger)


def _index(job: BuildJob, rows: Rows, found: BesideRows, ledger: Ledger | None) -> Index:
    _report_non_finite(rows, found.non_finite)
    _report_errors(job.method.kernel, found.solve_errors)
    return Index(
        method=job.method,
        featurizer=job.featurizer,
        checkpoints=job.checkpoints,
        layout=job.featurizer.layout,
        rows=rows,
        path=None if ledger is None else ledger.folder.path,
        link=job.method.link,
        train=job.source,
        **found._asdict(),
    )


def _build_on_disk(
    job: BuildJob,
    folder: Folder,
    layout: RowLayout,
    extend: bool,
    verify: Verify,
    lease: Lease | None,
) -> Index:
    here = provenance.manifest(job.method, job.featurizer, job.checkpoints, job.source, layout)
    there, complete = read_manifest(folder), read_closed(folder)
    before = examples_on_record(folder, there)
    if there is not None and before is not None:
        here = with_first(here, examples_at_first(there, before))
    strangers = [] if there else [name for name in folder.names() if name != "lease.json"]
    barrier("index read")  # before anyone writes: all processes must see the same
    if strangers:
        raise StoreError(
            f"{folder.path} is not empty and holds no index (found {', '.join(strangers[:3])}): "
            "give another path."
        )
    limit = _check_manifest(folder, there, here, job, extend)
    if there is not None:
        _check_data(folder, there, complete, layout, job, verify)
    ledger = Ledger(folder, *process(), lease)
    rows = DiskRows(folder, layout, job.place, ledger)
    if limit is None and complete is not None and complete.examples == job.source.size:
        rows = DiskRows(folder, layout, job.place, seals=complete.seals)
        on_first_process(rows.remove_raw)
        found = load_finished(folder, complete.record, layout.checkpoints, job.place)
        return _index(job, rows, found, ledger)
    if there is None:  # first of all, so that whatever is left behind is known for what it is
        on_first_process(functools.partial(_write_manifest, folder, layout, here))
    ledger.open(barrier, limit)

    def begin() -> None:  # in an order in which the same call goes on wherever it is killed
        folder.delete(COMPLETE)
        folder.delete(SEALS)
        if there not in (None, here):
            _write_manifest(folder, layout, here)
        for name in layout.widths:
            if name != RAW:
                rows.create(name)

    on_first_process(begin)
    rows.check_chunks()
    index = _build(job, rows, ledger)
    barrier("rows written")
    check_rereading(rows)
    # On all processes, since parameters and rows may be spread over them.
    recorded = Recorded(index.query_side, int(index.exponent))
    if process()[0] == 0:
        ledger.check()
        seals = save_seals(folder, rows.chunks())
        save_finished(folder, index, recorded, seals)
    barrier("index finished")
    return index


def _check_manifest(
    folder: Folder,
    there: dict | None,
    here: dict,
    job: BuildJob,
    extend: bool,
) -> int | None:
    """Refuses what does not belong together.

    Returns:
      How many blocks stay when the index is extended; None if it is not.
    """
    before = examples_on_record(folder, there)
    if there is None or before is None:
        if extend:
            raise StoreError(f"{folder.path} holds no index to extend.")
        return None
    if not extend or before == job.source.size:
        refuse_others(folder, provenance.differences(there, here))
        return None
    kernel: Kernel = job.method.kernel
    basis: Any = job.featurizer.rule.projection.basis
    fits, depends = isinstance(basis, Fits), ""
    if fits:
        depends = f"a basis that is fitted to all training examples ({basis.name})"
    if not isinstance(kernel, Identity):
        depends = f"a kernel that depends on all training examples ({kernel.name})"
    if depends:
        raise StoreError(
            f"{folder.path} cannot be extended: {job.method.name} has {depends}, so new ones "
            "change every row. Build a new index."
        )
    if before > job.source.size:
        raise StoreError(
            f"{folder.path} cannot be extended: it has {before} examples, and train has only "
            f"{job.source.size}. Pass all of them, the old ones first."
        )
    old = here | {"data": there["data"]}
    refuse_others(folder, provenance.differences(there, old))
    return before // job.block


def _check_data(
    folder: Folder,
    there: dict,
    complete: Closed | None,
    layout: RowLayout,
    job: BuildJob,
    verify: Verify,
) -> None:
    """Refuses other data than those of the blocks that are there."""
    known = before = there["data"]["examples"]
    if complete is None:
        done = finished(folder)
        blocks = max(done.get(f"{name}/0", 0) for name in (FEATURES, RAW))
        known = min(before, blocks * layout.block)
    seals = None if complete is None else complete.seals
    rows = DiskRows(folder, dataclasses.replace(layout, size=before), job.place, seals=seals)
    if complete is None and known:  # an extension may have ended before its arrays had grown
        on_first_process(functools.partial(rows.create, DIGESTS))
    refuse_others(folder, data_differences(job.source, rows, known, verify))


def _write_manifest(folder: Folder, layout: RowLayout, manifest: dict) -> None:
    free, needed = folder.free_bytes(), layout.bytes_on_disk()
    if free is not None and needed > free:
        raise StoreError(
            f"The index needs {needed / 1e9:.3g} GB at {folder.path}, and {free / 1e9:.3g} GB are "
            "free. Use dtype=jnp.int8 or jnp.bfloat16, a projection with a smaller dim, or another "
            "place."
        )
    folder.write(MANIFEST, manifest)


def _report_non_finite(rows: Rows, non_finite: np.ndarray) -> None:
    """Warns of training examples that were left out, and says at which checkpoints."""
    if not len(non_finite):
        return
    each = [rows.column(EXAMPLES, c)[:, COLUMNS.finite] for c in range(rows.layout.checkpoints)]
    counts = {number: int((finite == 0).sum()) for number, finite in enumerate(each)}
    where = ", ".join(f"{count} at checkpoint {number}" for number, count in counts.items())
    report_non_finite(non_finite, rows.layout.size, "training examples", f" ({where})")


_ENOUGH = 8  # examples without a gradient to warn of: a hinge loss has some


def _warn_of_zeros(job: BuildJob, rows: Rows) -> None:
    """Warns of gradients that are all zero, by the first block, as all rows may be very many."""
    size, finite = SELF_COLUMNS.size, COLUMNS.finite
    first = min(rows.layout.block, rows.layout.size)
    if first < min(_ENOUGH, rows.layout.size):
        return
    for number in range(rows.layout.checkpoints):
        selves, examples = (job.place.host(rows.read(name, 0, number)) for name in (SELF, EXAMPLES))
        if (selves[:, size] != NO_SIZE).any() or not (examples[:, finite] != 0).any():
            return
    warnings.warn(
        f"The features of the first {first} training examples are zero, and so are their scores: "
        f"does {name_of(job.method.rule.output)!r} round, count, stop its gradient, or fit "
        "exactly?",
        UserWarning,
        stacklevel=3,
    )


def _report_errors(kernel: Kernel, errors: np.ndarray | None) -> None:
    """Warns of training examples whose solve did not converge."""
    if errors is None or not isinstance(kernel, Iterates):
        return
    failed = np.flatnonzero(~(errors <= kernel.largest_residual))
    if len(failed):
        warnings.warn(
            f"{len(failed)} of {len(errors)} solves did not converge: relative residuals up to "
            f"{errors[failed].max():.1e}, needed {kernel.largest_residual:.1e}; ids "
            f"{first_ids(failed)}. Allow more iterations, or use more damping: the Hessian may "
            "have negative eigenvalues.",
            ConvergenceWarning,
            stacklevel=3,
        )
