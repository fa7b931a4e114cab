"""Products that a user declares to be linear maps, whatever their derivatives are written as."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import JaxprEqn

_NAME = "jaxattr_linear_map"


def linear_map(function: Callable[..., Any], *, x: str | int, w: str | int) -> Callable[..., Any]:
    """Declares that a function with derivatives of its own multiplies by a weight.

    A product with a `custom_vjp` is followed if the trace of that shows a product (8-bit floats,
    straight-through rounding). One that does not, such as a kernel, is opaque: without this, the
    gradient of its weight is formed for each example.

    Args:
      function: returns y [..., out], of x [..., in], a weight w [in, out], and anything else.
      x: name or position of the argument x.
      w: name or position of the argument w; several output axes, [in, *out], become those of y.

    Returns:
      The function, which computes and differentiates as before. Where a loss passes it a parameter
      as w, that is followed as the matrix of y = x w.

    Guarantees: the derivative with respect to w is taken to be x^T (dL/dy), summed over positions.
      That is the caller's word: nothing checks what the function's own rule returns for w, and the
      features follow the declaration. All other derivatives are the function's own. Under `vmap`,
      and where shapes do not fit, the declaration is not used.

    Raises:
      TypeError: if the function has no such two arguments; when called, if it is not given both, or
        x and w are not single arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> rounded = linear_map(lambda x, w: x @ jnp.round(w), x="x", w="w")
      >>> rounded(jnp.ones((1, 2)), jnp.array([[0.6], [1.7]])).tolist()
      [[3.0]]
    """
    if not callable(function):
        raise TypeError(f"linear_map takes a function, got {type(function).__name__}.")
    signature = inspect.signature(function)
    names = [_named(signature, each) for each in (x, w)]
    if names[0] == names[1]:
        raise TypeError(f"x and w must be two arguments, and both are {names[0]!r}.")

    @functools.wraps(function)
    def declared(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        operands: list[Any] = [bound.arguments.get(name) for name in names]
        if not all(hasattr(operand, "shape") for operand in operands):
            got = [type(operand).__name__ for operand in operands]
            raise TypeError(
                f"A linear map takes arrays as {names[0]!r} and {names[1]!r}, got {got}."
            )

        # A trace keeps names, and a derivative of it keeps them for what it had before alone.
        def product(*operands: Any) -> Any:
            marked = map(checkpoint_name, operands, (_mark(each) for each in operands))
            bound.arguments.update(zip(names, marked, strict=True))
            return checkpoint_name(function(*bound.args, **bound.kwargs), _NAME)

        return jax.jit(product)(*operands)

    return declared


def is_declared(eqn: JaxprEqn) -> bool:
    """Returns whether an equation is a declared linear map; its last two operands are x and w."""
    inner = getattr(eqn.params.get("jaxpr"), "jaxpr", None)
    if inner is None or len(eqn.invars) < 2 or len(eqn.outvars) != 1:
        return False
    named = [each for each in inner.eqns if each.primitive.name == "name"]
    marks = {each.invars[0]: each.params["name"] for each in named}
    results = {each.outvars[0] for each in named if each.params["name"] == _NAME}
    operands = inner.invars[-2:]
    # A vmap would add axes in places that cannot be known: there are as many as there were.
    if not results & {*inner.outvars} or any(marks.get(v) != _mark(v.aval) for v in operands):
        return False
    x, w, y = (v.aval.shape for v in (*operands, inner.outvars[0]))
    return bool(x) and bool(w) and x[-1] == w[0] and y == (*x[:-1], *w[1:])


def _mark(operand: Any) -> str:
    return f"{_NAME}_of_rank_{len(operand.shape)}"


def _named(signature: inspect.Signature, argument: str | int) -> str:
    names = list(signature.parameters)
    if isinstance(argument, int) and argument < len(names):
        return names[argument]
    if argument not in names:
        raise TypeError(f"The function has arguments {names}, but none is {argument!r}.")
    return str(argument)
