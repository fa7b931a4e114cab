"""The command `jaxattr`."""

import click

import jaxattr as ja
from jaxattr.command import attributing, indexing, inspecting, starting
from jaxattr.command.failures import Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ja.__version__, prog_name="jaxattr")
def main() -> None:
    """Which training examples made my model do this?

    A TASK is a Python file that names method, checkpoints and train, and optionally queries,
    learning_queries, groups, render, labels, predictions, decode, train_fn, output, mesh, key,
    batch_size, dtype and ids. `jaxattr new demo` writes one that runs.

    Exits with 0 if all went well, 1 if something was refused, 2 if the command line is wrong, 130
    if it was interrupted.
    """


for module in (starting, indexing, attributing, inspecting):
    for command in vars(module).values():
        if isinstance(command, click.Command):
            main.add_command(command)
