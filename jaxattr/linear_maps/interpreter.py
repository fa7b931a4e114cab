"""Evaluates a traced loss while following its parameters to the places where they are used.

One walk over the program serves three ends, which differ in the visitor alone: `find` writes down
what it meets, `bottleneck` adds a low-rank term at every product, `capture` adds a zero there.
Every equation without a parameter is evaluated as it stands, so that custom derivatives, control
flow and side effects keep their meaning. An equation with a parameter either moves its entries
(views.py), joins it with others or scales it (sums.py), multiplies by it (products.py), is control
flow that is entered (here), or the parameter is rejected: nothing passes unseen.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from jaxattr.linear_maps import (
    chains,
    counters,
    declaring,
    derivatives,
    labels,
    products,
    sums,
    views,
)
from jaxattr.linear_maps.chains import Chain, Steps
from jaxattr.linear_maps.counters import Counted
from jaxattr.linear_maps.labels import Dims
from jaxattr.linear_maps.products import Product
from jaxattr.linear_maps.sums import Sum, views_of
from jaxattr.linear_maps.views import Constant, Fixed, Site, View

Taps: TypeAlias = dict[Site, Any]
"""What the visitor recorded at each product; a scan stacks it along a leading axis."""

Evaluated: TypeAlias = tuple[list[Any], Taps]
"""Results, some perhaps views or outputs, and what the visitor recorded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """The result of a product, still untouched and read by nobody else: a bias may be added.

    Attributes:
      value: the array; None in what `find` notes down.
      site: where the product stands.
      leaf: the leaf that is the product's matrix.
      dims: labels of the array's axes.
    """

    value: Any
    site: Site
    leaf: str
    dims: Dims


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """Where the evaluation stands, and what it does there.

    Attributes:
      visitor: what to do.
      sinks: the zeros that `capture` adds, by the site of the product.
      site: the equations that are being entered.
      loops: (site, length) of every scan that is being entered.
    """

    visitor: "Visitor"
    sinks: Taps = dataclasses.field(default_factory=dict)
    site: Site = ()
    loops: tuple[tuple[Site, int], ...] = ()

    def at(self, number: int) -> "Walk":
        """Goes to an equation."""
        return dataclasses.replace(self, site=(*self.site, number))

    def inside(self) -> Taps:
        """The sinks of the equations within the one where the walk stands."""
        here = len(self.site)
        return {site: sink for site, sink in self.sinks.items() if site[:here] == self.site}


class Visitor(Protocol):
    """What is done at the places where parameters are used."""

    def product(
        self, view: View, product: Product, x: jax.Array, y: jax.Array, walk: Walk
    ) -> tuple[Any, Taps]:
        """Returns what takes the place of the result y of a product, and what is recorded."""

    def added(self, view: View, output: Output) -> bool:
        """Called where a leaf is added to a product; returns whether that is a bias; here no."""
        return False

    def stopped(self, view: View) -> None:
        """Called where the gradient of a leaf is stopped: what follows is no use of it."""
        del view

    def reject(self, view: View, reason: str) -> None:
        """Called where a leaf is used in a way that cannot be followed."""


def evaluate(program: Jaxpr | ClosedJaxpr, args: Sequence[Any], walk: Walk) -> Evaluated:
    """Evaluates a program.

    Args:
      program: with its constants, or one that has none.
      args: its arguments; leaves that are followed come as views.
      walk: what to do where they are used.

    Returns:
      The results, some perhaps views or outputs, and what the visitor recorded.
    """
    consts = program.consts if isinstance(program, ClosedJaxpr) else ()
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    env: dict[Var, Any] = {}
    taps: Taps = {}
    atoms = (*(v for eqn in jaxpr.eqns for v in eqn.invars), *jaxpr.outvars)
    readers = Counter(v for v in atoms if not isinstance(v, Literal))

    def read(v: Any) -> Any:
        return sums.constant(v.val) if isinstance(v, Literal) else env[v]

    def write(v: Var, value: Any) -> None:
        shared = isinstance(value, Output) and readers[v] != 1
        env[v] = value.value if shared else value

    known = [c if isinstance(c, View | Sum | Constant) else sums.constant(c) for c in consts]
    for v, value in zip((*jaxpr.constvars, *jaxpr.invars), (*known, *args), strict=True):
        write(v, value)
    followed = [v for v in (*jaxpr.constvars, *jaxpr.invars) if views_of(env[v])]
    live, computed = derivatives.live(jaxpr, followed), derivatives.live(jaxpr)
    for number, eqn in enumerate(jaxpr.eqns):
        values = [read(v) for v in eqn.invars]
        if eqn.primitive.name in derivatives.STOPS or (
            live.isdisjoint(eqn.outvars) and not eqn.effects
        ):
            is_used = not computed.isdisjoint(eqn.outvars)
            values = [_still(value, walk.visitor if is_used else None) for value in values]
        results, recorded = _equation(eqn, values, walk.at(number))
        taps.update(recorded)
        for v, value in zip(eqn.outvars, results, strict=True):
            write(v, value)
    return [read(v) for v in jaxpr.outvars], taps


def _still(value: Any, visitor: "Visitor | None") -> Any:
    """A value whose gradient is zero from here on."""
    for view in views_of(value) if visitor else ():
        visitor.stopped(view)  # type: ignore[union-attr]
    return sums.constant(plain(value)) if views_of(value) else value


def _equation(eqn: JaxprEqn, args: list[Any], walk: Walk) -> Evaluated:
    found = [i for i, arg in enumerate(args) if isinstance(arg, View | Sum)]
    if not found:
        return _untouched(eqn, args), {}
    declared = bool(views_of(args[-1])) and declaring.is_declared(eqn)
    if declared:
        for i in found[:-1]:
            _reject(args[i], "passed to a declared linear map, and not as its weight", walk)
            args[i] = plain(args[i])
        found = found[-1:]
    elif enter := _ENTERED.get(eqn.primitive.name):
        return enter(eqn, args, walk)
    custom = derivatives.derivative(eqn)
    for i in custom.nothing.intersection(found):
        args[i] = _still(args[i], walk.visitor)
    found = [i for i in found if i not in custom.nothing]
    results = _bind(eqn, args)
    if len(found) == 1 and found[0] in custom.passed:
        return [dataclasses.replace(args[found[0]], value=results[0])], {}
    if not any(view.lost for i in found for view in views_of(args[i])):
        found = _without_expressions(eqn, args, found, walk)
        if joined := sums.join(eqn, args, results[0]):
            return [joined], {}
        used = _used(eqn, args, found[0], results, walk) if len(found) == 1 else None
        if used is not None:
            return used
    for i in found:
        others = [view.leaf for j in found if j != i for view in views_of(args[j])]
        for view in views_of(args[i]):
            names = ("itself" if other == view.leaf else other for other in others)
            partner = f" with {', '.join(names)}" if others else ""
            walk.visitor.reject(view, view.lost or f"used by {eqn.primitive.name}{partner}")
    return results, {}


def _used(
    eqn: JaxprEqn, args: list[Any], number: int, results: list[Any], walk: Walk
) -> Evaluated | None:
    """What an equation makes of its only operand with views, where that can be followed."""
    operand = args[number]
    if moved := sums.follow(eqn, operand, results):
        return moved, {}
    if part := counters.follow(eqn, args, results[0]):
        return [part], {}
    if scaled := sums.multiply(eqn, args, number, results[0]):
        return [scaled], {}
    if isinstance(operand, Sum):
        return _product_with_sum(eqn, operand, args, number, results[0], walk)
    adds = eqn.primitive.name in ("add", "add_any")
    if adds and _may_be_bias(operand, args[1 - number]):
        return (results, {}) if walk.visitor.added(operand, args[1 - number]) else None
    operand = operand.spread(results[0].shape) if adds else operand
    if product := products.describe(eqn, operand, number):
        if not _is_fixed(args[product.operand], operand):
            walk.visitor.reject(operand, "multiplied in blocks, with inputs that change")
            return results, {}
        x = plain(args[product.operand])
        if product.back is None:
            y, taps = walk.visitor.product(operand, product, x, results[0], walk)
            return [plain(y) if adds else y], taps
        part, taps = walk.visitor.product(operand, product, x, jnp.zeros_like(results[0]), walk)
        arrays = [plain(arg) for arg in args]
        return [results[0] + derivatives.passing(product.back, arrays, plain(part))], taps
    return None


def _is_fixed(x: Any, view: View) -> bool:
    """Whether an operand is the same at each step of the scans over blocks of the leaf."""
    sites = {block.site for block in view.blocks}
    return isinstance(x, Constant) or sites <= (x.sites if isinstance(x, Fixed) else set())


def _may_be_bias(view: View, other: Any) -> bool:
    """Whether a leaf is added to a product, and along no axis that only numbers positions."""
    return (
        isinstance(other, Output)
        and not view.scales
        and len(view.dims) == len(other.dims)  # JAX adds a scalar as it is
        and not any(
            labels.extent(dim) > 1 and not labels.axes(result) and labels.axes(dim)
            for dim, result in zip(view.dims, other.dims, strict=True)
        )
    )


def _product_with_sum(
    eqn: JaxprEqn, operand: Sum, args: list[Any], number: int, y: jax.Array, walk: Walk
) -> Evaluated | None:
    """A product with a sum of weights: to its result each weight adds a part of its own."""
    parts, adds = [], eqn.primitive.name in ("add", "add_any")
    for term in operand.terms:
        view = term.spread(y.shape) if adds else term
        product = products.describe(eqn, view, number)
        if product is None or product.back or not _is_fixed(args[product.operand], view):
            return None
        narrowed = product.between(view.margins, plain(args[product.operand]), y)
        if narrowed is None:
            return None
        parts.append((view, product, narrowed))
    both = []
    for chain in operand.chains:
        steps = chains.steps(eqn, chain, number)
        if steps is None:
            return None
        both.append((chain, steps))
    taps: Taps = {}
    for i, (view, product, (x, padding)) in enumerate(parts):
        shape = [size - low - high for size, (low, high, _) in zip(y.shape, padding, strict=True)]
        nothing = jnp.zeros(shape, y.dtype)
        part, recorded = walk.visitor.product(view, product, x, nothing, walk.at(i))
        y = y + jax.lax.pad(plain(part), jnp.zeros((), y.dtype), padding)
        taps.update(recorded)
    for i, (chain, steps) in enumerate(both, start=len(parts)):
        part, recorded = _product_with_chain(chain, steps, plain(args[1 - number]), walk.at(i))
        y = y + part.astype(y.dtype)
        taps.update(recorded)
    return [y], taps


def _product_with_chain(
    chain: Chain, steps: Steps, x: jax.Array, walk: Walk
) -> tuple[jax.Array, Taps]:
    """What the two leaves of x (a b) add to it: that of a goes through b, that of b sees x a."""
    first, second = chain.views[steps.first], chain.views[1 - steps.first]
    between = jax.lax.dot_general(x, first.value, steps.of_first)
    part, taps = _nothing_but(first, x, steps.of_first, walk.at(0))
    through = jax.lax.dot_general(part, second.value, steps.of_second)
    part, recorded = _nothing_but(second, between, steps.of_second, walk.at(1))
    y = (through + part).transpose(steps.order)
    for scale in chain.scales:
        y = y * scale
    return y, taps | recorded


def _nothing_but(view: View, x: jax.Array, dimensions: Any, walk: Walk) -> tuple[jax.Array, Taps]:
    """What the visitor adds to a product of x with a leaf, without the product."""
    multiply = functools.partial(jax.lax.dot_general, dimension_numbers=dimensions)
    (eqn,) = jax.make_jaxpr(multiply)(x, view.value).eqns
    product = products.describe(eqn, view, 1)
    result = views.aval(eqn.outvars[0])
    if product is None:
        walk.visitor.reject(view, "used by dot_general")
        return jnp.zeros(result.shape, result.dtype), {}
    nothing = jnp.zeros(result.shape, result.dtype)
    y, taps = walk.visitor.product(view, product, x, nothing, walk)
    return plain(y), taps


def _without_expressions(eqn: JaxprEqn, args: list[Any], found: list[int], walk: Walk) -> list[int]:
    """Where a leaf meets a sum or a scaled leaf in a product, it is the matrix that is followed."""
    bare = [i for i in found if isinstance(args[i], View) and not args[i].scales]
    if len(found) == 1 or len(bare) != 1 or eqn.primitive.name != "dot_general":
        return found
    for i in found:
        if i != bare[0]:
            for view in views_of(args[i]):
                walk.visitor.reject(view, f"used by dot_general with {args[bare[0]].leaf}")
            args[i] = plain(args[i])
    return bare


def plain(value: Any) -> Any:
    """Strips what is known of an array."""
    known = View | Sum | Constant | Fixed | Output | Counted
    return value.value if isinstance(value, known) else value


def _untouched(eqn: JaxprEqn, args: list[Any]) -> list[Any]:
    """An equation without parameters; a product's result may be renamed on its way to a bias."""
    results = _bind(eqn, args)
    if args and isinstance(output := args[0], Output) and len(args) == 1 and len(results) == 1:
        dims = views.renamed(eqn, output.dims)
        if dims is not None:
            return [dataclasses.replace(output, value=results[0], dims=dims)]
    counted = counters.computed(eqn, args, results[0]) if len(results) == 1 else None
    return [counted] if counted else sums.untouched(eqn, args, results)


def _bind(eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    return derivatives.bind(eqn, [plain(arg) for arg in args])


def _call(eqn: JaxprEqn, args: list[Any], walk: Walk) -> Evaluated:
    """A nested jit is inlined."""
    params = eqn.params
    return evaluate(params.get("jaxpr") or params["call_jaxpr"], args, walk)


def _remat(eqn: JaxprEqn, args: list[Any], walk: Walk) -> Evaluated:
    params = eqn.params
    inner = params["jaxpr"]

    def body(args: list[Any], sinks: Taps) -> Evaluated:
        return _evaluate_inside(inner, args, dataclasses.replace(walk, sinks=sinks))

    checkpointed = jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return checkpointed(_without_outputs(args), walk.inside())


def _scan(eqn: JaxprEqn, args: list[Any], walk: Walk) -> Evaluated:
    """A leaf that the scan runs over is a stack of layers; one that it closes over is reused."""
    params, args = eqn.params, _without_outputs(args)
    place = counters.carried_by(eqn)
    first, last = place.start, place.stop
    for carried in args[first:last]:
        _reject(carried, "carried by a scan", walk)
    consts = [_fixed(const, walk.site) for const in args[:first]]
    init = [plain(x) for x in args[first:last]]
    xs = list(args[last:])
    for i, x in enumerate(xs):
        if isinstance(x, Sum):
            _reject(x, "joined with others, and then scanned over", walk)
            xs[i] = plain(x)
    stepping = dataclasses.replace(walk, loops=(*walk.loops, (walk.site, params["length"])))
    layers = [x.scanned(walk.site) if isinstance(x, View) else None for x in xs]
    counts = [*counters.carried(eqn, args[first:last]), *map(counters.in_scan, xs)]
    returned: list[Any] = []

    def body(carry: list[Any], step: tuple[list[Any], Taps, jax.Array]) -> tuple[list[Any], Any]:
        given, sinks, number = step
        rows = [
            x if layer is None else layer.at_step(x, number)
            for layer, x in zip(layers, given, strict=True)
        ]
        inside = dataclasses.replace(stepping, sinks=sinks)
        given = [
            x if known is None else Counted(value=x, step=number, site=walk.site, entries=known)
            for x, known in zip((*carry, *rows), counts, strict=True)
        ]
        results, taps = _evaluate_inside(params["jaxpr"], [*consts, *given], inside)
        for result in results[: len(init)]:
            _reject(result, "carried by a scan", walk)
        for result in results[len(init) :]:
            if _known(result) is None:
                _reject(result, "returned by a scan", walk)
        returned[:] = [_known(result) for result in results[len(init) :]]
        results = [plain(result) for result in results]
        return results[: len(init)], (results[len(init) :], taps)

    stacked = [x.for_scan() if isinstance(x, View) else plain(x) for x in xs]
    carry, (ys, taps) = jax.lax.scan(
        body,
        init,
        (stacked, walk.inside(), jnp.arange(params["length"])),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    # A layer that is returned as it came is still the stacked leaf: nnx returns all its state.
    whole = {
        (_known(layer), plain(x).dtype): x for layer, x in zip(layers, xs, strict=True) if layer
    }
    ys = [
        whole.get((known, y.dtype), known.lose(y, "returned by a scan")) if known else y
        for known, y in zip(returned, ys, strict=True)
    ]
    return [*carry, *ys], taps


def _cond(eqn: JaxprEqn, args: list[Any], walk: Walk) -> Evaluated:
    """Each branch is entered; what it records is zero where another one is taken."""
    branches, (index, *operands) = eqn.params["branches"], _without_outputs(args)
    arrays = [plain(operand) for operand in operands]

    def branch(number: int, everything: bool, arrays: list[Any]) -> Evaluated:
        given = [
            dataclasses.replace(operand, value=x) if plain(operand) is not operand else x
            for operand, x in zip(operands, arrays, strict=True)
        ]
        inside = walk.at(number)
        results, taps = _evaluate_inside(branches[number], given, inside)
        for result in results:
            _reject(result, "returned by a branch", inside)
        others = {site: jax.tree.map(_nothing, tap) for site, tap in recorded.items()}
        return [plain(result) for result in results], (others | taps) if everything else taps

    recorded: Taps = {}
    for number in range(len(branches)):
        trial = functools.partial(branch, number, False)
        recorded |= jax.eval_shape(trial, arrays)[1]
    entered = [functools.partial(branch, number, True) for number in range(len(branches))]
    return jax.lax.switch(plain(index), entered, arrays)


def _nothing(shape: Any) -> jax.Array:
    """Stands for what was not recorded: zero, or an id of no row."""
    dtype = shape.dtype
    whole = jnp.issubdtype(dtype, jnp.integer)
    return jnp.full(shape.shape, jnp.iinfo(dtype).max if whole else 0, dtype)


def _fixed(const: Any, site: Site) -> Any:
    """What a scan closes over is the same at each of its steps."""
    if isinstance(const, View | Sum | Constant):
        return const
    outer = const.sites if isinstance(const, Fixed) else frozenset()
    return Fixed(value=plain(const), sites=outer | {site})


def _known(value: Any) -> View | None:
    """A view without its arrays, for comparison."""
    return value.outline() if isinstance(value, View) and not value.scales else None


def _reject(value: Any, reason: str, walk: Walk) -> None:
    for view in views_of(value):
        walk.visitor.reject(view, view.lost or reason)


def _without_outputs(args: Sequence[Any]) -> list[Any]:
    return [arg.value if isinstance(arg, Output) else arg for arg in args]


def _evaluate_inside(program: Jaxpr | ClosedJaxpr, args: Sequence[Any], walk: Walk) -> Evaluated:
    """Evaluates an inner program; its results are arrays and views, as JAX can pass them on."""
    results, taps = evaluate(program, args, walk)
    return _without_outputs(results), taps


_ENTERED: dict[str, Callable[[JaxprEqn, list[Any], Walk], Evaluated]] = {
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "checkpoint": _remat,
    "remat": _remat,
    "remat2": _remat,
    "scan": _scan,
    "cond": _cond,
}
