"""Digests of arrays by all of their bits, computed on the device that holds them.

Every 32-bit word is mixed with its position, and the results are added modulo 2^32, in several
lanes. Sums do not depend on how an array is sharded, and each host adds its own part, so nothing is
gathered. Mixing is not linear, so changes of one word do not cancel against those of another (two
flipped signs, a factor of two). This finds accidents; it is no defence against forgery.
"""

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.typing import Batch

LANES = 2
"""32-bit words of the digest of one row of one array."""

_LANES_OF_ARRAY = 4
_GOLDEN = 0x9E3779B9


def digest_of(x: Any) -> str:
    """Returns 128 bits of an array's content, with its dtype and shape.

    Args:
      x: an array of any dtype that JAX has, on host or devices, PRNG keys included; or a scalar.

    Returns:
      32 hexadecimal digits.
    """
    return digests_of_leaves([x])[0]


def digests_of_leaves(leaves: list[Any]) -> list[str]:
    """The digest of each of several arrays; see `digest_of`.

    Args:
      leaves: arrays.

    Returns:
      One digest each. Cost: one pass over the arrays, in one program.
    """
    arrays = [_as_array(leaf) for leaf in leaves]
    together: dict[Any, list[int]] = {}
    for number, x in enumerate(arrays):
        devices = frozenset(x.devices()) if isinstance(x, jax.Array) else None
        together.setdefault(devices, []).append(number)
    found: dict[int, np.ndarray] = {}
    for numbers in together.values():
        lanes = _lanes_of_all([arrays[number] for number in numbers])
        found |= dict(zip(numbers, map(np.asarray, lanes), strict=True))
    return [_named(x, found[number]) for number, x in enumerate(arrays)]


def row_digests(batch: Batch) -> jax.Array:
    """Digests of each example of a batch, 64 bits for each array of it; jittable.

    Args:
      batch: a pytree of arrays [b, ...].

    Returns:
      uint32 [b, arrays * LANES], never zero. Dtypes and shapes are not in it.
    """
    columns = []
    for leaf in jax.tree.leaves(batch):
        words = _words(leaf)
        words = words.reshape(words.shape[0], math.prod(words.shape[1:]))
        # Zero is what an array holds where nothing was written.
        columns += [jnp.maximum(lane, 1) for lane in _lanes(words, (1,), LANES)]
    return jnp.stack(columns, axis=1)


def sum_of_rows(digests: jax.Array, ids: jax.Array, kept: jax.Array) -> jax.Array:
    """One digest of many rows, that depends on their ids and not on how they are cut into batches.

    Args:
      digests: of rows, uint32 [b, k], as `row_digests` returns them.
      ids: of the rows, integers [b].
      kept: which rows count, bool [b].

    Returns:
      uint32 [k]; those of several batches are added.
    """
    position = mixed(ids.astype(jnp.uint32) * jnp.uint32(_GOLDEN))[:, None]
    counted = jnp.where(kept[:, None], mixed(digests ^ position), 0)
    return counted.sum(axis=0, dtype=jnp.uint32)


def _as_array(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return leaf
    value = np.asarray(leaf)
    if value.dtype.hasobject or value.dtype.kind in "USmM":
        raise TypeError(f"Only arrays of numbers have a digest, got dtype {value.dtype}.")
    # As JAX would take it, so that a parameter is the same on the host and on a device.
    return value.astype(jax.dtypes.canonicalize_dtype(value.dtype), copy=False)


def _named(x: Any, lanes: np.ndarray) -> str:
    head = f"{x.dtype} {list(jnp.shape(x))}"
    return hashlib.sha256(head.encode() + lanes.astype("<u4").tobytes()).hexdigest()[:32]


def _words(x: Any) -> jax.Array:
    """The bits of an array as 32-bit words, in its shape, or with one more axis at the end."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x)
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    bits = (jnp.finfo if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo)(x.dtype).bits
    if bits >= 32:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    narrow = {16: jnp.uint16, 8: jnp.uint8, 4: jnp.uint4, 2: jnp.uint2}[bits]
    return jax.lax.bitcast_convert_type(x, narrow).astype(jnp.uint32)


def _lanes(words: jax.Array, axes: tuple[int, ...], count: int) -> list[jax.Array]:
    """Sums of mixed words over some axes, several of them with other mixing."""
    position = jnp.zeros([words.shape[axis] if axis in axes else 1 for axis in range(words.ndim)])
    position = position.astype(jnp.uint32)
    for axis in axes:
        index = jax.lax.broadcasted_iota(jnp.uint32, position.shape, axis)
        position = mixed(position * jnp.uint32(31) + index + jnp.uint32(_GOLDEN))
    word = mixed(words ^ position)
    lanes = [word.sum(axis=axes, dtype=jnp.uint32)]
    for _ in range(count - 1):
        word = mixed(word + jnp.uint32(_GOLDEN))
        lanes.append(word.sum(axis=axes, dtype=jnp.uint32))
    return lanes


def mixed(x: jax.Array) -> jax.Array:
    """A good permutation of 32-bit words: each bit of the input moves half of the output's.

    Args:
      x: uint32.
    """
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


@jax.jit
def _lanes_of_all(arrays: list[jax.Array]) -> list[jax.Array]:
    words = [_words(x) for x in arrays]
    return [jnp.stack(_lanes(x, tuple(range(x.ndim)), _LANES_OF_ARRAY)) for x in words]
