"""The same numbers on any mesh, and nothing moves between devices but what must."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxattr as ja
from jaxattr.features import projections
from jaxattr.features.bases import NOTHING
from jaxattr.fitting import passes
from jaxattr.index.checkpoint_builds import _kernel_sums
from jaxattr.scores import ranking
from jaxattr.sharding import DATA, Placement, placement
from jaxattr.sources import as_source
from jaxattr.weights import optimising, shortlists
from jaxattr.weights.optimising import FitOptions
from tests import models

SIZE, BATCH = 101, 16
TRAIN, QUERIES = models.data(SIZE), models.data(6, seed=1)
CHECKPOINTS = [models.mlp_params(jax.random.key(i)) for i in range(2)]
METHODS = {
    "tracin": ja.tracin(models.loss, checkpoint_weights=[0.3, 2.0]),
    "trak": ja.trak(models.margin, projection=projections.identity()),
    "ekfac": ja.ekfac(models.loss),
}
MESHES = {"1": ((1,), ("data",)), "8": ((8,), ("data",)), "4x2": ((4, 2), ("data", "model"))}
QUIET = pytest.mark.filterwarnings("ignore::jaxattr.weights.report.WeightWarning")
EXPONENT = jnp.asarray(0, jnp.int32)


def mesh_of(name):
    return jax.make_mesh(*MESHES[name])


@functools.cache
def built(method, mesh=None):
    given = None if mesh is None else mesh_of(mesh)
    return ja.build_index(METHODS[method], CHECKPOINTS, TRAIN, batch_size=BATCH, mesh=given)


@QUIET
@pytest.mark.parametrize(("method", "mesh"), [
    ("tracin", "1"), ("trak", "8"), ("ekfac", "4x2"),
])  # fmt: skip
def test_any_mesh_gives_the_same_numbers(method, mesh, monkeypatch):
    plain, spread = built(method), built(method, mesh)
    scores, expected = ja.score(spread, QUERIES), ja.score(plain, QUERIES)
    assert models.relative_error(scores, expected) <= 1e-9
    with models.slabs_of(32):
        top = ja.top_k(spread, QUERIES, k=30)
    np.testing.assert_array_equal(top.ids, jax.lax.top_k(expected, 30)[1])
    np.testing.assert_array_equal(ja.attributor(spread, k=30)(QUERIES).ids, top.ids)
    parts = ja.contributions(spread, QUERIES)
    assert models.relative_error(parts, ja.contributions(plain, QUERIES)) <= 1e-9
    selves = ja.self_influence(spread)
    assert models.relative_error(selves, ja.self_influence(plain)) <= 1e-9
    fit = ja.learn_weights(plain, QUERIES, steps=8)
    monkeypatch.setattr("jaxattr.weights.learning._WHOLE_BYTES", 0)
    on_mesh = ja.learn_weights(spread, QUERIES, steps=8)
    np.testing.assert_allclose(on_mesh.losses, fit.losses, rtol=1e-9)


def test_ties_go_to_the_lower_id_on_any_mesh():
    same = jax.tree.map(lambda x: jnp.repeat(x[:1], SIZE, axis=0), TRAIN)
    for mesh in (None, mesh_of("8")):
        index = ja.build_index(METHODS["tracin"], CHECKPOINTS, same, batch_size=BATCH, mesh=mesh)
        top = ja.top_k(index, QUERIES, k=9)
        np.testing.assert_array_equal(top.ids, np.tile(np.arange(9), (6, 1)))


WIDE = models.mlp_params(sizes=(6, 16, 8, 3))


@functools.cache
def scores_of_wide():
    return ja.score(ja.build_index(METHODS["trak"], WIDE, TRAIN, batch_size=BATCH), QUERIES)


@pytest.mark.parametrize("spec", ["fsdp", "tensor"])
def test_params_may_be_sharded(spec):
    """As a training job has them: over the data axis (FSDP), or over the model axis."""
    mesh = mesh_of("4x2") if spec == "tensor" else mesh_of("8")
    axis = "model" if spec == "tensor" else "data"

    def spread(leaf):
        size = mesh.shape[axis]
        fits = [i for i, n in enumerate(leaf.shape) if n % size == 0]
        names = [axis if fits and i == fits[0] else None for i in range(leaf.ndim)]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*names)))

    sharded = jax.tree.map(spread, WIDE)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(sharded))
    index = ja.build_index(METHODS["trak"], sharded, TRAIN, batch_size=BATCH, mesh=mesh)
    assert models.relative_error(ja.score(index, QUERIES), scores_of_wide()) <= 1e-9
    kept = jax.tree.leaves(index.checkpoints[0])
    assert any(not leaf.is_fully_replicated for leaf in kept)


@pytest.mark.parametrize("mesh", [None, "8"])
def test_arrays_on_a_mesh_of_explicit_axes_are_taken(mesh):
    """As `jax.make_mesh` makes it: each operation would have to say where its result lies."""
    explicit = jax.make_mesh((8,), ("data",))
    first = NamedSharding(explicit, PartitionSpec("data"))
    whole = NamedSharding(explicit, PartitionSpec())
    params = jax.device_put(CHECKPOINTS, whole)
    train, queries = (
        jax.tree.map(lambda x: jax.device_put(np.asarray(x)[: len(x) // 8 * 8], first), data)
        for data in (TRAIN, models.data(8, seed=1))
    )
    given = None if mesh is None else mesh_of(mesh)
    index = ja.build_index(METHODS["tracin"], params, train, batch_size=BATCH, mesh=given)
    plain = ja.build_index(METHODS["tracin"], CHECKPOINTS, jax.tree.map(np.asarray, train))
    expected = ja.score(plain, jax.tree.map(np.asarray, queries))
    assert models.relative_error(ja.score(index, queries), expected) <= 1e-9
    top = ja.attributor(index, k=3)(queries)
    np.testing.assert_array_equal(top.ids, jax.lax.top_k(expected, 3)[1])
    ja.plan(METHODS["tracin"], params, train, mesh=given)


def test_microbatches_on_a_mesh():
    index = ja.build_index(
        METHODS["trak"], CHECKPOINTS, TRAIN, batch_size=40, microbatch=3, mesh=mesh_of("8")
    )
    assert (index.batch_size, index.featurizer.microbatch) == (48, 24)
    expected = ja.score(built("trak"), QUERIES)
    assert models.relative_error(ja.score(index, QUERIES), expected) <= 1e-8


def test_a_mesh_without_a_data_axis_is_refused():
    with pytest.raises(ValueError, match=r"axes \('x',\); .* named \"data\""):
        ja.build_index(METHODS["tracin"], CHECKPOINTS, TRAIN, mesh=jax.make_mesh((8,), ("x",)))


def test_nothing_that_is_spread_is_put_without_a_place(monkeypatch):
    """With several hosts JAX refuses it, as it does here."""
    put = jax.device_put

    def refusing(x, device=None, **options):
        arrays = [leaf for leaf in jax.tree.leaves(x) if isinstance(leaf, jax.Array)]
        assert device is not None or all(len(leaf.devices()) == 1 for leaf in arrays)
        return put(x, device, **options)

    monkeypatch.setattr(jax, "device_put", refusing)
    index = ja.build_index(
        METHODS["trak"], CHECKPOINTS, TRAIN, batch_size=BATCH, mesh=mesh_of("8"), store=False
    )
    assert models.relative_error(ja.score(index, QUERIES), ja.score(built("trak"), QUERIES)) <= 1e-8


def collectives(function, *arguments):
    """What moves between devices in a compiled program, by kind."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", text))


def step_arguments(index, place):
    size = index.rows.layout.block
    read = as_source(TRAIN, "train").read
    numbers = place.batch(lambda rows: rows, np.arange(size))
    key, drawn = index.featurizer.key, index.drawn[0]
    return key, index.checkpoints[0], place.batch(read, np.arange(size)), numbers, drawn, NOTHING


def weight_loop(listed):
    options = FitOptions(5, False, None, 4)
    _, loop = optimising.begin(jax.random.key(0), 6, 3, options)
    given = (np.arange(6), loop, np.ones(3), 1.0, 0.1, options)
    return lambda listed: optimising.run(listed, *given), listed


@pytest.mark.parametrize("mesh", ["8", "4x2"])
def test_only_sums_and_merges_move_between_devices(mesh):
    index = built("trak", mesh)
    place, layout = index.place, index.layout
    columns = {"all-reduce"} if mesh == "4x2" else set()  # sums over the columns of features
    features = passes._compiled_features(place, index.featurizer.step)
    arguments = step_arguments(index, place)
    assert not collectives(features, *arguments)

    phi, kept = features(*arguments).features, arguments[3] >= 0
    sums = _kernel_sums(index.method.kernel, layout, SIZE, phi.dtype)
    each = jax.jit(place.per_shard(sums))
    assert not collectives(each, 0, phi, kept)
    total = collectives(place.sum_of_shards, each(0, phi, kept))
    assert set(total) == {"all-reduce"}

    w, queries = place.whole((jnp.ones(3), ja.query_features(index, QUERIES).features))
    arrays = {name: index.rows.arrays[name] for name in ("features", "examples")}
    weighted = ranking.weigh_step(place, layout)(w, queries, EXPONENT)
    assert set(collectives(ranking.score_step(place, "identity"), weighted, arrays)) == columns
    search = ranking.top_k_of_arrays(place, layout, "identity", 5, 2, 1)
    merged = collectives(search, w, queries, arrays, EXPONENT)
    assert set(merged) == {"all-gather"} | columns and merged["all-gather"] <= 2

    start, absorb, merge = shortlists.compiled_pass(place, layout, 7, False, 5)
    listed = start(w, queries)
    assert set(collectives(absorb, listed, queries, arrays, 0, 0)) == columns
    assert set(collectives(merge, listed)) == {"all-gather", "all-reduce"}
    assert not collectives(*weight_loop(merge(listed)))


def test_the_check_of_collectives_sees_them():
    place = placement(mesh_of("8"))
    x = jax.device_put(jnp.ones((8, 3)), place.sharding(DATA))
    assert collectives(lambda x: x.sum(axis=0), x)["all-reduce"] == 1
    assert collectives(place.jit(lambda x: x), x)["all-gather"] == 1


@pytest.mark.parametrize("mesh", [None, "8"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_steps_lower_for_accelerators(mesh, platform):
    place = placement(None if mesh is None else mesh_of(mesh))
    index = built("trak", mesh)

    def lowers(function, *arguments):
        exported = jax.export.export(jax.jit(function), platforms=[platform])(*arguments)
        assert len(exported.mlir_module_serialized) > 0

    features = passes._compiled_features(place, index.featurizer.step)
    lowers(features, *step_arguments(index, place))
    w, queries = place.whole((jnp.ones(3), ja.query_features(index, QUERIES).features))
    arrays = {name: index.rows.arrays[name] for name in ("features", "examples")}
    weigh = ranking.weigh_step(place, index.layout)
    lowers(weigh, w, queries, EXPONENT)
    lowers(ranking.score_step(place, "identity"), weigh(w, queries, EXPONENT), arrays)
    search = ranking.top_k_of_arrays(place, index.layout, "identity", 5, 2, 1)
    lowers(search, w, queries, arrays, EXPONENT)
    start, absorb, merge = shortlists.compiled_pass(place, index.layout, 7, False, 5)
    listed = start(w, queries)
    lowers(absorb, listed, queries, arrays, 0, 0)
    lowers(*weight_loop(merge(listed)))


def test_hosts_share_no_chunk():
    assert Placement().boundaries(12) == [0, 12]
    assert placement(mesh_of("8")).boundaries(16) == [0, 16]  # one host holds all
