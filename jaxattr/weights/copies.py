"""Noised copies of training examples, whose strongest proponents should be what they copy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.counts import checked_ids, real_number
from jaxattr.keys import check_key
from jaxattr.sources import as_source
from jaxattr.typing import Batch, Key


def noised(train: Any, ids: Any, key: Key, *, scale: float = 0.4) -> Batch:
    """Copies training examples, with noise on every array of floats.

    For `ja.learn_weights(index, queries, outcomes=outcomes, copies=(ja.noised(train, ids, key),
    ids))`. 128 copies are usual.

    Args:
      train: the training set, a pytree of arrays [n, ...] or a random-access source.
      ids: of the examples to copy, integers [b].
      key: PRNG key.
      scale: deviation of the noise, in units of the deviation of the array's values over the
        copied examples.

    Returns:
      A pytree of NumPy arrays [b, ...]. Arrays that hold no floats, such as labels, are as they
      were.

    Raises:
      ValueError: if ids are none, the scale is below 0 or not finite, or no array holds floats:
        tokens, say, are noised by rules of their own, such as words that are left out.

    Example:
      >>> train = {"x": np.arange(6.0), "label": np.arange(6)}
      >>> copies = noised(train, [4, 2], jax.random.key(0))
      >>> copies["x"].shape, copies["label"]
      ((2,), array([4, 2]))
    """
    source = as_source(train, "train")
    copies = jax.tree.map(np.asarray, source.read(checked_ids(ids, source.size, "ids")))
    floats = [leaf for leaf in jax.tree.leaves(copies) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if not floats:
        raise ValueError(
            "No array of the training examples holds floats, which noise could be added to: make "
            "copies of your own, such as rows in which some tokens are replaced."
        )
    scale = real_number("scale", scale, least=0)
    generator = np.random.default_rng(np.asarray(jax.random.key_data(check_key(key))))

    def noise(leaf: np.ndarray) -> np.ndarray:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        wide = leaf.astype(np.float64)
        deviation = wide.std(where=np.isfinite(wide))  # one that is not finite spoils no others
        return (leaf + scale * deviation * generator.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree.map(noise, copies)
