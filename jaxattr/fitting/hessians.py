"""Products with the curvature of the mean training loss, in the coordinates of the features."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr import identity
from jaxattr.features.bases import Fitted
from jaxattr.features.expectations import refuse_unit_norm
from jaxattr.features.featurizer import FeatureRule
from jaxattr.features.plans import Plan
from jaxattr.features.whole_gradients import as_function_of, coordinates
from jaxattr.fitting.passes import TrainingPass
from jaxattr.keys import example_keys
from jaxattr.scales import wide
from jaxattr.typing import Example, Key, OutputFn, Params

# Examples whose second derivatives are in memory at once.
_BLOCK = 64

Leaves: TypeAlias = dict[str, jax.Array]


class Weighted(NamedTuple):
    """Some examples.

    Attributes:
      batch: a pytree of arrays [b, ...].
      keys: of stochastic outputs, [b].
      weights: of their losses in the sum, [b]; False is zero.
    """

    batch: Any
    keys: Key
    weights: jax.Array


Product: TypeAlias = tuple[Leaves, Callable[[Leaves, Weighted], Leaves]]
"""Some leaves, and (vector, examples) -> the product of a matrix with a vector of those leaves."""


@dataclasses.dataclass(frozen=True)
class Hessian:
    """The Hessian itself; may have negative eigenvalues.

    Attributes:
      loss: (params, example, key) -> scalar.
    """

    loss: OutputFn

    def product(self, params: Params, chosen: Collection[str]) -> Product:
        """Returns the product of the chosen leaves."""
        loss, leaves = as_function_of(self.loss, chosen, params)

        def of_block(tangent: Leaves, block: Weighted) -> Leaves:
            def total(leaves: Leaves) -> jax.Array:
                each = jax.vmap(loss, in_axes=(None, 0, 0))(leaves, block.batch, block.keys)
                return jnp.sum(block.weights.astype(each.dtype) * each)

            return jax.jvp(jax.grad(total), (leaves,), (tangent,))[1]

        return leaves, of_block


@dataclasses.dataclass(frozen=True)
class GaussNewton:
    r"""The generalised Gauss-Newton matrix, which has no negative eigenvalue.

    .. math:: G = \sum_n w_n J_n^\top \nabla^2_z \ell(z_n) J_n, \qquad z = f(\theta)

    For cross-entropy of logits it is the Fisher matrix of all labels, not of some that are drawn.

    Attributes:
      outputs: f, (params, example, key) -> z, such as logits; a pytree of float arrays.
      loss: (z, example) -> scalar, convex in z.
    """

    outputs: OutputFn = identity.function("params", "example", "key")
    loss: Callable[[Any, Example], jax.Array] = identity.function("z", "example")

    def product(self, params: Params, chosen: Collection[str]) -> Product:
        """Returns the product of the chosen leaves."""
        outputs, leaves = as_function_of(self.outputs, chosen, params)

        def of_block(tangent: Leaves, block: Weighted) -> Leaves:
            def every(leaves: Leaves) -> Any:
                return jax.vmap(outputs, in_axes=(None, 0, 0))(leaves, block.batch, block.keys)

            def curved(z: Any, change: Any, example: Example, weight: jax.Array) -> Any:
                slope = jax.grad(lambda z: self.loss(z, example))
                product = jax.jvp(slope, (z,), (change,))[1]
                return jax.tree.map(lambda x: weight.astype(x.dtype) * x, product)

            z, change = jax.jvp(every, (leaves,), (tangent,))
            product = jax.vmap(curved)(z, change, block.batch, block.weights)
            return jax.vjp(every, leaves)[1](product)[0]

        return leaves, of_block


Curvature: TypeAlias = Hessian | GaussNewton
"""A matrix like the Hessian of a sum of losses; hashable."""


def curvature_products(
    over: TrainingPass, fitted: Fitted, kept: np.ndarray, curvature: Curvature | None = None
) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    r"""Makes the function that multiplies vectors by the curvature of the mean loss.

    The features are a linear map E^T of the gradient, so moving the parameters by E v changes the
    mean features by E^T H E v, which is the product that is returned.

    Args:
      over: the checkpoint and the training data.
      fitted: what was fitted to the checkpoint.
      kept: which examples count, bool [n].
      curvature: of what. Default: the Hessian of the function that is attributed.

    Returns:
      (products, operands): `products(operands, vectors [k, p]) -> [k, p]`, pure and jittable.
      Guarantees: exact. Cost: per vector, three gradients of the training set, read at once.
    """
    featurizer = over.featurizer
    refuse_unit_norm(featurizer.rule.output, "A Hessian")
    curvature = Hessian(featurizer.rule.output) if curvature is None else curvature
    ids = np.flatnonzero(kept)
    batch, ids = over.place.whole((over.source.read(ids), ids))
    drawn = featurizer.draw(over.number, fitted, over.place)
    operands = featurizer.key, drawn, over.params, batch, ids, fitted
    return _compiled_products(featurizer.rule, featurizer.plan, curvature), operands


@functools.lru_cache(maxsize=16)
def _compiled_products(
    rule: FeatureRule, plan: Plan, curvature: Curvature
) -> Callable[[Any, jax.Array], jax.Array]:
    """The same function for all checkpoints and indexes of a method."""

    def products(operands: Any, vectors: jax.Array) -> jax.Array:
        key, drawn, params, batch, ids, fitted = operands
        leaves, of_block = curvature.product(params, plan.rest | plan.covered)
        to_features = coordinates(rule.projection, plan, drawn, fitted)
        example, to_parameters = jax.vjp(to_features, leaves)
        blocks = _in_blocks(batch, example_keys(key, ids))

        def product(vector: jax.Array) -> jax.Array:
            (tangent,) = to_parameters(vector.astype(example.dtype))

            def add(total: Leaves, block: Weighted) -> tuple[Leaves, None]:
                more = of_block(tangent, block)
                return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, more), None

            # A sum of short floats stops growing after some 256 blocks.
            start = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), leaves)
            total, _ = jax.lax.scan(add, start, blocks)
            return to_features(jax.tree.map(lambda x: x / len(ids), total))

        return jax.vmap(product)(vectors)

    return jax.jit(products)


def _in_blocks(batch: Any, keys: Key) -> Weighted:
    """Reshapes [n, ...] to [blocks, size, ...]; padding repeats the first rows with weight zero."""
    n = keys.shape[0]
    blocks = -(-n // _BLOCK)
    size = -(-n // blocks)
    rows = jnp.arange(blocks * size)

    def split(x: jax.Array) -> jax.Array:
        return x[rows % n].reshape(blocks, size, *x.shape[1:])

    batch, keys = jax.tree.map(split, (batch, keys))
    return Weighted(batch, keys, (rows < n).reshape(blocks, size))
