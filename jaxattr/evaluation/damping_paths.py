"""Indexes that differ in their damping alone, for the price of little more than one."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxattr import kernels
from jaxattr.index.building import build_index
from jaxattr.index.checkpoint_builds import apply_kernel
from jaxattr.index.index import Index
from jaxattr.kernels import Damping, Gram
from jaxattr.methods.method import Method
from jaxattr.store.compression import is_compressed
from jaxattr.store.rows import EXAMPLES, FEATURES, MemoryRows
from jaxattr.typing import Params


def damping_path(
    method: Method,
    checkpoints: Params | Sequence[Params],
    train: Any,
    dampings: Sequence[Damping],
    **options: Any,
) -> Iterator[tuple[Damping, Index]]:
    r"""Yields the index of a method with each of several dampings.

    Features are computed once, and so is one eigendecomposition per block of the kernel (of the
    smaller of :math:`\Phi^\top\Phi` and :math:`\Phi\Phi^\top`); every damping then takes one pass
    of products over the stored features. Choose with queries that you do not evaluate on: by their
    LDS, or without retraining by the held-out loss of `ja.learn_weights`.

    Guarantees: each index equals that of `build_index` with that damping, up to rounding.
    Cost: n^2 p + min(n, p)^3 once per block, and n p min(n, p) per damping; in memory, twice n c p
    numbers, and the eigenvectors in float64.

    Args:
      method: with a Gram kernel: `trak`, `d_trak`, `journey_trak`, `das`. Its damping is not used.
      checkpoints: as in `build_index`.
      train: the training data: arrays with a leading axis, or a random-access source.
      dampings: `ja.relative(x)` or `ja.absolute(x)`, above 0.
      **options: of `build_index`, except for a path, a mesh, store=False, and a dtype of one byte.

    Yields:
      The damping and its index, in the order given.

    Raises:
      ValueError: if the method has no Gram kernel, or a damping is zero or there is none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxattr as ja
      >>> def margin(params, example, key):
      ...     return params["w"] @ example
      >>> params, train = {"w": jnp.ones(3)}, jax.random.normal(jax.random.key(0), (20, 3))
      >>> path = damping_path(ja.trak(margin), params, train, [ja.relative(1e-3), ja.relative(10)])
      >>> [index.method.kernel.name for damping, index in path][-1]
      'block-diagonal gram, damping 10 x mean eigenvalue'
    """
    kernel = method.kernel
    if not isinstance(kernel, Gram):
        raise ValueError(
            f"{method.name} has no damping path: its kernel ({method.kernel.name}) is not the "
            "inverse of a Gram matrix, as those of ja.trak, ja.d_trak, ja.journey_trak and ja.das."
        )
    if not dampings:
        raise ValueError("dampings is empty: a path needs at least one.")
    elsewhere = options.get("path") is not None or options.get("mesh") is not None
    if elsewhere or not options.get("store", True):
        raise ValueError(
            "A damping path is computed from features in the memory of one device: no path, no "
            "mesh, no store=False."
        )
    dtype = options.get("dtype")
    if dtype is not None and is_compressed(dtype):
        raise ValueError(
            f"A damping path applies kernels to the stored features, and {np.dtype(dtype).name} is "
            "too short for that: leave dtype out, and build the index of your choice with it."
        )
    for damping in dampings:
        kernel.operator_at([], damping, 0)  # raises where it cannot be, before the work
    # Its features as they are, so with a weight of one for each checkpoint.
    plain = dataclasses.replace(
        method, kernel=kernels.Identity(), checkpoint_weights=None, average_checkpoints=False
    )
    raw = build_index(plain, checkpoints, train, **options)
    return _indexes(method, raw, dampings)


def _indexes(
    method: Method, raw: Index, dampings: Sequence[Damping]
) -> Iterator[tuple[Damping, Index]]:
    kernel: Any = method.kernel
    layout, dtype = raw.rows.layout, raw.rows.layout.wide
    numbers, exponent = range(layout.checkpoints), int(raw.exponent)

    def features(number: int, columns: slice) -> np.ndarray:
        return np.ldexp(raw.rows.column(FEATURES, number, columns).astype(dtype), -exponent)

    spectra = [
        kernel.spectrum(raw.layout, functools.partial(features, number)) for number in numbers
    ]
    etas = method.weights_of(layout.checkpoints)
    for damping in dampings:
        rows = MemoryRows(layout, raw.place)
        rows.arrays[EXAMPLES] = raw.rows.arrays[EXAMPLES]  # shared: those are not written
        for number in numbers:
            operator = kernel.operator_at(spectra[number], damping, exponent)
            apply, _ = apply_kernel(raw.place, method.kernel, raw.layout, etas[number])
            for block in range(layout.blocks):
                phi = raw.rows.read(FEATURES, block, number).astype(dtype)
                rows.write(block, number, apply(operator, phi, exponent)[1])
        made = dataclasses.replace(method, kernel=dataclasses.replace(kernel, damping=damping))
        yield damping, dataclasses.replace(raw, method=made, rows=rows)
