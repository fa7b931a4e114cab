"""Random signs that depend on a key and a name alone, drawn on the host and kept as packed bits.

Generators are what takes longest to compile in a program of features. Signs that serve all batches
are drawn once for each checkpoint, by NumPy, whose streams are the same on every machine; a random
word serves 32 of them.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.inputs.traces import eagerly
from jaxattr.typing import Key


def seed_of(key: Key, checkpoint: int) -> bytes:
    """Returns what the projections of a checkpoint are drawn from.

    Args:
      key: the run's key; not traced.
      checkpoint: its number; not traced.

    Raises:
      TypeError: if the key is traced.
    """
    if isinstance(key, jax.core.Tracer):
        raise TypeError(
            "Projections are drawn on the host, and got a traced key: make the featurizer outside "
            "of jax.jit, with a key that is an array."
        )
    with eagerly():
        data = np.asarray(jax.random.key_data(key))
    return data.astype("<u4").tobytes() + checkpoint.to_bytes(8, "little")


def words_of(columns: int) -> int:
    """Returns the number of words that hold a row of so many signs."""
    return -(-columns // 32)


def packed(seed: bytes, name: str, rows: int, columns: int) -> np.ndarray:
    """Draws signs as bits, 32 to a word.

    Args:
      seed: of `seed_of`.
      name: what they are for; other names get other signs.
      rows: how many.
      columns: signs per row.

    Returns:
      uint32 [rows, words_of(columns)].
    """
    width = words_of(columns)
    raw = _words(seed, name, -(-rows * width // 2))
    return raw.view("<u4")[: rows * width].reshape(rows, width).astype(np.uint32)


def scaled_signs(seed: bytes, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Draws signs over the root of their number per row.

    Args:
      seed: of `seed_of`.
      name: what they are for.
      shape: [..., columns].
      dtype: of the result.

    Returns:
      Entries in {-1, 1} / sqrt(columns).
    """
    columns = shape[-1]
    words = packed(seed, name, math.prod(shape[:-1]), columns)
    bits = np.unpackbits(words.astype("<u4").view(np.uint8), axis=1, bitorder="little")
    size = np.asarray(1 / math.sqrt(columns), dtype)
    return np.where(bits[:, :columns], -size, size).reshape(shape)


def unpacked(words: jax.Array, columns: int, dtype: Any) -> jax.Array:
    """Returns signs; jittable.

    Args:
      words: uint32 [rows, words_of(columns)].
      columns: signs per row.
      dtype: of the result.

    Returns:
      [rows, columns], 1 where a bit is not set and -1 where it is.
    """
    shifts = jnp.arange(32, dtype=jnp.uint32)[None, None]
    bits = (words[..., None] >> shifts) & 1  # [rows, w, 32]
    signs = (1 - 2 * bits.astype(jnp.int8)).astype(dtype)
    return signs.reshape(words.shape[0], -1)[:, :columns]


def coordinates(seed: bytes, name: str, size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws coordinates, one of each of as many cells of equal size (up to one).

    Args:
      seed: of `seed_of`.
      name: what they are for.
      size: number of all coordinates.
      count: how many are drawn, at most `size`.

    Returns:
      int32 [count], ascending, and the roots of the cells' sizes, float64 [count]: with entries
      times those, inner products are unbiased.
    """
    edges = size * np.arange(count + 1, dtype=np.int64) // count
    sizes = np.diff(edges)
    within = _words(seed, name, count) % sizes.astype(np.uint64)
    return (edges[:-1] + within.astype(np.int64)).astype(np.int32), np.sqrt(sizes)


def hashed(seed: bytes, name: str, count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws a feature and a sign for each coordinate.

    Args:
      seed: of `seed_of`.
      name: what they are for.
      count: number of coordinates.
      width: number of features.

    Returns:
      int32 [count], below `width`, and int8 [count], 1 or -1.
    """
    raw = _words(seed, name, count)
    buckets = ((raw >> np.uint64(1)) % np.uint64(width)).astype(np.int32)
    return buckets, 1 - 2 * (raw & np.uint64(1)).astype(np.int8)


def keys_of(seed: bytes, names: Sequence[str]) -> Key:
    """Returns keys [n] that depend on a seed and names alone, for what is drawn in a program."""
    data = np.stack([np.frombuffer(_hash(seed, name)[:8], "<u4") for name in names])
    return jax.random.wrap_key_data(jnp.asarray(data.astype(np.uint32)), impl="threefry2x32")


def _words(seed: bytes, name: str, count: int) -> np.ndarray:
    """Random words, uint64 [count], little-endian."""
    generator = np.random.Philox(key=np.frombuffer(_hash(seed, name)[:16], "<u8"))
    return generator.random_raw(count).astype("<u8")


def _hash(seed: bytes, name: str) -> bytes:
    return hashlib.sha256(seed + name.encode()).digest()
