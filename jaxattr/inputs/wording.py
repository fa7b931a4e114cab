"""Shapes and values in few words, for messages of at most six lines."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxattr.leaves import leaf_paths

# Names, or arrays, that a message lists before it says how many more there are.
_LISTED = 6


def shapes(tree: Any) -> str:
    """Says what arrays a pytree holds, such as `x float32[8, 4], y int32[]`.

    Args:
      tree: a pytree of arrays or shapes.
    """
    words = [f"{path_name(path)} {shape(leaf)}".strip() for path, leaf in leaf_paths(tree)]
    return listed(words) or "no arrays"


def shape(leaf: Any) -> str:
    """Says what one array is, such as `float32[8, 4]`."""
    if not hasattr(leaf, "dtype"):
        return type(leaf).__name__
    return f"{leaf.dtype}{list(jnp.shape(leaf))}"


def listed(words: Iterable[str]) -> str:
    """Joins words by commas; of many the first, and how many more there are."""
    words = list(words)
    more = len(words) - _LISTED
    return ", ".join(words[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def brief(value: Any, length: int = 80) -> str:
    """The first line of what a value or an error says of itself, cut to a length."""
    text = str(value).strip().split("\n")[0]
    return text if len(text) <= length else text[: length - 3] + "..."


def name_of(function: Any) -> str:
    """The name of a function, or of what is called like one."""
    return getattr(function, "name", getattr(function, "__name__", type(function).__name__))


def path_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf, of its path in a pytree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
