"""A folder on local disk or in a bucket, in which small files are written whole or not at all."""

import contextlib
import json
import os
import re
import shutil
import stat
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import tensorstore as ts

from jaxattr.sharding import agree, process

_RESTORE = "Restore it, or delete the index and build it again."


class StoreError(Exception):
    """An index on disk is missing, damaged, foreign, in use, or cannot be written."""


class Folder:
    """Small JSON files and the places of arrays under one path.

    Attributes:
      path: what the user gave, made absolute, with ~ for the home; may be a URL such as gs://bucket/index.
      plain: the same place for libraries that take paths and URLs as they stand, undecoded.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            raise StoreError(f"A path must be a folder or a URL, got {path!r:.60}.")
        text = os.fsdecode(path)
        scheme = re.match(r"^([A-Za-z][A-Za-z0-9+.-]*)://", text)
        self.remote = scheme is not None and scheme[1].lower() != "file"
        if scheme is not None and scheme[1].lower() in ("http", "https"):
            raise StoreError(
                f"{text} is a web page, which is not written to: give a folder, or a URL such as "
                "gs://bucket/index."
            )
        if scheme is None:
            self.path = _local_path(text)
        elif self.remote:
            self.path = f"{scheme[1].lower()}{text[len(scheme[1]) :]}".rstrip("/")
        else:
            self.path = _local_path(_path_of_file_url(text))
        self.plain = urllib.parse.unquote(self.path) if self.remote else self.path
        # No URL for a local path: %, # and ? mean something in one.
        local = {"driver": "file", "path": f"{self.path.rstrip('/')}/"}
        try:
            self._files = ts.KvStore.open(f"{self.path}/" if self.remote else local).result()
        except ValueError as error:
            raise StoreError(
                f"{self.path} is no place for an index: {first_line(error)}. Give the path of a "
                "folder, or a URL such as gs://bucket/index."
            ) from None

    def spec(self, name: str) -> dict[str, Any]:
        """Returns the TensorStore description of a place under the folder."""
        place = self._files / f"{name}/" if name else self._files
        return place.spec().to_json()

    def read(self, name: str, remedy: str | None = None) -> dict[str, Any] | None:
        """Reads a JSON file of names and values.

        Args:
          name: of the file.
          remedy: what to do about a damaged one. Default: what an index that was given up takes.

        Returns:
          Its contents, or None if there is no such file.

        Raises:
          StoreError: if it cannot be read, is no JSON, or holds anything else.
        """
        content, _ = self.read_bytes(name)
        if content is None:
            return None
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            rebuild = "If the index was made by this program, delete it and build it again."
            raise malformed(self, name, f"it is no JSON ({error})", remedy or rebuild) from None
        if not isinstance(found, dict):
            why = f"it holds a {type(found).__name__}, not names and values"
            raise malformed(self, name, why, remedy or _RESTORE)
        return found

    def read_bytes(self, name: str) -> tuple[bytes | None, bytes]:
        """Reads a file.

        Args:
          name: of the file.

        Returns:
          Its contents, or None if there is no such file; and its generation, for `exchange`.

        Raises:
          StoreError: if it cannot be read.
        """
        try:
            found = self._files.read(name).result()
        except ValueError as error:
            raise StoreError(
                f"Cannot read {self.path}/{name}: {first_line(error)}. Check that it is a file and "
                "may be read, or give another path."
            ) from None
        content = found.value if found.state == "value" else None
        return content, found.stamp.generation

    def read_from(self, name: str, start: int) -> Any:
        """Begins to read the end of a file.

        Args:
          name: of the file.
          start: the first byte to read.

        Returns:
          A TensorStore future of the read.
        """
        return self._files.read(name, byte_range=slice(start, None))

    def write(self, name: str, contents: Any) -> None:
        """Writes a JSON file, whole or not at all.

        Args:
          name: of the file.
          contents: anything that JSON can hold.

        Raises:
          StoreError: if it cannot be written.
        """
        self._put(name, (json.dumps(contents, indent=1) + "\n").encode())

    def exchange(self, name: str, contents: Any | None, generation: bytes) -> bytes | None:
        """Writes or deletes a JSON file if it is still the one that was read, as one step.

        Args:
          name: of the file.
          contents: anything that JSON can hold; None to delete.
          generation: what `read_bytes` gave, also where there was no file.

        Returns:
          The new generation, or None if the file is another by now, and stays.

        Raises:
          StoreError: if it cannot be written.
        """
        value = None if contents is None else json.dumps(contents).encode()
        return self._put(name, value, if_equal=generation).generation or None

    def delete(self, name: str) -> None:
        """Deletes a file, if it is there."""
        self._put(name, None)

    def _put(self, name: str, value: bytes | None, **options: Any) -> Any:
        with writing(f"{self.path}/{name}"):
            return self._files.write(name, value, **options).result()

    def delete_under(self, prefix: str) -> None:
        """Deletes all files whose names begin so; on local disk also what folders that leaves."""
        with writing(f"{self.path}/{prefix}"):
            self._files.delete_range(ts.KvStore.KeyRange(prefix, prefix + "\U0010ffff")).result()
        if not self.remote and prefix.endswith("/"):
            shutil.rmtree(os.path.join(self.path, prefix), ignore_errors=True)

    def names(self, prefix: str = "") -> list[str]:
        """Returns the names of all files that begin so."""
        try:
            found = self._files.list(
                ts.KvStore.KeyRange(prefix, prefix + "\U0010ffff") if prefix else None
            ).result()
        except ValueError as error:
            raise StoreError(
                f"Cannot list {self.path}: {first_line(error)}. Check that it is a folder and may "
                "be read."
            ) from None
        return sorted(name.decode() for name in found)

    def free_bytes(self) -> int | None:
        """Returns the free space, or None where that is not known."""
        if self.remote:
            return None
        place = self.path
        while not os.path.exists(place):
            place = os.path.dirname(place)
        return shutil.disk_usage(place).free


def _local_path(text: str) -> str:
    """The absolute path of a folder that is there or can be made; raises if none can be."""
    path = os.path.join(os.getcwd(), os.path.expanduser(text))
    why = None
    if not text:
        why = "it is empty"
    elif "\0" in path or "\\" in path:
        # TensorStore takes a backslash for a slash, and would put the arrays in another folder.
        why = "it has a zero byte or a backslash in it"
    elif any("\ud800" <= each <= "\udfff" for each in path):  # how other bytes are decoded
        why = "it is not UTF-8"
    else:
        path = os.path.normpath(path)
        try:
            if not stat.S_ISDIR(os.stat(path).st_mode):
                why = "it is a file"
        except FileNotFoundError:
            pass
        except OSError as error:
            why = error.strerror
    if why is not None:
        raise StoreError(f"{text!r} is no place for an index: {why}. Give the path of a folder.")
    return path


def _path_of_file_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise StoreError(
            f"{url} names no local folder: a file:// URL has three slashes and an absolute path, "
            "with %3F for ? and %23 for #. Give the path itself."
        )
    return urllib.parse.unquote(parts.path)


def on_first_process(function: Callable[[], Any]) -> Any:
    """Runs a function on the first process; what fails there fails on all.

    Args:
      function: without arguments; may raise `StoreError`.

    Returns:
      Its result, on the first process; None on others.
    """
    problem = result = None
    if process()[0] == 0:
        try:
            result = function()
        except StoreError as error:
            problem = str(error)
    problem = agree(problem)
    if problem is not None:
        raise StoreError(problem)
    return result


@contextlib.contextmanager
def reading(folder: Folder, name: str, remedy: str = _RESTORE) -> Iterator[None]:
    """Turns what goes wrong where the contents of a file are taken apart into an error about it.

    Args:
      folder: of the file.
      name: of the file.
      remedy: what to do about a damaged one.

    Raises:
      StoreError: if names are missing, or values are of another type, or none that there can be.
    """
    try:
        yield
    except KeyError as error:
        raise malformed(folder, name, f"it has no {error}", remedy) from None
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise malformed(folder, name, first_line(error), remedy) from None


def malformed(folder: Folder, name: str, why: str, remedy: str = _RESTORE) -> StoreError:
    """Returns the error to raise where a file holds what this program does not write."""
    return StoreError(f"{folder.path}/{name} is damaged: {why.removesuffix('.')}. {remedy}")


def first_line(error: Exception) -> str:
    """What TensorStore says, without the long description of the array after it."""
    text = str(error).strip() or type(error).__name__
    return re.sub(r"(?s) \[(source locations|tensorstore_spec|os_error_code)=.*", "", text)[:400]


@contextlib.contextmanager
def writing(where: str, kinds: type[Exception] = ValueError) -> Iterator[None]:
    """Turns what goes wrong in a write into an error about it.

    Args:
      where: it goes.
      kinds: of errors that a write that fails raises.

    Raises:
      StoreError: if one is raised.
    """
    try:
        yield
    except kinds as error:
        raise StoreError(
            f"Cannot write {where}: {first_line(error)}. Check that the place exists, may be "
            "written to and has space left; then run the same again: finished blocks are kept."
        ) from None
