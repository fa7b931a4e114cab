import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattr.features import projections
from jaxattr.keys import named_key

RANDOM = [
    projections.rademacher(64),
    projections.gaussian(64),
    projections.sjlt(64),
    projections.sjlt(64, nonzeros=1),
    projections.srht(64),
]
BY_NAME = pytest.mark.parametrize("projection", RANDOM, ids=lambda p: p.name)


def members(b=2, sizes=(300, 77)):
    keys = jax.random.split(jax.random.key(3), len(sizes))
    return {
        f"leaf{i}": jax.random.normal(key, (b, size), jnp.float64)
        for i, (key, size) in enumerate(zip(keys, sizes, strict=True))
    }


@BY_NAME
def test_inner_products_are_unbiased(projection):
    x = members()
    flat = jnp.concatenate(list(x.values()), axis=1)
    keys = jax.random.split(jax.random.key(0), 400)

    def inner(key):
        phi = projection.project(key, x)
        return phi @ phi.T

    found = np.asarray(jax.jit(lambda: jax.lax.map(inner, keys))())
    error = found.mean(axis=0) - np.asarray(flat @ flat.T)
    assert (np.abs(error) <= 4 * found.std(axis=0) / np.sqrt(len(keys))).all()


@BY_NAME
def test_linear_and_the_same_for_any_batch(projection):
    x, key = members(b=5), jax.random.key(1)
    whole = projection.project(key, x)
    for row in range(5):
        one = projection.project(key, {name: leaf[row : row + 1] for name, leaf in x.items()})
        np.testing.assert_allclose(one[0], whole[row], rtol=1e-12, atol=1e-12)
    twice = projection.project(key, jax.tree.map(lambda leaf: 2 * leaf, x))
    np.testing.assert_allclose(twice, 2 * whole, rtol=1e-12)


@BY_NAME
def test_order_of_leaves_does_not_matter_but_the_key_does(projection):
    x, key = members(), jax.random.key(1)
    reversed_leaves = dict(reversed(x.items()))
    np.testing.assert_allclose(
        projection.project(key, x), projection.project(key, reversed_leaves), atol=1e-12
    )
    other = projection.project(jax.random.key(2), x)
    assert not np.allclose(projection.project(key, x), other)


@BY_NAME
def test_small_groups_are_kept_exactly(projection):
    x = members(sizes=(60, 4))
    np.testing.assert_array_equal(
        projection.project(jax.random.key(0), x), jnp.concatenate(list(x.values()), axis=1)
    )
    assert projection.dim(64) == 64
    assert projection.dim(63) == 63
    assert projection.dim(65) == 64


def test_dense_projection_is_the_matrix_drawn_in_blocks(monkeypatch):
    x = jax.random.normal(jax.random.key(0), (3, 100), jnp.float64)
    monkeypatch.setattr(projections, "_BLOCK_ENTRIES", 32 * 7)
    key, p = jax.random.key(5), 7
    found = projections.rademacher(p).project(key, {"w": x})
    leaf_key = named_key(key, "w")
    blocks = [projections._signs(jax.random.fold_in(leaf_key, i), 32, p) for i in range(4)]
    matrix = jnp.concatenate(blocks)[:100]
    assert set(np.unique(matrix)) == {-1, 1}
    np.testing.assert_allclose(found, x @ matrix / p**0.5, rtol=1e-12)


def test_hadamard_against_scipy():
    import scipy.linalg

    x = jax.random.normal(jax.random.key(0), (3, 16), jnp.float64)
    np.testing.assert_allclose(projections._hadamard(x), x @ scipy.linalg.hadamard(16), rtol=1e-12)


def test_group_keys_differ():
    keys = [named_key(jax.random.key(0), name) for name in ("a", "b", "ab", "")]
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == 4


@pytest.mark.parametrize("make", [projections.rademacher, projections.sjlt, projections.srht])
def test_bad_dimension(make):
    with pytest.raises(ValueError, match="dim >= 1, got 0"):
        make(0)


def test_bad_nonzeros():
    with pytest.raises(ValueError, match="nonzeros must be at least 1"):
        projections.sjlt(8, nonzeros=0)
