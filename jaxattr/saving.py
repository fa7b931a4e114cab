"""What of an index is saved beside its rows: what was fitted, and what a kernel does to queries."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxattr.bases import Fitted
from jaxattr.sharding import Placement
from jaxattr.store import Folder, load_state, save_state

MANIFEST, COMPLETE = "manifest.json", "complete.json"
"""What an index was made from; what its rows came to, written last."""


def save_fitted(folder: Folder, number: int, fitted: Fitted, place: Placement) -> None:
    """Saves what was fitted to a checkpoint.

    Args:
      folder: of the index.
      number: of the checkpoint.
      fitted: what was fitted.
      place: the devices.
    """
    flat = {}
    for leaf, sides in fitted.sides.items():
        for side, array in zip("AB", sides, strict=True):
            if array is not None:
                flat[f"side {side} {leaf}"] = array
        flat[f"sides {leaf}"] = jnp.zeros(1)  # stands for a leaf of which both are the identity
    flat |= {f"scales {leaf}": array for leaf, array in fitted.scales.items()}
    flat |= {f"captured {leaf}": array for leaf, array in fitted.captured.items()}
    if fitted.curvature is not None:
        flat["curvature"] = fitted.curvature
    save_state(folder, f"fitted-{number}", flat, place)


def load_fitted(folder: Folder, number: int, place: Placement) -> Fitted | None:
    """Loads what `save_fitted` saved; None if it is not there.

    Args:
      folder: of the index.
      number: of the checkpoint.
      place: the devices.
    """
    flat = load_state(folder, f"fitted-{number}", place)
    if flat is None:
        return None

    def named(prefix: str) -> dict[str, jax.Array]:
        return {k.removeprefix(prefix): x for k, x in flat.items() if k.startswith(prefix)}

    a, b = named("side A "), named("side B ")
    sides = {leaf: (a.get(leaf), b.get(leaf)) for leaf in named("sides ")}
    return Fitted(sides, named("scales "), flat.get("curvature"), named("captured "))


def save_operator(folder: Folder, number: int, operator: list[Any], place: Placement) -> None:
    """Saves an operator that queries need, a list of arrays.

    Args:
      folder: of the index.
      number: of the checkpoint.
      operator: of the kernel.
      place: the devices.
    """
    arrays = {f"{i:06}": array for i, array in enumerate(operator)}
    save_state(folder, f"operator-{number}", arrays, place)


def load_operator(folder: Folder, number: int, place: Placement) -> list[jax.Array] | None:
    """Loads what `save_operator` saved; None if it is not there.

    Args:
      folder: of the index.
      number: of the checkpoint.
      place: the devices.
    """
    arrays = load_state(folder, f"operator-{number}", place)
    return None if arrays is None else [arrays[name] for name in sorted(arrays)]
