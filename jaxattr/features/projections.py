"""Random projections of per-example gradients, drawn anew wherever they are needed.

A projection is a fixed linear map P of each group's gradient, with E<P x, P y> = <x, y>. Nothing
is stored: entries come from (key, group name, leaf name, block), so they are the same on every
device, for any batch size, and for any order or number of other groups.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from jaxattr.counts import whole_number
from jaxattr.features import bases
from jaxattr.features.bases import Basis
from jaxattr.features.grass import Masks
from jaxattr.features.random_maps import Gaussian, Grass, Members, Rademacher, Sjlt, Srht
from jaxattr.typing import Key


class Projection(Protocol):
    """What is done to gradients: a frozen dataclass whose fields are all its parameters.

    A projection is linear, and each example's features are of its own gradient alone.
    Users may write their own; arrays among its fields go in as `jaxattr.identity.Contents`.
    """

    @property
    def name(self) -> str:
        """What `describe` shows."""

    @property
    def basis(self) -> Basis | None:
        """How the gradients of linear maps are projected, from both sides and without being formed.

        None if they are projected as all others are.
        """

    def dim(self, size: int) -> int:
        """Returns the number of features p of a group with so many parameters."""

    def project(self, key: Key, members: Mapping[str, jax.Array]) -> jax.Array:
        """Returns features [b, p] of the members {leaf name: [b, size]}. Jittable.

        Args:
          key: the group's, the same for all batches of a checkpoint.
          members: the gradients of the group's leaves, flat; their sizes add up to that of `dim`.
        """


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


def grass(size: int, mask: int = 4) -> Projection:
    r"""GraSS: keeps some coordinates at random, and adds them, with signs, to `size` features.

    .. math:: \phi = S M g, \qquad M g = \sqrt{D / k'} \, (g_{i_1}, \dots, g_{i_{k'}}), \qquad
              k' = \mathrm{mask} \cdot \mathrm{size}

    Guarantees: inner products are unbiased; a group of at most `size` parameters is kept exactly.
    What is not kept does not count: where gradients are sparse, their inner products vary much more
    than with `sjlt`.
    Cost: k' additions per example, whatever D is; the gradient is formed. On GPUs the additions
    come in no fixed order, so the last bits may differ from run to run.

    Args:
      size: largest number of features per group, >= 1.
      mask: times `size` coordinates are kept, >= 1.

    Returns:
      The projection.

    References:
      Hu et al. (2025), arXiv:2505.18976, section 3. Deviations: scaled to be unbiased; one
      coordinate of each of k' equal parts is kept, not k' of all; no mask is learned.
    """
    return Grass(size, mask)


def factgrass(rank: int, mask: int = 2) -> Projection:
    r"""FactGraSS: `grass` for linear maps, from some of their inputs and outputs.

    .. math:: \phi = S \, \mathrm{vec}(M_i^\top \, \nabla_W \ell \; M_o)

    M keep mask * rank of the inputs and of the outputs at random, the bias among the inputs; S adds
    the (mask * rank)^2 products, with random signs, to rank^2 features. Parameters that belong to
    no linear map are projected by `rademacher(rank ** 2)`.

    Guarantees: inner products are unbiased; a side of at most mask * rank is kept whole, and a map
    with at most `rank` inputs and outputs exactly. No weight gradient is formed.
    Cost: as `two_sided(mask * rank)`: M are products with columns of the identity, since that is
    what linear maps of all kinds take. So it saves features beside that, and no time beside
    `two_sided(rank)`.

    Args:
      rank: largest number of features per side, >= 1.
      mask: times `rank` inputs and outputs are kept, >= 1.

    Returns:
      The projection.

    References:
      Hu et al. (2025), arXiv:2505.18976, section 3. Deviations: as `grass`.
    """
    return TwoSided(rank, Masks(rank=rank, mask=mask))


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
        return jnp.concatenate(list(members.values()), axis=1)  # [b, size]


@dataclasses.dataclass(frozen=True)
class TwoSided:
    """See `two_sided`."""

    rank: int
    basis: Basis

    def __post_init__(self) -> None:
        whole_number("rank", self.rank)

    @property
    def name(self) -> str:
        """See `Projection`."""
        return f"{self.basis.name}, rank {self.rank}"

    @property
    def references(self) -> tuple[str, ...]:
        """Keys of the citations of the basis."""
        return self.basis.references

    @property
    def rest(self) -> Rademacher:
        """The projection of parameters that belong to no linear map."""
        return Rademacher(self.rank**2)

    def dim(self, size: int) -> int:
        """See `Projection`; of the rest."""
        return self.rest.dim(size)

    def project(self, key: Key, members: Mapping[str, jax.Array]) -> jax.Array:
        """See `Projection`; of the rest."""
        return self.rest.project(key, members)

    def draw(self, seed: bytes, sizes: Mapping[str, Mapping[str, int]]) -> Any:
        """See `ProjectsTogether`; of the rest."""
        return self.rest.draw(seed, sizes)

    def project_groups(self, drawn: Any, groups: Members) -> dict[str, jax.Array]:
        """See `ProjectsTogether`; of the rest."""
        return self.rest.project_groups(drawn, groups)
