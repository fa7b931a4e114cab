"""Pieces of small networks that are trained many at once, on CPUs too."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def convolve_patches(
    images: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """A 1x1 or 3x3 convolution with padding SAME, as patches times a matrix.

    Stands in for `lax.conv_general_dilated`: under `vmap` over models that becomes a grouped
    convolution, which XLA runs 16 times slower on a CPU (a step of a small ResNet: 95 ms, and 6).
    """
    del padding, options
    (size, _, width_in, width), stride = kernel.shape, strides[0]
    if size == 1:
        patches = images[:, ::stride, ::stride]
    else:
        before = 1 if stride == 1 else 0  # where SAME puts the padding of an even image
        padded = jnp.pad(images, ((0, 0), (before, 1), (before, 1), (0, 0)))
        last = images.shape[1] - stride + 1
        shifts = [
            padded[:, i : i + last : stride, j : j + last : stride]
            for i in range(size)
            for j in range(size)
        ]
        patches = jnp.concatenate(shifts, axis=-1)  # [b, h, w, 9 * width_in]
    return patches @ kernel.reshape(size * size * width_in, width)


def convolution(
    width_in: int,
    width: int,
    size: int,
    stride: int = 1,
    *,
    bias: bool = True,
    patches: bool = True,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A convolution with padding SAME.

    Args:
      width_in: channels in.
      width: channels out.
      size: of the kernel, 1 or 3.
      stride: 1 or 2.
      bias: whether there is one.
      patches: whether it is patches times a matrix where there is no accelerator.
      rngs: of the initialisation.
    """
    as_patches = patches and jax.default_backend() == "cpu"
    return nnx.Conv(
        width_in,
        width,
        (size, size),
        strides=stride,
        use_bias=bias,
        conv_general_dilated=convolve_patches if as_patches else jax.lax.conv_general_dilated,
        rngs=rngs,
    )


def initializer(reference: Any) -> Callable[[jax.Array], Any]:
    """Draws all arrays from one normal vector, each as wide as in a reference initialisation.

    A random call for each array would take XLA 6 to 15 s to compile; this takes none.

    Args:
      reference: parameters.

    Returns:
      key -> parameters of the same structure.
    """
    leaves, structure = jax.tree.flatten(reference)
    ends = np.cumsum([leaf.size for leaf in leaves])

    def init(key: jax.Array) -> Any:
        parts = jnp.split(jax.random.normal(key, (int(ends[-1]),)), ends[:-1].tolist())
        drawn = [
            leaf.mean() + leaf.std() * part.reshape(leaf.shape)
            for leaf, part in zip(leaves, parts, strict=True)
        ]
        return jax.tree.unflatten(structure, drawn)

    return init
