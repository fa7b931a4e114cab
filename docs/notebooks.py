"""Runs the notebooks while the site is built, and makes pages of them and of what they say."""

import pathlib
import tempfile
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor, ExecutePreprocessor

NOTEBOOKS = pathlib.Path(__file__).parent / "notebooks"


def on_files(files: Files, config: Any) -> Files:
    """Adds a page, its pictures and the notebook itself for each notebook."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for name, content in executed(path).items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def executed(path: pathlib.Path) -> dict[str, str | bytes]:
    """Runs a notebook in an empty folder.

    Args:
      path: of the notebook.

    Returns:
      {name of a file: its content}. A cell that raises ends the build.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        ExecutePreprocessor(timeout=300, kernel_name="python3").preprocess(
            notebook, {"metadata": {"path": folder}}
        )
    CoalesceStreamsPreprocessor().preprocess(notebook, {})  # one block for what one cell prints
    text, made = MarkdownExporter().from_notebook_node(
        notebook, {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    )
    link = f"\n\n[This page as a notebook]({path.name})\n"
    return {f"{path.stem}.md": text + link, path.name: path.read_text(), **made["outputs"]}
