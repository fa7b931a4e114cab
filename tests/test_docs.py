"""What the documentation tells its readers to run does run, and what it shows is there."""

import inspect
import re

import pytest

import jaxattr as ja
from tests.pages import NOTEBOOKS, PAGES, ROOT, blocks, run

WITH_CODE = [path for path in sorted(PAGES.rglob("*.md")) if blocks(path)]
# Pages that people read first; all of them together take minutes.
FIRST = {PAGES / "index.md", PAGES / "start" / "linen.md", PAGES / "errors.md"}
MARKED = [
    path if path in FIRST else pytest.param(path, marks=pytest.mark.slow) for path in WITH_CODE
]
SCRIPTS = sorted((ROOT / "docs" / "scripts").glob("*.py"))


@pytest.mark.filterwarnings("ignore::jaxattr.weights.report.WeightWarning")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("path", MARKED, ids=lambda path: str(path.relative_to(PAGES)))
def test_the_code_of_a_page_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(path)


def test_every_script_is_shown_and_so_run():
    shown = "\n".join(path.read_text() for path in WITH_CODE)
    assert SCRIPTS and all(f'--8<-- "scripts/{path.name}"' in shown for path in SCRIPTS)


def test_every_page_is_in_the_table_of_contents():
    contents = (ROOT / "docs" / "mkdocs.yml").read_text()
    for path in PAGES.rglob("*.md"):
        assert f": {path.relative_to(PAGES)}\n" in contents or path.name == "index.md", path
    for path in NOTEBOOKS.glob("*.ipynb"):
        assert f": notebooks/{path.stem}.md\n" in contents, path


def public():
    """The names of the library as a user writes them, but for modules."""
    for name in ja.__all__:
        if callable(getattr(ja, name)):
            yield f"ja.{name}"
    for module in (ja.evaluation, ja.language, ja.diffusion, ja.projections):
        for name, value in vars(module).items():
            here = value.__module__ == module.__name__ if inspect.isfunction(value) else False
            if not name.startswith("_") and (here or module is ja.evaluation and callable(value)):
                yield f"ja.{module.__name__.rpartition('.')[2]}.{name}"


def test_every_public_name_is_in_the_reference():
    shown = {
        heading
        for path in (PAGES / "reference").glob("*.md")
        for heading in re.findall(r"^      heading: (\S+)$", path.read_text(), re.MULTILINE)
    }
    twice = {f"ja.evaluation.{name}" for name in ja.__all__}  # in both places, and shown once
    assert not set(public()) - shown - twice
