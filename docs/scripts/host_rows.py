"""Rows kept as NumPy arrays by the host, and put on devices a slab at a time."""

import numpy as np

from jaxattr.store import rows as lib


class HostRows:  # see `jaxattr.store.rows.Rows`; of one host, on one device or a mesh
    resident, arrays = False, {}  # whoever needs rows asks for slabs

    def __init__(self, layout, place):
        self.layout, self.place, self.kept = layout, place, {}
        self._make_room(name for name in layout.widths if name != lib.RAW)

    def _make_room(self, names):
        shape = self.layout.blocks, self.layout.block, self.layout.checkpoints
        for name in names:
            width = lib.padded(name, self.layout, self.place)
            self.kept[name] = np.zeros((*shape, width), self.layout.dtypes[name])

    def begin(self, checkpoint):
        self._make_room([lib.RAW])

    def finish(self, checkpoint):
        del self.kept[lib.RAW]

    def made_by(self, name, checkpoint, make): ...  # all rows are kept

    def flush(self): ...  # nothing is written later

    def write(self, block, checkpoint, values):
        for name, rows in lib.compressed(values, self.layout, self.place).items():
            self.kept[name][block, :, checkpoint, : rows.shape[1]] = self.place.host(rows)

    def _on_devices(self, arrays, block):  # {name: [blocks, b, c, width]}
        put = self.place.blocks
        return {name: put(x, block, lib.axes_of(name)) for name, x in arrays.items()}

    def read(self, name, block, checkpoint):
        chosen = np.s_[block : block + 1, :, checkpoint : checkpoint + 1]
        parts = {part: self.kept[part][chosen] for part in self.layout.parts(name)}
        put, widths = self._on_devices(parts, self.layout.block), self.layout.widths
        return lib.values_of(name, {part: x[0, :, 0, : widths[part]] for part, x in put.items()})

    def column(self, name, checkpoint, columns=slice(None)):
        blocks = [self.read(name, i, checkpoint)[:, columns] for i in range(self.layout.blocks)]
        return np.concatenate([self.place.host(x) for x in blocks])[: self.layout.size]

    def slabs(self, names, rows, checkpoint=None):
        chosen = slice(None) if checkpoint is None else slice(checkpoint, checkpoint + 1)
        count, block = lib.blocks_at_once(self.layout, rows), self.layout.block
        for start, fresh in lib.slab_starts(self.layout.blocks, count):
            arrays = {name: self.kept[name][start : start + count, :, chosen] for name in names}
            yield lib.Slab(self._on_devices(arrays, block), start * block, fresh)

    def pick(self, names, ids):
        blocks, rows = np.divmod(np.maximum(ids.reshape(-1), 0), self.layout.block)
        arrays = {name: self.kept[name][None, blocks, rows] for name in names}
        return self._on_devices(arrays, ids.size)
