"""Traces of users' functions, and what those say: which inputs are read, where noise comes from."""

import contextlib
import contextvars
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

_DRAWS = ("random_bits", "threefry2x32", "rng_bit_generator")
_LOOPS = ("scan", "while")


def shapes_of(tree: Any) -> Any:
    """Returns a pytree of arrays, numbers or shapes as shapes, `jax.ShapeDtypeStruct`.

    Of the types that JAX takes them as: of NumPy's float64 that is float32, unless it is enabled.
    """

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(dtype_of(x), allow_extended_dtype=True)
        return jax.ShapeDtypeStruct(jnp.shape(x), dtype)

    return jax.tree.map(shape, tree)


def dtype_of(x: Any) -> Any:
    """Returns the dtype of an array, a number or a shape."""
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


def eagerly() -> contextlib.AbstractContextManager[Any]:
    """Within this, JAX computes arrays also where a user's `jit` is being traced.

    Outside of a trace it does nothing: programs would be compiled again, as others.
    """
    traced = isinstance(jnp.zeros(()), jax.core.Tracer)
    return jax.ensure_compile_time_eval() if traced else contextlib.nullcontext()


_SEEN: contextvars.ContextVar[dict[Any, tuple[ClosedJaxpr, Any, Callable]] | None] = (
    contextvars.ContextVar("seen", default=None)
)


@contextlib.contextmanager
def traced_once() -> Iterator[None]:
    """Within this, a function is traced once for arguments of the same shapes."""
    token = _SEEN.set({})
    try:
        yield
    finally:
        _SEEN.reset(token)


def trace(function: Callable, shapes: tuple[Any, ...]) -> tuple[ClosedJaxpr, Any]:
    """Traces a function through a new one, which JAX cannot have traced before.

    What it closes over may have changed since. So traces are kept within `traced_once` alone.

    Args:
      function: a user's.
      shapes: its arguments, `jax.ShapeDtypeStruct` at the leaves.

    Returns:
      The program, and the shapes of its result.
    """
    seen, (leaves, structure) = _SEEN.get(), jax.tree.flatten(shapes)
    # Not by the function itself, which need have no hash; what is seen keeps it alive.
    call = id(function), structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)

    def fresh(*arguments: Any) -> Any:
        return function(*arguments)

    if seen is not None and call in seen:
        return seen[call][:2]
    with jax.disable_jit(False):  # which would unroll loops, or run them on what has no value
        found = jax.make_jaxpr(fresh, return_shape=True)(*shapes)
    if seen is not None:
        seen[call] = (*found, function)
    return found


def activation_bytes(program: Jaxpr) -> int:
    """Bytes of all that a program computes on its way, loops and inner programs included.

    An upper bound of what a backward pass keeps: compilers fuse and recompute. Of a loop that is
    not a scan one turn counts; of branches, the one that computes most.
    """
    total = 0
    for equation in program.eqns:
        inner = [activation_bytes(each) for each in _bodies(equation.params.values())]
        if not inner:
            total += sum(_bytes(result.aval) for result in equation.outvars)
        elif equation.primitive.name == "scan":
            total += equation.params["length"] * max(inner)
        else:
            total += max(inner)
    return total


def _bytes(aval: Any) -> int:
    size = math.prod(getattr(aval, "shape", ()))
    return size * getattr(getattr(aval, "dtype", None), "itemsize", 0)


def warn_of_shared_randomness(name: str, program: ClosedJaxpr, params: int) -> None:
    """Warns of a function whose random numbers depend on neither its example nor its key.

    Args:
      name: of the function.
      program: its trace.
      params: how many of its inputs, the first ones, are parameters.
    """
    own = [number >= params for number in range(len(program.jaxpr.invars))]
    if _followed(program.jaxpr, own)[1] == {False}:
        warnings.warn(
            f"{name!r} draws random numbers, but not from its key: every example gets the same "
            "noise, and gradients are those of that one draw. Use the key, as in "
            "model.apply(variables, x, rngs={'dropout': key}), or nnx.reseed(model, default=key, "
            "dropout=key), by the names of its streams; or turn them off (deterministic=True, "
            "model.eval()).",
            UserWarning,
            stacklevel=2,
        )


def read_inputs(program: Jaxpr, wanted: Sequence[bool] | None = None) -> list[bool]:
    """Which inputs of a program the results may depend on.

    Args:
      program: a trace.
      wanted: which of its results are looked at. Default: all.
    """
    needed = _needed(program, wanted)
    return [variable in needed for variable in program.invars]


def _needed(program: Jaxpr, wanted: Sequence[bool] | None = None) -> set[Any]:
    """The variables that the wanted results may depend on."""
    wanted = [True] * len(program.outvars) if wanted is None else wanted
    needed = {
        atom
        for atom, is_wanted in zip(program.outvars, wanted, strict=True)
        if is_wanted and not isinstance(atom, Literal)
    }
    for equation in reversed(program.eqns):
        if needed.isdisjoint(equation.outvars):
            continue
        inner, asked = _whole_body(equation), [v in needed for v in equation.outvars]
        read = [True] * len(equation.invars) if inner is None else read_inputs(inner, asked)
        needed |= {
            atom
            for atom, is_read in zip(equation.invars, read, strict=True)
            if is_read and not isinstance(atom, Literal)
        }
    return needed


def _followed(program: Jaxpr, inputs: Sequence[bool]) -> tuple[list[bool], set[bool]]:
    """Which results depend on some inputs; and of draws on the way, whether they do."""
    own = {v for v, is_own in zip(program.invars, inputs, strict=True) if is_own}
    draws: set[bool] = set()
    needed = _needed(program)
    for equation in program.eqns:
        if needed.isdisjoint(equation.outvars):
            continue
        given = [not isinstance(atom, Literal) and atom in own for atom in equation.invars]
        inner = _whole_body(equation)
        if inner is not None:
            results, found = _followed(inner, given)
            draws |= found
        else:
            results = [any(given)] * len(equation.outvars)
            for body in _bodies(equation.params.values()):
                draws |= _followed(body, [any(given)] * len(body.invars))[1]
        if equation.primitive.name in _DRAWS:
            draws.add(any(given))
        own |= {v for v, is_own in zip(equation.outvars, results, strict=True) if is_own}
    outputs = [not isinstance(atom, Literal) and atom in own for atom in program.outvars]
    return outputs, draws


def _whole_body(equation: JaxprEqn) -> Jaxpr | None:
    """The program that an equation stands for, if it only calls it (jit, remat)."""
    bodies = list(_bodies(equation.params.values()))
    # Derivatives of their own may be by what is not read on the way forward.
    opaque = equation.primitive.name in _LOOPS or "custom_vjp" in equation.primitive.name
    if opaque or len(bodies) != 1:
        return None
    (body,) = bodies
    same = len(body.invars) == len(equation.invars) and len(body.outvars) == len(equation.outvars)
    return body if same else None


def _bodies(values: Any) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _bodies(value)
