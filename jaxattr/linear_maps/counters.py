"""Places that are computed from the number of a scan's step, as in `w[i * size :][:size]`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Var

from jaxattr.inputs.traces import dtype_of
from jaxattr.linear_maps.views import Constant, Site, View, aval

_LONGEST = 1 << 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
    """A whole number whose value at each step of a scan is known.

    Attributes:
      value: the scalar.
      step: number of the step.
      site: the scan.
      entries: the value at each of its steps.
    """

    value: Any
    step: Any
    site: Site = dataclasses.field(metadata={"static": True})
    entries: tuple[int, ...] = dataclasses.field(metadata={"static": True})


_RULES: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "lt": np.less,
    "select_n": lambda which, *cases: np.choose(np.asarray(which).astype(int), cases),
    "convert_element_type": np.asarray,
}


def computed(eqn: JaxprEqn, args: Sequence[Any], result: jax.Array) -> Counted | Constant | None:
    """Returns what an equation makes of whole numbers that are known; None if it does not."""
    name, shape = eqn.primitive.name, np.shape(result)
    if not _is_whole(result) or len(shape) > 1:
        return None
    if name == "iota":
        every = tuple(range(shape[0])) if shape[0] <= _LONGEST else None
        return Constant(value=result, axes=(0,), entries=every)
    counters = [arg for arg in args if isinstance(arg, Counted)]
    counted: list[Any] = counters or [
        arg for arg in args if isinstance(arg, Constant) and arg.entries
    ]
    known = [entries(arg) for arg in args] if counted and name in _RULES else [None]
    apart = any(np.ndim(arg.value) for arg in args if counters and isinstance(arg, Constant))
    if apart or len({counter.site for counter in counters}) > 1 or any(x is None for x in known):
        return None
    found = np.atleast_1d(_RULES[name](*known))
    if (found.astype(result.dtype) != found).any():
        return None  # it wraps around
    numbers = tuple(found.astype(int).tolist())
    return dataclasses.replace(counted[0], value=result, entries=numbers)


def entries(value: Any) -> np.ndarray | None:
    """Returns the entries of whole numbers, of a counter those at each step; None if not known."""
    if isinstance(value, Counted):
        return np.array(value.entries)
    if not isinstance(value, Constant) or np.ndim(value.value) > 1 or not _is_whole(value.value):
        return None
    if value.entries is not None:
        return np.array(value.entries)
    unknown = isinstance(value.value, jax.core.Tracer) or np.size(value.value) > _LONGEST
    return None if unknown else np.asarray(value.value)


def in_scan(xs: Any) -> tuple[int, ...] | None:
    """Returns what each step sees of an array that a scan runs over, if that is known."""
    known = entries(xs)
    return tuple(known.tolist()) if known is not None and known.ndim else None


def carried_by(eqn: JaxprEqn) -> slice:
    """Which operands a scan carries; it closes over those before, and runs over those behind.

    By shapes: releases of JAX keep these counts under other names.
    """
    body = eqn.params["jaxpr"].jaxpr

    def cut(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(len(aval(x).shape) > len(aval(row).shape) for x, row in pairs)

    last = len(eqn.invars) - cut(eqn.invars, body.invars)
    return slice(last - len(eqn.outvars) + cut(eqn.outvars, body.outvars), last)


def carried(eqn: JaxprEqn, init: Sequence[Any]) -> list[tuple[int, ...] | None]:
    """For each value that a scan carries, what it is at each step if it counts these; else None."""
    program, consts = eqn.params["jaxpr"].jaxpr, carried_by(eqn).start
    result: list[tuple[int, ...] | None] = []
    made = {v: each for each in program.eqns for v in each.outvars}
    for before, after, first in zip(program.invars[consts:], program.outvars, init, strict=False):
        start, by = entries(first), made.get(after) if isinstance(after, Var) else None
        counts = by is not None and by.primitive.name == "add" and by.invars[0] is before
        step = getattr(by.invars[1], "val", None) if by is not None and counts else None
        if start is None or start.ndim or step is None or eqn.params["reverse"]:
            result.append(None)
        else:
            result.append(tuple(int(start + i * step) for i in range(eqn.params["length"])))
    return result


def follow(eqn: JaxprEqn, args: Sequence[Any], result: jax.Array) -> View | None:
    """Follows a slice that takes the parts of an axis of its operand in turn, one at each step."""
    view = args[0]
    if eqn.primitive.name != "dynamic_slice" or not isinstance(view, View) or view.margins:
        return None
    shape, sizes = aval(eqn.invars[0]).shape, eqn.params["slice_sizes"]
    cut = [i for i, (full, size) in enumerate(zip(shape, sizes, strict=True)) if size != full]
    counter = args[1 + cut[0]] if len(cut) == 1 else None
    if not isinstance(counter, Counted):
        return None
    full, size = shape[cut[0]], sizes[cut[0]]
    if full % size or counter.entries != tuple(range(0, full, size)):
        return None
    return view.in_turn(result, cut[0], counter.site, counter.step)


def _is_whole(value: Any) -> bool:
    return jnp.issubdtype(dtype_of(value), jnp.integer) or dtype_of(value) == np.dtype(bool)
