"""Functions that draw random numbers and ignore their key."""

import warnings
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_DRAWS = ("random_bits", "threefry2x32", "rng_bit_generator")


def warn_of_shared_randomness(name: str, program: ClosedJaxpr) -> None:
    """Warns of a function that draws random numbers from something else than its key.

    Args:
      name: of the function.
      program: its trace, whose last input is the key.
    """
    if any(_draws(program.jaxpr)) and not _uses(program.jaxpr, program.jaxpr.invars[-1]):
        warnings.warn(
            f"{name!r} draws random numbers, but not from its key: every example gets the same "
            "noise, and gradients are those of that one draw. Use the key, as in "
            "model.apply(variables, x, rngs={'dropout': key}), or nnx.reseed(model, default=key); "
            "or turn them off (deterministic=True, model.eval()).",
            UserWarning,
            stacklevel=2,
        )


def _draws(program: Jaxpr) -> Iterator[bool]:
    for equation in program.eqns:
        yield equation.primitive.name in _DRAWS
        for inner in _inner(equation.params.values()):
            yield from _draws(inner)


def _inner(values: Any) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner(value)


def _uses(program: Jaxpr, key: Any) -> bool:
    used = [atom for equation in program.eqns for atom in equation.invars]
    return any(not isinstance(atom, Literal) and atom is key for atom in used + program.outvars)
