"""Figures that stand in more than one place are the same in each."""

import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "docs" / "figures.py"


def told(root):
    return subprocess.run([sys.executable, SCRIPT, root], capture_output=True, text=True)


def test_figures_agree():
    ran = told(ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_changed_figure_is_found(tmp_path):
    for name in ("BUILD_NOTES.md", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    others = shutil.ignore_patterns("__pycache__", "images")
    for name in ("docs/pages", "experiments", "jaxattr"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=others)
    assert told(tmp_path).returncode == 0
    page = tmp_path / "docs" / "pages" / "how" / "identity.md"
    page.write_text(page.read_text().replace("607 changes", "608 changes"))
    ran = told(tmp_path)
    assert ran.returncode == 1
    (line,) = ran.stdout.splitlines()
    assert line.startswith("docs/pages/how/identity.md: 607 changes were found, 393 had no effect")
