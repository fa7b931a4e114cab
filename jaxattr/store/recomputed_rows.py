"""Rows of which only the short ones are kept: features are made anew at each pass."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.scales import exponent_of
from jaxattr.sharding import Placement, compiled
from jaxattr.sources import track
from jaxattr.store.rows import (
    FEATURES,
    RAW,
    KeptRows,
    Make,
    MemoryRows,
    RowLayout,
    Slab,
    axes_of,
    pad_columns,
    padded,
)

_MADE = (FEATURES, RAW)


class RecomputedRows(KeptRows):
    """See `Rows`. A slab is one block, whose features are forgotten when the next is asked for.

    Attributes:
      layout: the shapes.
      place: over which devices.
      resident: they are not.
      arrays: none.
    """

    resident = False
    arrays: Mapping[str, jax.Array] = {}

    def __init__(self, layout: RowLayout, place: Placement) -> None:
        self.layout = layout
        self.place = place
        widths = {name: width for name, width in layout.widths.items() if name not in _MADE}
        self._kept = MemoryRows(dataclasses.replace(layout, widths=widths), place)
        self._makers: dict[tuple[str, int], Make] = {}

    def made_by(self, name: str, checkpoint: int, make: Make) -> bool:
        """See `Rows`; features each time, what else is made once."""
        self._makers[name, checkpoint] = make
        return True

    def write(self, block: int, checkpoint: int, values: Mapping[str, jax.Array]) -> None:
        """See `Rows`; features are let go of."""
        kept = {name: value for name, value in values.items() if name not in _MADE}
        self._kept.write(block, checkpoint, kept)

    def begin(self, checkpoint: int) -> None:
        """See `Rows`; nothing to do, as for the two that follow."""

    def flush(self) -> None:
        """See `Rows`."""

    def finish(self, checkpoint: int) -> None:
        """See `Rows`."""

    def read(self, name: str, block: int, checkpoint: int) -> jax.Array:
        """See `Rows`."""
        if name not in _MADE:
            return self._with([name]).read(name, block, checkpoint)
        return self._makers[name, checkpoint](self._positions(block))

    def slabs(
        self, names: Sequence[str], rows: int, checkpoint: int | None = None
    ) -> Iterator[Slab]:
        """See `Rows`; where features are among them, a block at a time."""
        made = [name for name in names if name in _MADE]
        if not made:
            yield from self._with(names).slabs(names, rows, checkpoint)
            return
        chosen = range(self.layout.checkpoints) if checkpoint is None else (checkpoint,)
        short = [name for name in names if name not in _MADE]
        kept = self._with(short).slabs(short, self.layout.block, checkpoint)
        blocks = track(kept, "features anew", self.layout.blocks)
        for block, slab in enumerate(blocks):
            arrays = {name: self._stacked(name, self._positions(block), chosen) for name in made}
            exponent = (
                compiled(self.place, exponent_of)(arrays[FEATURES]) if FEATURES in arrays else None
            )
            yield slab._replace(arrays=slab.arrays | arrays, exponent=exponent)

    def pick(self, names: Sequence[str], ids: np.ndarray) -> dict[str, jax.Array]:
        """See `Rows`; features of those examples alone are computed."""
        short = [name for name in names if name not in _MADE]
        found = self._with(short).pick(short, ids)
        every = range(self.layout.checkpoints)
        made = [name for name in names if name in _MADE]
        return found | {name: self._stacked(name, ids.reshape(-1), every) for name in made}

    def _with(self, names: Sequence[str]) -> MemoryRows:
        """The rows that are kept, some of which are made when they are first asked for."""
        for name, checkpoint in [key for key in self._makers if key[0] in names]:
            make, blocks = self._makers[name, checkpoint], range(self.layout.blocks)
            for block in track(iter(blocks), f"{name} anew", len(blocks)):
                self._kept.write(block, checkpoint, {name: make(self._positions(block))})
            del self._makers[name, checkpoint]  # not before: a pass that stopped is made again
        return self._kept

    def _positions(self, block: int) -> np.ndarray:
        return block * self.layout.block + np.arange(self.layout.block)

    def _stacked(self, name: str, positions: np.ndarray, chosen: Sequence[int]) -> jax.Array:
        """[1, b, c, width] of examples."""
        width = padded(FEATURES, self.layout, self.place)
        rows = [self._makers[name, number](positions) for number in chosen]
        same = len(rows) == 1 and self.place.columns == 1  # then only in another shape
        return _compiled_stack(self.place, width, same)(rows)


@functools.lru_cache(maxsize=16)
def _compiled_stack(place: Placement, width: int, in_place: bool) -> Any:
    def stack(rows: list[jax.Array]) -> jax.Array:
        return jnp.stack([pad_columns(x, width) for x in rows], axis=1)[None]

    return place.jit(stack, *axes_of(FEATURES), donate_argnums=(0,) if in_place else ())
