"""DataInf's kernel: the mean of the inverses of single-example Fisher matrices."""

import dataclasses
from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from jaxattr.features.plans import FeatureLayout
from jaxattr.kernels.base import Damped, Surroundings, check_damping, split_columns
from jaxattr.typing import Features

Block: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""Of a group: features [n, p], 1 / (count (lambda + |phi_n|^2)) [n], and lambda."""


@dataclasses.dataclass(frozen=True)
class DataInf(Damped):
    r"""Averages, instead of inverting the average.

    .. math:: K = \frac1N \sum_n (\phi_n \phi_n^\top + \lambda I)^{-1}
                = \frac1\lambda \Big(I - \frac1N \sum_n
                  \frac{\phi_n \phi_n^\top}{\lambda + \|\phi_n\|^2}\Big)

    block-diagonal by group.

    Guarantees: that formula exactly; as an approximation of the inverse Fisher matrix it is a
    heuristic whose error grows with the number of features.
    Cost: a copy of the training features in memory, on every device; 4 n^2 p operations.

    Attributes:
      damping: of each example's matrix; relative to the mean eigenvalue of the Fisher matrix,
        group by group.

    References:
      Kwon et al. (2024), DataInf, arXiv:2310.00902, Eq. 5.
    """

    what: ClassVar[str] = "DataInf"

    def __post_init__(self) -> None:
        if check_damping(self.damping).value == 0:
            raise ValueError("DataInf divides by its damping, which must be above 0, got 0.")

    def sums(self, layout: FeatureLayout, n: int, phi: Features, kept: jax.Array) -> jax.Array:
        """See `Kernel`: how many examples count."""
        return kept.sum(dtype=phi.dtype)

    def finalize(self, statistics: jax.Array, surroundings: Surroundings) -> list[Block]:
        """See `Kernel`."""
        blocks, examples = [], statistics
        for columns in surroundings.layout.slices.values():
            rows = jnp.asarray(surroundings.rows(columns), examples.dtype)
            squares = jnp.sum(rows**2, axis=1)  # [n]
            mean = jnp.sum(squares) / examples / max(columns.stop - columns.start, 1)
            value = jnp.asarray(self.damping.of(float(mean), surroundings.exponent), squares.dtype)
            # A group in which every gradient is zero maps to zero whatever it is divided by.
            added = jnp.where(value > 0, value, 1)
            blocks.append((rows, 1 / (examples * (added + squares)), added))
        return blocks

    def apply(self, operator: list[Block], phi: Features) -> Features:
        """See `Kernel`."""
        columns = split_columns(phi, [rows.shape[1] for rows, *_ in operator])
        mapped = [_map(part, *block) for part, block in zip(columns, operator, strict=True)]
        return jnp.concatenate(mapped, axis=1)  # [b, p]


def _map(x: jax.Array, rows: jax.Array, weights: jax.Array, damping: jax.Array) -> jax.Array:
    along = jnp.matmul(x, rows.T, precision="highest") * weights[None]  # [b, n]
    return (x - jnp.matmul(along, rows, precision="highest")) / damping
