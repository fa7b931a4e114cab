"""Results on standard output, as text or as one JSON document; all else on standard error."""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click
import numpy as np

_QUIET, _OUTPUT = "jaxattr.quiet", "jaxattr.output"


def be_quiet() -> None:
    """Prints nothing more of this command but errors: another process of the job does."""
    click.get_current_context().meta[_QUIET] = True


def message(text: str) -> None:
    """Says something that is no result.

    Args:
      text: in one or several lines.
    """
    click.echo(text, err=True)


def note(text: str) -> None:
    """Says what is going on, once for all processes.

    Args:
      text: in one or several lines.
    """
    if not _quiet():
        message(text)


def result(document: Any, text: Any, as_json: bool) -> None:
    """Prints the result of a command.

    Args:
      document: of dataclasses, named tuples, mappings, sequences, arrays, numbers and words.
      text: the same for people.
      as_json: which of them is wanted.
    """
    if not _quiet():
        text = json.dumps(plain(document), indent=1) if as_json else str(text)
        click.echo(text, file=click.get_current_context().meta.get(_OUTPUT))


@contextlib.contextmanager
def alone(as_json: bool) -> Iterator[None]:
    """Keeps standard output for the one JSON document: what a task prints goes to the other."""
    if not as_json:
        yield
        return
    click.get_current_context().meta[_OUTPUT] = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield


def plain(value: Any) -> Any:
    """Makes what JSON can hold; numbers that are not finite become null.

    Args:
      value: see `result`.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in dataclasses.fields(value))
        return {name: plain(getattr(value, name)) for name in names}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist())
    return str(value)  # paths, dates, and whatever else ids may be


def _quiet() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_QUIET))
