"""Huge and tiny gradients: the right answer, or the example by name; never a number in silence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr import scales

N, P = 12, 3
X = np.random.default_rng(0).normal(size=(N, P)).astype(np.float32)
PARAMS = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(1, jnp.float32)}
GROUPS = ja.by_leaf


def linear(params, example, key):
    """Its gradient is the example."""
    return params["a"] @ example["x"][:2] + params["b"] @ example["x"][2:]


def with_outlier(factor, row=2):
    x = X.copy()
    x[row] *= np.float32(factor)
    return x


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_scaling_is_exact(dtype):
    x = jax.random.normal(jax.random.key(0), (50,), dtype) * jnp.asarray(1e3, dtype)
    for exponent in (-90, -3, 0, 5, 100):
        there = scales.scaled(x, exponent)
        np.testing.assert_array_equal(there, np.ldexp(np.asarray(x), exponent))
        np.testing.assert_array_equal(scales.scaled(there, -exponent), x)
    assert (jnp.abs(x) < 2.0 ** scales.exponent_of(x)).all()
    assert (jnp.abs(x).max() >= 2.0 ** (scales.exponent_of(x) - 1)).all()
    assert scales.exponent_of(jnp.zeros(4, dtype)) == 0


def oracle(x, queries):
    return queries.astype(np.float64) @ x.astype(np.float64).T


@pytest.mark.parametrize("opponents", [False, True])
@pytest.mark.parametrize("factor", [1e20, 3e37, 1e-20, 1e-30])
def test_strongest_examples_past_the_range_of_float32(factor, opponents):
    x = with_outlier(factor) if factor > 1 else X * np.float32(factor)
    queries = x[[2, 5]]
    index = ja.build_index(ja.tracin(linear), PARAMS, {"x": x}, groups=GROUPS)
    expected = oracle(x, queries)
    order = np.argsort(expected if opponents else -expected, axis=1)[:, :5]
    attribute = ja.attributor(index, k=5, opponents=opponents)
    np.testing.assert_array_equal(attribute({"x": queries}).ids, order)
    sides = np.sign(np.take_along_axis(expected, order, axis=1))
    call = lambda: ja.top_k(index, {"x": queries}, k=5, opponents=opponents)  # noqa: E731
    past = np.abs(np.take_along_axis(expected, order, axis=1)) > np.finfo(np.float32).max
    if past.any():
        with pytest.warns(ja.NonFiniteWarning, match="scores are past the range of float32"):
            top = call()
        np.testing.assert_array_equal(np.isinf(top.scores), past)
    else:
        top = call()
    np.testing.assert_array_equal(top.ids, order)
    if factor > 1:
        np.testing.assert_array_equal(np.sign(top.scores), sides)


@pytest.mark.parametrize("weight", [1e30, 1e-30])
def test_weights_far_from_one(weight):
    index = ja.build_index(ja.tracin(linear), PARAMS, {"x": X}, groups=GROUPS)
    queries, weights = {"x": X[:4]}, {"a": weight, "b": weight / 2}
    expected = oracle(X * np.array([1, 1, 0.5]), X[:4]) * weight
    order = np.argsort(-expected, axis=1)
    np.testing.assert_allclose(ja.score(index, queries, weights=weights), expected, rtol=1e-5)
    top = ja.top_k(index, queries, k=N, weights=weights)
    np.testing.assert_array_equal(top.ids, order)
    np.testing.assert_allclose(top.scores, np.take_along_axis(expected, order, axis=1), rtol=1e-5)
    found = ja.attributor(index, weights=weights, k=N)(queries)
    np.testing.assert_array_equal(found.ids, order)


def test_rows_made_anew_may_grow_from_block_to_block():
    """Each block has its own largest feature, and the queries are scaled for it."""
    x = X * np.logspace(-30, 28, N, dtype=np.float32)[:, None]
    index = ja.build_index(
        ja.tracin(linear), PARAMS, {"x": x}, groups=GROUPS, batch_size=2, store=False
    )
    queries = X * np.float32(1e-2)
    np.testing.assert_allclose(ja.score(index, {"x": queries}), oracle(x, queries), rtol=1e-5)
    parts = ja.contributions(index, {"x": queries}).sum(axis=-1)
    np.testing.assert_allclose(parts, oracle(x, queries), rtol=1e-5)


@pytest.mark.parametrize("path", [False, True])
def test_scores_past_the_range_are_infinite_and_said(path, tmp_path):
    x = with_outlier(1e20)
    where = {"path": tmp_path / "index"} if path else {}
    index = ja.build_index(ja.tracin(linear), PARAMS, {"x": x}, groups=GROUPS, **where)
    expected = oracle(x, x)
    for call in (ja.score, lambda *a: ja.contributions(*a).sum(axis=-1)):
        with pytest.warns(ja.NonFiniteWarning, match="Rows 2 of the result"):
            scores = np.asarray(call(index, {"x": x}))
        assert np.isposinf(scores[2, 2]) and np.isinf(scores).sum() == 1
        finite = np.isfinite(scores)
        np.testing.assert_allclose(scores[finite], expected[finite], rtol=1e-5)
    with pytest.warns(ja.NonFiniteWarning, match="1 scores .* of float32 .*Rows 2 of the result"):
        ja.score(index, {"x": x}, path=tmp_path / "scores")
    with pytest.warns(ja.NonFiniteWarning, match="Rows 2"):
        own = np.asarray(ja.self_influence(index))
    assert np.isposinf(own[2])
    np.testing.assert_allclose(np.delete(own, 2), np.delete(np.diag(expected), 2), rtol=1e-5)


def test_a_weight_of_a_checkpoint_that_takes_an_example_past_the_range_leaves_it_out():
    x = with_outlier(1e38)
    method = ja.tracin(linear, checkpoint_weights=[10.0])
    with pytest.warns(ja.NonFiniteWarning, match="1 of .* training examples.*ids 2"):
        index = ja.build_index(method, PARAMS, {"x": x}, groups=GROUPS)
    expected = 10 * oracle(x, X[:2])
    expected[:, 2] = 0
    np.testing.assert_allclose(ja.score(index, {"x": X[:2]}), expected, rtol=1e-5)


def test_squares_past_the_range():
    x = with_outlier(1e17)
    index = ja.build_index(
        ja.das(linear, leverage=False, damping=ja.absolute(1.0)), PARAMS, {"x": X}, groups=GROUPS
    )
    plain = ja.build_index(
        ja.das(linear, leverage=False, damping=ja.absolute(1.0), link="identity"),
        PARAMS, {"x": X}, groups=GROUPS,
    )  # fmt: skip
    queries = {"x": x[[2]] * np.float32(1e5)}
    strengths = np.abs(np.asarray(ja.score(plain, queries)))
    with pytest.warns(ja.NonFiniteWarning):
        top = ja.top_k(index, queries, k=N)
    np.testing.assert_array_equal(top.ids[0], np.argsort(-strengths[0], kind="stable"))


MAKERS = {
    "TRAK": lambda: ja.trak(linear, residual=lambda p, e, k: jnp.float32(1)),
    "D-TRAK": lambda: ja.d_trak(linear),
    "DAS": lambda: ja.das(linear),
    "LoGRA": lambda: ja.logra(linear),
    "K-FAC": lambda: ja.kfac(linear),
    "EK-FAC": lambda: ja.ekfac(linear),
    "EShampoo": lambda: ja.eshampoo(linear),
    "DataInf": lambda: ja.data_inf(linear),
    "TrackStar": lambda: ja.trackstar(linear, jax.tree.map(jnp.ones_like, PARAMS), PARAMS),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_gradient_too_large_for_a_kernel_is_left_out_by_name(name):
    x = with_outlier(1e25)
    with pytest.warns(ja.NonFiniteWarning, match="1 of 12 training examples .* ids 2"):
        index = ja.build_index(MAKERS[name](), PARAMS, {"x": x}, groups=GROUPS)
    queries = {"x": X[:4]}
    scores = np.asarray(ja.score(index, queries))
    rest = ja.build_index(MAKERS[name](), PARAMS, {"x": np.delete(X, 2, axis=0)}, groups=GROUPS)
    assert (scores[:, 2] == 0).all()
    expected = np.asarray(ja.score(rest, queries))
    # The dual form counts examples by itself; means count those that are kept.
    np.testing.assert_allclose(np.delete(scores, 2, axis=1), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("exponent", [-80, 50])
@pytest.mark.parametrize("name", MAKERS)
def test_the_scale_of_the_loss_does_not_matter_to_a_kernel(name, exponent):
    """Relative damping: scores scale with the loss as the formula says, however small they are."""
    x = np.ldexp(X, exponent)
    expected = np.asarray(
        ja.score(ja.build_index(MAKERS[name](), PARAMS, {"x": X}, groups=GROUPS), {"x": X})
    )
    got = ja.score(ja.build_index(MAKERS[name](), PARAMS, {"x": x}, groups=GROUPS), {"x": x})
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_absolute_damping_keeps_its_unit():
    x = np.ldexp(X, -40)
    damping = ja.absolute(2.0**-80)
    index = ja.build_index(ja.d_trak(linear, damping=damping, dense=True), PARAMS, {"x": x})
    plain = ja.d_trak(linear, damping=ja.absolute(1.0), dense=True)
    expected = ja.score(ja.build_index(plain, PARAMS, {"x": X}), {"x": X})
    np.testing.assert_allclose(ja.score(index, {"x": x}), expected, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::jaxattr.weights.report.WeightWarning")
@pytest.mark.parametrize("factor", [1e-25, 1e25])
@pytest.mark.parametrize("kept", [1 << 29, 0])
def test_weights_do_not_depend_on_the_scale_of_the_loss(factor, kept, monkeypatch):
    monkeypatch.setattr("jaxattr.weights.learning._WHOLE_BYTES", kept)
    options = {"top_k": 3, "steps": 20}
    fits = [
        ja.learn_weights(
            ja.build_index(ja.tracin(linear), PARAMS, {"x": x}, groups=GROUPS), {"x": x}, **options
        )
        for x in (X, X * np.float32(factor))
    ]
    assert fits[1].weights == pytest.approx(fits[0].weights, rel=1e-4)
    assert fits[1].shares == pytest.approx(fits[0].shares, rel=1e-4)
