"""Opening an index that is on disk."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxattr.features.featurizer import Featurizer
from jaxattr.index import provenance
from jaxattr.index.index import Index
from jaxattr.index.saving import MANIFEST, load_finished, read_closed, read_manifest, refuse_others
from jaxattr.index.verifying import data_differences, how_much
from jaxattr.inputs.data import like
from jaxattr.inputs.outputs import runs
from jaxattr.inputs.parameters import as_checkpoints
from jaxattr.methods.method import Method, check_method, featurizer
from jaxattr.sharding import Placement, placement
from jaxattr.sources import as_source
from jaxattr.store.compression import is_compressed
from jaxattr.store.disk_rows import DiskRows
from jaxattr.store.folder import Folder, StoreError, reading
from jaxattr.store.ledger import finished
from jaxattr.store.rows import EXAMPLES, FEATURES, SCALES, SELF, MemoryRows, RowLayout, Rows
from jaxattr.typing import Example, Params


def open_index(
    path: str | os.PathLike[str],
    method: Method | None = None,
    checkpoints: Params | Sequence[Params] | None = None,
    *,
    example: Example | None = None,
    train: Any = None,
    mesh: Mesh | None = None,
    in_memory: bool = False,
) -> Index:
    """Opens an index that `build_index` wrote; reads its rows when they are needed.

    Args:
      path: of the index, local or a URL.
      method: that it was built with; needed for queries that are not features yet.
      checkpoints: likewise.
      example: ONE example, or its shapes; needed where training examples are no arrays or nested
        dicts of arrays, unless `train` is given.
      train: the training data, if they are to be shown (`ja.report`); they are compared with those
        that the index was made from, as `build_index` does. Scores do not need them.
      mesh: as in `build_index`; may be another than it was built on.
      in_memory: reads all rows now, onto the mesh.

    Returns:
      The index.

    Raises:
      StoreError: if there is no index, it is not finished or damaged, or the method or the
        checkpoints are not those that it was built with; says which differ.
    """
    if method is not None:
        check_method(method)
    folder, place = Folder(path), placement(mesh)
    described, layout = on_record(folder)
    complete = read_closed(folder)
    with reading(folder, MANIFEST):
        columns = provenance.layout_from(described["layout"])
        link = described["method"]["link"]
    if complete is None or complete.examples != layout.size:
        done = finished(folder)
        raise StoreError(
            f"{folder.path} is not finished: of {layout.blocks} blocks per stage, done are "
            f"{done or 'none'}. Call ja.build_index with its arguments to go on."
        )
    if layout.block % place.shards:
        raise ValueError(
            f"{folder.path} has blocks of {layout.block} examples, which do not divide over the "
            f'{place.shards} devices of the mesh axis "data". Use a mesh that divides them.'
        )
    parameters: tuple[Params, ...] = ()
    featurize = None
    if method is not None and checkpoints is not None:
        parameters = place.shared(tuple(as_checkpoints(checkpoints)))
        if example is None and train is not None and described.get("example") is None:
            accepts = functools.partial(runs, method.rule.output, parameters[0])
            example = as_source(train, "train", accepts).example
        featurize = _featurizer(folder, described, method, parameters, example, place)
    elif method is not None or checkpoints is not None:
        raise ValueError("Give both method and checkpoints, or neither.")
    rows: Rows = DiskRows(folder, layout, place, seals=complete.seals)
    known = None if featurize is None else like(featurize.example)
    source = None if train is None else as_source(train, "train", known)
    if source is not None:
        if source.size != layout.size:
            refuse_others(folder, [f"train: {source.size} examples instead of {layout.size}"])
        verify = how_much(None, source)
        refuse_others(folder, data_differences(source, rows, layout.size, verify))
    found = load_finished(folder, complete.record, layout.checkpoints, place)
    return Index(
        method=method,
        featurizer=featurize,
        checkpoints=parameters,
        layout=columns,
        rows=in_device_memory(rows) if in_memory else rows,
        path=folder.path,
        link=link,
        recorded=complete.recorded,
        train=source,
        **found._asdict(),
    )


def in_device_memory(rows: Rows) -> MemoryRows:
    """Reads all rows that scores need.

    Args:
      rows: anywhere.

    Returns:
      The same rows in memory, on the same devices.
    """
    layout = rows.layout
    widths = {name: layout.widths[name] for name in (*layout.side, SELF)}
    dtypes = {name: layout.dtypes[name] for name in widths}
    copy = MemoryRows(dataclasses.replace(layout, widths=widths, dtypes=dtypes), rows.place)
    for block, slab in enumerate(rows.slabs(tuple(widths), layout.block)):
        for c in range(layout.checkpoints):
            values = {name: slab.arrays[name][0, :, c, :width] for name, width in widths.items()}
            copy.write(block, c, values)
    return copy


def on_record(folder: Folder) -> tuple[dict[str, Any], RowLayout]:
    """Reads what an index was made from, and the shapes of its rows.

    Args:
      folder: of the index.

    Raises:
      StoreError: if there is no index, or that is damaged.
    """
    described = read_manifest(folder)
    if described is None:
        raise StoreError(f"There is no index at {folder.path}: it has no {MANIFEST}.")
    with reading(folder, MANIFEST):
        return described, _row_layout(described)


def _row_layout(described: dict[str, Any]) -> RowLayout:
    rows = described["rows"]
    found = RowLayout(
        described["data"]["examples"],
        rows["block"],
        rows["checkpoints"],
        dict(rows["widths"]),
        {name: jax.numpy.dtype(dtype) for name, dtype in rows["dtypes"].items()},
    )
    sizes = (found.size, found.block, *found.widths.values())
    if not all(type(size) is int and 0 < size < 2**48 for size in sizes):
        raise ValueError(f"a size is none: {sizes}")
    if set(found.widths) != set(found.dtypes) or not {FEATURES, EXAMPLES, SELF} <= {*found.widths}:
        raise ValueError(f"arrays are missing: it has {sorted(found.widths)}")
    if is_compressed(found.dtypes[FEATURES]) != (SCALES in found.widths):
        raise ValueError(f"features are {found.dtypes[FEATURES]}, with or without scales")
    if found.checkpoints != len(described["params"]):
        raise ValueError(f"{found.checkpoints} checkpoints, and {len(described['params'])} params")
    return found


def _featurizer(
    folder: Folder,
    described: dict[str, Any],
    method: Method,
    parameters: tuple[Params, ...],
    example: Example | None,
    place: Placement,
) -> Featurizer:
    if example is None:
        with reading(folder, MANIFEST):
            example = provenance.example_from(described["example"])
    if example is None:
        raise ValueError(
            "The training examples are no arrays or nested dicts of arrays, so their shapes are "
            "not on record: pass example=, ONE example or its shapes, or train=."
        )
    with reading(folder, MANIFEST):
        groups = provenance.groups_from(described["groups"])
        key = place.whole(provenance.key_from(described["key"]))
        there = {name: described[name] for name in ("method", "params", "key")}
        there["rows"] = {"checkpoints": described["rows"]["checkpoints"]}
        there["settings"] = described.get("settings", {})
    featurize = featurizer(method, parameters[0], example, groups=groups, key=key)
    here = {
        "method": provenance.describe_method(method, featurize.rule),
        "params": [provenance.describe_params(params) for params in parameters],
        "key": provenance.describe_key(key),
        "rows": {"checkpoints": len(parameters)},
    }
    refuse_others(folder, provenance.differences(there, here))
    return featurize
