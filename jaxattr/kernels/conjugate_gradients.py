"""Conjugate gradients for several right-hand sides at once, each with steps of its own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


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

    def step(state: tuple) -> tuple:
        x, residual, direction, before, running, iteration = state
        image = multiply(direction)
        curvature = jnp.sum(direction * image, axis=1)
        running = running & (curvature > 0)
        length = _ratio(before, curvature, running)
        x, residual = x + length * direction, residual - length * image
        near = precondition(residual)
        product = jnp.sum(residual * near, axis=1)
        direction = near + _ratio(product, before, running) * direction
        running = running & (jnp.sum(residual**2, axis=1) > goal)
        return x, residual, direction, product, running, iteration + 1

    near = precondition(right)
    product, running = jnp.sum(right * near, axis=1), jnp.sum(right**2, axis=1) > goal
    start = jnp.zeros_like(right), right, near, product, running, jnp.zeros((), jnp.int32)
    unsolved = lambda state: jnp.any(state[4]) & (state[5] < iterations)  # noqa: E731
    return jax.lax.while_loop(unsolved, step, start)[0]


def _ratio(above: jax.Array, below: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.where(where, above / jnp.where(where, below, 1), 0)[:, None]
