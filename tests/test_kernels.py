import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattr import kernels
from jaxattr.features.plans import FeatureLayout
from jaxattr.kernels import gram_matrix

LAYOUT = FeatureLayout(("a", "b", "c"), (9, 9, 9), (4, 3, 5))


def features(n, layout=LAYOUT):
    return jax.random.normal(jax.random.key(n), (n, layout.total), jnp.float64)


def surroundings(phi, layout=LAYOUT, curvature=None, sums_of=None, hessian=None):
    rows = lambda columns: np.asarray(phi[:, columns])  # noqa: E731
    return kernels.Surroundings(layout, rows, curvature, sums_of, 0, hessian)


def run(kernel, phi, batch=5, layout=LAYOUT, **given):
    """Streams the features through the kernel, the last batch padded with zeros."""
    padded = jnp.pad(phi, ((0, -len(phi) % batch), (0, 0)))
    kept = jnp.arange(len(padded)) < len(phi)
    batches = [
        kernel.sums(layout, len(phi), padded[start : start + batch], kept[start : start + batch])
        for start in range(0, len(phi), batch)
    ]
    statistics = jax.tree.map(lambda *parts: sum(parts), *batches)
    return kernel.apply(kernel.finalize(statistics, surroundings(phi, layout, **given)), phi)


def oracle(phi, damping, blocks):
    parts = []
    for start, stop in blocks:
        x = np.asarray(phi[:, start:stop])
        gram = x.T @ x
        added = damping.of(np.trace(gram) / len(gram))
        parts.append(x @ np.linalg.inv(gram + added * np.eye(len(gram))))
    return np.concatenate(parts, axis=1)


BLOCKS = {False: [(0, 4), (4, 7), (7, 12)], True: [(0, 12)]}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("damping", [kernels.absolute(0.3), kernels.relative(0.1)], ids=str)
@pytest.mark.parametrize("n", [4, 11, 30])  # dual, partly dual or dual, primal
def test_gram_is_the_damped_inverse(n, damping, dense):
    phi = features(n)
    got = run(kernels.Gram(damping, dense=dense), phi)
    np.testing.assert_allclose(got, oracle(phi, damping, BLOCKS[dense]), rtol=1e-9, atol=1e-12)


def test_primal_equals_dual():
    phi, damping = np.asarray(features(30)), kernels.relative(0.1)
    primal = gram_matrix._multiply(gram_matrix._primal(phi.T @ phi, damping, 0), phi)
    dual = gram_matrix._multiply(gram_matrix._dual(phi, damping, 0), phi)
    np.testing.assert_allclose(dual, primal, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_batches_do_not_matter(batch):
    kernel = kernels.Gram(kernels.relative(0.1))
    np.testing.assert_allclose(
        run(kernel, features(30), batch), run(kernel, features(30)), rtol=1e-9
    )


def test_float32_statistics_stay_accurate():
    phi = features(200)
    got = run(kernels.Gram(kernels.relative(0.1)), phi.astype(jnp.float32))
    expected = oracle(phi, kernels.relative(0.1), BLOCKS[False])
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("n", [3, 30])
def test_a_block_without_gradients_maps_to_zero(n):
    phi = features(n).at[:, 4:7].set(0)
    got = run(kernels.Gram(kernels.relative(0.1)), phi)
    assert (got[:, 4:7] == 0).all()
    assert np.isfinite(got).all() and (got[:, :4] != 0).any()


def test_identity():
    phi = features(6)
    np.testing.assert_array_equal(run(kernels.Identity(), phi), phi)


@pytest.mark.parametrize("make", [kernels.absolute, kernels.relative])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_bad_damping(make, value):
    with pytest.raises(ValueError, match=f"at least 0, got {value}"):
        make(value)


def test_damping_needs_a_unit():
    with pytest.raises(ValueError, match=r"ja.absolute\(x\) or ja.relative\(x\), got 0.1"):
        kernels.Gram(0.1)


@pytest.mark.parametrize(
    ("phi", "why"),
    [
        (features(4), "4 training examples cannot span 5 features"),
        (features(30).at[:, 0].set(0), "not positive definite"),
        (features(30).at[:, 0].set(features(30)[:, 1] * (1 + 1e-9)), "condition number|definite"),
    ],
)
def test_singular_kernels_are_refused(phi, why):
    with pytest.raises(ValueError, match=f"is singular: .*({why}).*Use more damping"):
        run(kernels.Gram(kernels.absolute(0.0)), phi)
