"""Damages every kind of file of small indexes in many ways, and says what was not noticed.

python -m tests.tampering --count 1000

Each time one thing is done to the files, the index is opened and used, and they are put back. Found
is what raises StoreError, harmless what changes no result, silent everything else.
"""

import argparse
import collections
import contextlib
import copy
import json
import pathlib
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxattr as ja
from jaxattr.features import projections
from jaxattr.store.folder import StoreError
from tests import models

FOUND, HARMLESS, SILENT = "found", "harmless", "silent"
SIZE, BATCH, CHECKPOINTS = 37, 8, 3


class Case(NamedTuple):
    """An index to damage.

    Attributes:
      method: that it was built with.
      path: of the index.
      other: the same of other data.
      features: of queries, computed before.
      expected: the right results.
    """

    method: ja.Method
    path: pathlib.Path
    other: pathlib.Path
    features: Any
    expected: dict[str, Any]


class Outcome(NamedTuple):
    """What came of one damage.

    Attributes:
      index: name of the method.
      kind: of the file, numbers left out.
      change: what was done.
      outcome: found, harmless or silent.
      details: the file, and what was raised or differs.
    """

    index: str
    kind: str
    change: str
    outcome: str
    details: str


def checkpoints() -> list[Any]:
    return [models.mlp_params(jax.random.key(i)) for i in range(CHECKPOINTS)]


def queries() -> Any:
    return models.data(4, seed=1)


def methods() -> list[ja.Method]:
    return [
        ja.trak(models.margin, projection=projections.rademacher(6)),
        ja.ekfac(models.loss),
    ]


def cases(folder: pathlib.Path) -> list[Case]:
    """Builds the indexes; one example of each is not finite."""
    found = []
    for method in methods():
        for name, seed in (("right", 0), ("other", 7)):
            train = models.data(SIZE, seed=seed)
            train["x"] = train["x"].at[5 + seed].set(np.nan)
            path = folder / method.name / name
            ja.build_index(method, checkpoints(), train, batch_size=BATCH, path=path)
        path = folder / method.name / "right"
        index = ja.open_index(path, method, checkpoints())
        features = ja.query_features(index, queries())
        case = Case(method, path, path.parent / "other", features, {})
        found.append(case._replace(expected=results(index, features) | weights(index)))
    return found


def results(index: ja.Index, given: Any) -> dict[str, Any]:
    """All that an index says of some queries."""
    top = ja.top_k(index, given, k=5)
    errors = index.solve_errors
    return {
        "scores": np.asarray(ja.score(index, given)),
        "top ids": np.asarray(top.ids),
        "top scores": np.asarray(top.scores),
        "self": np.asarray(ja.self_influence(index)),
        "non-finite": np.asarray(index.non_finite),
        "solve errors": np.zeros(0) if errors is None else np.asarray(errors),
        "names": np.asarray(index.layout.names),
        "layout": np.asarray([*index.layout.sizes, *index.layout.dims]),
        "size": np.asarray([index.size, index.batch_size, len(index.link)]),
    }


def weights(index: ja.Index) -> dict[str, Any]:
    """What is learned of an index; it compiles anew each time."""
    learned = ja.learn_weights(index, queries(), steps=2, top_k=3).weights
    return {"weights": np.asarray([learned[name] for name in index.layout.names])}


def use(case: Case, whole: bool) -> dict[str, Any]:
    """Opens an index and uses it, with its method or with features that were computed before."""
    if whole:
        index = ja.open_index(case.path, case.method, checkpoints())
        return results(index, queries()) | weights(index)
    return results(ja.open_index(case.path), case.features)


def outcome(case: Case, whole: bool) -> tuple[str, str]:
    try:
        got = use(case, whole)
    except StoreError as error:
        return FOUND, str(error)
    except Exception as error:
        return SILENT, f"{type(error).__name__}: {error}"[:300]
    wrong = [
        name
        for name, value in case.expected.items()
        if name in got and not np.array_equal(got[name], value, equal_nan=value.dtype.kind == "f")
    ]
    return (SILENT, f"other {', '.join(wrong)}") if wrong else (HARMLESS, "")


def kind_of(name: str) -> str:
    return re.sub(r"\d+", "N", name)


def files_of(path: pathlib.Path) -> list[str]:
    return sorted(str(each.relative_to(path)) for each in path.rglob("*") if each.is_file())


class Damage(NamedTuple):
    """One thing that can happen to a file: returns {file: new contents, None where it is gone}."""

    name: str
    make: Callable[[random.Random, Case, str, list[str]], dict[str, bytes | None] | None]


def _flip(choose: random.Random, case: Case, name: str, names: list[str]) -> Any:
    content = bytearray((case.path / name).read_bytes())
    if not content:
        return None
    content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
    return {name: bytes(content)}


def _truncate(choose: random.Random, case: Case, name: str, names: list[str]) -> Any:
    content = (case.path / name).read_bytes()
    return {name: content[: choose.randrange(len(content))]} if content else None


def _delete(choose: random.Random, case: Case, name: str, names: list[str]) -> Any:
    return {name: None}


def _delete_folder(choose: random.Random, case: Case, name: str, names: list[str]) -> Any:
    above = name.rpartition("/")[0]
    return {each: None for each in names if each.startswith(f"{above}/")} if above else None


def _swap(choose: random.Random, case: Case, name: str, names: list[str]) -> Any:
    others = [each for each in names if kind_of(each) == kind_of(name) and each != name]
    if not others:
        return None
    other = choose.choice(others)
    contents = {each: (case.path / each).read_bytes() for each in (name, other)}
    return {name: contents[other], other: contents[name]}


def _borrow(choose: random.Random, case: Case, name: str, names: list[str]) -> Any:
    there = case.other / name
    return {name: there.read_bytes()} if there.exists() else None


def _borrow_folder(choose: random.Random, case: Case, name: str, names: list[str]) -> Any:
    above = name.partition("/")[0]
    there = files_of(case.other)
    taken = {each for each in [*there, *names] if each.partition("/")[0] == above}
    beside = {each for each in there if each == f"{above}.json"}  # state with its description
    return {
        each: (case.other / each).read_bytes() if each in there else None for each in taken | beside
    }


def _edit(choose: random.Random, case: Case, name: str, names: list[str]) -> Any:
    try:
        contents = json.loads((case.path / name).read_bytes())
    except ValueError:
        return None
    places = list(_places(contents))
    if not places:
        return None
    parent, key = choose.choice(places)
    value, action = parent[key], choose.choice(["change", "remove", "duplicate"])
    if action == "change" or not isinstance(parent, dict):
        parent[key] = _changed(choose, value)
    elif action == "remove":
        del parent[key]
    else:
        parent["@twice@"] = _changed(choose, copy.deepcopy(value))
        return {name: json.dumps(contents).replace('"@twice@"', json.dumps(key)).encode()}
    return {name: json.dumps(contents).encode()}


def _changed(choose: random.Random, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + choose.choice([-1, 1])
    if isinstance(value, str):
        at = choose.randrange(len(value) + 1)
        return value[:at] + choose.choice("0123456789abcdefNx") + value[at + 1 :]
    if isinstance(value, list):
        return choose.choice([value[:-1], [*value, *value[-1:]], {}])
    return choose.choice([[], {**value, "another": 1}, "text"])


def _places(contents: Any) -> Iterator[tuple[Any, Any]]:
    """All that has a place in a JSON value, as (what it is in, its key there)."""
    pairs = contents.items() if isinstance(contents, dict) else enumerate(contents)
    for key, value in list(pairs):
        yield contents, key
        if isinstance(value, dict | list):
            yield from _places(value)


DAMAGES = (
    Damage("flip", _flip),
    Damage("truncate", _truncate),
    Damage("delete", _delete),
    Damage("delete folder", _delete_folder),
    Damage("swap", _swap),
    Damage("borrow", _borrow),
    Damage("borrow folder", _borrow_folder),
    Damage("edit", _edit),
)


def run(count: int, seed: int, folder: pathlib.Path, every: int = 10) -> list[Outcome]:
    """Damages indexes.

    Args:
      count: how often.
      seed: of what is done.
      folder: an empty one.
      every: one in so many is opened with its method, and queries are featurised.

    Returns:
      What came of each.
    """
    choose, found, all_cases = random.Random(seed), [], cases(folder)
    for case in all_cases:
        for whole in (False, True):
            assert outcome(case, whole) == (HARMLESS, ""), "results do not repeat"
    while len(found) < count:
        case = choose.choice(all_cases)
        names = files_of(case.path)
        kinds = collections.defaultdict(list)
        for name in names:
            kinds[kind_of(name)].append(name)
        kind = choose.choice(sorted(kinds))
        name, damage = choose.choice(kinds[kind]), choose.choice(DAMAGES)
        contents = damage.make(choose, case, name, names)
        if contents is None or not _differs(case.path, contents):
            continue
        with _replaced(case.path, contents):
            result, details = outcome(case, whole=len(found) % every == 0)
        where = f"{name}: {details}"
        found.append(Outcome(case.method.name, kind, damage.name, result, where))
    return found


def _differs(path: pathlib.Path, contents: dict[str, bytes | None]) -> bool:
    return any(_bytes_of(path / name) != content for name, content in contents.items())


def _bytes_of(file: pathlib.Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


@contextlib.contextmanager
def _replaced(path: pathlib.Path, contents: dict[str, bytes | None]) -> Iterator[None]:
    before = {name: _bytes_of(path / name) for name in contents}
    _put(path, contents)
    try:
        yield
    finally:
        _put(path, before)


def _put(path: pathlib.Path, contents: dict[str, bytes | None]) -> None:
    for name, content in contents.items():
        if content is None:
            (path / name).unlink(missing_ok=True)
        else:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)


def table(found: list[Outcome]) -> str:
    """Counts by kind of file and by what was done, then everything that was not noticed."""
    lines = []
    for title, part in (("file", 1), ("change", 2)):
        counts = collections.Counter((each[part], each.outcome) for each in found)
        lines.append(f"{title:44}{FOUND:>9}{HARMLESS:>9}{SILENT:>9}")
        for name in sorted({each[part] for each in found}):
            numbers = (counts[name, each] for each in (FOUND, HARMLESS, SILENT))
            lines.append(f"{name:44}" + "".join(f"{number:9}" for number in numbers))
        lines.append("")
    silent = [each for each in found if each.outcome == SILENT]
    lines.append(f"{len(found)} in all, {len(silent)} silent")
    lines += [f"  {each.index}, {each.change} of {each.details}" for each in silent]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        print(table(run(options.count, options.seed, pathlib.Path(folder))))


if __name__ == "__main__":
    main()
