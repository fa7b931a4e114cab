"""Weights as users give them, checked and in the order of the groups."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.features.plans import FeatureLayout
from jaxattr.index.index import Index
from jaxattr.scales import wide
from jaxattr.typing import LearnedWeights, Weights


def weights_for(index: Index, weights: Weights | None) -> jax.Array:
    """Orders weights as `weight_array` does, and warns of those that were learned on another index.

    Args:
      index: that they are for.
      weights: as in `score`.
    """
    learned_on = getattr(weights, "learned_on", None)
    if learned_on is not None and learned_on != index.query_side:
        warnings.warn(
            "These weights were learned on another index: with another method, other parameters or "
            "another key. Learn them again, or pass fit.weights if that is meant.",
            UserWarning,
            stacklevel=3,
        )
    return weight_array(index.layout, weights)


def weight_array(layout: FeatureLayout, weights: Weights | None) -> jax.Array:
    """Orders weights as the groups are ordered, after checking them.

    Args:
      layout: the groups.
      weights: {group name: weight}, what `learn_weights` returned, or None for one each.

    Returns:
      Float [m].

    Raises:
      ValueError: if a weight is missing, unknown, complex, negative or not finite.
    """
    if weights is None:
        return jnp.ones(len(layout.names))
    if isinstance(weights, LearnedWeights):
        weights = weights.weights
    if not isinstance(weights, Mapping):
        raise TypeError(
            "weights must be {group name: weight}, or what ja.learn_weights returned; got "
            f"{type(weights).__name__}. The groups are index.layout.names."
        )
    unknown = sorted(set(weights) - set(layout.names))
    missing = sorted(set(layout.names) - set(weights))
    if unknown or missing:
        raise ValueError(
            f"Weights must name exactly the index's groups. Missing: {missing}; unknown: {unknown}."
        )
    given = [weights[name] for name in layout.names]
    for name, value in weights.items():
        if np.shape(value) or value is None or isinstance(value, str):
            kind = f"shape {list(np.shape(value))}" if np.shape(value) else repr(value)
            raise ValueError(f"Each weight must be one number, and that of {name!r} is {kind}.")
    values: Any
    if any(isinstance(value, jax.core.Tracer) for value in given):
        values = jnp.stack([jnp.asarray(value) for value in given])
    else:
        values = np.stack([np.asarray(value) for value in given])
        values = values.astype(jax.dtypes.canonicalize_dtype(values.dtype))
    if jnp.issubdtype(values.dtype, jnp.complexfloating):
        raise ValueError(f"Weights must be real numbers, got {values.dtype}.")
    values = values.astype(wide(values.dtype))
    if not isinstance(values, jax.core.Tracer):
        bad = ~np.isfinite(values) | (np.asarray(values) < 0)
        if bad.any():
            got = {layout.names[i]: float(values[i]) for i in np.flatnonzero(bad)}
            raise ValueError(f"Weights must be finite and at least 0, got {got}.")
    return jnp.asarray(values)
