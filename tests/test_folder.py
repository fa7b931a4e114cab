"""A path names one folder, for all that reads and writes there; what can be none is refused."""

import os
import pathlib

import jax
import numpy as np
import pytest

import jaxattr as ja
from jaxattr.features import projections
from jaxattr.store.folder import Folder, StoreError
from tests import models

TRAIN, QUERIES = models.data(21), models.data(3, seed=1)
PARAMS = models.mlp_params()
TRAK = ja.trak(models.margin, projection=projections.rademacher(5))


def files(folder):
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An index under a plain name: what every other name must hold, and its scores."""
    folder = tmp_path_factory.mktemp("plain")
    index = ja.build_index(TRAK, PARAMS, TRAIN, batch_size=8, path=folder / "index")
    return files(folder / "index"), np.asarray(ja.score(index, QUERIES))


def test_a_tilde_is_the_home(tmp_path, plain, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    ja.build_index(TRAK, PARAMS, TRAIN, batch_size=8, path="~/index")
    assert files(home / "index") == plain[0]
    index = ja.open_index(pathlib.Path("~/index"), TRAK, PARAMS)
    np.testing.assert_allclose(ja.score(index, QUERIES), plain[1])
    made = ja.report(index, QUERIES, train=TRAIN, path="~/page.html")
    assert made == home / "page.html" and made.exists()
    ja.top_k(index, QUERIES, k=2).to_csv("~/top.csv")
    assert (home / "top.csv").exists() and not list(here.iterdir())


@pytest.mark.parametrize(
    "name",
    ["run%201", "a#b", "a?b", "..%2Fout", "a b", "[lr=0.1]", "*", "ü", "file:x", "s3:b", "~", "%"],
)
def test_a_path_is_taken_as_it_stands(tmp_path, plain, name):
    path, scores = tmp_path / name / "index", tmp_path / name / "scores"
    there, expected = plain
    ja.build_index(TRAK, PARAMS, TRAIN, batch_size=8, path=path)
    index = ja.open_index(path, TRAK, PARAMS)
    ja.score(index, QUERIES, path=scores)
    assert os.listdir(tmp_path) == [name] and sorted(os.listdir(path.parent)) == ["index", "scores"]
    assert files(path) == there
    np.testing.assert_array_equal(ja.score(index, QUERIES), expected)
    folder = Folder(path)
    folder.delete_under("features/")
    assert files(path) == [each for each in there if not each.startswith("features/")]
    assert folder.free_bytes() > 0


def test_patterns_in_a_path_match_no_other_folder(tmp_path, plain):
    for name in ("axb", "a?b", "a[x]b"):
        ja.build_index(TRAK, PARAMS, TRAIN, batch_size=8, path=tmp_path / name)
        assert files(tmp_path / name) == plain[0]


def test_a_file_url_names_the_path_that_it_decodes_to(tmp_path):
    for url in (f"file://{tmp_path}/a%20b%3F", f"FILE://localhost{tmp_path}/a%20b%3F/"):
        folder = Folder(url)
        assert folder.path == str(tmp_path / "a b?") and not folder.remote
        folder.write("x.json", 1)
    assert files(tmp_path) == ["a b?/x.json"]
    for wrong in ("file://host/tmp/x", "file:///tmp/a?b", "file:///tmp/a#b"):
        with pytest.raises(StoreError, match="names no local folder: .* Give the path itself"):
            Folder(wrong)


def test_a_url_is_one_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Folder("memory://run%201/index/")
    folder.write("x.json", 7)
    assert folder.path == "memory://run%201/index" and folder.plain == "memory://run 1/index"
    assert folder.spec("array")["path"] == "run 1/index/array/"
    assert Folder("MEMORY://run%201/index").path == folder.path and os.listdir(tmp_path) == []
    with pytest.raises(StoreError, match="nonsense://x is no place for an index: .* Give the path"):
        Folder("nonsense://x")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("n" * 300, "File name too long"),
        ("a/" * 4000, "File name too long"),
        ("a\0b", "zero byte"),
        ("back\\slash", "backslash"),
        ("a\udcffb", "not UTF-8"),
        ("file", "it is a file"),
        ("file/below", "Not a directory"),
        ("loop", "symbolic links"),
    ],
)
def test_places_that_can_be_no_folder_are_refused(tmp_path, name, why, plain):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path, memory = f"{tmp_path}/{name}", ja.build_index(TRAK, PARAMS, TRAIN, batch_size=8)
    calls = (
        lambda: ja.build_index(TRAK, PARAMS, TRAIN, batch_size=8, path=path),
        lambda: ja.open_index(path),
        lambda: ja.score(memory, QUERIES, path=path),
    )
    for call in calls:
        with pytest.raises(StoreError, match=f"(?i)is no place for an index: .*{why}.* Give the"):
            call()
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


def test_an_empty_path_is_not_the_working_folder():
    with pytest.raises(StoreError, match="it is empty. Give the path of a folder"):
        Folder("")


def test_a_relative_path_is_made_absolute_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Folder(pathlib.Path("run%201"))
    monkeypatch.chdir("/")
    folder.write("x.json", jax.device_count())
    assert files(tmp_path) == ["run%201/x.json"]


def test_what_cannot_be_read_is_named(tmp_path):
    folder = Folder(tmp_path / "gone")
    (tmp_path / "gone").write_text("a file took its place")
    for call in (folder.names, lambda: folder.write("a", 1), lambda: folder.delete_under("a/")):
        with pytest.raises(StoreError, match="gone.*Check that"):
            call()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.json").symlink_to("x.json")
    with pytest.raises(StoreError, match="Cannot read .*/folder/x.json: .*Check that it is a file"):
        Folder(tmp_path / "folder").read("x.json")
