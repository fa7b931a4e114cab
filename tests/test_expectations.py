import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr.features import bases, projections
from jaxattr.index.summary import summarize
from jaxattr.keys import example_keys
from jaxattr.store.folder import StoreError
from tests import diffusion_models as toy
from tests import models

EXACT = projections.identity()


def featurizer(output, projection=EXACT, **options):
    method = ja.tracin(output, projection=projection)
    return ja.featurizer(
        method, toy.params(), models.one(toy.images(4)), groups=ja.by_leaf, **options
    )


def by_hand(batch, ids, of_gradients, **options):
    rows = []
    for row, number in enumerate(ids):
        one = jax.tree.map(lambda x, row=row: x[row], batch)
        gradients = toy.draw_gradients(toy.params(), one, number, **options)
        rows.append(np.mean([of_gradients(g) for g in gradients], axis=0))
    return np.stack(rows)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("unit_norm", [False, True])
def test_features_are_those_of_a_loop_over_timesteps(draws, unit_norm):
    batch, ids = toy.images(4), [5, 0, 9, 2]
    output = toy.expected_loss(draws=draws, unit_norm=unit_norm)
    got = featurizer(output)(toy.params(), batch, jnp.array(ids))
    unit = (lambda g: g / jnp.linalg.norm(g)) if unit_norm else (lambda g: g)
    expected = by_hand(batch, ids, unit, draws=draws)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("unit_norm", [False, True])
def test_factored_features_are_those_of_gradients_that_are_formed(unit_norm):
    batch, output = toy.images(6), toy.expected_loss(draws=2, unit_norm=unit_norm)
    formed = projections.two_sided(3, basis=bases.Signs(materialize=True))
    fast = featurizer(output, projections.two_sided(3))
    assert fast.plan.factored
    expected = featurizer(output, formed)(toy.params(), batch)
    np.testing.assert_allclose(fast(toy.params(), batch), expected, rtol=1e-10, atol=1e-14)


def test_the_gradient_of_the_mean_is_the_feature():
    batch, output = toy.images(3), toy.expected_loss(draws=2)
    featurize = featurizer(output)
    keys = example_keys(featurize.key, jnp.arange(3))
    gradients = jax.jit(jax.vmap(jax.grad(output), (None, 0, 0)))(toy.params(), batch, keys)
    expected = jax.vmap(toy.flat)(gradients)
    np.testing.assert_allclose(featurize(toy.params(), batch), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("microbatch", [1, 2, 5])
def test_batches_and_order_do_not_matter(microbatch):
    batch, output = toy.images(5), toy.expected_loss(draws=2)
    expected = featurizer(output)(toy.params(), batch)
    order = jnp.array([3, 1, 4, 0, 2])
    shuffled = jax.tree.map(lambda x: x[order], batch)
    got = featurizer(output, microbatch=microbatch)(toy.params(), shuffled, order)
    np.testing.assert_allclose(got, expected[order], rtol=1e-12, atol=1e-15)


def test_devices_do_not_matter():
    train, queries = toy.images(21), toy.images(4, seed=1)
    method = ja.d_trak(toy.expected_loss(draws=2))
    scores = [
        ja.score(ja.build_index(method, toy.params(), train, batch_size=8, mesh=mesh), queries)
        for mesh in (None, jax.make_mesh((4,), ("data",), devices=jax.devices()[:4]))
    ]
    np.testing.assert_allclose(*scores, rtol=1e-9, atol=1e-12)


def test_noise_of_a_timestep_does_not_depend_on_the_others():
    batch = toy.images(3)
    each = [featurizer(toy.expected_loss(timesteps=[t]))(toy.params(), batch) for t in (4, 11)]
    both = featurizer(toy.expected_loss(timesteps=[11, 4]))(toy.params(), batch)
    np.testing.assert_allclose(both, sum(each) / 2, rtol=1e-12)


def test_drawn_timesteps_are_those_of_the_key():
    def drawn(key):
        return jax.random.randint(key, (), 0, toy.STEPS)

    output = toy.expected_loss(timesteps=drawn, draws=64)
    key = jax.random.key(3)
    assert output.count == 64 and len(np.unique(output.draw(key).timesteps)) > 10
    one = models.one(toy.images(1))
    draws = output.draw(key)
    losses = [
        toy.LOSS(toy.params(), one, draws.keys[i], draws.timesteps[i]) for i in range(output.count)
    ]
    np.testing.assert_allclose(output(toy.params(), one, key), np.mean(losses), rtol=1e-12)


def test_covariances_count_each_draw_as_a_position():
    """K-FAC of an expectation is that of as many examples, each of a single draw."""

    def loss(params, example, key, timestep):
        del key
        noisy = example["image"] * (1 + timestep)
        return jnp.sum((toy.predict(params, noisy, timestep, example) - example["image"]) ** 2)

    train = toy.images(9)
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), train)
    twice["t"] = jnp.repeat(jnp.array([2, 5]), 9)
    apart = ja.kfac(lambda params, example, key: loss(params, example, key, example["t"]))
    together = ja.kfac(ja.expectation(loss, timesteps=[2, 5]))
    curvatures = [
        ja.build_index(method, toy.params(), data).fitted[0].curvature_over(0)
        for method, data in ((apart, twice), (together, train))
    ]
    np.testing.assert_allclose(*curvatures, rtol=1e-9)


@pytest.mark.parametrize("make", [ja.kfac, ja.ekfac, ja.eshampoo])
@pytest.mark.parametrize("mesh", [None, jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])])
def test_an_example_with_a_draw_that_is_not_finite_has_no_part_in_covariances(make, mesh):
    """Its other draws are finite, and its features, means over draws, are not."""

    def loss(params, example, key, timestep):
        lost = jnp.where((timestep == 5) & (example["number"] == 8), jnp.nan, 0)
        return toy.LOSS(params, example, key, timestep) + lost

    # The last, since noise is drawn by id.
    train = toy.images(9) | {"number": np.arange(9)}
    queries = jax.tree.map(lambda x: x[:3], train)
    method = make(ja.expectation(loss, timesteps=[2, 5, 7]))
    build = functools.partial(ja.build_index, method, toy.params(), batch_size=4, mesh=mesh)
    with pytest.warns(ja.NonFiniteWarning, match="1 of 9 training examples.*ids 8"):
        scores = ja.score(build(train), queries)
    without = ja.score(build(jax.tree.map(lambda x: x[:8], train)), queries)
    np.testing.assert_allclose(scores[:, :8], without, rtol=1e-9)


def test_an_equal_expectation_compiles_nothing_new():
    first, second = toy.expected_loss(draws=2), toy.expected_loss(draws=2)
    assert featurizer(first).step is featurizer(second).step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": [3, 20]}, "Timestep 20 is out of range: the model knows 0 to 19"),
        ({"timesteps": [-1]}, "Timestep -1 is out of range"),
        ({"timesteps": [5], "steps": 5}, "the model knows 0 to 4"),
        ({"timesteps": []}, "timesteps is empty"),
        ({"timesteps": [2, 2]}, "given twice .*Use draws="),
        ({"draws": 0}, "draws must be at least 1, got 0"),
    ],
)
def test_bad_draws(options, message):
    with pytest.raises(ValueError, match=message):
        toy.expected_loss(**options)


def test_without_a_known_number_of_steps_only_negative_timesteps_are_refused():
    def loss(params, example, key, timestep):
        return timestep * params["w"]

    assert ja.expectation(loss, timesteps=[10**6]).count == 1
    with pytest.raises(ValueError, match="the model knows 0 and up"):
        ja.expectation(loss, timesteps=[-3])


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda key: jax.random.randint(key, (), 0, 2000), "is out of range: the model knows 0 to"),
        (
            lambda key: jax.random.uniform(key),
            r"draw one integer from a key, got float\d+\[\]",
        ),
        (lambda key: jax.random.randint(key, (2,), 0, 9), r"got int\d+\[2\]"),
    ],
)
def test_bad_functions_that_draw_timesteps(draw, message):
    with pytest.raises(ValueError, match=message):
        toy.expected_loss(timesteps=draw)


def test_sums_of_draws_are_wide():
    """In bfloat16 a running sum of equal terms stands still at 256 of them."""

    def loss(params, example, key, timestep):
        return params["w"] * example.astype(params["w"].dtype)

    params, batch = {"w": jnp.ones((), jnp.bfloat16)}, jnp.ones(2)
    method = ja.tracin(ja.expectation(loss, timesteps=range(1000)))
    np.testing.assert_allclose(ja.featurizer(method, params, batch[0])(params, batch), 1)


def test_what_needs_gradients_refuses_unit_norm_per_draw():
    output, train = toy.expected_loss(unit_norm=True), toy.images(9)
    for method in (ja.kfac(output), ja.influence(output, damping=ja.absolute(0.1))):
        with pytest.raises(ValueError, match="needs features that are gradients.*unit_norm=True"):
            ja.build_index(method, toy.params(), train)


def test_an_index_knows_whether_draws_had_unit_norm(tmp_path):
    def method(unit_norm):
        return ja.tracin(toy.expected_loss(unit_norm=unit_norm))

    ja.build_index(method(True), toy.params(), toy.images(9), path=tmp_path / "index")
    with pytest.raises(StoreError, match="output.unit_norm: the index has True, got False"):
        ja.open_index(tmp_path / "index", method(False), toy.params())


def test_an_index_on_disk_says_what_it_is(tmp_path):
    train = toy.images(4)
    method = ja.tracin(toy.expected_loss(), projection=EXACT)
    ja.build_index(method, toy.params(), train, groups=ja.by_leaf, path=tmp_path / "index")
    assert len(summarize(tmp_path / "index").made_from["output"]) == 32
