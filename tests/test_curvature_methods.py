"""LoGRA, K-FAC, EK-FAC, TrackStar and influence functions against what they are defined to be."""

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr import kernels
from jaxattr.features import projections
from jaxattr.features.featurizer import FeatureRule
from jaxattr.index.index import ConvergenceWarning
from tests import models
from tests.curvature import (
    EXACT,
    FEW,
    METHODS,
    PARAMS,
    QUERIES,
    TRAIN,
    adam_state,
    index_of,
    method_of,
)


@pytest.mark.parametrize("name", METHODS)
def test_batches_and_order_do_not_matter(name):
    # Labels are drawn by id, and other examples have other ids in another order.
    step = 1 if "true" in name else -1
    at_once = jax.tree.map(lambda x: x[::step], TRAIN)
    whole = ja.score(ja.build_index(method_of(name), PARAMS, at_once), QUERIES)[:, ::step]
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(ja.score(index_of(name), QUERIES), whole, rtol=1e-6)


@pytest.mark.filterwarnings("ignore::jaxattr.weights.report.WeightWarning")
@pytest.mark.parametrize("name", METHODS)
def test_contributions_and_self_influence_fit_the_scores(name):
    index = index_of(name)
    scores = ja.score(index, QUERIES)
    np.testing.assert_allclose(ja.contributions(index, QUERIES).sum(-1), scores, rtol=1e-9)
    own = ja.self_influence(index)
    np.testing.assert_allclose(own, np.diag(ja.score(index, TRAIN)), rtol=1e-8)
    top = ja.attributor(index, k=3)(QUERIES)
    np.testing.assert_array_equal(top.ids, np.argsort(-scores, axis=1)[:, :3])
    fit = ja.learn_weights(index, QUERIES, top_k=3, steps=1, held_out=0)
    assert set(fit.weights) == set(index.layout.names)


# The others sum and invert as one of these does.
@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"LoGRA-PCA", "EShampoo, true"}))
@pytest.mark.parametrize("field", TRAIN)
def test_an_example_that_is_not_finite_does_no_harm(name, field):
    # The last, since labels are drawn by id. A label out of range: the loss is not a number, and
    # its gradient finite; and with a label that is drawn from the model both are finite.
    bad = TRAIN | {field: TRAIN[field].at[19].set(jnp.nan if field == "x" else 99)}
    with pytest.warns(ja.NonFiniteWarning, match="1 of 20 training examples.*ids 19"):
        index = FEW(method_of(name), PARAMS, bad)
    others = jax.tree.map(lambda x: x[:19], TRAIN)
    expected = ja.score(FEW(method_of(name), PARAMS, others), QUERIES)
    got = ja.score(index, QUERIES)
    np.testing.assert_allclose(got[:, :19], expected, rtol=1e-7)
    assert (got[:, 19] == 0).all()


def test_without_curvature_ekfac_is_tracin():
    rule = ja.ekfac(models.loss).rule
    rotated = ja.Method("rotated", rule, kernels.Identity())
    expected = ja.score(FEW(ja.tracin(models.loss, projection=EXACT), PARAMS, TRAIN), QUERIES)
    index = FEW(rotated, PARAMS, TRAIN)
    np.testing.assert_allclose(ja.score(index, QUERIES), expected, rtol=1e-12)
    np.testing.assert_allclose(index.fitted[0].captured["layer0/kernel"], 1, rtol=1e-12)


def test_conjugate_gradients_report_where_they_end():
    method = functools.partial(ja.influence, models.loss, solver="cg")
    index = FEW(method(damping=ja.absolute(0.5), tolerance=1e-8), PARAMS, TRAIN)
    assert index.solve_errors.shape == (20,) and index.solve_errors.max() < 2e-8
    with pytest.warns(ConvergenceWarning, match="20 of 20 solves did not converge"):
        short = FEW(method(damping=ja.absolute(0.5), iterations=1), PARAMS, TRAIN)
    assert np.isfinite(ja.score(short, QUERIES)).all()


@pytest.mark.parametrize("size", [1e-19, 1e-22])
def test_conjugate_gradients_of_gradients_whose_squares_are_zero(size):
    x = jax.random.normal(jax.random.key(0), (6, 3), jnp.float32)

    def scores(size):
        def loss(params, example, key):
            return size * 0.5 * (params["w"] @ example) ** 2

        method = ja.influence(loss, damping=ja.absolute(size), solver="cg")
        index = ja.build_index(method, {"w": jnp.ones(3, jnp.float32)}, x)
        assert (index.solve_errors < 1e-3).all()
        return np.asarray(ja.score(index, x)) / size

    np.testing.assert_allclose(scores(size), scores(1.0), rtol=1e-3, atol=1e-3)


def test_a_solve_that_ends_in_no_number_is_reported_in_memory_and_on_disk(tmp_path):
    def rough(params, example, key):  # whose curvature is infinite where it fits exactly
        return jnp.abs(params["w"] @ example["x"] - example["y"]) ** 1.5

    x = np.random.default_rng(0).normal(size=(4, 2))
    train = {"x": x, "y": x.sum(axis=1) + np.array([0, 0, 0, 0.5])}
    method = ja.influence(rough, damping=ja.absolute(0.1), solver="cg")
    for where in ({}, {"path": tmp_path / "index"}):
        with pytest.warns(ConvergenceWarning, match="4 of 4 solves did not converge: .*up to inf"):
            ja.build_index(method, {"w": jnp.ones(2)}, train, **where)
    with pytest.raises(ValueError, match="The Hessian is not finite"):
        ja.build_index(ja.influence(rough, damping=ja.absolute(0.1)), {"w": jnp.ones(2)}, train)


def test_negative_curvature_is_reported_and_is_no_nan():
    method = ja.influence(models.loss, damping=ja.absolute(1e-6), solver="cg", iterations=5)
    with pytest.warns(ConvergenceWarning, match="negative eigenvalues"):
        index = FEW(method, PARAMS, TRAIN)
    assert np.isfinite(ja.score(index, QUERIES)).all()


def test_influence_in_a_subspace_is_that_of_the_subspace():
    """The projected Hessian is E^T H E, where features are E^T times gradients."""
    projection = projections.two_sided(3)
    method = ja.influence(models.loss, damping=ja.absolute(1.0), projection=projection)
    index = FEW(method, PARAMS, TRAIN)
    features = index.featurizer
    flat, unflatten = jax.flatten_util.ravel_pytree(PARAMS)

    def mean_loss(flat):
        each = jax.vmap(models.loss, (None, 0, None))(unflatten(flat), TRAIN, None)
        return each.mean()

    hessian = jax.jit(jax.hessian(mean_loss))(flat)
    gradient = jax.jit(
        jax.vmap(lambda x: jax.flatten_util.ravel_pytree(jax.grad(models.loss)(PARAMS, x, None))[0])
    )
    many = models.data(300, seed=9)
    embedding = np.linalg.lstsq(gradient(many), features(PARAMS, many), rcond=None)[0]
    phi, q = features(PARAMS, TRAIN), features(PARAMS, QUERIES)
    inner = embedding.T @ hessian @ embedding + np.eye(phi.shape[1])
    expected = q @ np.linalg.solve(inner, phi.T)
    np.testing.assert_allclose(ja.score(index, QUERIES), expected, rtol=1e-6)


def test_influence_by_the_fisher_matrix_is_between_all_layers():
    method = ja.influence(models.loss, damping=ja.absolute(2.0), curvature="fisher")
    index = FEW(method, PARAMS, TRAIN)

    def of_one(x):
        return jax.flatten_util.ravel_pytree(jax.grad(models.loss)(PARAMS, x, None))[0]

    phi, q = map(jax.jit(jax.vmap(of_one)), (TRAIN, QUERIES))
    expected = q @ np.linalg.solve(phi.T @ phi + 2 * np.eye(phi.shape[1]), phi.T)
    np.testing.assert_allclose(ja.score(index, QUERIES), expected, rtol=1e-8)
    with pytest.raises(ValueError, match="leave out solver="):
        ja.influence(models.loss, damping=ja.absolute(2.0), curvature="fisher", solver="cg")
    with pytest.raises(ValueError, match="'hessian' or 'fisher', got 'ntk'"):
        ja.influence(models.loss, damping=ja.absolute(2.0), curvature="ntk")


def test_bad_arguments():
    loss = models.loss
    with pytest.raises(ValueError, match="needs labels drawn from the model: pass sample="):
        ja.ekfac(loss, fisher="true")
    with pytest.raises(ValueError, match="fisher must be 'empirical' or 'true', got 'exact'"):
        ja.kfac(loss, fisher="exact")
    with pytest.raises(ValueError, match="basis must be 'random' or 'pca'"):
        ja.logra(loss, basis="kfac")
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        ja.logra(loss, rank=0)
    with pytest.raises(ValueError, match="bands must be at least 1"):
        ja.ekfac(loss, bands=0)
    with pytest.raises(ValueError, match="damping must be ja.absolute"):
        ja.ekfac(loss, damping=0.1)
    with pytest.raises(ValueError, match="must be above 0, got 0"):
        ja.data_inf(loss, damping=ja.absolute(0))
    with pytest.raises(ValueError, match="do not know the mean eigenvalue"):
        ja.influence(loss, damping=ja.relative(0.1), solver="cg")
    with pytest.raises(ValueError, match="solver must be"):
        ja.influence(loss, damping=ja.absolute(0.1), solver="lissa")
    with pytest.raises(ValueError, match="use solver='exact'"):
        ja.influence(loss, damping=ja.absolute(0.1), solver="cg", positive_only=True)
    for tolerance in (0, np.nan):
        with pytest.raises(ValueError, match="tolerance must be above 0, got"):
            ja.influence(loss, damping=ja.absolute(0.1), solver="cg", tolerance=tolerance)
    with pytest.raises(TypeError, match="iterations must be a whole number"):
        ja.influence(loss, damping=ja.absolute(0.1), solver="cg", iterations=2.5)
    with pytest.raises(ValueError, match="mixing must be between 0 and 1, got 2"):
        ja.trackstar(loss, adam_state(), PARAMS, queries=QUERIES, mixing=2)
    with pytest.raises(ValueError, match="needs queries= to mix with"):
        ja.trackstar(loss, adam_state(), PARAMS, mixing=0.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ja.kfac(models.loss, damping=ja.absolute(0.0)),
        lambda: ja.trackstar(models.loss, adam_state(), PARAMS, damping=ja.absolute(0.0)),
        lambda: ja.Method(
            "flat",
            FeatureRule(lambda p, x, key: jnp.sum(p["layer0"]["bias"]) * (1 + 0 * x["y"]), EXACT),
            kernels.InverseHessian(ja.absolute(0.0)),
        ),
    ],
)
def test_singular_kernels(make):
    few = jax.tree.map(lambda x: x[:2], TRAIN)
    with pytest.raises(ValueError, match="singular"):
        FEW(make(), PARAMS, few)


@pytest.mark.parametrize("method", [ja.kfac, ja.ekfac])
def test_layers_of_very_different_scale_are_not_singular(method):
    params = PARAMS | {"layer2": jax.tree.map(lambda x: 1e-7 * x, PARAMS["layer2"])}
    params, train, queries = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, (params, TRAIN, QUERIES)
    )
    scores = ja.score(FEW(method(models.loss), params, train), queries)
    assert np.isfinite(scores).all() and np.abs(scores).min() > 0
    tiny = FEW(method(models.loss, damping=ja.absolute(1e-8)), params, train)
    assert np.isfinite(ja.score(tiny, queries)).all()


class Tempered:
    scale = 1.0

    def loss(self, params, example, key):
        return models.loss(params, example | {"x": self.scale * example["x"]}, key)


def test_what_a_loss_closes_over_may_change_between_methods():
    trainer, fresh = Tempered(), Tempered()
    FEW(ja.ekfac(trainer.loss), PARAMS, TRAIN)
    trainer.scale = fresh.scale = 0.1
    got, expected = (
        ja.score(FEW(ja.ekfac(each.loss), PARAMS, TRAIN), QUERIES) for each in (trainer, fresh)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_a_loss_without_a_hash():
    @dataclasses.dataclass
    class Weighted:
        weight: float

        def __call__(self, params, example, key):
            return self.weight * models.loss(params, example, key)

    got = FEW(ja.ekfac(Weighted(1.0)), PARAMS, TRAIN)
    np.testing.assert_allclose(
        ja.score(got, QUERIES), ja.score(index_of("EK-FAC"), QUERIES), rtol=1e-9
    )


def test_a_residual_must_be_a_scalar():
    with pytest.raises(ValueError, match=r"one float scalar; it returned float64\[1\]"):
        FEW(ja.trak(models.margin, residual=lambda p, x, key: jnp.ones(1)), PARAMS, TRAIN)


def test_a_frozen_dict_is_data_and_no_source():
    index = FEW(ja.tracin(models.loss), PARAMS, flax.core.freeze(TRAIN))
    assert index.size == 20


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_hessian_of_short_floats_is_summed_in_long_ones(dtype):
    """Of 25,600 examples in blocks of 64: a sum in bfloat16 has long stopped growing."""
    rng = np.random.default_rng(0)
    x = ((np.abs(rng.normal(size=(25_600, 2))) * 0.2 + 1) * 0.1).astype(np.float32)
    train = {"x": x, "y": rng.normal(size=len(x)).astype(np.float32)}

    def squared(params, example, key):
        output = jnp.dot(example["x"].astype(dtype), params["w"]).astype(jnp.float32)
        return 0.5 * (output - example["y"]) ** 2

    params = {"w": jnp.array([0.5, -0.25], dtype)}
    method = ja.influence(squared, damping=ja.absolute(1e-3))
    index = ja.build_index(method, params, train, batch_size=6400)
    queries = jax.tree.map(lambda a: a[:2], train)
    residual = x.astype(np.float64) @ np.array([0.5, -0.25]) - train["y"]
    gradients, hessian = residual[:, None] * x, x.T.astype(np.float64) @ x / len(x)
    expected = gradients[:2] @ np.linalg.solve(hessian + 1e-3 * np.eye(2), gradients[:8].T)
    got = np.asarray(ja.score(index, queries), np.float64)[:, :8]
    assert np.abs(got - expected).max() <= 0.04 * np.abs(expected).max()
