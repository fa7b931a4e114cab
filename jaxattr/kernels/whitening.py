"""TrackStar's kernel: whitening by a mixture of training and query autocorrelation, unit norm."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.features.featurizer import unit_norm
from jaxattr.features.plans import FeatureLayout
from jaxattr.kernels.base import Damping, Kernel, Surroundings, check_damping, split_columns
from jaxattr.typing import Features


class Autocorrelation(NamedTuple):
    """Sums over examples.

    Attributes:
      blocks: of phi^T phi, one [p, p] per group.
      examples: how many.
    """

    blocks: list[jax.Array]
    examples: jax.Array


def autocorrelation(
    damping: Damping,
    *,
    queries: Any = None,
    mixing: float | None = None,
    component: int | None = None,
) -> Kernel:
    r"""Whitens both sides and scales them to unit norm.

    .. math:: u(x) = R^{-1/2} \phi(x), \quad \tau = \frac{u(q)^\top u(n)}{\|u(q)\| \|u(n)\|}, \quad
              R = \mu R_\mathrm{queries} + (1 - \mu) R_\mathrm{train} + \lambda I

    with R block-diagonal by group and the norms over all groups, unweighted.

    Guarantees: exact up to rounding; scores of the unweighted method lie in [-1, 1].
    Cost: 2 n p^2 operations per group, and an eigendecomposition, p^3, on the host in float64.

    Args:
      damping: of R; relative to its mean eigenvalue, group by group.
      queries: examples whose common directions are to be downweighted; or None for the training
        set's alone.
      mixing: mu in [0, 1]. Default: that which makes the two sorted spectra meet at `component`:
        sigma_train / (sigma_train + sigma_queries).
      component: where they meet. Default: 1,000 of 65,536 features as in the paper, in proportion.

    Returns:
      The kernel.

    References:
      Chang et al. (2024), TrackStar, arXiv:2410.17413, section 3.
    """
    damping = check_damping(damping)
    if mixing is not None and not 0 <= mixing <= 1:
        raise ValueError(f"mixing must be between 0 and 1, got {mixing}.")
    if queries is None and mixing:
        raise ValueError(f"mixing={mixing} needs queries= to mix with, got None.")

    def sums(layout: FeatureLayout, n: int, phi: Features, kept: jax.Array) -> Autocorrelation:
        del n
        parts = split_columns(phi, layout.dims)
        blocks = [jnp.matmul(part.T, part, precision="highest") for part in parts]
        return Autocorrelation(blocks, kept.sum(dtype=phi.dtype))

    def finalize(statistics: Autocorrelation, surroundings: Surroundings) -> list[jax.Array]:
        dtype = statistics.examples.dtype
        matrices = _means(statistics)
        if queries is not None:
            theirs = _means(surroundings.sums_of(sums, queries, "autocorrelation of queries"))
            mu = _meeting_point(matrices, theirs, component) if mixing is None else mixing
            matrices = [mu * b + (1 - mu) * a for a, b in zip(matrices, theirs, strict=True)]
        return [jnp.asarray(_inverse_root(matrix, damping), dtype) for matrix in matrices]

    def whiten(operator: list[jax.Array], phi: Features) -> Features:
        parts = split_columns(phi, [len(block) for block in operator])
        return jnp.concatenate(
            [
                jnp.matmul(part, block, precision="highest")
                for block, part in zip(operator, parts, strict=True)
            ],
            axis=1,
        )

    def apply(operator: list[jax.Array], phi: Features) -> Features:
        return unit_norm(whiten(operator, phi))

    name = f"autocorrelation{' of queries too' if queries is not None else ''}, damping {damping}"
    return Kernel(name, sums, finalize, apply, of_queries=apply, whiten=whiten)


def _means(statistics: Autocorrelation) -> list[np.ndarray]:
    count = max(float(statistics.examples), 1.0)
    return [np.asarray(block, np.float64) / count for block in statistics.blocks]


def _meeting_point(
    train: list[np.ndarray], queries: list[np.ndarray], component: int | None
) -> float:
    """The share of the queries at which both spectra weigh the same at a component."""
    spectra = [
        np.sort(np.concatenate([np.linalg.eigvalsh(block) for block in blocks]))[::-1]
        for blocks in (train, queries)
    ]
    total = len(spectra[0])
    place = math.ceil(total * 1000 / 65536) if component is None else component
    ours, theirs = (max(spectrum[min(place, total - 1)], 0.0) for spectrum in spectra)
    return ours / (ours + theirs) if ours + theirs > 0 else 0.0


def _inverse_root(matrix: np.ndarray, damping: Damping) -> np.ndarray:
    eigenvalues, vectors = np.linalg.eigh(matrix)
    damped = np.maximum(eigenvalues, 0) + damping.of(np.trace(matrix) / len(matrix))
    if not matrix.any():
        return np.zeros_like(matrix)
    if damped[0] <= damped[-1] * np.finfo(np.float32).eps:
        raise ValueError(
            f"The autocorrelation of {len(matrix)} features with damping {damping} is singular. "
            "Use more damping, such as ja.relative(0.1)."
        )
    return (vectors / np.sqrt(damped)) @ vectors.T
