"""A DDIM sampler that records its trajectory."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.diffusion.schedule import ALPHA_BAR, STEPS
from experiments.diffusion.unet import Model
from jaxattr.diffusion import Denoiser


def denoiser(model: Model) -> Denoiser:
    """Returns the model as `jaxattr` wants it: of one example, conditions under their names."""
    names = tuple(name for name, _ in model.config.conditions)

    def predict(params: Any, noisy: jax.Array, timestep: jax.Array, example: Any) -> jax.Array:
        missing = [name for name in names if name not in example]
        if missing:
            raise ValueError(
                f"The example has no {' and no '.join(missing)}: the model asks for "
                f"{', '.join(names)}, each a value or the number of values where it is left open."
            )
        asked = {name: example[name][None] for name in names}
        return model.apply(params, noisy[None], timestep[None], asked)[0]

    return Denoiser(predict, ALPHA_BAR)


class Samples(NamedTuple):
    """Generated images.

    Attributes:
      image: [b, h, w, c], between -1 and 1.
      trajectory: the sampler's guess of the clean image at each step, [b, s, h, w, c].
      timesteps: of the steps, int [b, s].
    """

    image: jax.Array
    trajectory: jax.Array
    timesteps: jax.Array


def sample(
    model: Model,
    params: Any,
    noise: jax.Array,
    asked: Mapping[str, jax.Array],
    steps: int = 50,
    guidance: float = 1.0,
) -> Samples:
    """Generates images by DDIM, without noise of its own.

    Args:
      model: the network.
      params: its parameters.
      noise: to begin with, [b, h, w, c].
      asked: {attribute: value [b]}.
      steps: of the sampler.
      guidance: how far to go from what is predicted when nothing is asked for; 1 for no guidance.

    Returns:
      Images with their trajectories. The same noise gives the same image.
    """
    return _sampler(model, steps, guidance)(params, noise, dict(asked))


@functools.lru_cache(maxsize=8)
def _sampler(model: Model, steps: int, guidance: float) -> Callable[..., Samples]:
    timesteps = np.linspace(STEPS - 1, 0, steps).round().astype(np.int32)  # from noise to image
    now = ALPHA_BAR[timesteps]
    after = np.append(now[1:], 1.0).astype(np.float32)

    @jax.jit
    def run(params: Any, noise: jax.Array, asked: Mapping[str, jax.Array]) -> Samples:
        def step(noisy: jax.Array, at: tuple) -> tuple[jax.Array, jax.Array]:
            timestep, left, left_after = at
            every = jnp.full(len(noise), timestep)
            predicted = model.apply(params, noisy, every, asked)
            if guidance != 1:
                nothing = {name: jnp.full(len(noise), n) for name, n in model.config.conditions}
                unasked = model.apply(params, noisy, every, nothing)
                predicted = unasked + guidance * (predicted - unasked)
            clean = (noisy - jnp.sqrt(1 - left) * predicted) / jnp.sqrt(left)
            clean = jnp.clip(clean, -1, 1)
            # The noise that belongs to the clipped guess, so that the two add up.
            predicted = (noisy - jnp.sqrt(left) * clean) / jnp.sqrt(1 - left)
            noisy = jnp.sqrt(left_after) * clean + jnp.sqrt(1 - left_after) * predicted
            return noisy, clean

        image, trajectory = jax.lax.scan(step, noise, (timesteps, now, after))
        trajectory = jnp.moveaxis(trajectory, 0, 1)  # [b, s, h, w, c]
        each = jnp.broadcast_to(jnp.asarray(timesteps)[None], trajectory.shape[:2])
        return Samples(image, trajectory, each)

    return run
