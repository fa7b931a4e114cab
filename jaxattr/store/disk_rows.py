"""Rows on disk: TensorStore zarr3 arrays, one chunk per block of examples and host."""

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from jaxattr.sharding import Placement
from jaxattr.store.folder import Folder, StoreError, cannot_write, first_line
from jaxattr.store.ledger import Ledger
from jaxattr.store.rows import (
    FEATURES,
    RAW,
    RowLayout,
    Slab,
    axes_of,
    blocks_at_once,
    padded,
    slab_starts,
)

# Slabs that are being read while one is worked on.
_AHEAD = 2


class DiskRows:
    """Rows in a folder; see `rows.Rows`.

    A block is written when the next one is handed over, so that devices compute that one
    meanwhile; it counts as finished, and the ledger says so, when its chunks are written.

    Attributes:
      layout: the shapes.
      place: where blocks go when they are read.
      folder: where they are.
    """

    def __init__(
        self, folder: Folder, layout: RowLayout, place: Placement, ledger: Ledger | None = None
    ) -> None:
        self.folder = folder
        self.layout = layout
        self.place = place
        self._ledger = ledger
        self._open: dict[str, Any] = {}
        self._computed: tuple[int, int, dict[str, jax.Array]] | None = None

    def write(self, block: int, checkpoint: int, values: Mapping[str, jax.Array]) -> None:
        """See `Rows`."""
        for value in values.values():
            value.copy_to_host_async()
        computed, self._computed = self._computed, (block, checkpoint, dict(values))
        self._write(computed)

    def flush(self) -> None:
        """Waits until all is written."""
        computed, self._computed = self._computed, None
        self._write(computed)

    def read(self, name: str, block: int, checkpoint: int) -> jax.Array:
        """See `Rows`."""
        chosen = slice(checkpoint, checkpoint + 1)
        reading = self._request([name], block, 1, chosen)
        array = self._finish(reading, block)[name]
        return array[0, :, 0, : self.layout.widths[name]]

    def slabs(self, names: Sequence[str], rows: int) -> Iterator[Slab]:
        """See `Rows`; reads ahead."""
        count = blocks_at_once(self.layout, rows)
        starts = slab_starts(self.layout.blocks, count)
        waiting: collections.deque = collections.deque()
        for number in range(len(starts) + _AHEAD):
            if number < len(starts):
                start, fresh = starts[number]
                waiting.append((start, fresh, self._request(names, start, count, slice(None))))
            if number >= _AHEAD:
                start, fresh, reading = waiting.popleft()
                arrays = self._finish(reading, start)
                yield Slab(arrays, start * self.layout.block, fresh)

    def remove(self, name: str, checkpoint: int) -> None:
        """Deletes the raw features of a checkpoint."""
        self._open.pop(self._key(name, checkpoint), None)
        self.folder.delete_under(f"{self._key(name, checkpoint)}/")

    def create(self, name: str, checkpoint: int = 0) -> None:
        """Makes an array, or grows the one that is there to the layout's size.

        Args:
          name: of the array.
          checkpoint: its number, for `raw`.
        """
        checkpoints = 1 if name == RAW else self.layout.checkpoints
        width = self.layout.widths[name]
        metadata = {
            "shape": [self.layout.size, checkpoints, width],
            "data_type": np.dtype(self.layout.dtypes[name]).name,
            "fill_value": math.nan,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self._chunk(), 1, width]},
            },
            "codecs": [{"name": "bytes"}, {"name": "crc32c"}],
        }
        spec = {"driver": "zarr3", "kvstore": self.folder.spec(self._key(name, checkpoint))}
        try:
            try:
                there = ts.open(spec, open=True).result()
            except ValueError:
                ts.open(spec | {"metadata": metadata}, create=True).result()
            else:  # by a job that may have had other chunks: see `check_chunks`
                if there.shape[0] < self.layout.size:
                    there.resize(exclusive_max=metadata["shape"]).result()
        except ValueError as error:
            where = f"{self.folder.path}/{self._key(name, checkpoint)}"
            raise cannot_write(where, error) from None

    def _chunk(self) -> int:
        """Rows per chunk: no chunk is shared by two hosts."""
        return math.gcd(*self.place.boundaries(self.layout.block))

    def check_chunks(self) -> None:
        """Raises if this job's hosts would share a chunk of arrays that another job began."""
        there = self._array(FEATURES, 0).chunk_layout.read_chunk.shape[0]
        edges = self.place.boundaries(self.layout.block)
        if any(edge % there for edge in edges):
            raise StoreError(
                f"{self.folder.path} was begun in chunks of {there} examples, and this job's hosts "
                f"meet at rows {edges[1:-1]} of a block, so two would write one chunk. Go on with "
                "a number of hosts that divides the old one's blocks, or build anew."
            )

    def _key(self, name: str, checkpoint: int) -> str:
        return f"{name}-{checkpoint}" if name == RAW else name

    def _array(self, name: str, checkpoint: int) -> Any:
        key = self._key(name, checkpoint)
        if key not in self._open:
            spec = {"driver": "zarr3", "kvstore": self.folder.spec(key)}
            try:
                found = ts.open(spec, open=True).result()
            except ValueError as error:
                raise StoreError(
                    f"{self.folder.path}/{key} cannot be opened: {first_line(error)}. The index is "
                    "not whole; build it again."
                ) from None
            self._open[key] = found
        return self._open[key]

    def _write(self, computed: tuple[int, int, dict[str, jax.Array]] | None) -> None:
        if computed is None:
            return
        block, checkpoint, values = computed
        if self._ledger is not None:
            self._ledger.check()
        try:
            futures = [
                future
                for name, value in values.items()
                for future in self._start_write(name, block, checkpoint, value)
            ]
            for future in futures:
                future.result()
        except ValueError as error:
            where = f"block {block} of checkpoint {checkpoint} to {self.folder.path}"
            raise cannot_write(where, error) from None
        if self._ledger is not None:
            name = RAW if RAW in values else FEATURES
            self._ledger.mark(f"{name}/{checkpoint}", block + 1)

    def _start_write(self, name: str, block: int, checkpoint: int, value: jax.Array) -> list:
        array = self._array(name, checkpoint)
        column = 0 if name == RAW else checkpoint
        dtype = np.dtype(self.layout.dtypes[name])
        first, futures = block * self.layout.block, []
        for start, stop in self.place.local_spans(self.layout.block):
            stop = min(stop, self.layout.size - first)
            if start < stop:
                rows = _local_rows(value, start, stop).astype(dtype, copy=False)
                futures.append(array[first + start : first + stop, column].write(rows))
        return futures

    def _request(self, names: Sequence[str], start: int, count: int, checkpoints: slice) -> dict:
        """Begins to read what this host needs of some blocks."""
        return {name: self._request_one(name, start, count, checkpoints) for name in names}

    def _request_one(
        self, name: str, start: int, count: int, checkpoints: slice
    ) -> tuple[np.ndarray, list]:
        block, spans = self.layout.block, self.place.local_spans(self.layout.block)
        array = self._array(name, checkpoints.start or 0)
        chosen = slice(None) if name == RAW else checkpoints  # raw features: one array each
        c = len(range(array.shape[1])[chosen])
        local = sum(b - a for a, b in spans)
        rows = _aligned((count, local, c, self.layout.widths[name]), array.dtype.numpy_dtype)
        if spans == [(0, block)]:  # consecutive blocks are one read where this host has all rows
            pieces = [(rows.reshape(-1, *rows.shape[2:]), start * block)]
        else:
            offsets = np.cumsum([0, *(b - a for a, b in spans)])
            pieces = [
                (rows[i, offset : offset + b - a], (start + i) * block + a)
                for i in range(count)
                for (a, b), offset in zip(spans, offsets, strict=False)
            ]
        futures = []
        for piece, first in pieces:
            present = max(0, min(len(piece), self.layout.size - first))
            piece[present:] = 0
            if present:
                source = array[first : first + present, chosen]
                futures.append(ts.array(piece[:present]).write(source))
        return rows, futures

    def _finish(self, reading: dict, start: int) -> dict[str, jax.Array]:
        return {
            name: self._placed(name, rows, futures, start)
            for name, (rows, futures) in reading.items()
        }

    def _placed(self, name: str, rows: np.ndarray, futures: list, start: int) -> jax.Array:
        try:
            for future in futures:
                future.result()
        except ValueError as error:
            raise self._damaged(name, start, first_line(error)) from None
        # Rows of examples that are not finite are zero, so NaN is the fill value: never written.
        if np.isnan(rows[..., 0].astype(np.float32)).any():
            raise self._damaged(name, start, "a chunk is missing")
        width = padded(name, self.layout, self.place)
        if width > rows.shape[-1]:
            rows = np.pad(rows, [(0, 0)] * 3 + [(0, width - rows.shape[-1])])
        return self.place.blocks(rows, self.layout.block, axes_of(name))

    def _damaged(self, name: str, start: int, why: str) -> StoreError:
        return StoreError(
            f"{self.folder.path}/{name} is damaged at or after block {start} (examples from "
            f"{start * self.layout.block}): {why}. Delete the index and build it again, or restore "
            "the file."
        )


def score_array(
    folder: Folder, queries: int, size: int, block: int, dtype: Any, create: bool
) -> Any:
    """Makes an array [q, n] for scores, or opens it.

    Args:
      folder: where; must be empty.
      queries: q.
      size: n.
      block: columns per chunk.
      dtype: of the scores.
      create: whether to make it.

    Returns:
      A TensorStore, NaN where nothing was written.

    Raises:
      StoreError: if something is there already, or it cannot be written.
    """
    if create and folder.names():
        raise StoreError(f"{folder.path} is not empty: give a new path for the scores.")
    metadata = {
        "shape": [queries, size],
        "data_type": np.dtype(dtype).name,
        "fill_value": math.nan,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [queries, min(block, size)]},
        },
    }
    spec = {"driver": "zarr3", "kvstore": folder.spec("")}
    try:
        return ts.open(spec | {"metadata": metadata}, create=create, open=not create).result()
    except ValueError as error:
        raise cannot_write(folder.path, error) from None


def _local_rows(value: jax.Array, start: int, stop: int) -> np.ndarray:
    """Rows of an array that this host holds."""
    if not isinstance(value, jax.Array) or value.is_fully_addressable:
        return np.asarray(value)[start:stop]
    parts = {}
    for shard in value.addressable_shards:
        low, high = shard.index[0].start or 0, shard.index[0].stop
        high = value.shape[0] if high is None else high
        if low < stop and high > start:
            parts[low] = np.asarray(shard.data)[max(start - low, 0) : stop - low]
    return np.concatenate([parts[low] for low in sorted(parts)])


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that JAX takes on a CPU as it is: others are copied, at half the speed."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    whole = np.empty(size + 64, np.uint8)
    start = -whole.ctypes.data % 64
    return whole[start : start + size].view(dtype).reshape(shape)
