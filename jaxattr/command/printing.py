"""Results on standard output, as text or as one JSON document; all else on standard error."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

_QUIET = "jaxattr.quiet"


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
        click.echo(json.dumps(plain(document), indent=1) if as_json else str(text))


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
    if isinstance(value, Path | bytes):
        return str(value)
    return plain(np.asarray(value).tolist())


def _quiet() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_QUIET))
