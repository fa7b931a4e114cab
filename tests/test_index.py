import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr import sources
from jaxattr.features import projections
from tests import models

CHECKPOINTS = [models.mlp_params(jax.random.key(i)) for i in range(2)]
TRAIN, QUERIES = models.data(23), models.data(6, seed=1)
EXACT = projections.identity()


def test_trak_ensemble_takes_the_averages_apart():
    method = ja.trak(models.margin, damping=ja.absolute(0.7), dense=True, projection=EXACT)
    index = ja.build_index(method, CHECKPOINTS, TRAIN, batch_size=8)
    inner, residual = 0, 0
    for params in CHECKPOINTS:
        featurize = ja.featurizer(method, params, models.one(TRAIN))
        phi, query = np.asarray(featurize(params, TRAIN)), np.asarray(featurize(params, QUERIES))
        inner += query @ np.linalg.inv(phi.T @ phi + 0.7 * np.eye(phi.shape[1])) @ phi.T / 2
        margins = jax.vmap(lambda e, params=params: models.margin(params, e, None))(TRAIN)
        residual += np.asarray(jax.nn.sigmoid(-margins)) / 2
    np.testing.assert_allclose(ja.score(index, QUERIES), inner * residual[None], rtol=1e-8)


def test_tracin_sums_checkpoints_with_their_weights():
    def scores(checkpoints, weights):
        method = ja.tracin(models.loss, checkpoint_weights=weights, projection=EXACT)
        return ja.score(ja.build_index(method, checkpoints, TRAIN), QUERIES)

    expected = 0.5 * scores(CHECKPOINTS[:1], [1]) + 2 * scores(CHECKPOINTS[1:], [1])
    np.testing.assert_allclose(scores(CHECKPOINTS, [0.5, 2]), expected, rtol=1e-10)


@functools.cache
def scores_of(method, **options):
    return ja.score(ja.build_index(method, CHECKPOINTS, TRAIN, **options), QUERIES)


@pytest.mark.parametrize(
    "method", [ja.tracin(models.loss), ja.trak(models.margin)], ids=lambda m: m.name
)
@pytest.mark.parametrize(("batch_size", "microbatch"), [(1, 1), (5, 2), (23, 23), (100, 7)])
def test_batch_sizes_do_not_matter(method, batch_size, microbatch):
    got = scores_of(method, batch_size=batch_size, microbatch=microbatch)
    assert models.relative_error(got, scores_of(method)) <= 1e-9


def test_order_of_examples_does_not_matter():
    method = ja.trak(models.margin, projection=projections.rademacher(10))
    order = np.random.default_rng(0).permutation(23)
    shuffled = jax.tree.map(lambda x: x[order], TRAIN)
    straight = ja.score(ja.build_index(method, CHECKPOINTS, TRAIN), QUERIES)
    got = ja.score(ja.build_index(method, CHECKPOINTS, shuffled), QUERIES)
    assert models.relative_error(got, straight[:, order]) <= 1e-8


class Examples:
    """A random-access source of numpy examples."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        assert isinstance(index, int)
        return jax.tree.map(lambda x: np.asarray(x[index]), TRAIN)


def test_random_access_source_equals_arrays():
    method = ja.trak(models.margin)
    got = ja.score(ja.build_index(method, CHECKPOINTS, Examples(), batch_size=4), QUERIES)
    expected = ja.score(ja.build_index(method, CHECKPOINTS, TRAIN, batch_size=4), QUERIES)
    np.testing.assert_array_equal(got, expected)


def test_grain_is_a_source():
    grain = pytest.importorskip("grain")
    source = sources.as_source(grain.MapDataset.source(Examples()), "train")
    assert source.size == 23
    assert source.example["x"].shape == (6,)


@pytest.mark.parametrize(
    "method", [ja.tracin(models.loss), ja.trak(models.margin)], ids=lambda m: m.name
)
def test_a_bad_training_example_is_named_and_does_no_harm(method):
    bad = TRAIN | {"x": TRAIN["x"].at[17].set(jnp.nan)}
    with pytest.warns(ja.NonFiniteWarning, match="1 of 23 training examples .* ids 17"):
        index = ja.build_index(method, CHECKPOINTS, bad, batch_size=5)
    assert index.non_finite.tolist() == [17]
    scores = ja.score(index, QUERIES)
    kept = np.delete(np.arange(23), 17)
    without = jax.tree.map(lambda x: x[kept], TRAIN)
    expected = ja.score(ja.build_index(method, CHECKPOINTS, without), QUERIES)
    assert models.relative_error(scores[:, kept], expected) <= 1e-9
    assert (scores[:, 17] == 0).all()
    assert np.isnan(ja.self_influence(index)[17])
    top = ja.top_k(index, QUERIES, k=23)
    assert 17 not in np.asarray(top.ids)
    assert (top.ids[:, -1] == -1).all() and np.isnan(top.scores[:, -1]).all()


def test_a_bad_query_is_named_and_marked():
    bad = QUERIES | {"x": QUERIES["x"].at[2].set(jnp.inf)}
    index = ja.build_index(ja.tracin(models.loss), CHECKPOINTS, TRAIN)
    with pytest.warns(ja.NonFiniteWarning, match="1 of 6 queries .* ids 2"):
        features = ja.query_features(index, bad)
    scores = ja.score(index, features)
    assert np.isnan(scores[2]).all() and np.isfinite(np.delete(scores, 2, axis=0)).all()
    assert (ja.top_k(index, features).ids[2] == -1).all()
    assert (ja.attributor(index)(bad).ids[2] == -1).all()
    weights = ja.learn_weights(index, features, held_out=0, steps=3).weights
    assert all(np.isfinite(weight) for weight in weights.values())


def test_parameters_that_are_not_finite():
    bad = jax.tree.map(lambda x: x * jnp.nan, CHECKPOINTS[1])
    with pytest.raises(ValueError, match="No training example .* at checkpoint 1"):
        ja.build_index(ja.tracin(models.loss), [CHECKPOINTS[0], bad], TRAIN)


@pytest.mark.parametrize(
    ("checkpoints", "train", "message"),
    [
        ([], TRAIN, "checkpoints is empty"),
        ([CHECKPOINTS[0], {"other": jnp.ones(3)}], TRAIN, "Checkpoint 1 differs from checkpoint 0"),
        (CHECKPOINTS, {}, "train is empty"),
        (CHECKPOINTS, jax.tree.map(lambda x: x[:0], TRAIN), "train is empty: it has no examples"),
        (CHECKPOINTS, TRAIN | {"y": TRAIN["y"][:5]}, r"axis.*x float64\[23, 6\], y int64\[5"),
        (CHECKPOINTS, TRAIN | {"y": jnp.asarray(3)}, "same leading axis"),
    ],
)
def test_bad_arguments(checkpoints, train, message):
    with pytest.raises(ValueError, match=message):
        ja.build_index(ja.tracin(models.loss), checkpoints, train)


def test_more_bad_arguments():
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        ja.build_index(ja.tracin(models.loss), CHECKPOINTS, TRAIN, batch_size=0)
    method = ja.tracin(models.loss, checkpoint_weights=[1.0])
    with pytest.raises(ValueError, match="1 checkpoint weights for 2 checkpoints"):
        ja.build_index(method, CHECKPOINTS, TRAIN)
    index = ja.build_index(ja.tracin(models.loss), CHECKPOINTS, TRAIN)
    with pytest.raises(ValueError, match="queries is empty"):
        ja.score(index, jax.tree.map(lambda x: x[:0], QUERIES))


def test_describe_accounts_for_every_leaf():
    method = ja.trak(models.margin, projection=projections.rademacher(20))
    found = ja.describe(
        method,
        CHECKPOINTS[0],
        models.one(TRAIN),
        groups=lambda p: ja.by_layer(p, exclude="layer1/bias"),
    )
    routes = {leaf.name: leaf.route for leaf in found.leaves}
    assert len(routes) == 6
    assert routes["layer0/kernel"] == "projected, rademacher(20): group 49 -> 20"
    assert routes["layer1/bias"] == "excluded: by 'layer1/bias'"
    assert routes["layer2/bias"] == "exact"
    assert found.covered == pytest.approx((49 + 35 + 18) / 107)
    assert "layer0/kernel" in str(found) and "95.3%" in str(found)


def test_what_the_loss_does_not_read_is_said_to_be_unused():
    def half(params, example, key):
        return models.loss(params | {"layer0": CHECKPOINTS[0]["layer0"]}, example, key)

    for make in (ja.tracin, ja.ekfac):
        found = ja.describe(make(half), CHECKPOINTS[0], models.one(TRAIN))
        unused = {leaf.name for leaf in found.leaves if "never used" in leaf.route}
        assert unused == {"layer0/kernel", "layer0/bias"}


@pytest.mark.parametrize("make", [ja.tracin, ja.grad_cos, ja.trak])
def test_gradients_that_are_all_zero_are_said(make):
    def rounded(params, example, key):
        return jnp.round(models.margin(params, example, key))

    with pytest.warns(UserWarning, match="features of the first 8 training .* zero, .*'rounded'"):
        ja.build_index(make(rounded), CHECKPOINTS, TRAIN, batch_size=8)


def test_no_warnings_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ja.build_index(ja.grad_cos(models.loss), CHECKPOINTS, TRAIN)


def test_queries_and_training_examples_share_a_program():
    traced = []

    def loss(params, example, key):
        traced.append(None)
        return models.loss(params, example, key)

    index = ja.build_index(ja.tracin(loss), models.mlp_params(), models.data(8), batch_size=4)
    before = len(traced)
    ja.query_features(index, models.data(4, seed=1))
    assert len(traced) == before


def test_keys_of_any_kind():
    method = ja.tracin(models.loss, projection=projections.rademacher(5))
    build = functools.partial(ja.build_index, method, models.mlp_params(), models.data(9))
    typed, raw = build(key=jax.random.key(3)), build(key=jax.random.PRNGKey(3))
    np.testing.assert_array_equal(typed.features, raw.features)
    learn = functools.partial(ja.learn_weights, typed, models.data(9), top_k=3)
    for wrong in (0, jax.random.split(jax.random.key(0)), "3"):
        for call in (build, learn):
            with pytest.raises(ValueError, match=r"one PRNG key, got .*: jax.random.key\(0\)"):
                call(key=wrong)


def test_an_index_knows_where_its_training_data_are(tmp_path):
    method, path = ja.tracin(models.loss), tmp_path / "index"
    index = ja.build_index(method, CHECKPOINTS, TRAIN, path=path)
    np.testing.assert_array_equal(index.train.read(np.array([3]))["x"][0], TRAIN["x"][3])
    assert ja.open_index(path, method, CHECKPOINTS).train is None
    assert ja.open_index(path, method, CHECKPOINTS, train=TRAIN).train.size == 23
    for other, words in [
        (models.data(22), "22 examples instead of 23"),
        (TRAIN | {"x": TRAIN["x"].at[5].add(1)}, "x of 1 examples .* first: 5"),
    ]:
        with pytest.raises(ja.StoreError, match=words):
            ja.open_index(path, method, CHECKPOINTS, train=other)


def test_what_was_learned_goes_in_as_weights():
    index = ja.build_index(ja.tracin(models.loss), CHECKPOINTS, TRAIN)
    fit = ja.learn_weights(index, QUERIES, steps=2)
    expected = ja.score(index, QUERIES, weights=fit.weights)
    np.testing.assert_array_equal(ja.score(index, QUERIES, weights=fit), expected)
    np.testing.assert_array_equal(
        ja.top_k(index, QUERIES, k=2, weights=fit).ids,
        ja.top_k(index, QUERIES, k=2, weights=fit.weights).ids,
    )
