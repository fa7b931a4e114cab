"""The inverse of the features' Gram matrix, dense or block-diagonal, primal or dual."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from jaxattr.kernels.base import Damping, Kernel, Surroundings, check_damping, split_columns
from jaxattr.plans import FeatureLayout
from jaxattr.typing import Features


class GramBlock(NamedTuple):
    """Statistics of one block of features.

    Attributes:
      gram: primal, sum of phi^T phi [p, p]; or None.
      rows: dual, the features themselves [n, p], when there are fewer examples than features.
    """

    gram: jax.Array | None
    rows: jax.Array | None


class GramOperator(NamedTuple):
    r"""The inverse of one block, :math:`K = V \mathrm{diag}(s) V^T`, or K itself.

    Attributes:
      vectors: K [p, p]; or V [p, r].
      scales: None; or s [r].
    """

    vectors: jax.Array
    scales: jax.Array | None


def gram(damping: Damping, *, dense: bool = False) -> Kernel:
    r"""Inverts the damped Gram matrix of the training features, as TRAK does.

    .. math:: K = (\Phi^\top \Phi + \lambda I)^{-1}

    Block-diagonal by group unless `dense`. A block with more features than there are training
    examples is inverted in its dual form, :math:`\Phi^\top (\Phi\Phi^\top + \lambda I)^{-1}`.

    Guarantees: exact up to rounding on the training features (the dual form is the inverse only on
    their span, which is where a kernel is used). Statistics carry no 1/n. A block in which every
    feature is zero maps to zero.
    Cost: 2 n p^2 operations and p^2 numbers per block (dual: 2 n^2 p, and n p numbers); p^3 on the
    host in float64.

    Args:
      damping: `absolute(x)` or `relative(x)`.
      dense: one block for all groups together. Groups then share curvature, and their
        contributions can cancel; see BUILD_NOTES.md for what that does to learned weights.

    Returns:
      The kernel.

    References:
      Park et al. (2023), TRAK, arXiv:2303.14186, Eq. 12-13.
    """
    damping = check_damping(damping)

    def blocks(layout: FeatureLayout) -> tuple[int, ...]:
        return (layout.total,) if dense else layout.dims

    def init(layout: FeatureLayout, n: int, dtype: Any) -> list[GramBlock]:
        return [_empty_block(p, n, dtype) for p in blocks(layout)]

    def update(
        statistics: list[GramBlock], phi: Features, row: jax.Array, kept: jax.Array
    ) -> list[GramBlock]:
        del kept
        parts = split_columns(phi, [_width(block) for block in statistics])
        return [_add(block, part, row) for block, part in zip(statistics, parts, strict=True)]

    def finalize(statistics: list[GramBlock], surroundings: Surroundings) -> list[GramOperator]:
        del surroundings
        return [_invert(block, damping) for block in statistics]

    def apply(operator: list[GramOperator], phi: Features) -> Features:
        parts = split_columns(phi, [block.vectors.shape[0] for block in operator])
        mapped = [_multiply(block, part) for block, part in zip(operator, parts, strict=True)]
        return jnp.concatenate(mapped, axis=1)  # [b, p]

    shape = "dense" if dense else "block-diagonal"
    return Kernel(f"{shape} gram, damping {damping}", init, update, finalize, apply)


def _empty_block(p: int, n: int, dtype: Any) -> GramBlock:
    if p > n:
        return GramBlock(None, jnp.zeros((n, p), dtype))
    return GramBlock(jnp.zeros((p, p), dtype), None)


def _width(block: GramBlock) -> int:
    statistic = block.gram if block.gram is not None else block.rows
    assert statistic is not None
    return statistic.shape[1]


def _add(block: GramBlock, phi: Features, row: jax.Array) -> GramBlock:
    if block.gram is not None:
        return block._replace(gram=block.gram + jnp.matmul(phi.T, phi, precision="highest"))
    assert block.rows is not None
    # Rows past the end (a padded last batch) are dropped by the scatter.
    rows = block.rows.at[row + jnp.arange(phi.shape[0])].set(phi, mode="drop")
    return block._replace(rows=rows)


def _multiply(block: GramOperator, phi: Features) -> Features:
    product = jnp.matmul(phi, block.vectors, precision="highest")
    if block.scales is None:
        return product
    return jnp.matmul(product * block.scales[None], block.vectors.T, precision="highest")


def _invert(block: GramBlock, damping: Damping) -> GramOperator:
    dual = block.gram is None
    statistic = block.rows if dual else block.gram
    assert statistic is not None
    dtype = statistic.dtype
    matrix = np.asarray(statistic, np.float64)
    matrix = matrix @ matrix.T if dual else matrix
    width = _width(block)
    added = damping.of(np.trace(matrix) / width)
    if not matrix.any():  # no training gradient reaches this block: K phi is zero, whatever K is
        return GramOperator(jnp.zeros((width, width if not dual else 1), dtype), _zero_scale(dual))
    if dual:
        return _dual_operator(np.asarray(statistic, np.float64), matrix, added, damping, dtype)
    return GramOperator(jnp.asarray(_inverse(matrix, added, damping, dtype), dtype), None)


def _zero_scale(dual: bool) -> jax.Array | None:
    return jnp.zeros(1) if dual else None


def _inverse(matrix: np.ndarray, added: float, damping: Damping, dtype: Any) -> np.ndarray:
    damped = matrix + added * np.eye(len(matrix))
    try:
        factor = scipy.linalg.cholesky(damped, lower=True)
    except np.linalg.LinAlgError as error:
        raise _singular(len(matrix), damping, "it is not positive definite") from error
    reciprocal_condition, _ = scipy.linalg.lapack.dpocon(
        factor, np.abs(damped).sum(axis=0).max(), uplo="L"
    )
    if reciprocal_condition < jnp.finfo(dtype).eps:
        why = f"its condition number is about {1 / max(reciprocal_condition, 1e-300):.0e}"
        raise _singular(len(matrix), damping, f"{why}, beyond what {dtype} statistics resolve")
    return scipy.linalg.cho_solve((factor, True), np.eye(len(matrix)))


def _dual_operator(
    rows: np.ndarray, outer: np.ndarray, added: float, damping: Damping, dtype: Any
) -> GramOperator:
    if added <= 0:
        why = f"{len(rows)} training examples cannot span {rows.shape[1]} features"
        raise _singular(rows.shape[1], damping, why)
    eigenvalues, vectors = np.linalg.eigh(outer)
    kept = eigenvalues > eigenvalues[-1] * max(rows.shape) * np.finfo(np.float64).eps
    basis = rows.T @ (vectors[:, kept] / np.sqrt(eigenvalues[kept]))  # [p, r], orthonormal
    scales = 1 / (eigenvalues[kept] + added)
    return GramOperator(jnp.asarray(basis, dtype), jnp.asarray(scales, dtype))


def _singular(width: int, damping: Damping, why: str) -> ValueError:
    return ValueError(
        f"The Gram matrix of {width} features with damping {damping} is singular: {why}. Use more "
        "damping, such as ja.relative(0.1), or fewer features than training examples (a "
        "projection with a smaller dim)."
    )
