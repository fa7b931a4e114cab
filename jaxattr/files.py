"""Files of users: on local disk, written whole or not at all, and arrays read from them."""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator

import numpy as np


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Gives a path to write to, which takes its place when it is done.

    Args:
      path: of the file; its folder is made, and ~ is the user's home.

    Yields:
      A path beside it, with the same ending.

    Raises:
      ValueError: if the path is that of a folder, or a URL, or in a folder that may not be written.
    """
    path = writable_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def writable_file(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the path of a file on local disk that can be written.

    Args:
      path: of a user.

    Raises:
      ValueError: if it is that of a folder, or a URL, or in a folder that may not be written to.
    """
    path = local_file(path)
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(
            f"{path} cannot be written: {nearest} is no folder that may be written to. Give "
            "another path."
        )
    return path


def local_file(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the path of a file on local disk, which may not be there yet.

    Args:
      path: of a user.

    Raises:
      ValueError: if it is that of a folder, or a URL.
    """
    # A `Path` makes gs:/bucket of gs://bucket, which would be a new folder by that name.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fsdecode(path)):
        raise ValueError(
            f"{os.fsdecode(path)} is a URL, and this file is written to local disk alone: give a "
            "local path, and copy the file from there."
        )
    path = pathlib.Path(os.path.expanduser(os.fsdecode(path)))  # as a shell does
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, and the path of a file is needed: give the file's name too."
        )
    return path


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads all arrays of a file that `np.savez` wrote.

    Args:
      path: of the file.

    Returns:
      {name: array}.

    Raises:
      OSError: if there is none, or it cannot be read.
      ValueError: if it holds anything else, or is damaged.
    """
    wrong = f"{os.fsdecode(path)} holds no arrays as np.savez writes them"
    try:
        with open(path, "rb") as file:  # which np.load leaves open where it fails
            found = np.load(file)
            single = isinstance(found, np.ndarray)
            arrays = {} if single else {name: found[name] for name in found.files}
    except OSError:
        raise
    except Exception as error:  # damaged archives raise errors of many kinds
        raise ValueError(f"{wrong}.") from error
    if single:
        raise ValueError(f"{wrong}, but one as np.save does: np.savez(file, name=array).")
    if not all(isinstance(each, np.ndarray) for each in arrays.values()):
        raise ValueError(f"{wrong}: other files are in it.")
    return arrays
