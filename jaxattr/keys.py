"""Random keys that depend on names and on example ids alone."""

import hashlib

import jax

from jaxattr.typing import Key


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
