"""Features in a byte each: how far off they are, and that nothing else changes."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr.index.summary import check, export_zarr, summarize
from jaxattr.store.compression import compress, widen
from jaxattr.store.folder import StoreError
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

SIZES = (3e38, 1.0, 1e-30)

INT8, FLOAT8 = jnp.int8, jnp.float8_e4m3fn
BOTH = pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=["int8", "float8"])
METHODS = {
    "TracIn": lambda: IDENTITY,
    "TRAK": lambda: TRAK,
    "EK-FAC": lambda: ja.ekfac(models.loss),
}


def rows(b=5, p=150, seed=0):
    return np.random.default_rng(seed).normal(size=(b, p)).astype(np.float32)


def largest_of_runs(phi):
    """Of the 64 columns that a column is among, by a loop."""
    found = np.empty_like(phi)
    for start in range(0, phi.shape[1], 64):
        found[:, start : start + 64] = np.abs(phi[:, start : start + 64]).max(1, keepdims=True)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_whole_numbers_are_off_by_half_a_step_of_their_run(size):
    phi = rows()
    phi[1, 3] *= 100  # its run is coarse, and no other
    phi *= np.float32(size / np.abs(phi).max())
    numbers, scales = compress(jnp.asarray(phi), INT8)
    assert numbers.shape == phi.shape and numbers.dtype == INT8 and scales.shape == (5, 3)
    got = np.asarray(widen(numbers, scales), np.float64)
    steps = largest_of_runs(phi.astype(np.float64)) / 127
    assert (np.abs(got - phi) <= 0.5001 * steps).all()
    assert (np.abs(got - phi).max() > 0.3 * steps.min()).all()  # and no better by chance
    at_the_top = np.abs(phi) == largest_of_runs(phi)
    np.testing.assert_array_equal(got[at_the_top], phi[at_the_top])


@pytest.mark.parametrize("size", SIZES)
def test_short_floats_are_off_by_a_sixteenth_of_themselves(size):
    phi = rows() * np.float32(size / np.abs(rows()).max())
    numbers, scales = compress(jnp.asarray(phi), FLOAT8)
    assert numbers.shape == phi.shape and numbers.dtype == FLOAT8 and scales.shape == (5, 1)
    got = np.asarray(widen(numbers, scales), np.float64)
    largest = np.abs(phi.astype(np.float64)).max(axis=1, keepdims=True)
    assert (np.abs(got - phi) <= np.maximum(np.abs(phi) / 15.9, 2.0**-10 / 448 * largest)).all()


@BOTH
def test_what_is_zero_or_not_finite_stays_so(dtype):
    phi = rows()
    phi[0], phi[1, 70], phi[2, 5] = 0, np.inf, np.nan
    got = np.asarray(widen(*compress(jnp.asarray(phi), dtype)))
    assert (got[0] == 0).all()
    assert np.isnan(got[1, 64:128]).all() and np.isnan(got[2, :64]).all()
    assert np.isfinite(got[3:]).all()


@BOTH
def test_some_columns_are_those_of_all(dtype):
    numbers, scales = compress(jnp.asarray(rows()), dtype)
    part = widen(numbers[:, 60:140], scales, jnp.asarray(60))
    np.testing.assert_array_equal(part, widen(numbers, scales)[:, 60:140])


@BOTH
def test_compressing_again_changes_nothing(dtype):
    numbers, scales = compress(jnp.asarray(rows()), dtype)
    again = compress(widen(numbers, scales), dtype)
    np.testing.assert_array_equal(np.asarray(again[0], np.float32), np.asarray(numbers, np.float32))
    np.testing.assert_array_equal(again[1], scales)


@pytest.mark.parametrize(
    ("name", "dtype"), [("TracIn", INT8), ("TracIn", FLOAT8), ("TRAK", INT8), ("EK-FAC", FLOAT8)]
)
def test_on_disk_is_in_memory_and_near_to_exact(tmp_path, name, dtype):
    method = METHODS[name]()
    exact = ja.build_index(method, CHECKPOINTS, TRAIN, batch_size=BATCH)
    memory = ja.build_index(method, CHECKPOINTS, TRAIN, batch_size=BATCH, dtype=dtype)
    path = build(tmp_path / "index", method, dtype=dtype).path
    scores = ja.score(memory, QUERIES)
    assert 1e-5 < models.relative_error(scores, ja.score(exact, QUERIES)) < 0.05
    assert memory.precision == np.dtype(dtype).name
    for index in (
        build(path, method, dtype=dtype),
        ja.open_index(path, method, CHECKPOINTS),
        ja.open_index(path, method, CHECKPOINTS, in_memory=True),
    ):
        np.testing.assert_array_equal(ja.score(index, QUERIES), scores)
        np.testing.assert_array_equal(index.features, memory.features)
        np.testing.assert_array_equal(ja.self_influence(index), ja.self_influence(memory))
        with models.slabs_of(16):
            top = ja.top_k(index, QUERIES, k=9)
        np.testing.assert_array_equal(top.ids, jax.lax.top_k(scores, 9)[1])
        everything = np.tile(np.arange(SIZE), (6, 1))
        with models.slabs_of(16):
            again = ja.top_k(index, QUERIES, k=9, among=everything)
        np.testing.assert_array_equal(again.ids, top.ids)


def test_the_scores_are_those_of_the_widened_features():
    index = ja.build_index(IDENTITY, CHECKPOINTS, TRAIN, batch_size=BATCH, dtype=INT8)
    phi = np.asarray(ja.query_features(index, QUERIES).features)
    expected = phi @ index.features.T
    assert models.relative_error(ja.score(index, QUERIES), expected) <= 1e-12
    parts = ja.contributions(index, QUERIES)
    assert models.relative_error(parts.sum(axis=-1), expected) <= 1e-12
    attribute = ja.attributor(index, k=5)
    np.testing.assert_array_equal(
        attribute(QUERIES).ids, jax.lax.top_k(jnp.asarray(expected), 5)[1]
    )


@pytest.mark.parametrize(
    ("mesh", "dtype"), [(((8,), ("data",)), INT8), (((4, 2), ("data", "model")), FLOAT8)]
)
def test_on_any_mesh(tmp_path, mesh, dtype):
    mesh, path = jax.make_mesh(*mesh), tmp_path / "index"
    plain = build(path, TRAK, dtype=dtype)
    scores = ja.score(plain, QUERIES)
    spread = ja.build_index(TRAK, CHECKPOINTS, TRAIN, batch_size=BATCH, dtype=dtype, mesh=mesh)
    opened = ja.open_index(path, TRAK, CHECKPOINTS, mesh=mesh)
    in_memory = ja.open_index(path, TRAK, CHECKPOINTS, mesh=mesh, in_memory=True)
    for index in (opened, in_memory):
        assert models.relative_error(ja.score(index, QUERIES), scores) <= 1e-9
        np.testing.assert_array_equal(index.features, plain.features)
    assert models.relative_error(ja.score(spread, QUERIES), scores) <= 0.02  # sums in another order


@pytest.mark.filterwarnings("ignore::jaxattr.weights.report.WeightWarning")
def test_weights_are_learned_from_it(tmp_path, monkeypatch):
    index = build(tmp_path / "index", dtype=INT8)
    options = {"steps": 20, "top_k": 5}
    memory = ja.learn_weights(index, QUERIES, **options)
    monkeypatch.setattr("jaxattr.weights.learning._WHOLE_BYTES", 0)
    streamed = ja.learn_weights(index, QUERIES, **options)
    np.testing.assert_allclose(streamed.losses, memory.losses, rtol=1e-9)


@pytest.mark.parametrize(("method", "dtype"), [(IDENTITY, FLOAT8), (TRAK, INT8)])
def test_a_build_that_stops_goes_on_where_it_was(tmp_path, method, dtype):
    expected = ja.build_index(method, CHECKPOINTS, TRAIN, batch_size=BATCH, dtype=dtype)
    for stop in (19, 35):
        with pytest.raises(Stops):
            build(tmp_path / "index", method, train=Interrupted(stop), dtype=dtype)
    index = build(tmp_path / "index", method, dtype=dtype)
    np.testing.assert_array_equal(index.features, expected.features)
    np.testing.assert_array_equal(ja.score(index, QUERIES), ja.score(expected, QUERIES))


def test_extending(tmp_path):
    build(tmp_path / "index", dtype=INT8)
    longer = models.data(SIZE + 20, seed=4)
    grown = jax.tree.map(lambda a, b: jnp.concatenate([a, b[SIZE:]]), TRAIN, longer)
    expected = ja.build_index(IDENTITY, CHECKPOINTS, grown, batch_size=BATCH, dtype=INT8)
    index = build(tmp_path / "index", train=grown, extend=True, dtype=INT8)
    np.testing.assert_array_equal(ja.score(index, QUERIES), ja.score(expected, QUERIES))


@pytest.mark.parametrize(
    ("dtype", "array", "damage"),
    [(INT8, "features", "missing"), (FLOAT8, "scales", "flipped"), (INT8, "scales", "displaced"),
     (FLOAT8, "features", "missing")],
)  # fmt: skip
def test_damage_is_found_and_named(tmp_path, dtype, array, damage):
    path = pathlib.Path(build(tmp_path / "index", dtype=dtype).path)
    assert not check(path).damaged
    chunk = path / array / "c" / "3" / "1" / "0"
    content = bytearray(chunk.read_bytes())
    content[4] ^= 1
    if damage == "missing":
        chunk.unlink()
    elif damage == "flipped":
        chunk.write_bytes(content)
    else:
        chunk.write_bytes((path / array / "c" / "2" / "1" / "0").read_bytes())
    (found,) = check(path).damaged
    assert f"{array}/c/3/1/0" in found
    damaged = pytest.raises(StoreError, match=f"{array} is damaged at or after block 3")
    with models.slabs_of(BATCH), damaged:
        ja.top_k(ja.open_index(path, IDENTITY, CHECKPOINTS), QUERIES)


def test_another_dtype_is_another_index(tmp_path):
    build(tmp_path / "index", dtype=INT8)
    with pytest.raises(StoreError, match="rows.dtypes.features: the index has int8, got float64"):
        build(tmp_path / "index")
    assert summarize(tmp_path / "index").dtype == "int8"


def test_examples_that_are_not_finite_stay_so(tmp_path):
    bad = TRAIN | {"x": TRAIN["x"].at[17].set(jnp.nan)}
    with pytest.warns(ja.NonFiniteWarning, match="ids 17"):
        build(tmp_path / "index", TRAK, train=bad, dtype=INT8)
    index = ja.open_index(tmp_path / "index", TRAK, CHECKPOINTS)
    assert index.non_finite.tolist() == [17]
    assert 17 not in np.asarray(ja.top_k(index, QUERIES, k=SIZE).ids)


def test_an_index_is_a_quarter_as_large():
    plans = {
        dtype: ja.plan(IDENTITY, CHECKPOINTS, TRAIN, dtype=dtype, on_disk=on_disk).index_bytes
        for dtype, on_disk in ((jnp.float32, False), (INT8, False))
    }
    features = SIZE * len(CHECKPOINTS) * 107  # as many as the model has parameters
    assert plans[jnp.float32] - plans[INT8] == 3 * features - SIZE * len(CHECKPOINTS) * 2 * 8


def test_features_are_exported_as_floats(tmp_path):
    import tensorstore as ts

    index = build(tmp_path / "index", dtype=INT8)
    export_zarr(tmp_path / "index", tmp_path / "out")
    spec = {"driver": "zarr3", "kvstore": f"file://{tmp_path}/out"}
    got = ts.open(spec).result().read().result()
    np.testing.assert_array_equal(got.reshape(SIZE, -1), index.features)


def linear(params, example, key):
    """Its gradient is the example."""
    return params["w"] @ example["x"]


@BOTH
@pytest.mark.parametrize("factor", [1e20, 3e37, 1e-20, 1e-30])
def test_huge_and_tiny_gradients_are_ranked_as_they_are(factor, dtype):
    x = rows(12, 3)
    x = x * np.where(np.arange(12) == 2, factor, 1)[:, None].astype(np.float32)
    params = {"w": jnp.ones(3, jnp.float32)}
    index = ja.build_index(ja.tracin(linear), params, {"x": x}, dtype=dtype)
    got = np.asarray(ja.score(index, {"x": rows(4, 3, seed=1)}))
    expected = rows(4, 3, seed=1).astype(np.float64) @ x.astype(np.float64).T
    size = np.abs(rows(4, 3, seed=1)).astype(np.float64) @ np.abs(x).astype(np.float64).T
    assert (np.abs(got - expected) <= 0.07 * size).all()


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float8_e5m2, jnp.float16, np.int32])
def test_other_types_are_refused(dtype):
    with pytest.raises(ValueError, match="must be float32, bfloat16, int8 or float8_e4m3fn, got"):
        ja.build_index(IDENTITY, CHECKPOINTS, TRAIN, dtype=dtype)


def test_a_damping_path_needs_longer_features():
    with pytest.raises(ValueError, match="and int8 is too short for that: leave dtype out"):
        ja.evaluation.damping_path(TRAK, CHECKPOINTS, TRAIN, [ja.relative(0.1)], dtype=INT8)
