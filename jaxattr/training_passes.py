"""One checkpoint and the data to go over: what fitting a basis or a kernel works with."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.bases import Fitted
from jaxattr.features import Featurizer, leading_size
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
      finite: which examples have finite features, bool [b].
      kept: which rows count, bool [b]: finite, and no padding.
    """

    features: Features
    residual: jax.Array
    finite: jax.Array
    kept: jax.Array


@dataclasses.dataclass(frozen=True)
class TrainingPass:
    """A checkpoint and a data set.

    Attributes:
      featurizer: maps batches to features.
      params: the checkpoint.
      number: of the checkpoint.
      source: the data.
      batch_size: examples per step.
    """

    featurizer: Featurizer
    params: Params
    number: int
    source: Source
    batch_size: int

    def batches(self, description: str) -> Iterator[NumberedBatch]:
        """Yields all examples in order, with a progress bar."""
        count = -(-self.source.size // self.batch_size)
        described = f"{description}, checkpoint {self.number}"
        for block in track(self.source.blocks(self.batch_size), described, count):
            rows = jnp.arange(leading_size(block.batch))
            yield NumberedBatch(block.batch, block.start + rows, rows < block.real)

    def features(
        self,
        fitted: Fitted,
        description: str,
        transform: Callable[[NumberedBatch], NumberedBatch] | None = None,
    ) -> Iterator[tuple[NumberedBatch, CleanFeatures]]:
        """Yields all examples in order, with their features.

        Args:
          fitted: what was fitted to the checkpoint.
          description: for the progress bar.
          transform: applied to each batch first.
        """
        number = jnp.asarray(self.number)
        for numbered in self.batches(description):
            given = numbered if transform is None else transform(numbered)
            got = self.featurizer.with_residual(self.params, given.batch, given.ids, number, fitted)
            yield numbered, _clean(got.features, got.residual, given.real)

    def of(self, source: Source) -> "TrainingPass":
        """The same checkpoint with other data."""
        return dataclasses.replace(self, source=source)

    def whole(self) -> NumberedBatch:
        """All examples at once."""
        rows = np.arange(self.source.size)
        ids = jnp.asarray(rows)
        return NumberedBatch(self.source.read(rows), ids, jnp.ones(len(rows), bool))


@jax.jit
def _clean(phi: Features, residual: jax.Array, real: jax.Array) -> CleanFeatures:
    finite = jnp.isfinite(phi).all(axis=1) & jnp.isfinite(residual)
    kept = finite & real
    return CleanFeatures(
        jnp.where(kept[:, None], phi, 0), jnp.where(finite, residual, 0), finite, kept
    )
