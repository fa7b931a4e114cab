"""The arrays of a batch or of one example: what they may hold, and how examples are stacked."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxattr.inputs.wording import brief, path_name, shapes
from jaxattr.leaves import named_leaves
from jaxattr.typing import Example

# What a NumPy array may hold: booleans, integers, floats, complex numbers and bfloat16 ("V").
_NUMBERS = "biufcV"

_PAD = (
    "Pad them to one length, and keep the padding out of the loss with a mask (of a language "
    "model: ja.language.rows(token_lists, length, vocabulary=...))."
)


NOTHING = (
    "An example that holds nothing is None, as a filter of grain gives for what it leaves out: "
    "leave those out beforehand, so that every number has an example."
)


def as_arrays(tree: Any, what: str) -> Any:
    """Returns a pytree as arrays; a list of numbers, or of such lists, is one array.

    Args:
      tree: a batch, or one example.
      what: it is, for messages.

    Raises:
      ValueError: if there is something in it that is no array of numbers.
    """

    # An empty list stays what it is to JAX: a pytree of nothing.
    def stops(node: Any) -> bool:
        return is_list_of_numbers(node) and len(node) > 0

    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stops)
    return jax.tree.unflatten(structure, [_as_array(leaf, path, what) for path, leaf in leaves])


def check_shapes(
    examples: Sequence[Any], numbers: Sequence[int], known: tuple[int, Any], role: str
) -> None:
    """Checks that examples have the arrays of one that is known.

    Args:
      examples: pytrees of arrays.
      numbers: their positions in the data set.
      known: position and arrays of the one that they are compared with.
      role: what the data are, for messages.

    Raises:
      ValueError: naming the first example that differs, and how.
    """
    expected = shapes_and_tree(known[1])
    for number, example in zip(numbers, examples, strict=True):
        if shapes_and_tree(example) != expected:
            raise differing(known, (number, example), role)


def of_kind(example: Example, number: int, known: Example, role: str) -> Example:
    """Returns an example in the types of the first, as far as those can hold it.

    A source is read in blocks, each of its own; the types of a block must not depend on which
    examples share it.

    Args:
      example: a pytree of arrays.
      number: its position.
      known: the first example, of the same shapes.
      role: what the data are, for messages.

    Raises:
      ValueError: if the first has whole numbers, and this one has not, or larger ones than its
        type holds.
    """

    def one(path: tuple[Any, ...], leaf: Any, first: Any) -> Any:
        if leaf.dtype == first.dtype or not isinstance(first.dtype, np.dtype):
            return leaf
        if not np.can_cast(leaf.dtype, first.dtype, "same_kind"):
            raise ValueError(
                f"{role}: {_field(path_name(path))} is {first.dtype} in example 0 and {leaf.dtype} "
                f"in example {number}. Give all examples one type, such as np.float32(value)."
            )
        cast = np.asarray(leaf, first.dtype)
        if first.dtype.kind in "biu" and (cast != leaf).any():
            raise ValueError(
                f"{role}: {_field(path_name(path))} is {first.dtype} in example 0, which does not "
                f"hold {np.asarray(leaf)[cast != leaf][0]} of example {number}. Give all examples "
                f"one type, such as np.{leaf.dtype}(value)."
            )
        return cast

    return jax.tree_util.tree_map_with_path(one, example, known)


def stack(*leaves: Any) -> Any:
    """Stacks arrays of one shape; keys by JAX, all else by NumPy."""
    if isinstance(leaves[0], jax.Array) and jnp.issubdtype(leaves[0].dtype, jax.dtypes.extended):
        return jnp.stack(leaves)
    return np.stack([np.asarray(leaf) for leaf in leaves])


def canonical_dtype(array: Any) -> Any:
    """The type that JAX gives to an array: NumPy's int64 is its int32, unless told otherwise."""
    dtype = array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype
    if not isinstance(dtype, np.dtype):
        return dtype if isinstance(array, jax.Array) else canonical_dtype(np.asarray(array))
    return jax.dtypes.canonicalize_dtype(dtype)


def rows_of_numbers(rows: list[Any], role: str) -> Any:
    """Returns a list of numbers, or of such lists, as an array; says which rows differ."""
    try:
        return np.asarray(rows)
    except ValueError:
        expected = np.shape(_as_row(rows[0], role))
        for number, row in enumerate(rows):
            if np.shape(_as_row(row, role)) != expected:
                raise differing((0, np.asarray(rows[0])), (number, np.asarray(row)), role) from None
        raise


def _as_row(row: Any, role: str) -> np.ndarray:
    try:
        return np.asarray(row)
    except ValueError:
        raise ValueError(
            f"{role} holds lists of lists of different lengths, such as {brief(row)}. {_PAD}"
        ) from None


def differing(known: tuple[int, Any], other: tuple[int, Any], role: str) -> ValueError:
    """What to say of an example that differs from the one it is compared with."""
    (first, expected), (number, found) = known, other
    each = "row" if role.startswith("example") else "example"
    lengths = [jnp.shape(x)[:1] for tree in (expected, found) for x in jax.tree.leaves(tree)]
    same = shapes_and_tree(expected)[0] == shapes_and_tree(found)[0]
    remedy = "Every example needs the same fields, also those that are no arrays."
    if same:
        remedy = f"Sequences of different lengths? {_PAD}" if all(lengths) else ""
    if not all(jax.tree.leaves(tree) for tree in (expected, found)):
        remedy = NOTHING
    return ValueError(
        f"All {each}s need the same arrays with the same shapes. In {role}, {each} {first} has "
        f"{shapes(expected)}, {each} {number} has {shapes(found)}. {remedy}"
    )


def shapes_and_tree(example: Example) -> tuple[Any, list[tuple[int, ...]]]:
    """Returns what must be the same for examples to be stacked."""
    leaves, structure = jax.tree.flatten(example)
    return structure, [jnp.shape(leaf) for leaf in leaves]


def is_one_leaf(node: Any) -> bool:
    """Whether JAX takes something for an array, of whatever kind, and not for a tree."""
    return jax.tree_util.all_leaves([node])


def is_list_of_numbers(node: Any) -> bool:
    """Whether something is a list of numbers, or of such lists."""
    numbers = bool | int | float | complex | np.generic
    return isinstance(node, list) and all(
        isinstance(each, numbers) or is_list_of_numbers(each) for each in node
    )


def _as_array(leaf: Any, path: tuple[Any, ...], what: str) -> Any:
    field = path_name(path)
    if isinstance(leaf, Mapping):  # of a kind that JAX takes for a single leaf, of tokenizers say
        return as_arrays({name: value for name, value in leaf.items()}, what)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{what}: {_field(field)} is the shape of an array, not an array. For ja.plan zeros do "
            "that take no memory: np.broadcast_to(np.float32(0), shape)."
        )
    if isinstance(leaf, jax.Array):
        return placed(_addressable(leaf))
    if isinstance(leaf, str | bytes):
        raise holds_strings(what, field)
    if hasattr(leaf, "to_numpy"):  # a column of a table, whose items have names
        leaf = leaf.to_numpy()
    if hasattr(leaf, "toarray") or isinstance(leaf, np.ma.MaskedArray):
        remedy = ".toarray()" if hasattr(leaf, "toarray") else ".filled(value)"
        raise ValueError(
            f"{what}: {_field(field)} is a {type(leaf).__name__}: make an array of it, {remedy}."
        )
    if not (hasattr(leaf, "shape") and isinstance(getattr(leaf, "dtype", None), np.dtype)):
        leaf = _converted(leaf, field, what)
    if leaf.dtype.kind in _NUMBERS and leaf.dtype.type is not np.void:
        if leaf.dtype.char in "gG":
            raise ValueError(
                f"{what}: {_field(field)} is {leaf.dtype}, and JAX has none so wide: make it "
                ".astype(np.float64)."
            )
        _check_range(leaf, field, what)
        return in_byte_order(leaf)
    if leaf.dtype.kind in "US":
        raise holds_strings(what, field)
    raise _no_numbers(leaf, field, what)


def in_byte_order(array: Any) -> Any:
    """Returns an array of NumPy in the byte order of this machine, which files may not have.

    Args:
      array: or whatever else is a leaf, which stays what it is.
    """
    if isinstance(array, np.ndarray | np.generic) and not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    return array


def placed(array: Any) -> Any:
    """Returns an array of JAX on a mesh whose axes the compiler handles, in the same memory.

    Those of `jax.make_mesh` are explicit: each operation would have to say where its result lies.

    Args:
      array: or whatever else is a leaf, which stays what it is.

    Raises:
      ValueError: if it is deleted.
    """
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array):
        return array
    if array.is_deleted():
        raise ValueError(
            f"An array {array.dtype} {list(array.shape)} is deleted: a step of training took its "
            "memory (donate_argnums). Pass a copy from before, jax.tree.map(jnp.copy, params)."
        )
    if not isinstance(array.sharding, NamedSharding):
        return array
    mesh: Any = array.sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return array
    check_context()
    kind = array.sharding.memory_kind
    sharding = NamedSharding(with_auto_axes(mesh), array.sharding.spec, memory_kind=kind)
    return jax.device_put(array, sharding)


def check_context() -> None:
    """Refuses `jax.set_mesh` of a mesh with explicit axes, which takes arrays on no other mesh."""
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        raise ValueError(
            "This is called within jax.set_mesh of a mesh with explicit axes, under which each "
            "operation would have to say where its result lies. Call it outside, or make the mesh "
            "with jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * axes)."
        )


def with_auto_axes(mesh: Mesh) -> Mesh:
    """The mesh, with axes that the compiler handles: `jax.make_mesh` makes explicit ones."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def _check_range(array: np.ndarray, field: str, what: str) -> None:
    """Refuses whole numbers that JAX would cut to 32 bits: ids of users, hashes."""
    taken = jax.dtypes.canonicalize_dtype(array.dtype)
    if array.dtype.kind not in "iu" or taken == array.dtype or not array.size:
        return
    limits = np.iinfo(taken)
    once = array[tuple(slice(None) if step else slice(1) for step in array.strides)]
    low, high = once.min(), once.max()
    if low < limits.min or high > limits.max:
        beyond = low if low < limits.min else high
        raise ValueError(
            f"{what}: {_field(field)} is {array.dtype} and holds {beyond}, of which JAX makes "
            f"another number: it takes {taken}, from {limits.min:,} to {limits.max:,}. Give ids "
            "numbers from 0 on (np.unique(ids, return_inverse=True)), leave the field out, or set "
            'jax.config.update("jax_enable_x64", True).'
        )


def _converted(leaf: Any, field: str, what: str) -> Any:
    if isinstance(leaf, list):
        return rows_of_numbers(leaf, f"{what}, field {field!r}" if field else what)
    try:
        return np.asarray(leaf)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{what}: {_field(field)} is a {type(leaf).__name__}, which does not become a NumPy "
            f"array ({brief(error)}): pass one."
        ) from error


def holds_strings(what: str, field: str) -> ValueError:
    """What to say of strings."""
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
        if len({(np.shape(item), np.asarray(item).dtype.kind in _NUMBERS) for item in leaf}) == 1:
            return ValueError(
                f"{what}: {_field(field)} is an array of objects, each an array of {lengths[0]}: "
                "make one array of them, np.stack(column)."
            )
        return ValueError(
            f"{what}: {_field(field)} is an array of objects, rows of different lengths: example 0 "
            f"has {lengths[0]}, example {other} has {lengths[other]}. {_PAD}"
        )
    found = type(np.ravel(leaf)[0]).__name__ if leaf.dtype == object and leaf.size else leaf.dtype
    if found == "str":
        return holds_strings(what, field)
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


def fields_of(tree: Any) -> dict[str, Any]:
    """The arrays of a pytree by their names; that of one array alone is empty."""
    return {"": tree} if is_one_leaf(tree) else named_leaves(tree)
