"""Influence functions by the loss's own Hessian, by the Fisher matrix, or by averaged inverses.

As in `methods`, each is a composition of an output function, a projection and a kernel.
"""

from typing import Literal

from jaxattr import kernels
from jaxattr.features import projections
from jaxattr.features.featurizer import FeatureRule
from jaxattr.features.projections import Projection
from jaxattr.kernels import Damping, Kernel
from jaxattr.methods.method import Method
from jaxattr.typing import OutputFn


def influence(
    loss: OutputFn,
    *,
    damping: Damping,
    curvature: Literal["hessian", "fisher"] = "hessian",
    solver: Literal["exact", "cg"] = "exact",
    tolerance: float = 1e-4,
    iterations: int = 100,
    positive_only: bool = False,
    projection: Projection | None = None,
) -> Method:
    r"""Influence functions with the Hessian of the mean training loss, or its empirical Fisher.

    .. math:: \tau = \nabla\ell(q)^\top (H + \lambda I)^{-1} \nabla\ell(n)

    Positive where up-weighting n lowers the query's loss; no 1/n with the Hessian. The Fisher
    matrix is a sum over training examples, as LoGRA's and TRAK's: scores are those of its mean,
    over n. It is between all layers, where EK-FAC's is of each by itself. For large models,
    `ja.astra` solves with the Hessian or Gauss-Newton matrix.

    Guarantees: exact up to rounding, or up to `tolerance`.
    Cost: of the Hessian, exact, p products with it and p^3, for some thousands of parameters; by
    conjugate gradients, a product with the training set per iteration and training example, since
    the kernel acts on the training side. Of the Fisher matrix, n p numbers and 2 n^2 p operations
    where there are fewer examples than parameters, else p^2 and 2 n p^2.

    Args:
      loss: (params, example, key) -> scalar, summed over the example's tokens or pixels.
      damping: added to the eigenvalues of H, which may be negative; `absolute(x)` for "cg".
      curvature: "hessian", or "fisher", of the data's own labels, whose eigenvalues are not.
      solver: "exact", or "cg", whose convergence is in `index.solve_errors`.
      tolerance: relative residual at which conjugate gradients end.
      iterations: at most so many.
      positive_only: maps directions whose damped eigenvalue is not positive to zero; "exact" only.
      projection: influence within a random subspace, for larger models. Default: none.

    Returns:
      The method.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxattr import absolute, build_index, score
      >>> def loss(params, example, key):
      ...     return 0.5 * jnp.sum((example["x"] @ params["w"] - example["y"]) ** 2)
      >>> data = {"x": jnp.eye(3), "y": jnp.ones((3, 1))}
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> method = influence(loss, damping=absolute(2 / 3))
      >>> [round(x, 3) + 0.0 for x in score(build_index(method, params, data), data)[0].tolist()]
      [1.0, 0.0, 0.0]

    References:
      Koh and Liang (2017), arXiv:1703.04730, Eq. 2.
    """
    if solver not in ("exact", "cg"):
        raise ValueError(f"solver must be 'exact' or 'cg', got {solver!r}.")
    if curvature not in ("hessian", "fisher"):
        raise ValueError(f"curvature must be 'hessian' or 'fisher', got {curvature!r}.")
    if curvature == "fisher" and (solver, positive_only) != ("exact", False):
        raise ValueError(
            "The Fisher matrix is inverted exactly and has no negative eigenvalue: leave out "
            "solver= and positive_only=."
        )
    if positive_only and solver == "cg":
        raise ValueError("positive_only needs eigenvectors: use solver='exact'.")
    kernel: Kernel
    if curvature == "fisher":
        kernel = kernels.Gram(damping, dense=True)
    elif solver == "exact":
        kernel = kernels.InverseHessian(damping, positive_only=positive_only)
    else:
        kernel = kernels.ConjugateGradient(damping, tolerance=tolerance, iterations=iterations)
    rule = FeatureRule(loss, projections.identity() if projection is None else projection)
    return Method("Influence", rule, kernel, references=("influence",))


def data_inf(
    loss: OutputFn, *, damping: Damping | None = None, projection: Projection | None = None
) -> Method:
    """DataInf: averages the inverses of single-example Fisher matrices, group by group.

    Guarantees and cost: see `kernels.DataInf`.

    Args:
      loss: (params, example, key) -> scalar, summed over the example's tokens or pixels.
      damping: relative to the mean eigenvalue of the Fisher matrix. Default: `relative(0.1)`.
      projection: of each group's gradient. Default: `rademacher(1024)`.

    Returns:
      The method.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxattr import absolute, build_index, score
      >>> def loss(params, example, key):
      ...     return 0.5 * jnp.sum((example["x"] @ params["w"] - example["y"]) ** 2)
      >>> data = {"x": jnp.eye(3), "y": jnp.ones((3, 1))}
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> method = data_inf(loss, damping=absolute(1.0))
      >>> [round(x, 3) + 0.0 for x in score(build_index(method, params, data), data)[0].tolist()]
      [0.833, 0.0, 0.0]

    References:
      Kwon et al. (2024), arXiv:2310.00902, Eq. 5.
    """
    chosen = projections.rademacher(1024) if projection is None else projection
    kernel = kernels.DataInf(kernels.or_relative(damping))
    return Method("DataInf", FeatureRule(loss, chosen), kernel, references=("data_inf",))
