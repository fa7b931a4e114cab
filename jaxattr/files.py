"""Files that are written whole or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def written_whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a path to write to, which takes its place when it is done.

    Args:
      path: of the file; its folder is made, and ~ is the user's home.

    Yields:
      A path beside it, with the same ending.

    Raises:
      ValueError: if the path is that of a folder.
    """
    path = at_home(path)
    refuse_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def at_home(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a path in which a ~ at its beginning is the user's home, as in a shell.

    Args:
      path: of a file.
    """
    return pathlib.Path(os.path.expanduser(path))


def refuse_folder(path: pathlib.Path) -> None:
    """Raises if a file cannot have this path because a folder has it.

    Args:
      path: of the file.

    Raises:
      ValueError: then.
    """
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, and the path of a file is needed: give its name too, such as "
            f"{path / 'report.html'}."
        )
