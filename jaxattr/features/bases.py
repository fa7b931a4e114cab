"""Bases of the two sides of a linear map's gradient: random, or fitted to the training data.

The features of a linear map y = x W are A^T (dL/dW) B. What A and B are makes the method: random
signs (LoGRA), the leading eigenvectors of the covariances of x and dL/dy (its PCA variant), all of
them (the eigenbasis of K-FAC and EK-FAC), or random signs scaled by an optimizer's second moments
(TrackStar).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.counts import whole_number
from jaxattr.features import signs
from jaxattr.groups import GroupLayout
from jaxattr.linear_maps import LinearMap, WithBias
from jaxattr.scales import wide

Sides = tuple[jax.Array | WithBias | None, jax.Array | None]
"""(A [in, r], B [out, r']), each [stack, ...] for a stacked leaf; None is the identity."""


class Factored(NamedTuple):
    """A linear map whose features are taken from both sides.

    Attributes:
      map: the linear map.
      bias: whether its bias is one more input, that is always 1.
      left: features of the input side.
      right: features of the output side.
      inner: of both, before they are mixed.
    """

    map: LinearMap
    bias: bool
    left: int
    right: int
    inner: tuple[int, int]

    @property
    def rows(self) -> int:
        """Inputs of the matrix, with the bias."""
        return self.map.size_in + self.bias

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axis of its arrays: the layers, if it is stacked."""
        return () if self.map.stack is None else (self.map.stack,)

    @property
    def dtype(self) -> Any:
        """What its features are computed in."""
        return wide(self.map.dtype)


class Drawn(NamedTuple):
    """What is drawn for one checkpoint, whatever the data; a pytree.

    Attributes:
      sides: {leaf: A and B}; empty where they are fitted, or nothing is factored.
      rest: what projects the parameters that belong to no linear map.
      mixing: what mixes the features of linear maps, of `Basis.draw_mixing`.
    """

    sides: dict[str, Sides]
    rest: Any
    mixing: Any = ()


class Fitted(NamedTuple):
    """What was fitted to one checkpoint; a pytree.

    Attributes:
      sides: {leaf: A and B}; empty where they are drawn at random.
      scales: {leaf: what its gradient is multiplied with, elementwise}; empty for ones.
      curvature: eigenvalue of each feature [p], `UNKNOWN` where it is not known; or None.
      captured: {leaf: share of the trace of the covariances that A and B hold, [2]}; of a side
        that was narrowed at random first, of the trace that was left.
      exponent: the curvature is to be multiplied by 2 to this power.
      data: digest of the examples that it was fitted to, uint32 [k]; None if it saw none.
    """

    sides: dict[str, Sides]
    scales: dict[str, jax.Array]
    curvature: jax.Array | None
    captured: dict[str, jax.Array]
    exponent: jax.Array | None = None
    data: jax.Array | None = None

    def with_sides(self, drawn: Drawn) -> "Fitted":
        """With the sides that are drawn, where none are fitted."""
        return self._replace(sides=self.sides or drawn.sides)

    def curvature_over(self, exponent: int) -> np.ndarray | None:
        """Returns the curvature of features that are taken over 2 to a power, float64 [p]."""
        if self.curvature is None:
            return None
        own = 0 if self.exponent is None else int(self.exponent)
        found = np.asarray(self.curvature, np.float64)
        return np.where(found == UNKNOWN, UNKNOWN, np.ldexp(found, own - 2 * exponent))


UNKNOWN = -1.0
"""Stands for an eigenvalue that is not known; not NaN, which people who debug look for."""

NOTHING = Fitted({}, {}, None, {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Basis:
    """Where A and B come from: a frozen dataclass whose fields are all its parameters.

    They are drawn, or fitted to the data where a basis has the method of `Fits`.

    Attributes:
      rank: largest number of features per side; None for no limit.
      bands: into how many groups each side is split.
      materialize: whether the gradient of a linear map must be formed, because it is scaled
        elementwise.
      references: keys of the citations of a basis that methods share.
    """

    rank: int | None = None
    bands: int = 1
    materialize: bool = False
    references: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.rank is not None:
            whole_number("rank", self.rank)
        whole_number("bands", self.bands)

    @property
    def name(self) -> str:
        """What `describe` shows."""
        return type(self).__name__

    @property
    def checkpoints(self) -> int | None:
        """How many checkpoints it was made for; None for any number."""
        return None

    def check(self, groups: GroupLayout) -> None:
        """Raises if there are parameters in the groups that it has nothing for."""

    def side(self, size: int) -> int:
        """Returns the number of features of a side with so many inputs or outputs."""
        return size if self.rank is None else min(size, self.rank)

    def inner(self, size: int) -> int:
        """Returns the number of features of such a side before they are mixed."""
        return self.side(size)

    def draw(self, seed: bytes, factored: Sequence[Factored]) -> dict[str, Sides]:
        """Returns A and B of each linear map, on the host; none where they are fitted.

        Args:
          seed: of the checkpoint's projections.
          factored: the linear maps.
        """
        return {}

    def draw_mixing(self, seed: bytes, factored: Sequence[Factored]) -> Any:
        """Returns what `mix` takes, a pytree; on the host."""
        return ()

    def mix(
        self, drawn: Any, factored: Sequence[Factored], z: Mapping[str, jax.Array]
    ) -> Mapping[str, jax.Array]:
        """Maps A^T G B to features; linear, and here nothing is done.

        Args:
          drawn: of `draw_mixing`.
          factored: the linear maps.
          z: {leaf: [b, *stack, *inner]}.

        Returns:
          {leaf: [b, *stack, left, right]}.
        """
        return z


@runtime_checkable
class Fits(Protocol):
    """A basis that is fitted to each checkpoint."""

    def fit(self, over: Any) -> Fitted:
        """Returns what was fitted in a pass over the training data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signs(Basis):
    """Random signs, scaled so that inner products are unbiased; the identity on small sides."""

    @property
    def name(self) -> str:
        """See `Basis`."""
        return "two-sided random signs"

    def draw(self, seed: bytes, factored: Sequence[Factored]) -> dict[str, Sides]:
        """See `Basis`: {-1, 1} / sqrt(r), others in each leaf and layer; None is a whole side."""

        def side(of: Factored, number: int, size: int, rank: int) -> Any:
            name, shape = f"{of.map.leaf}\0\0{number}", (*of.lead, size, rank)
            return None if size == rank else signs.scaled_signs(seed, name, shape, of.dtype)

        return {
            of.map.leaf: (side(of, 0, of.rows, of.left), side(of, 1, of.map.size_out, of.right))
            for of in factored
        }


def cut_sides(factored: Factored, sides: Sides) -> Sides:
    """Cuts the last row off A where it is the bias's."""
    a, b = sides
    if not factored.bias or a is None or isinstance(a, WithBias):
        return sides
    return WithBias(a[..., :-1, :], a[..., -1:, :]), b


def apply_sides(gradient: jax.Array, sides: Sides) -> jax.Array:
    """Returns A^T G B.

    Args:
      gradient: G [..., in, out].
      sides: A and B.

    Returns:
      [..., r, r'].
    """
    a, b = sides
    a = jnp.concatenate(a, axis=-2) if isinstance(a, WithBias) else a
    if a is not None:
        gradient = jnp.matmul(jnp.swapaxes(a, -1, -2), gradient, precision="highest")
    return gradient if b is None else jnp.matmul(gradient, b, precision="highest")
