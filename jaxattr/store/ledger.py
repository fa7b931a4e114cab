"""Which blocks are done. A chunk's presence says nothing: it may hold another run's numbers."""

from collections.abc import Callable
from typing import Any

from jaxattr.store.folder import Folder, reading
from jaxattr.store.lease import Lease

_BASE = "ledger/finished.json"


class Ledger:
    """Counts of finished blocks per stage, kept by every process for its own part.

    Blocks are finished in order, so a number says all. A block counts when every process has
    written its part of it. A new run adds up what earlier ones left, whatever number of processes
    they had.

    Attributes:
      folder: of the index.
    """

    def __init__(
        self, folder: Folder, process: int, processes: int, lease: Lease | None = None
    ) -> None:
        self.folder = folder
        self._lease = lease
        self._own = f"ledger/process-{process}.json"
        self._first = process == 0
        self._processes = processes
        self._done: dict[str, int] = {}

    def open(self, barrier: Callable[[str], None], limit: int | None = None) -> None:
        """Reads what earlier runs finished, and makes it this run's beginning.

        Args:
          barrier: waits for all processes.
          limit: blocks beyond so many are to be made again.
        """
        self._done = finished(self.folder)
        if limit is not None:
            self._done = {stage: min(done, limit) for stage, done in self._done.items()}
        barrier("ledger read")
        if self._first:
            self.folder.write(_BASE, {"blocks": self._done})
            for name in self.folder.names("ledger/process-"):
                self.folder.delete(name)
        barrier("ledger opened")

    def done(self, stage: str) -> int:
        """Returns how many blocks of a stage were finished, here or before."""
        return self._done.get(stage, 0)

    def check(self) -> None:
        """Raises if this job may write no more; see `Lease`, which the first process holds."""
        if self._lease is not None:
            self._lease.check()

    def mark(self, stage: str, blocks: int) -> None:
        """Says that this process's part of so many blocks of a stage is written."""
        self.check()
        self._done[stage] = blocks
        self.folder.write(self._own, {"processes": self._processes, "blocks": self._done})


def finished(folder: Folder) -> dict[str, int]:
    """Returns {stage: blocks that every process has finished}.

    Args:
      folder: of the index.
    """
    base = folder.read(_BASE)
    done = {} if base is None else _blocks(folder, _BASE, base)
    names = folder.names("ledger/process-")
    read = [(name, folder.read(name)) for name in names]
    found = [(name, each) for name, each in read if each is not None]
    blocks = [_blocks(folder, name, each) for name, each in found]
    if found and all(each.get("processes") == len(found) for _, each in found):
        for stage in {stage for each in blocks for stage in each}:
            least = min(each.get(stage, 0) for each in blocks)
            done[stage] = max(done.get(stage, 0), least)
    return done


def _blocks(folder: Folder, name: str, contents: dict[str, Any]) -> dict[str, int]:
    with reading(folder, name):
        blocks = dict(contents["blocks"])
        if not all(type(done) is int and done >= 0 for done in blocks.values()):
            raise ValueError("a number of blocks is none")
    return blocks
