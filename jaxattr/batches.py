"""Batches: pytrees of arrays with a common leading axis."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxattr.leaves import named_leaves
from jaxattr.typing import Batch, Example


def leading_size(batch: Batch) -> int:
    """Returns the size of the leading axis that all arrays of a batch share.

    Args:
      batch: a pytree of arrays [b, ...].

    Returns:
      b.

    Raises:
      ValueError: if there is no array, a scalar, or two arrays differ.
    """
    shapes = {name: jnp.shape(leaf) for name, leaf in named_leaves(batch).items()}
    scalars = [name for name, shape in shapes.items() if not shape]
    if scalars or len({shape[0] for shape in shapes.values() if shape}) != 1:
        raise ValueError(
            "All arrays of a data set need the same leading axis, one row per example. "
            f"Got shapes {shapes}."
        )
    return next(iter(shapes.values()))[0]


def shapes_of_one(batch: Batch) -> Example:
    """Returns the shapes of one example of a batch.

    Args:
      batch: a pytree of arrays or keys [b, ...].

    Returns:
      The pytree without its batch axis, as shapes.
    """
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)


class OneAtATimeWarning(UserWarning):
    """A function of one example is not batched, since JAX has no rule for an operation in it."""


def each_example(function: Callable[..., Any]) -> Callable[..., Any]:
    """Applies a function to each example: batched, or in a loop where JAX cannot batch it.

    Args:
      function: of arguments of one example.

    Returns:
      The function of arguments with a leading batch axis. It warns (`OneAtATimeWarning`) where it
      runs in a loop, which is slow.
    """

    def run(*arguments: Any) -> Any:
        try:
            return jax.vmap(function)(*arguments)
        except NotImplementedError as error:
            warnings.warn(
                f"Examples are computed one at a time, since JAX cannot batch them: {error}.",
                OneAtATimeWarning,
                stacklevel=2,
            )
        return jax.lax.map(lambda each: function(*each), arguments)

    return run


def in_microbatches(chunk: Callable[..., Any], size: int) -> Callable[..., Any]:
    """Runs a function of batched arguments a microbatch at a time.

    A last microbatch that is not full repeats the first examples; what belongs to those is cut off.

    Args:
      chunk: function of arguments with a leading batch axis.
      size: largest number of examples at once.

    Returns:
      The same function, of any number of examples.
    """

    def run(*arguments: Any) -> Any:
        b = jax.tree.leaves(arguments)[0].shape[0]
        if b <= size:
            # Not a loop of one step: XLA runs the convolutions of a loop on one CPU core.
            return chunk(*arguments)
        fitted = math.ceil(b / math.ceil(b / size))  # evens the microbatches out: least padding
        padding = -b % fitted
        rows = jnp.arange(b + padding) % b
        padded = jax.tree.map(lambda x: x[rows] if padding else x, arguments)
        mapped = optax.microbatching.microbatch(
            chunk,
            argnums=tuple(range(len(arguments))),
            microbatch_size=fitted,
            accumulator=optax.microbatching.AccumulationType.CONCAT,
        )
        return jax.tree.map(lambda x: x[:b], mapped(*padded))

    return run
