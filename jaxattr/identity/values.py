"""Frozen dataclasses and what they hold, as plain data: whatever is a field is part of it."""

import dataclasses
import functools
import hashlib
import inspect
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.identity.arrays import digest_of, digests_of_leaves
from jaxattr.identity.programs import Program
from jaxattr.leaves import leaf_names


class Contents:
    """Data among the fields of a frozen dataclass: equal where their content is.

    Attributes:
      value: a pytree of arrays; those that are no JAX arrays are copied, since they may change.
    """

    def __init__(self, value: Any) -> None:
        self.value = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.array(x), value)

    @functools.cached_property
    def digest(self) -> str:
        """Of names, dtypes, shapes and bits; computed once, when it is first asked for."""
        each = digests_of_leaves(jax.tree.leaves(self.value))
        return digest(dict(zip(leaf_names(self.value), each, strict=True)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Contents) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Contents({self.digest[:8]})"


def function(*arguments: str, default: Any = dataclasses.MISSING) -> Any:
    """A field of a frozen dataclass that holds a user's function, or None.

    Args:
      *arguments: what the function takes, as `traced` knows it: "params", "example", "key", ...
      default: of the field.
    """
    return dataclasses.field(default=default, metadata={"arguments": arguments})


def traced(value: Any, arguments: Mapping[str, Any], anew: bool = False) -> Any:
    """Replaces the functions that a frozen dataclass holds, at any depth, by their programs.

    Args:
      value: anything; what is no dataclass is returned as it is.
      arguments: {name as in `function`: an argument, or its shapes}.
      anew: whether programs are traced again, for other shapes.

    Returns:
      The value, that can be compared, hashed and described by content.
    """
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changed = {}
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        names = field.metadata.get("arguments")
        if dataclasses.is_dataclass(held) and (names is None or _holds_functions(held)):
            changed[field.name] = traced(held, arguments, anew)
        elif names is not None and callable(held) and (anew or not isinstance(held, Program)):
            changed[field.name] = Program(held, tuple(arguments[name] for name in names))
    same = all(getattr(value, name) is new for name, new in changed.items())
    return value if same else dataclasses.replace(value, **changed)


def _holds_functions(value: Any) -> bool:
    """Whether functions are among the fields of what is a function itself, as in `Expectation`."""
    return any("arguments" in field.metadata for field in dataclasses.fields(value))


def describe(value: Any) -> Any:
    """Says what a value is, as plain data that JSON can hold and people can compare.

    Args:
      value: numbers, strings, arrays, containers, frozen dataclasses (without fields that do not
        compare), `Program` and `Contents`.

    Returns:
      Dicts, lists, strings and numbers.

    Raises:
      TypeError: for a function that is not traced, or an object that has no content.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else repr(float(value))
    if isinstance(value, Program):
        return {"computes": value.digest, "jax": jax.__version__}
    if isinstance(value, Contents):
        return {"content": value.digest}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        compared = [field.name for field in dataclasses.fields(value) if field.compare]
        return _kind(type(value)) | {name: describe(getattr(value, name)) for name in compared}
    if isinstance(value, Mapping):
        return {str(name): describe(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [describe(each) for each in value]
    if isinstance(value, np.ndarray | jax.Array):
        return {"content": digest_of(value)}
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return jnp.dtype(value).name
    raise TypeError(
        f"{value!r} cannot be told from others by its content. Fields of a projection, a basis or "
        "a kernel must be numbers, strings, tuples, frozen dataclasses, or arrays as "
        "`jaxattr.identity.Contents`."
    )


def digest(described: Any) -> str:
    """Returns 128 bits of plain data, whatever the order of its keys."""
    text = json.dumps(described, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _kind(kind: type) -> dict[str, str]:
    """The name of a class; of a user's own, also what its code is."""
    if kind.__module__.split(".")[0] == "jaxattr":
        return {"kind": kind.__qualname__}
    try:
        source = hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()[:32]
    except (OSError, TypeError):  # made where no source is kept, such as an interpreter's prompt
        source = "unknown"
    return {"kind": f"{kind.__module__}.{kind.__qualname__}", "source": source}
