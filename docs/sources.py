"""Puts scripts and drawings into the site, where links to them work as in the repository."""

import pathlib
import re
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent
FOLDERS = ("scripts", "drawings")
LINK = re.compile(rf"\]\(\.\./\.\./({'|'.join(FOLDERS)})/")


def on_files(files: Files, config: Any) -> Files:
    """Adds each script and drawing, in a folder beside those of the pages."""
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.*")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **rest: Any) -> str:
    """Pages are one folder higher in the site than in the repository."""
    del rest
    return LINK.sub(r"](../\1/", markdown)
