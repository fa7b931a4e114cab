"""What the documentation tells its readers to run does run, and what it shows is there."""

import re

import pytest

import jaxattr as ja
from tests.pages import PAGES, ROOT, blocks, run

WITH_CODE = [path for path in sorted(PAGES.rglob("*.md")) if blocks(path)]
SCRIPTS = sorted((ROOT / "docs" / "scripts").glob("*.py"))


@pytest.mark.filterwarnings("ignore::jaxattr.weights.report.WeightWarning")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: str(path.relative_to(PAGES)))
def test_the_code_of_a_page_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(path)


def test_every_script_is_shown_and_so_run():
    shown = "\n".join(path.read_text() for path in WITH_CODE)
    assert SCRIPTS and all(f'--8<-- "scripts/{path.name}"' in shown for path in SCRIPTS)


def test_every_page_is_in_the_table_of_contents():
    contents = (ROOT / "docs" / "mkdocs.yml").read_text()
    for path in (*PAGES.rglob("*.md"), *PAGES.rglob("*.ipynb")):
        assert str(path.relative_to(PAGES)) in contents, path


def test_every_public_name_is_in_the_reference():
    shown = "\n".join(path.read_text() for path in (PAGES / "reference").glob("*.md"))
    at_the_top = {name for name in ja.__all__ if callable(getattr(ja, name))}
    inside = {
        f"{room}.{name}"
        for room in ("evaluation", "language", "diffusion", "projections")
        for name, value in vars(getattr(ja, room)).items()
        if callable(value) and not name.startswith("_") and value.__module__.startswith("jaxattr")
    }
    missing = [
        name for name in at_the_top
        if not re.search(rf"^::: jaxattr\.(\w+\.)*{name}$", shown, re.MULTILINE)
    ]  # fmt: skip
    assert not missing
    del inside
