"""One checkpoint and the data to go over: what fitting a basis or a kernel works with."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr import identity
from jaxattr.features.bases import Drawn, Fitted
from jaxattr.features.featurizer import Featurizer
from jaxattr.inputs.traces import eagerly
from jaxattr.scales import exponent_of, scaled
from jaxattr.sharding import DATA, Placement, compiled, failing_together
from jaxattr.sources import Source, track
from jaxattr.typing import Batch, Features, Params


class NumberedBatch(NamedTuple):
    """Consecutive examples.

    Attributes:
      batch: a pytree of arrays [b, ...].
      ids: of the examples, int [b].
      real: which rows are examples and not padding, bool [b].
    """

    batch: Batch
    ids: jax.Array
    real: jax.Array


class CleanFeatures(NamedTuple):
    """Features of a batch; rows that do not count are zero.

    Attributes:
      features: float [b, p].
      residual: float [b].
      kept: which rows count, bool [b]: finite, and no padding.
      digests: of the examples as they were read, uint32 [b, k]; None if not asked for.
    """

    features: Features
    residual: jax.Array
    kept: jax.Array
    digests: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class TrainingPass:
    """A checkpoint and a data set.

    Attributes:
      featurizer: maps batches to features.
      params: the checkpoint.
      number: of the checkpoint.
      source: the data.
      block: examples per step.
      place: where examples go.
    """

    featurizer: Featurizer
    params: Params
    number: int
    source: Source
    block: int
    place: Placement = Placement()

    def batches(self, description: str, first: int = 0) -> Iterator[NumberedBatch]:
        """Yields all examples in order, with a progress bar.

        Args:
          description: for the progress bar.
          first: number of the first block that is wanted.
        """
        count = -(-self.source.size // self.block)
        described = f"{description}, checkpoint {self.number}"
        blocks = self.source.blocks(self.block, self.place, first)
        for block in track(blocks, described, count, first):
            positions = block.start + np.arange(self.block)
            yield NumberedBatch(block.batch, *self.place.batch(self._numbers, positions))

    def features(
        self,
        fitted: Fitted,
        description: str,
        transform: Callable[[NumberedBatch], NumberedBatch] | None = None,
        first: int = 0,
        digests: bool = False,
    ) -> Iterator[CleanFeatures]:
        """Yields the features of all examples, in order.

        Args:
          fitted: what was fitted to the checkpoint.
          description: for the progress bar.
          transform: applied to each batch first.
          first: number of the first block that is wanted.
          digests: whether those of the examples are wanted too.
        """
        drawn = self.featurizer.draw(self.number, fitted, self.place)
        for numbered in self.batches(description, first):
            given = numbered if transform is None else transform(numbered)
            clean = self._clean(given, drawn, fitted)
            if digests:
                clean = clean._replace(digests=row_digests(self.place)(numbered.batch))
            yield clean

    def anew(self, fitted: Fitted) -> Callable[[np.ndarray], CleanFeatures]:
        """Returns what computes the features of some examples, whenever they are asked for.

        Args:
          fitted: what was fitted to the checkpoint.

        Returns:
          (positions [b]) -> their features; those that are out of range do not count.
        """

        @functools.cache
        def draw() -> Drawn:
            """When they are first needed, and then kept: as arrays, in a user's `jit` as well."""
            with eagerly():
                return self.featurizer.draw(self.number, fitted, self.place)

        def compute(positions: np.ndarray) -> CleanFeatures:
            batch = self.place.batch(self._read, positions)
            numbered = NumberedBatch(batch, *self.place.batch(self._numbers, positions))
            return self._clean(numbered, draw(), fitted)

        return compute

    def sums(self, function: Callable[..., Any], blocks: Iterable[tuple]) -> Any:
        """Adds up what a function makes of blocks of examples.

        Each shard sums for itself; what they found is added once, at the end.

        Args:
          function: (shared, arrays [b, ...], ...) -> a pytree of sums over the examples; jittable,
            and compiled once for all calls with the same function.
          blocks: its arguments, block by block; at least one. `shared` is a pytree.

        Returns:
          The sums, the same on every device.
        """
        add = _compiled_sums(self.place, function)
        total = None
        with failing_together():
            for arguments in blocks:
                if total is None:
                    shapes = jax.eval_shape(self.place.per_shard(function), *arguments)
                    total = self.place.zeros(shapes, lambda path: (DATA,))
                total = add(total, *arguments)
        return self.place.sum_of_shards(total)

    def _clean(self, given: NumberedBatch, drawn: Drawn, fitted: Fitted) -> CleanFeatures:
        step = _compiled_features(self.place, self.featurizer.step)
        got = step(self.featurizer.key, self.params, given.batch, given.ids, drawn, fitted)
        # The features are written over in place: those of all parameters are large.
        clean = compiled(self.place, _cleaned, DATA, donate_argnums=0)
        return clean(got.features, got.residual, given.real)

    def _numbers(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return positions, (positions >= 0) & (positions < self.source.size)

    def _read(self, positions: np.ndarray) -> Batch:
        return self.source.read(positions.clip(0, self.source.size - 1))

    def of(self, source: Source) -> "TrainingPass":
        """The same checkpoint with other data."""
        block = source.block_size(self.block, self.place)
        return dataclasses.replace(self, source=source, block=block)


def typical_exponent(place: Placement, phi: Features, kept: jax.Array) -> int:
    """Returns a power of two by which squares of features keep within range.

    Args:
      place: the devices.
      phi: features of some examples [b, p].
      kept: which of them count, bool [b].

    Returns:
      The exponent of the largest feature of the median example; zeros do not count.
    """
    return int(np.asarray(compiled(place, _median_exponent)(phi, kept)))


def _median_exponent(phi: Features, kept: jax.Array) -> jax.Array:
    counted = kept & phi.any(axis=1)
    size = jnp.where(counted, exponent_of(phi, axis=1), jnp.iinfo(jnp.int32).max)
    middle = jnp.sort(size)[jnp.maximum(counted.sum() - 1, 0) // 2]
    return jnp.where(counted.any(), middle, 0)


def without_too_large(
    phi: Features, kept: jax.Array, exponent: jax.Array, n: int
) -> tuple[Features, jax.Array]:
    """Leaves out examples whose squares would not add up within range; jittable.

    Args:
      phi: features [b, p].
      kept: which count, bool [b].
      exponent: squares are taken of features over 2 to this power.
      n: number of examples.

    Returns:
      Features, zero for those that are left out; and which count.
    """
    squares = jnp.sum(scaled(phi, -exponent) ** 2, axis=1)
    kept = kept & (squares < jnp.finfo(phi.dtype).max / (4 * n))
    return jnp.where(kept[:, None], phi, 0), kept


@functools.lru_cache(maxsize=16)
def _compiled_features(place: Placement, step: Callable) -> Any:
    return step if place.mesh is None else place.jit(step, DATA)


@functools.lru_cache(maxsize=16)
def _compiled_sums(place: Placement, function: Callable) -> Any:
    def add(total: Any, *arguments: Any) -> Any:
        return jax.tree.map(jnp.add, total, place.per_shard(function)(*arguments))

    return place.jit(add, DATA, donate_argnums=0)


def row_digests(place: Placement) -> Any:
    """The compiled step (batch) -> digests of its examples, each device of its own.

    Args:
      place: the devices.
    """
    return compiled(place, identity.row_digests, DATA)


def _cleaned(phi: Features, residual: jax.Array, real: jax.Array) -> CleanFeatures:
    kept = jnp.isfinite(phi).all(axis=1) & jnp.isfinite(residual) & real
    return CleanFeatures(jnp.where(kept[:, None], phi, 0), jnp.where(kept, residual, 0), kept)
