"""Queries that are differences: their scores are those of the function of the difference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr.features import projections
from tests import diffusion_models as toy
from tests import models

TRAIN, BETTER, WORSE = models.data(41), models.data(6, seed=1), models.data(6, seed=2)
CHECKPOINTS = [models.mlp_params(jax.random.key(i)) for i in range(2)]
WEIGHTS = {"layer0": 0.2, "layer1": 2.5, "layer2": 0.0}
LINEAR = {
    "tracin": ja.tracin(models.loss, projection=projections.rademacher(12)),
    "trak": ja.trak(models.margin),
    "logra": ja.logra(models.loss, rank=3),
    "ekfac": ja.ekfac(models.loss),
    "source": ja.source(models.loss, learning_rate=0.1, steps=30),
}
MOMENTS = [jax.tree.map(jnp.ones_like, params) for params in CHECKPOINTS]
SCALED = {
    "grad_cos": ja.grad_cos(models.loss),
    "trackstar": ja.trackstar(models.loss, MOMENTS, CHECKPOINTS[0], rank=3),
}
METHODS = LINEAR | SCALED


@functools.cache
def index(name):
    return ja.build_index(METHODS[name], CHECKPOINTS, TRAIN, batch_size=16)


@functools.cache
def of_pairs(name):
    """An index of which queries are pairs, and their output the difference itself."""
    output = METHODS[name].rule.output

    def difference(params, pair, key):
        return output(params, pair["better"], key) - output(params, pair["worse"], key)

    # A residual, which multiplies training examples alone, would be asked for one of a pair.
    rule = dataclasses.replace(METHODS[name].rule, residual=None)
    method = dataclasses.replace(METHODS[name], rule=rule, query_output=difference)
    return ja.build_index(method, CHECKPOINTS, TRAIN, batch_size=16)


@pytest.mark.parametrize("name", LINEAR)
def test_scores_are_differences_of_scores(name):
    found = ja.score(index(name), ja.contrast(index(name), BETTER, WORSE), weights=WEIGHTS)
    better, worse = (ja.score(index(name), q, weights=WEIGHTS) for q in (BETTER, WORSE))
    assert models.relative_error(found, better - worse) <= 1e-12


@pytest.mark.parametrize("name", METHODS)
def test_scores_are_those_of_the_difference_as_a_function(name):
    found = ja.score(index(name), ja.contrast(index(name), BETTER, WORSE))
    expected = ja.score(of_pairs(name), {"better": BETTER, "worse": WORSE})
    expected = expected * index(name).residual[None]
    assert models.relative_error(found, expected) <= 1e-9


@pytest.mark.parametrize("name", SCALED)
def test_the_difference_is_scaled_and_not_its_parts(name):
    phi = np.asarray(ja.contrast(index(name), BETTER, WORSE).features).reshape(6, 2, -1)
    np.testing.assert_allclose(np.linalg.norm(phi, axis=-1), 1, rtol=1e-12)
    parts = ja.score(index(name), BETTER) - ja.score(index(name), WORSE)
    found = ja.score(index(name), ja.contrast(index(name), BETTER, WORSE))
    assert models.relative_error(found, parts) > 0.01


def test_one_step_of_training_moves_the_difference_as_the_score_says():
    method = ja.tracin(models.loss, projection=projections.identity())
    built = ja.build_index(method, CHECKPOINTS[0], TRAIN)
    scores = np.asarray(ja.score(built, ja.contrast(built, BETTER, WORSE)))
    n, step = int(scores[0].argmax()), 1e-5
    example = jax.tree.map(lambda x: x[n], TRAIN)
    gradient = models.gradient(CHECKPOINTS[0], example, None)
    moved = jax.tree.map(lambda p, g: p - step * g, CHECKPOINTS[0], gradient)

    def lead(params):
        better, worse = (models.loss(params, models.one(q), None) for q in (BETTER, WORSE))
        return better - worse

    np.testing.assert_allclose((lead(CHECKPOINTS[0]) - lead(moved)) / step, scores[0, n], rtol=1e-3)


def test_a_pair_draws_the_same_randomness_twice():
    def noisy(params, example, key):
        x = example["x"] + jax.random.normal(key, example["x"].shape)
        return models.loss(params, example | {"x": x}, None)

    built = ja.build_index(ja.tracin(noisy), CHECKPOINTS, TRAIN)
    np.testing.assert_array_equal(ja.score(built, ja.contrast(built, BETTER, BETTER)), 0)


def test_on_a_mesh_and_in_a_top_k():
    mesh = jax.make_mesh((8,), ("data",))
    spread = ja.build_index(METHODS["grad_cos"], CHECKPOINTS, TRAIN, batch_size=16, mesh=mesh)
    top = ja.top_k(spread, ja.contrast(spread, BETTER, WORSE), k=5)
    expected = ja.score(index("grad_cos"), ja.contrast(index("grad_cos"), BETTER, WORSE))
    np.testing.assert_array_equal(top.ids, jax.lax.top_k(expected, 5)[1])


def test_pairs_of_which_one_is_not_finite_are_marked():
    bad = WORSE | {"x": WORSE["x"].at[2].set(jnp.nan)}
    with pytest.warns(ja.NonFiniteWarning, match="1 of 6 pairs of queries .* ids 2"):
        scores = np.asarray(ja.score(index("tracin"), ja.contrast(index("tracin"), BETTER, bad)))
    assert np.isnan(scores[2]).all() and np.isfinite(np.delete(scores, 2, axis=0)).all()


def test_what_is_no_contrast():
    built = index("tracin")
    with pytest.raises(ValueError, match="must be pairs, got 6 and 5 examples"):
        ja.contrast(built, BETTER, models.data(5))
    with pytest.raises(TypeError, match="worse is QueryFeatures, .* pass the queries themselves"):
        ja.contrast(built, BETTER, ja.query_features(built, WORSE))
    with pytest.raises(ValueError, match="lack fields"):
        ja.contrast(built, BETTER, {"x": WORSE["x"]})
    with pytest.raises(TypeError, match="index must be an Index"):
        ja.contrast(BETTER, BETTER, WORSE)


def test_squares_and_unit_norm_per_draw_are_refused():
    images = toy.images(9)
    built = ja.build_index(ja.tracin(toy.expected_loss(unit_norm=True)), toy.params(), images)
    with pytest.raises(ValueError, match="A contrast needs features that are gradients"):
        ja.contrast(built, images, images)
    squared = ja.build_index(ja.das(models.loss), CHECKPOINTS, TRAIN)
    with pytest.raises(ValueError, match='are squares, .* Build it with link="identity"'):
        ja.contrast(squared, BETTER, WORSE)
