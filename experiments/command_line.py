"""The options that all studies have."""

import argparse
from pathlib import Path


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
