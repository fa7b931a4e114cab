"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which takes its place when it is done.

    Args:
      path: of the file; its folder is made.

    Yields:
      A path beside it, with the same ending.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")
    yield partial
    partial.replace(path)
