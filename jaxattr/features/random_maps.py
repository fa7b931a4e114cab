"""Random maps of whole gradients: many parameters of many groups in one loop over blocks.

Each parameter has a P of its own, by its name and that of its group, so that a group's features are
the same whatever other groups there are.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.counts import whole_number
from jaxattr.features import signs
from jaxattr.features.signs import words_of
from jaxattr.keys import named_key
from jaxattr.scales import widest
from jaxattr.typing import Key

Members: TypeAlias = Mapping[str, Mapping[str, jax.Array]]
"""Gradients of groups, {group: {leaf name: [b, size]}}."""


@runtime_checkable
class ProjectsTogether(Protocol):
    """A projection whose program does not grow with the number of groups."""

    def draw(self, seed: bytes, sizes: Mapping[str, Mapping[str, int]]) -> Any:
        """Draws what `project_groups` takes, a pytree, for {group: {leaf name: size}}."""

    def project_groups(self, drawn: Any, groups: Members) -> dict[str, jax.Array]:
        """Projects groups {group: {leaf name: [b, size]}} to {group: features [b, p]}."""


def draw_groups(projection: Any, seed: bytes, sizes: Mapping[str, Mapping[str, int]]) -> Any:
    """Draws what `project_groups` takes.

    Args:
      projection: of each group, a `Projection`.
      seed: of the checkpoint's projections.
      sizes: {group: {leaf name: size}}.

    Returns:
      A pytree.
    """
    if isinstance(projection, ProjectsTogether):
        return projection.draw(seed, sizes)
    return signs.keys_of(seed, [""])[0]


def project_groups(projection: Any, drawn: Any, groups: Members) -> dict[str, jax.Array]:
    """Projects groups, together where the projection can.

    Args:
      projection: of each.
      drawn: of `draw_groups`.
      groups: {group: {leaf name: [b, size]}}.

    Returns:
      {group: features [b, p]}.
    """
    if isinstance(projection, ProjectsTogether):
        return projection.project_groups(drawn, groups)
    return {name: projection.project(named_key(drawn, name), of) for name, of in groups.items()}


class Leaf(NamedTuple):
    """Gradients of a parameter, to be projected.

    Attributes:
      number: of the parameter, among all that are projected.
      group: number of the group that it belongs to.
      x: float [b, size].
    """

    number: int
    group: int
    x: jax.Array


@dataclasses.dataclass(frozen=True)
class _Randomised:
    """A random map of groups with more parameters than `width`.

    Each leaf has its own P: the product with [P_1 P_2 ...] is the sum of the leaves' parts.
    """

    width: int
    basis: ClassVar[None] = None

    def __post_init__(self) -> None:
        whole_number("dim", self.width)

    @property
    def name(self) -> str:
        """See `Projection`."""
        return f"{type(self).__name__.lower()}({self.width})"

    def dim(self, size: int) -> int:
        """See `Projection`."""
        return min(size, self.width)

    def project(self, key: Key, members: Mapping[str, jax.Array]) -> jax.Array:
        """See `Projection`."""
        sizes = {"": {name: x.shape[1] for name, x in members.items()}}
        drawn = self.draw(signs.seed_of(key, 0), sizes)
        return self.project_groups(drawn, {"": members})[""]

    def draw(self, seed: bytes, sizes: Mapping[str, Mapping[str, int]]) -> Any:
        """See `ProjectsTogether`: a key for each leaf."""
        names = list(self._projected(sizes))
        return signs.keys_of(seed, names) if names else ()

    def project_groups(self, drawn: Any, groups: Members) -> dict[str, jax.Array]:
        """See `ProjectsTogether`."""
        sizes = {name: {leaf: x.shape[1] for leaf, x in of.items()} for name, of in groups.items()}
        projected = self._projected(sizes)
        large = list(dict.fromkeys(group for group, _ in projected.values()))
        leaves = [
            Leaf(number, large.index(group), groups[group][leaf])
            for number, (group, leaf) in enumerate(projected.values())
        ]
        sums = dict(zip(large, self._sums(drawn, leaves, len(large)), strict=True)) if large else {}
        return {
            name: sums[name] if name in sums else jnp.concatenate(list(of.values()), axis=1)
            for name, of in groups.items()
        }

    def _projected(self, sizes: Mapping[str, Mapping[str, int]]) -> dict[str, tuple[str, str]]:
        """{name of the key: (group, leaf)} of all leaves that are not kept whole."""
        return {
            f"{group}\0{leaf}": (group, leaf)
            for group, of in sizes.items()
            if sum(of.values()) > self.width
            for leaf, size in of.items()
            if size
        }

    def _sums(self, drawn: Any, leaves: Sequence[Leaf], count: int) -> jax.Array:
        """Projects each leaf to [b, width] and adds up those of a group: [groups, b, width]."""
        raise TypeError(f"{type(self).__name__} projects nothing.")


@dataclasses.dataclass(frozen=True)
class _Blockwise(_Randomised):
    """Coordinates are projected in blocks, each with a key of its own."""

    @property
    def rows(self) -> int:
        """Coordinates per block, so many that P of it takes about 4 MiB."""
        return max(_BLOCK_ENTRIES // self.width // _HELD_ROWS, 1) * _HELD_ROWS

    def _of_block(self, key: Key, x: jax.Array) -> jax.Array:
        """Projects a block of a leaf, [b, rows], to [b, width], with a key of its own."""
        raise TypeError(f"{type(self).__name__} projects nothing.")

    def _sums(self, drawn: Any, leaves: Sequence[Leaf], count: int) -> jax.Array:
        return self._added(_zeros(leaves, count, self.width), drawn, leaves)

    def _added(self, total: jax.Array, keys: Key, leaves: Sequence[Leaf]) -> jax.Array:
        """Adds all leaves to the sums, in one loop; `keys` are of all leaves by number."""
        blocks = Blocks.of(leaves, self.rows)
        numbers = jnp.asarray(blocks.numbers, jnp.uint32)
        own = jax.vmap(jax.random.fold_in)(keys[blocks.leaves], numbers)
        return blocks.add(total, self._of_block, own)


class Blocks(NamedTuple):
    """Gradients of several parameters, cut into blocks of equal size.

    Attributes:
      owners: number of each block's group, int [n].
      leaves: number of each block's parameter, int [n].
      numbers: of each block, within its parameter, int [n].
      x: float [n, b, rows], zero past the end of a parameter.
    """

    owners: np.ndarray
    leaves: np.ndarray
    numbers: np.ndarray
    x: jax.Array

    @classmethod
    def of(cls, leaves: Sequence[Leaf], rows: int) -> "Blocks":
        """Cuts parameters up, at least one."""
        counts = [-(-leaf.x.shape[1] // rows) for leaf in leaves]

        def parts(leaf: Leaf, count: int) -> jax.Array:
            x = jnp.pad(leaf.x, ((0, 0), (0, count * rows - leaf.x.shape[1])))
            return x.reshape(x.shape[0], count, rows).swapaxes(0, 1)

        return cls(
            np.repeat([leaf.group for leaf in leaves], counts),
            np.repeat([leaf.number for leaf in leaves], counts),
            np.concatenate([np.arange(count) for count in counts]),
            jnp.concatenate([parts(*each) for each in zip(leaves, counts, strict=True)]),
        )

    def add(self, total: jax.Array, project: Callable[..., jax.Array], each: Any) -> jax.Array:
        """Adds what is made of each block to the sums of its group, some blocks at a time.

        Args:
          total: [groups, b, p].
          project: (an entry of `each`, block [b, rows]) -> [b, p].
          each: an array [n, ...].

        Returns:
          The sums.
        """
        n, (groups, _, width) = len(self.owners), total.shape
        together = min(_blocks_at_once(self.x.shape[-1] * width), n)
        taken = np.minimum(np.arange(-(-n // together) * together), n - 1)
        owners = self.owners[taken].reshape(-1, together)  # ascending
        # As many groups as a step's blocks have, at most; so that the last ones begin early enough.
        span = int((owners[:, -1] - owners[:, 0]).max()) + 1
        first = np.minimum(owners[:, 0], groups - span)
        of_each = (owners - first[:, None])[:, None] == np.arange(span)[:, None]  # [steps, g, t]
        more = len(taken) - n  # blocks of zeros
        x = jnp.pad(self.x, ((0, more), (0, 0), (0, 0)))

        def step(total: jax.Array, blocks: tuple) -> tuple[jax.Array, None]:
            start, mine, given, x = blocks
            parts = jax.vmap(project)(given, x).astype(total.dtype)  # [t, b, p]
            sums = jnp.where(mine[..., None, None], parts[None], 0).sum(axis=1)
            held = jax.lax.dynamic_slice_in_dim(total, start, span)
            return jax.lax.dynamic_update_slice_in_dim(total, held + sums, start, 0), None

        def in_steps(each: jax.Array) -> jax.Array:
            return each.reshape(-1, together, *each.shape[1:])

        given = (jnp.asarray(first), of_each, in_steps(each[taken] if more else each), in_steps(x))
        return jax.lax.scan(step, total, given)[0]


@dataclasses.dataclass(frozen=True)
class Rademacher(_Blockwise):
    """See `rademacher`: signs of small leaves are drawn beforehand, of others where needed."""

    def draw(self, seed: bytes, sizes: Mapping[str, Mapping[str, int]]) -> Any:
        """See `ProjectsTogether`: signs of all small leaves, and keys of the others."""
        names = self._projected(sizes)
        counts = {name: -(-sizes[of][leaf] // _HELD_ROWS) for name, (of, leaf) in names.items()}
        held = [
            signs.packed(seed, name, count * _HELD_ROWS, self.width)
            for name, count in counts.items()
            if count <= _HELD_BLOCKS
        ]
        blocks = (-1, _HELD_ROWS, words_of(self.width))
        words = np.concatenate(held).reshape(blocks) if held else None
        keys = signs.keys_of(seed, list(names)) if len(held) < len(names) else None
        return words, keys

    def _sums(self, drawn: Any, leaves: Sequence[Leaf], count: int) -> jax.Array:
        words, keys = drawn
        largest = _HELD_BLOCKS * _HELD_ROWS
        small = [leaf for leaf in leaves if leaf.x.shape[1] <= largest]
        large = [leaf for leaf in leaves if leaf.x.shape[1] > largest]
        total = _zeros(leaves, count, self.width)
        if small:
            total = Blocks.of(small, _HELD_ROWS).add(total, self._signed, words)
        return self._added(total, keys, large) if large else total

    def _of_block(self, key: Key, x: jax.Array) -> jax.Array:
        return self._signed(jax.random.bits(key, (self.rows, words_of(self.width))), x)

    def _signed(self, words: jax.Array, x: jax.Array) -> jax.Array:
        return _times(x, signs.unpacked(words, self.width, x.dtype))


@dataclasses.dataclass(frozen=True)
class Gaussian(_Blockwise):
    """See `gaussian`."""

    def _of_block(self, key: Key, x: jax.Array) -> jax.Array:
        return _times(x, jax.random.normal(key, (self.rows, self.width), jnp.float32))


@dataclasses.dataclass(frozen=True)
class Sjlt(_Blockwise):
    """See `sjlt`."""

    nonzeros: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("nonzeros", self.nonzeros)

    @property
    def name(self) -> str:
        """See `Projection`."""
        return f"sjlt({self.nonzeros})({self.width})"

    @property
    def rows(self) -> int:
        """See `_Blockwise`; no P is formed."""
        return 4096

    def _of_block(self, key: Key, x: jax.Array) -> jax.Array:
        bucket_key, sign_key = jax.random.split(key)
        drawn = (self.nonzeros, self.rows)
        buckets = jax.random.randint(bucket_key, drawn, 0, self.width)
        sign = jax.random.rademacher(sign_key, drawn, x.dtype) / math.sqrt(self.nonzeros)

        def add(total: jax.Array, each: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            bucket, sign = each
            return total.at[bucket].add((x * sign[None]).T), None

        total = jnp.zeros((self.width, x.shape[0]), x.dtype)
        return jax.lax.scan(add, total, (buckets, sign))[0].T


@dataclasses.dataclass(frozen=True)
class Srht(_Randomised):
    """See `srht`."""

    def _sums(self, drawn: Any, leaves: Sequence[Leaf], count: int) -> jax.Array:
        sums: list[Any] = [0] * count
        for leaf in leaves:
            sums[leaf.group] += self._of_leaf(drawn[leaf.number], leaf.x)
        return jnp.stack(sums)

    def _of_leaf(self, key: Key, x: jax.Array) -> jax.Array:
        size = x.shape[1]
        padded = 1 << max(size - 1, 1).bit_length()
        sign_key, row_key = jax.random.split(key)
        drawn = jax.random.rademacher(sign_key, (1, size), x.dtype)
        mixed = _hadamard(jnp.pad(x * drawn, ((0, 0), (0, padded - size))))  # [b, padded]
        rows = jax.random.randint(row_key, (self.width,), 0, padded)
        return mixed[:, rows] / math.sqrt(self.width)


@dataclasses.dataclass(frozen=True)
class Grass(_Randomised):
    """See `grass`: maps that are drawn on the host, once for each checkpoint."""

    mask: int = 4
    references: ClassVar[tuple[str, ...]] = ("grass",)

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("mask", self.mask)

    @property
    def name(self) -> str:
        """See `Projection`."""
        return f"grass({self.mask})({self.width})"

    def draw(self, seed: bytes, sizes: Mapping[str, Mapping[str, int]]) -> Any:
        """See `ProjectsTogether`: the coordinates, factors and features of each leaf."""
        drawn = []
        for name, (group, leaf) in self._projected(sizes).items():
            size, total = sizes[group][leaf], sum(sizes[group].values())
            # By size, so that each coordinate of the group is as likely.
            count = min(size, math.ceil(self.mask * self.width * size / total))
            ids, scales = signs.coordinates(seed, f"{name}\0mask", size, count)
            buckets, drawn_signs = signs.hashed(seed, f"{name}\0hash", count, self.width)
            drawn.append((ids, scales * drawn_signs, buckets))
        return drawn

    def _sums(self, drawn: Any, leaves: Sequence[Leaf], count: int) -> jax.Array:
        kept, buckets = [], []
        dtype = widest(*(leaf.x.dtype for leaf in leaves))
        for leaf in leaves:
            ids, factors, of_leaf = drawn[leaf.number]
            kept.append(leaf.x[:, ids].astype(dtype) * jnp.asarray(factors, dtype)[None])
            buckets.append(of_leaf + leaf.group * self.width)
        sums = added_up(jnp.concatenate(kept, axis=1), jnp.concatenate(buckets), count * self.width)
        return sums.reshape(-1, count, self.width).swapaxes(0, 1)  # [groups, b, p]


# Entries of P that are drawn at once, as 32-bit floats: 4 MiB, whatever the sizes.
_BLOCK_ENTRIES = 1 << 20
# A GPU has room and starts programs slowly; what a CPU multiplies should have room in its cache.
_BYTES_AT_ONCE = 256 << 20
# Signs of leaves of at most so many blocks of so many rows are held; they take p / 8 bytes per
# coordinate. Those of larger leaves are drawn again for each batch.
_HELD_BLOCKS, _HELD_ROWS = 64, 256


def _blocks_at_once(entries: int) -> int:
    """How many blocks, of so many entries of P, are projected in one step of the loop."""
    on_host = jax.default_backend() == "cpu"
    return 1 if on_host else max(_BYTES_AT_ONCE // (4 * entries), 1)


def added_up(x: jax.Array, buckets: jax.Array, width: int) -> jax.Array:
    """Adds columns up.

    Args:
      x: [b, n].
      buckets: which result each column belongs to, int [n].
      width: number of results.

    Returns:
      [b, width].
    """
    return jnp.zeros((width, x.shape[0]), x.dtype).at[buckets].add(x.T).T


def _zeros(leaves: Sequence[Leaf], groups: int, width: int) -> jax.Array:
    """Sums of no blocks: [groups, b, p]."""
    dtype = widest(*(leaf.x.dtype for leaf in leaves))
    return jnp.zeros((groups, leaves[0].x.shape[0], width), dtype)


def _times(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiplies [b, rows] by entries of P [rows, p], over sqrt(p)."""
    product = jnp.matmul(x, matrix.astype(x.dtype), precision="highest")
    return product / math.sqrt(matrix.shape[1])


def _hadamard(x: jax.Array) -> jax.Array:
    """Unnormalised Walsh-Hadamard transform of the last axis, a power of two long."""
    b, size = x.shape
    step = 1
    while step < size:
        pairs = x.reshape(b, -1, 2, step)
        x = jnp.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
        step *= 2
    return x.reshape(b, size)
