"""One writer at a time: a small file that says who writes, renewed while they live."""

import os
import socket
import threading
import time
import uuid
from types import TracebackType

from jaxattr.store.folder import Folder, StoreError

# A writer that has not renewed its lease for so many seconds is taken for dead.
EXPIRES = 60.0
_RENEW = 10.0
_NAME = "lease.json"


class Lease:
    """The right to write to a folder, while it is entered as a context.

    Raises:
      StoreError: on entering, if another process that lives holds it.
    """

    def __init__(self, folder: Folder, expires: float = EXPIRES) -> None:
        self._folder = folder
        self._expires = expires
        self._mine = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Lease":
        deadline = time.monotonic() + self._expires
        seen = None
        while not self._folder.create(_NAME, self._stamped()):
            held = self._folder.read(_NAME)
            if held is None:
                continue
            if self._is_dead(held) or (held == seen and time.monotonic() > deadline):
                self._folder.delete(_NAME)
                continue
            renewed = seen is not None and held != seen
            if renewed or self._lives_here(held):
                raise StoreError(
                    f"{self._folder.path} is being written by another job: process {held['pid']} "
                    f"on {held['host']}. Wait for it, stop it, or use another path."
                )
            seen = held
            time.sleep(min(1.0, self._expires / 10))
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        held = self._folder.read(_NAME)
        if held is not None and held["id"] == self._mine["id"]:
            self._folder.delete(_NAME)

    def _stamped(self) -> dict[str, object]:
        return self._mine | {"renewed": time.time()}

    def _renew(self) -> None:
        while not self._stop.wait(min(_RENEW, self._expires / 4)):
            try:
                self._folder.write(_NAME, self._stamped())
            except StoreError:
                return  # the build itself meets the same trouble, and says so

    def _is_dead(self, held: dict) -> bool:
        """Whether the holder ran on this host and is gone."""
        if held["host"] != self._mine["host"]:
            return False
        return held["pid"] == os.getpid() and held["id"] != self._mine["id"] or not _runs(held)

    def _lives_here(self, held: dict) -> bool:
        return held["host"] == self._mine["host"] and _runs(held)


def _runs(held: dict) -> bool:
    try:
        os.kill(held["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
