"""Models that are trained once, and then read from where Orbax put them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp


def load_or_train(path: Path, like: Any, train: Callable[[], Any]) -> Any:
    """Reads parameters that were trained before; else trains, and writes them whole or not at all.

    Args:
      path: of the checkpoint.
      like: parameters of the same structure and shapes, or their shapes.
      train: the work.

    Returns:
      The parameters.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        if path.exists():
            target = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
            return checkpointer.restore(path.absolute(), target)
        params = jax.device_get(train())
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpointer.save(path.absolute(), params)
    return jax.tree.map(jnp.asarray, params)
