"""What is shown of one example: a picture, tokens, a text, or a table of its fields."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.groups import named_leaves
from jaxattr.markup import number
from jaxattr.sources import Source, track
from jaxattr.typing import Example

PICTURES = ("image", "images", "img", "pixels", "picture", "x", "inputs", "0", "")
"""Fields that are taken for a picture if they have its shape: by name, else the first of a tuple,
or the whole example."""

LABELS = ("y", "label", "labels")
"""Fields that are taken for the label if they are one integer."""

READ_AT_ONCE = 64
LONGEST_TEXT = 2000


class Picture(NamedTuple):
    """Pixels [h, w] or [h, w, 1 | 3 | 4], of any real dtype."""

    pixels: np.ndarray


class Text(NamedTuple):
    """A text."""

    text: str


class Fields(NamedTuple):
    """Names and values, as text."""

    rows: tuple[tuple[str, str], ...]


class Tokens(NamedTuple):
    """A row of tokens: `inputs`, `targets` and `mask`, each [t], as in `jaxattr.language`."""

    row: dict[str, np.ndarray]


Shown: TypeAlias = Picture | Text | Fields | Tokens


class Item(NamedTuple):
    """One example, ready to be shown.

    Attributes:
      shown: of it.
      label: in words; None if it has none.
    """

    shown: Shown
    label: str | None


@dataclasses.dataclass(frozen=True)
class Showing:
    """How examples are shown; see `ja.report` for the rules.

    Attributes:
      render: of the user, or None.
      labels: names of classes, a function of an example, or None.
    """

    render: Callable[[Example], Any] | None
    labels: Sequence[str] | Callable[[Example], Any] | None

    def item(self, example: Example) -> Item:
        """Shows one example.

        Args:
          example: without a batch axis.

        Raises:
          ValueError: if `render` returned what cannot be shown, or labels have no field.
        """
        shown = guessed(example) if self.render is None else rendered(self.render(example))
        return Item(shown, self._label(example))

    def _label(self, example: Example) -> str | None:
        if callable(self.labels):
            return str(self.labels(example))
        fields = _fields(example)
        field = next((fields[name] for name in LABELS if _is_label(fields.get(name))), None)
        if self.labels is None:
            return None if field is None else str(int(field))
        if field is None:
            raise ValueError(
                f"labels are names, and examples have no label to name: one of {list(LABELS)} must "
                f"be a single integer, and the fields are {_shapes(fields)}. Pass a function from "
                "an example to its label."
            )
        inside = 0 <= int(field) < len(self.labels)
        return str(self.labels[int(field)]) if inside else f"{int(field)} (has no name)"


def read(source: Source, positions: Sequence[int], showing: Showing, what: str) -> dict[int, Item]:
    """Reads and shows some examples; keeps no others.

    Args:
      source: the data set.
      positions: of the examples.
      showing: how.
      what: they are, for the progress bar.

    Returns:
      {position: item}.
    """
    chunks = [positions[i : i + READ_AT_ONCE] for i in range(0, len(positions), READ_AT_ONCE)]
    items: dict[int, Item] = {}
    for chunk in track(chunks, what, len(chunks)):
        batch = jax.tree.map(_on_host, source.read(np.asarray(chunk, np.int64)))
        for row, position in enumerate(chunk):
            example = jax.tree.map(lambda x, row=row: x[row], batch)
            items[int(position)] = showing.item(example)
    return items


def rendered(value: Any) -> Shown:
    """Reads what a user's `render` returned.

    Args:
      value: an array, a text or a mapping.

    Raises:
      ValueError: if it is anything else.
    """
    if isinstance(value, str):
        return Text(value)
    if isinstance(value, Mapping):
        return Fields(tuple((str(name), _worded(x)) for name, x in value.items()))
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        array = np.asarray(value)
        if is_picture(array):
            return Picture(array)
        got = f"an array of shape {list(array.shape)} and dtype {array.dtype}"
    else:
        got = f"{value!r:.80} of type {type(value).__name__}"
    raise ValueError(
        "render must return a picture, an array [h, w] or [h, w, 1 | 3 | 4] of real numbers; a "
        f"text; or a dict, shown as a table. It returned {got}."
    )


def guessed(example: Example) -> Shown:
    """Shows an example without a `render`; see `ja.report` for the rules."""
    if isinstance(example, Mapping) and {"inputs", "targets", "mask"} <= set(example):
        row = {name: np.asarray(example[name]) for name in ("inputs", "targets", "mask")}
        if row["mask"].ndim == 1 and all(x.shape == row["mask"].shape for x in row.values()):
            return Tokens(row)
    fields = _fields(example)
    for name in PICTURES:
        if name in fields and is_picture(fields[name]) and _looks_like_one(fields[name].shape):
            return Picture(np.asarray(fields[name]))
    return Fields(tuple((name or "value", _worded(x)) for name, x in _fields(example).items()))


def is_picture(array: Any) -> bool:
    """Whether an array can be drawn: [h, w] or [h, w, 1 | 3 | 4] of real numbers."""
    shape = array.shape
    axes = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
    return _is_real(array.dtype) and axes and min(shape) > 0


def _looks_like_one(shape: tuple[int, ...]) -> bool:
    """Both sides of at least 4, neither 8 times the other: no sequence of feature vectors."""
    short, long = sorted(shape[:2])
    return short >= 4 and long < 8 * short


def _fields(example: Example) -> dict[str, Any]:
    return {"": example} if hasattr(example, "shape") else named_leaves(example)


def _is_label(value: Any) -> bool:
    return value is not None and np.shape(value) == () and jnp.issubdtype(value.dtype, jnp.integer)


def _is_real(dtype: Any) -> bool:
    real = (jnp.floating, jnp.integer, jnp.bool_)
    return any(jnp.issubdtype(dtype, kind) for kind in real)


def _shapes(fields: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{x.dtype} {list(np.shape(x))}" for name, x in fields.items()}


def _worded(value: Any) -> str:
    """A value in a table: numbers as they are, larger arrays by their shape and range."""
    if isinstance(value, float):
        return number(value)
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return str(value)
    kind = f"{value.dtype} {list(value.shape)}"
    if not _is_real(value.dtype):
        return kind
    array = np.asarray(value)
    if array.size <= 8:
        exact = not jnp.issubdtype(array.dtype, jnp.floating)
        texts = [str(x) if exact else number(float(x)) for x in array.flat]
        return texts[0] if array.ndim == 0 else f"[{', '.join(texts)}]"
    return f"{kind}, {number(float(array.min()))} to {number(float(array.max()))}"


def _on_host(leaf: Any) -> Any:
    # Random keys have no NumPy dtype; they are shown by their kind alone.
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)


def pictures_of(items: Iterable[Item]) -> list[np.ndarray]:
    """Returns the pixels of all items that are pictures."""
    return [item.shown.pixels for item in items if isinstance(item.shown, Picture)]
