"""Training a GPT-2: once on everything, and many times on halves, under `vmap`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxattr as ja
from jaxattr import language
from jaxattr.language import LogitsFn, Rows
from jaxattr.typing import Params


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
      epochs: passes over the rows.
      batch: rows per step.
      rate: peak learning rate.
      decay: of weights, as in AdamW.
      final: share of the peak rate at the end.
    """

    epochs: int
    batch: int
    rate: float
    decay: float = 0.01
    final: float = 0.1

    def steps(self, rows: int) -> int:
        """Number of steps for so many rows."""
        return self.epochs * (rows // min(self.batch, rows))

    def optimizer(self, rows: int, eps_root: float = 0.0) -> optax.GradientTransformation:
        """AdamW with warm-up and cosine decay; its root has a derivative if eps_root is not 0."""
        steps = self.steps(rows)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.rate, max(1, steps // 20), steps, self.final * self.rate
        )
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(schedule, eps_root=eps_root, weight_decay=self.decay),
        )


def mean_loss(logits_fn: LogitsFn) -> Callable[[Params, Any], jax.Array]:
    """Makes the mean over a batch's target tokens of the loss.

    Args:
      logits_fn: the model.

    Returns:
      (params, rows, weights of the rows' losses, by default one each) -> scalar.
    """
    of_row = language.loss(logits_fn)
    key = jax.random.key(0)  # not used: the model is deterministic

    def loss(params: Params, rows: Any, weights: Any = 1.0) -> jax.Array:
        losses = jax.vmap(of_row, (None, 0, None))(params, rows, key)
        return (weights * losses).sum() / jnp.maximum(rows["mask"].sum(), 1)

    return loss


def make_train(
    logits_fn: LogitsFn, rows: Rows, recipe: Recipe, count: int
) -> Callable[[jax.Array, jax.Array, Params], tuple[Params, Any]]:
    """Makes a pure training function.

    Args:
      logits_fn: the model.
      rows: all rows; which are used is said by ids.
      recipe: how.
      count: number of ids.

    Returns:
      (key, ids [count], initial params) -> params, optimizer state.
    """
    loss, optimizer = mean_loss(logits_fn), recipe.optimizer(count)
    batch = min(recipe.batch, count)
    data = jax.tree.map(jnp.asarray, rows)

    def train(key: jax.Array, ids: jax.Array, params: Params) -> tuple[Params, Any]:
        per_epoch = count // batch
        keys = jax.random.split(key, recipe.epochs)
        orders = jax.vmap(lambda k: jax.random.permutation(k, count)[: per_epoch * batch])(keys)
        batches = ids[orders.reshape(-1, batch)]

        def step(carry: tuple, chosen: jax.Array) -> tuple[tuple, None]:
            params, state = carry
            rows = jax.tree.map(lambda x: x[chosen], data)
            updates, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0]

    return train


def step_by_step(
    logits_fn: LogitsFn, rows: Rows, start: Params, optimizer: optax.GradientTransformation, *,
    epochs: int, batch: int, seed: int,
) -> ja.TrainingRun:  # fmt: skip
    """Training as steps that `ja.unroll` goes back through.

    Args:
      logits_fn: the model.
      rows: all rows.
      start: initial params.
      optimizer: one whose root has a derivative everywhere.
      epochs: passes over the rows.
      batch: rows per step.
      seed: of the order of rows.

    Returns:
      The run, of all rows.
    """
    loss, count = mean_loss(logits_fn), len(rows["mask"])
    whole = np.tile(np.arange(count), (epochs, 1))
    orders = np.random.default_rng(seed).permuted(whole, axis=1)[:, : count // batch * batch]

    def step(state: Any, given: Any, weights: jax.Array) -> Any:
        params, optimizer_state = state
        gradient = jax.grad(loss)(params, given, weights)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state

    state = start, optimizer.init(start)
    return ja.TrainingRun(
        step, state, orders.reshape(-1, batch), rows, params=lambda state: state[0]
    )


def perplexity(logits_fn: LogitsFn, params: Params, rows: Rows, batch: int = 64) -> float:
    """Returns the exponential of the mean loss per target token.

    Args:
      logits_fn: the model.
      params: its parameters.
      rows: any.
      batch: rows at once.
    """
    of_row = jax.jit(jax.vmap(language.loss(logits_fn), (None, 0, None)))
    total = 0.0
    for start in range(0, len(rows["mask"]), batch):
        part = {name: x[start : start + batch] for name, x in rows.items()}
        total += float(of_row(params, part, jax.random.key(0)).sum())
    return float(np.exp(total / rows["mask"].sum()))
