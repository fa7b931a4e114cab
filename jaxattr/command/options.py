"""What several commands share: their options, and reading what those name."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax

import jaxattr as ja
from jaxattr.command import failures, printing
from jaxattr.command.tasks import Task, load
from jaxattr.files import read_arrays
from jaxattr.index.saving import read_manifest
from jaxattr.inputs.outputs import runs
from jaxattr.inputs.parameters import as_checkpoints
from jaxattr.sharding import process
from jaxattr.sources import as_source
from jaxattr.store.folder import Folder, StoreError
from jaxattr.weights.report import WeightFit
from jaxattr.weights.saving import load_fit

Command = Callable[..., Any]


def shared(command: Command) -> Command:
    """Options that all commands have."""
    command = click.option(
        "--traceback", is_flag=True, expose_value=False, is_eager=True,
        callback=lambda ctx, _, value: ctx.meta.update({failures.TRACEBACK: value}),
        help="Show where in the program an error arose.",
    )(command)  # fmt: skip
    return click.option(
        "--json", "as_json", is_flag=True, help="Print the result as one JSON document."
    )(command)


def of_task(command: Command, *, built: bool = False) -> Command:
    """The task that a command is about, loaded, with options that all such commands have.

    Args:
      command: that takes it first, and the path of its index if that must be there.
      built: whether it must.
    """

    @click.argument("task", type=click.Path(path_type=Path))
    @shared
    @click.option(
        "--distributed", is_flag=True,
        help="One of several processes, such as the hosts of a pod: calls "
        "jax.distributed.initialize() before the task is loaded.",
    )  # fmt: skip
    @functools.wraps(command)
    def loaded(*, task: Path, distributed: bool, **others: Any) -> Any:
        with printing.alone(others["as_json"]):
            return command(_opened(task, distributed, others["path"] if built else None), **others)

    return at_path(loaded) if built else loaded


def at_path(command: Command) -> Command:
    """Where the index is."""
    return click.option(
        "--path", required=True, help="Of the index: a folder, or a URL such as gs://bucket/index."
    )(command)


of_built_task = functools.partial(of_task, built=True)
"""The same of a task whose index must be there, at `--path`."""


def weighted(command: Command) -> Command:
    """Whether learned weights are used."""
    return click.option(
        "--uniform", is_flag=True, help="Leave out the learned weights that are beside the index."
    )(command)


class Bytes(click.ParamType):
    """A number of bytes, such as 2000000000, 2e9, 2GB or 1.5GiB."""

    name = "bytes"
    _UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Reads it; see `click.ParamType`."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) *([KMG]i?)?B?", value)
        try:
            return int(float(found[1]) * self._UNITS[found[2] or ""])  # type: ignore[index]
        except (TypeError, ValueError):
            self.fail(f"{value!r} is no number of bytes, such as 2000000000, 2GB or 1.5GiB.")


def _opened(path: Path, distributed: bool, index: str | None) -> Task:
    """Loads a task, once it is known that the index that is needed is there."""
    if distributed:
        jax.distributed.initialize()
        if process()[0] > 0:
            printing.be_quiet()
    click.get_current_context().meta[failures.TASK] = path
    if index is not None and path.is_file() and read_manifest(Folder(index)) is None:
        raise StoreError(
            f"There is no index at {Folder(index).path}: build it first: "
            f"jaxattr build {path} --path {index}"
        )
    return load(path)


def opened_index(task: Task, path: str, *, train: Any = None) -> ja.Index:
    """Opens the index of a task.

    Args:
      task: the task.
      path: of the index.
      train: the training data, if they are to be shown.

    Raises:
      StoreError: as `ja.open_index`.
    """
    described, example = read_manifest(Folder(path)), None
    if described is not None and described.get("example") is None:  # its shapes are not on record
        example = example_of(task)
    method, checkpoints = task.get("method"), task.get("checkpoints")
    return ja.open_index(
        path, method, checkpoints, example=example, train=train, mesh=task.get("mesh")
    )


def example_of(task: Task) -> Any:
    """Returns the shapes of one training example of a task, read as `build` reads them.

    Args:
      task: the task.
    """
    params = as_checkpoints(task.get("checkpoints"))[0]
    accepts = functools.partial(runs, task.get("method").rule.output, params)
    return as_source(task.get("train"), "train", accepts).example


def beside(path: str, ending: str) -> Path:
    """Returns a local file beside an index; in the current folder if the index is in a bucket.

    Args:
      path: of the index.
      ending: of the file's name, after that of the index and a point.
    """
    folder = Folder(path)
    name = f"{folder.path.rpartition('/')[2]}.{ending}"
    return Path(name) if folder.remote else Path(folder.path).with_name(name)


def weights_path(path: str) -> str:
    """Returns where the learned weights of an index are, beside it."""
    return f"{Folder(path).path}.weights.json"


def learned_weights(index: ja.Index, path: str, uniform: bool) -> WeightFit | None:
    """Reads the weights that were learned on an index, and says whether there are any.

    Args:
      index: the index.
      path: of the index.
      uniform: whether they are left out.

    Raises:
      StoreError: if those that are there belong to another index.
    """
    if uniform:
        return None
    try:
        fit = load_fit(weights_path(path), index)
    except StoreError as error:
        raise StoreError(f"{error} Or leave them out with --uniform.") from None
    found = "uniform weights" if fit is None else f"the weights of {weights_path(path)}"
    if fit is not None and fit.gain is not None and not fit.gain.low > 0:
        found += ", whose gain is not shown to be above zero: --uniform leaves them out"
    printing.note(f"with {found}")
    return fit


def queries_of(task: Task, file: Path | None, name: str = "queries") -> Any:
    """Returns the queries: those of a file, or those of the task.

    Args:
      task: the task.
      file: .npz with arrays [q, ...], or None.
      name: of the task's queries.

    Raises:
      TaskError: if there are none.
      ValueError: if the file holds none.
    """
    if file is None:
        return task.need(name, "no --queries FILE.npz is given")
    try:
        arrays = read_arrays(file)
    except FileNotFoundError:
        raise ValueError(f"There is no file {file} of queries.") from None
    # A single array without a name is what examples are that are arrays themselves.
    return arrays["arr_0"] if set(arrays) == {"arr_0"} else arrays
