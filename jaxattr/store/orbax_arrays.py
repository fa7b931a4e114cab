"""Arrays by their names, written by Orbax; a module of its own since Orbax is slow to import."""

import dataclasses
from typing import Any

import orbax.checkpoint as ocp


class _ArrayPerName(ocp.PyTreeCheckpointHandler):
    """Has no parts of processes to put together.

    Orbax looks for them by a pattern in which brackets and stars of the path have a meaning.
    """

    def finalize(self, directory: Any) -> None:
        """Does nothing."""


@ocp.args.register_with_handler(_ArrayPerName, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Arrays(ocp.args.PyTreeSave):
    """What the handler above takes; Orbax finds it by this."""


def save_arrays(path: str, arrays: dict[str, Any]) -> None:
    """Writes a zarr array per name; all processes call it.

    Args:
      path: of a folder, which is replaced.
      arrays: {name: array}, at least one.
    """
    with ocp.Checkpointer(_ArrayPerName(use_ocdbt=False, use_zarr3=False)) as checkpointer:
        checkpointer.save(path, args=_Arrays(arrays), force=True)
