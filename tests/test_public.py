"""What `import jaxattr` offers, and what it costs."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import jaxattr as ja

ROOT = pathlib.Path(ja.__file__).parent.parent


def test_dir_shows_what_is_public_and_no_more():
    public = [name for name in dir(ja) if not name.startswith("_")]
    assert {"StoreError", "NonFiniteWarning", "ConvergenceWarning"} <= set(public)
    assert {"WeightWarning", "TruncationWarning", "build_index", "evaluation"} <= set(public)
    assert not {"sources", "sharding", "batches", "keys", "store", "kernels"} & set(public)
    assert set(dir(ja)) | {"__version__"} == set(ja.__all__) and len(public) <= 60
    assert all(hasattr(ja, name) for name in ja.__all__)


def test_type_checkers_see_what_is_there():
    stub = ast.parse((ROOT / "jaxattr" / "__init__.pyi").read_text())
    names = {a.asname for node in stub.body if isinstance(node, ast.ImportFrom) for a in node.names}
    (listed,) = (node.value for node in stub.body if isinstance(node, ast.Assign))
    assert set(ast.literal_eval(listed)) == names | {"__version__"} == set(ja.__all__)


def test_the_version_is_the_one_that_is_packaged():
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert ja.__version__ == packaged
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited and cited[1] == packaged
    assert re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] == packaged


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split("[>=<]", each)[0] for each in project["dependencies"]}
    imported = set()
    for path in (ROOT / "jaxattr").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    packages = {"orbax": "orbax-checkpoint", "lazy_loader": "lazy-loader"}
    foreign = imported - set(sys.stdlib_module_names) - {"jaxattr"}
    assert {packages.get(name, name) for name in foreign} <= declared


def test_importing_is_light():
    program = (
        "import sys, jax, optax; before = set(sys.modules); import jaxattr as ja; "
        "assert not {'jaxattr.index', 'tensorstore'} & set(sys.modules); "
        "[getattr(ja, name) for name in ja.__all__]; new = set(sys.modules) - before; "
        "heavy = {'scipy.stats', 'scipy.linalg', 'orbax.checkpoint', 'flax.nnx', 'click'}; "
        "assert 'jaxattr.index.building' in new and not heavy & new, heavy & new"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_each_module_is_there_when_it_is_asked_for_first():
    modules = [name for name in ja.__all__ if isinstance(getattr(ja, name), type(ja))]
    assert len(modules) == 4
    for name in modules:
        program = f"import jaxattr; assert jaxattr.{name}; from jaxattr import {name}"
        subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
