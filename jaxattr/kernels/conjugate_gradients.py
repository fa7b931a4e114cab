"""Conjugate gradients for several right-hand sides at once, each with steps of its own."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class _State(NamedTuple):
    x: jax.Array
    residual: jax.Array
    direction: jax.Array
    product: jax.Array
    running: jax.Array
    iteration: jax.Array


def solve(
    multiply: Callable[[jax.Array], jax.Array],
    right: jax.Array,
    *,
    tolerance: float | jax.Array,
    iterations: int,
    precondition: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """Solves A x = b from x = 0; jittable.

    Args:
      multiply: rows [k, p] to A rows, A symmetric.
      right: b, [k, p].
      tolerance: relative residual at which a solve ends.
      iterations: at most so many.
      precondition: rows [k, p] to P rows, P positive and near the inverse of A.

    Returns:
      x [k, p]. A solve that meets a direction of negative curvature ends before it.

    Cost: one product per iteration, for all that are not solved yet.

    References:
      Hestenes and Stiefel (1952); Martens (2010).
    """
    goal = tolerance**2 * jnp.sum(right**2, axis=1)  # [k]

    def step(state: _State) -> _State:
        image = multiply(state.direction)
        curvature = jnp.sum(state.direction * image, axis=1)
        running = state.running & (curvature > 0)
        length = _ratio(state.product, curvature, running)
        residual = state.residual - length * image
        near = precondition(residual)
        product = jnp.sum(residual * near, axis=1)
        return _State(
            state.x + length * state.direction,
            residual,
            near + _ratio(product, state.product, running) * state.direction,
            product,
            running & (jnp.sum(residual**2, axis=1) > goal),
            state.iteration + 1,
        )

    near = precondition(right)
    start = _State(
        jnp.zeros_like(right),
        right,
        near,
        jnp.sum(right * near, axis=1),
        jnp.sum(right**2, axis=1) > goal,
        jnp.zeros((), jnp.int32),
    )
    return jax.lax.while_loop(
        lambda state: jnp.any(state.running) & (state.iteration < iterations), step, start
    ).x


def _ratio(above: jax.Array, below: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.where(where, above / jnp.where(where, below, 1), 0)[:, None]
