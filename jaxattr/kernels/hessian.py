"""The inverse of the loss's own Hessian: by factorisation for small models, else by iteration."""

import dataclasses
import functools
import warnings
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.counts import real_number, whole_number
from jaxattr.kernels import conjugate_gradients
from jaxattr.kernels.base import Damped, Damping, Surroundings, WithoutSums, check_damping
from jaxattr.scales import exponent_of, scaled
from jaxattr.threads import one_thread
from jaxattr.typing import Features

# Columns of the Hessian that are computed at once.
_COLUMNS = 128


@dataclasses.dataclass(frozen=True)
class InverseHessian(WithoutSums, Damped):
    r"""Inverts the damped Hessian of the mean training loss.

    .. math:: K = \Big(\tfrac1N \sum_n \nabla^2 \ell(n) + \lambda I\Big)^{-1}

    in the coordinates of the features: all groups together, so that they share curvature.

    Guarantees: exact up to rounding. Away from a minimum the Hessian may have negative eigenvalues;
    the inverse is then taken as it stands, signs included, unless `positive_only`.
    Cost: p Hessian products with the training set, p^2 numbers and p^3 operations on the host in
    float64, by one thread: for some thousands of parameters.

    Attributes:
      damping: added to each eigenvalue.
      positive_only: maps directions whose damped eigenvalue is not positive to zero.

    Raises:
      ValueError: at the end of the pass, if the damped Hessian is singular.

    Warns:
      UserWarning: if it has negative eigenvalues.

    References:
      Koh and Liang (2017), arXiv:1703.04730, Eq. 2.
    """

    what: ClassVar[str] = "inverse Hessian"
    positive_only: bool = False

    def finalize(self, statistics: Any, surroundings: Surroundings) -> jax.Array:
        """See `Kernel`."""
        products, operands = surroundings.hessian()
        total = surroundings.layout.total
        rows, dtype = [], None
        for start in range(0, total, _COLUMNS):
            # The last block is moved back to be full, so that one program serves all.
            first = max(0, min(start, total - _COLUMNS))
            unit_rows = np.eye(min(_COLUMNS, total), total, first)
            block = products(operands, jnp.asarray(unit_rows, jnp.result_type(float)))
            rows.append(np.asarray(block, np.float64)[start - first :])
            dtype = block.dtype
        matrix = np.concatenate(rows)
        inverse = _inverse((matrix + matrix.T) / 2, self.damping, dtype, self.positive_only)
        return jnp.asarray(inverse, dtype)

    def apply(self, operator: jax.Array, phi: Features) -> Features:
        """See `Kernel`."""
        return jnp.matmul(phi, operator.astype(phi.dtype), precision="highest")


class Solver(NamedTuple):
    """What conjugate gradients need.

    Attributes:
      products: a pytree that is a function, vectors [k, p] -> Hessian products [k, p].
      damping: lambda.
    """

    products: Any
    damping: jax.Array


@dataclasses.dataclass(frozen=True)
class ConjugateGradient(WithoutSums, Damped):
    """Solves with the damped Hessian of the mean training loss, by conjugate gradients.

    Guarantees: where it converged, a relative residual of at most `tolerance`. A solve stops early,
    at the best point so far, where it meets negative curvature. `build_index` measures the residual
    of every solve anew and names those that did not converge.
    Cost: one Hessian product with the training set per iteration and training example.

    Attributes:
      damping: `absolute(x)`; the mean eigenvalue is not known.
      tolerance: relative residual at which a solve ends.
      iterations: at most so many.

    References:
      Martens (2010); Koh and Liang (2017), arXiv:1703.04730, section 3.
    """

    what: ClassVar[str] = "conjugate gradients with the Hessian"
    tolerance: float
    iterations: int

    def __post_init__(self) -> None:
        if check_damping(self.damping).relative:
            raise ValueError(
                "Conjugate gradients do not know the mean eigenvalue: give the damping as "
                f"ja.absolute(x), got {self.damping}."
            )
        whole_number("iterations", self.iterations)
        if not real_number("tolerance", self.tolerance) > 0:
            raise ValueError(f"tolerance must be above 0, got {self.tolerance}.")

    @property
    def largest_residual(self) -> float:
        """See `Iterates`: measured anew, it may be a little above what the solve saw."""
        return 2 * self.tolerance

    def finalize(self, statistics: Any, surroundings: Surroundings) -> Solver:
        """See `Kernel`."""
        products, operands = surroundings.hessian()
        return Solver(jax.tree_util.Partial(products, operands), jnp.asarray(self.damping.value))

    def apply(self, operator: Solver, phi: Features) -> Features:
        """See `Kernel`."""
        exponents = exponent_of(phi, axis=1)[:, None]  # squares of small gradients are zero
        found = conjugate_gradients.solve(
            functools.partial(_multiply, operator),
            scaled(phi, -exponents),
            tolerance=self.tolerance,
            iterations=self.iterations,
        )
        return scaled(found, exponents)

    def residual(self, operator: Solver, phi: Features, mapped: Features) -> jax.Array:
        """See `Iterates`."""
        exponents = exponent_of(phi, axis=1)[:, None]
        phi, mapped = scaled(phi, -exponents), scaled(mapped, -exponents)
        error = jnp.linalg.norm(phi - _multiply(operator, mapped), axis=1)
        size = jnp.linalg.norm(phi, axis=1)
        return error / jnp.where(size == 0, 1, size)


def _multiply(operator: Solver, x: jax.Array) -> jax.Array:
    return operator.products(x) + operator.damping.astype(x.dtype) * x


def _inverse(matrix: np.ndarray, damping: Damping, dtype: Any, positive_only: bool) -> np.ndarray:
    if not np.isfinite(matrix).all():
        raise ValueError(
            "The Hessian is not finite: at some training example the loss has a gradient and no "
            "second derivative. Use a smooth loss, or a method that takes none, such as ja.ekfac."
        )
    with one_thread():
        eigenvalues, vectors = np.linalg.eigh(matrix)
    damped = eigenvalues + damping.of(np.trace(matrix) / len(matrix))
    size = np.abs(damped)
    if positive_only:
        kept = damped > size.max() * float(jnp.finfo(dtype).eps)
        return (vectors[:, kept] / damped[kept]) @ vectors[:, kept].T
    if size.min() <= size.max() * float(jnp.finfo(dtype).eps):
        raise ValueError(
            f"The Hessian of {len(matrix)} parameters with damping {damping} is singular: its "
            f"eigenvalues lie between {damped.min():.1e} and {damped.max():.1e}, the smallest in "
            f"size being {size.min():.1e}. Use more damping, such as ja.absolute(0.01)."
        )
    if negative := int((damped < 0).sum()):
        warnings.warn(
            f"{negative} of {len(damped)} eigenvalues of the damped Hessian are negative, down to "
            f"{damped.min():.1e}: along these, scores have the other sign. Use more damping, "
            "positive_only=True, or curvature='fisher', which has none.",
            UserWarning,
            stacklevel=2,
        )
    return (vectors / damped) @ vectors.T
