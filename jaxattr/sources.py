"""Data sets as the user has them, read in blocks of one static size."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich import console as rich_console
from rich import progress as rich_progress
from rich.text import Text

from jaxattr.inputs.arrays import as_arrays, check_shapes, of_kind, stack
from jaxattr.inputs.data import Accepts, as_data, is_source, one_row
from jaxattr.sharding import Placement, split_rows
from jaxattr.typing import Batch, Example, RandomAccess


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
      arrays: the data, where all of it is in memory, so that reading costs next to nothing.
    """

    size: int
    read: Callable[[np.ndarray], Batch]
    arrays: Batch | None = None

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

    def part(self, positions: Sequence[int] | np.ndarray) -> "Source":
        """Returns chosen examples as a source, whose positions begin at 0."""
        chosen = np.asarray(positions)
        return Source(len(chosen), lambda rows: self.read(chosen[rows]))

    def block_size(self, wanted: int, place: Placement) -> int:
        """Returns the examples per block: as wanted or fewer, rounded up to divide over shards."""
        return split_rows(min(wanted, self.size), place)

    @property
    def example(self) -> Example:
        """The shapes of one example, without a batch axis."""
        some = self.read(np.zeros(1, np.int64)) if self.arrays is None else self.arrays
        return jax.tree.map(one_row, some)


def _rows_of(arrays: Batch, rows: np.ndarray) -> Batch:
    """Rows of arrays, where these are: on the host, or on devices in a program each."""
    return jax.tree.map(lambda x: _taken(x, rows) if isinstance(x, jax.Array) else x[rows], arrays)


@jax.jit
def _taken(x: jax.Array, rows: jax.Array) -> jax.Array:
    return x[rows]


def as_source(data: Any, role: str, accepts: Accepts | None = None) -> Source:
    """Reads a data set from arrays, from a list of examples or from a random-access source.

    Args:
      data: a pytree of arrays with a common leading axis; a list of examples; or an object with
        `__len__` and `__getitem__`. A list of numbers, or of such lists, is an array.
      role: what the data are, for messages: "train" or "queries".
      accepts: whether the function that they are for takes an example of some shapes.

    Returns:
      The source.

    Raises:
      TypeError: if it is no data set.
      ValueError: if there are no examples, arrays differ in their leading axis, hold no numbers, or
        are spread over processes; from `read`, if examples differ in their shapes, or the first is
        another when it is read again.
    """
    found = as_data(data, role, accepts)
    if is_source(found):
        return Source(len(found), _Reader(found, role))
    size = jnp.shape(jax.tree.leaves(found)[0])[0]
    return Source(size, functools.partial(_rows_of, found), found)


def announce(text: str) -> None:
    """Says something on a terminal's standard error."""
    console = rich_console.Console(stderr=True)
    if console.is_terminal:
        console.print(text, highlight=False, markup=False)


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
    """Reads rows of a random-access source; all need the shapes and the types of the first."""

    def __init__(self, data: RandomAccess, role: str) -> None:
        self.data, self.role = data, role
        self.first: Example | None = None

    def __call__(self, rows: np.ndarray) -> Batch:
        """Returns the examples at some positions, stacked."""
        if self.first is None:
            self.first = self._example(0)
        numbers, first = rows.tolist(), self.first
        examples = [self._example(row) for row in numbers]
        check_shapes(examples, numbers, (0, first), self.role)
        pairs = list(zip(numbers, examples, strict=True))
        if any(number == 0 and _differ(first, each) for number, each in pairs):
            raise ValueError(
                f"{self.role} gives another example 0 each time that it is read. A source must "
                "return the same example whenever it is asked for it: no shuffling, no random "
                "augmentation."
            )
        of_one_type = [of_kind(example, number, first, self.role) for number, example in pairs]
        return jax.tree.map(stack, *of_one_type)

    def _example(self, row: int) -> Example:
        try:
            example = self.data[row]
        except Exception as error:
            error.add_note(f"Raised by example {row} of {self.role}.")
            raise
        found = as_arrays(example, f"example {row} of {self.role}")
        # Copied, since a source may fill the same array each time.
        return jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, found)


def _differ(example: Example, other: Example) -> bool:
    """Whether two examples of the same shapes differ in a bit, of what NumPy has."""
    pairs = zip(jax.tree.leaves(example), jax.tree.leaves(other), strict=True)
    known = [(a, b) for a, b in pairs if not jnp.issubdtype(a.dtype, jax.dtypes.extended)]
    return any(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in known)
