"""GraSS and FactGraSS against the dense matrices that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr.features import projections, random_maps, signs
from tests import architectures, models
from tests.curvature import FEW, PARAMS, QUERIES, TRAIN

RANK = 2


def features(projection, loss=models.loss, params=PARAMS, batch=TRAIN, **kwargs):
    method = ja.tracin(loss, projection=projection)
    return ja.featurizer(method, params, models.one(batch), **kwargs)


def test_coordinates_are_one_of_each_cell():
    ids, scales = signs.coordinates(b"seed", "name", 103, 10)
    edges = 103 * np.arange(11) // 10
    assert ((edges[:-1] <= ids) & (ids < edges[1:])).all()
    np.testing.assert_allclose(scales**2, np.diff(edges))
    assert not np.array_equal(ids, signs.coordinates(b"seed", "other", 103, 10)[0])
    many = [signs.coordinates(b"seed", str(i), 5, 1)[0][0] for i in range(2000)]
    assert np.abs(np.bincount(many, minlength=5) - 400).max() < 5 * (2000 * 0.16) ** 0.5
    every, ones = signs.coordinates(b"seed", "name", 7, 7)
    np.testing.assert_array_equal(every, np.arange(7))
    np.testing.assert_array_equal(ones, 1)


def test_hashes_are_even():
    buckets, drawn = signs.hashed(b"seed", "name", 8000, 8)
    assert np.abs(np.bincount(buckets, minlength=8) - 1000).max() < 5 * (8000 * 7 / 64) ** 0.5
    assert set(drawn.tolist()) == {-1, 1} and abs(int(drawn.sum())) < 5 * 8000**0.5


def test_grass_is_the_product_with_its_matrix():
    sizes = {"group": {"a": 300, "b": 77}, "other": {"a": 500}}
    x = {
        group: {
            leaf: jax.random.normal(jax.random.key(size), (3, size), jnp.float64)
            for leaf, size in of.items()
        }
        for group, of in sizes.items()
    }
    seed = signs.seed_of(jax.random.key(0), 0)
    projection = projections.grass(16, mask=4)
    drawn = random_maps.draw_groups(projection, seed, sizes)
    got = random_maps.project_groups(projection, drawn, x)
    for group, of in sizes.items():
        expected, kept = 0.0, 0
        for leaf, size in of.items():
            name, count = f"{group}\0{leaf}", -(-64 * size // sum(of.values()))
            ids, scales = signs.coordinates(seed, f"{name}\0mask", size, count)
            buckets, own = signs.hashed(seed, f"{name}\0hash", count, 16)
            matrix = np.zeros((size, 16))
            matrix[ids, buckets] = scales * own
            expected = expected + np.asarray(x[group][leaf]) @ matrix
            kept += count
        np.testing.assert_allclose(got[group], expected, rtol=1e-12, atol=1e-12)
        assert 64 <= kept < 64 + len(of)


def dense(featurize, projection, gradients, leaf):
    """Features of a linear map by whole gradients [n, *stack, in, out] and the same draws."""
    drawn = featurize.draw()
    (factored,) = (f for f in featurize.plan.factored if f.map.leaf == leaf)
    a, b = drawn.sides[leaf]
    a = np.eye(factored.rows) if a is None else np.concatenate(a, axis=-2)
    b = np.eye(factored.map.size_out) if b is None else np.asarray(b)
    for side in (a, b):
        assert ((side != 0).sum(axis=-2) == 1).all()  # columns of the identity, scaled
    z = np.swapaxes(a, -1, -2) @ gradients @ b
    z = z.reshape(len(z), -1)
    buckets, own = drawn.mixing[leaf]
    matrix = np.zeros((z.shape[1], factored.left * factored.right * int(np.prod(factored.lead))))
    matrix[np.arange(len(matrix)), buckets] = own
    return z @ matrix


def test_factgrass_is_masks_and_a_hash_of_the_gradient():
    projection = projections.factgrass(RANK)
    featurize = features(projection)
    gradients = jax.jit(jax.vmap(jax.grad(models.loss), (None, 0, None)))(PARAMS, TRAIN, None)
    phi = featurize(PARAMS, TRAIN)
    assert featurize.layout.dims == (4, 4, 4)
    for layer, of in gradients.items():
        g = np.concatenate([of["kernel"], of["bias"][:, None]], axis=1)
        expected = dense(featurize, projection, g, f"{layer}/kernel")
        np.testing.assert_allclose(phi[:, featurize.layout.slices[layer]], expected, atol=1e-12)


def test_factgrass_of_small_maps_is_exact():
    exact, whole = (features(p) for p in (projections.identity(), projections.factgrass(8)))
    one, other = exact(PARAMS, TRAIN), whole(PARAMS, TRAIN)
    np.testing.assert_allclose(other @ other.T, one @ one.T, rtol=1e-12)


@pytest.mark.parametrize("projection", [projections.grass(20), projections.factgrass(RANK)])
def test_inner_products_are_unbiased(projection):
    """The mean over keys is within four standard errors of the exact ones."""
    few = jax.tree.map(lambda x: x[:3], TRAIN)
    exact = features(projections.identity())(PARAMS, few)
    featurize = features(projection)
    step = jax.jit(lambda drawn: featurize(PARAMS, few, drawn=drawn))
    phi = [step(featurize.draw(number)) for number in range(600)]
    found = np.stack([each @ each.T for each in phi])
    error = np.abs(found.mean(axis=0) - exact @ exact.T)
    assert (error <= 4 * found.std(axis=0) / np.sqrt(len(found))).all()


@pytest.mark.parametrize("name", ["gpt_scan_linen", "resnet_nnx"])
def test_no_weight_gradient_is_needed(name):
    """Stacked layers, embeddings and convolutions: as for gradients that are formed first."""
    loss, params, batch = architectures.ALL[name]()
    fast = projections.factgrass(RANK)
    slow = projections.TwoSided(
        RANK, type(fast.basis)(rank=RANK, mask=fast.basis.mask, materialize=True)
    )
    got, expected = (features(p, loss, params, batch)(params, batch) for p in (fast, slow))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("projection", [projections.grass(20), projections.factgrass(RANK)])
def test_batches_and_devices_do_not_matter(projection):
    method = ja.tracin(models.loss, projection=projection)
    expected = ja.score(FEW(method, PARAMS, TRAIN), QUERIES)
    mesh = jax.make_mesh((8,), ("data",))
    spread = ja.build_index(method, PARAMS, TRAIN, batch_size=8, mesh=mesh)
    np.testing.assert_allclose(ja.score(spread, QUERIES), expected, rtol=1e-12)


def test_influence_in_the_subspace_of_factgrass():
    """The Hessian is mixed as the features are."""
    method = ja.influence(
        models.loss, damping=ja.absolute(1.0), projection=projections.factgrass(RANK)
    )
    index = FEW(method, PARAMS, TRAIN)
    flat, unflatten = jax.flatten_util.ravel_pytree(PARAMS)

    def mean_loss(flat):
        return jax.vmap(models.loss, (None, 0, None))(unflatten(flat), TRAIN, None).mean()

    def gradient(example):
        return jax.flatten_util.ravel_pytree(jax.grad(models.loss)(PARAMS, example, None))[0]

    many = models.data(300, seed=9)
    phi_of_many = index.featurizer(PARAMS, many)
    gradients = jax.jit(jax.vmap(gradient))(many)
    embedding = np.linalg.lstsq(gradients, phi_of_many, rcond=None)[0]
    phi, q = (index.featurizer(PARAMS, each) for each in (TRAIN, QUERIES))
    inner = embedding.T @ jax.jit(jax.hessian(mean_loss))(flat) @ embedding + np.eye(phi.shape[1])
    expected = q @ np.linalg.solve(inner, phi.T)
    np.testing.assert_allclose(ja.score(index, QUERIES), expected, rtol=1e-6)


@pytest.mark.parametrize("make", [projections.grass, projections.factgrass])
def test_bad_masks(make):
    with pytest.raises(ValueError, match="mask must be at least 1, got 0"):
        make(8, mask=0)


def test_methods_with_these_projections_cite_them():
    for projection in (projections.grass(8), projections.factgrass(2)):
        text = ja.citation(ja.tracin(models.loss, projection=projection))
        assert [name in text for name in ("pruthi2020", "hu2025grass", "2506.05647")] == [True] * 3
    assert "hu2025grass" not in ja.citation(ja.logra(models.loss))
