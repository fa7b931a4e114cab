"""Sums of views: weights that are joined, added or multiplied by constants before they are used.

A product with a sum is the sum of the products. So what is known of each leaf in it stays apart,
and of the sum itself no more than its value is needed: a constant in it takes no part.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from jaxattr.linear_maps import views
from jaxattr.linear_maps.views import Constant, View


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum:
    """An array that is a sum of views, each perhaps of a part of it, and of constants.

    Attributes:
      value: the array.
      terms: the views, without values of their own.
    """

    value: Any
    terms: tuple[View, ...]


def views_of(value: Any) -> tuple[View, ...]:
    """Returns the views that an array is made of."""
    if isinstance(value, Sum):
        return value.terms
    return (value,) if isinstance(value, View) else ()


def constant(value: Any) -> Constant:
    """Returns an array as one that nothing of interest has a part in."""
    return Constant(value=value, axes=tuple(range(np.ndim(value))))


def follow(eqn: JaxprEqn, operand: View | Sum, results: Sequence[jax.Array]) -> list[Any] | None:
    """Follows an equation that moves entries of its only operand; see `views.follow`.

    Returns:
      A view, a sum or a constant per result; None where the equation does something else.
    """
    if isinstance(operand, View):
        return views.follow(eqn, operand, results)
    moved = [views.follow(eqn, term, results) for term in operand.terms]
    if any(pieces is None for pieces in moved):
        return None
    by_result = [[pieces[i] for pieces in moved if pieces] for i in range(len(results))]
    return [
        _sum(result, [piece for piece in pieces if piece is not None])
        for result, pieces in zip(results, by_result, strict=True)
    ]


def join(eqn: JaxprEqn, args: Sequence[Any], result: jax.Array) -> Sum | None:
    """Adds or concatenates views, sums and constants; None where the equation does not."""
    if not all(isinstance(arg, View | Sum | Constant) for arg in args):
        return None
    if eqn.primitive.name in ("add", "add_any", "sub"):
        first, second = ([x.spread(result.shape) for x in views_of(arg)] for arg in args)
        minus = jnp.array(-1, result.dtype)
        if eqn.primitive.name == "sub":
            return _all(result, [*first, *(x.scaled(result, minus, ()) for x in second)])
        return _sum(result, [*first, *second])
    if eqn.primitive.name not in ("concatenate", "stack"):
        return None
    is_new = eqn.primitive.name == "stack"
    axis = eqn.params["axis" if is_new else "dimension"]
    start, terms = 0, []
    for arg in args:
        size = 1 if is_new else np.shape(arg.value)[axis]
        outside = start, result.shape[axis] - start - size
        terms += [_widened(term, axis, outside, is_new) for term in views_of(arg)]
        start += size
    return _sum(result, terms)


def multiply(
    eqn: JaxprEqn, args: Sequence[Any], number: int, result: jax.Array
) -> View | Sum | None:
    """Multiplies a view or a sum by a constant; None where the equation does not.

    Args:
      eqn: the equation.
      args: its operands.
      number: which of them is the only one with views.
      result: what it returns.
    """
    name, operand = eqn.primitive.name, args[number]
    if name == "neg":
        by = Constant(value=jnp.array(-1, result.dtype), axes=())
    elif name in ("mul", "div") and isinstance(args[1 - number], Constant):
        by = _exact_axes(args[1 - number])
    else:
        return None
    if name == "div":
        if number == 1:
            return None
        by = Constant(value=1 / by.value, axes=by.axes)
    factor = jnp.asarray(by.value, result.dtype)
    terms = [x.spread(result.shape).scaled(result, factor, by.axes) for x in views_of(operand)]
    return terms[0] if isinstance(operand, View) else _all(result, terms)


def untouched(eqn: JaxprEqn, args: Sequence[Any], results: Sequence[jax.Array]) -> list[Any]:
    """Says of the results of an equation without views whether they are constants."""
    if eqn.effects or not all(isinstance(arg, Constant) for arg in args):
        return list(results)
    name = eqn.primitive.name
    if name == "broadcast_in_dim" and len(args) == 1:
        to = eqn.params["broadcast_dimensions"]
        sizes = np.shape(args[0].value)
        return [Constant(value=results[0], axes=tuple(to[i] for i in args[0].axes if sizes[i] > 1))]
    if name == "convert_element_type":
        return [dataclasses.replace(args[0], value=results[0])]
    return [constant(result) for result in results]


def _exact_axes(by: Constant) -> Constant:
    """A constant whose entries are known now varies along no more axes than they do."""
    if isinstance(by.value, jax.core.Tracer):
        return by
    entries = np.asarray(by.value)
    axes = [i for i in by.axes if (entries != entries.take([0], axis=i)).any()]
    return dataclasses.replace(by, axes=tuple(axes))


def _widened(view: View, axis: int, outside: tuple[int, int], is_new: bool) -> View:
    """A view as a part of a larger array, perhaps along an axis that it lacks."""
    dims, margins = list(view.dims), list(view.margins or ((0, 0),) * len(view.dims))
    if is_new:
        dims.insert(axis, ())
        margins.insert(axis, (0, 0))
    margins[axis] = margins[axis][0] + outside[0], margins[axis][1] + outside[1]
    return dataclasses.replace(view, dims=tuple(dims), margins=tuple(margins))


def _all(value: jax.Array, terms: Sequence[View | None]) -> Sum | None:
    known = [term for term in terms if term is not None]
    return _sum(value, known) if len(known) == len(terms) else None


def _sum(value: jax.Array, terms: Sequence[View]) -> Any:
    if not terms:
        return constant(value)
    return Sum(value=value, terms=tuple(dataclasses.replace(x, value=None) for x in terms))
