"""A tiny noise predictor, and the loops that its features must agree with."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxattr as ja
from jaxattr import diffusion
from jaxattr.keys import example_keys
from tests import models

STEPS, PIXELS = 20, 5
ALPHA_BAR = np.linspace(0.99, 0.01, STEPS)
TIMESTEPS = (0, 7, 19)


def params(seed=0):
    return models.mlp_params(jax.random.key(seed), (PIXELS + 2, 6, PIXELS))


def predict(params, noisy, timestep, example):
    time = timestep / STEPS
    return models.mlp(params, jnp.concatenate([noisy, jnp.stack([time, example["condition"]])]))


DENOISER = diffusion.Denoiser(predict, ALPHA_BAR)
LOSS = diffusion.loss(DENOISER)


def images(n, seed=0):
    image_key, condition_key = jax.random.split(jax.random.key(seed))
    return {
        "image": jax.random.normal(image_key, (n, PIXELS), jnp.float64),
        "condition": jax.random.normal(condition_key, (n,), jnp.float64),
    }


def expected_loss(**options):
    return ja.expectation(LOSS, **{"timesteps": TIMESTEPS} | options)


def flat(gradient):
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(gradient)])


def draw_gradients(params, example, number, draws=1, timesteps=TIMESTEPS):
    """The gradient of each draw of one example, by hand."""
    key = example_keys(jax.random.key(0), jnp.array([number]))[0]
    for t in timesteps:
        for draw in range(draws):
            noise_key = jax.random.fold_in(jax.random.fold_in(key, t), draw)
            noise = jax.random.normal(noise_key, (PIXELS,), jnp.float64)
            noisy = ALPHA_BAR[t] ** 0.5 * example["image"] + (1 - ALPHA_BAR[t]) ** 0.5 * noise

            def loss(params, t=t, noise=noise, noisy=noisy):
                return jnp.mean((predict(params, noisy, t, example) - noise) ** 2)

            yield flat(jax.grad(loss)(params))
