"""Learned weights in a file of their own, which are not taken for those of another index."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxattr.index.index import Index
from jaxattr.scores.weighting import weight_array
from jaxattr.store.folder import Folder, StoreError, on_first_process, reading
from jaxattr.weights.report import Gain, WeightFit

_FORMAT = 1
_REMEDY = "Restore it, or learn the weights again."


def save_fit(path: str | os.PathLike[str], fit: WeightFit, index: Index) -> None:
    """Writes a fit as JSON, whole or not at all, with what it belongs to.

    Args:
      path: of the file, local or a URL.
      fit: of `ja.learn_weights`.
      index: that it was learned on.

    Raises:
      StoreError: if it cannot be written.
      ValueError: if it has weights of other groups than the index.
    """
    folder, name = _place(path)
    _check(fit, index)
    contents = {
        "format": _FORMAT,
        "groups": list(index.layout.names),
        "index": index.query_side,
        "fit": fit_as_json(fit) | {"learned_from": sorted(x.hex() for x in fit.learned_from)},
    }
    on_first_process(lambda: folder.write(name, contents))


def load_fit(path: str | os.PathLike[str], index: Index) -> WeightFit | None:
    """Reads what `save_fit` wrote.

    Args:
      path: of the file.
      index: that the weights are wanted for.

    Returns:
      The fit; None if there is no such file.

    Raises:
      StoreError: if it is damaged, or was learned on another index.
    """
    folder, name = _place(path)
    contents = folder.read(name, _REMEDY)
    if contents is None:
        return None
    with reading(folder, name, _REMEDY):
        if contents["format"] != _FORMAT:
            raise ValueError(f"it has format {contents['format']}, and {_FORMAT} is read")
        groups, other = contents["groups"], contents["index"] != index.query_side
        fit = _fit_from(contents["fit"])
    names = list(index.layout.names)
    if groups != names:
        only = [sorted(set(a) - set(b)) for a, b in ((groups, names), (names, groups))]
        raise StoreError(
            f"{folder.path}/{name} has weights of other groups than the index: only in the file "
            f"{only[0]}, only in the index {only[1]}. Learn the weights again."
        )
    if other:
        raise StoreError(
            f"{folder.path}/{name} has weights of another index: with the same groups, but another "
            "method, other parameters or another key. Learn the weights again."
        )
    with reading(folder, name, _REMEDY):
        _check(fit, index)
    return fit


def fit_as_json(fit: WeightFit) -> dict[str, Any]:
    """Returns a fit as JSON can hold it, but for which queries it was learned from.

    Args:
      fit: of `ja.learn_weights`.
    """
    found = dataclasses.asdict(fit) | {"losses": np.asarray(fit.losses, float).tolist()}
    del found["learned_from"]
    return found


def _fit_from(contents: Mapping[str, Any]) -> WeightFit:
    gain, held_out = contents["gain"], contents["held_out_loss"]
    changed = {
        "gain": None if gain is None else Gain(**gain),
        "losses": np.asarray(contents["losses"], float),
        "loss": tuple(contents["loss"]),
        "held_out_loss": None if held_out is None else tuple(held_out),
        "warnings": tuple(contents["warnings"]),
        "learned_from": frozenset(bytes.fromhex(each) for each in contents["learned_from"]),
    }
    return WeightFit(**{**contents, **changed})


def _check(fit: WeightFit, index: Index) -> None:
    """Refuses a fit whose groups are not those of the index, or whose weights are none."""
    weight_array(index.layout, fit)
    for what in ("shares", "start_shares", "tail_ratio"):
        found = getattr(fit, what)
        if found.keys() != set(index.layout.names):
            raise ValueError(
                f"{what} of a fit are of the index's groups, {list(index.layout.names)}; got "
                f"{sorted(found)}."
            )
        math.fsum(found.values())  # raises where one is no number


def _place(path: str | os.PathLike[str]) -> tuple[Folder, str]:
    """The folder that a file is in, and its name there."""
    text = os.fsdecode(path)
    start = text.rfind("/") + 1
    if text[start:] in ("", ".", ".."):
        raise StoreError(f"{text!r} names no file: give its name too, such as weights.json.")
    return Folder(text[:start] or "."), text[start:]
