"""Commands that make an index, or say what making it will be like."""

import time
from typing import Any

import click

import jaxattr as ja
from jaxattr.command import options, printing
from jaxattr.command.tasks import Task
from jaxattr.index.saving import read_closed
from jaxattr.index.summary import summarize
from jaxattr.inputs.parameters import as_checkpoints
from jaxattr.store.folder import Folder

# What of a task goes to `build_index` and `plan` as it is, where it is named.
_BUILDING = ("key", "mesh", "batch_size", "dtype")

_memory = click.option(
    "--memory", type=options.Bytes(), metavar="BYTES",
    help="Per device, such as 8GiB: finds the largest microbatch that fits. Default: a microbatch "
    "that has room in a quarter of it.",
)  # fmt: skip


@click.command()
@options.of_task
def describe(task: Task, as_json: bool) -> None:
    """Say which group every parameter is in, and what becomes of it."""
    params, example = as_checkpoints(task.get("checkpoints"))[0], options.example_of(task)
    found = ja.describe(task.get("method"), params, example, groups=task.groups)
    printing.result(found, found, as_json)


@click.command()
@options.of_task
@_memory
def plan(task: Task, as_json: bool, memory: int | None) -> None:
    """Say what building will take: memory, disk, arithmetic. Computes nothing."""
    found = ja.plan(*_arguments(task), **_named(task), memory=memory, on_disk=True)
    document = printing.plain(found) | {"device_bytes": found.device_bytes}
    printing.result(document, found, as_json)


@click.command()
@options.of_task
@options.at_path
@_memory
@click.option("--extend", is_flag=True, help="Add the examples that `train` has grown by.")
def build(task: Task, as_json: bool, path: str, memory: int | None, extend: bool) -> None:
    """Build the index. Run the same again to go on where it was killed."""
    began = time.monotonic()
    before = read_closed(Folder(path))
    ja.build_index(*_arguments(task), **_named(task), memory=memory, path=path, extend=extend)
    found, took = summarize(path), f"{time.monotonic() - began:.1f} s"
    same = before is not None and before.examples == found.examples
    said = f"it was there already, and finished: nothing was built (looked at in {took})"
    printing.note(said if same else f"built in {took}")
    printing.result(found, found, as_json)


def _arguments(task: Task) -> tuple[Any, Any, Any]:
    return task.get("method"), task.get("checkpoints"), task.get("train")


def _named(task: Task) -> dict[str, Any]:
    return {"groups": task.groups} | task.options(*_BUILDING)
