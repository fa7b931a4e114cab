"""Decides, from how a leaf is used, whether it is the matrix of a linear map, and which one."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

from jaxattr.identity import Program, program_of
from jaxattr.inputs.traces import shapes_of
from jaxattr.leaves import leaf_names
from jaxattr.linear_maps import interpreter, labels
from jaxattr.linear_maps.interpreter import Output, Taps, Walk
from jaxattr.linear_maps.labels import Dims, Label, digits, extent
from jaxattr.linear_maps.products import Product
from jaxattr.linear_maps.sums import views_of
from jaxattr.linear_maps.views import Scale, Site, View
from jaxattr.typing import Example, Key, OutputFn, Params

STOPPED = "its gradient is stopped"
"""Why a leaf whose gradient is known to be zero is no linear map."""

UNUSED = "never used"
"""Why a leaf that the loss does not read is none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearMap:
    """A leaf that the loss uses as the matrix of y = x W, and in no other way.

    Attributes:
      leaf: name of the leaf.
      kind: 'dense', 'conv' or 'embedding' (rows are looked up); 'tied' if it is used in two ways,
        such as an embedding that also makes the logits.
      size_in: inputs of the matrix; for a convolution the size of a patch of one feature group.
      size_out: outputs of the matrix.
      in_axes: axes of the leaf that are its inputs.
      out_axes: axes of the leaf that are its outputs.
      stack_axes: axes of the leaf that number layers, each a matrix of its own.
      stack: number of layers, or None if `stack_axes` is empty.
      transposed: for each use, whether it multiplies by the transposed matrix.
      bias: name of the leaf that is added to each result and used nowhere else, or None.
      bias_stack_axes: axes of the bias that number layers.
      groups: feature groups of a convolution; 1 elsewhere.
      dtype: dtype of the leaf.
    """

    leaf: str
    kind: str
    size_in: int
    size_out: int
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    stack_axes: tuple[int, ...]
    stack: int | None
    transposed: tuple[bool, ...]
    bias: str | None = None
    bias_stack_axes: tuple[int, ...] = ()
    groups: int = 1
    dtype: Any

    @property
    def uses(self) -> int:
        """How many times the program multiplies by (each layer of) the matrix.

        A use inside a scan that does not run over the leaf's layers counts once, with more
        positions.
        """
        return len(self.transposed)


@dataclasses.dataclass(frozen=True)
class LinearMaps:
    """What each leaf of the parameters is: every leaf is in `maps`, in `exact`, or a map's bias.

    Attributes:
      maps: {leaf name: linear map}.
      exact: {leaf name: why it is not covered}.
      stacked: {leaf name: number of layers} of every leaf, covered or not, of which an axis numbers
        layers: it is scanned over, or if it is the first perhaps taken apart, before each use.
      layer_axes: {leaf name: that axis}, where it is not the first.
    """

    maps: dict[str, LinearMap]
    exact: dict[str, str]
    stacked: dict[str, int] = dataclasses.field(default_factory=dict)
    layer_axes: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """One place where a leaf is the matrix of a product.

    Attributes:
      site: where the equation stands.
      product: the product.
      view: what is known of the leaf's operand.
      loops: the scans around the place, with their lengths.
      result: shape and dtype of the result.
      transposed: whether the product sums over the map's outputs.
    """

    site: Site
    product: Product
    view: View
    loops: tuple[tuple[Site, int], ...]
    result: jax.ShapeDtypeStruct
    transposed: bool = False

    @property
    def scanned(self) -> dict[Site, int]:
        """The axis of the leaf that each scan runs over."""
        return {site: axis for axis, site in self.view.scans}

    @property
    def picked(self) -> tuple[int, ...]:
        """Axes of the leaf of which one index of several was taken, which the product lacks."""
        ranges, features = self.view.ranges, (*self.product.ins, *self.product.outs)
        taken = [i for i, n in enumerate(self.view.shape) if n > 1 and len(ranges[i]) == 1]
        return tuple(axis for axis in taken if axis not in labels.axes(features))

    @property
    def stack(self) -> tuple[int, ...]:
        """Axes of the leaf that number layers here."""
        axes = {*labels.axes(self.product.layers), *self.scanned.values(), *self.picked}
        return tuple(sorted(axes))

    @property
    def roles(self) -> tuple[tuple[int, ...], ...]:
        """Axes of the leaf that are inputs, outputs and layers here."""
        return labels.axes(self.product.ins), labels.axes(self.product.outs), self.stack

    @property
    def positions(self) -> int:
        """How often the matrix of one layer is applied."""
        taken = {*self.scanned, *(block.site for block in self.view.blocks)}
        repeated = [length for site, length in self.loops if site not in taken]
        return extent(self.product.positions) * self.product.groups * math.prod(repeated)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traced:
    """A traced loss and what was found in it.

    Attributes:
      program: the loss; its arguments are the leaves of params, example and key.
      names: names of the parameter leaves.
      found: the public part.
      uses: {leaf: uses}, several places that apply different layers being one use.
    """

    program: ClosedJaxpr
    names: tuple[str, ...]
    found: LinearMaps
    uses: dict[str, tuple[tuple[Use, ...], ...]]


def trace(loss: OutputFn, params: Params, example: Example, key: Key | None) -> Traced:
    """Traces a loss once and finds the linear maps in it; a `Program` of known shapes no more."""
    leaves, structure = jax.tree.flatten(shapes_of((params, example, key)))
    if isinstance(loss, Program):
        loss.check_unchanged()
        return _trace_once(loss, structure, tuple(leaves))
    return _trace(loss, structure, tuple(leaves))


def _trace(loss: OutputFn, structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> Traced:
    params, example, key = jax.tree.unflatten(structure, leaves)
    program = program_of(loss, (params, example, key))
    if [aval.shape for aval in program.out_avals] != [()]:
        got = ", ".join(aval.str_short() for aval in program.out_avals)
        raise ValueError(f"The loss must return one scalar, got {got or 'nothing'}.")
    names = tuple(leaf_names(params))
    finder = _Finder({}, {}, {}, {}, set())
    sources = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in program.in_avals]

    def walk(args: list[jax.Array]) -> None:
        views = [view(name, arg) for name, arg in zip(names, args, strict=False)]
        arguments = [*views, *args[len(names) :]]
        results, _ = interpreter.evaluate(program, arguments, Walk(visitor=finder))
        for returned in results:
            for each in views_of(returned):
                finder.reject(each, "returned by the loss")

    jax.eval_shape(walk, sources)
    return _judge(program, names, finder)


def view(name: str, leaf: jax.Array, **known: Any) -> View:
    """Returns the view of a whole leaf."""
    dims = tuple((Label(axis, size),) for axis, size in enumerate(leaf.shape))
    ranges = tuple(range(size) for size in leaf.shape)
    return View(value=leaf, leaf=name, shape=leaf.shape, dims=dims, ranges=ranges, **known)


_trace_once = functools.lru_cache(maxsize=8)(_trace)


@dataclasses.dataclass(frozen=True)
class _Finder:
    """The visitor that writes down; a place that is visited twice is written down once."""

    uses: dict[str, dict[Site, Use]]
    additions: dict[str, dict[Site, tuple[View, Output]]]
    reasons: dict[str, str]
    layered: dict[str, set[int]]
    still: set[str]

    def product(
        self, view: View, product: Product, x: jax.Array, y: jax.Array, walk: Walk
    ) -> tuple[Any, Taps]:
        self._note(view)
        known = view.outline()
        result = jax.ShapeDtypeStruct(y.shape, y.dtype)
        use = Use(site=walk.site, product=product, view=known, loops=walk.loops, result=result)
        self.uses.setdefault(view.leaf, {})[walk.site] = use
        return Output(value=y, site=walk.site, leaf=view.leaf, dims=product.y), {}

    def added(self, view: View, output: Output) -> bool:
        self._note(view)
        known = view.outline(), dataclasses.replace(output, value=None)
        self.additions.setdefault(view.leaf, {})[output.site] = known
        return True

    def stopped(self, view: View) -> None:
        self.still.add(view.leaf)

    def reject(self, view: View, reason: str) -> None:
        self._note(view)
        self.reasons.setdefault(view.leaf, reason)

    def _note(self, view: View) -> None:
        """Notes of which axes of the leaf one index, one layer, is used here."""
        first, here = view.ranges[:1], {axis for axis, _ in view.scans}
        if first and len(first[0]) == 1 < view.shape[0]:
            here.add(0)
        self.layered[view.leaf] = self.layered.get(view.leaf, here) & here


def _judge(program: ClosedJaxpr, names: tuple[str, ...], finder: _Finder) -> Traced:
    exact, maps, uses = {}, {}, {}
    for name, aval in zip(names, program.in_avals, strict=False):
        verdict = _linear_map(name, aval.dtype, finder)
        if isinstance(verdict, str):
            exact[name] = verdict
        else:
            maps[name], uses[name] = verdict
    for name, additions in finder.additions.items():
        if name in maps or name in finder.reasons or name in finder.uses:
            continue
        leaf = next(iter(additions.values()))[1].leaf
        if leaf not in maps:
            exact[name] = f"added to the product with {leaf}, which is not covered"
        elif maps[leaf].bias is None and _is_bias(additions, maps[leaf], uses[leaf]):
            (view, _), stack = next(iter(additions.values())), maps[leaf].stack_axes
            axes = _bias_stack_axes(view, len(stack))
            maps[leaf] = dataclasses.replace(maps[leaf], bias=name, bias_stack_axes=axes)
            del exact[name]
        else:
            exact[name] = f"added to products, but not to each product with {leaf} as its bias"
    sizes = dict(zip(names, program.in_avals, strict=False))
    layer_axes = {name: min(axes) for name, axes in finder.layered.items() if axes}
    layer_axes |= {name: 0 for name, found in maps.items() if found.stack_axes == (0,)}
    stacked = {name: sizes[name].shape[axis] for name, axis in sorted(layer_axes.items())}
    others = {name: axis for name, axis in sorted(layer_axes.items()) if axis}
    found = LinearMaps(maps, exact, stacked, others)
    return Traced(program=program, names=names, found=found, uses=uses)


def _linear_map(
    name: str, dtype: Any, finder: _Finder
) -> tuple[LinearMap, tuple[tuple[Use, ...], ...]] | str:
    """Returns the linear map that a leaf is, with its uses, or why it is none."""
    uses = [finder.uses[name][site] for site in sorted(finder.uses.get(name, {}))]
    if reason := finder.reasons.get(name):
        return reason
    if name in finder.additions:
        return "used in a product and added to one" if uses else "added to a product"
    if not uses:
        return STOPPED if name in finder.still else UNUSED
    if reasons := [reason for use in uses if (reason := _malformed(use))]:
        return reasons[0]
    first = min(uses, key=lambda use: use.product.kind != "embedding")
    oriented = [_oriented(use, first) for use in uses]
    together = _share_layers([use for use in oriented if use is not None], first.stack)
    if None in oriented:
        return "multiplied along different axes in different places"
    shape, stack = first.view.shape, first.stack
    outs = tuple(axis for axis in labels.axes(first.product.outs) if axis not in stack)
    ins = tuple(axis for axis in range(len(shape)) if axis not in (*stack, *outs))
    transposed = tuple(use[0].transposed for use in together)
    kinds = {use.product.kind for use in uses}
    found = LinearMap(
        leaf=name,
        kind=first.product.kind if len(kinds) == 1 and not any(transposed) else "tied",
        size_in=math.prod(shape[axis] for axis in ins),
        size_out=math.prod(shape[axis] for axis in outs),
        in_axes=ins,
        out_axes=outs,
        stack_axes=stack,
        stack=math.prod(shape[axis] for axis in stack) if stack else None,
        transposed=transposed,
        groups=max(use.product.groups for use in uses),
        dtype=dtype,
    )
    return found, together


def scales_inputs(scale: Scale, linear_map: LinearMap, kind: str) -> bool:
    """Returns whether a scale is counted to a map's inputs or its outputs.

    Args:
      scale: what a view of the leaf was multiplied by.
      linear_map: the map of the leaf.
      kind: of the product; the inputs of a look-up are ids, which cannot be multiplied.
    """
    if not scale.axes:
        return kind != "embedding"
    return {*scale.axes} <= {*linear_map.in_axes}


def _malformed(use: Use) -> str:
    """Says why a product is not with matrices of the leaf, or returns nothing."""
    product, roles = use.product, use.roles
    if len({axis for role in roles for axis in role}) != sum(map(len, roles)):
        return "multiplied along a part of an axis"
    for axis in (*roles[0], *roles[1]):
        parts = [label for label in (*product.ins, *product.outs) if label.axis == axis]
        blocks = math.prod(block.number for block in use.view.blocks if block.axis == axis)
        if extent(tuple(parts)) * blocks != len(use.view.ranges[axis]):
            return "multiplied along a part of an axis"
    wide = [axis for axis in roles[1] if use.view.shape[axis] > 1]
    if any([block.axis] != wide for block in use.view.blocks) or len(use.view.blocks) > 1:
        return "scanned over a part of an axis that is not all of its outputs"
    sides = [set(roles[1])] if product.kind == "embedding" else [set(roles[0]), set(roles[1])]
    if not all(any(side >= {*scale.axes} for side in sides) for scale in use.view.scales):
        return "multiplied elementwise, along its inputs and outputs or its layers"
    for label in product.layers:
        if label.size != len(use.view.ranges[label.axis]):  # type: ignore[call-overload]
            return "multiplied along a part of an axis"
    return ""


def _oriented(use: Use, first: Use) -> Use | None:
    """The use, saying whether it is transposed; None if it multiplies along other axes."""

    def wide(axes: Iterable[int]) -> tuple[int, ...]:  # an axis of size one plays any part
        return tuple(axis for axis in axes if use.view.shape[axis] > 1)

    mine, other = ([wide(axes) for axes in each.roles] for each in (use, first))
    if {*use.roles[0], *use.roles[1]} & {*first.stack}:
        return None
    if mine == other:
        return use
    flipped = mine == [other[1], other[0], other[2]]
    if not flipped or use.product.kind == "embedding" or use.product.groups > 1:
        return None
    return dataclasses.replace(use, transposed=True)


def _share_layers(uses: list[Use], stack: tuple[int, ...]) -> tuple[tuple[Use, ...], ...]:
    """Gathers places that apply different layers alike: a stack that was unrolled by hand."""

    def kind(use: Use) -> tuple[Any, ...]:
        return use.positions, use.transposed, use.product.kind

    gathered: list[list[Use]] = []
    for use in uses:
        for others in gathered if stack else ():
            taken = {layer for other in others for layer in other.view.covered(stack)}
            if kind(use) == kind(others[0]) and taken.isdisjoint(use.view.covered(stack)):
                others.append(use)
                break
        else:
            gathered.append([use])
    return tuple(tuple(group) for group in gathered)


def _is_bias(
    additions: dict[Site, tuple[View, Output]],
    linear_map: LinearMap,
    uses: Sequence[Sequence[Use]],
) -> bool:
    """Whether a leaf is added to each product with the matrix, and lies as its outputs do."""
    places = {use.site: use for group in uses for use in group}
    if set(places) != set(additions) or any(linear_map.transposed):
        return False
    return all(
        output.leaf == linear_map.leaf and _aligned(bias, output.dims, places[site], linear_map)
        for site, (bias, output) in additions.items()
    )


def _aligned(bias: View, result: Dims, use: Use, linear_map: LinearMap) -> bool:
    """Whether bias and result number outputs and layers alike.

    The bias must have as many axes of layers as the matrix, and be at the same index, or in the
    same scan, as the matrix.
    """
    weight, stack, outs = use.view, linear_map.stack_axes, linear_map.out_axes
    lead = _bias_stack_axes(bias, len(stack))
    own = tuple(axis for axis in range(len(bias.shape)) if axis not in lead)
    if not bias.is_whole(own) or not weight.is_whole(outs):
        return False
    if any({*scale.axes} & {*outs} for scale in weight.scales):
        return False
    if math.prod(bias.shape[axis] for axis in own) != linear_map.size_out:
        return False
    if _stacking(bias, lead) != _stacking(weight, stack) or len(bias.scans) != len(weight.scans):
        return False
    layers = [len(weight.ranges[axis]) for axis in stack]
    sizes = [weight.shape[axis] for axis in outs], [bias.shape[axis] for axis in own]
    return all(
        digits(theirs, outs, sizes[0]) == digits(mine, own, sizes[1])
        and digits(theirs, stack, layers) == digits(mine, lead, layers)
        for theirs, mine in zip(result, bias.dims, strict=True)
    )


def _bias_stack_axes(bias: View, number: int) -> tuple[int, ...]:
    """The axes of a bias that number layers: those that are scanned over, else the first."""
    scanned = tuple(sorted(axis for axis, _ in bias.scans))
    return scanned if len(scanned) == number else tuple(range(number))


def _stacking(view: View, axes: Sequence[int]) -> list[tuple[Any, ...]]:
    """Of the axes that number layers: size, the indices that are covered, the scans over them."""
    return [
        (view.shape[axis], view.ranges[axis], {site for other, site in view.scans if other == axis})
        for axis in axes
    ]
