"""An index knows what it was made from: what does not belong together is refused, by name."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr.features import projections
from jaxattr.store.folder import Folder, StoreError
from jaxattr.store.ledger import finished
from tests import models
from tests.stored import (
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


def other_loss(params, example, key):
    return 2 * models.loss(params, example, key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": TRAK}, "method.name: the index has TracIn, got TRAK"),
        ({"method": ja.tracin(other_loss, projection=projections.identity())},
         "the function that is attributed .the loss, .* computes something else than when"),
        ({"method": ja.tracin(models.loss, projection=projections.rademacher(9))},
         "projection.kind: the index has Identity, got Rademacher"),
        ({"checkpoints": CHECKPOINTS[::-1]}, "parameters of checkpoint 1 differ: .*layer2/kernel"),
        ({"checkpoints": CHECKPOINTS[:1]}, "checkpoints: the index has 2, got 1"),
        ({"train": models.data(SIZE, seed=3)}, "train: x of 53 examples differs .*: 0, 1, 2"),
        ({"train": models.data(SIZE + 1)}, "train: the index has 53 examples, got 54; extend="),
        ({"key": jax.random.key(1)}, "key.words: the index has .0, 0., got .0, 1."),
        ({"groups": ja.by_leaf}, "groups: "),
        ({"batch_size": 9}, "batch_size: the index has 8, got 9"),
        ({"dtype": jnp.bfloat16}, "rows.dtypes.features: the index has float64, got bfloat16"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused(finished_index, change, message):
    options = {"method": IDENTITY, "checkpoints": CHECKPOINTS, "train": TRAIN} | change
    with pytest.raises(StoreError, match=f"(?s)was made from something else.*{message}"):
        build(finished_index, **options)


def test_products_of_another_precision_are_named(path):
    """On a GPU what float32 is multiplied in is set from outside, and easily forgotten."""
    with jax.default_matmul_precision("highest"):
        build(path)
        ja.open_index(path, IDENTITY, CHECKPOINTS)
    message = "computes .* .jax_default_matmul_precision was 'highest' then, and is None now"
    with pytest.raises(StoreError, match=message):
        ja.open_index(path, IDENTITY, CHECKPOINTS)
    with pytest.raises(StoreError, match=message):
        build(path)


def test_what_follows_from_another_difference_is_not_listed(finished_index):
    """Another method and other parameters also change widths and the layout of columns."""
    method = ja.tracin(models.loss, projection=projections.rademacher(9))
    with pytest.raises(StoreError) as caught:
        build(finished_index, method, CHECKPOINTS[::-1])
    lines = str(caught.value).splitlines()[1:-1]
    leaves = "layer0/bias, layer0/kernel, layer1/bias, layer1/kernel, layer2/bias, layer2/kernel"
    for number in range(2):
        assert f"  the parameters of checkpoint {number} differ: {leaves}" in lines
    others = [line for line in lines if "parameters of checkpoint" not in line]
    assert others and all(line.startswith("  method.rule.projection.") for line in others)


def test_settings_of_another_method_are_not_listed(finished_index):
    with pytest.raises(StoreError) as caught:
        build(finished_index, ja.ekfac(models.loss))
    line = "  method.name: the index has TracIn, got EK-FAC"
    assert str(caught.value).splitlines()[1:-1] == [line]


def test_groups_that_differ_are_told_apart_by_name_and_size(finished_index):
    with pytest.raises(StoreError, match="groups: the index has layer0 of .* parameters, .*got l"):
        build(finished_index, groups=ja.by_leaf)


def test_opening_checks_method_and_checkpoints(finished_index):
    with pytest.raises(StoreError, match="method.name: the index has TracIn, got TRAK"):
        ja.open_index(finished_index, TRAK, CHECKPOINTS)
    with pytest.raises(StoreError, match="the parameters of checkpoint 0 differ: layer0/bias"):
        ja.open_index(finished_index, IDENTITY, CHECKPOINTS[::-1])
    with pytest.raises(ValueError, match='blocks of 8 .* the 3 devices of the mesh axis "data"'):
        devices = jax.devices()[:3]
        ja.open_index(finished_index, mesh=jax.make_mesh((3,), ("data",), devices=devices))


def test_a_basis_fitted_on_a_mesh_knows_its_data(path):
    mesh = jax.make_mesh((8,), ("data",))
    index = build(path, ja.ekfac(models.loss), mesh=mesh)
    expected = build(None, ja.ekfac(models.loss))
    got = np.asarray(ja.score(index, QUERIES))
    assert models.relative_error(got, np.asarray(ja.score(expected, QUERIES))) <= 1e-9


def test_a_basis_is_not_taken_for_that_of_other_data(path):
    """A run that was killed after its basis was fitted, and goes on with other data unseen."""
    method = ja.ekfac(models.loss)
    with pytest.raises(Stops):
        build(path, method, train=Passes(1))
    assert finished(Folder(path)) == {}
    with pytest.raises(StoreError, match="was fitted to other data than its features are"):
        build(path, method, train=models.data(SIZE, seed=7))
    build(path.parent / "other", method, train=models.data(SIZE, seed=7))


class Passes(Interrupted):
    """A source that can be read so many times, and then fails."""

    def __init__(self, passes):
        super().__init__()
        self.passes = passes

    def __getitem__(self, index):
        if index == SIZE - 2:
            self.passes -= 1
        if self.passes < 0 or (self.passes == 0 and index < SIZE - 2):
            raise Stops
        return super().__getitem__(index)


def test_a_source_that_changes_is_refused(path):
    class Shuffling(Interrupted):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            again = self.read.count(index) > 1 and index == 5
            return example | {"x": -example["x"]} if again else example

    with pytest.raises(StoreError, match="gave other examples when it was read again.*first: 5"):
        build(path, train=Shuffling())


@pytest.mark.parametrize("in_memory", [True, False])
def test_all_of_the_data_is_compared_where_it_is_in_memory(path, in_memory):
    build(path)
    labels = TRAIN["y"].at[jnp.array([3, 4, 7, 50])].add(1)
    other = TRAIN | {"y": labels}
    given = Interrupted()
    given.arrays = other
    given = other if in_memory else given
    with pytest.raises(StoreError, match="train: y of 4 examples differs .*, first: 3, 4, 7, 50"):
        build(path, train=given, verify="all")
    with pytest.raises(ValueError, match='verify must be "all" or "sample", got .some'):
        build(path, train=given, verify="some")


def test_a_sample_of_the_data_says_that_it_is_one(path, monkeypatch):
    monkeypatch.setattr("jaxattr.index.verifying._SAMPLES", 3)
    build(path)
    last = TRAIN | {"y": TRAIN["y"].at[SIZE - 1].add(1)}
    match = "y of 1 examples of the 3 that were looked at differs .*, first: 52"
    with pytest.raises(StoreError, match=match):
        build(path, train=last, verify="sample")
    build(path, train=TRAIN | {"y": TRAIN["y"].at[5].add(1)}, verify="sample")  # goes unseen


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_examples_that_hold_keys_are_on_record(impl, path):
    def loss(params, example, key):
        noise = jax.random.normal(example["k"], (4,))
        return ((params["w"] @ (example["x"] + noise)) - 1) ** 2

    train = {
        "x": np.random.default_rng(0).normal(size=(20, 4)),
        "k": jax.random.split(jax.random.key(5, impl=impl), 20),
    }
    params = {"w": jnp.ones(4)}
    built = ja.build_index(ja.tracin(loss), params, train, path=path)
    opened = ja.open_index(path, ja.tracin(loss), params)
    np.testing.assert_array_equal(ja.score(opened, train), ja.score(built, train))


@pytest.mark.parametrize("train", [
    collections.OrderedDict(y=np.arange(6) + 2, x=np.eye(6)), {1: np.arange(6) + 2, 0: np.eye(6)},
], ids=["ordered", "numbered"])  # fmt: skip
def test_examples_whose_names_say_no_order_are_those_of_the_data(train, path):
    first, second = (name for name in train)

    def loss(params, example, key):
        return (params["w"] @ example[second] - example[first]) ** 2

    params, method = {"w": jnp.ones(6)}, ja.tracin(loss)
    built = ja.build_index(method, params, train, path=path)
    with pytest.raises(ValueError, match="pass example=.*, or train="):
        ja.open_index(path, method, params)
    opened = ja.open_index(path, method, params, train=train)
    np.testing.assert_array_equal(ja.score(opened, train), ja.score(built, train))


def test_what_is_drawn_from_a_key_depends_on_a_setting(path):
    method = ja.tracin(noisy_loss, projection=ja.projections.gaussian(2))
    with jax.threefry_partitionable(False):
        ja.build_index(method, {"w": jnp.ones(4)}, np.ones((5, 4)), path=path)
        ja.open_index(path, method, {"w": jnp.ones(4)})
        built = ja.open_index(path)
    with pytest.raises(StoreError, match="jax_threefry_partitionable was off, and is on"):
        ja.open_index(path, method, {"w": jnp.ones(4)})
    assert built.size == 5


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_the_noise_of_an_example_is_its_own_whatever_the_key(impl):
    """Under vmap those of rbg all draw what the first of them draws."""
    train = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    rows = []
    for batch_size in (1, 6):
        options = {"key": jax.random.key(3, impl=impl), "batch_size": batch_size}
        index = ja.build_index(ja.tracin(noisy_loss), {"w": jnp.ones(4)}, train, **options)
        rows.append(np.asarray(index.features))
    np.testing.assert_allclose(*rows, rtol=1e-6)


def noisy_loss(params, example, key):
    return ((params["w"] * jax.random.normal(key, (4,))) @ example - 1) ** 2


def test_float64_of_numpy_is_float32_where_jax_makes_it_that(path):
    def loss(params, example, key):
        return (params["w"] @ example["x"] - 1) ** 2

    train = {"x": np.ones((20, 4), np.float32)}
    with jax.enable_x64(False):
        index = ja.build_index(ja.tracin(loss), {"w": np.ones(4)}, train, path=path)
        assert index.precision == "float32"
        again = ja.build_index(ja.tracin(loss), {"w": jnp.ones(4)}, train, path=path)
        np.testing.assert_array_equal(ja.score(again, train), ja.score(index, train))
