"""What the files of a finished index must be, so that none is taken for another.

A chunk of an array ends in a checksum of its contents, which says that it is whole, and nothing of
where it belongs. The seals are these checksums by place, and digests of the small files, kept in
one file that carries a digest of its own.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxattr.store.folder import Folder, malformed

SEALS = "seals.json"
_TRAILER = 4


class Seals(NamedTuple):
    """What the files of an index must be.

    Attributes:
      arrays: {array: {chunk: its checksum}}.
      digest: of all that is sealed; whoever keeps it elsewhere knows the index again.
    """

    arrays: Mapping[str, Mapping[str, str]]
    digest: str


def save_seals(folder: Folder, chunks: Mapping[str, tuple[int, Iterable[str]]]) -> Seals:
    """Seals an index whose files are final, but for the one that says so.

    Args:
      folder: of the index.
      chunks: {array: (bytes of a chunk, the chunks)}; see `DiskRows.chunks`.

    Returns:
      The seals.

    Raises:
      StoreError: if a chunk is not there or is cut off, or they cannot be written.
    """
    waiting = {
        name: {key: chunk_seal(folder, name, key, size) for key in keys}
        for name, (size, keys) in chunks.items()
    }
    arrays = {
        name: {key: seal_of(folder, f"{name}/{key}", future) for key, future in futures.items()}
        for name, futures in waiting.items()
    }
    contents = {"arrays": arrays, "files": _digests(folder, list(arrays))}
    digest = _digest_of(contents)
    folder.write(SEALS, contents | {"digest": digest})
    return Seals(arrays, digest)


def load_seals(folder: Folder) -> Seals | None:
    """Loads the seals of an index, and compares all of its files but chunks with them.

    Args:
      folder: of the index.

    Returns:
      The seals; None if the index has none.

    Raises:
      StoreError: if a file is not what it was.
    """
    contents = folder.read(SEALS)
    if contents is None:
        return None
    digest = contents.pop("digest", None)
    if digest != _digest_of(contents):
        raise malformed(folder, SEALS, "it is not what was written")
    arrays, files = contents["arrays"], contents["files"]
    found = _digests(folder, list(arrays))
    for name in sorted({*files, *found}):
        if files.get(name) != found.get(name):
            raise malformed(folder, name, _change(files, found, name))
    return Seals(arrays, digest)


def chunk_seal(folder: Folder, array: str, key: str, size: int) -> Any:
    """Begins to read the checksum of a chunk.

    Args:
      folder: of the index.
      array: its name.
      key: of the chunk.
      size: bytes of the chunk.

    Returns:
      A future, for `seal_of`.
    """
    return folder.read_from(f"{array}/{key}", size - _TRAILER)


def seal_of(folder: Folder, name: str, future: Any) -> str:
    """Waits for what `chunk_seal` began.

    Args:
      folder: of the index.
      name: of the chunk, array included.
      future: as it was given.

    Raises:
      StoreError: if the chunk is not there, or is not as long as it must be.
    """
    try:
        trailer = future.result().value
    except ValueError:
        trailer = b""
    if len(trailer) != _TRAILER:
        raise malformed(folder, name, "it is gone, or not as long as it must be")
    return trailer.hex()


def _digests(folder: Folder, arrays: list[str]) -> dict[str, str]:
    names = ["manifest.json", *(f"{name}/zarr.json" for name in arrays)]
    for prefix in ("fitted-", "operator-"):
        found = folder.names(prefix)
        names += [name for name in found if name.endswith(".json") and "/" not in name]
    contents = {name: folder.read_bytes(name)[0] for name in names}
    return {
        name: hashlib.sha256(content).hexdigest()
        for name, content in contents.items()
        if content is not None
    }


def _digest_of(contents: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _change(files: Mapping[str, str], found: Mapping[str, str], name: str) -> str:
    if name not in found:
        return "it is gone"
    return "it is not what was written" if name in files else "it does not belong to the index"
