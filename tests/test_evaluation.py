import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from scipy import stats
from sklearn.metrics import roc_auc_score

import jaxattr as ja
from jaxattr import evaluation
from tests import models

TRAIN, QUERIES = models.data(24), models.data(5, seed=1)


def train(key, ids):
    params = models.mlp_params(key)
    x, y = TRAIN["x"][ids], TRAIN["y"][ids]

    def mean_loss(params):
        return jax.vmap(lambda x, y: models.loss(params, {"x": x, "y": y}, None))(x, y).mean()

    def step(params, _):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(mean_loss)(params)), None

    return jax.lax.scan(step, params, length=5)[0]


@pytest.mark.parametrize("devices", [None, 8])
@pytest.mark.parametrize("at_once", [None, 4])
def test_retraining_equals_a_loop(devices, at_once):
    masks = ja.evaluation.random_subsets(jax.random.key(0), 24, 5)
    mesh = devices and Mesh(np.array(jax.devices()), ("data",))
    got = ja.retrain(train, masks, jax.random.key(1), seeds=2, at_once=at_once, mesh=mesh)
    keys = jax.random.split(jax.random.key(1), 2)
    one = jax.jit(train)
    expected = [[one(key, np.flatnonzero(mask)) for key in keys] for mask in masks]
    for i, j in np.ndindex(5, 2):
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i, j=j: x[i, j], got), expected[i][j], rtol=1e-10
        )
    margins = evaluation.outputs(models.margin, got, QUERIES)
    by_hand = [
        np.mean([models.margin(p, jax.tree.map(lambda x: x[3], QUERIES), None) for p in row])
        for row in expected
    ]
    np.testing.assert_allclose(margins[:, 3], by_hand, rtol=1e-10)


def test_random_subsets_are_stratified():
    with pytest.raises(ValueError, match=r"2 are NaN, at positions \[1, 3\]"):
        ja.evaluation.random_subsets(
            jax.random.key(0), 4, 2, strata=np.array([0, np.nan, 0, np.nan])
        )
    strata = np.repeat([0, 1, 2], [10, 20, 30])
    masks = ja.evaluation.random_subsets(jax.random.key(0), 60, 7, fraction=0.3, strata=strata)
    for stratum, size in zip(range(3), (3, 6, 9), strict=True):
        assert (masks[:, strata == stratum].sum(axis=1) == size).all()
    assert len({mask.tobytes() for mask in masks}) == 7


@pytest.mark.parametrize("fraction", [0.0, 1.0, 0.01, 0.999, -1, np.nan])
def test_subsets_that_are_none(fraction):
    with pytest.raises(ValueError, match="more than none and fewer than all"):
        ja.evaluation.random_subsets(jax.random.key(0), 24, 2, fraction=fraction)


def test_train_functions_that_cannot_be_right():
    masks = ja.evaluation.random_subsets(jax.random.key(0), 24, 4)
    for ignores in (
        lambda key, ids: models.mlp_params(key),
        jax.jit(lambda k, ids: train(k, jnp.array([1]))),
    ):
        with pytest.raises(ValueError, match="train_fn ignores its ids"):
            ja.retrain(ignores, masks, jax.random.key(0))
    with pytest.warns(UserWarning, match="train_fn ignores its key"):
        ja.retrain(lambda key, ids: TRAIN["x"][ids].mean(axis=0), masks, jax.random.key(0))
    with pytest.warns(UserWarning, match="2 of 8 retrained models .* subsets .1."):
        bad = np.flatnonzero(masks[1])
        ja.retrain(
            lambda key, ids: jnp.where((ids == bad).all(), jnp.nan, jax.random.normal(key)),
            masks, jax.random.key(0), seeds=2,
        )  # fmt: skip


def test_masks_that_cannot_be_right():
    with pytest.raises(ValueError, match="sizes from 1 to 2"):
        ja.retrain(train, np.tri(2, 24, dtype=bool), jax.random.key(0))
    with pytest.raises(ValueError, match="bool .subsets, n., .* got float64"):
        ja.retrain(train, np.ones((2, 24)), jax.random.key(0))


def random_problem(q=6, n=30, m=20, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(q, n)), rng.random((m, n)) < 0.5, rng.normal(size=(m, q))


def test_lds_is_the_mean_spearman_correlation():
    scores, masks, outputs = random_problem()
    outputs = np.round(outputs, 1)  # with ties
    found = ja.lds(scores, masks, outputs)
    sums = masks @ scores.T
    expected = [stats.spearmanr(sums[:, i], outputs[:, i]).statistic for i in range(6)]
    np.testing.assert_allclose(found.per_query, expected, atol=1e-12)
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.low < found.mean < found.high and found.skipped == 0


def test_oracle_and_chance():
    scores, masks, _ = random_problem(q=40, m=64)
    assert ja.lds(scores, masks, masks @ scores.T).mean == pytest.approx(1)
    assert ja.lds(-scores, masks, masks @ scores.T).mean == pytest.approx(-1)
    shuffled = scores[np.random.default_rng(1).permutation(40)]
    assert abs(ja.lds(shuffled, masks, masks @ scores.T).mean) < 2 / np.sqrt(63)


def test_lds_interval_covers_about_as_often_as_it_says():
    """The interval is over subsets: of draws of 40, about 95 % must cover the mean of 4,000."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(10, 30))
    truth = scores + 2 * rng.normal(size=scores.shape)

    def draw(m):
        masks = rng.random((m, 30)) < 0.5
        return ja.lds(scores, masks, masks @ truth.T, resamples=200)

    limit = draw(4000).mean
    covered = np.mean([found.low < limit < found.high for found in (draw(40) for _ in range(60))])
    assert 0.8 <= covered <= 1


def test_two_subsets_many_times_are_two_subsets():
    scores, masks, _ = random_problem()
    twice = np.tile(masks[:2], (10, 1))
    with pytest.raises(ValueError, match="at least 3 subsets, got 2 different ones"):
        ja.lds(scores, twice, twice @ scores.T)


@pytest.mark.parametrize("m", [3, 7, 8])
def test_few_subsets_have_no_interval(m):
    scores, masks, outputs = random_problem(m=m)
    found = ja.lds(scores, masks, outputs)
    expected = [
        stats.spearmanr(a, b).statistic for a, b in zip(scores @ masks.T, outputs.T, strict=True)
    ]
    np.testing.assert_allclose(found.per_query, expected, atol=1e-12)
    difference = evaluation.paired_difference(found, found)
    unknown = [found.low, found.high, difference.low, difference.high]
    assert np.isnan(unknown).tolist() == [m < 8] * 4
    assert ("(no interval)" in str(found)) == (m < 8)


def test_resamples_without_a_correlation_do_not_count():
    outputs = np.eye(12)[:, :1]  # of one query, which one subset in three resamples lacks
    masks = evaluation.random_subsets(jax.random.key(0), 20, 12)
    found = evaluation.lds(np.random.default_rng(0).normal(size=(1, 20)), masks, outputs)
    assert np.isnan(found.resampled).any() and found.low <= found.mean <= found.high
    other = evaluation.lds(np.random.default_rng(1).normal(size=(1, 20)), masks, outputs)
    assert np.isfinite(vars(evaluation.paired_difference(found, other)).popitem()[1])


def test_masks_may_be_zeros_and_ones_but_no_ids():
    scores, masks, outputs = random_problem()
    expected = ja.lds(scores, masks, outputs).per_query
    for given in (masks.astype(np.uint8), masks.astype(float), masks.tolist()):
        np.testing.assert_array_equal(ja.lds(scores, given, outputs).per_query, expected)
    ids = np.argsort(np.random.default_rng(0).random(masks.shape), axis=1)
    for given in (ids, ids[:, :15], np.where(masks, 0.5, 0)):  # also where shapes happen to fit
        with pytest.raises(ValueError, match="masks must be bool .* If those are ids"):
            ja.lds(scores, given, outputs)


def test_skipped_queries_are_counted():
    scores, masks, outputs = random_problem()
    outputs[:, 2], scores[4, 3], scores[5] = 1.0, np.nan, 0
    found = ja.lds(scores, masks, outputs)
    assert found.skipped == 3 and np.flatnonzero(np.isnan(found.per_query)).tolist() == [2, 4, 5]
    assert np.isfinite([found.mean, found.low, found.high]).all()
    assert "3 queries skipped" in str(found)


def test_models_that_diverged_are_named():
    scores, masks, outputs = random_problem()
    outputs[[3, 7], 0] = np.nan
    with pytest.warns(UserWarning, match=r"2 of the .* models .* \[3, 7\] first.*leave these"):
        assert ja.lds(scores, masks, outputs).skipped == 1
    outputs[:, 0] = np.nan  # a query, and no model
    assert ja.lds(scores, masks, outputs).skipped == 1


def test_paired_differences_know_more_than_two_intervals():
    scores, masks, _ = random_problem(q=10, m=50)
    noise = np.random.default_rng(3).normal(size=scores.shape)
    outputs = masks @ (scores + noise).T
    better, worse = (ja.lds(scores + x * noise, masks, outputs) for x in (0.2, 0.0))
    difference = evaluation.paired_difference(better, worse)
    assert difference.mean == pytest.approx(better.mean - worse.mean)
    assert difference.high - difference.low < 0.7 * (better.high - better.low)
    assert difference.low > 0
    with pytest.raises(ValueError, match="can be paired"):
        evaluation.paired_difference(better, ja.lds(scores, masks, outputs, resamples=10))


def test_scores_that_skip_other_queries_are_not_paired():
    """The means are then of other queries: the same scores would differ."""
    scores, masks, outputs = random_problem(q=10, m=50)
    constant = np.where(np.arange(10)[:, None] == 3, 0, scores)
    fewer, every = (ja.lds(each, masks, outputs) for each in (constant, scores))
    with pytest.raises(ValueError, match=r"1 queries have .* in one .* alone, at positions \[3\]"):
        evaluation.paired_difference(fewer, every)
    both = evaluation.paired_difference(fewer, fewer)
    assert (both.mean, both.low, both.high) == (0, 0, 0)


@pytest.mark.parametrize(
    ("scores", "masks", "outputs", "message"),
    [
        ((2, 9), (5, 8), (5, 2), "need the same n"),
        ((2, 8), (5, 8), (2, 5), "outputs must be"),
        ((2, 8), (2, 8), (2, 2), "at least 3 subsets"),
    ],
)
def test_shapes_that_do_not_match(scores, masks, outputs, message):
    with pytest.raises(ValueError, match=message):
        ja.lds(np.ones(scores), np.ones(masks, bool), np.ones(outputs))


def test_mislabel_auc_is_the_area_under_the_curve():
    rng = np.random.default_rng(0)
    values, wrong = np.round(rng.normal(size=50), 1), rng.random(50) < 0.3
    assert ja.evaluation.mislabel_auc(values, wrong) == pytest.approx(roc_auc_score(wrong, values))
    assert ja.evaluation.mislabel_auc(np.zeros(50), wrong) == 0.5
    values[wrong] = np.nan
    assert ja.evaluation.mislabel_auc(values, wrong) == 0
    with pytest.raises(ValueError, match="some examples of each kind, got 0"):
        ja.evaluation.mislabel_auc(values, np.zeros(50, bool))
    with pytest.raises(ValueError, match="must be bool"):
        ja.evaluation.mislabel_auc(values, np.zeros(50))


def test_flipped_labels():
    labels = np.random.default_rng(0).integers(4, size=100)
    flipped, which = evaluation.flip_labels(jax.random.key(0), labels, fraction=0.25)
    assert which.sum() == 25 and (flipped != labels).sum() == 25
    assert (which == (flipped != labels)).all() and flipped.max() < 4 and flipped.min() >= 0
    with pytest.raises(ValueError, match="flips 0 of 100"):
        evaluation.flip_labels(jax.random.key(0), labels, fraction=0.001)


@pytest.mark.parametrize("labels", [[0, 3, 1, 2], [0, -1, 1, 2]])
def test_labels_outside_the_classes_are_refused(labels):
    message = rf"from 0 to 2, as there are 3 classes; got \[{labels[1]}\] at positions \[1\]"
    with pytest.raises(ValueError, match=message):
        evaluation.flip_labels(jax.random.key(0), labels, fraction=0.5, classes=3)


@pytest.mark.parametrize(
    ("labels", "got"),
    [([0.0, 1.0], "float64"), ([[0], [1]], "int64"), ([], "float64")],
)
def test_labels_are_integers(labels, got):
    with pytest.raises(ValueError, match=rf"labels must be integers \[n\], got {got}"):
        evaluation.flip_labels(jax.random.key(0), labels, fraction=0.5)


def test_small_label_types_do_not_wrap():
    labels = np.arange(200, dtype=np.uint8)
    flipped, which = evaluation.flip_labels(jax.random.key(0), labels, fraction=1.0, classes=300)
    assert which.all() and (flipped != labels).all() and 255 < flipped.max() < 300


@pytest.mark.parametrize(
    "key", [0, None, np.int64(3), "0", 0.5, jax.random.split(jax.random.key(0))]
)
def test_a_seed_is_no_key(key):
    masks, models_of = evaluation.random_subsets(jax.random.key(0), 24, 4), jnp.ones((4, 1, 3))
    uses = [
        lambda: evaluation.random_subsets(key, 24, 4),
        lambda: evaluation.flip_labels(key, [0, 1, 0, 1], fraction=0.5),
        lambda: ja.retrain(train, masks, key),
        lambda: evaluation.outputs(lambda p, x, k: p.sum(), models_of, jnp.ones(2), key=key),
    ]
    for use in uses[:-1] if key is None else uses:
        with pytest.raises(ValueError, match=r"key must be one PRNG key, got .*random.key\(0\)"):
            use()


def test_keys_as_older_programs_make_them_are_keys():
    old, new = jax.random.PRNGKey(1), jax.random.key(1)
    found = [evaluation.random_subsets(key, 24, 4) for key in (new, old, np.asarray(old))]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize("mesh", [3, "data", jax.devices()])
def test_what_is_no_mesh_is_refused(mesh):
    masks = evaluation.random_subsets(jax.random.key(0), 24, 4)
    with pytest.raises(ValueError, match="mesh must be a jax.sharding.Mesh, got .*make_mesh"):
        ja.retrain(train, masks, jax.random.key(0), mesh=mesh)
    with pytest.raises(ValueError, match="mesh must be a jax.sharding.Mesh, got .*make_mesh"):
        ja.build_index(ja.tracin(models.loss), models.mlp_params(), TRAIN, mesh=mesh)


def test_models_go_over_an_axis_of_the_mesh_named_data():
    masks = evaluation.random_subsets(jax.random.key(0), 24, 4)
    mesh = Mesh(np.array(jax.devices()), ("models",))
    with pytest.raises(ValueError, match=r"axes \('models',\); .* named \"data\""):
        ja.retrain(train, masks, jax.random.key(0), mesh=mesh)


@pytest.fixture(scope="module")
def indexed():
    index = ja.build_index(ja.trak(models.margin), models.mlp_params(), TRAIN)
    masks = ja.evaluation.random_subsets(jax.random.key(0), 24, 30)
    return index, masks, np.asarray(ja.contributions(index, QUERIES))


def test_group_lds_is_the_lds_of_contributions(indexed):
    index, masks, parts = indexed
    outputs = np.random.default_rng(0).normal(size=(30, 5))
    found = evaluation.group_lds(index, QUERIES, masks, outputs)
    assert list(found) == list(index.layout.names)
    for j, name in enumerate(found):
        expected = ja.lds(parts[:, :, j], masks, outputs)
        np.testing.assert_allclose(found[name].per_query, expected.per_query, atol=1e-9)
    with pytest.raises(ValueError, match="subsets, 24"):
        evaluation.group_lds(index, QUERIES, masks[:, :5], outputs)


def test_sums_of_equal_scores_are_not_ranked_by_their_rounding():
    masks = np.asarray(evaluation.random_subsets(jax.random.key(0), 5000, 20, fraction=0.5))
    scores = np.full((3, 5000), 0.1)
    scores[1] = np.random.default_rng(1).normal(size=5000)
    found = evaluation.lds(scores, masks, np.random.default_rng(0).normal(size=(20, 3)))
    assert np.isnan(found.per_query[[0, 2]]).all() and np.isfinite(found.per_query[1])
