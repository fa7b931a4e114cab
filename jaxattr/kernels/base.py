"""What a kernel is, and the unit of its damping."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.counts import real_number
from jaxattr.features.plans import FeatureLayout
from jaxattr.typing import Features


@dataclasses.dataclass(frozen=True)
class Damping:
    """A multiple of the identity added to a matrix before it is inverted.

    Attributes:
      value: how much, >= 0.
      relative: whether `value` is in units of the mean eigenvalue of the block that it is added to.
    """

    value: float
    relative: bool

    def of(self, mean_eigenvalue: float, exponent: int = 0) -> float:
        """Returns what is added to each eigenvalue.

        Args:
          mean_eigenvalue: of the block.
          exponent: eigenvalues are of features over 2 to this power, so they are over its square.
        """
        if self.relative:
            return self.value * mean_eigenvalue
        return math.ldexp(self.value, -2 * exponent)

    def __str__(self) -> str:
        return f"{self.value:g}" + (" x mean eigenvalue" if self.relative else "")


def absolute(value: float) -> Damping:
    """Damping in the units of the matrix itself.

    Args:
      value: added to each eigenvalue, >= 0.

    Returns:
      The damping.

    Raises:
      ValueError: if the value is negative or not finite.
    """
    return Damping(real_number("Damping", value, least=0), relative=False)


def relative(value: float) -> Damping:
    """Damping in units of the mean eigenvalue, of each block by itself.

    Args:
      value: times the mean eigenvalue, >= 0.

    Returns:
      The damping.

    Raises:
      ValueError: if the value is negative or not finite.
    """
    return Damping(real_number("Damping", value, least=0), relative=True)


def or_relative(damping: Damping | None) -> Damping:
    """Returns the damping, or where none is given the methods' default, `relative(0.1)`."""
    return relative(0.1) if damping is None else damping


class Surroundings(NamedTuple):
    """What a kernel may ask for when its statistics are complete, of one checkpoint.

    Attributes:
      layout: the columns of the features.
      rows: columns -> those of the features of all training examples [n, width], on the host; rows
        of zeros for examples that do not count.
      curvature: eigenvalue of each feature [p] as the basis of the features knows it, `UNKNOWN`
        where it does not; or None.
      sums_of: (sums, data, description) -> the sums over the features of other examples, for
        `sums` as in `Kernel`.
      exponent: features are given over 2 to this power, so that their squares stay within range;
        curvature over its square.
      hessian: () -> (products, operands): `products(operands, vectors [k, p])` are the products
        [k, p] with the Hessian of the mean training loss, in the coordinates of the features.
    """

    layout: FeatureLayout
    rows: Callable[[slice], np.ndarray]
    curvature: np.ndarray | None
    sums_of: Callable[[Callable, Any, str], Any]
    exponent: int
    hessian: Callable[[], tuple[Callable[[Any, jax.Array], jax.Array], Any]]


class Kernel(Protocol):
    """What multiplies the training side: a frozen dataclass whose fields are all its parameters.

    Methods are pure. Where `degree` is a number, statistics are squares of features, and all that a
    kernel is given, now and later, are features over one power of two (`Surroundings.exponent`): K
    phi of features times s is K phi times s^degree. What else a kernel can do is a method that it
    has or has not: see `MapsQueries`, `Iterates`, and `decayed` of `Segment`.
    """

    @property
    def name(self) -> str:
        """What `describe` shows."""

    @property
    def degree(self) -> int | None:
        """How K phi grows with the features: -1 for inverses, 0 for unit norm; else None."""

    def sums(self, layout: FeatureLayout, n: int, phi: Features, kept: jax.Array) -> Any:
        """Sums statistics over a batch; those of several batches or devices are added. Jittable.

        Args:
          layout: the columns of the features.
          n: number of training examples.
          phi: features [b, p]; rows that must not count are zero.
          kept: which rows count, bool [b].

        Returns:
          A pytree of arrays.
        """

    def finalize(self, statistics: Any, surroundings: Surroundings) -> Any:
        """Makes the operator, a pytree of arrays, from the statistics of all; on the host."""

    def apply(self, operator: Any, phi: Features) -> Features:
        """Returns K phi, [b, p]. Jittable."""

    def __hash__(self) -> int: ...


@runtime_checkable
class MapsQueries(Protocol):
    """A kernel that transforms queries too, and scales them to unit norm; diagonal by group."""

    def of_queries(self, operator: Any, phi: Features) -> Features:
        """Returns features of queries [q, p]. Jittable."""

    def whiten(self, operator: Any, phi: Features) -> Features:
        """Returns the linear part of `of_queries`, before rows are scaled to unit norm."""


def keeps_operator(kernel: Kernel) -> bool:
    """Whether an index keeps the operator of a kernel, which queries need."""
    return isinstance(kernel, MapsQueries) or hasattr(kernel, "decayed")


@runtime_checkable
class Iterates(Protocol):
    """A kernel that solves by iteration, whose error is measured."""

    @property
    def largest_residual(self) -> float:
        """Largest relative residual that counts as solved."""

    def residual(self, operator: Any, phi: Features, mapped: Features) -> jax.Array:
        """Returns the relative error of each solve [b], from phi and K phi [b, p]. Jittable."""


class WithoutSums:
    """A kernel that needs no statistics."""

    degree: ClassVar[int | None] = None

    def sums(self, layout: FeatureLayout, n: int, phi: Features, kept: jax.Array) -> tuple[()]:
        """See `Kernel`: none."""
        return ()


@dataclasses.dataclass(frozen=True)
class Identity(WithoutSums):
    """K = I: plain inner products, as in TracIn. One pass over the data is enough."""

    name: ClassVar[str] = "identity"

    def finalize(self, statistics: Any, surroundings: Surroundings) -> tuple[()]:
        """See `Kernel`: nothing."""
        return ()

    def apply(self, operator: Any, phi: Features) -> Features:
        """See `Kernel`: the features themselves."""
        return phi


class Sums(NamedTuple):
    """Sums over training examples.

    Attributes:
      total: an array, or a list of arrays.
      examples: how many.
    """

    total: Any
    examples: jax.Array

    def means(self) -> Any:
        """Means over examples, float64 on the host."""
        count = max(float(self.examples), 1.0)
        return jax.tree.map(lambda x: np.asarray(x, np.float64) / count, self.total)


@dataclasses.dataclass(frozen=True)
class Damped:
    """A kernel that inverts a matrix to which damping is added.

    Attributes:
      damping: what is added.
    """

    damping: Damping
    degree: ClassVar[int | None] = -1
    what: ClassVar[str]

    def __post_init__(self) -> None:
        check_damping(self.damping)

    @property
    def name(self) -> str:
        """See `Kernel`."""
        return f"{self.what}, damping {self.damping}"


def split_columns(phi: Features, widths: Sequence[int]) -> list[Features]:
    """Cuts features into blocks of columns.

    Args:
      phi: float [b, p].
      widths: columns of each block, p together.

    Returns:
      One [b, width] per block.
    """
    return jnp.split(phi, np.cumsum(widths)[:-1].tolist(), axis=1)


def check_damping(damping: Damping) -> Damping:
    """Returns the damping, or raises if it is none.

    Args:
      damping: what a user passed.

    Raises:
      ValueError: if it is a bare number, whose unit nobody knows.
    """
    if not isinstance(damping, Damping):
        raise ValueError(f"damping must be ja.absolute(x) or ja.relative(x), got {damping!r}.")
    return damping
