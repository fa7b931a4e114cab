"""What an index on disk is, without opening it; and whether all of it is what was written."""

import dataclasses
import os
from typing import Any, NamedTuple

import numpy as np

from jaxattr import identity
from jaxattr.index import provenance
from jaxattr.index.budgets import size_in_words
from jaxattr.index.opening import on_record
from jaxattr.index.saving import MANIFEST, load_fitted, load_operator, read_closed
from jaxattr.inputs.wording import listed
from jaxattr.sharding import Placement
from jaxattr.sources import track
from jaxattr.store.arrays import save_rows
from jaxattr.store.disk_rows import DiskRows
from jaxattr.store.folder import Folder, StoreError, reading
from jaxattr.store.ledger import finished
from jaxattr.store.rows import FEATURES, RAW, SCALES, values_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What an index on disk is. Print it.

    Attributes:
      path: where it is.
      finished: whether it is.
      done: {stage: finished blocks}, while it is not.
      blocks: of each stage.
      block: examples per block.
      method: its name.
      examples: training examples n.
      non_finite: how many of them were left out; None while it is not finished.
      checkpoints: number of them.
      groups: {name: its features per example and checkpoint}.
      dtype: of the stored features.
      bytes: of all rows.
      made_from: what of the call that made it is on record: kernel, projection, digests of the
        functions and parameters, shapes of an example, key, versions.
    """

    path: str
    finished: bool
    done: dict[str, int]
    blocks: int
    block: int
    method: str
    examples: int
    non_finite: int | None
    checkpoints: int
    groups: dict[str, int]
    dtype: str
    bytes: int
    made_from: dict[str, Any]

    def __str__(self) -> str:
        done = ", ".join(f"{stage} {count}" for stage, count in sorted(self.done.items()))
        state = "finished" if self.finished else f"not finished: {done or 'none'} of {self.blocks}"
        left_out = f", {self.non_finite} of them left out" if self.non_finite else ""
        made = self.made_from
        return "\n".join(
            [
                f"{self.path}: {self.method}, {state}{'' if self.finished else ' blocks'}",
                f"  examples     {self.examples:,}{left_out}, in {self.blocks:,} blocks of "
                f"{self.block}",
                f"  groups       {len(self.groups)}: {listed(self.groups)}",
                f"  features     {sum(self.groups.values()):,} per example and checkpoint, "
                f"{self.dtype}",
                f"  checkpoints  {self.checkpoints}",
                f"  size         {size_in_words(self.bytes)}",
                f"  made from    kernel {made['kernel']}, projection {made['projection']}, "
                f"example {made['example']}",
                f"               output {made['output']}, parameters "
                f"{', '.join(made['parameters'])}",
                "               "
                + ", ".join(f"{name} {version}" for name, version in made["versions"].items()),
            ]
        )


def summarize(path: str | os.PathLike[str]) -> Summary:
    """Says what an index is, from its small files alone.

    Args:
      path: of the index, local or a URL; it may be unfinished.

    Returns:
      What it is.

    Raises:
      StoreError: if there is no index, or a small file of it is damaged.
    """
    folder = Folder(path)
    described, layout = on_record(folder)
    closed = read_closed(folder)
    whole = closed is not None and closed.examples == layout.size
    with reading(folder, MANIFEST):
        columns = provenance.layout_from(described["layout"])
        method, output = described["method"], described["method"]["rule"]["output"]
        widths = {name: width for name, width in layout.widths.items() if name != RAW}
        kept = dataclasses.replace(layout, widths=widths)  # raw features go at the end
        return Summary(
            path=folder.path,
            finished=whole,
            done={} if whole else finished(folder),
            blocks=layout.blocks,
            block=layout.block,
            method=method["name"],
            examples=layout.size,
            non_finite=len(closed.record["non_finite"]) if closed is not None else None,
            checkpoints=layout.checkpoints,
            groups=dict(zip(columns.names, columns.dims, strict=True)),
            dtype=layout.dtypes[FEATURES].name,
            bytes=kept.bytes_on_disk(),
            made_from={
                "kernel": _kind(method["kernel"]),
                "projection": _kind(method["rule"]["projection"]),
                "output": output.get("computes") or identity.digest(output),  # of several functions
                "parameters": list(map(identity.digest, described["params"])),
                "example": _shapes(described["example"]),
                "key": described["key"],
                "versions": described["versions"],
            },
        )


class Checked(NamedTuple):
    """What checking an index came to.

    Attributes:
      chunks: that were read.
      damaged: what is wrong, one line each; () if all is what was written.
    """

    chunks: int
    damaged: tuple[str, ...]


def check(path: str | os.PathLike[str]) -> Checked:
    """Reads all of a finished index, and compares it with what was written.

    Args:
      path: of the index, local or a URL.

    Returns:
      What is damaged, all of it.

    Raises:
      StoreError: if there is no finished index, or a small file of it is damaged, without which the
        rest cannot be told.
    """
    folder = Folder(path)
    _, layout = on_record(folder)
    closed, place = read_closed(folder), Placement()
    if closed is None or closed.examples != layout.size:
        raise StoreError(
            f"{folder.path} is not finished, so that nothing says yet what its chunks must be. "
            "Finish it with the call that began it."
        )
    rows = DiskRows(folder, layout, place, seals=closed.seals)
    count = sum(len(keys) for _, keys in rows.chunks().values())
    found = [each for each in track(rows.damage(), "reading all chunks", count) if each]
    for number in range(layout.checkpoints):
        for load in (load_fitted, load_operator):
            try:
                load(folder, number, place)
            except StoreError as error:
                found.append(str(error))
    return Checked(count, tuple(found))


def export_zarr(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copies the features of a finished index to a zarr array of their own.

    They are copied as they are stored, and widened to floats where they are compressed.

    Args:
      path: of the index.
      target: a new folder, or a URL; the array is [n, c, p], its attributes name the groups and
        their columns.

    Raises:
      StoreError: if there is no finished index, or the copy cannot be written.
    """
    summary = summarize(path)
    if not summary.finished:
        raise StoreError(f"{summary.path} is not finished: there is no whole array to copy.")
    attributes = {"method": summary.method, "groups": summary.groups}
    folder = Folder(path)
    _, layout = on_record(folder)
    rows, width = DiskRows(folder, layout, Placement()), layout.widths[FEATURES]
    dtype = layout.wide if SCALES in layout.widths else layout.dtypes[FEATURES]
    slabs = rows.slabs(layout.parts(FEATURES), layout.block)
    blocks = (np.asarray(values_of(FEATURES, slab.arrays))[0] for slab in slabs)
    shape = (layout.size, layout.checkpoints, width)
    save_rows(Folder(target), shape, dtype, layout.block, blocks, attributes)


def _kind(described: dict[str, Any]) -> str:
    """The kind of a thing, and those of its settings that are numbers or words."""
    plain = str | int | float
    settings = [
        f"{name}={value}" for name, value in described.items()
        if name != "kind" and isinstance(value, plain) and not isinstance(value, bool)
    ]  # fmt: skip
    return described["kind"] + (f"({', '.join(settings)})" if settings else "")


def _shapes(described: Any) -> str:
    if described is None:
        return "of no arrays or dicts of arrays"
    if "dict" in described:
        return ", ".join(f"{name} {_shapes(each)}" for name, each in described["dict"].items())
    return f"{described['dtype']} {described['shape']}"
