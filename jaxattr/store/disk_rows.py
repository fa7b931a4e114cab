"""Rows on disk: TensorStore zarr3 arrays, one chunk per block of examples and host."""

import collections
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from jaxattr.sharding import Placement, barrier, process
from jaxattr.store.compression import is_never_written, never_written
from jaxattr.store.folder import Folder, StoreError, first_line, malformed, writing
from jaxattr.store.ledger import Ledger
from jaxattr.store.rows import (
    DIGESTS,
    FEATURES,
    RAW,
    KeptRows,
    RowLayout,
    Slab,
    axes_of,
    blocks_at_once,
    compressed,
    padded,
    slab_starts,
    values_of,
)
from jaxattr.store.seals import Seals, chunk_seal, seal_of

# Slabs that are being read while one is worked on.
_AHEAD = 2
# Chunks that are being read while all are checked.
_CHECKED_AT_ONCE = 16


class DiskRows(KeptRows):
    """Rows in a folder; see `rows.Rows`.

    A block is written when the next one is handed over, so that devices compute that one
    meanwhile; it counts as finished, and the ledger says so, when its chunks are written.

    Attributes:
      layout: the shapes.
      place: where blocks go when they are read.
      folder: where they are.
      resident: they are not.
      arrays: none, therefore.
    """

    resident = False

    def __init__(
        self,
        folder: Folder,
        layout: RowLayout,
        place: Placement,
        ledger: Ledger | None = None,
        seals: Seals | None = None,
    ) -> None:
        self.folder = folder
        self.layout = layout
        self.place = place
        self._ledger = ledger
        self._seals = seals
        self._checked: set[str] = set()
        self._open: dict[str, Any] = {}
        self._computed: tuple[int, int, dict[str, jax.Array]] | None = None
        self.arrays: Mapping[str, jax.Array] = {}

    def write(self, block: int, checkpoint: int, values: Mapping[str, jax.Array]) -> None:
        """See `Rows`."""
        values = compressed(values, self.layout, self.place)
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
        chosen, widths = slice(checkpoint, checkpoint + 1), self.layout.widths
        reading = self._request(self.layout.parts(name), block, 1, chosen)
        arrays = self._finish(reading, block)
        return values_of(name, {part: x[0, :, 0, : widths[part]] for part, x in arrays.items()})

    def slabs(
        self, names: Sequence[str], rows: int, checkpoint: int | None = None
    ) -> Iterator[Slab]:
        """See `Rows`; reads ahead."""
        chosen = slice(None) if checkpoint is None else slice(checkpoint, checkpoint + 1)
        count = blocks_at_once(self.layout, rows)
        starts = slab_starts(self.layout.blocks, count)
        waiting: collections.deque = collections.deque()
        for number in range(len(starts) + _AHEAD):
            if number < len(starts):
                start, fresh = starts[number]
                waiting.append((start, fresh, self._request(names, start, count, chosen)))
            if number >= _AHEAD:
                start, fresh, reading = waiting.popleft()
                arrays = self._finish(reading, start)
                yield Slab(arrays, start * self.layout.block, fresh)

    def pick(self, names: Sequence[str], ids: np.ndarray) -> dict[str, jax.Array]:
        """See `Rows`; reads the chunks that hold one of them, and no others."""
        flat = ids.reshape(-1)
        mine = np.concatenate([flat[a:b] for a, b in self.place.local_spans(len(flat))])
        reading = {name: self._request_picked(name, mine) for name in names}
        start = min(flat[flat >= 0].tolist(), default=0)
        return self._finish(reading, start // self.layout.block, len(flat))

    def begin(self, checkpoint: int) -> None:
        """See `Rows`."""
        if process()[0] == 0:
            self.create(RAW, checkpoint)
        barrier("raw features")

    def finish(self, checkpoint: int) -> None:
        """See `Rows`."""
        barrier("kernel applied")
        if process()[0] == 0:
            self._remove_raw(checkpoint)

    def remove_raw(self) -> None:
        """Deletes the raw features of all checkpoints that a killed build may have left."""
        for checkpoint in range(self.layout.checkpoints):
            self._remove_raw(checkpoint)

    def _remove_raw(self, checkpoint: int) -> None:
        self._open.pop(self._key(RAW, checkpoint), None)
        self.folder.delete_under(f"{self._key(RAW, checkpoint)}/")

    def create(self, name: str, checkpoint: int = 0) -> None:
        """Makes an array, or grows the one that is there to the layout's size.

        Args:
          name: of the array.
          checkpoint: its number, for `raw`.
        """
        metadata = self._metadata(name)
        spec = {"driver": "zarr3", "kvstore": self.folder.spec(self._key(name, checkpoint))}
        with writing(f"{self.folder.path}/{self._key(name, checkpoint)}"):
            try:
                there = ts.open(spec, open=True).result()
            except ValueError:
                ts.open(spec | {"metadata": metadata}, create=True).result()
            else:  # by a job that may have had other chunks: see `check_chunks`
                if there.shape[0] < self.layout.size:
                    there.resize(exclusive_max=metadata["shape"]).result()

    def _metadata(self, name: str) -> dict[str, Any]:
        width, dtype = self.layout.widths[name], np.dtype(self.layout.dtypes[name])
        order = {"configuration": {"endian": "little"}} if dtype.itemsize > 1 else {}
        return {
            "shape": [self.layout.size, 1 if name == RAW else self.layout.checkpoints, width],
            "data_type": dtype.name,
            "fill_value": 0 if name == DIGESTS else never_written(dtype),
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self._chunk(), 1, width]},
            },
            "chunk_key_encoding": {"name": "default"},
            "codecs": [{"name": "bytes"} | order, {"name": "crc32c"}],
        }

    def chunks(self) -> dict[str, tuple[int, list[str]]]:
        """Returns {array: (bytes of a chunk, names of its chunks)} of what a finished index has."""
        names = [name for name in self.layout.widths if name != RAW]
        columns = range(self.layout.checkpoints)
        return {
            name: (
                _chunk_bytes(self._array(name, 0)),
                _chunk_keys(self._array(name, 0), np.arange(self.layout.size), columns),
            )
            for name in names
        }

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

    def damage(self) -> Iterator[str | None]:
        """Reads every chunk of a finished index; compares it with its checksum and with its seal.

        Yields:
          For each chunk what is wrong with it, which begins with its name; or None.
        """
        for name, (size, keys) in self.chunks().items():
            array = self._array(name, 0)
            for start in range(0, len(keys), _CHECKED_AT_ONCE):
                reading = [
                    (key, _chunk(array, key).read(), chunk_seal(self.folder, name, key, size))
                    for key in keys[start : start + _CHECKED_AT_ONCE]
                ]
                for key, contents, seal in reading:
                    yield self._damage_of(name, key, contents, seal)

    def _damage_of(self, name: str, key: str, contents: Any, seal: Any) -> str | None:
        assert self._seals is not None
        try:
            contents.result()
            found = seal_of(self.folder, f"{name}/{key}", seal)
        except ValueError:
            return f"{name}/{key} cannot be read: it is cut off, or not what its checksum says"
        except StoreError:
            return f"{name}/{key} is gone, or not as long as it must be"
        if found != self._seals.arrays.get(name, {}).get(key):
            return f"{name}/{key} is not the one that was written there, but another"
        return None

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
            self._check_metadata(name, key, found)
            self._open[key] = found
        return self._open[key]

    def _check_metadata(self, name: str, key: str, array: Any) -> None:
        """Raises if an array is not of this layout; its chunks may be another job's: see above."""
        there, here = array.spec().to_json()["metadata"], self._metadata(name)
        if there["chunk_grid"]["name"] == "regular":
            rows = there["chunk_grid"]["configuration"]["chunk_shape"][0]
            if self.layout.block % rows == 0:
                here["chunk_grid"]["configuration"]["chunk_shape"][0] = rows
        for part, value in here.items():
            if there.get(part) != value:
                why = f"its {part} is {there.get(part)}, and must be {value}"
                if part == "shape" and there[part][0] > value[0]:
                    why += ". If the index was extended since it was opened here, open it again"
                raise malformed(self.folder, f"{key}/zarr.json", why)

    def _write(self, computed: tuple[int, int, dict[str, jax.Array]] | None) -> None:
        if computed is None:
            return
        block, checkpoint, values = computed
        if self._ledger is not None:
            self._ledger.check()
        with writing(f"block {block} of checkpoint {checkpoint} to {self.folder.path}"):
            futures = [
                future
                for name, value in values.items()
                for future in self._start_write(name, block, checkpoint, value)
            ]
            for future in futures:
                future.result()
        if self._ledger is not None:
            name = RAW if RAW in values else FEATURES
            self._ledger.mark(f"{name}/{checkpoint}", block + 1)

    def _start_write(self, name: str, block: int, checkpoint: int, value: jax.Array) -> list:
        array = self._array(name, checkpoint)
        column = 0 if name == RAW else checkpoint
        dtype = np.dtype(self.layout.dtypes[name])
        first, futures = block * self.layout.block, []
        for start, stop in self.place.owned_spans(self.layout.block):
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
    ) -> tuple[np.ndarray, list, dict[str, Any]]:
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
        futures: list[Any] = []
        seals: dict[str, Any] = {}
        for piece, first in pieces:
            present = max(0, min(len(piece), self.layout.size - first))
            piece[present:] = 0
            if present:
                source = array[first : first + present, chosen]
                futures.append(ts.array(piece[:present]).write(source))
                columns = range(array.shape[1])[chosen]
                keys = _chunk_keys(array, np.arange(first, first + present), columns)
                seals |= self._request_seals(name, array, keys)
        return rows, futures, seals

    def _request_picked(
        self, name: str, ids: np.ndarray
    ) -> tuple[np.ndarray, list, dict[str, Any]]:
        array, there = self._array(name, 0), np.flatnonzero(ids >= 0)
        rows = _aligned((1, len(ids), *array.shape[1:]), array.dtype.numpy_dtype)
        rows[:] = 0
        if not len(there):
            return rows, [], {}
        future = ts.array(rows[0])[there].write(array[ids[there]])
        keys = _chunk_keys(array, ids[there], range(array.shape[1]))
        return rows, [future], self._request_seals(name, array, keys)

    def _request_seals(self, name: str, array: Any, keys: Iterable[str]) -> dict[str, Any]:
        """Begins to read the checksums of chunks that were not compared with the seals yet."""
        if self._seals is None or name == RAW:
            return {}
        size, found = _chunk_bytes(array), {}
        for key in keys:
            if f"{name}/{key}" not in self._checked:
                found[key] = chunk_seal(self.folder, name, key, size)
        return found

    def _check_seals(self, name: str, start: int, waiting: dict[str, Any]) -> None:
        if self._seals is None or not waiting:
            return
        expected = self._seals.arrays[name]
        for key, future in waiting.items():
            if seal_of(self.folder, f"{name}/{key}", future) != expected.get(key):
                why = f"the chunk {key} is not the one that was written there, but another"
                raise self._damaged(name, start, why)
            self._checked.add(f"{name}/{key}")

    def _finish(self, reading: dict, start: int, block: int | None = None) -> dict[str, jax.Array]:
        """Waits for what was requested; blocks have as many rows as the layout's, or so many."""
        found = {}
        for name, (rows, futures, seals) in reading.items():
            try:
                for future in futures:
                    future.result()
            except ValueError as error:
                raise self._damaged(name, start, first_line(error)) from None
            # Rows of examples that are not finite are zero, so the fill value is never written.
            # Digests, of which none is zero, are compared with what was read.
            if name != DIGESTS and is_never_written(rows[..., 0]).any():
                raise self._damaged(name, start, "a chunk is missing")
            self._check_seals(name, start, seals)
            missing = padded(name, self.layout, self.place) - rows.shape[-1]
            if missing:
                rows = np.pad(rows, [(0, 0)] * 3 + [(0, missing)])
            found[name] = self.place.blocks(rows, block or self.layout.block, axes_of(name))
        return found

    def _damaged(self, name: str, start: int, why: str) -> StoreError:
        return StoreError(
            f"{self.folder.path}/{name} is damaged at or after block {start} (examples from "
            f"{start * self.layout.block}): {why}. Delete the index and build it again, or restore "
            "the file."
        )


def _chunk_bytes(array: Any) -> int:
    """Bytes of a chunk, all of which are whole, with their checksum."""
    return math.prod(array.chunk_layout.read_chunk.shape) * array.dtype.numpy_dtype.itemsize + 4


def _chunk_keys(array: Any, ids: np.ndarray, columns: Iterable[int]) -> list[str]:
    """Names of the chunks that hold the rows of some examples, of some checkpoints."""
    numbers = np.unique(ids // array.chunk_layout.read_chunk.shape[0]).tolist()
    return [f"c/{number}/{column}/0" for number in numbers for column in columns]


def _chunk(array: Any, key: str) -> Any:
    """The part of an array that a chunk holds."""
    _, number, column, _ = key.split("/")
    rows = array.chunk_layout.read_chunk.shape[0]
    start = int(number) * rows
    return array[start : min(start + rows, array.shape[0]), int(column)]


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
