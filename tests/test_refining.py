"""Queries refined with the curvature itself: exact influence where it can be formed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import jaxattr as ja
from jaxattr.index import refining
from tests import models

TRAIN, QUERIES = models.data(40), models.data(7, seed=3)
CHECKPOINTS = [models.mlp_params(jax.random.key(seed)) for seed in range(2)]
DAMPING = {"hessian": 3.0, "gauss_newton": 0.3}


def outputs(params, example, key):
    return models.mlp(params, example["x"])


def loss_of(logits, example):
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])


def index_of(method=None, **options):
    method = ja.ekfac(models.loss) if method is None else method
    return ja.build_index(method, CHECKPOINTS, TRAIN, batch_size=16, **options)


def influence(kind, train=TRAIN, queries=QUERIES):
    """Scores with the exact inverse, in the coordinates of the parameters."""
    total = 0
    for params in CHECKPOINTS:
        flat, back = ravel_pytree(params)

        def gradients(batch, flat=flat, back=back):
            of_one = jax.grad(lambda x, example: models.loss(back(x), example, None))
            return jax.jit(jax.vmap(of_one, in_axes=(None, 0)))(flat, batch)

        matrix = CURVATURES[kind](flat, back, train) + DAMPING[kind] * jnp.eye(flat.size)
        total += gradients(queries) @ jnp.linalg.solve(matrix, gradients(train).T)
    return total


def hessian(flat, back, train):
    def mean(x):
        return jax.vmap(lambda e: models.loss(back(x), e, None))(train).mean()

    return jax.jit(jax.hessian(mean))(flat)


def gauss_newton(flat, back, train):
    def of_one(example):
        z = models.mlp(back(flat), example["x"])
        slope = jax.jacobian(lambda x: models.mlp(back(x), example["x"]))(flat)
        return slope.T @ jax.hessian(loss_of)(z, example) @ slope

    return jax.jit(jax.vmap(of_one))(train).mean(axis=0)


CURVATURES = {"hessian": hessian, "gauss_newton": gauss_newton}
SOLVED = dict(iterations=300, tolerance=1e-12)
OPTIONS = {"hessian": {}, "gauss_newton": dict(outputs=outputs, loss=loss_of)}
EXACT_GAUSS_NEWTON = dict(
    OPTIONS["gauss_newton"], damping=ja.absolute(DAMPING["gauss_newton"]), **SOLVED
)


def refined_exactly(kind, index, queries=QUERIES):
    damping = ja.absolute(DAMPING[kind])
    return ja.astra(index, queries, damping=damping, **SOLVED, **OPTIONS[kind])


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("method", [ja.ekfac, ja.kfac, ja.eshampoo])
def test_scores_are_those_of_the_exact_inverse(kind, method):
    index = index_of(method(models.loss))
    refined = refined_exactly(kind, index)
    assert refined.residuals.max() < 1e-11
    expected = influence(kind)
    np.testing.assert_allclose(ja.score(index, refined), expected, rtol=1e-8, atol=1e-10)
    parts = ja.contributions(index, refined)
    np.testing.assert_allclose(parts.sum(axis=2), expected, rtol=1e-8, atol=1e-10)


def test_residuals_fall_with_iterations_to_the_tolerance():
    index, found = index_of(), []
    options = dict(OPTIONS["gauss_newton"], damping=ja.absolute(0.3), tolerance=1e-8)
    for iterations in (1, 4, 16):
        with pytest.warns(ja.ConvergenceWarning, match="7 of 7 queries"):
            found.append(ja.astra(index, QUERIES, iterations=iterations, **options).residuals.max())
    found.append(ja.astra(index, QUERIES, iterations=400, **options).residuals.max())
    assert found == sorted(found, reverse=True) and found[-1] <= 1e-8


def test_no_residual_is_above_that_of_ekfac(monkeypatch):
    index = index_of()
    monkeypatch.setattr(
        "jaxattr.kernels.conjugate_gradients.solve", lambda multiply, right, **_: 1e3 * right
    )
    with pytest.warns(ja.ConvergenceWarning):
        refined = ja.astra(index, QUERIES, tolerance=1e-8, iterations=7)  # a program of its own
    plain = ja.query_features(index, QUERIES).features
    np.testing.assert_allclose(refined.features, plain, rtol=1e-12, atol=1e-15)


def test_where_nothing_is_found_queries_are_those_of_ekfac():
    def concave(params, example, key):
        return -3 * (params["w"] @ example["x"]) ** 2

    params = {"w": jnp.full(5, 0.1)}
    index = ja.build_index(ja.ekfac(concave), params, {"x": TRAIN["x"][:, :5]})
    asked = {"x": QUERIES["x"][:, :5]}
    with pytest.warns(ja.ConvergenceWarning, match="7 of 7"):
        refined = ja.astra(index, asked, damping=ja.absolute(0))
    assert (refined.residuals > 1).all()
    plain = ja.query_features(index, asked).features
    np.testing.assert_allclose(refined.features, plain, rtol=1e-12)


@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_eigenvalues_past_the_range_of_float32_are_refused(factor):
    def loss(params, example, key):
        return jnp.float32(factor) * models.loss(params, example, key)

    params = jax.tree.map(lambda x: x.astype(jnp.float32), CHECKPOINTS[0])
    train, asked = (dict(each, x=each["x"].astype(jnp.float32)) for each in (TRAIN, QUERIES))
    index = ja.build_index(ja.ekfac(loss), params, train)
    with pytest.raises(ValueError, match="are not within the range of float32: scale the loss"):
        ja.astra(index, asked)


def test_without_a_store_over_devices_and_from_disk(tmp_path):
    index = index_of(path=tmp_path / "index")
    expected = influence("gauss_newton")
    others = [
        index_of(store=False),
        index_of(mesh=jax.make_mesh((8,), ("data",))),
        ja.open_index(tmp_path / "index", index.method, CHECKPOINTS, train=TRAIN),
    ]
    for index in others:
        scores = ja.score(index, refined_exactly("gauss_newton", index))
        np.testing.assert_allclose(scores, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", OPTIONS)
def test_examples_that_are_not_finite_have_no_part_in_it(kind):
    broken = dict(TRAIN, x=TRAIN["x"].at[0].set(jnp.nan))
    asked = dict(QUERIES, x=QUERIES["x"].at[2].set(jnp.inf))
    with pytest.warns(ja.NonFiniteWarning, match="ids 0"):
        index = ja.build_index(ja.ekfac(models.loss), CHECKPOINTS, broken, batch_size=16)
    with pytest.warns(ja.NonFiniteWarning, match="ids 2"):
        refined = refined_exactly(kind, index, asked)
    scores = np.asarray(ja.score(index, refined))
    assert np.isnan(scores[2]).all()
    kept = jax.tree.map(lambda x: x[1:], TRAIN)
    others = jax.tree.map(lambda x: jnp.delete(x, 2, axis=0), QUERIES)
    expected = influence(kind, kept, others)
    np.testing.assert_allclose(np.delete(scores, 2, 0)[:, 1:], expected, rtol=1e-8, atol=1e-10)


def test_a_loss_of_outputs_is_compared_where_it_is_finite():
    broken = dict(TRAIN, x=TRAIN["x"].at[0].set(jnp.nan))
    with pytest.warns(ja.NonFiniteWarning, match="ids 0"):
        index = ja.build_index(ja.ekfac(models.loss), CHECKPOINTS, broken, batch_size=16)
    with pytest.raises(ValueError, match="must be the function that is .* training example 1 "):
        ja.astra(index, QUERIES, outputs=outputs, loss=lambda z, e: 2 * loss_of(z, e))


def test_curvature_of_some_examples_is_that_of_an_index_of_those():
    index = index_of()
    some = ja.astra(index, QUERIES, examples=25, **EXACT_GAUSS_NEWTON)
    counted = refining._drawn(index, 25)
    assert counted.sum() == 25
    kept = jax.tree.map(lambda x: x[counted], TRAIN)
    scores = np.asarray(ja.score(index, some))[:, counted]
    np.testing.assert_allclose(scores, influence("gauss_newton", kept), rtol=1e-8, atol=1e-10)
    assert refining._drawn(index, 10**9).all()


def test_functions_are_what_they_compute_when_they_are_given():
    class Scaled:
        __hash__ = None  # as of models that are dataclasses of arrays

        def __init__(self, by):
            self.by = by

        def __eq__(self, other):
            return True

        def __call__(self, params, example, key):
            return self.by * models.mlp(params, example["x"]) / self.by

    def loss(z, example):
        return state["by"] * loss_of(z, example)

    index, state = index_of(), {"by": 1.0}
    expected = ja.astra(index, QUERIES, **EXACT_GAUSS_NEWTON).features
    options = dict(EXACT_GAUSS_NEWTON, outputs=Scaled(jnp.float64(2)), loss=loss)
    found = ja.astra(index, QUERIES, **options).features
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)

    state["by"] = 1 + 5e-4  # within what the check of the loss takes for the same
    damping = ja.absolute(state["by"] * DAMPING["gauss_newton"])
    again = ja.astra(index, QUERIES, **dict(options, damping=damping)).features
    np.testing.assert_allclose(again, expected / state["by"], rtol=1e-8, atol=1e-10)


def test_what_cannot_be_refined_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ja\.kfac or ja\.eshampoo, and this index is of LoGRA"):
        ja.astra(index_of(ja.logra(models.loss)), QUERIES)
    with pytest.raises(ValueError, match="one of them"):
        ja.astra(index_of(), QUERIES, outputs=outputs)
    with pytest.raises(TypeError, match=r"loss takes \(z\), and is called as \(z, example\)"):
        ja.astra(index_of(), QUERIES, outputs=outputs, loss=lambda z: z.sum())
    with pytest.raises(TypeError, match="outputs must be a function .* got str"):
        ja.astra(index_of(), QUERIES, outputs="logits", loss=loss_of)
    for tolerance in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"tolerance must be above 0, got {tolerance}"):
            ja.astra(index_of(), QUERIES, tolerance=tolerance)
    with pytest.raises(ValueError, match="must be the function that is attributed"):
        ja.astra(index_of(), QUERIES, outputs=outputs, loss=lambda z, e: 2 * loss_of(z, e))
    method = index_of(path=tmp_path / "index").method
    with pytest.raises(ValueError, match="train=train"):
        ja.astra(ja.open_index(tmp_path / "index", method, CHECKPOINTS), QUERIES)
