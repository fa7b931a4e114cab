"""Indexes that keep no features: the same answers as those that do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr.features import projections
from tests import models

TRAIN = models.data(37)
QUERIES = models.data(12, seed=5)
CHECKPOINTS = [models.mlp_params(jax.random.key(seed)) for seed in range(2)]
METHODS = {
    "tracin": ja.tracin(models.loss, projection=projections.identity()),
    "grad_cos": ja.grad_cos(models.loss),
    "trak": ja.trak(models.margin, projection=projections.rademacher(60)),
    "logra": ja.logra(models.loss, rank=3),
    "ekfac": ja.ekfac(models.loss),
}


def both(name, **options):
    made = [
        ja.build_index(METHODS[name], CHECKPOINTS, TRAIN, batch_size=8, store=store, **options)
        for store in (True, False)
    ]
    assert not made[1].rows.resident and not made[1].rows.arrays
    return made


@pytest.mark.filterwarnings("ignore::jaxattr.weights.report.WeightWarning")  # of a dozen queries
@pytest.mark.parametrize("name", METHODS)
def test_all_that_is_asked_of_an_index_is_the_same(name):
    stored, anew = both(name)
    same = dict(rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(anew.features, stored.features, **same)
    assert np.array_equal(anew.exponent, stored.exponent)
    np.testing.assert_allclose(ja.score(anew, QUERIES), ja.score(stored, QUERIES), **same)
    np.testing.assert_allclose(ja.self_influence(anew), ja.self_influence(stored), **same)
    parts = [ja.contributions(index, QUERIES) for index in (anew, stored)]
    np.testing.assert_allclose(*parts, **same)
    tops = [ja.top_k(index, QUERIES, k=5) for index in (anew, stored)]
    np.testing.assert_array_equal(tops[0].ids, tops[1].ids)
    np.testing.assert_allclose(tops[0].scores, tops[1].scores, **same)
    fits = [ja.learn_weights(index, QUERIES, top_k=4) for index in (anew, stored)]
    for group, weight in fits[0].weights.items():
        np.testing.assert_allclose(weight, fits[1].weights[group], rtol=1e-6)
    weighted = [ja.score(i, QUERIES, weights=fits[0].weights) for i in (anew, stored)]
    np.testing.assert_allclose(*weighted, **same)


class Stops:
    """The training set, whose reading stops once."""

    def __init__(self, at):
        self.at = at

    def __len__(self):
        return 37

    def __getitem__(self, i):
        if i == self.at:
            self.at = None
            raise KeyboardInterrupt
        return jax.tree.map(lambda x: x[i], TRAIN)


def test_a_pass_that_was_interrupted_is_made_again():
    stored = ja.build_index(METHODS["ekfac"], CHECKPOINTS, TRAIN, batch_size=8)
    source = Stops(at=None)
    anew = ja.build_index(METHODS["ekfac"], CHECKPOINTS, source, batch_size=8, store=False)
    source.at = 20
    with pytest.raises(KeyboardInterrupt):
        ja.self_influence(anew)
    np.testing.assert_allclose(ja.self_influence(anew), ja.self_influence(stored), rtol=1e-9)


def test_what_is_made_once_may_be_asked_for_in_a_jit():
    stored, anew = both("ekfac")
    found = jax.jit(lambda x: x * anew.self_contributions.sum())(1.0)
    np.testing.assert_allclose(found, ja.self_influence(stored).sum(), rtol=1e-9)
    np.testing.assert_allclose(ja.self_influence(anew), ja.self_influence(stored), rtol=1e-9)


def test_what_is_made_once_takes_the_programs_that_are_there():
    """A pass that is forced out of a trace, where there is none, compiles all of them again."""
    anew = ja.build_index(METHODS["ekfac"], CHECKPOINTS, TRAIN, batch_size=8, store=False)
    with models.compilations() as compiled:
        ja.self_influence(anew)
    assert compiled() <= 12


class Counted:
    """The training set, an example at a time, and how many were read."""

    def __init__(self):
        self.read = 0

    def __len__(self):
        return 37

    def __getitem__(self, position):
        self.read += 1
        return jax.tree.map(lambda x: x[position], TRAIN)


def test_what_is_made_of_each_example_waits_until_it_is_asked_for():
    data = Counted()
    index = ja.build_index(METHODS["trak"], CHECKPOINTS[0], data, batch_size=8, store=False)
    queries = ja.query_features(index, QUERIES)

    def passes(call):
        before = data.read
        call()
        return (data.read - before) // len(data)

    assert passes(lambda: ja.score(index, queries)) == 1
    assert passes(lambda: ja.self_influence(index)) == 1
    assert passes(lambda: ja.self_influence(index)) == 0
    assert passes(lambda: ja.top_k(index, queries)) == 1


def test_candidates_alone_are_computed(monkeypatch):
    stored, anew = both("ekfac")
    ids = np.array([[3, 30, 7], [36, 0, 3]])
    two = jax.tree.map(lambda x: x[:2], QUERIES)
    asked = []
    at = type(anew.rows).pick
    monkeypatch.setattr(
        type(anew.rows), "pick", lambda rows, names, ids: asked.append(ids) or at(rows, names, ids)
    )
    slabs = type(anew.rows).slabs

    def of_short_rows(rows, names, *more):
        assert "features" not in names  # which would be of all examples
        return slabs(rows, names, *more)

    monkeypatch.setattr(type(anew.rows), "slabs", of_short_rows)
    tops = [ja.top_k(index, two, k=2, among=ids) for index in (anew, stored)]
    np.testing.assert_array_equal(tops[0].ids, tops[1].ids)
    np.testing.assert_allclose(tops[0].scores, tops[1].scores, rtol=1e-9)
    assert set(np.concatenate([x.ravel() for x in asked])) - {-1} == {0, 3, 7, 30, 36}


def test_over_devices():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    stored, anew = both("trak", mesh=mesh)
    np.testing.assert_allclose(ja.score(anew, QUERIES), ja.score(stored, QUERIES), rtol=1e-9)
    tops = [ja.top_k(index, QUERIES, k=3) for index in (anew, stored)]
    np.testing.assert_array_equal(tops[0].ids, tops[1].ids)


def test_examples_that_are_not_finite_are_left_out():
    broken = dict(TRAIN, x=TRAIN["x"].at[5].set(jnp.nan))
    method = METHODS["trak"]
    with pytest.warns(ja.NonFiniteWarning, match="ids 5"):
        anew = ja.build_index(method, CHECKPOINTS, broken, batch_size=8, store=False)
    with pytest.warns(ja.NonFiniteWarning, match="ids 5"):
        stored = ja.build_index(method, CHECKPOINTS, broken, batch_size=8)
    assert 5 not in np.asarray(ja.top_k(anew, QUERIES, k=36).ids)
    assert np.isfinite(ja.score(anew, QUERIES)).all()
    np.testing.assert_allclose(ja.score(anew, QUERIES), ja.score(stored, QUERIES), rtol=1e-9)


def test_blocks_are_as_large_as_their_features_have_room(monkeypatch):
    from jaxattr.features import featurizer

    width = sum(x.size for x in jax.tree.leaves(CHECKPOINTS[0]))
    monkeypatch.setattr(featurizer, "_ROOM_OF_HOST", 5 * 2 * 8 * width)  # float64
    anew = ja.build_index(METHODS["tracin"], CHECKPOINTS, TRAIN, store=False)
    assert anew.batch_size == 5


@pytest.mark.parametrize("options", [{"path": "somewhere"}, {"dtype": jnp.bfloat16}])
def test_what_is_not_kept_has_no_place(options):
    with pytest.raises(ValueError, match="store=False keeps no features"):
        ja.build_index(METHODS["tracin"], CHECKPOINTS, TRAIN, store=False, **options)


def test_it_says_so():
    anew = both("logra")[1]
    assert "made anew" in repr(anew) and "made anew" in anew._repr_html_()


@pytest.mark.filterwarnings("ignore::jaxattr.weights.report.WeightWarning")
@pytest.mark.parametrize("name", ["tracin", "ekfac"])
def test_weights_learned_from_outcomes_are_the_same(name):
    masks = ja.evaluation.random_subsets(jax.random.key(0), 37, 24)
    outputs = masks @ np.random.default_rng(1).normal(size=(37, 12))
    outcomes = ja.Outcomes(masks, outputs)
    fits = [ja.learn_weights(index, QUERIES, outcomes=outcomes) for index in both(name)]
    assert fits[0].weights.keys() == fits[1].weights.keys()
    assert len(set(np.round(list(fits[0].weights.values()), 6))) > 1
    for group, weight in fits[0].weights.items():
        np.testing.assert_allclose(weight, fits[1].weights[group], rtol=1e-6)


@pytest.mark.parametrize("at_once", [1, 5, 12, 100])
def test_queries_in_groups_have_the_same_scores(tmp_path, at_once):
    masked = dict(QUERIES, x=QUERIES["x"].at[7].set(jnp.nan))
    for index in both("trak"):
        with pytest.warns(ja.NonFiniteWarning, match="1 of 12 queries .* ids 7"):
            prepared = ja.query_features(index, masked)
        expected = ja.score(index, prepared)
        groups = dict(queries_at_once=at_once)
        with pytest.warns(ja.NonFiniteWarning, match="1 of 12 queries .* ids 7"):
            scores = ja.score(index, masked, **groups)
        np.testing.assert_allclose(scores, expected, rtol=1e-12)
        path = tmp_path / str(index.rows.resident)
        with pytest.warns(ja.NonFiniteWarning):
            on_disk = ja.score(index, masked, path=path, **groups)
        np.testing.assert_allclose(on_disk.read().result(), expected, rtol=1e-12)
        for among in (None, np.random.default_rng(2).integers(37, size=(12, 20))):
            best = ja.top_k(index, prepared, k=5, among=among)
            with pytest.warns(ja.NonFiniteWarning):
                found = ja.top_k(index, masked, k=5, among=among, **groups)
            np.testing.assert_array_equal(found.ids, best.ids)
            np.testing.assert_allclose(found.scores, best.scores, rtol=1e-12)


def test_queries_draw_the_same_randomness_in_any_group():
    def noisy(params, example, key):
        return models.loss(params, example, key) * jax.random.normal(key)

    index = ja.build_index(ja.tracin(noisy), CHECKPOINTS, TRAIN)
    expected = ja.score(index, QUERIES)
    np.testing.assert_allclose(ja.score(index, QUERIES, queries_at_once=5), expected, rtol=1e-12)


def test_groups_are_as_large_as_their_features_have_room(monkeypatch):
    from jaxattr.features import featurizer
    from jaxattr.index import queries

    index = both("tracin")[1]
    expected, sizes, real = ja.score(index, QUERIES), [], queries._streamed

    def counted(index, source, functions, role, group):
        sizes.append(len(group))
        return real(index, source, functions, role, group)

    monkeypatch.setattr(queries, "_streamed", counted)
    monkeypatch.setattr(featurizer, "_ROOM_OF_HOST", 5 * 2 * 8 * index.layout.total)  # float64
    np.testing.assert_allclose(ja.score(index, QUERIES), expected, rtol=1e-12)
    assert sizes == [4, 4, 4]


def test_a_group_has_queries():
    with pytest.raises(ValueError, match="queries_at_once"):
        ja.score(both("tracin")[0], QUERIES, queries_at_once=0)
