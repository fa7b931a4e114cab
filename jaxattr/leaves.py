"""The leaves of a pytree, and their names."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax


def leaf_names(tree: Any) -> list[str]:
    """Names the leaves of a pytree by their paths, such as `blocks/0/kernel`.

    A `flax.nnx.State` names its leaves as the equivalent dict does: the `value` of an nnx variable
    is no part of the name.

    Args:
      tree: any pytree.

    Returns:
      One name per leaf, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: if two leaves have the same name, as {"a/b": ...} and {"a": {"b": ...}} do.
    """
    return list(named_leaves(tree))


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns the leaves of a pytree by their names; see `leaf_names`.

    Args:
      tree: any pytree.
      is_leaf: as in `jax.tree.leaves`.

    Returns:
      {leaf name: leaf}, in the order of `jax.tree.leaves`.
    """
    found: dict[str, Any] = {}
    paths: dict[str, tuple[Any, ...]] = {}
    for path, leaf in leaf_paths(tree, is_leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "params"
        if name in found:
            both = [jax.tree_util.keystr(each) for each in (paths[name], path)]
            raise ValueError(
                f"Two leaves have the same name {name!r}: {both[0]} and {both[1]}; rename a key."
            )
        found[name], paths[name] = leaf, path
    return found


def leaf_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields leaves with their paths, in which an nnx variable that holds one array is that array.

    Args:
      tree: any pytree.
      is_leaf: as in `jax.tree.leaves`.
    """
    nnx = sys.modules.get("flax.nnx")  # without it there are no variables, and it is slow to import
    flatten = jax.tree_util.tree_flatten_with_path

    def stops(node: Any) -> bool:
        variable = nnx is not None and isinstance(node, nnx.Variable)
        return variable or (is_leaf is not None and is_leaf(node))

    for path, node in flatten(tree, stops)[0]:
        for inner, leaf in flatten(node, is_leaf)[0]:
            yield (path if path and len(inner) == 1 else path + inner), leaf
