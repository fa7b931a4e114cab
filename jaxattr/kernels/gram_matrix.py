"""The inverse of the features' Gram matrix, dense or block-diagonal, primal or dual."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.features.plans import FeatureLayout
from jaxattr.kernels.base import Damped, Damping, Surroundings, check_damping, split_columns
from jaxattr.threads import one_thread, side_by_side
from jaxattr.typing import Features


class GramOperator(NamedTuple):
    r"""The inverse of one block, :math:`K = V \mathrm{diag}(s) V^T`, or K itself.

    Attributes:
      vectors: K [p, p]; or V [p, r].
      scales: None; or s [r].
    """

    vectors: jax.Array | np.ndarray
    scales: jax.Array | np.ndarray | None


class Spectrum(NamedTuple):
    """Eigenvectors of the Gram matrix of one block, where its eigenvalues are not zero.

    Attributes:
      vectors: V, orthonormal [p, r].
      eigenvalues: [r].
      dtype: of the operators.
    """

    vectors: np.ndarray
    eigenvalues: np.ndarray
    dtype: Any


# The share 1 - h that is left of an example which decides its own prediction.
_LEAST_SHARE = 1e-3


@dataclasses.dataclass(frozen=True)
class Gram(Damped):
    r"""Inverts the damped Gram matrix of the training features, as TRAK does.

    .. math:: K = (\Phi^\top \Phi + \lambda I)^{-1}

    Block-diagonal by group unless `dense`. A block with more features than there are training
    examples is inverted in its dual form, :math:`\Phi^\top (\Phi\Phi^\top + \lambda I)^{-1}`.

    Guarantees: exact up to rounding on the training features (the dual form is the inverse only on
    their span, which is where a kernel is used). Statistics carry no 1/n. A block in which every
    feature is zero maps to zero.
    Cost: 2 n p^2 operations and p^2 numbers per block (dual: 2 n^2 p, and n p numbers); p^3 on the
    host in float64, one block on each core.

    Attributes:
      damping: `absolute(x)` or `relative(x)`.
      dense: one block for all groups together. Groups then share curvature, and their
        contributions can cancel; see BUILD_NOTES.md for what that does to learned weights.
      leverage: divides K phi(n) by 1 - h, h = phi(n)^T K phi(n), so that leaving n out is exact in
        a linear model; 1 - h is taken to be at least 0.001. Only for dense kernels: the h of blocks
        may add up to more than one.

    Raises:
      ValueError: for leverage without `dense`; and, when the data were seen, if K is singular.

    References:
      Park et al. (2023), TRAK, arXiv:2303.14186, Eq. 12-13.
    """

    dense: bool = False
    leverage: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.leverage and not self.dense:
            raise ValueError(
                "leverage=True needs dense=True: it is that of one matrix for all groups."
            )

    @property
    def name(self) -> str:
        """See `Kernel`."""
        shape = "dense" if self.dense else "block-diagonal"
        return f"{shape} gram{' with leverage' if self.leverage else ''}, damping {self.damping}"

    def sums(
        self, layout: FeatureLayout, n: int, phi: Features, kept: jax.Array
    ) -> list[jax.Array]:
        """See `Kernel`: phi^T phi of each block."""
        # A block with more features than examples is inverted from its rows, when they are there.
        return [
            jnp.matmul(part.T, part, precision="highest") if part.shape[1] <= n else part[0, :0]
            for part in (phi[:, columns] for columns in self._columns(layout))
        ]

    def finalize(
        self, statistics: list[jax.Array], surroundings: Surroundings
    ) -> list[GramOperator]:
        """See `Kernel`."""

        def inverse(block: tuple[bool, np.ndarray]) -> GramOperator:
            primal, given = block
            invert = _primal if primal else _dual
            return invert(given, self.damping, surroundings.exponent)

        columns = self._columns(surroundings.layout)
        blocks = (
            (gram.ndim == 2, np.asarray(gram if gram.ndim == 2 else surroundings.rows(part)))
            for gram, part in zip(statistics, columns, strict=True)
        )
        # A single block has all threads for what does not wait for them at every column.
        found = map(inverse, blocks) if len(columns) == 1 else side_by_side(inverse, blocks)
        return [jax.tree.map(jnp.asarray, each) for each in found]

    def apply(self, operator: list[GramOperator], phi: Features) -> Features:
        """See `Kernel`."""
        parts = split_columns(phi, [block.vectors.shape[0] for block in operator])
        mapped = [_multiply(block, part) for block, part in zip(operator, parts, strict=True)]
        found = jnp.concatenate(mapped, axis=1)  # [b, p]
        if not self.leverage:
            return found
        own = jnp.sum(phi * found, axis=1, keepdims=True)
        return found / jnp.maximum(1 - own, _LEAST_SHARE)

    def spectrum(
        self, layout: FeatureLayout, rows: Callable[[slice], np.ndarray]
    ) -> list[Spectrum]:
        """Returns, on the host, what kernels that differ in their damping alone share.

        Args:
          layout: of the features.
          rows: as `Surroundings` has them.
        """
        return [_spectrum(rows(part)) for part in self._columns(layout)]

    def operator_at(
        self, spectrum: list[Spectrum], damping: Damping, exponent: int
    ) -> list[GramOperator]:
        """Returns the operator at a damping; the spectrum is of features over 2 to this power."""
        if check_damping(damping).value == 0:
            raise ValueError(
                "A damping path cannot hold zero: away from the training features the Gram matrix "
                "has no inverse. Start it at a small value, such as ja.relative(1e-3); got "
                f"{damping}."
            )
        found = [_operator_at(each, damping, exponent) for each in spectrum]
        return [jax.tree.map(jnp.asarray, each) for each in found]

    def _columns(self, layout: FeatureLayout) -> list[slice]:
        return [slice(0, layout.total)] if self.dense else list(layout.slices.values())


def _multiply(block: GramOperator, phi: Features) -> Features:
    product = jnp.matmul(phi, block.vectors, precision="highest")
    if block.scales is None:
        return product
    return jnp.matmul(product * block.scales[None], block.vectors.T, precision="highest")


def _primal(gram: np.ndarray, damping: Damping, exponent: int) -> GramOperator:
    """The operator, on the host, of a matrix that was summed."""
    dtype, matrix = gram.dtype, np.asarray(gram, np.float64)
    if not matrix.any():  # no training gradient reaches this block: K phi is zero, whatever K is
        return GramOperator(np.zeros(matrix.shape, dtype), None)
    added = damping.of(np.trace(matrix) / len(matrix), exponent)
    return GramOperator(_inverse(matrix, added, damping, dtype).astype(dtype), None)


def _dual(rows: np.ndarray, damping: Damping, exponent: int) -> GramOperator:
    """The operator, on the host, of features [n, p]."""
    if damping.value == 0 and rows.any():
        examples, width = rows.shape
        why = f"{examples} training examples cannot span {width} features"
        raise _singular(width, damping, why)
    return _operator_at(_spectrum(rows), damping, exponent)


def _inverse(matrix: np.ndarray, added: float, damping: Damping, dtype: Any) -> np.ndarray:
    from scipy import linalg  # slow to import, and needed here alone

    damped = matrix + added * np.eye(len(matrix))
    try:
        with one_thread():
            factor = linalg.cholesky(damped, lower=True)
    except np.linalg.LinAlgError as error:
        raise _singular(len(matrix), damping, "it is not positive definite") from error
    reciprocal_condition, _ = linalg.lapack.dpocon(
        factor, np.abs(damped).sum(axis=0).max(), uplo="L"
    )
    if reciprocal_condition < jnp.finfo(dtype).eps:
        why = f"its condition number is about {1 / max(reciprocal_condition, 1e-300):.0e}"
        raise _singular(len(matrix), damping, f"{why}, beyond what {dtype} statistics resolve")
    return linalg.cho_solve((factor, True), np.eye(len(matrix)))


def _spectrum(rows: np.ndarray) -> Spectrum:
    """Of the smaller of the two Gram matrices."""
    dtype, rows = rows.dtype, np.asarray(rows, np.float64)
    primal = rows.shape[1] <= rows.shape[0]
    gram = rows.T @ rows if primal else rows @ rows.T
    with one_thread():
        eigenvalues, vectors = np.linalg.eigh(gram)
    kept = eigenvalues > eigenvalues.max(initial=0) * max(rows.shape) * np.finfo(np.float64).eps
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    return Spectrum(
        vectors if primal else rows.T @ (vectors / np.sqrt(eigenvalues)), eigenvalues, dtype
    )


def _operator_at(spectrum: Spectrum, damping: Damping, exponent: int) -> GramOperator:
    vectors, eigenvalues, dtype = spectrum
    if not len(eigenvalues):
        return GramOperator(np.zeros((len(vectors), 1), dtype), np.zeros(1, dtype))
    scales = 1 / (eigenvalues + damping.of(eigenvalues.sum() / len(vectors), exponent))
    return GramOperator(vectors.astype(dtype), scales.astype(dtype))


def _singular(width: int, damping: Damping, why: str) -> ValueError:
    return ValueError(
        f"The Gram matrix of {width} features with damping {damping} is singular: {why}. Use more "
        "damping, such as ja.relative(0.1), or fewer features than training examples (a "
        "projection with a smaller dim)."
    )
