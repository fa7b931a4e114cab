"""What a data set is: arrays, a list of examples, or a source that is read one by one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.inputs.arrays import (
    as_arrays,
    canonical_dtype,
    check_shapes,
    differing,
    holds_strings,
    is_list_of_numbers,
    is_one_leaf,
    rows_of_numbers,
    shapes_and_tree,
    stack,
)
from jaxattr.inputs.wording import brief, listed, shapes
from jaxattr.typing import Batch, Example, RandomAccess

# Ids of examples are 32-bit integers.
_MOST = 2**31 - 1

Accepts = Callable[[Example], bool]
"""Whether the function that the data are for takes an example of these shapes."""


def as_data(data: Any, role: str, accepts: Accepts | None = None) -> RandomAccess | Batch:
    """Returns what a user passed as a random-access source, or as arrays of rows.

    Lists and tuples of examples are stacked. A list or tuple of arrays of one shape may also be
    the fields of one batch: the reading is taken that the function accepts; if it accepts both, a
    tuple holds fields, as in JAX, and a list examples, if those are more than its arrays have rows.

    Args:
      data: as in `build_index`.
      role: what the data are, for messages: "train" or "queries".
      accepts: tells readings apart; None if there is nothing to tell them by.

    Raises:
      ValueError: if the data are empty, ragged, endless, hold what is no number, or may be examples
        or fields.
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
    _check_leading(batch, role, data)
    return batch


def as_batch(data: Any, role: str, accepts: Accepts | None = None) -> Batch:
    """Returns a data set that is wanted whole as arrays with a common leading axis.

    Args:
      data: a pytree of arrays, or a list of examples.
      role: what the data are, for messages.
      accepts: as in `as_data`.

    Raises:
      TypeError: if it is a source, or no data set.
      ValueError: as `as_data`.
    """
    found = as_data(data, role, accepts)
    if is_source(found):
        raise TypeError(
            f"{role} is a {type(data).__name__}, and is needed whole, as arrays in memory: pass "
            f"[{role}[i] for i in range(len({role}))], or stack its fields with np.stack."
        )
    return found


def like(example: Example) -> Accepts:
    """Whether an example has the fields and the shapes of one that is known.

    Args:
      example: the one that is known, or its shapes.
    """
    return lambda other: shapes_and_tree(other) == shapes_and_tree(example)


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
    if any(isinstance(name, list | set) for name in names):
        raise TypeError(f"Names go in one by one, ja.without(data, 'x', 'y'); got {names!r:.80}.")
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
        and not (hasattr(data, "dtype") and hasattr(data, "shape"))
    )


def _refuse_what_is_none(data: Any, role: str) -> None:
    kind = type(data).__name__
    if data is None or isinstance(data, str | bytes | bool | int | float):
        raise TypeError(
            f"{role} must be a data set, got {brief(repr(data))}: pass a pytree of arrays with a "
            "common leading axis, a list of examples, or an object with __len__ and __getitem__."
        )
    if hasattr(data, "query_side") and hasattr(data, "non_finite"):
        raise TypeError(f"{role} is {kind}, features that were computed: pass what they are of.")
    if hasattr(data, "iloc"):
        raise TypeError(
            f"{role} is a {kind}, whose items are columns: pass the columns as arrays, "
            "{name: frame[name].to_numpy() for name in [...]}."
        )
    if isinstance(data, Mapping):
        frames = [
            name
            for name, each in data.items()
            if getattr(each, "ndim", 0) > 1 and hasattr(each, "iloc")
        ]
        if frames:
            raise TypeError(
                f"{role}: the field {frames[0]!r} is a {type(data[frames[0]]).__name__}, whose "
                f"items are columns: pass an array, data[{frames[0]!r}].to_numpy()."
            )
    if hasattr(data, "__fspath__") and not is_source(data):
        raise TypeError(f"{role} is the path {data!r}: load it, and pass its arrays.")
    if isinstance(data, Mapping) and data and all(is_source(each) for each in data.values()):
        names = listed(map(repr, data))
        raise TypeError(
            f"{role} is a {kind} of whole data sets ({names}): pass one of them, such as "
            f"data[{next(iter(data))!r}]."
        )
    reads = isinstance(data, Iterable) or hasattr(data, "__getitem__")
    if reads and is_one_leaf(data) and not hasattr(data, "shape"):
        lacking = [name for name in ("__len__", "__getitem__") if not hasattr(data, name)]
        if lacking:
            instead = "give it __len__ and __getitem__, or pass "
            instead += f"list({role}) if that fits in memory, ends, and gives single examples"
            if hasattr(data, "dataset"):  # a loader of PyTorch, whose items are batches
                instead = f"pass {role}.dataset, of which it makes batches"
            raise TypeError(
                f"{role} is a {kind}, and lacks {' and '.join(lacking)}. Examples are "
                f"read by their number, several times: {instead}."
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
    lists = [isinstance(each, list) for each in data]
    if is_list_of_numbers(list(data)) and not (isinstance(data, tuple) and all(lists)):
        return rows_of_numbers(list(data), role)
    if any(isinstance(each, str | bytes) for each in data):
        raise holds_strings(role, "")
    each_is = [_kind(item) for item in data]
    if len(set(each_is)) > 1:
        return data
    if each_is[0] == "array":
        return _of_arrays(data, role, accepts)
    dicts = [frozenset(item) for item in data if isinstance(item, Mapping)]
    same_fields = len(dicts) == len(data) and len(set(dicts)) == 1
    if not (isinstance(data, list) or same_fields) or _are_fields(data, accepts):
        return data
    return _stacked_examples(data, role)


def _kind(item: Any) -> str:
    """What an item of a list is: one array, or several."""
    one = hasattr(item, "shape") or isinstance(item, bool | int | float | complex)
    return "array" if one else "several"


def _are_fields(data: Any, accepts: Accepts | None) -> bool:
    """Whether items are parts of a batch by what the function accepts, not examples."""
    if accepts is None:
        return False
    try:
        batch = as_arrays(data, "")
        sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
        return len(sizes) == 1 and () not in sizes and accepts(jax.tree.map(one_row, batch))
    except (TypeError, ValueError):
        return False


def _of_arrays(data: Sequence[Any], role: str, accepts: Accepts | None) -> Any:
    shape_of = [np.shape(item) for item in data]
    leading = {shape[:1] for shape in shape_of}
    if len(set(shape_of)) > 1:
        # Pictures of several sizes may share their first axis, the channels.
        alike = isinstance(data, list) and len(data) > 2 and len({len(s) for s in shape_of}) == 1
        as_fields = accepts is None or accepts(jax.tree.map(one_row, data))
        if len(leading) > 1 or (alike and not as_fields):
            unlike = next(x for x in enumerate(data) if np.shape(x[1]) != shape_of[0])
            raise differing((0, data[0]), unlike, role)
        return data
    if shape_of[0] == ():
        return stack(*data)
    examples = isinstance(data, list)
    if accepts is not None:
        runs, other = accepts(one_row(data[0], 0)), accepts(jax.tree.map(one_row, data))
        if runs and other and examples and len(data) <= shape_of[0][0]:
            raise ValueError(
                f"{role} is a list of {len(data)} arrays {list(shape_of[0])}, which may be "
                f"{len(data)} examples, or {len(data)} fields of {shape_of[0][0]} examples: the "
                f"function takes both. Pass np.stack({role}) for examples, and tuple({role}) for "
                "fields."
            )
        examples = runs if runs != other else examples
    return stack(*data) if examples else data


def one_row(array: Any, axes: int = 1) -> jax.ShapeDtypeStruct:
    """The shape of a row of an array, which has some axes less."""
    return jax.ShapeDtypeStruct(np.shape(array)[axes:], canonical_dtype(array))


def _stacked_examples(data: Sequence[Any], role: str) -> Any:
    examples = [as_arrays(item, f"example {number} of {role}") for number, item in enumerate(data)]
    check_shapes(examples, range(len(examples)), (0, examples[0]), role)
    return jax.tree.map(stack, *examples)


def _check_leading(batch: Batch, role: str, data: Any) -> None:
    leaves = jax.tree.leaves(batch)
    sizes = {jnp.shape(leaf)[:1] for leaf in leaves}
    if len(sizes) != 1 or () in sizes:
        fields = data.items() if isinstance(data, Mapping) else ()
        rows = [name for name, each in fields if isinstance(each, list) and (len(each),) in sizes]
        if rows:
            raise ValueError(
                f"{role}: the field {rows[0]!r} is a list of {len(data[rows[0]])}: if those are "
                f"the rows of one array, pass np.stack(data[{rows[0]!r}])."
            )
        single = " If this is ONE example, add an axis: jax.tree.map(lambda x: x[None], example)."
        raise ValueError(
            f"All arrays of a data set need the same leading axis, one row per example. {role} has "
            f"{shapes(batch)}. Scalars that all examples share belong in the function."
            f"{single if () in sizes else ''}"
        )
    if sizes == {(0,)}:
        raise ValueError(f"{role} is empty: it has no examples, and at least one is needed.")
