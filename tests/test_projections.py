import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattr.features import projections, random_maps, signs
from jaxattr.keys import named_key

RANDOM = [
    projections.rademacher(64),
    projections.gaussian(64),
    projections.sjlt(64),
    projections.sjlt(64, nonzeros=1),
    projections.srht(64),
    projections.grass(64),
    projections.grass(64, mask=1),
]
BY_NAME = pytest.mark.parametrize("projection", RANDOM, ids=lambda p: p.name)


def members(b=2, sizes=(300, 77)):
    keys = jax.random.split(jax.random.key(3), len(sizes))
    return {
        f"leaf{i}": jax.random.normal(key, (b, size), jnp.float64)
        for i, (key, size) in enumerate(zip(keys, sizes, strict=True))
    }


@BY_NAME
def test_inner_products_are_unbiased(projection, monkeypatch):
    monkeypatch.setattr(random_maps, "_BLOCK_ENTRIES", 1 << 14)  # two blocks of the larger leaf
    x = members()
    flat = jnp.concatenate(list(x.values()), axis=1)
    sizes = {"group": {name: leaf.shape[1] for name, leaf in x.items()}}

    @jax.jit
    def inner(drawn):
        phi = random_maps.project_groups(projection, drawn, {"group": x})["group"]
        return phi @ phi.T

    seeds = [signs.seed_of(jax.random.key(0), number) for number in range(100)]
    found = np.stack([inner(random_maps.draw_groups(projection, s, sizes)) for s in seeds])
    error = found.mean(axis=0) - np.asarray(flat @ flat.T)
    assert (np.abs(error) <= 4 * found.std(axis=0) / np.sqrt(len(seeds))).all()


def test_a_traced_key_is_refused():
    with pytest.raises(TypeError, match="outside of jax.jit"):
        jax.jit(lambda key: projections.rademacher(8).project(key, members()))(jax.random.key(0))


@BY_NAME
def test_linear_and_the_same_for_any_batch(projection):
    x, project = members(b=5), jax.jit(functools.partial(projection.project, jax.random.key(1)))
    whole = project(x)
    for row in range(5):
        one = project({name: leaf[row : row + 1] for name, leaf in x.items()})
        np.testing.assert_allclose(one[0], whole[row], rtol=1e-12, atol=1e-12)
    twice = project(jax.tree.map(lambda leaf: 2 * leaf, x))
    np.testing.assert_allclose(twice, 2 * whole, rtol=1e-12)


@BY_NAME
@pytest.mark.parametrize("together", [2, 3, 100])
def test_blocks_at_once_are_those_one_after_the_other(projection, together, monkeypatch):
    monkeypatch.setattr(random_maps, "_BLOCK_ENTRIES", 1 << 14)
    monkeypatch.setattr(random_maps, "_HELD_BLOCKS", 2)  # some leaves are drawn where needed
    sizes = {f"group{i}": {"a": 300 + 300 * i, "b": 77, "c": 600} for i in range(3)}
    x = {name: members(sizes=tuple(of.values())) for name, of in sizes.items()}
    sizes = {name: {leaf: value.shape[1] for leaf, value in of.items()} for name, of in x.items()}
    drawn = random_maps.draw_groups(projection, signs.seed_of(jax.random.key(0), 0), sizes)
    expected = random_maps.project_groups(projection, drawn, x)
    monkeypatch.setattr(random_maps, "_blocks_at_once", lambda entries: together)
    found = random_maps.project_groups(projection, drawn, x)
    for name, features in expected.items():
        np.testing.assert_allclose(found[name], features, rtol=1e-12, atol=1e-12)


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
    x = jax.random.normal(jax.random.key(0), (3, 700), jnp.float64)
    key, p = jax.random.key(5), 7
    seed, name = signs.seed_of(key, 0), "\0w"
    held = projections.rademacher(p).project(key, {"w": x})
    matrix = signs.scaled_signs(seed, name, (700, p), np.float64)
    np.testing.assert_allclose(np.unique(matrix), [-(p**-0.5), p**-0.5], rtol=1e-12)
    np.testing.assert_allclose(held, x @ matrix, rtol=1e-12)

    monkeypatch.setattr(random_maps, "_HELD_BLOCKS", 2)  # of the three that 700 coordinates have
    monkeypatch.setattr(random_maps, "_BLOCK_ENTRIES", 256 * p)
    leaf_key = signs.keys_of(seed, [name])[0]
    keys = [jax.random.fold_in(leaf_key, i) for i in range(3)]
    blocks = [signs.unpacked(jax.random.bits(each, (256, 1)), p, jnp.float64) for each in keys]
    anew = projections.rademacher(p).project(key, {"w": x})
    np.testing.assert_allclose(anew, x @ jnp.concatenate(blocks)[:700] / p**0.5, rtol=1e-12)


@pytest.mark.parametrize("shape", [(5, 40), (2, 3, 33), (64, 32)])
def test_packed_signs_are_those_that_are_unpacked(shape):
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    words = signs.packed(b"seed", "name", rows, columns)
    unpacked = signs.unpacked(jnp.asarray(words), columns, jnp.float32)
    drawn = signs.scaled_signs(b"seed", "name", shape, np.float32)
    assert drawn.shape == shape and drawn.dtype == np.float32
    np.testing.assert_allclose(drawn.reshape(rows, columns) * columns**0.5, unpacked, rtol=1e-6)
    assert words.shape == (rows, -(-columns // 32)) and words.dtype == np.uint32
    assert not np.array_equal(words, signs.packed(b"seed", "another", rows, columns))
    assert not np.array_equal(words, signs.packed(b"other", "name", rows, columns))


@BY_NAME
def test_groups_together_are_what_they_are_alone(projection):
    groups = {"a": members(), "b": members(sizes=(300, 500)), "small": members(sizes=(5, 6))}
    seed = signs.seed_of(jax.random.key(4), 3)

    def projected(chosen):
        sizes = {name: {leaf: x.shape[1] for leaf, x in of.items()} for name, of in chosen.items()}
        drawn = random_maps.draw_groups(projection, seed, sizes)
        return random_maps.project_groups(projection, drawn, chosen)

    together = projected(groups)
    assert together.keys() == groups.keys()
    for name, of in groups.items():
        np.testing.assert_allclose(together[name], projected({name: of})[name], rtol=1e-12)
    assert not np.allclose(together["a"], together["b"])


def test_hadamard_against_scipy():
    import scipy.linalg

    x = jax.random.normal(jax.random.key(0), (3, 16), jnp.float64)
    np.testing.assert_allclose(random_maps._hadamard(x), x @ scipy.linalg.hadamard(16), rtol=1e-12)


def test_group_keys_differ():
    keys = [named_key(jax.random.key(0), name) for name in ("a", "b", "ab", "")]
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == 4


@pytest.mark.parametrize(
    "make", [projections.rademacher, projections.sjlt, projections.srht, projections.grass]
)
def test_bad_dimension(make):
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        make(0)


def test_bad_nonzeros():
    with pytest.raises(ValueError, match="nonzeros must be at least 1"):
        projections.sjlt(8, nonzeros=0)
