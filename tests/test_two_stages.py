"""A top k among candidates is that of the scores, of these candidates alone."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr.features import projections
from jaxattr.store.folder import StoreError
from tests import models

SIZE, BATCH, K = 101, 16, 7
TRAIN, QUERIES = models.data(SIZE), models.data(6, seed=1)
CHECKPOINTS = [models.mlp_params(jax.random.key(i)) for i in range(2)]
WEIGHTS = {"layer0": 0.2, "layer1": 2.5, "layer2": 0.0}
METHODS = {
    "tracin": ja.tracin(models.loss, projection=projections.rademacher(12)),
    "trak": ja.trak(models.margin),
    "ekfac": ja.ekfac(models.loss),
}
MESHES = {"8": ((8,), ("data",)), "4x2": ((4, 2), ("data", "model"))}
CHEAP = ja.grad_cos(models.loss, projection=projections.rademacher(4))


@functools.cache
def index(name="tracin", mesh=None):
    given = None if mesh is None else jax.make_mesh(*MESHES[mesh])
    return ja.build_index(METHODS[name], CHECKPOINTS, TRAIN, batch_size=BATCH, mesh=given)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    path = tmp_path_factory.mktemp("index")
    return ja.build_index(METHODS["tracin"], CHECKPOINTS, TRAIN, batch_size=BATCH, path=path)


def candidates(count=20, seed=0):
    """Different ones for each query, with one of them twice, and a place left empty."""
    draw = np.random.default_rng(seed).permuted(np.tile(np.arange(SIZE), (6, 1)), axis=1)
    ids = draw[:, :count]
    ids[:, 3] = ids[:, 0]
    ids[1, 5] = -1
    return ids


def expected(scores, ids, k=K):
    """Of the full scores, all but the candidates struck out."""
    masked = np.full(scores.shape, -np.inf)
    for query, row in enumerate(ids):
        chosen = row[row >= 0]
        masked[query, chosen] = scores[query, chosen]
    order = np.argsort(-masked, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(masked, order, axis=1)
    return np.where(np.isfinite(found), order, -1), np.where(np.isfinite(found), found, np.nan)


def check(top, scores, ids, k=K):
    order, strengths = expected(np.asarray(scores), ids, k)
    np.testing.assert_array_equal(top.ids, order)
    np.testing.assert_allclose(top.scores, strengths, rtol=1e-9)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("block_size", [1, 1000])
def test_the_top_of_the_candidates_alone(name, block_size):
    ids, built = candidates(), index(name)
    with models.slabs_of(block_size):
        top = ja.top_k(built, QUERIES, k=K, among=ids, weights=WEIGHTS)
    check(top, ja.score(built, QUERIES, weights=WEIGHTS), ids)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("disk", [False, True])
def test_on_a_mesh(mesh, disk, on_disk):
    ids, built = candidates(), index(mesh=mesh)
    if disk:
        built = ja.open_index(on_disk.path, METHODS["tracin"], CHECKPOINTS, mesh=built.place.mesh)
    for block_size in (5, 1000):
        with models.slabs_of(block_size):
            top = ja.top_k(built, QUERIES, k=K, among=ids)
        check(top, ja.score(index(), QUERIES), ids)


def test_opponents():
    top = ja.top_k(index(), QUERIES, k=K, among=candidates(), opponents=True)
    order, _ = expected(-np.asarray(ja.score(index(), QUERIES)), candidates())
    np.testing.assert_array_equal(top.ids, order)


def test_all_as_candidates_are_a_top_k():
    everything = np.tile(np.arange(SIZE), (6, 1))
    top = ja.top_k(index(), QUERIES, k=K, among=everything)
    np.testing.assert_array_equal(top.ids, ja.top_k(index(), QUERIES, k=K).ids)


@pytest.mark.parametrize("as_given", [
    lambda top: top, lambda top: top.ids, lambda top: np.asarray(top.ids, np.uint8),
    lambda top: np.asarray(top.ids).tolist(),
])  # fmt: skip
def test_what_a_cheap_index_found(as_given):
    cheap = ja.build_index(CHEAP, CHECKPOINTS, TRAIN, batch_size=BATCH)
    found = ja.top_k(cheap, QUERIES, k=20)
    top = ja.top_k(index("ekfac"), QUERIES, k=K, among=as_given(found))
    check(top, ja.score(index("ekfac"), QUERIES), np.asarray(found.ids))


def test_from_disk_only_the_chunks_of_candidates_are_read(on_disk):
    """Chunks of the others are gone, and it does not show."""
    built = ja.build_index(
        METHODS["tracin"], CHECKPOINTS, TRAIN, batch_size=BATCH, path=f"{on_disk.path}-2"
    )
    ids = np.where(candidates() % BATCH < 8, candidates() % BATCH, 80 + candidates() % BATCH)
    scores = ja.score(built, QUERIES)
    for number in range(1, 5):
        for name in ("features", "examples"):
            for column in "01":
                (on_disk_chunk(built, name, number, column)).unlink()
    check(ja.top_k(built, QUERIES, k=K, among=ids), scores, ids)
    with pytest.raises(StoreError, match="features is damaged at or after block 2"):
        ja.top_k(built, QUERIES, k=K, among=np.full((6, K), 40))


def on_disk_chunk(built, name, number, column):
    return pathlib.Path(built.path) / name / "c" / str(number) / column / "0"


def test_a_displaced_chunk_is_found(on_disk):
    built = ja.build_index(
        METHODS["tracin"], CHECKPOINTS, TRAIN, batch_size=BATCH, path=f"{on_disk.path}-3"
    )
    there, other = (on_disk_chunk(built, "features", number, "0") for number in (1, 2))
    there.write_bytes(other.read_bytes())
    built = ja.open_index(built.path, METHODS["tracin"], CHECKPOINTS)
    with pytest.raises(StoreError, match="is not the one that was written there, but another"):
        ja.top_k(built, QUERIES, k=1, among=np.full((6, 1), BATCH + 1))


def test_fewer_candidates_than_wanted_leave_places_empty():
    ids = np.full((6, 4), -1)
    ids[0, :2], ids[2] = [9, 9], [5, 6, 7, 8]
    check(ja.top_k(index(), QUERIES, k=4, among=ids), ja.score(index(), QUERIES), ids, k=4)
    none = ja.top_k(index(), QUERIES, k=2, among=np.full((6, 4), -1))
    assert (np.asarray(none.ids) == -1).all() and np.isnan(none.scores).all()


def test_candidates_that_are_not_finite_are_named_and_never_ranked():
    bad = TRAIN | {"x": TRAIN["x"].at[17].set(jnp.nan)}
    with pytest.warns(ja.NonFiniteWarning, match="ids 17"):
        built = ja.build_index(METHODS["tracin"], CHECKPOINTS, bad, batch_size=BATCH)
    ids = np.tile([3, 17, 40], (6, 1))
    with pytest.warns(ja.NonFiniteWarning, match="1 of the 3 candidates .* not ranked: ids 17"):
        top = ja.top_k(built, QUERIES, k=3, among=ids)
    without = np.where(ids == 17, -1, ids)
    check(top, ja.score(built, QUERIES), without, k=3)


def test_queries_that_are_not_finite_have_none():
    bad = QUERIES | {"x": QUERIES["x"].at[2].set(jnp.nan)}
    with pytest.warns(ja.NonFiniteWarning, match="ids 2"):
        top = ja.top_k(index(), bad, k=K, among=candidates())
    assert (np.asarray(top.ids[2]) == -1).all() and np.isnan(top.scores[2]).all()
    assert (np.asarray(top.ids[0]) >= 0).all()


@pytest.mark.parametrize(
    ("among", "message"),
    [
        (np.zeros((6, 9)), r"must be integers \[queries, candidates\].*got float64 \[6, 9\]"),
        (np.ones((6, 9), bool), r"got bool \[6, 9\]"),
        (np.zeros(6, int), r"got int64 \[6\]"),
        ([[1, 2], [3]], r"got \[\[1, 2\], \[3\]\]"),
        ("all", "got 'all'"),
        (np.zeros((5, 9), int), r"a row of ids for each of the 6 queries, got \[5, 9\]"),
        (np.full((6, 9), SIZE), f"between 0 and {SIZE - 1}.*or -1 for none; got {SIZE} for quer"),
        (np.full((6, 9), -2), "or -1 for none; got -2 for query 0"),
        (np.zeros((6, 3), int), "k must be between 1 and the 3 candidates that among has"),
        (np.zeros((6, 0), int), "k must be between 1 and the 0 candidates that among has"),
    ],
)  # fmt: skip
def test_what_is_no_candidates(among, message):
    with pytest.raises(ValueError, match=message):
        ja.top_k(index(), QUERIES, k=K, among=among)
