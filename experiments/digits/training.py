"""Training a digit classifier as a pure function of a key and example ids."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxattr as ja
from experiments.digits.data import Images
from experiments.digits.models import Model
from jaxattr.evaluation.training import Trainer
from jaxattr.fitting.eigenbases import SampleFn
from jaxattr.typing import OutputFn

BATCH = 25
"""Examples per step."""


def trainer(
    model: Model, train: Images, *, batch_size: int = BATCH, state: bool = False
) -> Callable[[jax.Array, jax.Array], Any]:
    """Makes the function that `jaxattr.retrain` maps over subsets.

    Args:
      model: the network.
      train: the training set that ids refer to.
      batch_size: examples per step.
      state: whether to return the optimizer's state too.

    Returns:
      (key, ids int [s]) -> params, or (params, optimizer state).
    """
    epochs = model.recipe.epochs
    images, labels = jnp.asarray(train["image"]), jnp.asarray(train["label"])

    def train_on(key: jax.Array, ids: jax.Array) -> Any:
        per_epoch = len(ids) // batch_size
        optimizer = _optimizer(epochs * per_epoch, model.recipe.learning_rate)

        def mean_loss(params: Any, rows: jax.Array) -> jax.Array:
            logits = model.apply(params, images[rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

        def step(state: tuple, rows: jax.Array) -> tuple[tuple, None]:
            params, optimizer_state = state
            gradient = jax.grad(mean_loss)(params, rows)
            updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
            return (optax.apply_updates(params, updates), optimizer_state), None

        init_key, order_key = jax.random.split(key)
        order = jax.vmap(jax.random.permutation, in_axes=(0, None))(
            jax.random.split(order_key, epochs), ids
        )
        batches = order[:, : per_epoch * batch_size].reshape(-1, batch_size)
        params = model.init(init_key)
        trained, _ = jax.lax.scan(step, (params, optimizer.init(params)), batches)
        return trained if state else trained[0]

    return train_on


def step_by_step(
    model: Model, train: Images, *, learning_rate: float | None = None, eps_root: float = 1e-8
) -> Trainer:
    """The same training as steps that `ja.unroll` goes back through.

    Args:
      model: the network.
      train: the training set.
      learning_rate: at its peak; by default the recipe's.
      eps_root: what is added under Adam's root, so that it has a derivative everywhere.

    Returns:
      What `.run(key)` makes a run of.
    """
    peak = learning_rate or model.recipe.learning_rate
    return ja.trainer(
        loss(model), model.init, train, batch_size=BATCH, epochs=model.recipe.epochs,
        optimizer=lambda steps: _optimizer(steps, peak, eps_root),
    )  # fmt: skip


def _optimizer(steps: int, peak: float, eps_root: float = 0.0) -> optax.GradientTransformation:
    schedule = optax.cosine_onecycle_schedule(steps, peak)
    return optax.adamw(schedule, eps_root=eps_root, weight_decay=1e-3)


def loss(model: Model) -> OutputFn:
    """Cross-entropy of one example."""

    def loss(params: Any, example: Any, key: jax.Array) -> jax.Array:
        del key
        logits = model.apply(params, example["image"][None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])

    return loss


def margin(model: Model) -> OutputFn:
    """Log-odds of the label of one example, log(p / (1 - p))."""

    def margin(params: Any, example: Any, key: jax.Array) -> jax.Array:
        del key
        logits = model.apply(params, example["image"][None])[0]
        others = jnp.where(jnp.arange(len(logits)) == example["label"], -jnp.inf, logits)
        return logits[example["label"]] - jax.nn.logsumexp(others)

    return margin


def sample(model: Model) -> SampleFn:
    """Draws the label of one example from the model."""

    def sample(params: Any, example: Any, key: jax.Array) -> Any:
        logits = model.apply(params, example["image"][None])[0]
        drawn = jax.random.categorical(key, logits)
        return example | {"label": drawn.astype(example["label"].dtype)}

    return sample
