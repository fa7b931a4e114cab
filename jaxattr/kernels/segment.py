"""A kernel of a stretch of training: gradient descent with its curvature, for its time."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.features.plans import FeatureLayout
from jaxattr.kernels.base import Sums, Surroundings
from jaxattr.kernels.diagonal import eigenvalues, squares
from jaxattr.typing import Features


@dataclasses.dataclass(frozen=True)
class Segment:
    r"""Gradient descent on a quadratic, for a time.

    .. math:: K = \mathrm{diag}\frac{1 - e^{-t\Lambda}}{\Lambda}, \qquad
              \Lambda_i = \tfrac1N \sum_n \phi_i(n)^2

    that is t where the curvature is zero, and the inverse where it is large. Where the basis knows
    eigenvalues of its own (sampled labels), those take the place of the means.

    Guarantees: exact; nothing is divided by zero, so there is no damping.
    Cost: one multiplication per feature.

    Attributes:
      time: learning rate times number of steps.

    References:
      Bae et al. (2024), arXiv:2405.12186, section 3.
    """

    time: float
    degree: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not 0 < self.time < math.inf:
            raise ValueError(f"A segment's time must be finite and above 0, got {self.time}.")

    @property
    def name(self) -> str:
        """See `Kernel`."""
        return f"segment of training, time {self.time:g}"

    def sums(self, layout: FeatureLayout, n: int, phi: Features, kept: jax.Array) -> Sums:
        """See `Kernel`."""
        return squares(phi, kept)

    def finalize(self, statistics: Sums, surroundings: Surroundings) -> list[jax.Array]:
        """See `Kernel`: the curvature of each feature, [p]; in a list, as operators come back."""
        curvature = eigenvalues(statistics.means(), surroundings.curvature)
        return [jnp.asarray(np.maximum(curvature, 0), statistics.total.dtype)]

    def apply(self, operator: list[jax.Array], phi: Features) -> Features:
        """See `Kernel`."""
        x = self.time * operator[0]
        share = jnp.where(x > 0, -jnp.expm1(-x) / jnp.where(x > 0, x, 1), 1)
        return phi * (self.time * share)[None]

    def decayed(self, operator: list[jax.Array], phi: Features) -> Features:
        """What training through the segment adds to a direction: (exp(-t Lambda) - 1) phi."""
        return phi * jnp.expm1(-self.time * operator[0])[None]
