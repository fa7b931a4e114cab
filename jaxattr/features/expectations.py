"""Losses that are means over timesteps and noise, evaluated one draw at a time.

The draws of an example depend on the run's key, its id, the timestep and the number of the draw
alone: not on the batch that it is in, nor on what other timesteps there are.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattr import identity
from jaxattr.counts import whole_number
from jaxattr.inputs.outputs import check_function
from jaxattr.keys import key_or_default
from jaxattr.typing import Batch, Example, Key, OutputFn, Params

TimestepFn = Callable[[Params, Example, Key, jax.Array], jax.Array]
"""(params, example, key, timestep) -> float scalar, of one example; its noise is of the key."""

Timesteps = tuple[int, ...] | Callable[[Key], jax.Array]


class Draws(NamedTuple):
    """What the draws of one example are made from, each [j]; of a batch, [j, b].

    Attributes:
      timesteps: integers.
      keys: for the noise.
    """

    timesteps: jax.Array
    keys: jax.Array


@dataclasses.dataclass(frozen=True)
class Expectation:
    """The mean of a loss over timesteps and draws of noise. Made by `expectation`.

    Attributes:
      loss: of one example at one timestep.
      timesteps: over which the mean is taken; or what draws one from a key.
      draws: per timestep; or in all, where timesteps are drawn.
      unit_norm: whether the gradient of each draw gets unit norm before the mean is taken.
    """

    loss: TimestepFn = identity.function("params", "example", "key", "timestep")
    timesteps: Timesteps = identity.function("key")
    draws: int = 1
    unit_norm: bool = False

    def __call__(self, params: Params, example: Example, key: Key) -> jax.Array:
        """Computes the mean, one draw after the other.

        Args:
          params: the parameters.
          example: ONE example.
          key: the example's.

        Returns:
          A scalar. Its gradient keeps nothing of a draw but its inputs.
        """
        return jnp.mean(self.each(params, example, key))

    def each(self, params: Params, example: Example, key: Key) -> jax.Array:
        """Computes the loss of each draw, one after the other; arguments as in a call.

        Returns:
          Float [j], the draws of a timestep side by side.
        """

        @jax.checkpoint
        def of_draw(draw: Draws) -> jax.Array:
            return self.loss(params, example, draw.keys, draw.timesteps)

        return jax.lax.map(of_draw, self.draw(key))

    @property
    def count(self) -> int:
        """Number of draws j per example."""
        return self.draws if callable(self.timesteps) else self.draws * len(self.timesteps)

    def draw(self, key: Key) -> Draws:
        """Makes the timesteps and keys of all draws of an example.

        Args:
          key: the example's.
        """
        numbers = jnp.arange(self.draws)
        if callable(self.timesteps):
            pairs = jax.vmap(lambda j: jax.random.split(jax.random.fold_in(key, j)))(numbers)
            return Draws(jax.vmap(self.timesteps)(pairs[:, 0]), pairs[:, 1])
        timesteps = jnp.repeat(jnp.asarray(self.timesteps), self.draws)  # [j]
        numbers = jnp.tile(numbers, len(self.timesteps))

        def key_of(timestep: jax.Array, number: jax.Array) -> Key:
            return jax.random.fold_in(jax.random.fold_in(key, timestep), number)

        return Draws(timesteps, jax.vmap(key_of)(timesteps, numbers))


def expectation(
    loss: TimestepFn,
    *,
    timesteps: Iterable[int] | Callable[[Key], jax.Array],
    draws: int = 1,
    steps: int | None = None,
    unit_norm: bool = False,
) -> Expectation:
    r"""Makes a loss of one example from a loss of one example at one timestep, for any method.

    .. math:: f(x) = \tfrac1J \sum_{t, i} \ell(x, t, \epsilon_{t, i})

    The features of a batch are summed over draws under `lax.scan`, so memory does not grow with
    their number, and factored gradients stay factored.

    Guarantees: exact for these timesteps and draws; an unbiased estimate of the mean over all noise
    (and over all timesteps, where they are drawn). Features do not depend on the batch.
    Cost: a gradient per draw.

    Args:
      loss: (params, example, key, timestep) -> scalar, that draws its noise from `key`; the
        functions of `ja.diffusion`, or yours.
      timesteps: integers; or a function of a key that draws one, such as
        `lambda key: jax.random.randint(key, (), 0, 1000)`.
      draws: of noise per timestep; or, where timesteps are drawn, in all.
      steps: timesteps that the model knows, 0 to steps - 1. Default: what the loss knows, as those
        of `ja.diffusion` do.
      unit_norm: scales the gradient of each draw, all groups together, to unit norm after its
        projection, so that no timestep dominates (Lin et al. 2025; Xie et al. 2024). The features
        are then no gradient of the mean.

    Returns:
      (params, example, key) -> scalar.

    Raises:
      TypeError: if the loss takes other arguments.
      ValueError: if there is no timestep or no draw, or a timestep is out of range or given twice.

    Example:
      >>> def loss(params, example, key, timestep):
      ...     return params["w"] * example * timestep
      >>> mean = expectation(loss, timesteps=[1, 2, 3])
      >>> float(mean({"w": jnp.array(2.0)}, jnp.array(1.0), jax.random.key(0)))
      4.0
    """
    check_function(loss, "loss", ("params", "example", "key", "timestep"))
    known = getattr(loss, "steps", None) if steps is None else steps
    draws = whole_number("draws", draws)
    if callable(timesteps):
        _check_drawn(timesteps, known)
        return Expectation(loss, timesteps, draws, unit_norm)
    if not isinstance(timesteps, Iterable):
        raise TypeError(f"timesteps must be whole numbers, such as [{timesteps}], got one.")
    listed = tuple(whole_number("each of timesteps", each, least=None) for each in timesteps)
    _check_timesteps(listed, known)
    return Expectation(loss, listed, draws, unit_norm)


def at_one_draw(output: OutputFn, example: Example) -> tuple[OutputFn, Example]:
    """Returns the function of a single draw, and what it takes as an example.

    Args:
      output: any output function.
      example: ONE example, or its shapes.

    Returns:
      Both as they are if the function is no expectation; else (params, (example, timestep), key) ->
      the loss at that timestep, and (example, shape of a timestep).
    """
    if not isinstance(output, Expectation):
        return output, example
    loss = output.loss

    def of_draw(params: Params, example: Example, key: Key) -> jax.Array:
        example, timestep = example
        return loss(params, example, key, timestep)

    timestep = jax.ShapeDtypeStruct((), jax.dtypes.canonicalize_dtype(int))
    return of_draw, (example, timestep)


def has_unit_norm(output: OutputFn) -> bool:
    """Returns whether the gradient of each draw gets unit norm."""
    return isinstance(output, Expectation) and output.unit_norm


def number_of_draws(output: OutputFn) -> int:
    """Returns how many draws of each example there are; one of an output that is no expectation."""
    return output.count if isinstance(output, Expectation) else 1


def sum_over_draws(
    output: OutputFn, batch: Batch, keys: Key, function: Callable[[OutputFn, Batch, Key], Any]
) -> Any:
    """Adds up what a function makes of one draw of every example, one draw after the other.

    Args:
      output: any output function; one that is no expectation is a single draw.
      batch: a pytree of arrays [b, ...].
      keys: of the examples, [b].
      function: (output of one draw, its batch, its keys) -> a pytree.

    Returns:
      The sum over the draws.
    """
    if not isinstance(output, Expectation):
        return function(output, batch, keys)
    of_draw, _ = at_one_draw(output, batch)

    def at(draw: Draws) -> Any:
        return function(of_draw, (batch, draw.timesteps), draw.keys)

    draws = jax.vmap(output.draw, out_axes=1)(keys)  # [j, b]
    first = jax.tree.map(lambda x: x[0], draws)
    if output.count == 1:
        return at(first)

    def add(total: Any, draw: Draws) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, at(draw)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(at, first))
    return jax.lax.scan(add, zeros, draws)[0]


def refuse_unit_norm(output: OutputFn, what: str) -> None:
    """Raises where a gradient is asked for, and unit norm per draw makes features none.

    Args:
      output: any output function.
      what: asks.
    """
    if has_unit_norm(output):
        raise ValueError(
            f"{what} needs features that are gradients, and those of an expectation with "
            "unit_norm=True are not: leave unit_norm out."
        )


def _check_drawn(timesteps: Callable[[Key], jax.Array], steps: int | None) -> None:
    """Looks at a few hundred timesteps as a function draws them."""
    drawn = jax.vmap(timesteps)(jax.random.split(key_or_default(None), 256))
    if drawn.shape != (256,) or not jnp.issubdtype(drawn.dtype, jnp.integer):
        raise ValueError(
            f"timesteps must draw one integer from a key, got {drawn.dtype}{list(drawn.shape[1:])}."
        )
    _check_range([int(drawn.min()), int(drawn.max())], steps)


def _check_timesteps(timesteps: tuple[int, ...], steps: int | None) -> None:
    if not timesteps:
        raise ValueError("timesteps is empty: an expectation needs at least one.")
    _check_range(timesteps, steps)
    if len(set(timesteps)) < len(timesteps):
        raise ValueError(
            f"A timestep is given twice in {list(timesteps)}: its noise would be the same both "
            "times. Use draws= for more noise per timestep."
        )


def _check_range(timesteps: Sequence[int], steps: int | None) -> None:
    wrong = [t for t in timesteps if t < 0 or (steps is not None and t >= steps)]
    if wrong:
        known = "0 and up" if steps is None else f"0 to {steps - 1}"
        raise ValueError(
            f"Timestep {wrong[0]} is out of range: the model knows {known}. Where JAX reads past "
            "the end of a noise schedule it takes the last entry without a word."
        )
