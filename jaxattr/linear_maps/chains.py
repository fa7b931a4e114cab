"""Products of two leaves that are themselves a matrix, as in W + a b: x (a b) = (x a) b."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from jaxattr.linear_maps.views import Constant, View


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """A product of two views, over some axes of both.

    Attributes:
      views: the two, with their values.
      scales: scalars that the product was multiplied by.
      summed: the axes of each that are summed over, in pairs.
      axes: for each axis of the product which view it comes from, and its axis there.
    """

    views: tuple[View, View]
    scales: tuple[jax.Array, ...] = ()
    summed: tuple[tuple[int, ...], tuple[int, ...]] = dataclasses.field(metadata={"static": True})
    axes: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})

    def scaled(self, by: Constant) -> "Chain | None":
        """The product after a multiplication; None where it is not by a scalar."""
        if by.axes:
            return None
        scalar = jnp.asarray(by.value).reshape(-1)[0]
        return dataclasses.replace(self, scales=(*self.scales, scalar))

    def followed(self, eqn: JaxprEqn) -> "Chain | None":
        """The product after an equation that permutes its axes or changes its type, or None."""
        if eqn.primitive.name == "convert_element_type":
            return self
        if eqn.primitive.name != "transpose":
            return None
        return dataclasses.replace(
            self, axes=tuple(self.axes[i] for i in eqn.params["permutation"])
        )


class Steps(NamedTuple):
    """How a product with a chain is taken in two.

    Attributes:
      first: which of the views x is multiplied by.
      of_first: dimension numbers of the product of x with it.
      of_second: those of the product of the result with the other.
      order: the axes of the last result, in the order of the equation's.
    """

    first: int
    of_first: Any
    of_second: Any
    order: tuple[int, ...]


def chain(eqn: JaxprEqn, args: Sequence[Any]) -> Chain | None:
    """Returns the product of two views as a chain; None where it is none."""
    left, right = args
    if not isinstance(left, View) or not isinstance(right, View):
        return None
    summed, (shared, _) = eqn.params["dimension_numbers"]
    if shared or left.blocks or right.blocks:
        return None
    axes = [
        (side, axis)
        for side, view in enumerate((left, right))
        for axis in range(len(view.dims))
        if axis not in summed[side]
    ]
    return Chain(views=(left, right), summed=(tuple(summed[0]), tuple(summed[1])), axes=tuple(axes))


def steps(eqn: JaxprEqn, operand: Chain, number: int) -> Steps | None:
    """Returns how an equation's product with a chain is taken; None where it cannot be.

    Args:
      eqn: an equation.
      operand: the chain, as its only operand with views.
      number: which operand that is.
    """
    if eqn.primitive.name != "dot_general":
        return None
    contracting, (shared, _) = eqn.params["dimension_numbers"]
    mine, of_x = contracting[number], contracting[1 - number]
    sides = {operand.axes[i][0] for i in mine}
    kept = [operand.axes[i] for i in range(len(operand.axes)) if i not in mine]
    if shared or len(sides) != 1 or sides & {side for side, _ in kept}:
        return None
    (first,) = sides
    rank = len(eqn.invars[1 - number].aval.shape) - len(of_x)  # type: ignore[attr-defined]
    between = sorted(operand.summed[first])
    in_result = tuple(rank + between.index(axis) for axis in operand.summed[first])
    kept_axes = [axis for _, axis in kept]
    last = [rank + sorted(kept_axes).index(axis) for axis in kept_axes]
    free = list(range(rank))
    return Steps(
        first=first,
        of_first=((of_x, tuple(operand.axes[i][1] for i in mine)), ((), ())),
        of_second=((in_result, operand.summed[1 - first]), ((), ())),
        order=tuple((*last, *free) if number == 0 else (*free, *last)),
    )
