"""Random keys that depend on names and on example ids alone."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.typing import Key

_THREEFRY = "threefry2x32"


def check_key(key: Any, name: str = "key") -> Key:
    """Refuses what is no PRNG key, such as a seed.

    Args:
      key: what a caller gave as one key: typed, or raw as `jax.random.PRNGKey` makes it.
      name: of the argument, for the message.

    Returns:
      The key, typed, of threefry: under `vmap` those of rbg all draw what the first of them draws,
      so that an example's randomness would depend on its batch.

    Raises:
      ValueError: if it is anything else, or several keys.
    """
    array = isinstance(key, jax.Array | np.ndarray)
    if array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
        return _of_threefry(key)
    if array and key.dtype == jnp.uint32 and key.ndim == 1:
        return _of_threefry(jax.random.wrap_key_data(jnp.asarray(key)))
    got = f"{key.dtype} {list(key.shape)}" if array else f"{key!r} of type {type(key).__name__}"
    raise ValueError(
        f"{name} must be one PRNG key, got {got}. Make one of a seed: jax.random.key(0)."
    )


def key_or_default(key: Any) -> Key:
    """Returns the key of seed 0 where none is given, whatever kind of key is JAX's default.

    Args:
      key: as in `check_key`, or None.
    """
    return jax.random.key(0, impl=_THREEFRY) if key is None else check_key(key)


def _of_threefry(key: Key) -> Key:
    if str(jax.random.key_impl(key)) == _THREEFRY:
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key)[:2], impl=_THREEFRY)


def named_key(key: Key, name: str) -> Key:
    """Derives a key from a name: 64 bits of its hash, so that no two names share one.

    Args:
      key: the run's key.
      name: any string.

    Returns:
      A key that depends on `key` and `name` alone.
    """
    digest = hashlib.sha256(name.encode()).digest()
    for word in (digest[:4], digest[4:8]):
        key = jax.random.fold_in(key, int.from_bytes(word, "little"))
    return key


def example_keys(key: Key, ids: jax.Array, purpose: str = "loss") -> Key:
    """Derives a key for each example, whatever batch it is in.

    Args:
      key: the run's key.
      ids: integers [b].
      purpose: what the randomness is for; different purposes get different keys.

    Returns:
      Keys [b].
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(named_key(key, purpose), ids)
