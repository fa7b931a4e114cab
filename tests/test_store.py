"""Indexes on disk: the same numbers, and what does not belong together is refused."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr import kernels
from jaxattr.sharding import Placement
from jaxattr.store.disk_rows import DiskRows
from jaxattr.store.folder import Folder, StoreError
from jaxattr.store.ledger import finished
from tests import models
from tests.stored import (
    BATCH,
    CHECKPOINTS,
    IDENTITY,
    QUERIES,
    SIZE,
    TRAIN,
    TRAK,
    Interrupted,
    Stops,
    build,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "index"


@pytest.fixture(scope="module")
def finished_index(tmp_path_factory):
    return build(tmp_path_factory.mktemp("shared") / "index").path


METHODS = {
    "TracIn": lambda: IDENTITY,
    "TRAK": lambda: TRAK,
    "EK-FAC": lambda: ja.ekfac(models.loss),
    "CG": lambda: ja.influence(models.loss, damping=ja.absolute(1.0), solver="cg"),
    "TrackStar": lambda: ja.trackstar(
        models.loss, [jax.tree.map(jnp.ones_like, params) for params in CHECKPOINTS],
        CHECKPOINTS[0], rank=3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_on_disk_is_in_memory(path, name):
    method = METHODS[name]()
    memory = ja.build_index(method, CHECKPOINTS, TRAIN, batch_size=BATCH)
    build(path, method)
    for index in (build(path, method), ja.open_index(path, method, CHECKPOINTS)):
        np.testing.assert_array_equal(ja.score(index, QUERIES), ja.score(memory, QUERIES))
        np.testing.assert_array_equal(ja.self_influence(index), ja.self_influence(memory))
        np.testing.assert_array_equal(index.features, memory.features)
        with models.slabs_of(16):
            top = ja.top_k(index, QUERIES, k=9)
        np.testing.assert_array_equal(top.ids, ja.top_k(memory, QUERIES, k=9).ids)
        if memory.solve_errors is not None:
            np.testing.assert_allclose(index.solve_errors, memory.solve_errors)
    assert not any(name.startswith("raw") for name in os.listdir(path))


def test_an_index_opened_without_its_method_takes_query_features(finished_index):
    index = ja.open_index(finished_index)
    with pytest.raises(ValueError, match="opened without its method"):
        ja.score(index, QUERIES)
    whole = ja.open_index(finished_index, IDENTITY, CHECKPOINTS)
    features = ja.query_features(whole, QUERIES)
    np.testing.assert_array_equal(ja.score(index, features), ja.score(whole, QUERIES))
    assert "opened without its method" in repr(index) and finished_index in repr(index)
    with pytest.raises(ValueError, match="belong to another index"):
        ja.score(index, features._replace(features=features.features[:, 1:]))
    with pytest.raises(ValueError, match="Give both method and checkpoints"):
        ja.open_index(finished_index, IDENTITY)


def test_bfloat16(path):
    exact = ja.score(ja.build_index(TRAK, CHECKPOINTS, TRAIN, batch_size=BATCH), QUERIES)
    on_disk = build(path, TRAK, dtype=jnp.bfloat16)
    memory = ja.build_index(TRAK, CHECKPOINTS, TRAIN, batch_size=BATCH, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(ja.score(on_disk, QUERIES), ja.score(memory, QUERIES))
    assert 1e-5 < models.relative_error(ja.score(memory, QUERIES), exact) < 0.02
    for wrong in (jnp.float16, np.int32):
        with pytest.raises(ValueError, match=f"got {np.dtype(wrong).name}"):
            build(path, dtype=wrong)


class _Unread:
    def __len__(self):
        return 6

    def __getitem__(self, position):
        raise AssertionError(position)


def test_scores_into_a_zarr(finished_index, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxattr.scores.writing.SLAB", 16)
    index = ja.open_index(finished_index, IDENTITY, CHECKPOINTS)
    scores = ja.score(index, QUERIES, path=tmp_path / "scores")
    np.testing.assert_array_equal(scores.read().result(), ja.score(index, QUERIES))
    assert scores[:, 3:5].read().result().shape == (6, 2)
    with pytest.raises(StoreError, match="is not empty: give a new path"):
        ja.score(index, _Unread(), path=tmp_path / "scores")


def test_scores_of_groups_of_queries_are_chunks_of_their_own(finished_index, tmp_path):
    index = ja.open_index(finished_index, IDENTITY, CHECKPOINTS)
    scores = ja.score(index, QUERIES, path=tmp_path / "scores", queries_at_once=4)
    assert scores.chunk_layout.write_chunk.shape[0] == 3  # else each group writes all anew
    expected = ja.score(index, QUERIES)
    np.testing.assert_allclose(scores.read().result(), expected, rtol=1e-12, atol=1e-14)


def test_wide_rows_are_read_a_few_at_a_time(finished_index, monkeypatch):
    index = ja.open_index(finished_index, IDENTITY, CHECKPOINTS)
    layout = index.rows.layout
    expected, top = ja.score(index, QUERIES), ja.top_k(index, QUERIES, k=3)
    row = layout.checkpoints * layout.widths["features"] * np.dtype(layout.wide).itemsize
    monkeypatch.setattr("jaxattr.store.rows._SLAB_BYTES", 2 * layout.block * row)
    slabs = list(index.rows.slabs(layout.side, 8192))
    assert {len(slab.arrays["features"]) for slab in slabs} == {2}
    np.testing.assert_array_equal(ja.score(index, QUERIES), expected)
    np.testing.assert_array_equal(ja.top_k(index, QUERIES, k=3).ids, top.ids)
    resident = ja.open_index(finished_index, IDENTITY, CHECKPOINTS, in_memory=True)
    whole = list(resident.rows.slabs(layout.side, layout.size))  # they are there anyway
    assert [len(slab.arrays["features"]) for slab in whole] == [layout.blocks]


def test_an_index_of_few_examples_is_extended_again_and_again(tmp_path):
    """Its blocks are of as many as it was begun with, which are fewer than batch_size."""
    x = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)

    def build_of(n, **options):
        method = ja.tracin(lambda params, example, key: jnp.sum((example @ params["w"]) ** 2))
        return ja.build_index(method, {"w": jnp.ones((4, 3))}, x[:n], **options)

    path = tmp_path / "index"
    build_of(4, path=path)
    for n in (6, 6, 9):
        index = build_of(n, path=path, extend=True)
        again = build_of(n, path=path)
        np.testing.assert_array_equal(ja.score(index, x), ja.score(again, x))
    np.testing.assert_allclose(ja.score(index, x), ja.score(build_of(9), x), rtol=1e-6)
    with pytest.raises(StoreError, match="index has 9 examples, got 8"):
        build_of(8, path=path)


def test_parameters_without_entries_are_kept(tmp_path):
    params = {"w": jnp.ones((3, 2)), "none": jnp.zeros((0, 2))}

    def loss(params, example, key):
        return jnp.sum(jnp.tanh(example @ params["w"])) + params["none"].sum()

    train = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    moments = jax.tree.map(lambda x: x + 1, params)
    method = ja.trackstar(loss, moments, params, rank=2)
    built = ja.build_index(method, params, train, path=tmp_path / "index")
    opened = ja.open_index(tmp_path / "index", method, params)
    np.testing.assert_array_equal(ja.score(opened, train), ja.score(built, train))
    dampings = [ja.absolute(1.0)]
    paths = ja.evaluation.damping_path(ja.trak(loss), params, train, dampings, groups=ja.by_leaf)
    whole = ja.build_index(ja.trak(loss, damping=dampings[0]), params, train, groups=ja.by_leaf)
    found = ja.score(next(iter(paths))[1], train)
    np.testing.assert_allclose(found, ja.score(whole, train), rtol=1e-6)


@pytest.mark.filterwarnings("ignore::jaxattr.weights.report.WeightWarning")
def test_weights_from_disk(finished_index, monkeypatch):
    """With a shortlist so short, and slabs so small, that several passes are due."""
    monkeypatch.setattr("jaxattr.weights.learning._SHORTEST", 8)
    monkeypatch.setattr("jaxattr.weights.learning._PER_TOP", 1)
    monkeypatch.setattr("jaxattr.scores.writing.SLAB", 16)
    index = ja.open_index(finished_index, IDENTITY, CHECKPOINTS)
    options = {"steps": 20, "top_k": 5}
    memory = ja.learn_weights(index, QUERIES, **options)
    monkeypatch.setattr("jaxattr.weights.learning._WHOLE_BYTES", 0)
    streamed = ja.learn_weights(index, QUERIES, **options)
    np.testing.assert_allclose(streamed.losses, memory.losses, rtol=1e-9)
    assert streamed.weights == pytest.approx(memory.weights, rel=1e-9)
    assert (streamed.hub, streamed.loss) == (memory.hub, pytest.approx(memory.loss))
    assert memory.passes == 1 and 1 < streamed.passes < 20


def test_attributor_needs_memory(finished_index):
    index = ja.open_index(finished_index, IDENTITY, CHECKPOINTS)
    with pytest.raises(ValueError, match="in_memory=True"):
        ja.attributor(index)
    loaded = ja.open_index(finished_index, IDENTITY, CHECKPOINTS, in_memory=True)
    expected = ja.top_k(index, QUERIES, k=4)
    np.testing.assert_array_equal(ja.attributor(loaded, k=4)(QUERIES).ids, expected.ids)


def test_examples_that_are_not_finite_stay_so(path):
    bad = TRAIN | {"x": TRAIN["x"].at[17].set(jnp.nan)}
    with pytest.warns(ja.NonFiniteWarning, match="ids 17"):
        memory = ja.build_index(TRAK, CHECKPOINTS, bad, batch_size=BATCH)
    with pytest.warns(ja.NonFiniteWarning, match="ids 17"):
        build(path, TRAK, train=bad)
    index = ja.open_index(path, TRAK, CHECKPOINTS)
    assert index.non_finite.tolist() == [17]
    np.testing.assert_array_equal(ja.score(index, QUERIES), ja.score(memory, QUERIES))
    assert 17 not in np.asarray(ja.top_k(index, QUERIES, k=SIZE).ids)


@pytest.mark.parametrize("method", [IDENTITY, TRAK], ids=lambda m: m.name)
def test_a_build_that_stops_goes_on_where_it_was(path, method, monkeypatch):
    monkeypatch.setattr("jaxattr.index.verifying._SAMPLES", 2)
    expected = ja.build_index(method, CHECKPOINTS, TRAIN, batch_size=BATCH)
    for stop in (19, 35):
        with pytest.raises(Stops):
            build(path, method, train=Interrupted(stop))
        with pytest.raises(StoreError, match="is not finished: of 7 blocks"):
            ja.open_index(path)
    done = max(finished(Folder(path)).values())
    assert done == 35 // BATCH - 1  # the block in flight was not written
    last = Interrupted()
    index = build(path, method, train=last)
    again = [i for i in last.read[:-1] if 0 < i < done * BATCH]
    assert len([i for i in again if i]) <= SIZE  # of the first checkpoint nothing but samples
    assert last.read.count(BATCH) == 1  # once, for the second checkpoint
    np.testing.assert_array_equal(index.features, expected.features)
    np.testing.assert_array_equal(ja.score(index, QUERIES), ja.score(expected, QUERIES))


def test_an_index_of_another_mesh_opens(path):
    method = ja.tracin(models.loss)
    mesh = jax.make_mesh((8,), ("data",))
    on_mesh = np.asarray(ja.score(build(path, method, mesh=mesh), QUERIES))
    for given in (None, jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])):
        opened = ja.open_index(path, method, CHECKPOINTS, mesh=given)
        got = np.asarray(ja.score(opened, QUERIES))
        assert models.relative_error(got, on_mesh) <= 1e-12
    build(path, method)  # and goes on without a mesh


def test_a_finished_index_is_only_opened(path):
    build(path)
    source = Interrupted()
    build(path, train=source)
    assert len(source.read) <= 64 + 2  # for the fingerprint and the shapes


def test_places_that_hold_no_index(tmp_path):
    with pytest.raises(StoreError, match="There is no index at"):
        ja.open_index(tmp_path)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match="is not empty and holds no index .found thesis.tex"):
        build(tmp_path)
    with pytest.raises(StoreError, match="Cannot write /proc/nothing/.*may be written"):
        build("/proc/nothing")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="manifest.json is damaged: it is no JSON"):
        ja.open_index(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    for call in (ja.open_index, build):
        with pytest.raises(StoreError, match="has format 99, and this version .* format 3"):
            call(tmp_path)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_block_is_found_and_named(path, damage):
    build(path)
    chunk = path / "features" / "c" / "3" / "1" / "0"
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    if damage == "missing":
        chunk.unlink()
    else:
        chunk.write_bytes(content if damage == "flipped" else content[:50])
    index = ja.open_index(path, IDENTITY, CHECKPOINTS)
    damaged = pytest.raises(StoreError, match="features is damaged at or after block 3")
    with models.slabs_of(BATCH), damaged:
        ja.top_k(index, QUERIES)


def test_full_disk(tmp_path):
    """Files that may not grow stand for it; what was finished stays, and the build goes on."""
    program = (
        "import resource, sys\nfrom tests import test_store as t\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "t.build(sys.argv[1])"
    )

    command = [sys.executable, "-c", program, str(tmp_path / "index")]
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    failed = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert failed.returncode and "Cannot write" in failed.stderr
    assert "space left" in failed.stderr
    build(tmp_path / "index")


def test_an_index_larger_than_the_disk_is_not_begun(path, monkeypatch):
    monkeypatch.setattr(Folder, "free_bytes", lambda self: 100)
    with pytest.raises(StoreError, match="needs .* GB at .*, and 1e-07 GB are free"):
        build(path)
    assert not (path / "manifest.json").exists()


def test_extending(path):
    build(path)
    longer = models.data(SIZE + 20, seed=4)
    grown = jax.tree.map(lambda a, b: jnp.concatenate([a, b[SIZE:]]), TRAIN, longer)
    expected = ja.build_index(IDENTITY, CHECKPOINTS, grown, batch_size=BATCH)
    index = build(path, train=grown, extend=True)
    assert index.size == SIZE + 20
    np.testing.assert_array_equal(ja.score(index, QUERIES), ja.score(expected, QUERIES))
    assert build(path, train=grown).size == SIZE + 20
    with pytest.raises(StoreError, match="it has 73 examples, and train has only 53"):
        build(path, train=TRAIN, extend=True)
    with pytest.raises(StoreError, match="train: x of .* examples differs"):
        build(path, train=models.data(SIZE + 40, seed=8), extend=True)


def test_an_index_that_is_extended_elsewhere_has_to_be_opened_again(path):
    build(path)
    opened = ja.open_index(path, IDENTITY, CHECKPOINTS)
    longer = models.data(SIZE + 20, seed=4)
    grown = jax.tree.map(lambda a, b: jnp.concatenate([a, b[SIZE:]]), TRAIN, longer)
    build(path, train=grown, extend=True)
    with pytest.raises(StoreError, match="extended since it was opened here, open it again"):
        ja.score(opened, QUERIES)


def test_columns_may_be_apart(path):
    rows = build(path).rows
    whole = rows.column("features", 1)
    np.testing.assert_array_equal(rows.column("features", 1, slice(1, None, 3)), whole[:, 1::3])


def test_extending_goes_on_wherever_it_was_killed(path, monkeypatch):
    """Killed before each change of a file; the same call then ends with the same index."""
    grown = models.data(SIZE + 20, seed=4)
    build(path, train=jax.tree.map(lambda x: x[:SIZE], grown))
    expected = ja.build_index(IDENTITY, CHECKPOINTS, grown, batch_size=BATCH).features
    for point in itertools.count(1):
        place, changes = shutil.copytree(path, path.with_name(f"killed-{point}")), []

        def stopping(change, point=point, changes=changes):
            def changed(*arguments, **options):
                changes.append(change)
                if len(changes) == point:
                    raise Stops
                return change(*arguments, **options)

            return changed

        with monkeypatch.context() as patched, contextlib.suppress(Stops):
            for kind, name in (Folder, "write"), (Folder, "delete"), (DiskRows, "create"):
                patched.setattr(kind, name, stopping(getattr(kind, name)))
            build(place, train=grown, extend=True)
        if len(changes) < point:
            break
        index = build(place, train=grown, extend=True)
        np.testing.assert_array_equal(index.features, expected)
    assert point > 10


def test_extending_is_refused_where_the_kernel_depends_on_all(path):
    build(path, TRAK)
    with pytest.raises(StoreError, match="TRAK has a kernel that depends on all training"):
        build(path, TRAK, train=models.data(SIZE + 20), extend=True)
    with pytest.raises(ValueError, match="extend=True adds to an index on disk: give its path"):
        build(None, extend=True)


def test_extending_is_refused_where_the_basis_is_fitted_to_all(path):
    rule = ja.logra(models.loss, rank=3, basis="pca").rule
    method = ja.Method("PCA", rule, kernels.Identity())
    scores = ja.score(build(path, method), QUERIES)
    grown = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), TRAIN, models.data(20, seed=4))
    with pytest.raises(StoreError, match="PCA has a basis that is fitted to all training"):
        build(path, method, train=grown, extend=True)
    # And the index is as it was.
    found = ja.score(ja.open_index(path, method, CHECKPOINTS), QUERIES)
    np.testing.assert_array_equal(found, scores)


def test_a_build_goes_on_with_other_hosts_if_they_share_no_chunk(path, monkeypatch):
    monkeypatch.setattr("jaxattr.index.verifying._SAMPLES", 2)
    expected = ja.build_index(IDENTITY, CHECKPOINTS, TRAIN, batch_size=BATCH)
    halves = lambda self, rows: [0, rows // 2, rows]  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(Placement, "boundaries", halves)  # two hosts
        with pytest.raises(Stops):
            build(path, train=Interrupted(19))
    index = build(path)  # one host goes on
    np.testing.assert_array_equal(index.features, expected.features)
    other = path.parent / "other"
    with pytest.raises(Stops):
        build(other, train=Interrupted(19))
    monkeypatch.setattr(Placement, "boundaries", halves)
    with pytest.raises(StoreError, match="chunks of 8 .* rows .4. of a block, so two would"):
        build(other)


def test_an_index_of_few_examples_grows(path):
    """Built with fewer examples than a batch has."""
    few = jax.tree.map(lambda x: x[:5], TRAIN)
    build(path, train=few)
    index = build(path, train=TRAIN, extend=True)
    expected = ja.build_index(IDENTITY, CHECKPOINTS, TRAIN, batch_size=BATCH)
    got, right = (np.asarray(ja.score(each, QUERIES)) for each in (index, expected))
    np.testing.assert_allclose(got, right, rtol=1e-12)
