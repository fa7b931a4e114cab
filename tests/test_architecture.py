"""Imports point one way: each room knows those before it and none after."""

import ast
import pathlib
import pkgutil
import re

import jaxattr
from tests.pages import PAGES, blocks

ROOT = pathlib.Path(jaxattr.__file__).parent
ROOMS = (
    ("typing", "scales", "counts", "files", "markup", "threads"),
    ("keys", "leaves"),
    ("groups",),
    ("inputs",),
    ("identity",),
    ("sharding", "batches"),
    ("sources",),
    ("linear_maps",),
    ("features",),
    ("kernels",),
    ("fitting",),
    ("methods",),
    ("diffusion",),
    ("store",),
    ("index",),
    ("scores",),
    ("weights",),
    ("unrolling",),
    ("evaluation",),
    ("language",),
    ("reports",),
    ("command",),
    ("__main__",),
)
PAGE = PAGES / "how" / "architecture.md"
PLACE = {room: number for number, rooms in enumerate(ROOMS) for room in rooms}


def imported(path):
    """Rooms that a file imports from, at its top or inside its functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jaxattr":
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("jaxattr."), f"{path}: from jaxattr.x import y"


def modules():
    return sorted(ROOT.rglob("*.py"))


def test_imports_point_one_way():
    wrong = []
    for path in modules():
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for other in imported(path):
            if other != room and PLACE[other] >= PLACE[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong


def test_modules_are_small():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in modules()
        if path.name != "__init__.py"
    }
    assert max(lengths.values()) <= 500, max(lengths, key=lengths.get)
    assert sorted(lengths.values())[len(lengths) // 2] < 250


def test_the_page_on_the_code_lists_the_rooms():
    table = re.search(r"\| rooms \|.*\n.*\n((?:\|.*\n)+)", PAGE.read_text())
    listed = [line.split("|")[1] for line in table[1].splitlines()]
    assert [tuple(re.findall(r"`(\w+)`", rooms)) for rooms in listed] == list(ROOMS)


def test_the_names_and_tests_that_the_page_gives_are_there():
    given = re.findall(r"`([\w./]+)`", PAGE.read_text())
    names = [name for name in given if "." in name and name.split(".")[0] in PLACE]
    files = [name for name in given if name.startswith("tests/")]
    assert len(names) > 30 and files
    for name in names:
        pkgutil.resolve_name(f"jaxattr.{name}")  # raises if it is not
    assert all((ROOT.parent / name).is_file() for name in files)


def test_each_example_of_the_page_is_short():
    assert max(len(block.strip().splitlines()) for block in blocks(PAGE)) < 60
