"""What is known of an array that was derived from one parameter leaf by renaming axes alone."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal

from jaxattr.linear_maps import labels as labels_lib
from jaxattr.linear_maps.labels import Dims

Site: TypeAlias = tuple[int, ...]
"""Where an equation stands: its number in the traced loss, then in the inner program, ..."""


class Factors(NamedTuple):
    """The low-rank term A Z B^T that is added to a leaf, for the layers that a view still covers.

    Attributes:
      a: [*stack, in, r], or None for the identity.
      z: [*stack, r, r'].
      b: [*stack, out, r'], or None for the identity.
      bias: [*stack, 1, r], a further row of A for an input that is always 1; or None.
    """

    a: jax.Array | None
    z: jax.Array
    b: jax.Array | None
    bias: jax.Array | None = None

    def map(self, function: Callable[[jax.Array], jax.Array]) -> "Factors":
        """Applies a function to the arrays."""
        return Factors(*(None if x is None else function(x) for x in self))  # type: ignore


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """What the entries of a view were multiplied by.

    Attributes:
      value: an array with an axis for each of `axes`, as long as what the view covers of it.
      axes: the axes of the leaf that it varies along, ascending.
    """

    value: Any
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """An array that depends on no example, no key and no leaf that has a gradient.

    Attributes:
      value: the array.
      axes: its axes that it may vary along.
      entries: its entries if they are whole numbers that are known, and lie along one axis.
    """

    value: Any
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    entries: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed:
    """An array that is the same at each step of some scans.

    Attributes:
      value: the array.
      sites: the scans.
    """

    value: Any
    sites: frozenset[Site] = dataclasses.field(metadata={"static": True})


class Block(NamedTuple):
    """What a scan over blocks of rows takes at each step.

    Attributes:
      axis: the axis of the leaf that is in blocks.
      site: the scan.
      number: how many blocks there are.
    """

    axis: int
    site: Site
    number: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """An array that holds entries of one leaf, and how they lie in it.

    Attributes:
      value: the array.
      factors: the low-rank term that belongs to it, or None where none is evaluated.
      scales: what its entries were multiplied by.
      steps: the numbers of the blocks that it is, one for each of `blocks`.
      leaf: name of the leaf.
      shape: shape of the leaf.
      dims: labels of the array's axes.
      ranges: per axis of the leaf, the indices that the view still covers, in their order.
      scans: (axis of the leaf, site of the scan) for each axis that a scan runs over.
      stack: axes of the leaf that number layers, as far as known: the leading axes of `factors`.
      lost: why the view can no longer be followed, or the empty string.
      margins: per axis of the array, how many entries before and behind the view's are none of the
        leaf's; empty where there are none. `dims` number what is between them.
      blocks: the scans that run over blocks of an axis of the leaf.
    """

    value: Any
    factors: Factors | None = None
    scales: tuple[Scale, ...] = ()
    steps: tuple[jax.Array, ...] = ()
    leaf: str = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dims: Dims = dataclasses.field(metadata={"static": True})
    ranges: tuple[range, ...] = dataclasses.field(metadata={"static": True})
    scans: tuple[tuple[int, Site], ...] = dataclasses.field(default=(), metadata={"static": True})
    stack: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    lost: str = dataclasses.field(default="", metadata={"static": True})
    margins: tuple[tuple[int, int], ...] = dataclasses.field(default=(), metadata={"static": True})
    blocks: tuple[Block, ...] = dataclasses.field(default=(), metadata={"static": True})

    def outline(self) -> "View":
        """The view without its arrays."""
        scales = tuple(dataclasses.replace(scale, value=None) for scale in self.scales)
        return dataclasses.replace(self, value=None, factors=None, scales=scales, steps=())

    def covered(self, axes: Sequence[int]) -> np.ndarray:
        """Of the flat index over some axes of the leaf, the numbers that the view covers."""
        grid = np.meshgrid(*(self.ranges[axis] for axis in axes), indexing="ij")
        shape = [self.shape[axis] for axis in axes]
        flat = [g.reshape(-1).astype(int) for g in grid]  # of no layers it has another type
        return np.ravel_multi_index(flat, shape) if shape else np.zeros(1, int)

    def is_whole(self, axes: Iterable[int]) -> bool:
        """Whether the view covers these axes of the leaf, in their order."""
        return all(self.ranges[axis] == range(self.shape[axis]) for axis in axes)

    def factor(self, scale: Scale, axes: Sequence[int]) -> jax.Array:
        """What a scale is for each number of `covered(axes)`, if it varies along no other axis."""
        lengths = [len(self.ranges[axis]) for axis in axes]
        lead = scale.value.shape[: scale.value.ndim - len(scale.axes)]
        shape = [n if axis in scale.axes else 1 for n, axis in zip(lengths, axes, strict=True)]
        by = scale.value.reshape(*lead, *shape)
        return jnp.broadcast_to(by, (*lead, *lengths)).reshape(*lead, math.prod(lengths))

    def scaled(self, value: jax.Array, by: jax.Array, along: Sequence[int]) -> "View | None":
        """The view after a multiplication, or None where that is by more than entries of the leaf.

        Args:
          value: the array.
          by: what it was multiplied by: a scalar, or of the array's shape where it is not 1.
          along: the axes of the array that this varies along.
        """
        margins = self.margins or ((0, 0),) * by.ndim
        for axis in range(by.ndim):
            start, size = margins[axis][0], labels_lib.extent(self.dims[axis])
            varies = axis in along and by.shape[axis] > 1
            cut = slice(start, start + size) if varies else slice(0, 1)
            by = by[(slice(None),) * axis + (cut,)]
        along = [axis for axis in along if by.shape[axis] > 1]
        source = [self.dims[axis] for axis in along]
        axes = labels_lib.axes(labels_lib.flat(source))
        digits = [label for label in labels_lib.flat(self.dims) if label.axis in axes]
        others = [label for label in digits if label not in labels_lib.flat(source)]
        if not all(label.of_leaf for label in labels_lib.flat(source)):
            return None
        target = tuple(labels_lib.ordered(x for x in digits if x.axis == axis) for axis in axes)
        if [labels_lib.extent(dim) for dim in target] != [len(self.ranges[i]) for i in axes]:
            return None
        by = by.reshape([by.shape[axis] for axis in along] + [1 for _ in others])
        by = jnp.broadcast_to(by, (*by.shape[: len(along)], *(label.size for label in others)))
        by = labels_lib.rearrange(by, (*source, *((label,) for label in others)), target)
        scales = (*self.scales, Scale(value=by, axes=axes))
        return dataclasses.replace(self, value=value, scales=scales)

    def spread(self, shape: Sequence[int]) -> "View":
        """The view as elementwise operations take it, which repeat scalars and axes of size one."""
        if not self.dims and shape:
            axes = dataclasses.replace(self, dims=((),) * len(shape))
            return axes.spread(shape)
        wide = labels_lib.broadcast(self.dims, shape, range(len(shape)))
        margins = self.margins or ((0, 0),) * len(shape)
        dims = [
            old if any(margin) else new
            for old, new, margin in zip(self.dims, wide, margins, strict=True)
        ]
        return dataclasses.replace(self, dims=tuple(dims))

    def moved(
        self, value: jax.Array, dims: Dims, margins: tuple[tuple[int, int], ...] = ()
    ) -> "View":
        """The view after an operation that renamed axes; axes of size one may have gone."""
        left = labels_lib.axes(labels_lib.flat(dims))
        gone = {*labels_lib.axes(labels_lib.flat(self.dims))} - {*left}
        position = tuple(i for i, axis in enumerate(self.stack) if axis in gone)
        factors = self.factors and self.factors.map(lambda x: jnp.squeeze(x, position))
        stack = tuple(axis for axis in self.stack if axis not in gone)
        return dataclasses.replace(
            self, value=value, dims=dims, margins=margins, factors=factors, stack=stack
        )

    def sliced(self, value: jax.Array, cuts: Sequence[slice]) -> "View | None":
        """The view after a slice, or None where it cuts an axis that is not in one piece."""
        dims, ranges = list(self.dims), list(self.ranges)
        factors, scales = self.factors, self.scales
        margins = list(self.margins or ((0, 0),) * len(dims))
        for i, (dim, cut) in enumerate(zip(self.dims, cuts, strict=True)):
            size = labels_lib.extent(dim)
            if any(margins[i]):
                cut, margins[i] = _between(margins[i], size, cut)
            if range(size)[cut] == range(size):
                continue
            if len(dim) != 1 or not isinstance(axis := dim[0].axis, int):
                return None
            if dim[0].size != len(ranges[axis]):
                return None
            ranges[axis] = ranges[axis][cut]
            dims[i] = (dim[0]._replace(size=len(ranges[axis])),)
            if factors and axis in self.stack:
                index = (slice(None),) * self.stack.index(axis) + (cut,)
                factors = factors.map(lambda x, index=index: x[index])  # type: ignore[misc]
            scales = tuple(_cut_scale(scale, axis, cut) for scale in scales)
        return dataclasses.replace(
            self,
            value=value,
            dims=tuple(dims),
            ranges=tuple(ranges),
            factors=factors,
            scales=scales,
            margins=tuple(margins) if any(map(any, margins)) else (),
        )

    def misses(self, cuts: Sequence[slice]) -> bool:
        """Whether a slice takes nothing of the view, but of its margins alone."""
        for (before, after), dim, cut in zip(self.margins, self.dims, cuts, strict=False):
            size = labels_lib.extent(dim)
            taken = range(before + size + after)[cut]
            if not any(before <= i < before + size for i in (taken or ())):
                return True
        return False

    def for_scan(self) -> "View":
        """The view as a scan can run over it: arrays have the layers in front, or are left out."""
        axis = self._leading_axis()
        if axis not in self.stack:
            return dataclasses.replace(self, factors=None, scales=(), steps=())
        position = self.stack.index(axis)
        factors = self.factors and self.factors.map(lambda x: jnp.moveaxis(x, position, 0))
        return dataclasses.replace(self, factors=factors, scales=(), steps=())

    def scanned(self, site: Site) -> "View":
        """What is known of one step's slice of a view that a scan runs over; see `at_step`."""
        axis = self._leading_axis()
        if block := self._leading_block(site):
            return dataclasses.replace(self, dims=self.dims[1:], blocks=(*self.blocks, block))
        if self.lost or (self.dims[0] and axis is None):
            return self.lose(self.value, self.lost or "scanned over a part of an axis")
        if any(axis in scale.axes for scale in self.scales):
            return self.lose(self.value, "scaled along its layers")
        scans = self.scans if axis is None else (*self.scans, (axis, site))
        stack = tuple(other for other in self.stack if other != axis)
        factors = self.factors if stack == self.stack else None
        return dataclasses.replace(
            self, dims=self.dims[1:], scans=scans, stack=stack, factors=factors
        )

    def at_step(self, sliced: "View", step: jax.Array) -> "View":
        """The view of one step, given the slices of the arrays of `for_scan` and its number."""
        factors = self.factors if sliced.factors is None else sliced.factors
        steps = self.steps if len(self.steps) == len(self.blocks) else (*self.steps, step)
        return dataclasses.replace(self, value=sliced.value, factors=factors, steps=steps)

    def in_turn(self, value: Any, position: int, site: Site, step: jax.Array) -> "View | None":
        """The view of one of the parts that a scan's body takes of one axis of the array, in order.

        Parts of one entry are layers, as if the scan ran over them.
        """
        dim, size = self.dims[position], value.shape[position]
        if len(dim) != 1 or not isinstance(axis := dim[0].axis, int):
            return None
        scaled = any(axis in scale.axes for scale in self.scales)
        taken = any(block.axis == axis for block in self.blocks)
        if scaled or taken or dim[0].size != self.shape[axis] or not self.is_whole([axis]):
            return None
        part = (dim[0]._replace(size=size),) if size > 1 else ()
        view = dataclasses.replace(
            self, value=value, dims=(*self.dims[:position], part, *self.dims[position + 1 :])
        )
        if size > 1:
            blocks = (*self.blocks, Block(axis, site, self.shape[axis] // size))
            return dataclasses.replace(view, blocks=blocks, steps=(*self.steps, step))
        factors = self.factors
        if factors and axis in self.stack:
            number = self.stack.index(axis)
            factors = factors.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, step, number, keepdims=False)
            )
        stack = tuple(other for other in self.stack if other != axis)
        scans = (*self.scans, (axis, site))
        return dataclasses.replace(view, scans=scans, stack=stack, factors=factors)

    def lose(self, value: Any, reason: str) -> "View":
        """An array that stems from the leaf in a way that is not followed; fatal if it is used."""
        return dataclasses.replace(
            self,
            value=value,
            factors=None,
            scales=(),
            steps=(),
            blocks=(),
            dims=(),
            stack=(),
            lost=self.lost or reason,
        )

    def _leading_block(self, site: Site) -> Block | None:
        """What a scan takes whose first axis numbers blocks of a whole axis of the leaf."""
        dim = () if self.lost else self.dims[0]
        if len(dim) != 1 or not isinstance(axis := dim[0].axis, int):
            return None
        size, number = self.shape[axis], dim[0].size
        is_slowest = 1 < number < size == number * dim[0].stride and self.is_whole([axis])
        taken = any(block.axis == axis for block in self.blocks)
        if not is_slowest or taken or any(axis in scale.axes for scale in self.scales):
            return None
        return Block(axis, site, number)

    def _leading_axis(self) -> int | None:
        """The axis of the leaf that is the array's first, if that is one, in one piece."""
        dim = () if self.lost else self.dims[0]
        if len(dim) != 1 or not isinstance(axis := dim[0].axis, int):
            return None
        return axis if dim[0].size == len(self.ranges[axis]) else None


def aval(variable: Any) -> Any:
    """Returns shape and dtype of a variable of a program."""
    return variable.aval


_SAME = frozenset({"copy", "copy_p", "name", "sharding_constraint"})


def renamed(eqn: JaxprEqn, dims: Dims) -> Dims | None:
    """Labels of the result of an equation that moves entries and changes none, else None."""
    name, params, result = eqn.primitive.name, eqn.params, aval(eqn.outvars[0])
    if name in _SAME:
        return dims
    if name == "convert_element_type":
        return dims if jnp.issubdtype(result.dtype, jnp.floating) else None
    if name == "transpose":
        return tuple(dims[i] for i in params["permutation"])
    if name == "squeeze":
        gone = {i % len(dims) for i in params["dimensions"]}
        return tuple(dim for i, dim in enumerate(dims) if i not in gone)
    if name == "reshape" and params.get("dimensions") is None:
        return labels_lib.reshaped(dims, result.shape)
    if name == "broadcast_in_dim" and len(eqn.invars) == 1:
        return labels_lib.broadcast(dims, params["shape"], params["broadcast_dimensions"])
    return None


def follow(eqn: JaxprEqn, view: View, results: Sequence[jax.Array]) -> list[View | None] | None:
    """The views that an equation makes of a view, or None where it does not merely move entries.

    Args:
      eqn: an equation whose first operand is the view, and no other is one.
      view: the view.
      results: what the equation returns.

    Returns:
      One view per result; None for a result that holds nothing of it.
    """
    pieces = _pieces(eqn)
    if pieces is None:
        dims = _renamed_between_margins(eqn, view)
        return None if dims is None else [view.moved(results[0], *dims)]
    found: list[View | None] = []
    for result, cuts in zip(results, pieces, strict=True):
        if view.misses(cuts):
            found.append(None)
            continue
        piece = view.sliced(result, cuts)
        if piece is None:
            return None
        if eqn.primitive.name == "unstack":
            axis = eqn.params["axis"]
            kept = [i for i in range(len(view.dims)) if i != axis]
            margins = tuple(piece.margins[i] for i in kept if piece.margins)
            piece = piece.moved(result, tuple(piece.dims[i] for i in kept), margins)
        found.append(piece)
    return found


def _renamed_between_margins(
    eqn: JaxprEqn, view: View
) -> tuple[Dims, tuple[tuple[int, int], ...]] | None:
    """Labels and margins of the result of an equation that moves entries and changes none.

    An axis with a margin must stay in one piece.
    """
    dims, names = list(view.dims), {}
    for axis, margin in enumerate(view.margins):
        if any(margin):
            size = labels_lib.extent(dims[axis]) + sum(margin)
            label = labels_lib.Label(("margin", axis), size)
            names[label] = dims[axis], margin
            dims[axis] = (label,)
    result = renamed(eqn, tuple(dims))
    if result is None or not names:
        return None if result is None else (result, ())
    if not all((label,) in result for label in names):
        return None
    pairs = [names[dim[0]] if dim and dim[0] in names else (dim, (0, 0)) for dim in result]
    return tuple(dim for dim, _ in pairs), tuple(margin for _, margin in pairs)


def _pieces(eqn: JaxprEqn) -> list[list[slice]] | None:
    """For each result of an equation that takes slices, these; None for other equations."""
    name, params, rank = eqn.primitive.name, eqn.params, len(aval(eqn.invars[0]).shape)

    def along(axis: int, cut: slice) -> list[slice]:
        return [cut if i == axis else slice(None) for i in range(rank)]

    if name == "unstack":
        return [along(params["axis"], slice(i, i + 1)) for i in range(len(eqn.outvars))]
    if name == "split":
        limits = np.cumsum([0, *params["sizes"]]).tolist()
        pairs = zip(limits, limits[1:], strict=False)
        return [along(params["axis"], slice(*pair)) for pair in pairs]
    if name == "rev":
        return [[slice(None, None, -1 if i in params["dimensions"] else None) for i in range(rank)]]
    cuts = _cuts(eqn)
    return None if cuts is None else [cuts]


def _cuts(eqn: JaxprEqn) -> list[slice] | None:
    """The slices that a `slice`, or a `dynamic_slice` at a known place, takes."""
    params = eqn.params
    if eqn.primitive.name == "slice":
        strides = params["strides"] or (None,) * len(params["start_indices"])
        return [
            slice(*cut)
            for cut in zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        ]
    if eqn.primitive.name != "dynamic_slice":
        return None
    cuts = []
    sizes = zip(aval(eqn.invars[0]).shape, params["slice_sizes"], eqn.invars[1:], strict=True)
    for full, size, start in sizes:
        if size == full:  # XLA clamps the start to zero
            cuts.append(slice(0, full))
        elif isinstance(start, Literal):
            first = min(max(int(start.val), 0), full - size)
            cuts.append(slice(first, first + size))
        else:
            return None
    return cuts


def _between(margin: tuple[int, int], size: int, cut: slice) -> tuple[slice, tuple[int, int]]:
    """What a slice takes of the entries between margins, and the margins that are left."""
    before = margin[0]
    taken = range(before + size + margin[1])[cut]
    inside = [number for number, i in enumerate(taken) if before <= i < before + size]
    first, last = taken[inside[0]] - before, taken[inside[-1]] - before
    stop = last + (1 if taken.step > 0 else -1)
    left = inside[0], len(taken) - inside[-1] - 1
    return slice(first, None if stop < 0 else stop, taken.step), left


def _cut_scale(scale: Scale, axis: int, cut: slice) -> Scale:
    if axis not in scale.axes:
        return scale
    index = (slice(None),) * scale.axes.index(axis) + (cut,)
    return dataclasses.replace(scale, value=scale.value[index])
