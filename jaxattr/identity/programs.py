"""A user's function as what it computes: its trace, with all that it closes over, by content.

A function object says little: it may close over state that changes (running statistics), and an
equal one may be made anew. Its trace says what it computes now. Tracing is never answered from
JAX's cache of traces, so a changed state is another program.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from jaxattr.identity.arrays import digest_of
from jaxattr.inputs.traces import dtype_of, eagerly, shapes_of, trace

_Mutable: TypeAlias = dict[int, tuple[Any, str]]
# Rules of their own for derivatives: they are seen in the trace of the derivative alone.
_WITH_RULES = ("custom_jvp_call", "custom_vjp_call")
# What does not change what is computed: names, and how things are compiled or placed.
_IRRELEVANT = (
    "name", "inline", "keep_unused", "donated_invars", "compiler_options_kvs", "ctx_mesh",
    "in_shardings", "out_shardings", "in_layouts", "out_layouts", "prevent_cse",
    "jvp_jaxpr_fun", "jvp_jaxpr_thunk", "fwd_jaxpr_thunk", "fwd", "bwd",
)  # fmt: skip


class Program:
    """A function as it was when this was made; equal to others that compute the same.

    Attributes:
      digest: of the trace, constants at every depth and rules for derivatives included.
      name: of the function, for messages.
    """

    def __init__(self, function: Callable, arguments: tuple[Any, ...]) -> None:
        self.name = self.__name__ = getattr(function, "__name__", type(function).__name__)
        self._function = function
        self._shapes = shapes_of(arguments)
        traced = trace(function, self._shapes)
        self._signature = _signature(self._shapes)
        self._programs = {self._signature: traced}
        self.digest, self._mutable = _digest(traced[0], self._shapes)

    def __call__(self, *arguments: Any) -> Any:
        """Computes what the function computed when it was traced.

        Args:
          *arguments: of the same dtypes. Of other shapes it is traced anew.

        Raises:
          ValueError: if that is due, and the function no longer computes the same; or if an array
            of NumPy that it closes over has been written to.
        """
        program, result = self._traced(arguments)
        found = jaxpr_as_fun(program)(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(result), found)

    def check_unchanged(self) -> None:
        """Raises if an array of NumPy that it closes over has been written to.

        JAX copies those of types that it does not take as they are, such as float64; these are as
        they were.
        """
        if not self._is_unchanged():
            raise self._changed()

    def _is_unchanged(self) -> bool:
        return all(_content(constant) == content for constant, content in self._mutable.values())

    def _traced(self, arguments: tuple[Any, ...]) -> tuple[ClosedJaxpr, Any]:
        self.check_unchanged()
        signature = _signature(arguments)
        if signature in self._programs:
            return self._programs[signature]
        program, _ = trace(self._function, self._shapes)
        if _digest(program, self._shapes)[0] != self.digest:
            raise self._changed()
        return self._programs.setdefault(signature, trace(self._function, shapes_of(arguments)))

    def _changed(self) -> ValueError:
        return ValueError(
            f"The function {self.name!r} computes something else than when it was first given: "
            "an array that it closes over has changed, such as running statistics, or one of "
            "NumPy that was written to. Build the index again, or let each function close over "
            "what does not change."
        )

    def __eq__(self, other: object) -> bool:
        # The digest sees leaves alone; a function of another kind of tree takes other arguments.
        # One whose arrays were written to is no longer what its digest says.
        return self is other or (
            isinstance(other, Program)
            and other.digest == self.digest
            and other._signature == self._signature
            and self._is_unchanged()
            and other._is_unchanged()
        )

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Program({self.name}, {self.digest[:8]})"


def program_of(function: Callable, shapes: tuple[Any, ...]) -> ClosedJaxpr:
    """Returns the trace of a function; that of a `Program` is at hand, and not made again.

    Args:
      function: a user's, or a `Program`.
      shapes: its arguments, `jax.ShapeDtypeStruct` at the leaves.
    """
    if isinstance(function, Program):
        return function._traced(shapes)[0]
    return trace(function, shapes)[0]


def _signature(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    leaves, tree = jax.tree.flatten(arguments)
    return tree, tuple((jnp.shape(leaf), str(dtype_of(leaf))) for leaf in leaves)


def _digest(program: ClosedJaxpr, shapes: tuple[Any, ...]) -> tuple[str, _Mutable]:
    """What a program computes, and those of its constants that may be written to."""
    walk = _Walk()
    walk.closed(program)
    if walk.has_rules:
        try:
            derivative = _derivative(program, shapes)
        except (TypeError, ValueError, NotImplementedError):
            pass  # what has no derivative is used without
        else:
            walk.closed(derivative)
    return walk.hexdigest(), walk.mutable


def _derivative(program: ClosedJaxpr, shapes: tuple[Any, ...]) -> ClosedJaxpr:
    """The trace of the derivative by the first argument: there, rules have become equations."""
    count = len(jax.tree.leaves(shapes[0]))
    leaves = jax.tree.leaves(shapes)
    floating = [i for i in range(count) if jnp.issubdtype(leaves[i].dtype, jnp.floating)]
    run = jaxpr_as_fun(program)

    def derivative(*leaves: Any) -> Any:
        def of_chosen(chosen: list[Any]) -> Any:
            given = list(leaves)
            for place, value in zip(floating, chosen, strict=True):
                given[place] = value
            return run(*given)

        outputs, pull = jax.vjp(of_chosen, [leaves[i] for i in floating])
        ones = [
            jnp.ones_like(x)
            if jnp.issubdtype(x.dtype, jnp.floating)
            else np.zeros(x.shape, jax.dtypes.float0)
            for x in outputs
        ]
        return pull(ones)

    return jax.make_jaxpr(derivative)(*leaves)


class _Walk:
    """A hash that takes in programs, numbering their variables as they come.

    Attributes:
      has_rules: whether some function with rules of its own for derivatives was met.
      mutable: constants that may be written to, by their addresses, and what they are now.
    """

    def __init__(self, around: "_Walk | None" = None) -> None:
        self._hash = hashlib.sha256()
        self._known: dict[int, tuple[Any, str]] = {} if around is None else around._known
        self.mutable: _Mutable = {} if around is None else around.mutable
        self.has_rules = False

    def hexdigest(self) -> str:
        """Returns 128 bits."""
        return self._hash.hexdigest()[:32]

    def closed(self, program: ClosedJaxpr) -> None:
        """Takes in a program and its constants."""
        for constant in program.consts:
            self._say("constant", self._constant(constant))
        self._program(program.jaxpr)

    def _program(self, program: Jaxpr) -> None:
        numbers: dict[Var, int] = {}
        for variable in (*program.constvars, *program.invars):
            self._say("in", self._new(numbers, variable))
        for equation in program.eqns:
            self._equation(equation, numbers)
        self._say("out", *(self._atom(numbers, atom) for atom in program.outvars))

    def _equation(self, equation: JaxprEqn, numbers: dict[Var, int]) -> None:
        name = equation.primitive.name
        self.has_rules |= name in _WITH_RULES
        self._say(name, *(self._atom(numbers, atom) for atom in equation.invars))
        for key in sorted(equation.params):
            if key not in (*_IRRELEVANT, "callback"):
                self._say(key)
                self._parameter(equation.params[key])
        called = equation.params.get("callback")
        if called is not None and equation.outvars:  # one that only logs computes nothing
            self._python(getattr(called, "callback_func", called), ())
        self._say("to", *(self._new(numbers, variable) for variable in equation.outvars))

    def _python(self, function: Any, within: tuple[Any, ...]) -> None:
        """A function that no trace shows: its code, and the constants that it closes over."""
        if isinstance(function, functools.partial):
            self._held((function.args, function.keywords), within)
            function = function.func
        code = getattr(function, "__code__", None)
        self._say(type(function).__name__ if code is None else code.co_name)
        if code is None or any(function is each for each in within):
            return
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_full(cell)]
        own = (cells, function.__defaults__, getattr(function, "__kwdefaults__", None))
        self._held(own, (*within, function))
        self._code(code)

    def _held(self, value: Any, within: tuple[Any, ...]) -> None:
        """What a function holds, as far as it is a constant: a counter or a log is none."""
        constants = bool | int | float | complex | str | bytes | np.ndarray | np.generic | jax.Array
        for each in jax.tree.leaves(value) if isinstance(value, tuple) else [value]:
            if callable(each):
                self._python(each, within)
            elif isinstance(each, constants):
                self._parameter(each)
            else:
                self._say(type(each).__name__)

    def _code(self, code: Any) -> None:
        self._say(code.co_code, code.co_names)
        for constant in code.co_consts:
            if hasattr(constant, "co_code"):
                self._code(constant)
            else:
                self._parameter(constant)

    def _parameter(self, value: Any) -> None:
        if isinstance(value, ClosedJaxpr | Jaxpr):
            self._nested(value)
        elif isinstance(value, Mapping):
            for key in sorted(value, key=str):
                self._say(key)
                self._parameter(value[key])
        elif isinstance(value, set | frozenset):
            self._parameter(sorted(value, key=repr))
        elif isinstance(value, tuple | list):
            self._say(type(value).__name__, len(value))
            for each in value:
                self._parameter(each)
        elif isinstance(value, np.ndarray | jax.Array):
            self._say(_content(value))
        elif not isinstance(value, jax.sharding.Sharding | jax.sharding.Mesh):
            # Addresses of Python objects differ from run to run.
            self._say(re.sub(r"0x[0-9a-f]+", "", repr(value)))

    def _nested(self, value: ClosedJaxpr | Jaxpr) -> None:
        """A sub-program, once: layers of a model often share one."""
        if id(value) not in self._known:
            inner = _Walk(self)
            inner.closed(value) if isinstance(value, ClosedJaxpr) else inner._program(value)
            self.has_rules |= inner.has_rules
            self._known[id(value)] = (value, inner.hexdigest())
        self._say(self._known[id(value)][1])

    def _new(self, numbers: dict[Var, int], variable: Var) -> str:
        numbers[variable] = len(numbers)
        return f"{numbers[variable]} {variable.aval.str_short()}"

    def _atom(self, numbers: dict[Var, int], atom: Any) -> str:
        if isinstance(atom, Literal):
            return f"literal {atom.aval.str_short()} {self._constant(atom.val)}"
        return str(numbers[atom])

    def _constant(self, value: Any) -> str:
        if id(value) in self.mutable:
            return self.mutable[id(value)][1]
        content = _content(value)
        if not isinstance(value, jax.Array | np.generic | bool | int | float | complex):
            self.mutable[id(value)] = value, content
        return content

    def _say(self, *words: Any) -> None:
        self._hash.update(repr(words).encode())


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _content(value: Any) -> str:
    """What a constant is. One that is being traced is known by its object alone."""
    if isinstance(value, jax.core.Tracer):
        return f"traced {id(value)}"
    if not isinstance(value, jax.Array) and np.size(value) <= 64:
        array = np.asarray(value)
        return f"{array.dtype} {array.shape} {array.tobytes().hex()}"
    with eagerly():  # where a function is traced inside another's trace
        return digest_of(value)
