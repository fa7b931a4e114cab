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

from jaxattr.linear_maps import chains, views
from jaxattr.linear_maps.chains import Chain
from jaxattr.linear_maps.views import Constant, Fixed, View


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum:
    """An array that is a sum of views, each perhaps of a part of it, and of constants.

    Attributes:
      value: the array.
      terms: the views, without values of their own.
      chains: products of two views, as further terms.
    """

    value: Any
    terms: tuple[View, ...]
    chains: tuple[Chain, ...] = ()


def views_of(value: Any) -> tuple[View, ...]:
    """Returns the views that an array is made of."""
    if isinstance(value, Sum):
        return (*value.terms, *(view for chain in value.chains for view in chain.views))
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
    products = [chain.followed(eqn) for chain in operand.chains]
    if any(pieces is None for pieces in (*moved, *products)):
        return None
    by_result = [[pieces[i] for pieces in moved if pieces] for i in range(len(results))]
    return [
        _sum(result, [*(piece for piece in pieces if piece is not None), *products])
        for result, pieces in zip(results, by_result, strict=True)
    ]


def join(eqn: JaxprEqn, args: Sequence[Any], result: jax.Array) -> Sum | None:
    """Adds, concatenates or multiplies views, sums and constants; None where an equation does not.

    A product is one of two views.
    """
    if not all(isinstance(arg, View | Sum | Constant) for arg in args):
        return None
    name = eqn.primitive.name
    if name == "dot_general":
        found = chains.chain(eqn, args)
        return _all(result, [found])
    if name in ("add", "add_any", "sub"):
        second = _terms(args[1])
        if name == "sub":
            minus = Constant(value=jnp.array(-1, result.dtype), axes=())
            second = [_scaled(term, minus, result) for term in second]
        terms = [*_terms(args[0]), *second]
        return _all(result, [x.spread(result.shape) if isinstance(x, View) else x for x in terms])
    if name in ("concatenate", "stack") and not any(_chains(arg) for arg in args):
        return _joined(eqn, args, result)
    return None


def _joined(eqn: JaxprEqn, args: Sequence[Any], result: jax.Array) -> Any:
    is_new = eqn.primitive.name == "stack"
    axis = eqn.params["axis" if is_new else "dimension"]
    start, terms = 0, []
    for arg in args:
        size = 1 if is_new else np.shape(arg.value)[axis]
        outside = start, result.shape[axis] - start - size
        terms += [_widened(term, axis, outside, is_new) for term in views_of(arg)]
        start += size
    return _sum(result, terms)


def multiply(eqn: JaxprEqn, args: Sequence[Any], number: int, result: jax.Array) -> Any:
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
    terms = [_scaled(term, by, result) for term in _terms(operand)]
    return terms[0] if isinstance(operand, View) else _all(result, terms)


def untouched(eqn: JaxprEqn, args: Sequence[Any], results: Sequence[jax.Array]) -> list[Any]:
    """Says of the results of an equation without views whether they are constants, or fixed."""
    if eqn.effects or not all(isinstance(arg, Constant | Fixed) for arg in args):
        return list(results)
    fixed = [arg.sites for arg in args if isinstance(arg, Fixed)]
    if fixed:
        return [Fixed(value=result, sites=frozenset.intersection(*fixed)) for result in results]
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
    if isinstance(by.value, jax.core.Tracer) or not np.size(by.value):
        return by
    if isinstance(by.value, jax.Array) and not by.value.is_fully_addressable:
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


def _chains(value: Any) -> tuple[Chain, ...]:
    return value.chains if isinstance(value, Sum) else ()


def _terms(value: Any) -> list[Any]:
    return [*(value.terms if isinstance(value, Sum) else views_of(value)), *_chains(value)]


def _scaled(term: View | Chain, by: Constant, result: jax.Array) -> View | Chain | None:
    if isinstance(term, Chain):
        return term.scaled(by)
    factor = jnp.asarray(by.value, result.dtype)
    return term.spread(result.shape).scaled(result, factor, by.axes)


def _all(value: jax.Array, terms: Sequence[Any]) -> Any:
    return None if any(term is None for term in terms) else _sum(value, terms)


def _sum(value: jax.Array, terms: Sequence[Any]) -> Any:
    if not terms:
        return constant(value)
    found = [dataclasses.replace(term, value=None) for term in terms if isinstance(term, View)]
    products = tuple(term for term in terms if isinstance(term, Chain))
    return Sum(value=value, terms=tuple(found), chains=products)
