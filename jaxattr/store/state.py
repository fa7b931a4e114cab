"""What was fitted to a checkpoint, and what a kernel applies to queries: saved through Orbax."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxattr.sharding import Placement
from jaxattr.store.folder import Folder


def save_state(folder: Folder, name: str, arrays: dict[str, Any], place: Placement) -> None:
    """Saves named arrays; all processes call it.

    Args:
      folder: of the index.
      name: of the state.
      arrays: {name: array}.
      place: where they are.
    """
    names = sorted(arrays)
    values = {f"{i}": place.whole(jnp.asarray(arrays[key])) for i, key in enumerate(names)}
    shapes = [[list(value.shape), value.dtype.name] for value in values.values()]
    if jax.process_index() == 0:
        folder.write(f"{name}.json", {"names": names, "shapes": shapes})
    # A folder per array, so that damage has a name; and the other way, a database, searches for
    # its parts by a pattern, in which brackets and stars of the path would have a meaning.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(f"{folder.plain}/{name}", values or {"nothing": np.zeros(1)}, force=True)


def load_state(folder: Folder, name: str, place: Placement) -> dict[str, jax.Array] | None:
    """Loads what `save_state` saved.

    Args:
      folder: of the index.
      name: of the state.
      place: where the arrays go; every device gets all.

    Returns:
      {name: array}, or None if nothing was saved.
    """
    described = folder.read(f"{name}.json")
    if described is None or not folder.names(f"{name}/_CHECKPOINT_METADATA"):
        return None
    if not described["names"]:
        return {}
    sharding = place.sharding()
    like = {
        f"{i}": jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for i, (shape, dtype) in enumerate(described["shapes"])
    }
    with ocp.StandardCheckpointer() as checkpointer:
        values = checkpointer.restore(f"{folder.plain}/{name}", like)
    return {key: jnp.asarray(values[f"{i}"]) for i, key in enumerate(described["names"])}
