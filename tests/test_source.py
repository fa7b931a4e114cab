"""SOURCE against its formula with dense matrices, and at its two limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from tests import models

N, Q = 20, 3
TRAIN, QUERIES = models.data(N), models.data(Q, seed=1)
CHECKPOINTS = [models.mlp_params(jax.random.key(i), sizes=(6, 4, 3)) for i in range(3)]
TIMES = [(0.1, 30), (0.05, 20)]


def index_of(segment, **options):
    rate, steps = TIMES[segment]
    method = ja.source(models.loss, learning_rate=rate, steps=steps, **options)
    return ja.build_index(method, CHECKPOINTS[segment], TRAIN)


def gradients(params, data):
    """Of each example, {layer: [b, inputs and one, outputs]}."""
    found = jax.jit(jax.vmap(jax.grad(models.loss), (None, 0, None)))(params, data, None)
    return {
        name: np.concatenate([layer["kernel"], layer["bias"][:, None]], axis=1)
        for name, layer in found.items()
    }


def formula(indexes, times, last):
    """The sum over segments, with dense curvature matrices of each layer."""
    total = 0
    queries = gradients(last, QUERIES)
    for index, time in zip(reversed(indexes), reversed(times), strict=True):
        train = gradients(index.checkpoints[0], TRAIN)
        for layer, sides in index.fitted[0].sides.items():
            name = layer.split("/")[0]
            basis = np.kron(*(np.asarray(side) for side in sides))  # of vec, row by row
            np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=1e-10)
            flat = train[name].reshape(N, -1)
            hessian = basis @ np.diag(((flat @ basis) ** 2).mean(axis=0)) @ basis.T
            values, vectors = np.linalg.eigh(hessian)
            decay = vectors @ np.diag(np.exp(-time * values)) @ vectors.T
            taken = vectors @ np.diag([
                (1 - np.exp(-time * x)) / x if x > 1e-9 else time for x in values
            ]) @ vectors.T  # fmt: skip
            own = queries[name].reshape(Q, -1)
            total = total + own @ taken @ flat.T
            queries[name] = own @ decay
    return total


def test_segments_against_the_formula():
    indexes = [index_of(0), index_of(1)]
    found = ja.score_segments(indexes, QUERIES, params=CHECKPOINTS[2])
    np.testing.assert_allclose(found, formula(indexes, [3, 1], CHECKPOINTS[2]), rtol=1e-7)
    one = ja.score_segments(indexes[1:], QUERIES)
    np.testing.assert_allclose(one, np.asarray(ja.score(indexes[1], QUERIES)), rtol=1e-9)
    np.testing.assert_allclose(one, formula(indexes[1:], [1], CHECKPOINTS[1]), rtol=1e-7)


def test_between_tracin_and_influence():
    exact = ja.projections.identity()
    inner = ja.score(
        ja.build_index(ja.tracin(models.loss, projection=exact), CHECKPOINTS[0], TRAIN), QUERIES
    )
    short = ja.source(models.loss, learning_rate=1e-9, steps=10)
    found = ja.score(ja.build_index(short, CHECKPOINTS[0], TRAIN), QUERIES)
    np.testing.assert_allclose(found, 1e-8 * np.asarray(inner), rtol=1e-6)
    full = ja.build_index(ja.ekfac(models.loss, damping=ja.absolute(1e-12)), CHECKPOINTS[0], TRAIN)
    long = ja.source(models.loss, learning_rate=1e3, steps=10**9, momentum=0.9)
    found = ja.score(ja.build_index(long, CHECKPOINTS[0], TRAIN), QUERIES)
    np.testing.assert_allclose(found, ja.score(full, QUERIES), rtol=1e-4)


def test_momentum_is_as_a_larger_learning_rate():
    first = ja.source(models.loss, learning_rate=0.125, steps=3, momentum=0.5)
    for rate in (0.25, jnp.float32(0.25)):  # as a schedule returns it
        assert first.kernel == ja.source(models.loss, learning_rate=rate, steps=3).kernel
        hash(ja.source(models.loss, learning_rate=rate, steps=3))
    assert "bae2024training" in ja.citation(first)


def test_an_index_on_disk_keeps_its_curvature(tmp_path):
    method = ja.source(models.loss, learning_rate=0.1, steps=30)
    ja.build_index(method, CHECKPOINTS[0], TRAIN, path=tmp_path / "index")
    opened = ja.open_index(tmp_path / "index", method, CHECKPOINTS[0])
    found = ja.score_segments([opened, index_of(1)], QUERIES)
    expected = ja.score_segments([index_of(0), index_of(1)], QUERIES)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("field", QUERIES)
def test_a_query_that_is_not_finite(field):
    # A label out of range: the loss is not a number, and its gradient finite.
    bad = QUERIES | {field: QUERIES[field].at[1].set(jnp.nan if field == "x" else 99)}
    with pytest.warns(ja.NonFiniteWarning, match="1 of 3 queries .* ids 1"):
        found = ja.score_segments([index_of(0), index_of(1)], bad)
    assert np.isnan(found[1]).all()
    expected = ja.score_segments([index_of(0), index_of(1)], QUERIES)
    np.testing.assert_allclose(found[[0, 2]], expected[[0, 2]], rtol=1e-10)


def test_an_example_that_is_not_finite_in_one_segment_has_no_score():
    biases = [float(params["layer0"]["bias"][0]) for params in CHECKPOINTS[:2]]

    def loss(params, example, key):
        there = params["layer0"]["bias"][0] > example["least"]
        return models.loss(params, example, key) / there.astype(jnp.float64)

    least = jnp.full(N, min(biases) - 1)
    method = ja.source(loss, learning_rate=0.1, steps=30)
    usual, broken = (TRAIN | {"least": x} for x in (least, least.at[4].set(np.mean(biases))))
    queries = QUERIES | {"least": least[:Q]}
    with pytest.warns(ja.NonFiniteWarning, match="1 of 20 training examples.*ids 4"):
        segments = [ja.build_index(method, params, broken) for params in CHECKPOINTS[:2]]
    assert sum(len(index.non_finite) for index in segments) == 1
    found = ja.score_segments(segments, queries)
    assert (found[:, 4] == 0).all()
    others = ja.score_segments([ja.build_index(method, p, usual) for p in CHECKPOINTS[:2]], queries)
    assert (others[:, 4] != 0).all()


def test_what_are_no_segments_is_refused():
    other = ja.build_index(ja.tracin(models.loss), CHECKPOINTS[0], TRAIN)
    fewer = jax.tree.map(lambda x: x[:5], TRAIN)
    method = ja.source(models.loss, learning_rate=0.1, steps=1)
    with pytest.raises(ValueError, match="got one of TracIn at 1: "):
        ja.score_segments([other], QUERIES)
    with pytest.raises(ValueError, match="got one of SOURCE at 2: "):
        ja.score_segments([ja.build_index(method, CHECKPOINTS[:2], TRAIN)], QUERIES)
    with pytest.raises(ValueError, match="differ in their number of training examples"):
        ja.score_segments([ja.build_index(method, CHECKPOINTS[0], fewer), index_of(1)], QUERIES)
    with pytest.raises(ValueError, match="differ in their number of training examples"):
        ja.score_segments(
            iter([ja.build_index(method, CHECKPOINTS[0], fewer), index_of(1)]), QUERIES
        )
    with pytest.raises(ValueError, match="fails on one example: KeyError"):
        ja.score_segments([index_of(0)], {"z": QUERIES["x"]})
    with pytest.raises(ValueError, match="fails on one example: KeyError"):
        ja.score_segments([index_of(0)], QUERIES, params={"layer9": CHECKPOINTS[0]["layer0"]})
    with pytest.raises(ValueError, match="indexes is empty"):
        ja.score_segments([], QUERIES)
    with pytest.raises(ValueError, match="learning_rate must be finite and above 0"):
        ja.source(models.loss, learning_rate=0.0, steps=3)
    with pytest.raises(ValueError, match="at least 0 and below 1, got 1"):
        ja.source(models.loss, learning_rate=0.1, steps=3, momentum=1)
