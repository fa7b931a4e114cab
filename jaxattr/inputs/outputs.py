"""Losses and other functions of one example: what they take, and what they return.

A function is traced once on the shapes of one example. Where that fails, the same is tried with
what was likely meant, and the message says what then runs.
"""

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxattr.inputs.arrays import NOTHING, fields_of
from jaxattr.inputs.parameters import are_several
from jaxattr.inputs.traces import read_inputs, shapes_of, trace, warn_of_shared_randomness
from jaxattr.inputs.wording import brief, name_of, shapes
from jaxattr.keys import key_or_default
from jaxattr.typing import Example, Key, OutputFn, Params

_ARGUMENTS = ("params", "example", "key")
_LABELS = ("y", "label", "labels", "target", "targets")


def check_function(
    function: Any, role: str = "the function", arguments: tuple[str, ...] = _ARGUMENTS
) -> None:
    """Checks that something can be called with parameters, one example and a key.

    Args:
      function: what a user passed as a loss, margin or other output.
      role: what it is for, for messages.
      arguments: what it is called with, if with something else.

    Raises:
      TypeError: if it is no function, or takes other arguments.
    """
    if not callable(function):
        made_of = " A method is made of such a function: ja.tracin(loss)."
        raise TypeError(
            f"{role} must be a function ({', '.join(arguments)}), got "
            f"{type(function).__name__}: {brief(repr(function), 60)}."
            + (made_of if arguments == _ARGUMENTS else "")
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # built-in functions do not always say
    try:
        signature.bind(*arguments)
    except TypeError:
        taken = list(signature.parameters)
        if arguments == _ARGUMENTS and taken[-1:] == ["timestep"]:
            raise TypeError(
                f"{name_of(function)!r} takes a timestep: its mean over timesteps and noise is an "
                "output. Write: ja.expectation(function, timesteps=range(0, 1000, 100))."
            ) from None
        if arguments != _ARGUMENTS:
            raise TypeError(
                f"{role} takes ({', '.join(taken)}), and is called as ({', '.join(arguments)})."
            ) from None
        raise TypeError(
            f"{name_of(function)!r} takes ({', '.join(taken)}), and is called as (params, example, "
            "key): the parameters, ONE example without a batch axis, and a PRNG key for dropout or "
            f"noise (ignore it if there is none). {_rewritten(function, taken)}"
        ) from None


def _rewritten(function: Any, taken: list[str]) -> str:
    name = name_of(function)
    name = name if name.isidentifier() else "loss"
    if len(taken) == 2:
        return f"Write: lambda params, example, key: {name}(params, example)."
    fields = ", ".join(f"example[{each!r}]" for each in taken[1:])
    return f"Write: lambda params, example, key: {name}(params, {fields})."


def runs(function: OutputFn, params: Params, example: Example) -> bool:
    """Whether a function maps these shapes, and a key, to one float scalar."""
    try:
        _traced(function, params, example, key_or_default(None))
    except Exception:
        return False
    return True


def check_output(
    function: OutputFn, params: Params, example: Example, key: Key, *, constant: bool = False
) -> None:
    """Checks that a function of one example returns a float scalar.

    Args:
      function: the loss, margin or other output.
      params: parameters, or their shapes.
      example: ONE example, or its shapes.
      key: any key.
      constant: whether it may depend on neither parameters nor example.

    Raises:
      TypeError: if it is no function of three arguments.
      ValueError: if it fails, or does not return one float scalar, and what was likely meant; or if
        it does not depend on its parameters.

    Warns:
      UserWarning: if it draws random numbers that do not depend on its key, or ignores its example.
    """
    check_function(function)
    try:
        program = _traced(function, params, example, key)
    except _NoScalar as error:
        raise _returned(function, params, example, error) from None
    except Exception as error:
        raise _failed(function, params, example, error) from error
    if not constant:
        _check_dependence(function, params, example, read_inputs(program.jaxpr))
    warn_of_shared_randomness(name_of(function), program, len(jax.tree.leaves(params)))


def _check_dependence(
    function: OutputFn, params: Params, example: Example, read: list[bool]
) -> None:
    """Refuses a function that ignores its parameters, and warns of one that ignores its example."""
    count, fields = len(jax.tree.leaves(params)), len(jax.tree.leaves(example))
    if not any(read[:count]):
        raise ValueError(
            f"The function {name_of(function)!r} does not depend on its parameters, so every "
            "gradient is zero. Does it close over the trained ones? It must use those that it is "
            f"given: model.apply({{'params': params}}, ...).\n{_given(params, example)}"
        )
    if fields and not any(read[count : count + fields]):
        warnings.warn(
            f"{name_of(function)!r} does not depend on its example: all have the same gradient.",
            UserWarning,
            stacklevel=3,
        )


def read_leaves(function: OutputFn, params: Params, example: Example) -> list[bool]:
    """Which leaves of an example a function reads.

    Args:
      function: that takes it.
      params: parameters, or their shapes.
      example: ONE example, or its shapes.
    """
    program = _traced(function, params, example, key_or_default(None))
    first, count = len(jax.tree.leaves(params)), len(jax.tree.leaves(example))
    return read_inputs(program.jaxpr)[first : first + count]


class _NoScalar(Exception):
    """The function returned something else than one float scalar: the argument."""


def _traced(function: OutputFn, params: Params, example: Example, key: Key) -> Any:
    program, result = trace(function, shapes_of((params, example, key)))
    leaves = jax.tree.leaves(result)
    scalar = len(leaves) == 1 and leaves[0].shape == ()
    if not scalar or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        raise _NoScalar(result)
    return program


def _returned(function: OutputFn, params: Params, example: Example, error: _NoScalar) -> ValueError:
    (result,) = error.args
    leaves = jax.tree.leaves(result)
    got = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves[:6]) or "nothing"
    remedy = (
        "If the model wants a batch, add the axis inside (x[None]) and sum or index the result; "
        "return no auxiliary values, and let layers with batch statistics use their running "
        "averages."
    )
    if isinstance(result, tuple) and leaves:
        remedy = f"Return the first alone, lambda *given: {name_of(function)}(*given)[0]. {remedy}"
    meant = _likely_meant(function, params, example, fails=False)
    return ValueError(
        f"The function {name_of(function)!r} must map ONE example, without a batch axis, to one "
        f"float scalar; it returned {got}. {meant or remedy}\n{_given(params, example)}"
    )


def _failed(function: OutputFn, params: Params, example: Example, error: Exception) -> ValueError:
    kind = type(error).__name__
    remedy = _REMEDIES.get(kind) or _likely_meant(function, params, example)
    if remedy is None and isinstance(example, tuple | list) and "indices must be" in str(error):
        remedy = (
            "Examples are read by position, example[0]. To read them by name, pass the "
            "data as a dict, {'x': ..., 'y': ...}, or items that are dicts."
        )
    if remedy is None and isinstance(example, Mapping) and _is_number(error):
        remedy = (
            "Examples are read by name, such as example['x']. To read them by position, pass the "
            "data as a tuple of arrays."
        )
    if not jax.tree.leaves(example):
        remedy = NOTHING
    return ValueError(
        f"The function {name_of(function)!r} fails on one example: {kind}: {brief(error, 300)}\n"
        + (f"{remedy}\n" if remedy else "")
        + _given(params, example)
    )


def _is_number(error: Exception) -> bool:
    return isinstance(error, KeyError) and str(error).isdigit()


def _given(params: Params, example: Example) -> str:
    return f"It was given params {shapes(params)};\nand ONE example {shapes(example)}."


def _likely_meant(
    function: OutputFn, params: Params, example: Example, *, fails: bool = True
) -> str | None:
    """What to pass instead, if one of the usual slips explains that a function fails."""
    for words, other_params, other_example in _slips(params, example, fails):
        if runs(function, other_params, other_example):
            return words
    return _fields_as_arguments(function, params, example)


def _fields_as_arguments(function: Any, params: Params, example: Example) -> str | None:
    """What to write for a function of (params, x, y), whose fields are those of the example."""
    try:
        taken = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    if isinstance(example, tuple) and len(taken) == len(example) + 1:
        fields = list(example)
        written = f"Write: lambda params, example, key: {name_of(function)}(params, *example)."
        words = f"It is called as (params, example, key). {written}"
    elif isinstance(example, dict) and set(taken[1:]) <= set(example):
        fields = [example[name] for name in taken[1:]]
        words = _rewritten(function, taken)
    else:
        return None
    called = lambda params, fields, key: function(params, *fields)  # noqa: E731
    return words if runs(called, params, fields) else None


def _slips(params: Params, example: Example, fails: bool) -> Any:
    if isinstance(params, Mapping) and list(params) == ["params"]:
        yield (
            "The parameters are one level too deep: pass params['params'].",
            params["params"],
            example,
        )
    yield (
        "The function wants variables, one level more: pass {'params': params}.",
        {"params": params},
        example,
    )
    if fails:
        yield (
            "It runs with its first two arguments swapped: it is called as (params, example, key).",
            example,
            params,
        )
    if isinstance(params, tuple) and params:
        yield (
            "The parameters are a tuple, and it runs on the first of it: pass that alone; a "
            "train_fn must return it alone.",
            params[0],
            example,
        )
    if isinstance(params, Mapping) and all(isinstance(step, int) for step in params):
        yield (
            "The parameters are a dict of checkpoints: pass list(checkpoints.values()).",
            next(iter(params.values()), None),
            example,
        )
    shapes_of = [jnp.shape(leaf) for leaf in jax.tree.leaves(example)]
    sizes = {shape[:1] for shape in shapes_of}
    if shapes_of and len(sizes) == 1 and not sizes & {(), (1,)}:
        (size,) = sizes.pop()
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), example)
        yield (
            f"It runs without the leading axis of {size}: the data are batched. Each item must be "
            "ONE example: take the batching out, or pass jax.tree.map(lambda x: x[0], batch).",
            params,
            one,
        )
    yield from _with_whole_numbers(params, example)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), example)
    yield (
        "It runs on a batch of one: it wants a batch axis, which an example has not. Add it "
        "inside: jax.tree.map(lambda x: x[None], example).",
        params,
        batch,
    )


def _with_whole_numbers(params: Params, example: Example) -> Any:
    """The same example with one of its fields as integers: labels, token ids, or one-hot labels."""
    structure, fields = jax.tree.structure(example), fields_of(example)
    for number, (name, leaf) in enumerate(fields.items()):
        named = repr(name) if name else "the example"
        tried = []
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            tried.append((leaf.shape, "integers, as labels and token ids are", ".astype(np.int32)"))
        if len(leaf.shape) == 1 < max(leaf.shape) and (
            name in _LABELS or (name.isdigit() and number)
        ):
            tried.append(((), "the class, and not one-hot", "np.argmax(..., -1)"))
        for shape, what, how in tried:
            whole = [*fields.values()]
            whole[number] = jax.ShapeDtypeStruct(shape, jnp.int32)
            changed = jax.tree.unflatten(structure, whole)
            yield f"It runs where {named} holds {what}: convert it, {how}.", params, changed


@contextlib.contextmanager
def explaining_swaps(function: Any, checkpoints: Any, train: Any) -> Iterator[None]:
    """Where something fails that would not if parameters and data changed places: says so."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not _look_right(function, checkpoints, train) and _look_right(
            function, train, checkpoints
        ):
            raise ValueError(
                f"checkpoints and train look swapped: the function {name_of(function)!r} runs once "
                "they change places. Pass the parameters first: (method, checkpoints, train)."
            ) from error
        raise


def is_one_model(function: Any, checkpoints: Any, train: Any) -> bool:
    """Whether a list or tuple of several is all of what a function takes as its parameters."""
    return are_several(checkpoints) and len(checkpoints) > 1 and _runs(function, checkpoints, train)


def _look_right(function: Any, params: Any, data: Any) -> bool:
    """Whether a function runs on what is passed as parameters and as data."""
    one = next(iter(params), None) if are_several(params) else params
    return _runs(function, one, data)


def _runs(function: Any, params: Any, data: Any) -> bool:
    try:
        if not all(hasattr(leaf, "shape") for leaf in jax.tree.leaves((params, data))):
            return False  # such as a source, which may have no end
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], x.dtype), data)
        return callable(function) and runs(function, params, one)
    except Exception:
        return False


_STATE = (
    "The model changes its own state while it runs. In evaluation mode most do not: model.eval() "
    "before nnx.split. If it still does, as nnx.RNN, or for dropout: model = nnx.merge(graph, "
    "params, rest, copy=True); dropout then wants nnx.reseed(model, default=key)."
)
_REMEDIES: dict[str, str] = {
    "TracerArrayConversionError": (
        "It uses NumPy, or a library on top of it, on a value that JAX traces. Use jax.numpy "
        "inside the function, and compute what needs NumPy beforehand, as a field of the example."
    ),
    "TracerBoolConversionError": (
        "It branches in Python on a value: use jnp.where(condition, a, b), or jax.lax.cond."
    ),
    "TracerIntegerConversionError": (
        "It counts in Python by a value (range, an index): use jnp.arange with a mask, or jnp.take."
    ),
    "ConcretizationTypeError": (
        "It needs a value in Python, as int(), float() or a shape do: keep it an array, or make it "
        "a constant that the function closes over."
    ),
    "TraceContextError": _STATE,
    "ModifyScopeVariableError": (
        "A layer updates its statistics: call the model in evaluation mode "
        "(use_running_average=True), as it is used after training."
    ),
    "InvalidRngError": (
        "The model draws random numbers: give it the key, rngs={'dropout': key}, or turn them off "
        "(deterministic=True)."
    ),
}
