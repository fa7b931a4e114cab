"""Names for the roles that arrays and functions play, and the protocols that users implement.

Axis letters, the same in every module: b example, q query, n training example, m group,
p feature, c checkpoint, t token, i input, o output, k top.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import jax

Params: TypeAlias = Any
"""A pytree of floating-point parameter arrays."""

Example: TypeAlias = Any
"""A pytree of arrays: ONE example, without a batch axis."""

Batch: TypeAlias = Any
"""A pytree of arrays that share a leading batch axis."""

Key: TypeAlias = jax.Array
"""A typed PRNG key, as `jax.random.key` makes it."""

Features: TypeAlias = jax.Array
"""Per-example features, float [b, p]: one contiguous slice of columns per group."""

Link: TypeAlias = Literal["identity", "square"]
"""What is done to a weighted sum of contributions to make it a score."""

GroupWeights: TypeAlias = Mapping[str, Any]
"""One non-negative scalar per group name; all ones is the unweighted method."""


@runtime_checkable
class LearnedWeights(Protocol):
    """What `ja.learn_weights` returns: it holds weights among other things."""

    @property
    def weights(self) -> GroupWeights:
        """The weights."""
        ...


Weights: TypeAlias = GroupWeights | LearnedWeights
"""Weights, or what `ja.learn_weights` returned."""


class OutputFn(Protocol):
    """A scalar function of one example, such as a loss or a margin."""

    def __call__(self, params: Params, example: Example, key: Key) -> jax.Array:
        """Returns a float scalar, SUMMED over the example's tokens or pixels."""
        ...


@runtime_checkable
class RandomAccess(Protocol):
    """A data set read one example at a time, such as a grain `RandomAccessDataSource`."""

    def __len__(self) -> int:
        """Returns the number of examples."""
        ...

    def __getitem__(self, index: int) -> Example:
        """Returns the example at `index`, a pytree without a batch axis."""
        ...
