"""What is damaged, left behind, hostile or cannot be written is named, and says what to do."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxattr as ja
from jaxattr.features import projections
from jaxattr.sharding import Placement
from jaxattr.store.disk_rows import DiskRows
from jaxattr.store.folder import Folder, StoreError
from jaxattr.store.seals import load_seals
from jaxattr.store.state import load_state, save_state
from tests import models

ROOT = pathlib.Path(__file__).parent.parent
SIZE = 29
TRAIN, QUERIES = models.data(SIZE), models.data(3, seed=1)
CHECKPOINTS = [models.mlp_params(jax.random.key(i)) for i in range(2)]
TRAK = ja.trak(models.margin, projection=projections.rademacher(10))
EKFAC = ja.ekfac(models.loss)
TRACIN = ja.tracin(models.loss, projection=projections.identity())


def build(path, method, train=TRAIN, **options):
    return ja.build_index(method, CHECKPOINTS, train, batch_size=8, path=path, **options)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    for method in (TRAK, EKFAC, TRACIN):
        build(folder / method.name, method)
    return folder


@pytest.fixture
def copy_of(originals, tmp_path):
    def copy(method):
        return pathlib.Path(shutil.copytree(originals / method.name, tmp_path / "index"))

    return copy


def use(path, method):
    index = ja.open_index(path, method, CHECKPOINTS)
    return np.asarray(ja.score(index, QUERIES))


class Killed(Exception):
    pass


def test_raw_features_that_a_killed_build_left_are_removed(tmp_path, monkeypatch):
    path, began = tmp_path / "index", []

    def killed(self, checkpoint):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(DiskRows, "_remove_raw", killed)
        with pytest.raises(Killed):
            build(path, TRAK)
    assert (path / "raw-0").exists()

    def create(self, name, checkpoint=0, create=DiskRows.create):
        if (name, checkpoint) == ("raw", 1):
            began.append(sorted(each.name for each in path.glob("raw-*")))
        create(self, name, checkpoint)

    monkeypatch.setattr(DiskRows, "create", create)
    build(path, TRAK)
    assert began == [[]] and not list(path.glob("raw-*"))  # gone before the second began
    for left in ("raw-0", "raw-1"):
        shutil.copytree(path / "features", path / left)
    build(path, TRAK)  # which is finished
    assert not list(path.glob("raw-*"))


STATE = """
import resource, sys, jax.numpy as jnp
from jaxattr.sharding import Placement
from jaxattr.store.disk_rows import DiskRows
from jaxattr.store.folder import Folder
from jaxattr.store.state import save_state
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
save_state(Folder(sys.argv[1]), "fitted-0", {"a": jnp.arange(1 << 14)}, Placement())
"""
SCORES = """
import resource, sys, jax
import jaxattr as ja
from tests import models
index = ja.build_index(ja.tracin(models.loss), models.mlp_params(), models.data(900))
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
ja.score(index, models.data(9), path=sys.argv[1])
"""


@pytest.mark.parametrize(
    ("program", "message"),
    [(STATE, "Cannot write .*/out/fitted-0: "), (SCORES, "Cannot write scores to .*/out: ")],
    ids=["state", "scores"],
)
def test_full_disk(tmp_path, program, message):
    """Files that may not grow stand for it."""
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    failed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()
    raised = [line for line in last if line.startswith("jaxattr.store.folder.StoreError")]
    assert len(raised) == 1, failed.stderr
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(raised[0])
    assert "space left" in raised[0]


@pytest.fixture
def state(tmp_path):
    folder = Folder(tmp_path)
    arrays = {"a": jax.numpy.arange(6.0), "b": jax.numpy.ones((2, 3), jax.numpy.bfloat16)}
    save_state(folder, "fitted-0", arrays, Placement())
    return folder, tmp_path / "fitted-0"


def test_state_comes_back(state):
    folder, _ = state
    loaded = load_state(folder, "fitted-0", Placement())
    np.testing.assert_array_equal(loaded["a"], np.arange(6.0))
    assert loaded["b"].dtype == jax.numpy.bfloat16 and (loaded["b"] == 1).all()
    assert load_state(folder, "fitted-1", Placement()) is None
    save_state(folder, "fitted-1", {}, Placement())
    assert load_state(folder, "fitted-1", Placement()) == {}


def damages(path):
    """Every file of a state, gone, empty, cut off and with a bit flipped."""
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        content = file.read_bytes()
        flipped = bytearray(content or b"x")
        flipped[len(flipped) // 2] ^= 4
        for damaged in (None, b"", content[: len(content) // 2], bytes(flipped)):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            yield file
            file.write_bytes(content)


def test_damaged_state_is_found_and_named(state):
    folder, path = state
    found = 0
    for file in damages(path):
        try:
            loaded = load_state(folder, "fitted-0", Placement())
        except StoreError as error:
            found += 1
            assert str(path) in str(error) and "is damaged" in str(error), file
        else:  # not all that Orbax writes matters
            np.testing.assert_array_equal(loaded["a"], np.arange(6.0))
            assert (loaded["b"] == 1).all()
    assert found >= 12


def test_other_contents_of_an_array_are_found_by_their_digest(state):
    folder, path = state
    chunk = path / "0" / "0"
    other = Folder(path.parent / "other")
    save_state(other, "fitted-0", {"a": jax.numpy.arange(6.0) + 1}, Placement())
    shutil.copy(pathlib.Path(other.path) / "fitted-0" / "0" / "0", chunk)
    with pytest.raises(StoreError, match="fitted-0/0 is damaged: it is not the 'a' that was saved"):
        load_state(folder, "fitted-0", Placement())


@pytest.mark.parametrize(
    "change",
    [
        {"names": 3}, {"names": ["a"]}, {"names": ["a", "a"]}, {"names": [["a"], "b"]},
        {"shapes": None}, {"shapes": [[[6], "float64"]]}, {"shapes": [[[6], "colour"], 3]},
        {"shapes": [[["6"], "float64"], [[2, 3], "bfloat16"]]},
        {"shapes": [[[10**30], "float64"], [[2, 3], "bfloat16"]]},
        {"shapes": [[[7], "float64"], [[2, 3], "bfloat16"]]},
        {"digests": ["x"]}, {"digests": {}}, {"digests": [1, 2]},
    ],
)  # fmt: skip
def test_hostile_descriptions_of_state(state, change):
    folder, _ = state
    folder.write("fitted-0.json", folder.read("fitted-0.json") | change)
    with pytest.raises(StoreError, match="fitted-0.* is damaged: .*Restore it, or delete"):
        load_state(folder, "fitted-0", Placement())
    for name in change:
        described = folder.read("fitted-0.json")
        del described[name]
        folder.write("fitted-0.json", described)
        with pytest.raises(StoreError, match=f"fitted-0.json is damaged: it has no '{name}'"):
            load_state(folder, "fitted-0", Placement())


def edit(path, change):
    contents = json.loads(path.read_text())
    for keys, value in change.items():
        *parents, last = keys.split(".")
        place = contents
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(contents))


@pytest.mark.parametrize(
    "change",
    [
        {"data": None}, {"data": [3]}, {"data.examples": None}, {"data.examples": "29"},
        {"data.examples": 10**30}, {"data.examples": -1}, {"data.examples": 29.0},
        {"rows": None}, {"rows": 3}, {"rows.block": 0}, {"rows.block": 10**40},
        {"rows.block": True}, {"rows.block": [8]}, {"rows.checkpoints": 10**9},
        {"rows.checkpoints": "2"}, {"rows.widths": {}}, {"rows.widths": [1]},
        {"rows.widths.features": 10**12}, {"rows.widths.features": 9}, {"rows.widths.self": "3"},
        {"rows.dtypes": {}}, {"rows.dtypes.features": "colour"}, {"rows.dtypes.features": 3},
        {"rows.dtypes.features": "float32"}, {"layout": None}, {"layout": 3}, {"layout.dims": 5},
        {"layout.blocks": [[1]]}, {"layout.names": None}, {"groups": 3}, {"groups": []},
        {"groups": [{}]}, {"key": 3}, {"key.words": ["x"]}, {"key.impl": "colour"},
        {"method": 3}, {"method": None}, {"params": 3}, {"params": None}, {"example": 3},
        {"example": {"dict": 3}}, {"example": {"shape": "x", "dtype": 3}},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("sealed", [True, False])
def test_hostile_manifests(copy_of, change, sealed):
    path = copy_of(TRACIN)
    edit(path / "manifest.json", change)
    if not sealed:
        (path / "seals.json").unlink()
    with pytest.raises(StoreError, match=f"{path}"):
        use(path, TRACIN)
    if "data" in str(change):
        (path / "complete.json").unlink()
    for extend in (False, True):
        with pytest.raises(StoreError, match=f"{path}"):
            build(path, TRACIN, train=models.data(SIZE + 8), extend=extend)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"x"', "[" * 100_000, "{", ""])
@pytest.mark.parametrize(
    "name",
    ["manifest.json", "complete.json", "seals.json", "fitted-0.json", "ledger/finished.json"],
)
def test_files_that_hold_something_else(copy_of, name, content):
    path = copy_of(TRAK)
    (path / name).write_text(content)
    if name.startswith("ledger"):
        (path / "complete.json").unlink()
    with pytest.raises(StoreError, match=f"{path}/{name} is damaged: "):
        use(path, TRAK)


@pytest.mark.parametrize(
    "change",
    [{"blocks": None}, {"blocks": 3}, {"blocks": {"features/0": "7"}},
     {"blocks": {"features/0": -1}}, {"blocks": {"features/0": 1.5}}],
)  # fmt: skip
@pytest.mark.parametrize("name", ["finished", "process-0"])
def test_hostile_ledgers(copy_of, name, change):
    path = copy_of(TRAK)
    (path / "complete.json").unlink()
    edit(path / "ledger" / f"{name}.json", change)
    with pytest.raises(StoreError, match=f"ledger/{name}.json is damaged: .*Restore it, or delete"):
        build(path, TRAK)


@pytest.mark.parametrize(
    "change",
    [{"examples": None}, {"examples": "29"}, {"non_finite": None}, {"non_finite": ["x"]},
     {"non_finite": {"a": 1}}, {"solve_errors": None}, {"solve_errors": {"a": [1]}}],
)  # fmt: skip
def test_hostile_closing_records(copy_of, change):
    path = copy_of(TRAK)
    edit(path / "complete.json", change)
    with pytest.raises(StoreError, match=f"{path}"):
        use(path, TRAK)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"shape": [SIZE + 1, 2, 3]}, "shape"),
        ({"shape": [SIZE, 2, 4]}, "shape"),
        ({"shape": [10**15, 2, 3]}, "shape"),
        ({"data_type": "float32"}, "data_type"),
        ({"fill_value": 0.0}, "fill_value"),
        ({"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]},
         "codecs"),
        ({"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]}, "codecs"),
        ({"chunk_grid.configuration.chunk_shape": [3, 1, 3]}, "chunk_grid"),
        ({"chunk_grid.configuration.chunk_shape": [4, 2, 3]}, "chunk_grid"),
        ({"chunk_key_encoding": {"name": "v2"}}, "chunk_key_encoding"),
        ({"data_type": "colour"}, "self cannot be opened"),
        ({"shape": None}, "self cannot be opened"),
        ({"shape": "x"}, "self cannot be opened"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("sealed", [True, False])
def test_edited_arrays(copy_of, change, part, sealed):
    path = copy_of(TRACIN)
    layout = ja.open_index(path).rows.layout
    edit(path / "self" / "zarr.json", change)
    match = "zarr.json is damaged: it is not what was written" if sealed else (
        part if "opened" in part else f"self/zarr.json is damaged: its {part} is .* must be "
    )  # fmt: skip
    with pytest.raises(StoreError, match=match):
        if sealed:
            ja.open_index(path, TRACIN, CHECKPOINTS)
        else:  # as while it is built
            DiskRows(Folder(path), layout, Placement()).read("self", 0, 0)


def test_sealed_indexes_are_left_as_they_are(copy_of):
    path = copy_of(EKFAC)
    seals = load_seals(Folder(path))
    assert sorted(seals.arrays) == sorted(["features", "examples", "self", "digests"])
    blocks = -(-SIZE // 8)
    keys = {f"c/{block}/{c}/0" for block in range(blocks) for c in range(2)}
    for name, chunks in seals.arrays.items():
        assert set(chunks) == keys
        for key, seal in chunks.items():
            assert (path / name / key).read_bytes()[-4:].hex() == seal


@pytest.mark.parametrize("name", ["features", "examples", "self"])
@pytest.mark.parametrize("how", ["swapped", "borrowed", "linked", "rows of another checkpoint"])
def test_a_chunk_of_another_place_is_found(copy_of, originals, tmp_path, name, how):
    path = copy_of(TRACIN)
    chunk, other = (path / name / "c" / number / "0" / "0" for number in "01")
    if how == "borrowed":
        build(tmp_path / "other", TRACIN, models.data(SIZE, seed=5))
        shutil.copy(tmp_path / "other" / name / "c" / "0" / "0" / "0", chunk)
        if name == "examples" and chunk.read_bytes() == other.read_bytes():
            pytest.skip("all are finite, in both")
    elif how == "swapped":
        chunk.rename(path / "aside")
        other.rename(chunk)
        (path / "aside").rename(other)
    elif how == "linked":
        chunk.unlink()
        chunk.symlink_to(other)
    else:
        shutil.copy(path / name / "c" / "0" / "1" / "0", chunk)
    same = chunk.read_bytes() == (originals / "TracIn" / name / "c/0/0/0").read_bytes()
    index = ja.open_index(path, TRACIN, CHECKPOINTS)

    def read():
        return ja.self_influence(index) if name == "self" else ja.score(index, QUERIES)

    if same:  # columns of ones
        read()
        return
    for _ in range(2):  # not only once
        with pytest.raises(StoreError, match=f"{name} is damaged at or after block 0 .*c/0/0/0 is "
                           "not the one that was written there, but another"):  # fmt: skip
            read()


def test_chunks_that_were_read_ahead_of_an_error_are_still_looked_at(
    copy_of, originals, monkeypatch
):
    monkeypatch.setattr("jaxattr.store.rows._SLAB_BYTES", 1)  # a slab for each block
    path = copy_of(TRACIN)
    chunk, other = (path / "features" / "c" / number / "0" / "0" for number in "01")
    chunk.rename(path / "aside")
    other.rename(chunk)
    (path / "aside").rename(other)
    index = ja.open_index(path, TRACIN, CHECKPOINTS)
    with pytest.raises(StoreError, match="after block 0 "):
        ja.score(index, QUERIES)
    shutil.copy(originals / "TracIn" / "features" / "c/0/0/0", chunk)
    with pytest.raises(StoreError, match="after block 1 "):
        ja.top_k(index, QUERIES)
    shutil.copy(originals / "TracIn" / "features" / "c/1/0/0", other)
    ja.top_k(index, QUERIES)


@pytest.mark.parametrize("what", ["fitted-0.json", "fitted-0", "features/zarr.json", "features"])
def test_what_is_gone_is_named(copy_of, what):
    path = copy_of(EKFAC)
    place = path / what
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(StoreError, match=f"{path}/{what}.* is damaged: "):
        use(path, EKFAC)


def test_an_index_without_its_seals_is_damaged(copy_of, tmp_path):
    path = copy_of(TRAK)
    build(tmp_path / "other", TRAK, models.data(SIZE, seed=5))
    for name in ("seals.json", "complete.json", "manifest.json"):
        kept = (path / name).read_bytes()
        for content in (None, (tmp_path / "other" / name).read_bytes()):
            if content == kept:  # other data of the same kind have the same manifest
                continue
            (path / name).unlink()
            if content is not None:
                (path / name).write_bytes(content)
            if content is None and name == "complete.json":
                match = "is not finished"
            elif content is None and name == "manifest.json":
                match = "There is no index"
            else:
                match = "seals.json is damaged|manifest.json is damaged"
            with pytest.raises(StoreError, match=match):
                use(path, TRAK)
            (path / name).write_bytes(kept)
    use(path, TRAK)


def test_an_extended_index_is_sealed_anew(copy_of):
    path = copy_of(TRACIN)
    before = load_seals(Folder(path))
    longer = models.data(SIZE + 11, seed=4)
    grown = jax.tree.map(lambda a, b: jax.numpy.concatenate([a, b[SIZE:]]), TRAIN, longer)
    expected = ja.build_index(TRACIN, CHECKPOINTS, grown, batch_size=8)
    build(path, TRACIN, grown, extend=True)
    after = load_seals(Folder(path))
    assert after.digest != before.digest
    assert after.arrays["features"]["c/0/0/0"] == before.arrays["features"]["c/0/0/0"]
    assert len(after.arrays["features"]) == 2 * -(-(SIZE + 11) // 8)
    np.testing.assert_array_equal(use(path, TRACIN), ja.score(expected, QUERIES))
