"""What equations with derivatives of their own do to a gradient, read from the trace of these.

Rounding with a straight-through gradient hands its operand the cotangent as it came, whatever it
computes; a quantised product hands its weight what a product would. Both show in the program that
maps the cotangents of the results to those of the operands.
"""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from jaxattr.linear_maps.views import aval

STOPS = frozenset({"stop_gradient", "round", "floor", "ceil", "sign"})
"""Operations whose derivative is zero."""

_CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call"})


class Multiplied(NamedTuple):
    """A product with a weight, as its derivative says.

    Attributes:
      x: number of the operand that is multiplied by the weight.
      side: which operand of a `dot_general` the weight would be.
      dimensions: dimension numbers of that.
      back: (operands, cotangent) -> by what x is multiplied in the weight's gradient, where that is
        not the cotangent as it came, but one that is rounded, say; else None.
    """

    x: int
    side: int
    dimensions: Any
    back: Callable[[Sequence[Any], jax.Array], jax.Array] | None


class Derivative(NamedTuple):
    """What an equation hands back to its operands, where that is simple.

    Attributes:
      nothing: numbers of the operands that get zero.
      passed: numbers of those that get the cotangent of the only result as it came.
      multiplied: for the number of an operand of which it is a product, that product.
    """

    nothing: frozenset[int] = frozenset()
    passed: frozenset[int] = frozenset()
    multiplied: dict[int, Multiplied] = {}


def bind(eqn: JaxprEqn, arrays: Sequence[Any]) -> list[Any]:
    """Evaluates an equation."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # a pair before jax 0.9
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*functions, *arrays, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def live(jaxpr: Jaxpr, followed: Collection[Var] | None = None) -> set[Var]:
    """Returns the variables that the results of a program depend on.

    Args:
      jaxpr: the program.
      followed: arguments whose gradient is looked at. If given, only variables that a gradient of
        the results reaches are returned; what a derivative of its own ignores may be among those
        that none of these arguments has a part in.
    """
    reached = set(followed or ())
    for eqn in jaxpr.eqns if followed else ():
        if not reached.isdisjoint(v for v in eqn.invars if isinstance(v, Var)):
            reached.update(eqn.outvars)
    found = {v for v in jaxpr.outvars if isinstance(v, Var)}
    for eqn in reversed(jaxpr.eqns):
        needless = found.isdisjoint(eqn.outvars) and not eqn.effects
        if needless or (followed is not None and eqn.primitive.name in STOPS):
            continue
        needed = [v for v in eqn.invars if isinstance(v, Var)]
        if followed is not None:
            needed = [v for v in needed if jnp.issubdtype(aval(v).dtype, jnp.inexact)]
            if eqn.primitive.name == "custom_vjp_call" and len(reached.intersection(needed)) > 1:
                nothing = derivative(eqn).nothing
                needed = [v for i, v in enumerate(eqn.invars) if v in needed and i not in nothing]
        found.update(needed)
    return found


def derivative(eqn: JaxprEqn) -> Derivative:
    """Returns what an equation with a derivative of its own hands back; nothing of others."""
    # With symbolic zeros it may depend on what else is differentiated.
    if eqn.primitive.name not in _CUSTOM or eqn.params.get("symbolic_zeros"):
        return Derivative()
    operands, cotangents = (
        [jax.ShapeDtypeStruct(aval(v).shape, aval(v).dtype) for v in variables]
        for variables in (eqn.invars, eqn.outvars)
    )
    floats = [i for i, x in enumerate(operands) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def handed_back(operands: list[Any], cotangents: list[Any]) -> Any:
        def function(given: dict[int, Any]) -> list[Any]:
            return bind(eqn, [given.get(i, x) for i, x in enumerate(operands)])

        (result,) = jax.vjp(function, {i: operands[i] for i in floats})[1](cotangents)
        return [result[i] for i in floats]

    closed = jax.make_jaxpr(handed_back)(operands, cotangents)
    program = closed.jaxpr
    makers = {v: each for each in program.eqns for v in each.outvars}
    given, g = program.invars[: len(operands)], program.invars[len(operands)]
    results = dict(zip(floats, program.outvars, strict=True))
    nothing = frozenset(i for i, v in results.items() if _is_zero(v, makers))
    if len(cotangents) > 1 or not _is_fine(g):
        return Derivative(nothing)
    passed = frozenset(i for i, v in results.items() if _source(v, makers) is g)
    products = {
        i: _product(v, makers, given, g, closed) for i, v in results.items() if isinstance(v, Var)
    }
    multiplied = {i: each for i, each in products.items() if each is not None}
    same = frozenset(i for i in passed if operands[i].shape == cotangents[0].shape)
    return Derivative(nothing, same, multiplied)


def passing(back: Callable, operands: Sequence[Any], y: jax.Array) -> jax.Array:
    """Returns y, whose cotangent becomes what `back` makes of it."""

    @jax.custom_vjp
    def same(y: jax.Array, operands: list[Any]) -> jax.Array:
        return y

    def backwards(operands: list[Any], g: jax.Array) -> tuple[jax.Array, None]:
        return back(operands, g), None

    same.defvjp(lambda y, operands: (y, operands), backwards)
    return same(y, list(operands))


def _product(
    v: Any, makers: dict[Var, JaxprEqn], operands: list[Var], g: Var, closed: ClosedJaxpr
) -> Multiplied | None:
    """The product of which a cotangent is that of the weight: g^T x, in all its layouts.

    Instead of g there may be anything of its shape, and a scalar may multiply it all.
    """
    scales, (v, order) = [], _untransposed(v, makers)
    while (eqn := makers.get(v)) is not None and eqn.primitive.name == "mul":
        spread = [_scalar(each, makers) for each in eqn.invars]
        if spread.count(None) != 1:
            return None
        scales.append(spread[1 - spread.index(None)])
        v, inner = _untransposed(eqn.invars[spread.index(None)], makers)
        order = tuple(inner[i] for i in order)
    if eqn is None or eqn.primitive.name != "dot_general":
        return None
    factors, axes = zip(*(_untransposed(each, makers) for each in eqn.invars), strict=True)
    from_outside = [factor in operands for factor in factors]
    if from_outside.count(True) != 1:
        return None
    of_x = from_outside.index(True)
    if aval(factors[1 - of_x]).shape != aval(g).shape:
        return None
    found = _layout(eqn, axes, of_x, order)
    if found is None:
        return None
    parts = [factors[1 - of_x], *scales]
    back = None if parts == [g] else functools.partial(_evaluated, closed, parts)
    return Multiplied(operands.index(factors[of_x]), *found, back)


def _layout(
    eqn: JaxprEqn, axes: Sequence[tuple[int, ...]], of_x: int, order: Sequence[int]
) -> tuple[int, Any] | None:
    """Side and dimension numbers of the product whose weight has a gradient from a `dot_general`.

    Args:
      eqn: the `dot_general` of x and g.
      axes: for each of its operands, which axis of x or g each of its axes is.
      of_x: which of them x is.
      order: which axis of its result each axis of the weight is.
    """
    (summed, shared), of_g = eqn.params["dimension_numbers"], 1 - of_x
    rows, layers = ([[axes[s][i] for i in pair[s]] for s in (0, 1)] for pair in (summed, shared))
    kept = [[i for i in axes[s] if i not in (*rows[s], *layers[s])] for s in (0, 1)]
    made = [("layer", i) for i in layers[of_x]] + [(str(s), i) for s in (0, 1) for i in kept[s]]
    place = {made[axis]: i for i, axis in enumerate(order)}  # of each of them in the weight
    ins = tuple(kept[of_x]), tuple(place[str(of_x), i] for i in kept[of_x])
    stack = tuple(layers[of_x]), tuple(place["layer", i] for i in layers[of_x])
    positions = [i for _, i in sorted(zip(rows[of_x], rows[of_g], strict=True))]
    outs = sorted(kept[of_g], key=lambda i: place[str(of_g), i])
    # The axes of the result lie as those of a dot_general, with the weight before x or behind it.
    for side, after in enumerate([[*outs, *positions], [*positions, *outs]]):
        if [*layers[of_g], *after] == [*range(len(layers[of_g]) + len(after))]:
            return side, (ins, stack) if side else (ins[::-1], stack[::-1])
    return None


def _evaluated(
    closed: ClosedJaxpr, parts: Sequence[Var], operands: Sequence[Any], g: jax.Array
) -> jax.Array:
    """The first of some variables of a program, times the others, which are scalars."""
    program = ClosedJaxpr(closed.jaxpr.replace(outvars=list(parts)), closed.consts)
    first, *scales = jaxpr_as_fun(program)(*operands, g)
    result = first.astype(g.dtype)
    for scale in scales:
        result = result * scale.reshape(()).astype(g.dtype)
    return result


def _scalar(v: Any, makers: dict[Var, JaxprEqn]) -> Var | None:
    """What a variable repeats, if that is one number."""
    eqn = makers.get(v) if isinstance(v, Var) else None
    if eqn is None or eqn.primitive.name != "broadcast_in_dim":
        return None
    (given,) = eqn.invars
    return given if isinstance(given, Var) and math.prod(aval(given).shape) == 1 else None


def _untransposed(v: Any, makers: dict[Var, JaxprEqn]) -> tuple[Any, tuple[int, ...]]:
    """What a variable is a transpose of, and which axis of that each of its own is."""
    v = _source(v, makers)
    order = tuple(range(len(aval(v).shape)))
    while (eqn := makers.get(v)) is not None and eqn.primitive.name == "transpose":
        order = tuple(eqn.params["permutation"][i] for i in order)
        v = _source(eqn.invars[0], makers)
    return v, order


def _source(v: Any, makers: dict[Var, JaxprEqn]) -> Any:
    """The variable that another one is, but for a conversion between types of 16 bits or more."""
    while isinstance(v, Var) and (eqn := makers.get(v)) is not None:
        if eqn.primitive.name != "convert_element_type" or not _is_fine(v, eqn.invars[0]):
            break
        v = eqn.invars[0]
    return v


def _is_fine(*variables: Any) -> bool:
    types = [aval(v).dtype for v in variables]
    return all(jnp.issubdtype(each, jnp.floating) and each.itemsize > 1 for each in types)


def _is_zero(v: Any, makers: dict[Var, JaxprEqn]) -> bool:
    if isinstance(v, Var) and (eqn := makers.get(v)) is not None:
        return eqn.primitive.name == "broadcast_in_dim" and _is_zero(eqn.invars[0], makers)
    return isinstance(v, Literal) and v.val == 0
