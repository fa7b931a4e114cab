"""What was fitted to a checkpoint, and what a kernel applies to queries: saved through Orbax.

Orbax writes a zarr array per name. They are read as such, since it takes what it finds for granted:
damage shows in tracebacks from many threads, or not at all.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from jaxattr.sharding import Placement
from jaxattr.store.folder import Folder, first_line, malformed, reading, writing


def save_state(folder: Folder, name: str, arrays: dict[str, Any], place: Placement) -> None:
    """Saves named arrays; all processes call it.

    Args:
      folder: of the index.
      name: of the state.
      arrays: {name: array}.
      place: where they are.

    Raises:
      StoreError: if they cannot be written.
    """
    names = sorted(arrays)
    values = {f"{i}": place.whole(jnp.asarray(arrays[key])) for i, key in enumerate(names)}
    jax.block_until_ready(values)
    first = jax.process_index() == 0
    if first:  # the description is there when the arrays are, and only then
        folder.delete(f"{name}.json")
        for left in {file.split("/")[0] for file in folder.names(f"{name}.orbax")}:
            folder.delete_under(f"{left}/")
    from jaxattr.store.orbax_arrays import save_arrays  # slow to import, and needed here alone

    with writing(f"{folder.path}/{name}", Exception):  # of many kinds, one per library below
        # Orbax takes neither nothing nor arrays without entries.
        some = {place: value for place, value in values.items() if value.size}
        save_arrays(f"{folder.plain}/{name}", some or {"nothing": np.zeros(1)})
    described = {
        "names": names,
        "shapes": [[list(value.shape), value.dtype.name] for value in values.values()],
        "digests": [_digest(place.host(value)) for value in values.values()],
    }
    if first:
        folder.write(f"{name}.json", described)


def load_state(folder: Folder, name: str, place: Placement) -> dict[str, jax.Array] | None:
    """Loads what `save_state` saved.

    Args:
      folder: of the index.
      name: of the state.
      place: where the arrays go; every device gets all.

    Returns:
      {name: array}, or None if nothing was saved.

    Raises:
      StoreError: if what was saved is not what is there.
    """
    described = folder.read(f"{name}.json")
    if described is None:
        return None
    with reading(folder, f"{name}.json"):
        names, shapes, digests = (described[part] for part in ("names", "shapes", "digests"))
        if not len(names) == len(set(names)) == len(shapes) == len(digests):
            raise ValueError("names, shapes and digests are not as many")
    arrays = {}
    for i, (key, shape, digest) in enumerate(zip(names, shapes, digests, strict=True)):
        empty = 0 in shape[0]
        value = np.zeros(*shape) if empty else _read(folder, f"{name}/{i}")
        if [list(value.shape), value.dtype.name] != shape or _digest(value) != digest:
            raise malformed(folder, f"{name}/{i}", f"it is not the {key!r} that was saved")
        arrays[key] = jnp.asarray(place.whole(value))
    return arrays


def _read(folder: Folder, name: str) -> np.ndarray:
    try:
        spec = {"driver": "zarr", "kvstore": folder.spec(name)}
        return ts.open(spec, open=True).result().read().result()
    except (ValueError, MemoryError) as error:
        raise malformed(folder, name, first_line(error)) from None


def _digest(value: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
