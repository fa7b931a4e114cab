"""Products with the Hessian of the mean training loss, in the coordinates of the features."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxattr.features.bases import Fitted
from jaxattr.features.expectations import refuse_unit_norm
from jaxattr.features.featurizer import (
    FeatureRule,
    as_function_of,
    coordinates,
)
from jaxattr.features.plans import Plan
from jaxattr.fitting.passes import TrainingPass
from jaxattr.keys import example_keys

# Examples whose second derivatives are in memory at once.
_BLOCK = 64


def hessian_products(
    over: TrainingPass, fitted: Fitted, kept: jax.Array
) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    r"""Makes the function that multiplies vectors by the Hessian.

    The features are a linear map E^T of the gradient, so moving the parameters by E v changes the
    mean features by E^T H E v, which is the product that is returned.

    Args:
      over: the checkpoint and the training data.
      fitted: what was fitted to the checkpoint.
      kept: which examples count, bool [n].

    Returns:
      (products, operands): `products(operands, vectors [k, p]) -> [k, p]`, pure and jittable.
      Guarantees: exact. Cost: per vector, three gradients of the training set, read at once.
    """
    featurizer, numbered = over.featurizer, over.whole()
    refuse_unit_norm(featurizer.rule.output, "A Hessian")
    weights = kept / jnp.maximum(kept.sum(), 1)
    drawn = featurizer.draw(over.number, fitted, over.place)
    operands = (
        featurizer.key, drawn, over.params, numbered.batch, numbered.ids, weights, fitted
    )  # fmt: skip
    return _compiled_products(featurizer.rule, featurizer.plan), operands


@functools.lru_cache(maxsize=16)
def _compiled_products(rule: FeatureRule, plan: Plan) -> Callable[[Any, jax.Array], jax.Array]:
    """The same function for all checkpoints and indexes of a method."""

    def products(operands: Any, vectors: jax.Array) -> jax.Array:
        key, drawn, params, batch, ids, weights, fitted = operands
        of_leaves, leaves = as_function_of(rule.output, plan.rest | plan.covered, params)
        to_features = coordinates(rule.projection, plan, drawn, fitted)
        example, to_parameters = jax.vjp(to_features, leaves)

        def mean_gradient(leaves: dict[str, jax.Array], block: Any) -> dict[str, jax.Array]:
            batch, keys, weights = block
            each = jax.vmap(jax.grad(of_leaves), in_axes=(None, 0, 0))(leaves, batch, keys)
            return jax.tree.map(functools.partial(_weighted_sum, weights), each)

        def of_block(tangent: dict[str, jax.Array], block: Any) -> dict[str, jax.Array]:
            return jax.jvp(lambda x: mean_gradient(x, block), (leaves,), (tangent,))[1]

        blocks = _in_blocks((batch, example_keys(key, ids), weights))

        def product(vector: jax.Array) -> jax.Array:
            (tangent,) = to_parameters(vector.astype(example.dtype))

            def add(total: Any, block: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, of_block(tangent, block)), None

            start = jax.tree.map(jnp.zeros_like, leaves)
            total, _ = jax.lax.scan(add, start, blocks)
            return to_features(total)

        return jax.vmap(product)(vectors)

    return jax.jit(products)


def _weighted_sum(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Sum over examples [b, ...]; one of no weight need not be finite."""
    counts = (weights > 0).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.tensordot(weights.astype(x.dtype), jnp.where(counts, x, 0), 1)


def _in_blocks(arrays: Any) -> Any:
    """Reshapes [n, ...] to [blocks, size, ...]; padding repeats the first rows with weight zero."""
    batch, keys, weights = arrays
    n = keys.shape[0]
    blocks = -(-n // _BLOCK)
    size = -(-n // blocks)
    rows = jnp.arange(blocks * size)

    def split(x: jax.Array) -> jax.Array:
        return x[rows % n].reshape(blocks, size, *x.shape[1:])

    weights = jnp.where(rows < n, weights[rows % n], 0).reshape(blocks, size)
    return jax.tree.map(split, (batch, keys)) + (weights,)
