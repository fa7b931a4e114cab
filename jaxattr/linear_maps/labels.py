"""Labelled axes: which axes of a leaf each axis of a derived array is made of.

A parameter rarely meets the matrix product in the shape in which it is stored: it is transposed,
split into heads, merged, squeezed. All of these only rename axes. So every axis of an array that
was derived from a leaf carries the list of the digits that make up its index, and a product
becomes an einsum whose letters are known, whatever route the parameter took to it.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import jax


class Label(NamedTuple):
    """One digit of an index: `(index along axis // stride) % size`.

    Attributes:
      axis: an integer for an axis of the leaf, anything else for an axis that the leaf lacks.
      size: how many values the digit takes.
      stride: the digit's place value; 1 and the full size for an axis that is in one piece.
    """

    axis: Hashable
    size: int
    stride: int = 1

    @property
    def of_leaf(self) -> bool:
        """Whether this is (a part of) an axis of the leaf."""
        return isinstance(self.axis, int)


Dim: TypeAlias = tuple[Label, ...]
"""The digits of one axis of an array, the slowest first; an axis of size one may have none."""

Dims: TypeAlias = tuple[Dim, ...]
"""All axes of an array."""


def flat(dims: Iterable[Dim]) -> Dim:
    """Returns the labels of all axes in order."""
    return tuple(label for dim in dims for label in dim)


def extent(dim: Dim) -> int:
    """Returns the size of an axis with these labels."""
    return math.prod(label.size for label in dim)


def ordered(labels: Iterable[Label]) -> Dim:
    """Sorts labels of a leaf as they lie in memory: by axis, then from the slowest digit on."""
    return tuple(sorted(labels, key=lambda label: (label.axis, -label.stride)))


def axes(labels: Iterable[Label]) -> tuple[int, ...]:
    """Returns the axes of the leaf that occur in the labels, ascending."""
    return tuple(sorted({label.axis for label in labels if isinstance(label.axis, int)}))


def rearrange(array: jax.Array, source: Dims, target: Dims) -> jax.Array:
    """Transposes and reshapes an array to other axes made of the same labels.

    Args:
      array: any array whose axes are labelled by `source`.
      source: labels of its axes, no label twice.
      target: the same labels, grouped into axes differently.

    Returns:
      The array with axes `target`; `rearrange(_, target, source)` undoes it.
    """
    labels = flat(source)
    order = [labels.index(label) for label in flat(target)]
    digits = array.reshape([label.size for label in labels]).transpose(order)
    return digits.reshape([extent(dim) for dim in target])


def reshaped(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """Follows a reshape; returns None where it cuts across the digits of the index.

    Digits of size one say nothing and are dropped.
    """
    queue = [label for label in flat(dims) if label.size > 1]
    result = []
    for size in shape:
        dim: list[Label] = []
        while size > 1:
            label = queue.pop(0)
            if label.size > size:
                if label.size % size:
                    return None
                rest = label.size // size
                queue.insert(0, label._replace(size=rest))
                label = label._replace(size=size, stride=label.stride * rest)
            if size % label.size:
                return None
            size //= label.size
            dim.append(label)
        result.append(tuple(dim))
    return tuple(result)


def broadcast(dims: Dims, shape: Sequence[int], positions: Sequence[int]) -> Dims:
    """Follows `broadcast_in_dim`: axes that repeat the array get a label that is not the leaf's."""
    used = {label.axis for label in flat(dims)}
    names = iter(name for i in range(len(used) + len(shape)) if (name := ("copy", i)) not in used)
    result: list[Dim] = [(Label(next(names), size),) if size > 1 else () for size in shape]
    for dim, position in zip(dims, positions, strict=True):
        if extent(dim) == shape[position]:
            result[position] = dim
    return tuple(result)


def digits(dim: Dim, axes: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Writes what an axis holds of the flat index over some axes of the leaf.

    Args:
      dim: labels of the axis.
      axes: the leaf's axes that are numbered, the slowest first.
      sizes: their sizes.

    Returns:
      (size, place value in the flat index) of each digit, neighbours merged.
    """
    result: list[tuple[int, int]] = []
    for label in dim:
        if label.axis not in axes or label.size == 1:
            continue
        place = label.stride * math.prod(sizes[axes.index(label.axis) + 1 :])
        if result and result[-1][1] == label.size * place:
            result[-1] = (result[-1][0] * label.size, place)
        else:
            result.append((label.size, place))
    return result
