"""Documents: from Python's own documentation, text files, WikiText, or JSON lines."""

import ast
import hashlib
import json
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
ARTICLE = re.compile(r"^ = [^=].*[^=] = $", re.MULTILINE)


class Tokenizer(Protocol):
    """What turns text into tokens and back."""

    vocabulary: int

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text."""
        ...

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Returns the text of each token."""
        ...


class Bytes:
    """Every byte is a token; 0 stands before and after each document."""

    vocabulary = 256

    def encode(self, text: str) -> list[int]:
        """Returns the bytes of a text, between two zeros."""
        return [0, *text.encode("utf-8", "replace").replace(b"\0", b" "), 0]

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Returns a character per byte; those of longer characters are shown as Latin-1."""
        return [bytes([i]).decode("latin-1") if i else "" for i in ids]


def documentation() -> list[str]:
    """The documentation strings of Python's standard library, each once.

    Returns:
      Texts, in the order of the modules' names; which they are depends on the version of Python.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if SKIPPED & set(path.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a few modules are data for other encodings
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found[ast.get_docstring(node) or ""] = None
    return [text for text in found if text.strip()]


def read(path: Path) -> list[str]:
    """Reads documents from a file, or from all files of a folder.

    Args:
      path: JSON lines with a field `text`, a document each; a WikiText file, whose articles begin
        with ` = Title = `; or any text, whose paragraphs are joined up to some 500 characters.

    Returns:
      Texts, none empty.

    Raises:
      ValueError: if there is no text, or a line of JSON has no field `text`.
    """
    if not path.exists():
        raise ValueError(f"There is no file or folder {path}.")
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    texts = [text for file in files for text in _of_file(file)]
    if not texts:
        raise ValueError(f"{path} holds no text.")
    return texts


def deduplicated(texts: Sequence[str], shortest: int, longest: int) -> list[str]:
    """Cuts texts to a length, and keeps each that is long enough once, in a fixed random order.

    Args:
      texts: documents.
      shortest: characters; shorter ones are left out.
      longest: characters; longer ones are cut.

    Returns:
      Texts, ordered by their hashes.
    """
    cut = {text.strip()[:longest] for text in texts}
    kept = (text for text in cut if len(text) >= shortest)
    return sorted(kept, key=lambda text: hashlib.sha256(text.encode("utf-8", "replace")).digest())


def pieces(texts: Iterable[str], longest: int) -> list[str]:
    """Cuts texts into pieces at spaces, so that long articles are not lost beyond a row.

    Args:
      texts: documents.
      longest: characters per piece; a word that is longer is a piece by itself.

    Returns:
      Texts.
    """
    return [
        piece
        for text in texts
        for piece in textwrap.wrap(
            text, longest, replace_whitespace=False, drop_whitespace=False, break_long_words=False
        )
    ]


def _of_file(path: Path) -> list[str]:
    content = path.read_text("utf-8")
    if path.suffix in (".jsonl", ".json"):
        return _json_lines(path, content)
    if ARTICLE.search(content):
        starts = [match.start() for match in ARTICLE.finditer(content)]
        pairs = zip([0, *starts], [*starts, len(content)], strict=True)
        articles = [content[a:b].strip() for a, b in pairs]
        return [article for article in articles if article]
    joined: list[str] = []
    for paragraph in filter(None, map(str.strip, re.split(r"\n\s*\n", content))):
        if joined and len(joined[-1]) + len(paragraph) < 500:
            joined[-1] += "\n\n" + paragraph
        else:
            joined.append(paragraph)
    return joined


def _json_lines(path: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: needed {{"text": "..."}}, got {line[:60]!r}.'
            ) from error
        if text.strip():
            texts.append(text)
    return texts
