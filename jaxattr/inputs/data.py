"""What a data set is: arrays, a list of examples, or a source that is read one by one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.groups import leaf_names
from jaxattr.inputs.wording import brief, listed, shapes
from jaxattr.typing import Batch, Example, RandomAccess

# Ids of examples are 32-bit integers.
_MOST = 2**31 - 1

# What a NumPy array may hold: booleans, integers, floats, complex numbers and bfloat16 ("V").
_NUMBERS = "biufcV"

_PAD = (
    "Pad them to one length, and keep the padding out of the loss with a mask: "
    "ja.language.rows(token_lists, length, vocabulary=...)."
)

Accepts = Callable[[Example], bool]
"""Whether the function that the data are for takes an example of these shapes."""


def as_data(data: Any, role: str, accepts: Accepts | None = None) -> RandomAccess | Batch:
    """Returns what a user passed as a random-access source, or as arrays of rows.

    Lists and tuples of examples are stacked. A list or tuple of arrays of one shape may also be
    the fields of one batch: the reading is taken that the function accepts; if it accepts both, a
    list holds examples, and a tuple fields, as in JAX.

    Args:
      data: as in `build_index`.
      role: what the data are, for messages: "train" or "queries".
      accepts: tells readings apart; None if there is nothing to tell them by.

    Raises:
      ValueError: if the data are empty, ragged, endless, or hold what is no number.
      TypeError: if they are no data set.
    """
    _refuse_what_is_none(data, role)
    if is_source(data):
        return _checked_source(data, role)
    if isinstance(data, list | tuple):
        data = _of_sequence(data, role, accepts)
    batch = as_arrays(data, role)
    if not jax.tree.leaves(batch):
        raise ValueError(f"{role} is empty: got a pytree without arrays.")
    _check_leading(batch, role)
    return batch


def as_batch(data: Any, role: str) -> Batch:
    """Returns a data set that is wanted whole as arrays with a common leading axis.

    Args:
      data: a pytree of arrays, or a list of examples.
      role: what the data are, for messages.

    Raises:
      TypeError: if it is a source, or no data set.
      ValueError: as `as_data`.
    """
    found = as_data(data, role)
    if is_source(found):
        raise TypeError(
            f"{role} is a {type(data).__name__}, and is needed whole, as arrays in memory: pass "
            f"[{role}[i] for i in range(len({role}))], or stack its fields with np.stack."
        )
    return found


def as_arrays(tree: Any, what: str) -> Any:
    """Returns a pytree as arrays; a list of numbers, or of such lists, is one array.

    Args:
      tree: a batch, or one example.
      what: it is, for messages.

    Raises:
      ValueError: if there is something in it that is no array of numbers.
    """
    tree = _with_dicts(tree)

    # An empty list stays what it is to JAX: a pytree of nothing.
    def stops(node: Any) -> bool:
        return _is_list_of_numbers(node) and len(node) > 0

    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stops)
    return jax.tree.unflatten(structure, [_as_array(leaf, path, what) for path, leaf in leaves])


def stacked(
    examples: Sequence[Any], numbers: Sequence[int], known: tuple[int, Any], role: str
) -> Any:
    """Stacks examples, which all need the arrays of one that is known.

    Args:
      examples: pytrees of arrays.
      numbers: their positions in the data set.
      known: position and arrays of the one that they are compared with.
      role: what the data are, for messages.

    Raises:
      ValueError: naming the first example that differs, and how.
    """
    expected = _shapes(known[1])
    for number, example in zip(numbers, examples, strict=True):
        if _shapes(example) != expected:
            raise _differing(known, (number, example), role)
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *examples)


def without(data: Any, *names: str) -> Any:
    """Leaves fields out of a data set, such as columns of strings.

    Args:
      data: a dict of arrays, a list of dicts, or a random-access source whose examples are dicts.
      names: of the fields.

    Returns:
      The same without them; of a source another source.

    Raises:
      ValueError: if there is no such field.

    Example:
      >>> without({"x": np.zeros(3), "name": np.array(["a", "b", "c"])}, "name")
      {'x': array([0., 0., 0.])}
    """
    if is_source(data):
        _smaller(data[0], names)
        return _Without(data, names)
    if isinstance(data, list | tuple):
        return [_smaller(example, names) for example in data]
    return _smaller(data, names)


class _Without:
    """A source without some fields."""

    def __init__(self, data: RandomAccess, names: tuple[str, ...]) -> None:
        self.data, self.names = data, names

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Example:
        return _smaller(self.data[row], self.names)


def _smaller(example: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(example, Mapping):
        raise ValueError(f"Fields have names in dicts alone; got {type(example).__name__}.")
    missing = [name for name in names if name not in example]
    if missing:
        raise ValueError(f"There is no field {listed(missing)}; there are {listed(example)}.")
    return {name: value for name, value in example.items() if name not in names}


def is_source(data: Any) -> bool:
    """Whether data are read one example at a time, and are no arrays."""
    containers = (Mapping, list, tuple, np.ndarray, jax.Array)
    return (
        isinstance(data, RandomAccess)
        and not isinstance(data, containers)
        and not hasattr(data, "dtype")
    )


def _refuse_what_is_none(data: Any, role: str) -> None:
    kind = type(data).__name__
    if data is None or isinstance(data, str | bytes | bool | int | float):
        raise TypeError(
            f"{role} must be a data set, got {brief(repr(data))}: pass a pytree of arrays with a "
            "common leading axis, a list of examples, or an object with __len__ and __getitem__."
        )
    if hasattr(data, "iloc"):
        raise TypeError(
            f"{role} is a {kind}, whose items are columns: pass the columns as arrays, "
            "{name: frame[name].to_numpy() for name in [...]}."
        )
    if isinstance(data, Mapping) and data and all(is_source(each) for each in data.values()):
        names = listed(map(repr, data))
        raise TypeError(
            f"{role} is a {kind} of whole data sets ({names}): pass one of them, such as "
            f"data[{next(iter(data))!r}]."
        )
    reads = isinstance(data, Iterable) or hasattr(data, "__getitem__")
    if reads and _is_one_leaf(data) and not hasattr(data, "shape"):
        lacking = [name for name in ("__len__", "__getitem__") if not hasattr(data, name)]
        if lacking:
            raise TypeError(
                f"{role} is a {kind}, and lacks {' and '.join(lacking)}. Examples are "
                f"read by their number, several times: give it __len__ and __getitem__, or pass "
                f"list({role}) if it fits in memory and ends."
            )


def _checked_source(data: RandomAccess, role: str) -> RandomAccess:
    try:
        size = len(data)
    except (TypeError, ValueError, OverflowError, NotImplementedError) as error:
        raise TypeError(
            f"{role} does not say how many examples it has: {brief(error)}. An endless data set "
            "(repeat) has no examples to name: pass it as it is before that."
        ) from error
    if size > _MOST:
        raise ValueError(
            f"{role} says that it has {size:,} examples, and at most {_MOST:,} can be told apart. "
            "Is it repeated without end? Pass the data set as it is before .repeat()."
        )
    if size == 0:
        raise ValueError(f"{role} is empty: it has no examples, and at least one is needed.")
    return data


def _of_sequence(data: Sequence[Any], role: str, accepts: Accepts | None) -> Any:
    """A list or tuple as what it is: examples to be stacked, or a pytree of fields."""
    if not data or hasattr(data, "_fields"):  # a named tuple is a pytree of fields
        return data
    if _is_list_of_numbers(list(data)):
        return _rows_of_numbers(list(data), role)
    if any(isinstance(each, str | bytes) for each in data):
        raise _strings(role, "")
    each_is = [_kind(item) for item in data]
    if len(set(each_is)) > 1:
        return data
    if each_is[0] == "array":
        return _of_arrays(data, role, accepts)
    dicts = [frozenset(item) for item in data if isinstance(item, Mapping)]
    same_fields = len(dicts) == len(data) and len(set(dicts)) == 1
    if each_is[0] == "example" and (isinstance(data, list) or same_fields):
        return _stacked_examples(data, role)
    return data


def _kind(item: Any) -> str:
    """What an item of a list is: an array, an example of several arrays, or fields of a batch."""
    if _is_leaf(item):
        return "array"
    return "fields" if isinstance(item, list) else "example"


def _is_leaf(item: Any) -> bool:
    return hasattr(item, "shape") or isinstance(item, bool | int | float | complex)


def _of_arrays(data: Sequence[Any], role: str, accepts: Accepts | None) -> Any:
    shape_of = [np.shape(item) for item in data]
    leading = {shape[:1] for shape in shape_of}
    if len(set(shape_of)) > 1:
        # Pictures of several sizes may share their first axis, the channels.
        alike = isinstance(data, list) and len(data) > 2 and len({len(s) for s in shape_of}) == 1
        as_fields = accepts is None or accepts(jax.tree.map(_one_row, data))
        if len(leading) > 1 or (alike and not as_fields):
            raise _differing((0, data[0]), _first_other(data), role)
        return data
    if shape_of[0] == ():
        return np.stack([np.asarray(item) for item in data])
    examples = isinstance(data, list)
    if accepts is not None:
        runs, other = accepts(_row(data[0], 0)), accepts(jax.tree.map(_one_row, data))
        examples = runs if runs != other else examples
    return np.stack([np.asarray(item) for item in data]) if examples else data


def _one_row(array: Any) -> jax.ShapeDtypeStruct:
    return _row(array, 1)


def _row(array: Any, axes: int) -> jax.ShapeDtypeStruct:
    """The shape of an array without its first axes."""
    dtype = jax.dtypes.canonicalize_dtype(np.asarray(array).dtype)
    return jax.ShapeDtypeStruct(np.shape(array)[axes:], dtype)


def _first_other(data: Sequence[Any]) -> tuple[int, Any]:
    expected = np.shape(data[0])
    return next((i, item) for i, item in enumerate(data) if np.shape(item) != expected)


def _stacked_examples(data: Sequence[Any], role: str) -> Any:
    examples = [as_arrays(item, f"example {number} of {role}") for number, item in enumerate(data)]
    return stacked(examples, range(len(examples)), (0, examples[0]), role)


def _rows_of_numbers(rows: list[Any], role: str) -> Any:
    try:
        return np.asarray(rows)
    except ValueError:
        expected = np.shape(_as_row(rows[0], role))
        for number, row in enumerate(rows):
            if np.shape(_as_row(row, role)) != expected:
                raise _differing(
                    (0, np.asarray(rows[0])), (number, np.asarray(row)), role
                ) from None
        raise


def _as_row(row: Any, role: str) -> np.ndarray:
    try:
        return np.asarray(row)
    except ValueError:
        raise ValueError(
            f"{role} holds lists of lists of different lengths, such as {brief(row)}. {_PAD}"
        ) from None


def _differing(known: tuple[int, Any], other: tuple[int, Any], role: str) -> ValueError:
    """What to say of an example that differs from the one it is compared with."""
    (first, expected), (number, found) = known, other
    each = "row" if role.startswith("example") else "example"
    lengths = [jnp.shape(x)[:1] for tree in (expected, found) for x in jax.tree.leaves(tree)]
    same = _shapes(expected)[0] == _shapes(found)[0]
    remedy = "Every example needs the same fields."
    if same:
        remedy = f"Sequences of different lengths? {_PAD}" if all(lengths) else ""
    return ValueError(
        f"All {each}s need the same arrays with the same shapes. In {role}, {each} {first} has "
        f"{shapes(expected)}, {each} {number} has {shapes(found)}. {remedy}"
    )


def _check_leading(batch: Batch, role: str) -> None:
    leaves = jax.tree.leaves(batch)
    sizes = {jnp.shape(leaf)[:1] for leaf in leaves}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"All arrays of a data set need the same leading axis, one row per example. {role} has "
            f"{shapes(batch)}. Scalars that all examples share belong into the function."
        )
    if sizes == {(0,)}:
        raise ValueError(f"{role} is empty: it has no examples, and at least one is needed.")


def _shapes(example: Example) -> tuple[Any, list[tuple[int, ...]]]:
    leaves, structure = jax.tree.flatten(example)
    return structure, [jnp.shape(leaf) for leaf in leaves]


def _with_dicts(node: Any) -> Any:
    """Mappings that JAX takes for a single leaf (of tokenizers, say) become dicts."""
    if isinstance(node, Mapping) and _is_one_leaf(node):
        return {name: _with_dicts(value) for name, value in node.items()}
    return node


def _is_one_leaf(node: Any) -> bool:
    return jax.tree_util.all_leaves([node])


def _is_list_of_numbers(node: Any) -> bool:
    numbers = bool | int | float | complex | np.generic
    return isinstance(node, list) and all(
        isinstance(each, numbers) or _is_list_of_numbers(each) for each in node
    )


def _as_array(leaf: Any, path: tuple[Any, ...], what: str) -> Any:
    field = jax.tree_util.keystr(path, simple=True, separator="/")
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if isinstance(leaf, jax.Array):
        return _addressable(leaf)
    if isinstance(leaf, str | bytes):
        raise _strings(what, field)
    if not _has_numpy_dtype(leaf):
        leaf = _converted(leaf, field, what)
    if leaf.dtype.kind in _NUMBERS and leaf.dtype.names is None:
        return leaf
    if leaf.dtype.kind in "US":
        raise _strings(what, field)
    raise _no_numbers(leaf, field, what)


def _has_numpy_dtype(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and isinstance(getattr(leaf, "dtype", None), np.dtype)


def _converted(leaf: Any, field: str, what: str) -> Any:
    if isinstance(leaf, list):
        return _rows_of_numbers(leaf, f"{what}, field {field!r}" if field else what)
    try:
        return np.asarray(leaf)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{what}: {_field(field)} is a {type(leaf).__name__}, which does not become a NumPy "
            f"array ({brief(error)}): pass one."
        ) from error


def _strings(what: str, field: str) -> ValueError:
    name = field or "name"
    return ValueError(
        f"{what}: {_field(field)} holds strings, and a gradient takes numbers. Leave it out: "
        f"ja.without(data, {name!r}); text goes in as token ids, ja.language.rows(token_lists, "
        "...)."
    )


def _no_numbers(leaf: Any, field: str, what: str) -> ValueError:
    items = [np.asarray(item) for item in np.ravel(leaf)[:100]] if leaf.dtype == object else []
    lengths = [len(item) for item in items if item.ndim]
    if lengths and len(lengths) == len(items):
        other = next((i for i, length in enumerate(lengths) if length != lengths[0]), 0)
        return ValueError(
            f"{what}: {_field(field)} is an array of objects, rows of different lengths: example 0 "
            f"has {lengths[0]}, example {other} has {lengths[other]}. {_PAD}"
        )
    found = type(np.ravel(leaf)[0]).__name__ if leaf.dtype == object and leaf.size else leaf.dtype
    if found == "str":
        return _strings(what, field)
    return ValueError(
        f"{what}: {_field(field)} is an array of {found}, and a gradient takes numbers. Convert "
        f"it, or leave it out: ja.without(data, {field or 'name'!r}). Objects that hold arrays "
        "must be pytrees: dicts, or classes with jax.tree_util.register_dataclass."
    )


def _field(field: str) -> str:
    return f"the field {field!r}" if field else "it"


def _addressable(leaf: jax.Array) -> Any:
    if leaf.is_fully_addressable:
        return leaf
    if leaf.is_fully_replicated:
        return np.asarray(leaf)
    raise ValueError(
        f"The data hold an array {list(leaf.shape)} that is spread over several processes, "
        "of which each can read a part. Pass what every process can read, as NumPy arrays "
        "or a source with __len__ and __getitem__: each then reads its own rows alone. "
        "jax.experimental.multihost_utils.process_allgather(array, tiled=True) makes one."
    )


def field_names(tree: Any) -> list[str]:
    """Names of a pytree's arrays; of one array alone, none."""
    return [] if _is_one_leaf(tree) else leaf_names(tree)
