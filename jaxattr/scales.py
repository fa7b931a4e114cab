"""Powers of two that are carried apart, so that products stay within the range of their type.

Scaling by a power of two is exact, and leaves every bit of the mantissa as it was.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_BITS = {4: (jnp.int32, 23, 127), 8: (jnp.int64, 52, 1023)}


def wide(dtype: Any) -> Any:
    """Returns the type to compute in: float32 for shorter floats, else the type itself.

    Unlike `jnp.promote_types` it is the same under strict promotion.

    Args:
      dtype: a real type.
    """
    return widest(dtype, jnp.float32)


def widest(*dtypes: Any) -> Any:
    """Returns the type that holds all of several, the same under strict promotion.

    Args:
      *dtypes: of arrays, at least one.
    """
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def widened(values: Any) -> np.ndarray:
    """Returns an array on the host; floats that NumPy itself has not (bfloat16) as float32.

    Args:
      values: an array.
    """
    found = np.asarray(values)
    short = found.dtype.kind == "V" and jnp.issubdtype(found.dtype, jnp.floating)
    return found.astype(np.float32) if short else found


def exponent_of(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Returns the smallest e with |x| < 2^e, for the largest entry along some axes.

    Args:
      x: float, finite.
      axis: over which the largest is taken. Default: over all.

    Returns:
      int32; zero where all is zero.
    """
    largest = jnp.max(jnp.abs(x), axis=axis, initial=0)
    return jnp.frexp(largest.astype(wide(x.dtype)))[1]


def scaled(x: jax.Array, exponent: Any) -> jax.Array:
    """Returns x 2^exponent, rounded only where it leaves the range of x's type.

    Args:
      x: float32 or float64.
      exponent: integers that broadcast against x.
    """
    half = jnp.asarray(exponent, jnp.int32) // 2
    return x * _power(half, x.dtype) * _power(exponent - half, x.dtype)


def unit_norm(phi: jax.Array) -> jax.Array:
    """Scales rows to unit norm; rows of zeros stay.

    Args:
      phi: float [b, p].

    Returns:
      Float [b, p].
    """
    # Dividing by the largest entry first keeps the squares from under- and overflowing.
    largest = jnp.max(jnp.abs(phi), axis=1, keepdims=True)
    phi = phi / jnp.where(largest == 0, 1, largest)
    norm = jnp.linalg.norm(phi, axis=1, keepdims=True)
    return phi / jnp.where(norm == 0, 1, norm)


def _power(exponent: jax.Array, dtype: Any) -> jax.Array:
    """2^exponent by its bits: a power function need not be exact."""
    integer, mantissa, bias = _BITS[jnp.dtype(dtype).itemsize]
    bits = (jnp.clip(exponent, 1 - bias, bias) + bias).astype(integer) << mantissa
    return jax.lax.bitcast_convert_type(bits, dtype)
