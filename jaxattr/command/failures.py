"""What goes wrong, as lines on standard error, and what the command then exits with.

0   done
1   a wrong call, or refused
2   wrong usage of the command line
130 interrupted
"""

import contextlib
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from jaxattr.command import printing
from jaxattr.command.tasks import TaskError, place_in
from jaxattr.store.folder import StoreError

# What the library raises where it is called wrongly, and what files give: no fault of a program.
_EXPECTED = (TaskError, StoreError, ValueError, TypeError, OSError)
TRACEBACK, TASK = "jaxattr.traceback", "jaxattr.task"
"""Whether tracebacks are wanted, and the path of the task file, in the context of a command."""


class Commands(click.Group):
    """A group of commands whose errors and warnings are lines."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command; see `click.Group`."""
        try:
            with _warnings_as_lines():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            printing.message("interrupted: run the same again to go on, where work is kept on disk")
            ctx.exit(130)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            line = _as_line(error, ctx.meta.get(TASK))
            if line is None or ctx.meta.get(TRACEBACK):
                traceback.print_exc()
            printing.message(f"error: {line or 'a fault of jaxattr, or of a library below it'}")
            ctx.exit(1)


def _as_line(error: Exception, task: Path | None) -> str | None:
    """An error in words; None for one that only its traceback explains."""
    text = str(error) or type(error).__name__
    place = None if task is None else place_in(error, task)
    if isinstance(error, _EXPECTED):
        told = place is None or isinstance(error, TaskError)
        return text if told else f"{text} ({place})"
    return None if place is None else f"{place}: {type(error).__name__}: {text}"


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Shows the library's warnings, each once, as lines; those for programmers not at all."""
    shown: set[str] = set()

    def show(message: Warning | str, *rest: Any, **more: Any) -> None:
        text = str(message)
        if text not in shown:
            shown.add(text)
            printing.note(f"warning: {text}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield
        sys.stderr.flush()
