"""TrackStar's kernel: whitening by a mixture of training and query autocorrelation, unit norm."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.features.plans import FeatureLayout
from jaxattr.identity import Contents
from jaxattr.kernels.base import Damped, Damping, Sums, Surroundings, split_columns
from jaxattr.scales import unit_norm
from jaxattr.threads import side_by_side
from jaxattr.typing import Features


@dataclasses.dataclass(frozen=True)
class Whitening(Damped):
    r"""Whitens both sides and scales them to unit norm.

    .. math:: u(x) = R^{-1/2} \phi(x), \quad \tau = \frac{u(q)^\top u(n)}{\|u(q)\| \|u(n)\|}, \quad
              R = \mu R_\mathrm{queries} + (1 - \mu) R_\mathrm{train} + \lambda I

    with R block-diagonal by group and the norms over all groups, unweighted.

    Guarantees: exact up to rounding; scores of the unweighted method lie in [-1, 1].
    Cost: 2 n p^2 operations per group, and an eigendecomposition, p^3, on the host in float64.

    Attributes:
      damping: of R; relative to its mean eigenvalue, group by group.
      queries: examples whose common directions are to be downweighted; or None for the training
        set's alone.
      mixing: mu in [0, 1]. Default: that which makes the two sorted spectra meet:
        sigma_train / (sigma_train + sigma_queries) at component 1,000 of 65,536, as in the paper,
        or in proportion.

    References:
      Chang et al. (2024), TrackStar, arXiv:2410.17413, section 3.
    """

    queries: Contents | None = None
    mixing: float | None = None
    degree: ClassVar[int | None] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixing is not None and not 0 <= self.mixing <= 1:
            raise ValueError(f"mixing must be between 0 and 1, got {self.mixing}.")
        if self.queries is None and self.mixing:
            raise ValueError(f"mixing={self.mixing} needs queries= to mix with, got None.")

    @property
    def name(self) -> str:
        """See `Kernel`."""
        of_queries = "" if self.queries is None else " of queries too"
        return f"autocorrelation{of_queries}, damping {self.damping}"

    def sums(self, layout: FeatureLayout, n: int, phi: Features, kept: jax.Array) -> Sums:
        """See `Kernel`."""
        parts = split_columns(phi, layout.dims)
        blocks = [jnp.matmul(part.T, part, precision="highest") for part in parts]
        return Sums(blocks, kept.sum(dtype=phi.dtype))

    def finalize(self, statistics: Sums, surroundings: Surroundings) -> list[jax.Array]:
        """See `Kernel`: the inverse root of R, group by group."""
        dtype = statistics.examples.dtype
        matrices = statistics.means()
        if self.queries is not None:
            given, described = self.queries.value, "autocorrelation of queries"
            mu, others = self.mixing, surroundings.sums_of(self.sums, given, described).means()
            mu = _meeting_point(matrices, others) if mu is None else mu
            matrices = [mu * b + (1 - mu) * a for a, b in zip(matrices, others, strict=True)]

        def root(matrix: np.ndarray) -> np.ndarray:
            return _inverse_root(self.damping, surroundings.exponent, matrix).astype(dtype)

        return [jnp.asarray(each) for each in side_by_side(root, matrices)]

    def whiten(self, operator: list[jax.Array], phi: Features) -> Features:
        """See `MapsQueries`."""
        pairs = zip(split_columns(phi, [len(block) for block in operator]), operator, strict=True)
        whitened = [jnp.matmul(part, block, precision="highest") for part, block in pairs]
        return jnp.concatenate(whitened, axis=1)

    def apply(self, operator: list[jax.Array], phi: Features) -> Features:
        """See `Kernel`."""
        return unit_norm(self.whiten(operator, phi))

    def of_queries(self, operator: list[jax.Array], phi: Features) -> Features:
        """See `MapsQueries`: as training examples."""
        return self.apply(operator, phi)


def _meeting_point(train: list[np.ndarray], queries: list[np.ndarray]) -> float:
    """The share of the queries at which both spectra weigh the same at a component."""
    spectra = [
        np.sort(np.concatenate(side_by_side(np.linalg.eigvalsh, blocks)))[::-1]
        for blocks in (train, queries)
    ]
    total = len(spectra[0])
    place = math.ceil(total * 1000 / 65536)
    ours, theirs = (max(spectrum[min(place, total - 1)], 0.0) for spectrum in spectra)
    return ours / (ours + theirs) if ours + theirs > 0 else 0.0


def _inverse_root(damping: Damping, exponent: int, matrix: np.ndarray) -> np.ndarray:
    if not matrix.any():
        return np.zeros_like(matrix)
    eigenvalues, vectors = np.linalg.eigh(matrix)
    damped = np.maximum(eigenvalues, 0) + damping.of(np.trace(matrix) / len(matrix), exponent)
    if damped[0] <= damped[-1] * np.finfo(np.float32).eps:
        raise ValueError(
            f"The autocorrelation of {len(matrix)} features with damping {damping} is singular. "
            "Use more damping, such as ja.relative(0.1)."
        )
    return (vectors / np.sqrt(damped)) @ vectors.T
