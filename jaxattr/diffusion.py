"""Diffusion models: what a noise predictor says of one image at one timestep.

Each function here returns (params, example, key, timestep) -> scalar, for `ja.expectation`; the
noise is drawn from the key. With x the clean image and a the schedule,

    noisy = sqrt(a_t) x + sqrt(1 - a_t) noise
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr import scales
from jaxattr.counts import real_number, whole_number
from jaxattr.features.expectations import Expectation, TimestepFn, expectation
from jaxattr.inputs.wording import brief
from jaxattr.typing import Example, Key, OutputFn, Params

PredictFn: TypeAlias = Callable[[Params, jax.Array, jax.Array, Example], jax.Array]
"""(params, noisy image, timestep, example) -> predicted noise, of the image's shape; conditional
models read their condition from the example. One example, without a batch axis."""

Output: TypeAlias = Literal[
    "loss", "weighted_loss", "squared_norm", "mean", "l1_norm", "l2_norm", "linf_norm"
]


class Denoiser(NamedTuple):
    """A diffusion model that predicts noise.

    Attributes:
      predict: (params, noisy image, timestep, example) -> predicted noise. Evaluation mode; the
        conditional prediction, without guidance.
      alpha_bar: share of the signal's variance that is left at each timestep, [steps].
      image: example -> its clean image (or latent); or the name of that entry.
    """

    predict: PredictFn
    alpha_bar: Any
    image: Callable[[Example], jax.Array] | str = "image"

    @property
    def steps(self) -> int:
        """Number of timesteps that the model knows."""
        return len(self.alpha_bar)

    def clean(self, example: Example) -> jax.Array:
        """Returns the clean image of an example."""
        if callable(self.image):
            return self.image(example)
        if isinstance(example, Mapping) and self.image not in example:
            raise ValueError(
                f"the example has no {self.image!r}, but {sorted(example)}: say which is the "
                "image, Denoiser(..., image=name)"
            )
        return example[self.image]

    def noisy(self, image: jax.Array, timestep: jax.Array, noise: jax.Array) -> jax.Array:
        """Mixes an image with noise.

        Args:
          image: clean.
          timestep: integer.
          noise: of the image's shape.
        """
        # A narrow type would round the first of them to one.
        wide = scales.wide(image.dtype)
        left = jnp.asarray(self.alpha_bar, wide)[timestep]
        return (jnp.sqrt(left) * image + jnp.sqrt(1 - left) * noise).astype(image.dtype)


def loss(denoiser: Denoiser) -> TimestepFn:
    """Makes the training loss: the mean squared error of the predicted noise.

    Args:
      denoiser: the model.

    Returns:
      (params, example, key, timestep) -> scalar, for `ja.expectation`.

    Example:
      >>> def predict(params, noisy, timestep, example):
      ...     return 0 * noisy
      >>> silent = Denoiser(predict, np.linspace(1, 0, 9))
      >>> example = {"image": jnp.zeros((100, 100))}
      >>> value = loss(silent)({}, example, jax.random.key(0), jnp.array(3))
      >>> abs(float(value) - 1) < 0.1  # the variance of the noise
      True
    """
    return output(denoiser, "loss")


def output(denoiser: Denoiser, name: Output = "squared_norm") -> TimestepFn:
    r"""Makes an output function of D-TRAK, by name.

    With d pixels, noise e and predicted noise p: "loss" mean (p - e)^2; "weighted_loss" the same
    times the weight of the variational bound, beta_t / (2 alpha_t (1 - alpha_bar_t));
    "squared_norm" mean p^2, D-TRAK's default; "mean" mean p, as DAS has it; "l1_norm" sum |p|;
    "l2_norm" |p|; "linf_norm" max |p|.

    Args:
      denoiser: the model.
      name: which.

    Returns:
      (params, example, key, timestep) -> scalar, for `ja.expectation`.

    Raises:
      ValueError: for an unknown name, or a schedule that is none.

    References:
      Zheng et al. (2024), D-TRAK, arXiv:2311.00500, Eq. 13 and Table 1.
    """
    _check_denoiser(denoiser)
    if name not in _OUTPUTS:
        raise ValueError(f"The output must be one of {', '.join(_OUTPUTS)}, got {name!r}.")
    function = _OUTPUTS[name]
    bound = _bound_weights(denoiser) if name == "weighted_loss" else np.ones(denoiser.steps)

    def of_timestep(params: Params, example: Example, key: Key, timestep: jax.Array) -> jax.Array:
        image = denoiser.clean(example)
        value = function(*_predicted(denoiser, params, example, image, key, timestep))
        return value * jnp.asarray(bound, value.dtype)[timestep]

    of_timestep.steps = denoiser.steps  # type: ignore[attr-defined]  # `ja.expectation` checks them
    return of_timestep


def journey(
    denoiser: Denoiser, *, steps: int, draws: int = 1, clip: float | None = 1.0
) -> Expectation:
    """Makes the loss along the trajectory of a generated image, Journey-TRAK's query side.

    At each step of the sampler its present guess of the clean image is mixed with fresh noise of
    that step's timestep. A query with a timestep that the model does not know is not finite.

    Args:
      denoiser: the model.
      steps: of the sampler.
      draws: of noise per step.
      clip: guesses are kept within -clip and clip, as in the published code; None for latents.

    Returns:
      (params, query, key) -> scalar, for `ja.journey_trak`. A query has, beside what conditions it,
      "trajectory", guesses of the clean image [steps, *image], and "timesteps", int [steps].

    Raises:
      TypeError: if the denoiser is none.
      ValueError: if clip is not above 0, or the schedule is none.

    References:
      Georgiev et al. (2023), arXiv:2312.06205; the single score is that of Zheng et al. (2024).
    """
    _check_denoiser(denoiser)
    steps = whole_number("steps", steps)
    if clip is not None and not real_number("clip", clip) > 0:
        raise ValueError(f"clip must be above 0, or None for latents, got {clip}.")

    def at_step(params: Params, example: Example, key: Key, step: jax.Array) -> jax.Array:
        trajectory, timesteps = _trajectory(example, steps)
        image = trajectory[step] if clip is None else jnp.clip(trajectory[step], -clip, clip)
        timestep = timesteps[step]
        value = _mse(*_predicted(denoiser, params, example, image, key, timestep))
        known = (timestep >= 0) & (timestep < denoiser.steps)
        return value * jnp.where(known, 1, jnp.nan)

    return expectation(at_step, timesteps=range(steps), draws=draws, steps=steps)


def error_profile(denoiser: Denoiser, *, timesteps: Iterable[int], draws: int = 1) -> OutputFn:
    r"""Makes the residual of DAS: how evenly the error is spread over timesteps.

    .. math:: r(n) = \frac{\tfrac1T \sum_t e_t(n)}{\sqrt{\sum_t e_t(n)^2}}, \quad
              e_t(n)^2 = \mathrm{mean}\, (\epsilon_\theta - \epsilon)^2

    as in the published code: errors of an example are scaled to unit norm over timesteps, so a
    large error does not by itself make a large residual. It lies between 1/T and 1/sqrt(T).

    Args:
      denoiser: the model.
      timesteps: at which errors are measured; the published code takes all of 1,000.
      draws: of noise per timestep.

    Returns:
      (params, example, key) -> scalar, for `ja.das`. Cost: a forward pass per draw.
    """
    if not isinstance(timesteps, Iterable):
        raise TypeError(
            "timesteps of an error profile are listed, since errors are compared over them, such "
            f"as range(0, steps, 100); got {brief(repr(timesteps))}."
        )
    squared = expectation(loss(denoiser), timesteps=timesteps, draws=draws)

    def of_example(params: Params, example: Example, key: Key) -> jax.Array:
        errors = squared.each(params, example, key)
        each = jnp.sqrt(errors.reshape(-1, squared.draws).mean(axis=1))  # [t]
        norm = jnp.linalg.norm(each)
        return each.mean() / jnp.where(norm == 0, 1, norm)

    return of_example


def _predicted(
    denoiser: Denoiser,
    params: Params,
    example: Example,
    image: jax.Array,
    key: Key,
    timestep: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Predicted noise, and the noise."""
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(
            f"images must be floats, scaled as the model's training data were, such as "
            f"image / 127.5 - 1; got {image.dtype}"
        )
    # Drawn in bfloat16 it would have 128 values, whose mean is not zero.
    noise = jax.random.normal(key, image.shape, scales.wide(image.dtype)).astype(image.dtype)
    noisy = denoiser.noisy(image, timestep, noise)
    predicted = denoiser.predict(params, noisy, timestep, example)
    if predicted.shape != noise.shape:
        raise ValueError(
            f"predict must return noise of the image's shape {list(noise.shape)}, got "
            f"{list(predicted.shape)}."
        )
    wide = scales.wide(predicted.dtype)
    return predicted.astype(wide), noise.astype(wide)


def _mse(predicted: jax.Array, noise: jax.Array) -> jax.Array:
    return jnp.mean((predicted - noise) ** 2)


def _l2(predicted: jax.Array, noise: jax.Array) -> jax.Array:
    squares = jnp.sum(predicted**2)
    # The inner `where` keeps the gradient of a prediction of zero finite.
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


_OUTPUTS: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "loss": _mse,
    "weighted_loss": _mse,
    "squared_norm": lambda predicted, noise: jnp.mean(predicted**2),
    "mean": lambda predicted, noise: jnp.mean(predicted),
    "l1_norm": lambda predicted, noise: jnp.sum(jnp.abs(predicted)),
    "l2_norm": _l2,
    "linf_norm": lambda predicted, noise: jnp.max(jnp.abs(predicted)),
}


def _bound_weights(denoiser: Denoiser) -> np.ndarray:
    alpha_bar = np.asarray(denoiser.alpha_bar, np.float64)
    if not ((alpha_bar > 0) & (alpha_bar < 1)).all():
        raise ValueError("The weights of the bound need an alpha_bar above 0 and below 1.")
    alpha = alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
    return (1 - alpha) / (2 * alpha * (1 - alpha_bar))


def _trajectory(example: Example, steps: int) -> tuple[jax.Array, jax.Array]:
    missing = [name for name in ("trajectory", "timesteps") if name not in example]
    if missing:
        raise ValueError(
            f"The query has no {' and no '.join(missing)}: Journey-TRAK needs a sampler that "
            'records its guess of the clean image at each step, "trajectory" [steps, *image], and '
            'the "timesteps" [steps].'
        )
    trajectory, timesteps = example["trajectory"], example["timesteps"]
    if len(trajectory) != steps or jnp.shape(timesteps) != (steps,):
        raise ValueError(
            f"The journey was made for {steps} steps; the query has a trajectory of "
            f"{len(trajectory)} and timesteps of shape {list(jnp.shape(timesteps))}."
        )
    return trajectory, timesteps


def _check_denoiser(denoiser: Any) -> None:
    if not isinstance(denoiser, Denoiser):
        raise TypeError(
            "denoiser must be a diffusion.Denoiser(predict, alpha_bar), got "
            f"{brief(repr(denoiser))}."
        )
    if np.asarray(denoiser.alpha_bar).dtype.kind not in "fiuV" or not np.size(denoiser.alpha_bar):
        raise TypeError(
            "alpha_bar must be an array [steps], the running product of 1 - beta, got "
            f"{brief(repr(denoiser.alpha_bar))}: Denoiser(predict, alpha_bar)."
        )
    alpha_bar = np.asarray(denoiser.alpha_bar, np.float64)
    inside = ((alpha_bar >= 0) & (alpha_bar <= 1)).all()
    if alpha_bar.ndim != 1 or not inside or (np.diff(alpha_bar) > 0).any():
        raise ValueError(
            "alpha_bar must be the share of the signal's variance at each timestep, the running "
            "product of 1 - beta: between 0 and 1, never rising, of shape [steps]. Got "
            f"{list(alpha_bar.shape)} and values from {alpha_bar.min():.3g} to "
            f"{alpha_bar.max():.3g}."
        )
