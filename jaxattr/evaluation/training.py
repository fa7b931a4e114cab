"""A training function for those who have none at hand."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxattr.counts import whole_number
from jaxattr.evaluation.retraining import TrainFn
from jaxattr.inputs.data import as_batch
from jaxattr.inputs.outputs import check_function
from jaxattr.typing import Batch, Key, OutputFn, Params


def trainer(
    loss: OutputFn,
    start: Params | Callable[[Key], Params],
    train: Batch,
    *,
    optimizer: optax.GradientTransformation | Callable[[int], optax.GradientTransformation],
    batch_size: int,
    epochs: int,
) -> TrainFn:
    """Makes a pure training function of a loss, for `ja.outcomes` and `ja.retrain`.

    Args:
      loss: (params, example, key) -> scalar, of one example, as methods take it.
      start: parameters, which are tuned; or key -> parameters, such as a model's initialisation.
      train: the training set, a pytree of arrays [n, ...]; stays on the device.
      optimizer: of Optax; or the number of steps -> one, for a schedule that ends with training.
      batch_size: examples per step; where there are fewer, all.
      epochs: passes over the examples, each in another order. Examples beyond the last full batch
        of a pass are left out of it.

    Returns:
      (key, ids int [s]) -> params. The order of batches, the start and the loss's randomness come
      from the key.

    Example:
      >>> def loss(params, example, key):
      ...     return (params * example - 1) ** 2
      >>> fit = trainer(loss, jnp.zeros(()), jnp.ones(8), optimizer=optax.sgd(0.1), batch_size=4,
      ...               epochs=20)
      >>> print(round(float(fit(jax.random.key(0), jnp.arange(6))), 2))
      0.99
    """
    batch_size = whole_number("batch_size", batch_size)
    epochs = whole_number("epochs", epochs)
    check_function(loss, "loss")
    data = jax.tree.map(jnp.asarray, as_batch(train, "train"))

    def mean_loss(params: Params, rows: jax.Array, key: Key) -> jax.Array:
        batch = jax.tree.map(lambda x: x[rows], data)
        keys = jax.random.split(key, len(rows))
        return jax.vmap(loss, in_axes=(None, 0, 0))(params, batch, keys).mean()

    def train_fn(key: Key, ids: jax.Array) -> Params:
        start_key, order_key, loss_key = jax.random.split(key, 3)
        params = start(start_key) if callable(start) else start
        size = min(batch_size, len(ids))
        per_epoch = len(ids) // size
        orders = jax.vmap(jax.random.permutation, in_axes=(0, None))(
            jax.random.split(order_key, epochs), ids
        )
        batches = orders[:, : per_epoch * size].reshape(-1, size)
        steps = len(batches)
        chosen = optimizer
        if not isinstance(chosen, optax.GradientTransformation):
            chosen = chosen(steps)

        def step(state: tuple, given: tuple) -> tuple[tuple, None]:
            params, optimizer_state = state
            gradient = jax.grad(mean_loss)(params, *given)
            updates, optimizer_state = chosen.update(gradient, optimizer_state, params)
            return (optax.apply_updates(params, updates), optimizer_state), None

        state = params, chosen.init(params)
        keys = jax.random.split(loss_key, steps)
        return jax.lax.scan(step, state, (batches, keys))[0][0]

    return train_fn
