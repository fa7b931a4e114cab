"""Training a diffusion model as a pure function of a key and example ids."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.diffusion.schedule import ALPHA_BAR, STEPS
from experiments.diffusion.unet import Model

Images = Mapping[str, Any]
"""{"image": float32 [n, h, w, c] between -1 and 1, and an int [n] per condition}."""


class Recipe(NamedTuple):
    """How a model is trained.

    Attributes:
      steps: of Adam.
      batch_size: examples per step.
      learning_rate: at its peak, after a tenth of the steps; zero at the end.
      averaging: decay of the moving average of the parameters, which is what is returned.
      dropped: probability that a condition is left out of an example, each by itself.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 2e-3
    averaging: float = 0.99
    dropped: float = 0.0


class State(NamedTuple):
    """Where a training run is.

    Attributes:
      params: parameters.
      averaged: their moving average.
      optimizer: state of Adam.
      average: state of the moving average.
    """

    params: Any
    averaged: Any
    optimizer: Any
    average: Any


def trainer(
    model: Model,
    train: Images,
    recipe: Recipe,
    *,
    adapters_of: Any = None,
) -> Callable[[jax.Array, jax.Array], Any]:
    """Makes the function that `jaxattr.retrain` maps over subsets.

    Args:
      model: the network.
      train: the training set that ids refer to.
      recipe: how it is trained.
      adapters_of: parameters that stay as they are, while adapters are trained beside them.

    Returns:
      (key, ids int [s]) -> params; or adapters.
    """
    begin, step = _steps(model, train, recipe, adapters_of)

    def train_on(key: jax.Array, ids: jax.Array) -> Any:
        init_key, steps_key = jax.random.split(key)
        keys = jax.random.split(steps_key, recipe.steps)
        state, _ = jax.lax.scan(lambda s, k: (step(s, ids, k), None), begin(init_key), keys)
        return state.averaged

    return train_on


def train_one(model: Model, train: Images, recipe: Recipe, key: jax.Array) -> Any:
    """Trains one model on everything, as `trainer` does, but with a call for each step.

    On a CPU, XLA runs the convolutions of a model without `patches` thirty times more slowly within
    a loop of its own; outside of one they take less than half the time of patches.

    Args:
      model: the network.
      train: the training set.
      recipe: how it is trained.
      key: of everything random.

    Returns:
      The parameters.
    """
    begin, step = _steps(model, train, recipe, None)
    init_key, steps_key = jax.random.split(key)
    ids, state = jnp.arange(len(train["image"])), begin(init_key)
    jitted = jax.jit(step)
    for step_key in jax.random.split(steps_key, recipe.steps):
        state = jitted(state, ids, step_key)
    return state.averaged


def _steps(
    model: Model, train: Images, recipe: Recipe, adapters_of: Any
) -> tuple[Callable[[jax.Array], State], Callable[[State, jax.Array, jax.Array], State]]:
    """How a run begins, from a key, and what a step does, from ids and a key."""
    names = ("image", *(name for name, _ in model.config.conditions))
    data = {name: jnp.asarray(train[name]) for name in names}
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, max(1, recipe.steps // 10), recipe.steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    average = optax.ema(recipe.averaging)

    def begin(key: jax.Array) -> State:
        params = (model.init if adapters_of is None else model.init_adapters)(key)
        return State(params, params, optimizer.init(params), average.init(params))

    def loss(params: Any, ids: jax.Array, key: jax.Array) -> jax.Array:
        rows_key, noise_key = jax.random.split(key)
        rows = jax.random.choice(rows_key, ids, (recipe.batch_size,))
        batch = {name: values[rows] for name, values in data.items()}
        whole = params if adapters_of is None else (adapters_of, params)
        return batch_loss(model, whole, batch, noise_key, recipe.dropped)

    def step(state: State, ids: jax.Array, key: jax.Array) -> State:
        gradient = jax.grad(loss)(state.params, ids, key)
        updates, adam = optimizer.update(gradient, state.optimizer)
        params = optax.apply_updates(state.params, updates)
        averaged, ema = average.update(params, state.average)
        return State(params, averaged, adam, ema)

    return begin, step


def batch_loss(
    model: Model, params: Any, batch: Images, key: jax.Array, dropped: float = 0.0
) -> jax.Array:
    """Mean squared error of what the network predicts, each example at a random timestep.

    Args:
      model: the network.
      params: its parameters.
      batch: images with conditions.
      key: of timesteps, noise and dropped conditions.
      dropped: probability that a condition is left out.
    """
    images = batch["image"]
    b = len(images)
    time_key, noise_key, drop_key = jax.random.split(key, 3)
    timesteps = jax.random.randint(time_key, (b,), 0, STEPS)
    noise = jax.random.normal(noise_key, images.shape)
    left = jnp.asarray(ALPHA_BAR)[timesteps][:, None, None, None]
    noisy = jnp.sqrt(left) * images + jnp.sqrt(1 - left) * noise
    asked = {}
    for number, (name, values) in enumerate(model.config.conditions):
        drops = jax.random.bernoulli(jax.random.fold_in(drop_key, number), dropped, (b,))
        asked[name] = jnp.where(drops, values, batch[name])
    errors = (model.apply(params, noisy, timesteps, asked) - noise) ** 2
    if model.config.predicts_image:
        # Those of the image: what is in it is decided where noise is strong, and counts there too.
        errors = errors * (1 - left) / left
    return jnp.mean(errors)
