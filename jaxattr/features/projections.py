"""Random projections of per-example gradients, drawn anew wherever they are needed.

A projection is a fixed linear map P of each group's gradient, with E<P x, P y> = <x, y>. Nothing
is stored: entries come from (key, group name, leaf name, block), so they are the same on every
device, for any batch size, and for any order or number of other groups.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from jaxattr.features import bases
from jaxattr.features.bases import Basis
from jaxattr.keys import named_key
from jaxattr.typing import Key


class Projection(Protocol):
    """What is done to gradients: a frozen dataclass whose fields are all its parameters.

    Users may write their own; arrays among its fields go in as `jaxattr.identity.Contents`.
    """

    @property
    def name(self) -> str:
        """What `describe` shows."""
        ...

    @property
    def basis(self) -> Basis | None:
        """How the gradients of linear maps are projected, from both sides and without being formed.

        None if they are projected as all others are.
        """
        ...

    def dim(self, size: int) -> int:
        """Returns the number of features p of a group with so many parameters."""
        ...

    def project(self, key: Key, members: Mapping[str, jax.Array]) -> jax.Array:
        """Returns features [b, p] of the members {leaf name: [b, size]}; `key` is the group's."""
        ...


def identity() -> Projection:
    """Keeps every gradient whole. Exact; features are as long as the parameters.

    Returns:
      The projection.
    """
    return Identity()


def rademacher(dim: int) -> Projection:
    r"""Multiplies by random signs, :math:`\phi = P g / \sqrt{p}` with entries of P in {-1, 1}.

    Guarantees: inner products are unbiased, with standard deviation at most
    :math:`\sqrt{2/p} \|x\| \|y\|`; a group of at most `dim` parameters is kept exactly.
    Cost: 2 D p operations per example; P is drawn 32 entries per random word, in blocks.

    Args:
      dim: largest number of features per group, >= 1.

    Returns:
      The projection.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = {"kernel": jnp.ones((1, 10_000))}
      >>> phi = rademacher(512).project(jax.random.key(0), x)
      >>> phi.shape, bool(abs((phi * phi).sum() / 10_000 - 1) < 0.2)
      ((1, 512), True)
    """
    return Rademacher(dim)


def gaussian(dim: int) -> Projection:
    r"""Multiplies by normal entries, :math:`\phi = P g / \sqrt{p}`.

    Guarantees and cost: as `rademacher`, at one random word per entry.

    Args:
      dim: largest number of features per group, >= 1.

    Returns:
      The projection.
    """
    return Gaussian(dim)


def sjlt(dim: int, nonzeros: int = 4) -> Projection:
    """Adds each coordinate, with random sign, to a few random features (sparse JL, CountSketch).

    Guarantees: inner products are unbiased; a group of at most `dim` parameters is kept exactly.
    Cost: D * nonzeros additions per example, whatever p is. On GPUs the additions come in no
    fixed order, so the last bits may differ from run to run.

    Args:
      dim: largest number of features per group, >= 1.
      nonzeros: features that each coordinate is added to, >= 1.

    Returns:
      The projection.
    """
    return Sjlt(dim, nonzeros)


def srht(dim: int) -> Projection:
    """Takes random rows of a Hadamard transform of the randomly signed gradient.

    Guarantees: inner products are unbiased; a group of at most `dim` parameters is kept exactly.
    Cost: D log D additions per example, D rounded up to a power of two.

    Args:
      dim: largest number of features per group, >= 1.

    Returns:
      The projection.
    """
    return Srht(dim)


def two_sided(rank: int, *, basis: Basis | None = None) -> Projection:
    r"""Projects the gradient of each weight matrix from both sides, without forming it.

    .. math:: \phi = \mathrm{vec}(A^\top \, \nabla_W \ell \; B), \qquad
              A \in \mathbb{R}^{i \times r}, \; B \in \mathbb{R}^{o \times r}

    The last row of A belongs to the bias where the bias is in the same group. Parameters that
    belong to no linear map are projected by `rademacher(rank ** 2)`.

    Guarantees: inner products are unbiased for the random basis; a side of at most `rank` is kept
    whole. The error is larger than that of `rademacher(rank ** 2)`: on a gradient of one
    position, where it is worst, the relative standard deviation is about 2 / sqrt(rank).
    Cost: a backward pass without weight gradients and t (i + o) r operations per example and map.

    Args:
      rank: largest number of features per side, >= 1.
      basis: where A and B come from. Default: random signs.

    Returns:
      The projection.

    References:
      Choe et al. (2024), LoGRA, arXiv:2405.13954, section 3. Deviation: scaled to be unbiased.
    """
    chosen = bases.Signs() if basis is None else basis
    return TwoSided(rank, dataclasses.replace(chosen, rank=rank))


@dataclasses.dataclass(frozen=True)
class Identity:
    """See `identity`."""

    name: ClassVar[str] = "identity"
    basis: ClassVar[None] = None

    def dim(self, size: int) -> int:
        """See `Projection`."""
        return size

    def project(self, key: Key, members: Mapping[str, jax.Array]) -> jax.Array:
        """See `Projection`."""
        return _concatenate(key, members)


@dataclasses.dataclass(frozen=True)
class _Randomised:
    """A random map of groups with more parameters than `width`."""

    width: int
    basis: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"A projection needs dim >= 1, got {self.width}.")

    @property
    def name(self) -> str:
        """See `Projection`."""
        return f"{type(self).__name__.lower()}({self.width})"

    def dim(self, size: int) -> int:
        """See `Projection`."""
        return min(size, self.width)

    def project(self, key: Key, members: Mapping[str, jax.Array]) -> jax.Array:
        """See `Projection`."""
        if sum(x.shape[1] for x in members.values()) <= self.width:
            return _concatenate(key, members)
        # Each leaf has its own P: the product with [P_1 P_2 ...] is the sum of the leaves' parts.
        parts = [self._of_leaf(named_key(key, leaf), x) for leaf, x in members.items() if x.size]
        return jax.tree.reduce(jnp.add, parts)  # [b, p]

    def _of_leaf(self, key: Key, x: jax.Array) -> jax.Array:
        """Projects [b, size] to [b, width]."""
        return _dense(self._draw, key, x, self.width)

    def _draw(self, key: Key, rows: int, p: int) -> jax.Array:
        """Draws entries [rows, p]."""
        return _signs(key, rows, p)


@dataclasses.dataclass(frozen=True)
class Rademacher(_Randomised):
    """See `rademacher`."""


@dataclasses.dataclass(frozen=True)
class Gaussian(_Randomised):
    """See `gaussian`."""

    def _draw(self, key: Key, rows: int, p: int) -> jax.Array:
        return jax.random.normal(key, (rows, p), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Sjlt(_Randomised):
    """See `sjlt`."""

    nonzeros: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nonzeros < 1:
            raise ValueError(f"nonzeros must be at least 1, got {self.nonzeros}.")

    @property
    def name(self) -> str:
        """See `Projection`."""
        return f"sjlt({self.nonzeros})({self.width})"

    def _of_leaf(self, key: Key, x: jax.Array) -> jax.Array:
        size = x.shape[1]
        bucket_key, sign_key = jax.random.split(key)
        buckets = jax.random.randint(bucket_key, (self.nonzeros, size), 0, self.width)
        signs = jax.random.rademacher(sign_key, (self.nonzeros, size), x.dtype)
        sums = [
            jax.ops.segment_sum((x * sign[None]).T, bucket, self.width)  # [p, b]
            for bucket, sign in zip(buckets, signs, strict=True)
        ]
        return jax.tree.reduce(jnp.add, sums).T / math.sqrt(self.nonzeros)


@dataclasses.dataclass(frozen=True)
class Srht(_Randomised):
    """See `srht`."""

    def _of_leaf(self, key: Key, x: jax.Array) -> jax.Array:
        size = x.shape[1]
        padded = 1 << max(size - 1, 1).bit_length()
        sign_key, row_key = jax.random.split(key)
        signs = jax.random.rademacher(sign_key, (1, size), x.dtype)
        mixed = _hadamard(jnp.pad(x * signs, ((0, 0), (0, padded - size))))  # [b, padded]
        rows = jax.random.randint(row_key, (self.width,), 0, padded)
        return mixed[:, rows] / math.sqrt(self.width)


@dataclasses.dataclass(frozen=True)
class TwoSided:
    """See `two_sided`."""

    rank: int
    basis: Basis

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}.")

    @property
    def name(self) -> str:
        """See `Projection`."""
        return f"{self.basis.name}, rank {self.rank}"

    @property
    def rest(self) -> Projection:
        """The projection of parameters that belong to no linear map."""
        return Rademacher(self.rank**2)

    def dim(self, size: int) -> int:
        """See `Projection`; of the rest."""
        return self.rest.dim(size)

    def project(self, key: Key, members: Mapping[str, jax.Array]) -> jax.Array:
        """See `Projection`; of the rest."""
        return self.rest.project(key, members)


def _concatenate(key: Key, members: Mapping[str, jax.Array]) -> jax.Array:
    del key
    return jnp.concatenate(list(members.values()), axis=1)  # [b, size]


DrawFn = Callable[[Key, int, int], jax.Array]
"""(key, rows, p) -> entries of P [rows, p]."""

# Entries of P held at once, as 32-bit floats: 4 MiB, whatever the sizes.
_BLOCK_ENTRIES = 1 << 20


def _dense(draw: DrawFn, key: Key, x: jax.Array, p: int) -> jax.Array:
    """Multiplies by a dense random matrix, a block of its rows at a time."""
    # A bias needs no block of 4 MiB; 32 rows share a word.
    rows = min(max(_BLOCK_ENTRIES // p // 32, 1), -(-x.shape[1] // 32)) * 32
    blocks = -(-x.shape[1] // rows)
    x = jnp.pad(x, ((0, 0), (0, blocks * rows - x.shape[1])))
    x = x.reshape(x.shape[0], blocks, rows).swapaxes(0, 1)  # [blocks, b, rows]

    def add_block(total: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple:
        index, part = block
        matrix = draw(jax.random.fold_in(key, index), rows, p).astype(x.dtype)
        return total + jnp.matmul(part, matrix, precision="highest"), None  # [b, p]

    start = jnp.zeros((x.shape[1], p), x.dtype)
    total, _ = jax.lax.scan(add_block, start, (jnp.arange(blocks), x))
    return total / math.sqrt(p)


def _signs(key: Key, rows: int, p: int) -> jax.Array:
    words = jax.random.bits(key, (rows // 32, 1, p), jnp.uint32)
    shifts = jnp.arange(32, dtype=jnp.uint32)[None, :, None]
    bits = (words >> shifts) & 1  # [rows / 32, 32, p]
    return (1 - 2 * bits.astype(jnp.int8)).reshape(rows, p)


def _hadamard(x: jax.Array) -> jax.Array:
    """Unnormalised Walsh-Hadamard transform of the last axis, a power of two long."""
    b, size = x.shape
    step = 1
    while step < size:
        pairs = x.reshape(b, -1, 2, step)
        x = jnp.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
        step *= 2
    return x.reshape(b, size)
