"""Data sets as the user has them, read in blocks of one static size."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich import console as rich_console
from rich import progress as rich_progress

from jaxattr.batches import leading_size
from jaxattr.sharding import Placement, split_rows
from jaxattr.typing import Batch, Example, Params, RandomAccess


class Block(NamedTuple):
    """Consecutive examples; a last block that is not full repeats the last example.

    Attributes:
      batch: a pytree of arrays [b, ...].
      start: position of the first example.
      real: how many of the b examples are real, the first ones.
    """

    batch: Batch
    start: int
    real: int


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set of known size that can be read anywhere.

    Attributes:
      size: number of examples, at least one.
      read: positions -> a batch.
      in_memory: whether all of it is in memory, so that reading costs next to nothing.
    """

    size: int
    read: Callable[[np.ndarray], Batch]
    in_memory: bool = False

    def blocks(self, size: int, place: Placement, first: int = 0) -> Iterator[Block]:
        """Yields blocks of `size` examples.

        Args:
          size: examples per block, a multiple of the shards.
          place: where they go; each host reads its own part.
          first: number of the first block that is wanted.
        """
        for start in range(first * size, self.size, size):
            rows = np.minimum(np.arange(start, start + size), self.size - 1)
            yield Block(place.batch(self.read, rows), start, min(size, self.size - start))

    def block_size(self, wanted: int, place: Placement) -> int:
        """Returns the examples per block: as wanted or fewer, rounded up to divide over shards."""
        return split_rows(min(wanted, self.size), place)

    @property
    def example(self) -> Example:
        """The shapes of one example, without a batch axis."""
        first = self.read(np.zeros(1, np.int64))

        def one(x: Any) -> jax.ShapeDtypeStruct:
            # NumPy's int64 is what JAX takes for int32, unless told otherwise.
            return jax.ShapeDtypeStruct(jnp.shape(x)[1:], jax.dtypes.canonicalize_dtype(x.dtype))

        return jax.tree.map(one, first)


def as_source(data: Any, role: str) -> Source:
    """Reads a data set from arrays or from a random-access source.

    Args:
      data: a pytree of arrays with a common leading axis; or an object with `__len__` and
        `__getitem__` that is no mapping, list, tuple or array.
      role: what the data are, for messages: "train" or "queries".

    Returns:
      The source.

    Raises:
      ValueError: if there are no examples, or arrays differ in their leading axis.
    """
    containers = (Mapping, list, tuple, np.ndarray, jax.Array)
    if isinstance(data, RandomAccess) and not isinstance(data, containers):
        source = Source(len(data), lambda rows: _stack([data[int(row)] for row in rows]))
    else:
        if not jax.tree.leaves(data):
            raise ValueError(f"{role} is empty: got a pytree without arrays.")
        arrays = jax.tree.map(_as_array, data)
        size = leading_size(arrays)
        source = Source(size, lambda rows: jax.tree.map(lambda x: x[rows], arrays), in_memory=True)
    if source.size == 0:
        raise ValueError(f"{role} is empty: it has no examples, and at least one is needed.")
    return source


def as_checkpoints(checkpoints: Params | Sequence[Params]) -> tuple[Params, ...]:
    """Returns one or several params pytrees as a tuple.

    Args:
      checkpoints: as in `build_index`.

    Raises:
      ValueError: if there are none, or they differ in structure or shapes.
    """
    several = isinstance(checkpoints, list | tuple)
    parameters = tuple(checkpoints) if several else (checkpoints,)
    if not parameters:
        raise ValueError("checkpoints is empty: pass one params pytree, or a list of them.")
    expected = jax.tree.map(jnp.shape, parameters[0])
    for number, params in enumerate(parameters):
        found = jax.tree.map(jnp.shape, params)
        if found != expected:
            raise ValueError(
                f"Checkpoint {number} differs from checkpoint 0 in its tree or shapes: got "
                f"{found}, needed {expected}. If your params are themselves a list or tuple, pass "
                "[params]."
            )
    return parameters


def track(
    blocks: Sequence[Any] | Iterator[Any], description: str, total: int, done: int = 0
) -> Iterator[Any]:
    """Passes an iterator through, with a progress bar on a terminal's standard error.

    Args:
      blocks: what to iterate over.
      description: what is being done.
      total: how many there are.
      done: how many of them were done before.

    Yields:
      The items.
    """
    console = rich_console.Console(stderr=True)
    if total < 2 or not console.is_terminal:
        yield from blocks
        return
    yield from rich_progress.track(
        blocks, description, total=total, completed=done, console=console, transient=True
    )


def _as_array(leaf: Any) -> Any:
    return leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else np.asarray(leaf)


def _stack(examples: list[Example]) -> Batch:
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *examples)
