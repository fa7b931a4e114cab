"""Features in one byte each: short numbers, and scales beside them that hold their size.

A feature is its number over the largest that the type has, times its scale: the largest absolute
feature of a run of columns of its row. So what is huge or tiny is held as well as what is not, down
to scales of about 1e-35, below which float32 has no room for their shares.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.scales import exponent_of, scaled

# The largest number of each type that is used: int8 has one below -127, which marks what was never
# written. Whole numbers resolve a run of columns evenly, so runs are short; floats have exponents
# of their own, so that one scale does for a row.
_LARGEST = {"int8": 127, "float8_e4m3fn": 448}
_RUN = {"int8": 64}


def is_compressed(dtype: Any) -> bool:
    """Whether features of a type have scales beside them.

    Args:
      dtype: of stored features.
    """
    return np.dtype(dtype).name in _LARGEST


def scales_per_row(dtype: Any, width: int) -> int:
    """Returns how many scales a row has.

    Args:
      dtype: of the stored features.
      width: features of a row.
    """
    return -(-width // _RUN.get(np.dtype(dtype).name, width))


def compress(phi: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Rounds features; jittable.

    Args:
      phi: float [b, p].
      dtype: that they are to be stored as.

    Returns:
      Numbers [b, p] of that type; scales [b, s], infinite where a feature of the run is not finite.
    """
    width, count = phi.shape[1], scales_per_row(dtype, phi.shape[1])
    run = _RUN.get(np.dtype(dtype).name, width)
    padded = jnp.pad(phi, ((0, 0), (0, count * run - width))).reshape(len(phi), count, run)
    scales = jnp.abs(padded).max(axis=2)
    scales = jnp.where(jnp.isfinite(scales), scales, jnp.inf)
    usable = jnp.where(jnp.isfinite(scales) & (scales > 0), scales, 1)
    # Both over a power of two: a quotient may be made with the reciprocal of a scale, and that of a
    # huge one is zero.
    exponents = exponent_of(usable[:, :, None], axis=2)
    units = scaled(usable, -exponents)[:, :, None]
    shares = scaled(padded, -exponents[:, :, None]) / units
    shares = jnp.where((usable == scales)[:, :, None], shares, 0)
    numbers = shares * _LARGEST[np.dtype(dtype).name]
    numbers = jnp.round(numbers) if jnp.issubdtype(dtype, jnp.integer) else numbers
    return numbers.astype(dtype).reshape(len(phi), -1)[:, :width], scales


def widen(numbers: jax.Array, scales: jax.Array, first: Any = 0) -> jax.Array:
    """Makes floats of what `compress` returned; jittable.

    Args:
      numbers: [..., w], all columns or some consecutive ones.
      scales: [..., s], those of all columns.
      first: the first of the columns.

    Returns:
      Float [..., w], of the type of the scales; NaN where a scale is infinite.
    """
    name, width = numbers.dtype.name, numbers.shape[-1]
    if scales.shape[-1] > 1:
        runs = (first + jnp.arange(width)) // _RUN[name]
        scales = jnp.take(scales, runs, axis=-1, mode="clip")
    shares = numbers.astype(scales.dtype) / _LARGEST[name]
    return jnp.where(jnp.isfinite(scales), shares * scales, jnp.nan)


def never_written(dtype: Any) -> int | str:
    """Returns what stands in an array of a store where nothing was written, as zarr has it."""
    return -128 if np.dtype(dtype) == np.int8 else "NaN"


def is_never_written(values: np.ndarray) -> np.ndarray:
    """Whether each of some values is `never_written`."""
    if values.dtype == np.int8:
        return values == -128
    return np.isnan(values.astype(np.float32))
