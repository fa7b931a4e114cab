"""A diagonal kernel: each feature divided by its damped mean square, or by a known eigenvalue."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.features.bases import UNKNOWN
from jaxattr.features.plans import FeatureLayout
from jaxattr.kernels.base import Damped, Damping, Sums, Surroundings
from jaxattr.typing import Features


@dataclasses.dataclass(frozen=True)
class SecondMoment(Damped):
    r"""Divides by the damped second moments of the features.

    .. math:: K = \mathrm{diag}(\Lambda + \lambda)^{-1}, \qquad
              \Lambda_i = \tfrac1N \sum_n \phi_i(n)^2

    In the eigenbasis of K-FAC this is EK-FAC; on plain gradients, the diagonal Fisher. Where the
    basis knows eigenvalues of its own (K-FAC, sampled labels), those take the place of the means.

    Guarantees: exact. A feature that is zero for all training examples maps to zero.
    Cost: one multiplication per feature.

    Attributes:
      damping: `absolute(x)`, or `relative(x)` times the mean of Lambda over the linear map (or the
        leftover parameters of the group) that the feature belongs to.

    References:
      George et al. (2018), arXiv:1806.03884; Grosse et al. (2023), arXiv:2308.03296, section 2.4.
    """

    what: ClassVar[str] = "second moment"

    def sums(self, layout: FeatureLayout, n: int, phi: Features, kept: jax.Array) -> Sums:
        """See `Kernel`."""
        return squares(phi, kept)

    def finalize(self, statistics: Sums, surroundings: Surroundings) -> jax.Array:
        """See `Kernel`: what each feature is multiplied with, [p]."""
        means = statistics.means()
        curvature = eigenvalues(means, surroundings.curvature)
        layout = surroundings.layout
        added = added_to(curvature, layout, self.damping, surroundings.exponent)
        if not np.all(added[means > 0] > 0):
            blocks = layout.column_blocks
            largest = np.zeros(blocks.max(initial=0) + 1)
            np.maximum.at(largest, blocks, curvature)
            _check(curvature, means, largest[blocks], statistics.total.dtype)
        denominator = curvature + added
        safe = np.where(denominator > 0, denominator, 1)
        return jnp.asarray(np.where(denominator > 0, 1 / safe, 0), statistics.total.dtype)

    def apply(self, operator: jax.Array, phi: Features) -> Features:
        """See `Kernel`."""
        return phi * operator[None]


def eigenvalues(means: np.ndarray, known: np.ndarray | None) -> np.ndarray:
    """Mean squares of features, or what is known in their place, float64 [p].

    Args:
      means: [p].
      known: [p], `UNKNOWN` where it is not; or None.
    """
    if known is None:
        return means
    return np.where(known == UNKNOWN, means, np.asarray(known, np.float64))


def added_to(
    curvature: np.ndarray, layout: FeatureLayout, damping: Damping, exponent: int = 0
) -> np.ndarray:
    """What damping adds to each eigenvalue, float64 [p].

    Args:
      curvature: the eigenvalues, [p].
      layout: which of them belong to one linear map.
      damping: relative to the mean over those.
      exponent: eigenvalues are of features over 2 to this power.
    """
    blocks = layout.column_blocks
    sizes = np.maximum(np.bincount(blocks), 1)  # a block of no column is never looked up
    means = np.bincount(blocks, curvature) / sizes
    return np.array([damping.of(mean, exponent) for mean in means])[blocks]


def squares(phi: Features, kept: jax.Array) -> Sums:
    """Sums squares over examples.

    Args:
      phi: float [b, p].
      kept: which rows count, bool [b]; the others are zero.

    Returns:
      Their total is float [p].
    """
    # A product with ones: a sum over rows takes XLA three times as long on a CPU.
    total = jnp.matmul(jnp.ones(phi.shape[0], phi.dtype), phi**2, precision="highest")
    return Sums(total, kept.sum(dtype=phi.dtype))


def _check(curvature: np.ndarray, means: np.ndarray, largest: np.ndarray, dtype: Any) -> None:
    """Raises where, without damping, a feature is divided by an eigenvalue that is only noise."""
    unsafe = (means > 0) & (curvature <= largest * float(jnp.finfo(dtype).eps))
    if unsafe.any():
        raise ValueError(
            f"The kernel without damping is singular: {unsafe.sum()} of {len(unsafe)} features "
            f"have an eigenvalue that {dtype} does not tell from zero. Use damping, such as "
            "ja.relative(0.1)."
        )
