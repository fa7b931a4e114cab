"""Queries that are refined by iteration with the curvature itself, from EK-FAC's as a start."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr import identity
from jaxattr.counts import real_number, whole_number
from jaxattr.fitting.eigenbases import second_moments
from jaxattr.fitting.hessians import Curvature, GaussNewton, curvature_products
from jaxattr.fitting.passes import TrainingPass
from jaxattr.index.index import ConvergenceWarning, Index, check_index, first_ids, report_non_finite
from jaxattr.index.queries import QueryFeatures, query_features
from jaxattr.inputs.outputs import check_function
from jaxattr.kernels import Damping, SecondMoment, conjugate_gradients, relative
from jaxattr.kernels.base import check_damping
from jaxattr.kernels.diagonal import added_to, eigenvalues
from jaxattr.scales import exponent_of, scaled
from jaxattr.typing import Example, Features, OutputFn

# Queries that are solved for at once: each has activations of a block of examples of its own.
_AT_ONCE = 32


def astra(
    index: Index,
    queries: Any,
    *,
    outputs: OutputFn | None = None,
    loss: Callable[[Any, Example], jax.Array] | None = None,
    damping: Damping | None = None,
    examples: int | None = None,
    iterations: int = 20,
    tolerance: float = 1e-2,
) -> QueryFeatures:
    r"""Refines queries of an EK-FAC index: their inverse is that of the curvature itself.

    .. math:: \tau(q, n) = v(q)^\top \phi(n), \qquad (C + D) \, v(q) = \phi(q)

    C is the curvature of the mean training loss, between all layers, and D the damping, the same
    for all. EK-FAC's inverse is what the iteration starts from, and its preconditioner. Use the
    result wherever queries go: `ja.top_k(index, ja.astra(index, queries))`; the index stays as it
    is, and so do its `self_influence`s, which are EK-FAC's.

    Guarantees: as `residuals` of the result say, which are never above those of EK-FAC itself;
    exact influence as they go to zero. A solve stops where it meets negative curvature, which a
    Gauss-Newton matrix has not; one that finds nothing before leaves the query to EK-FAC.
    Cost: a pass for EK-FAC's eigenvalues; then, per iteration and query, three gradients of the
    examples, which are in memory at once.

    Args:
      index: of `ja.ekfac`, `ja.kfac` or `ja.eshampoo`, which knows its training examples.
      queries: as in `ja.score`, or `ja.query_features(index, ...)`.
      outputs: (params, example, key) -> z, what the model puts out, such as logits; with `loss`, C
        is the Gauss-Newton matrix. Default: the Hessian of the function that is attributed.
      loss: (z, example) -> scalar: that function, of the outputs.
      damping: D; relative to the mean of EK-FAC's eigenvalues over all layers. Default:
        `relative(10)`.
      examples: training examples that C is the mean over, drawn from the index's key. Default: all.
      iterations: at most so many. Fewer damp more: directions of low curvature come last.
      tolerance: relative residual at which a solve ends.

    Returns:
      Features of the queries, with `residuals`.

    Raises:
      TypeError: if the index is something else, or a function takes other arguments.
      ValueError: if the index is of another method, or does not know its training examples; if
        `outputs` come without `loss`, the loss of the outputs is not what is attributed, the
        tolerance is not above 0, or eigenvalues leave the range of the features' type.

    Warns:
      ConvergenceWarning: with the positions of queries whose residual is above the tolerance.
      NonFiniteWarning: with those whose gradient or solution is not finite.

    References:
      Wang et al. (2025), ASTRA, arXiv:2507.14740. Deviation: conjugate gradients with the same
      examples throughout, where the paper takes steps of one size along others each time.
    """
    kernel = _checked_kernel(check_index(index))
    iterations = whole_number("iterations", iterations)
    if not real_number("tolerance", tolerance) > 0:
        raise ValueError(f"tolerance must be above 0, got {tolerance}.")
    damping = relative(10) if damping is None else check_damping(damping)
    curvature = _curvature(index, outputs, loss)
    prepared = query_features(index, queries)
    counted = _drawn(index, examples)
    solved = []
    for number, phi in enumerate(jnp.split(prepared.features, len(index.checkpoints), axis=1)):
        system = _system(index, number, kernel, damping, curvature, counted)
        solved.append(_refined(system, phi, iterations, tolerance))
    features = jnp.concatenate([phi for phi, _ in solved], axis=1)
    residuals = np.max([np.asarray(residual) for _, residual in solved], axis=0)
    lost = np.flatnonzero(~np.asarray(jnp.isfinite(features).all(axis=1)))
    report_non_finite(lost, len(residuals), "refined queries")
    _warn_of_residuals(residuals, tolerance)
    return prepared._replace(
        features=features.at[lost].set(0) if len(lost) else features,
        non_finite=np.union1d(prepared.non_finite, lost),
        residuals=residuals,
    )


astra.references = ("astra", "ekfac", "kfac")  # type: ignore[attr-defined]


class _System(NamedTuple):
    """One checkpoint's equations, in the coordinates of the features.

    Attributes:
      products: vectors [k, p] -> C of them.
      operands: its first argument.
      added: D.
      damped: EK-FAC's eigenvalues with its damping [p]; zero where no example has a feature.
    """

    products: Any
    operands: Any
    added: jax.Array
    damped: jax.Array


def _system(
    index: Index,
    number: int,
    kernel: SecondMoment,
    damping: Damping,
    curvature: Curvature | None,
    counted: np.ndarray,
) -> _System:
    assert index.featurizer is not None and index.train is not None
    fitted, layout, dtype = index.fitted[number], index.layout, index.rows.layout.wide
    over = TrainingPass(
        index.featurizer, index.checkpoints[number], number, index.train, index.batch_size,
        index.place,
    )  # fmt: skip
    means = second_moments(over, fitted)
    own = eigenvalues(means, fitted.curvature_over(0))
    damped = np.where(means > 0, own + added_to(own, layout, kernel.damping), 0)
    added = damping.of(own.mean())
    _check_range(damped[damped > 0], added, dtype)
    products, operands = curvature_products(over, fitted, counted, curvature)
    return _System(products, operands, jnp.asarray(added, dtype), jnp.asarray(damped, dtype))


def _check_range(damped: np.ndarray, added: float, dtype: np.dtype) -> None:
    """Raises where eigenvalues are infinite in the type of the features, or zero."""
    limits = jnp.finfo(dtype)
    smallest, largest = damped.min(initial=np.inf), damped.max(initial=added)
    if smallest < limits.tiny or largest > limits.max:
        raise ValueError(
            f"Eigenvalues of EK-FAC with their damping, from {smallest:.1e} to {largest:.1e}, are "
            f"not within the range of {dtype}: scale the loss."
        )


def _refined(
    system: _System, phi: Features, iterations: int, tolerance: float
) -> tuple[Features, jax.Array]:
    """What EK-FAC's inverse makes of it is v; and relative residuals."""
    # One program: the last queries are repeated to fill their block.
    size = min(_AT_ONCE, len(phi))
    found = []
    for start in range(0, len(phi), size):
        rows = np.minimum(np.arange(start, start + size), len(phi) - 1)
        given = system.operands, system.added, system.damped, phi[rows]
        found.append(_compiled_solve(system.products, iterations)(*given, tolerance))
    features, residuals = (jnp.concatenate(each)[: len(phi)] for each in zip(*found, strict=True))
    return features, residuals


@functools.lru_cache(maxsize=16)
def _compiled_solve(products: Any, iterations: int) -> Any:
    @jax.jit
    def run(
        operands: Any, added: jax.Array, damped: jax.Array, phi: Features, tolerance: jax.Array
    ) -> tuple[Features, jax.Array]:
        exponents = exponent_of(phi, axis=1)[:, None]
        damped = damped[None]
        there = damped > 0
        right = jnp.where(there, scaled(phi, -exponents), 0)

        def multiply(x: jax.Array) -> jax.Array:
            return jnp.where(there, products(operands, x) + added * x, 0)

        def precondition(x: jax.Array) -> jax.Array:
            return jnp.where(there, x / jnp.where(there, damped, 1), 0)

        def residual(v: jax.Array) -> jax.Array:
            size = jnp.linalg.norm(right, axis=1)
            return jnp.linalg.norm(right - multiply(v), axis=1) / jnp.where(size == 0, 1, size)

        start = precondition(right)
        found = conjugate_gradients.solve(
            multiply, right, tolerance=tolerance, iterations=iterations, precondition=precondition
        )
        of_start, of_found = residual(start), residual(found)
        better = (of_found < of_start) & (found != 0).any(axis=1)  # zero has a residual of one
        v = jnp.where(better[:, None], found, start)
        return scaled(v * damped, exponents), jnp.where(better, of_found, of_start)

    return run


def _drawn(index: Index, examples: int | None) -> np.ndarray:
    """Which examples curvature is a mean over, bool [n]; those that are not finite are not."""
    assert index.featurizer is not None
    finite = np.setdiff1d(np.arange(index.size), index.non_finite)
    if examples is not None:
        count = min(whole_number("examples", examples), len(finite))
        seed = np.asarray(jax.random.key_data(index.featurizer.key))
        finite = np.random.default_rng(seed).choice(finite, count, replace=False)
    counted = np.zeros(index.size, bool)
    counted[finite] = True
    return counted


def _checked_kernel(index: Index) -> SecondMoment:
    if index.method is None:
        raise ValueError(
            "This index was opened without its method and checkpoints, which refining needs: "
            "ja.open_index(path, method, checkpoints, train=train)."
        )
    kernel = index.method.kernel
    if not isinstance(kernel, SecondMoment):
        raise ValueError(
            f"ja.astra refines queries of ja.ekfac, ja.kfac or ja.eshampoo, and this index is of "
            f"{index.method.name}."
        )
    if index.train is None:
        raise ValueError(
            "This index was opened without its training examples, which curvature is a mean over: "
            "ja.open_index(path, method, checkpoints, train=train)."
        )
    return kernel


def _curvature(
    index: Index, outputs: OutputFn | None, loss: Callable[[Any, Example], jax.Array] | None
) -> GaussNewton | None:
    """What the functions compute now; raises if that is not the function that is attributed."""
    if (outputs is None) != (loss is None):
        raise ValueError(
            "The Gauss-Newton matrix needs both, outputs=(params, example, key) -> z and "
            "loss=(z, example) -> scalar; got one of them."
        )
    if outputs is None or loss is None:
        return None
    check_function(outputs, "outputs")
    check_function(loss, "loss", ("z", "example"))
    assert index.featurizer is not None and index.train is not None
    attributed, params = index.featurizer.rule.output, index.checkpoints[0]
    number = np.setdiff1d(np.arange(index.size), index.non_finite)[:1]
    batch = index.place.whole(index.train.read(number))
    example = jax.tree.map(lambda x: x[0], batch)

    key = index.featurizer.key
    z = jax.eval_shape(outputs, params, example, key)
    given = {"params": params, "example": example, "key": key, "z": z}
    curvature: GaussNewton = identity.traced(GaussNewton(outputs, loss), given)

    @jax.jit
    def both(params: Any, example: Example, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = curvature.outputs(params, example, key)
        return attributed(params, example, key), curvature.loss(z, example)

    expected, found = map(float, both(params, example, key))
    if not np.isclose(found, expected, rtol=1e-3, atol=1e-6):
        raise ValueError(
            "loss(outputs(params, example, key), example) must be the function that is attributed: "
            f"for training example {number[0]} it is {found:.6g}, and that is {expected:.6g}."
        )
    return curvature


def _warn_of_residuals(residuals: np.ndarray, tolerance: float) -> None:
    above = np.flatnonzero(residuals > 1.1 * tolerance)
    if len(above):
        warnings.warn(
            f"{len(above)} of {len(residuals)} queries were refined to a relative residual above "
            f"{tolerance:g}, the largest {residuals[above].max():.2g}: ids {first_ids(above)}. "
            "Allow more iterations=, or more damping=.",
            ConvergenceWarning,
            stacklevel=3,
        )
