"""The command that makes a first task file."""

import importlib.resources
import shlex
from pathlib import Path

import click

from jaxattr.command import options, printing
from jaxattr.command.tasks import TaskError


@click.command()
@click.argument("name", type=click.Path(path_type=Path))
@options.shared
def new(name: Path, as_json: bool) -> None:
    """Write a task file NAME.py that runs: real digits, a small network, all commands."""
    if not name.name:
        raise TaskError(f"{str(name)!r} names no file: give a name, such as jaxattr new mine.")
    path = name if name.suffix == ".py" else name.with_name(f"{name.name}.py")
    template = importlib.resources.files("jaxattr.command").joinpath("template.txt").read_text()
    text = template.replace("NAME", path.stem)
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise TaskError(f"{path} is there already, and stays: give another name.") from None
    except FileNotFoundError:
        raise TaskError(
            f"{path} needs a folder {path.parent}: make it, or give another name."
        ) from None
    except OSError as error:
        raise TaskError(
            f"{path} cannot be written: {error.strerror}. Give the name of a new file, in a folder "
            "that may be written to."
        ) from None
    task, index = shlex.quote(str(path)), shlex.quote(f"runs/{path.stem}")
    then = f"{path} is written. Next:\n  jaxattr build {task} --path {index}"
    printing.result({"task": path}, then, as_json)
