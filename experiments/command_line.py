"""The options that all studies have, and where they print."""

import argparse
from pathlib import Path

from rich.console import Console

WIDTH = 140
"""Of tables that go to a file, which has no width of its own."""


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Makes the parser of a study, which takes `--full` and `--folder`.

    Args:
      name: of the package under `experiments`, and of its folder under `runs`.
      description: of the study, its module's docstring.

    Returns:
      The parser, for more options.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m experiments.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--full", action="store_true", help="the larger study")
    made.add_argument("--folder", type=Path, default=Path(f"runs/{name}"), help="for all results")
    return made


def console() -> Console:
    """Returns a console as wide as the terminal, or as tables need where there is none."""
    found = Console()
    return found if found.is_terminal else Console(width=WIDTH)
