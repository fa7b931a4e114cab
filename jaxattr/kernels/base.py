"""What a kernel is, and the unit of its damping."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.features.plans import FeatureLayout
from jaxattr.typing import Features


class Damping(NamedTuple):
    """A multiple of the identity added to a matrix before it is inverted.

    Attributes:
      value: how much, >= 0.
      relative: whether `value` is in units of the mean eigenvalue of the block that it is added to.
    """

    value: float
    relative: bool

    def of(self, mean_eigenvalue: float) -> float:
        """Returns what is added to each eigenvalue."""
        return self.value * mean_eigenvalue if self.relative else self.value

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
    return Damping(_checked(value), relative=False)


def relative(value: float) -> Damping:
    """Damping in units of the mean eigenvalue, of each block by itself.

    Args:
      value: times the mean eigenvalue, >= 0.

    Returns:
      The damping.

    Raises:
      ValueError: if the value is negative or not finite.
    """
    return Damping(_checked(value), relative=True)


class Surroundings(NamedTuple):
    """What a kernel may ask for when its statistics are complete, of one checkpoint.

    Attributes:
      layout: the columns of the features.
      rows: columns -> those of the features of all training examples [n, width], on the host; rows
        of zeros for examples that do not count.
      curvature: eigenvalue of each feature [p] as the basis of the features knows it, NaN where it
        does not; or None.
      sums_of: (sums, data, description) -> the sums over the features of other examples, for
        `sums` as in `Kernel`.
      hessian: () -> (products, operands): `products(operands, vectors [k, p])` are the products
        [k, p] with the Hessian of the mean training loss, in the coordinates of the features.
    """

    layout: FeatureLayout
    rows: Callable[[slice], np.ndarray]
    curvature: np.ndarray | None
    sums_of: Callable[[Callable, Any, str], Any]
    hessian: Callable[[], tuple[Callable[[Any, jax.Array], jax.Array], Any]]


class DampingFamily(NamedTuple):
    """Kernels that differ in their damping alone, and share one eigendecomposition.

    Attributes:
      spectrum: (feature layout, rows as in `Surroundings`) -> what all of them need, on the host;
        the costly part.
      operator: (spectrum, damping) -> the operator of one.
      kernel: (damping) -> the kernel.
    """

    spectrum: Callable[[FeatureLayout, Callable[[slice], np.ndarray]], Any]
    operator: Callable[[Any, Damping], Any]
    kernel: Callable[[Damping], "Kernel"]


class Kernel(NamedTuple):
    """Pure functions that sum statistics and apply the kernel.

    Attributes:
      name: what `describe` shows.
      sums: (feature layout, number of training examples, features [b, p], kept bool [b]) ->
        statistics of a batch, a pytree of arrays; those of several batches, or of parts of one on
        several devices, are added. Rows that must not count are zero. Jittable.
      finalize: (statistics of all, surroundings) -> operator, a pytree of arrays. On the host.
      apply: (operator, features [b, p]) -> K phi, [b, p]. Jittable.
      of_queries: (operator, features [q, p]) -> features of queries, where the method transforms
        them too; None where it leaves them as they are. Jittable, and diagonal by group.
      whiten: the linear part of `of_queries`, where that scales its result to unit norm; else None.
      residual: (operator, phi [b, p], K phi [b, p]) -> relative error of each solve [b], for
        kernels that solve by iteration; else None. Jittable.
      tolerance: largest residual that counts as solved.
      identity: whether K is the identity, so that one pass over the data is enough.
      family: the same kernel with other damping; None where that has no short cut.
    """

    name: str
    sums: Callable[[FeatureLayout, int, Features, jax.Array], Any]
    finalize: Callable[[Any, Surroundings], Any]
    apply: Callable[[Any, Features], Features]
    of_queries: Callable[[Any, Features], Features] | None = None
    whiten: Callable[[Any, Features], Features] | None = None
    residual: Callable[[Any, Features, Features], jax.Array] | None = None
    tolerance: float = 0.0
    identity: bool = False
    family: DampingFamily | None = None


def identity() -> Kernel:
    """K = I: plain inner products, as in TracIn.

    Returns:
      The kernel.
    """
    return Kernel(
        name="identity",
        sums=no_sums,
        finalize=lambda statistics, surroundings: (),
        apply=lambda operator, phi: phi,
        identity=True,
    )


def no_sums(layout: FeatureLayout, n: int, phi: Features, kept: jax.Array) -> tuple[()]:
    """The statistics of kernels that need none.

    Args:
      layout: as in `Kernel.sums`.
      n: as there.
      phi: as there.
      kept: as there.

    Returns:
      Nothing.
    """
    del layout, n, phi, kept
    return ()


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


def _checked(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"Damping must be finite and at least 0, got {value}.")
    return float(value)
