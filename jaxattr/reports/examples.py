"""What is shown of one example: a picture, tokens, a text, or a table of its fields."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.inputs.arrays import fields_of
from jaxattr.inputs.wording import shapes
from jaxattr.markup import number
from jaxattr.sources import Source, track
from jaxattr.typing import Example

PICTURES = ("image", "images", "img", "pixels", "picture", "x", "inputs", "0", "")
"""Fields that are taken for a picture if they have its shape: by name, else the first of a tuple,
or the whole example."""

LABELS = ("y", "label", "labels")
"""Fields that are taken for the label if they are one integer."""

NO_TOKENS = ("mask", "type_ids", "position")
"""Parts of the names of integer fields that stand beside tokens and are none."""

READ_AT_ONCE = 64
LONGEST_LIST = 32
"""Numbers of an array that are shown one by one."""

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
      decode: the text of a token, or None.

    Raises:
      TypeError: if one of them is neither.
    """

    render: Callable[[Example], Any] | None
    labels: Sequence[str] | Mapping[int, str] | Callable[[Example], Any] | None
    decode: Callable[[int], str] | None

    def __post_init__(self) -> None:
        for name, takes, gives in (
            ("render", "ONE example", "a picture, a text or a dict"),
            ("decode", "a token id", "its text"),
        ):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(
                    f"{name} must be a function from {takes} to {gives}, got {value!r:.80} of type "
                    f"{type(value).__name__}."
                )
        listed = hasattr(self.labels, "__getitem__") and not isinstance(self.labels, str)
        if self.labels is not None and not listed and not callable(self.labels):
            raise TypeError(
                "labels must be a sequence of names, or a function from ONE example to its label, "
                f"got {self.labels!r:.80} of type {type(self.labels).__name__}."
            )

    def item(self, example: Example) -> Item:
        """Shows one example.

        Args:
          example: without a batch axis.

        Raises:
          ValueError: if `render` returned what cannot be shown, labels have no field, or there is
            nothing to decode.
        """
        if self.render is None:
            shown = guessed(example, self.decode)
        else:
            shown = rendered(self.render(example))
        return Item(shown, self._label(example))

    def _label(self, example: Example) -> str | None:
        if callable(self.labels):
            try:
                return str(self.labels(example))
            except Exception as error:
                raise ValueError(
                    f"labels failed on ONE example, {shapes(example)}, and not its number: "
                    f"{type(error).__name__}: {error}"
                ) from error
        fields = fields_of(example)
        field = next((fields[name] for name in LABELS if _is_label(fields.get(name))), None)
        if self.labels is None:
            return None if field is None else str(int(field))
        if field is None:
            raise ValueError(
                f"labels are names, and examples have no label to name: one of {list(LABELS)} must "
                f"be a single integer, and the fields are {_shapes(fields)}. Pass a function from "
                "an example to its label."
            )
        among = self.labels if isinstance(self.labels, Mapping) else range(len(self.labels))
        inside = int(field) in among
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
        return Fields(tuple((str(name), worded(x)) for name, x in value.items()))
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


def guessed(example: Example, decode: Callable[[int], str] | None = None) -> Shown:
    """Shows an example without a `render`; see `ja.report` for the rules.

    Args:
      example: without a batch axis.
      decode: the text of a token, or None.

    Raises:
      ValueError: if there is nothing to decode.
    """
    if isinstance(example, Mapping) and {"inputs", "targets", "mask"} <= set(example):
        row = {name: np.asarray(example[name]) for name in ("inputs", "targets", "mask")}
        tokens = all(jnp.issubdtype(row[name].dtype, jnp.integer) for name in ("inputs", "targets"))
        alike = row["mask"].ndim == 1 and all(x.shape == row["mask"].shape for x in row.values())
        if tokens and alike:
            return Tokens(row)
    fields = fields_of(example)
    if decode is not None:
        return _decoded(fields, decode)
    for name in PICTURES:
        if name in fields and is_picture(fields[name]) and _looks_like_one(fields[name].shape):
            return Picture(np.asarray(fields[name]))
    return Fields(tuple((name or "value", worded(x)) for name, x in fields.items()))


def _decoded(fields: Mapping[str, Any], decode: Callable[[int], str]) -> Shown:
    """The text of the one field of tokens, or a table where there is more to show."""
    texts = {name: _text(x, decode) for name, x in fields.items() if _is_text(name, x)}
    if not texts:
        raise ValueError(
            "decode is given, and examples have nothing to decode: no field is a vector of at "
            f"least 2 integers, and the fields are {_shapes(fields)}. Leave decode out, or show "
            "examples yourself with render=."
        )
    rest = {name for name, x in fields.items() if not _is_beside(name)} - set(texts)
    if len(texts) == 1 and all(name in LABELS and _is_label(fields[name]) for name in rest):
        return Text(*texts.values())
    return Fields(
        tuple((name or "value", texts.get(name) or worded(x)) for name, x in fields.items())
    )


def _is_text(name: str, value: Any) -> bool:
    integers = np.ndim(value) == 1 and jnp.issubdtype(value.dtype, jnp.integer)
    return integers and len(value) >= 2 and not _is_beside(name)


def _is_beside(name: str) -> bool:
    return any(each in name for each in NO_TOKENS)


def _text(ids: Any, decode: Callable[[int], str]) -> str:
    # Negative ids are no tokens: they mark targets that do not count.
    return "".join(str(decode(int(i))) for i in ids if i >= 0)


def is_picture(array: Any) -> bool:
    """Whether an array can be drawn: [h, w] or [h, w, 1 | 3 | 4] of real numbers."""
    shape = array.shape
    axes = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
    return _is_real(array.dtype) and axes and min(shape) > 0


def _looks_like_one(shape: tuple[int, ...]) -> bool:
    """Both sides of at least 4, neither 8 times the other: no sequence of feature vectors."""
    short, long = sorted(shape[:2])
    return short >= 4 and long < 8 * short


def _is_label(value: Any) -> bool:
    return value is not None and np.shape(value) == () and jnp.issubdtype(value.dtype, jnp.integer)


def _is_real(dtype: Any) -> bool:
    real = (jnp.floating, jnp.integer, jnp.bool_)
    return any(jnp.issubdtype(dtype, kind) for kind in real)


def _shapes(fields: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{x.dtype} {list(np.shape(x))}" for name, x in fields.items()}


def worded(value: Any) -> str:
    """Writes a value: floats with three digits that count, long arrays as a range.

    Args:
      value: anything.
    """
    if isinstance(value, str | bytes):
        return str(value)
    if isinstance(value, float):
        return number(value)
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return str(value)
    kind = f"{value.dtype} {list(value.shape)}"
    if not _is_real(value.dtype):
        return kind
    array = np.asarray(value)
    if array.size > LONGEST_LIST:
        return f"{kind}, {number(float(array.min()))} to {number(float(array.max()))}"
    if array.ndim:
        return f"[{', '.join(worded(each) for each in array)}]"
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return number(float(array)) if floating else str(array)


def _on_host(leaf: Any) -> Any:
    # Random keys have no NumPy dtype; they are shown by their kind alone.
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)
