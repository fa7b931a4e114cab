"""A task file: Python that names a method, checkpoints, training data, and what else there is."""

import ast
import difflib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxattr import groups as groups_lib
from jaxattr.methods.method import Method
from jaxattr.typing import RandomAccess

REQUIRED = ("method", "checkpoints", "train")
OPTIONAL = (
    "queries", "learning_queries", "groups", "render", "labels", "predictions", "decode",
    "train_fn", "output", "mesh", "key", "batch_size", "dtype", "ids",
)  # fmt: skip

# These may be functions of no arguments that make them, called when they are first wanted.
_MADE = (
    "method", "checkpoints", "train", "queries", "learning_queries", "predictions", "mesh", "key",
    "ids",
)  # fmt: skip

# What is named within these is not named at the top.
_SCOPES = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda,
    ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
)  # fmt: skip

# What is imported under one name and installed under another.
_PACKAGES = {"sklearn": "scikit-learn"}


class TaskError(Exception):
    """A task file cannot be used; the message says where and why."""


class Task:
    """What a task file names.

    Attributes:
      path: of the file.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self._values = {name: values[name] for name in (*REQUIRED, *OPTIONAL) if name in values}
        self._to_make = {name for name in _MADE if _is_function(self._values.get(name))}
        for name in self._to_make:
            needed = _arguments_of(self._values[name])
            if needed:
                raise TaskError(
                    f"{path}: {name} is a function that needs {', '.join(needed)}. It must be a "
                    "value, or a function of no arguments that makes one."
                )

    def get(self, name: str) -> Any:
        """Returns what the file has under a name; None if it has nothing.

        Args:
          name: one of `REQUIRED` or `OPTIONAL`.

        Raises:
          TaskError: if it cannot be what the name stands for.
        """
        if name in self._to_make:
            self._values[name] = self._values[name]()
            self._to_make.discard(name)
        found = self._values.get(name)
        if name == "method" and not isinstance(found, Method):
            raise TaskError(
                f"{self.path}: method must be one of jaxattr's, such as ja.tracin(loss); got "
                f"{found!r:.80}."
            )
        return found

    def need(self, name: str, why: str) -> Any:
        """Returns what the file has under a name.

        Args:
          name: one of `REQUIRED` or `OPTIONAL`.
          why: it is needed, for the message.

        Raises:
          TaskError: if it has nothing.
        """
        if name not in self._values:
            raise TaskError(f"{self.path} does not name {name}, and {why}.")
        return self.get(name)

    def options(self, *names: str) -> dict[str, Any]:
        """Returns those of some options that the file names, as keyword arguments.

        Args:
          *names: of options.
        """
        return {name: self.get(name) for name in names if name in self._values}

    @property
    def groups(self) -> Any:
        """The parameter groups: those of the file, or one per layer."""
        found = self.get("groups")
        return groups_lib.by_layer if found is None else found


def load(path: str | os.PathLike[str]) -> Task:
    """Runs a task file.

    Args:
      path: of the file. Modules beside it can be imported, as from any script.

    Returns:
      What it names.

    Raises:
      TaskError: if there is no such file, its name does not end with .py, it is no Python, it lacks
        a name, or has one that looks like a known one misspelled.
    """
    path = Path(path)
    if path.suffix != ".py" and path.is_file():
        raise TaskError(f"{path} is no task file: the name of a task file ends with .py.")
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise TaskError(
            f"There is no task file {path}: `jaxattr new {path.with_suffix('')}` makes one to start"
            " from."
        ) from None
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}.") from None
    except SyntaxError as error:
        raise TaskError(f"{path}:{error.lineno}: it is no Python: {error.msg}.") from None
    except ValueError as error:
        raise TaskError(f"{path} is no Python: {error}.") from None
    _refuse_misspelled(path, tree)
    return Task(path, _run(path))


def _run(path: Path) -> dict[str, Any]:
    name = f"jaxattr_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None  # as for any name that ends with .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        package = _PACKAGES.get(error.name or "")
        how = f"pip install {package}" if package else "install it, or put it beside the task file"
        raise TaskError(f"{place_in(error, path) or path}: {error}: {how}.") from error
    return vars(module)


def place_in(error: BaseException, path: Path) -> str | None:
    """Returns where in a task an error arose, such as task.py:12; None if it did not.

    Args:
      error: any; what it was raised for counts too.
      path: of the task file.

    Returns:
      The last line of the file that the error came through; if there is none, that of a module
      beside it, from where its functions may be imported.
    """
    file = path.resolve()
    places = [(Path(name), line) for name, line in _lines(error)]
    own = [line for name, line in places if name == file]
    if own:
        return f"{path}:{own[-1]}"
    beside = [
        f"{path.parent / name.relative_to(file.parent)}:{line}"
        for name, line in places
        if name.is_relative_to(file.parent) and not _is_library(name)
    ]
    return beside[-1] if beside else None


def _lines(error: BaseException) -> Iterator[tuple[str, int]]:
    """The lines that an error came through, then those of what it was raised for."""
    for frame, line in traceback.walk_tb(error.__traceback__):
        yield frame.f_code.co_filename, line
    reasons = {id(each): each for each in (error.__context__, error.__cause__) if each is not None}
    for each in reasons.values():
        yield from _lines(each)


def _is_library(file: Path) -> bool:
    """Of this one and of those that are installed, which may lie below a task."""
    return file.is_relative_to(Path(__file__).parents[1]) or "site-packages" in file.parts


def _refuse_misspelled(path: Path, tree: ast.Module) -> None:
    """Raises if a name is missing, or one is there that nothing uses and that looks like a known.

    Helpers of the file have whatever names they like: something uses those.
    """
    lines = _defined(tree)
    used = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    known = [name for name in (*REQUIRED, *OPTIONAL) if name not in lines]
    for name, line in lines.items():
        private = name.startswith("_") or name in REQUIRED or name in OPTIONAL
        alike = difflib.get_close_matches(name, known, 1, 0.75)
        if alike and not private and name not in used:
            raise TaskError(
                f"{path}:{line}: {name} is no name that a task has, and nothing in the file uses "
                f"it: did you mean {alike[0]}? Rename it, or put an underscore before it."
            )
    missing = [name for name in REQUIRED if name not in lines]
    if missing and "*" not in lines:  # which may bring any
        guesses = [
            f"{path}:{lines[alike]} has {alike}"
            for name in missing
            for alike in difflib.get_close_matches(name, list(lines), 1, 0.75)
        ]
        raise TaskError(
            f"{path} does not name {' and '.join(missing)}. A task file names method, checkpoints "
            f"and train{'; ' if guesses else '.'}{', '.join(guesses)}"
        )


def _defined(tree: ast.Module) -> dict[str, int]:
    """{name: line} of what a module defines at its top, wherever within `if`, `with` and `try`."""
    found: dict[str, int] = {}

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.setdefault(node.name, node.lineno)
        if isinstance(node, _SCOPES):
            return
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.setdefault(node.id, node.lineno)
        if isinstance(node, ast.alias):
            found.setdefault((node.asname or node.name).split(".")[0], node.lineno)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def _arguments_of(function: Callable[..., Any]) -> list[str]:
    """Those that it cannot be called without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # it does not say
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        each.name
        for each in parameters
        if each.default is inspect.Parameter.empty and each.kind not in variadic
    ]


def _is_function(value: Any) -> bool:
    arrays = any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(value))  # of a model
    return callable(value) and not arrays and not isinstance(value, RandomAccess)
