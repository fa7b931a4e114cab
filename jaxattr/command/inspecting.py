"""Commands about an index alone, for which no task is needed."""

import functools
from typing import Any

import click
import numpy as np

import jaxattr as ja
from jaxattr.command import options, printing
from jaxattr.files import written_whole
from jaxattr.index.summary import check, export_zarr, summarize


def _of_index(command: options.Command) -> options.Command:
    """The index that a command is about, as an argument or as other commands take it."""

    @click.argument("path", required=False)
    @click.option("--path", "named", metavar="PATH", help="The same, as other commands take it.")
    @functools.wraps(command)
    def found(*, path: str | None, named: str | None, **others: Any) -> Any:
        if (path is None) == (named is None):
            name = click.get_current_context().info_name
            raise click.UsageError(f"Say once where the index is: jaxattr {name} PATH.")
        return command(path=named if path is None else path, **others)

    return found


@click.command()
@_of_index
@options.shared
def info(path: str, as_json: bool) -> None:
    """Say what an index is, and whether it is finished."""
    found = summarize(path)
    printing.result(found, found, as_json)


@click.command()
@_of_index
@options.shared
def verify(path: str, as_json: bool) -> None:
    """Read every chunk, and compare it with what was written; exit with 1 if any is damaged."""
    found = check(path)
    read = f"{found.chunks} chunks and all that was fitted"
    text = f"{path} is whole: {read} are what was written"
    if found.damaged:
        text = "\n  ".join([f"{path} is damaged; of {read}:", *found.damaged])
    printing.result(found._asdict() | {"whole": not found.damaged}, text, as_json)
    if found.damaged:
        raise click.exceptions.Exit(1)


@click.command()
@_of_index
@click.option("--out", required=True, help="FILE.npz, or a new folder for a zarr array.")
@options.shared
def export(path: str, out: str, as_json: bool) -> None:
    """Write the features to FILE.npz, or as they are stored to a zarr array.

    The .npz has features [n, c, p] as float32 (float64 where they are), ids [n], the names of the
    groups, the group of each column [p], and the ids of examples that were left out.
    """
    found = summarize(path)
    shape = [found.examples, found.checkpoints, sum(found.groups.values())]
    if out.endswith(".npz"):
        index = ja.open_index(path)
        arrays: dict[str, Any] = {
            "features": index.features.astype(index.rows.layout.wide).reshape(shape),
            "ids": np.arange(index.size),
            "groups": np.array(list(found.groups)),
            "group_of_column": np.repeat(range(len(found.groups)), list(found.groups.values())),
            "left_out": index.non_finite,
        }
        with written_whole(out) as partial:
            np.savez(partial, **arrays)
    else:
        export_zarr(path, out)
    text = f"{out}: features {shape} of {len(found.groups)} groups"
    printing.result({"out": out, "shape": shape, "groups": found.groups}, text, as_json)
