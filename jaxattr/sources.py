"""Data sets as the user has them, read in blocks of one static size."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich import console as rich_console
from rich import progress as rich_progress
from rich.text import Text

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
        `__getitem__` that is no mapping, list, tuple or array. A list of numbers, or of such lists,
        is an array; any other list or tuple is a pytree.
      role: what the data are, for messages: "train" or "queries".

    Returns:
      The source.

    Raises:
      ValueError: if there are no examples, arrays differ in their leading axis, or are spread over
        processes; from `read`, if examples differ in their shapes.
    """
    containers = (Mapping, list, tuple, np.ndarray, jax.Array)
    if isinstance(data, RandomAccess) and not isinstance(data, containers):
        source = Source(len(data), _Reader(data))
    else:
        arrays = _as_arrays(data)
        if not jax.tree.leaves(arrays):
            raise ValueError(f"{role} is empty: got a pytree without arrays.")
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

    The bar says how fast it goes and how long the rest will take.

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
    bar = rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        _Rate(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("left"),
        console=console,
        transient=True,
    )
    with bar:
        yield from bar.track(blocks, total=total, completed=done, description=description)


class _Rate(rich_progress.ProgressColumn):
    """How many are done per second, or how many seconds each takes."""

    def render(self, task: rich_progress.Task) -> Text:
        """Returns what the column shows."""
        speed = task.speed or 0
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


class _Reader:
    """Reads rows of a random-access source; all need the shapes of the first that was read."""

    def __init__(self, data: RandomAccess) -> None:
        self.data = data
        self.first: tuple[int, Example] | None = None

    def __call__(self, rows: np.ndarray) -> Batch:
        """Returns the examples at some positions, stacked."""
        examples = [_as_arrays(self.data[row]) for row in rows.tolist()]
        self.first = self.first or (rows.tolist()[0], examples[0])
        for row, example in zip(rows.tolist(), examples, strict=True):
            if _shapes(example) != _shapes(self.first[1]):
                known, found = (jax.tree.map(jnp.shape, x) for x in (self.first[1], example))
                raise ValueError(
                    "All examples need the same arrays with the same shapes. Example "
                    f"{self.first[0]} has shapes {known}, example {row} has shapes {found}. If "
                    "they are sequences of different lengths, pad them to one length, and keep the "
                    "padding out of the loss with a mask."
                )
        return jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *examples)


def _shapes(example: Example) -> tuple[Any, list[tuple[int, ...]]]:
    leaves, structure = jax.tree.flatten(example)
    return structure, [leaf.shape for leaf in leaves]


def _as_arrays(tree: Any) -> Any:
    # An empty list stays what it is to JAX: a pytree of nothing.
    return jax.tree.map(_as_array, tree, is_leaf=lambda x: _is_list_of_numbers(x) and len(x) > 0)


def _is_list_of_numbers(node: Any) -> bool:
    numbers = bool | int | float | complex | np.generic
    return isinstance(node, list) and all(
        isinstance(each, numbers) or _is_list_of_numbers(each) for each in node
    )


def _as_array(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if not leaf.is_fully_replicated:
            raise ValueError(
                f"The data hold an array {list(leaf.shape)} that is spread over several processes, "
                "of which each can read a part. Pass what every process can read, as NumPy arrays "
                "or a source with __len__ and __getitem__: each then reads its own rows alone. "
                "jax.experimental.multihost_utils.process_allgather(array, tiled=True) makes one."
            )
        return np.asarray(leaf)
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return leaf
    try:
        return np.asarray(leaf)
    except ValueError:
        shapes = [np.shape(_as_array(row)) for row in leaf]
        raise ValueError(
            "Lists of numbers in a list are its rows, in a data set one per example, and need the "
            f"same shape; got shapes {shapes[:10]}. If they are sequences of different lengths, "
            "pad them to one length, and keep the padding out of the loss with a mask."
        ) from None
