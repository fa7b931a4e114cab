"""One writer at a time: a small file that says who writes, renewed while they live.

The file is taken, taken over, renewed and released by writes that happen only if it is still the
one that was read. Buckets offer those; for local files TensorStore holds a lock file beside it
while it compares and renames, which also holds between hosts where the file system locks between
hosts, as its documentation of the `file` driver asks for.
"""

import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from jaxattr.store.folder import Folder, StoreError

# A writer that has not renewed its lease for so many seconds is taken for dead, unless it can be
# looked up.
EXPIRES = 60.0
_RENEW = 10.0
_NAME = "lease.json"
_FIELDS = {
    "id": str,
    "host": str,
    "boot": str | None,
    "namespace": str | None,
    "pid": int,
    "started": str | None,
    "renewed": float | int,
}
# Leases that this process holds or is about to.
_HELD: set[str] = set()


class Lease:
    """The right to write to a folder, while it is entered as a context.

    Raises:
      StoreError: on entering, if a writer that lives holds it.
    """

    def __init__(self, folder: Folder, expires: float = EXPIRES) -> None:
        self._folder = folder
        self._expires = expires
        self._mine = {"id": uuid.uuid4().hex} | identity(os.getpid())
        self._generation: bytes | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Lease":
        _HELD.add(str(self._mine["id"]))
        try:
            self._take()
        except BaseException:
            _HELD.discard(str(self._mine["id"]))
            raise
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            if self._generation is not None:
                self._folder.exchange(_NAME, None, self._generation)
        except StoreError:
            pass  # it is nobody's from now on, and what the build met is what counts
        finally:
            _HELD.discard(str(self._mine["id"]))

    def check(self) -> None:
        """Raises if another writer has taken over, as it may from one that slept for too long.

        Raises:
          StoreError: if so, or if that cannot be found out.
        """
        held, _ = _read(self._folder)
        if held is None or held["id"] != self._mine["id"]:
            self._generation = None
            taker = "it is gone" if held is None else f"{_who(held)} has it now"
            raise StoreError(
                f"{self._folder.path}/{_NAME} is no longer this job's: {taker}. This job stops, so "
                "that there is one writer; what it finished is kept. Run it again when the other "
                "has ended."
            )

    def _take(self) -> None:
        watched, since = None, time.monotonic()
        while True:
            held, generation = _read(self._folder)
            if held is not None:
                state = _state(held)
                if state == "alive" or watched not in (None, generation):
                    raise StoreError(
                        f"{self._folder.path} is being written by {_who(held)}. Wait for it, stop "
                        "it, or use another path."
                    )
                watched = generation
                if state == "unknown" and time.monotonic() < since + self._expires:
                    time.sleep(min(1.0, self._expires / 10))
                    continue
            self._generation = self._folder.exchange(_NAME, self._stamped(), generation)
            if self._generation is not None:
                return

    def _stamped(self) -> dict[str, Any]:
        return self._mine | {"renewed": time.time()}

    def _keep(self) -> None:
        while not self._stop.wait(min(_RENEW, self._expires / 4)):
            try:
                self._renew()
            except StoreError:
                continue  # the build itself meets the same trouble, and says so

    def _renew(self) -> None:
        if self._generation is None:
            return
        renewed = self._folder.exchange(_NAME, self._stamped(), self._generation)
        if renewed is None:  # taken over; or written, while the answer to that was lost
            held, generation = _read(self._folder)
            mine = held is not None and held["id"] == self._mine["id"]
            renewed = generation if mine else None
        self._generation = renewed


def identity(pid: int) -> dict[str, Any]:
    """Says which process this is, so that another that gets its number later is told from it.

    Args:
      pid: of a process of this host.

    Returns:
      Its host, the host's boot and the namespace of process numbers, its number, and when it
      started, in ticks since the boot; None where a system does not say.
    """
    return {
        "host": socket.gethostname(),
        "boot": _known(lambda: pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()),
        "namespace": _known(lambda: os.readlink("/proc/self/ns/pid")),
        "pid": pid,
        "started": _known(
            lambda: pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        ),
    }


def _read(folder: Folder) -> tuple[dict[str, Any] | None, bytes]:
    """Who holds a folder, or None, and the generation of the file."""
    content, generation = folder.read_bytes(_NAME)
    if content is None:
        return None, generation
    try:
        held = json.loads(content)
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, dict) or not all(
        isinstance(held.get(name), kind) for name, kind in _FIELDS.items()
    ):
        raise StoreError(
            f"{folder.path}/{_NAME} is damaged, so that nobody can tell who writes there. If no "
            f"other job does, delete {_NAME} ({folder.path}/{_NAME}) and run the same again."
        )
    return held, generation


def _who(held: dict[str, Any]) -> str:
    if held["id"] in _HELD:
        return f"this very process ({held['pid']}), in another call"
    return f"another job: process {held['pid']} on {held['host']}"


def _state(held: dict[str, Any]) -> str:
    """Whether a holder is alive, dead, or unknown: it must be watched."""
    here = identity(held["pid"])
    if held["id"] in _HELD:
        return "alive"
    places = ("host", "boot", "namespace")
    if any(held[name] != here[name] for name in places):
        return "unknown"  # another host, or another set of process numbers on this one
    if held["pid"] == os.getpid() and held["started"] == here["started"]:
        return "dead"  # of this process, which has released it
    if not _runs(held["pid"]):
        return "dead"
    if held["started"] is None or here["started"] is None:
        return "unknown"
    return "alive" if held["started"] == here["started"] else "dead"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)
    # What has ended keeps its number until its parent asks, which in some containers none does.
    said = _known(lambda: pathlib.Path(f"/proc/{pid}/stat").read_text()) or ""
    return not said.rpartition(")")[2].lstrip().startswith("Z")


def _known(read: Callable[[], str]) -> str | None:
    """What a system says; None where it does not."""
    try:
        return read()
    except OSError:
        return None
