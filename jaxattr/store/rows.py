"""The training side of an index: named arrays with a row per training example, kept in blocks.

Rows are written a block at a time, in the order of the data, and read in slabs of several blocks.
Within a block they are spread over the mesh axis `data`, so that the block that a set of devices
computed is stored where it was made, in memory or on disk.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.scales import wide
from jaxattr.sharding import DATA, MODEL, Placement
from jaxattr.store.compression import compress, widen

FEATURES, RAW, EXAMPLES, SELF, ERRORS = "features", "raw", "examples", "self", "errors"
DIGESTS, SCALES = "digests", "scales"
"""Names of the arrays: K phi; phi, while K is not known; `ExampleColumns`; contributions of an
example to its own score, per group; relative residuals of solves; what the example itself was; of
features that are compressed, their scales."""


class SelfColumns(NamedTuple):
    """The last columns of the array `self`, per training example and checkpoint.

    Attributes:
      exponent: the contributions of the example to its own score, in the columns before, are to be
        multiplied by 2 to this power.
      size: all of its features are below 2 to this power; `NO_SIZE` if they are zero.
    """

    exponent: int = -2
    size: int = -1


SELF_COLUMNS = SelfColumns()
SLAB = 8192
"""Training examples that are read from disk, or scored, at once."""
# Features of so many bytes at most, but for a single block: of some models a row has a megabyte.
_SLAB_BYTES = 1 << 28

NO_SIZE = -4096


class ExampleColumns(NamedTuple):
    """Columns of the array `examples`, per training example and checkpoint.

    Attributes:
      residual: r.
      finite: 1 if its features are finite, else 0; 0 for padding.
    """

    residual: int = 0
    finite: int = 1


COLUMNS = ExampleColumns()


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Shapes of the training side.

    Attributes:
      size: number of training examples n.
      block: examples per block.
      checkpoints: number of checkpoints c.
      widths: {array name: numbers per example and checkpoint}.
      dtypes: {array name: dtype}.
    """

    size: int
    block: int
    checkpoints: int
    widths: Mapping[str, int]
    dtypes: Mapping[str, Any]

    @property
    def blocks(self) -> int:
        """Number of blocks; the last may be padded."""
        return -(-self.size // self.block)

    @property
    def wide(self) -> Any:
        """The dtype that features are computed with, however they are stored."""
        return wide(self.dtypes[SCALES if SCALES in self.dtypes else FEATURES])

    @property
    def side(self) -> tuple[str, ...]:
        """Names of the arrays that scores are made from."""
        return (FEATURES, EXAMPLES, *((SCALES,) if SCALES in self.widths else ()))

    @property
    def raw_apart(self) -> bool:
        """Whether raw features have another dtype than the features that replace them."""
        return RAW in self.dtypes and self.dtypes[RAW] != self.dtypes[FEATURES]

    def parts(self, name: str) -> tuple[str, ...]:
        """Names of the arrays that the values of one are kept in."""
        return (FEATURES, SCALES) if name == FEATURES and SCALES in self.widths else (name,)

    def bytes_on_disk(self) -> int:
        """Bytes of all arrays, while the index is built."""
        return self.size * self._bytes_per_example(tuple(self.widths))

    def bytes_in_memory(self, place: Placement) -> int:
        """Bytes of all arrays on each device."""
        kept = tuple(name for name in self.widths if name != RAW)
        each = self._bytes_per_example(kept)
        if self.raw_apart:  # of one checkpoint at a time
            each += self._bytes_per_example((RAW,)) // self.checkpoints
        return self.blocks * self.block // place.shards * each // place.columns

    def _bytes_per_example(self, names: Sequence[str]) -> int:
        each = (self.widths[name] * np.dtype(self.dtypes[name]).itemsize for name in names)
        return self.checkpoints * sum(each)


class Slab(NamedTuple):
    """Consecutive blocks.

    Attributes:
      arrays: {name: [g, b, c, width]}; rows past the end are zero. On a mesh, b is over `data` and
        the columns of features, padded with zeros, are over `model`.
      first: id of the first example.
      fresh: blocks of the slab before this one were in the slab before; a slab is never short.
      exponent: all features are below 2 to this power; None where that of the index says so.
    """

    arrays: dict[str, jax.Array]
    first: int
    fresh: int
    exponent: jax.Array | None = None


Make = Callable[[np.ndarray], jax.Array]
"""Positions [b] of examples -> their rows [b, width]; those past the end and -1 are zero."""


class Rows(Protocol):
    """What an index and its building need of the place where rows are kept.

    Checkpoints are built in turn, and blocks in order. Where the kernel is the identity: `write` of
    each block, `flush`. Where it is not: `begin`; `write` of each block with its raw features,
    `flush`, after which the kernel may ask for a `column` of them; `read` of each block's raw
    features, and `write` of the features that replace them, `flush`; `finish`. A block that was
    written is read after the next `flush`, and not before.
    """

    @property
    def layout(self) -> RowLayout:
        """The shapes."""

    @property
    def place(self) -> Placement:
        """Where blocks go when they are read."""

    @property
    def resident(self) -> bool:
        """Whether all rows are in device memory."""

    @property
    def arrays(self) -> Mapping[str, jax.Array]:
        """Those in device memory, {name: [blocks, b, c, width]}; empty unless `resident`."""

    def made_by(self, name: str, checkpoint: int, make: Make) -> bool:
        """Tells how rows of a checkpoint are made; whether they are, when they are asked for."""

    def begin(self, checkpoint: int) -> None:
        """Makes room for the raw features of a checkpoint."""

    def write(self, block: int, checkpoint: int, values: Mapping[str, jax.Array]) -> None:
        """Keeps rows [b, width] of some arrays, of one block and checkpoint; compresses them."""

    def flush(self) -> None:
        """Waits until all is written."""

    def finish(self, checkpoint: int) -> None:
        """Lets go of the raw features of a checkpoint."""

    def read(self, name: str, block: int, checkpoint: int) -> jax.Array:
        """Returns rows [b, width] of one array, one block and checkpoint; widened."""

    def column(self, name: str, checkpoint: int, columns: slice = slice(None)) -> np.ndarray:
        """Returns columns of one array for all examples, [n, width], on every host; widened."""

    def slabs(
        self, names: Sequence[str], rows: int, checkpoint: int | None = None
    ) -> Iterator[Slab]:
        """Yields all blocks in order, about so many rows at a time, of one checkpoint or all.

        Arrays are as they are stored, here and in `pick`: see `RowLayout.side` and `values_of`.
        """

    def pick(self, names: Sequence[str], ids: np.ndarray) -> dict[str, jax.Array]:
        """Returns rows of some examples, laid out as a block of a slab; see `by_shard`.

        Args:
          names: of arrays.
          ids: [shards, l], those of a shard in its own row; -1 for none.

        Returns:
          {name: [1, shards * l, c, width]}; what stands where there is none means nothing.
        """


class KeptRows:
    """What stores of rows have in common; see `Rows`."""

    def column(self: Rows, name: str, checkpoint: int, columns: slice = slice(None)) -> np.ndarray:
        """See `Rows`; slab by slab."""
        layout, parts = self.layout, []
        start, stop, step = columns.indices(layout.widths[name])
        for slab in self.slabs(layout.parts(name), SLAB, checkpoint):
            values = values_of(name, slab.arrays)
            if (start, stop, step) != (0, values.shape[3], 1):  # else a copy, of all features
                values = values[..., start:stop:step]
            part = self.place.host(values)[slab.fresh :]  # [g, b, 1, width]
            parts.append(part.reshape(part.shape[0] * part.shape[1], part.shape[3]))
        return np.concatenate(parts)[: layout.size]

    def made_by(self, name: str, checkpoint: int, make: Make) -> bool:
        """See `Rows`; all rows are kept."""
        return False


class MemoryRows(KeptRows):
    """Rows in device memory; see `Rows`.

    Attributes:
      layout: the shapes.
      place: over which devices.
      arrays: {name: [blocks, b, c, width]}.
      resident: they are.
    """

    resident = True

    def __init__(self, layout: RowLayout, place: Placement) -> None:
        self.layout = layout
        self.place = place
        names = [name for name in layout.widths if name != RAW]
        self.arrays = self._zeros({name: (layout.checkpoints, name) for name in names})

    def write(self, block: int, checkpoint: int, values: Mapping[str, jax.Array]) -> None:
        """See `Rows`; rows of `raw` are kept as `features`, until those replace them."""
        for name, value in compressed(values, self.layout, self.place).items():
            kept, c = self._kept(name, checkpoint)
            step = _compiled_write(self.place, FEATURES if name == RAW else name)
            self.arrays[kept] = step(self.arrays[kept], value, block, c)

    def begin(self, checkpoint: int) -> None:
        """See `Rows`; raw features that are no longer than the others have their place."""
        if self.layout.raw_apart:
            self.arrays |= self._zeros({RAW: (1, FEATURES)})

    def flush(self) -> None:
        """See `Rows`; nothing to do."""

    def finish(self, checkpoint: int) -> None:
        """See `Rows`."""
        self.arrays.pop(RAW, None)

    def read(self, name: str, block: int, checkpoint: int) -> jax.Array:
        """See `Rows`."""
        found = {}
        for part in self.layout.parts(name):
            kept, c = self._kept(part, checkpoint)
            step = _compiled_read(self.place, self.layout.widths[part])
            found[part] = step(self.arrays[kept], block, c)
        return values_of(name, found)

    def slabs(
        self, names: Sequence[str], rows: int, checkpoint: int | None = None
    ) -> Iterator[Slab]:
        """See `Rows`."""
        if checkpoint is None:
            chosen = {name: self.arrays[name] for name in names}
        else:
            kept = {name: self._kept(name, checkpoint) for name in names}
            chosen = {name: _of_checkpoint(self.arrays[x], c) for name, (x, c) in kept.items()}
        whole = rows >= self.layout.size
        count = self.layout.blocks if whole else blocks_at_once(self.layout, rows)
        for start, fresh in slab_starts(self.layout.blocks, count):
            arrays = chosen if count == self.layout.blocks else _slab(chosen, start, count)
            yield Slab(arrays, start * self.layout.block, fresh)

    def pick(self, names: Sequence[str], ids: np.ndarray) -> dict[str, jax.Array]:
        """See `Rows`; every device takes its own."""
        chosen = {name: self.arrays[name] for name in names}
        return _compiled_pick(self.place, tuple(names))(chosen, self.place.whole(ids))

    def _zeros(self, wanted: Mapping[str, tuple[int, str]]) -> dict[str, jax.Array]:
        """Arrays [blocks, b, c, width], for {name: (c, name of one that is laid out alike)}."""
        layout = self.layout
        shapes = {
            name: jax.ShapeDtypeStruct(
                (layout.blocks, layout.block, c, padded(like, layout, self.place)),
                layout.dtypes[name],
            )
            for name, (c, like) in wanted.items()
        }
        return self.place.zeros(shapes, lambda path: axes_of(wanted[path[0].key][1]))

    def _kept(self, name: str, checkpoint: int) -> tuple[str, int]:
        """Where an array is kept: raw features where those go that will replace them, or apart."""
        if name != RAW:
            return name, checkpoint
        return (RAW, 0) if self.layout.raw_apart else (FEATURES, checkpoint)


def compressed(
    values: Mapping[str, jax.Array], layout: RowLayout, place: Placement
) -> Mapping[str, jax.Array]:
    """Returns rows as they are stored.

    Args:
      values: {name: rows [b, width]}, features as they were computed, or as they are stored.
      layout: of the rows.
      place: the devices.
    """
    if FEATURES not in values or SCALES in values or SCALES not in layout.widths:
        return values
    step = _compiled_compression(place, np.dtype(layout.dtypes[FEATURES]))
    numbers, scales = step(values[FEATURES])
    return {**values, FEATURES: numbers, SCALES: scales}


def values_of(name: str, arrays: Mapping[str, jax.Array]) -> jax.Array:
    """Returns an array's values [..., width], of what `RowLayout.parts` names, as it is stored."""
    return widen(arrays[name], arrays[SCALES]) if SCALES in arrays else arrays[name]


def by_shard(ids: np.ndarray, layout: RowLayout, place: Placement) -> list[np.ndarray]:
    """Splits ids by the part of the devices that holds their rows.

    Args:
      ids: of examples, [u].
      layout: of the rows.
      place: the devices.

    Returns:
      The ids of each shard, in the order that they have.
    """
    shard = ids % layout.block // (layout.block // place.shards)
    return [ids[shard == number] for number in range(place.shards)]


def axes_of(name: str) -> tuple[str | None, ...]:
    """The mesh axes of an array [blocks, b, c, width]."""
    return (None, DATA, None, MODEL if name == FEATURES else None)


def padded(name: str, layout: RowLayout, place: Placement) -> int:
    """Returns the width of an array in memory: features are padded to divide over `model`."""
    width = layout.widths[name]
    return -(-width // place.columns) * place.columns if name == FEATURES else width


def blocks_at_once(layout: RowLayout, rows: int) -> int:
    """Returns how many blocks make a slab of about so many rows; fewer where rows are wide."""
    if FEATURES in layout.widths:
        width = layout.checkpoints * layout.widths[FEATURES] * np.dtype(layout.wide).itemsize
        rows = min(rows, _SLAB_BYTES // max(width, 1))
    return max(1, min(layout.blocks, rows // layout.block))


def slab_starts(blocks: int, count: int) -> list[tuple[int, int]]:
    """First block of each slab, and how many blocks of it came before; all slabs have `count`."""
    return [(min(start, blocks - count), start - min(start, blocks - count))
            for start in range(0, blocks, count)]  # fmt: skip


def pad_columns(x: jax.Array, width: int) -> jax.Array:
    """Appends columns of zeros to [..., p]."""
    missing = width - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


@functools.lru_cache(maxsize=32)
def _compiled_write(place: Placement, name: str) -> Any:
    def write(array: jax.Array, value: jax.Array, block: jax.Array, c: jax.Array) -> jax.Array:
        value = pad_columns(value.astype(array.dtype), array.shape[-1])
        return jax.lax.dynamic_update_slice(array, value[None, :, None], (block, 0, c, 0))

    return place.jit(write, *axes_of(name), donate_argnums=0)


@functools.lru_cache(maxsize=32)
def _compiled_compression(place: Placement, dtype: Any) -> Any:
    return place.jit(functools.partial(compress, dtype=dtype), DATA)


@functools.lru_cache(maxsize=32)
def _compiled_read(place: Placement, width: int) -> Any:
    def read(array: jax.Array, block: jax.Array, checkpoint: jax.Array) -> jax.Array:
        sizes = (1, array.shape[1], 1, array.shape[3])
        rows = jax.lax.dynamic_slice(array, (block, 0, checkpoint, 0), sizes)
        return rows[0, :, 0, :width]

    return place.jit(read, DATA)


@functools.lru_cache(maxsize=32)
def _compiled_pick(place: Placement, names: tuple[str, ...]) -> Any:
    def of_shard(arrays: dict[str, jax.Array], ids: jax.Array) -> dict[str, jax.Array]:
        own = arrays[names[0]].shape[1]
        ids = jnp.maximum(ids[0], 0)
        block, row = ids // (own * place.shards), ids % (own * place.shards)
        row = jnp.clip(row - place.shard() * own, 0, own - 1)
        return {name: array[block, row][None] for name, array in arrays.items()}

    axes = {name: axes_of(name) for name in names}
    return jax.jit(place.over_shards(of_shard, (axes, (DATA,)), axes))


def _of_checkpoint(array: jax.Array, checkpoint: int) -> jax.Array:
    return array if array.shape[2] == 1 else _taken(array, checkpoint)


@jax.jit
def _taken(array: jax.Array, checkpoint: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, checkpoint, 1, axis=2)


@functools.partial(jax.jit, static_argnums=2)
def _slab(arrays: dict[str, jax.Array], start: int, count: int) -> dict[str, jax.Array]:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, count), arrays)
