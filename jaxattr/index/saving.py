"""What of an index is saved beside its rows: what was fitted, and what a kernel does to queries."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr import identity
from jaxattr.features.bases import Fitted, Sides
from jaxattr.index import provenance
from jaxattr.index.index import Index, Recorded
from jaxattr.sharding import Placement
from jaxattr.store.folder import Folder, StoreError, malformed, reading
from jaxattr.store.seals import SEALS, Seals, load_seals
from jaxattr.store.state import load_state, save_state

_BEGUN = "begun"
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
    for name in ("curvature", "exponent", "data"):
        if getattr(fitted, name) is not None:
            flat[name] = getattr(fitted, name)
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
    sides: dict[str, Sides] = {leaf: (a.get(leaf), b.get(leaf)) for leaf in named("sides ")}
    rest = {name: flat.get(name) for name in ("curvature", "exponent", "data")}
    return Fitted(sides, named("scales "), captured=named("captured "), **rest)


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


def read_manifest(folder: Folder) -> dict[str, Any] | None:
    """Returns what an index was made from, or None if there is no index.

    Args:
      folder: of the index.

    Raises:
      StoreError: if it is of another format.
    """
    described = folder.read(MANIFEST)
    if described is not None and described.get("format") != provenance.FORMAT:
        raise StoreError(
            f"{folder.path} has format {described.get('format')}, and this version of jaxattr "
            f"reads format {provenance.FORMAT}: build the index again."
        )
    return described


def examples_on_record(folder: Folder, described: Mapping[str, Any] | None) -> int | None:
    """Returns how many examples an index was made from, or None if there is no index.

    Args:
      folder: of the index.
      described: what `read_manifest` returned.
    """
    if described is None:
        return None
    with reading(folder, MANIFEST):
        examples = described["data"]["examples"]
        if type(examples) is not int or examples < 1:
            raise ValueError(f"{examples!r} is no number of examples")
    return examples


def examples_at_first(described: Mapping[str, Any], examples: int) -> int:
    """Returns how many examples an index was begun with, before it was extended.

    Args:
      described: what `read_manifest` returned.
      examples: what it has now.
    """
    begun = described["data"].get(_BEGUN, examples)
    return begun if type(begun) is int and 0 < begun <= examples else examples


def with_first(here: dict[str, Any], begun: int) -> dict[str, Any]:
    """A manifest that says how many examples the index was begun with, if those are fewer."""
    data = here["data"]
    return here if begun == data["examples"] else here | {"data": data | {_BEGUN: begun}}


def refuse_others(folder: Folder, differences: Sequence[str]) -> None:
    """Raises if an index was made from something else, and says what differs.

    Args:
      folder: of the index.
      differences: one line each.
    """
    if differences:
        listed = "\n  ".join(differences)
        raise StoreError(
            f"{folder.path} was made from something else:\n  {listed}\nPass what it was made from, "
            "or give another path."
        )


class BesideRows(NamedTuple):
    """What a finished index has beside its rows; as in `Index`."""

    fitted: tuple[Fitted, ...]
    operators: tuple[Any, ...]
    non_finite: np.ndarray
    solve_errors: np.ndarray | None


def save_finished(folder: Folder, index: Index, recorded: Recorded, seals: Seals) -> None:
    """Says that an index is finished, and what its rows came to; on the first process.

    Args:
      folder: of the index.
      index: of which what was fitted, and operators, are saved when they are made.
      recorded: what it says of itself.
      seals: of its files.
    """
    errors = None if index.solve_errors is None else index.solve_errors.astype(float).tolist()
    non_finite = index.non_finite.tolist()
    record = {"examples": index.size, "non_finite": non_finite, "solve_errors": errors}
    record |= recorded._asdict() | {"seals": seals.digest}
    folder.write(COMPLETE, record | {"digest": identity.digest(record)})


class Closed(NamedTuple):
    """A finished index, as its closing record has it.

    Attributes:
      examples: number of training examples.
      recorded: what it says of itself.
      seals: of its files.
      record: all of the closing record.
    """

    examples: int
    recorded: Recorded
    seals: Seals
    record: Mapping[str, Any]


def read_closed(folder: Folder) -> Closed | None:
    """Returns the closing record of an index, having compared its files with it; or None.

    Args:
      folder: of the index.

    Raises:
      StoreError: if a file of the index is not what was written.
    """
    record = folder.read(COMPLETE)
    if record is None:
        return None
    with reading(folder, COMPLETE):
        if record.pop("digest") != identity.digest(record):
            raise ValueError("it is not what was written")
        recorded = Recorded(record["query_side"], record["exponent"])
    seals = load_seals(folder)
    if seals is None or seals.digest != record["seals"]:
        raise malformed(folder, SEALS, "it is gone, or not what was written")
    return Closed(record["examples"], recorded, seals, record)


def load_finished(
    folder: Folder, complete: Mapping[str, Any], checkpoints: int, place: Placement
) -> BesideRows:
    """Loads what a finished index has beside its rows.

    Args:
      folder: of the index.
      complete: contents of its `COMPLETE`.
      checkpoints: how many it has.
      place: the devices.

    Raises:
      StoreError: if something is gone.
    """
    fitted = [load_fitted(folder, number, place) for number in range(checkpoints)]
    if any(each is None for each in fitted):
        raise StoreError(
            f"{folder.path} is damaged: what was fitted to its checkpoints is gone. Delete the "
            "index and build it again."
        )
    operators = [load_operator(folder, number, place) for number in range(checkpoints)]
    errors = complete["solve_errors"]
    return BesideRows(
        tuple(each for each in fitted if each is not None),
        tuple(each for each in operators if each is not None),
        np.asarray(complete["non_finite"], np.int64),
        None if errors is None else np.asarray(errors, float),
    )
