"""Eigenvalue-corrected Shampoo against what it is defined to be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxattr as ja
from jaxattr.fitting import covariances, eigenbases, shampoo
from tests import models
from tests.curvature import FEW, PARAMS, QUERIES, TRAIN
from tests.test_eigenbases import looked_up, stacked_loss

DAMPING = 0.01


def attention(params, example, key):
    """A tied table, used twice, and weights of its own for queries, keys and values."""
    del key
    x = params["table"][example["ids"]]
    weights = jax.nn.softmax((x @ params["q"]) @ (x @ params["k"]).T)
    logits = (x + weights @ x @ params["v"]) @ params["table"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["next"]).sum()


def attention_params():
    shapes = {"table": (11, 4), "q": (4, 4), "k": (4, 4), "v": (4, 4)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape, jnp.float64)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def tokens(n, seed):
    keys = jax.random.split(jax.random.key(seed))
    return {
        "ids": jax.random.randint(keys[0], (n, 6), 0, 11),
        "next": jax.random.randint(keys[1], (n, 6), 0, 11),
    }


def matrices(loss, params, batch):
    """The gradients of each linear map, [n, in (+ bias), out], by brute force."""
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0, None)))(params, batch, jax.random.key(0))
    if loss is attention:
        return {name: np.asarray(leaf) for name, leaf in gradients.items()}
    return {
        name: np.concatenate([leaf["kernel"], leaf["bias"][:, None]], axis=1)
        for name, leaf in gradients.items()
    }


def dense_scores(train, queries):
    total = 0.0
    for name, g in train.items():
        left = np.linalg.eigh(np.einsum("nio,njo->ij", g, g) / len(g))[1]
        right = np.linalg.eigh(np.einsum("nio,nip->op", g, g) / len(g))[1]
        phi, q = (
            np.einsum("ir,nio,os->nrs", left, each, right).reshape(len(each), -1)
            for each in (g, queries[name])
        )
        total += q / ((phi**2).mean(axis=0) + DAMPING) @ phi.T
    return total


CASES = {
    "MLP": (models.loss, PARAMS, TRAIN, QUERIES),
    "attention": (attention, attention_params(), tokens(14, 1), tokens(3, 2)),
}


@pytest.mark.parametrize("at_once", [1, 1000, shampoo._ENTRIES])
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_definition(name, at_once, monkeypatch):
    monkeypatch.setattr(shampoo, "_ENTRIES", at_once)
    covariances.covariance_sums.cache_clear()
    loss, params, train, queries = CASES[name]
    method = ja.eshampoo(loss, damping=ja.absolute(DAMPING))
    index = ja.build_index(method, params, train, batch_size=5)
    of_train, of_queries = (matrices(loss, params, each) for each in (train, queries))
    expected = dense_scores(of_train, of_queries)
    np.testing.assert_allclose(
        ja.score(index, queries), expected, rtol=0, atol=1e-9 * np.abs(expected).max()
    )
    for leaf, (a, b) in index.fitted[0].sides.items():
        g = of_train[leaf.removesuffix("/kernel")]
        for vectors, matrix in (
            (a, np.einsum("nio,njo->ij", g, g)),
            (b, np.einsum("nio,nip->op", g, g)),
        ):
            rotated = np.asarray(vectors).T @ matrix @ vectors
            off = rotated - np.diag(np.diag(rotated))
            assert np.abs(off).max() < 1e-12 * np.abs(matrix).max()
            assert (np.diff(np.diag(rotated)) <= 1e-12 * np.abs(matrix).max()).all()


def test_the_basis_is_not_that_of_covariances_where_positions_go_together():
    loss, params, train, queries = CASES["attention"]
    damping = ja.absolute(DAMPING)
    got, other = (
        ja.score(FEW(make(loss, damping=damping), params, train), queries)
        for make in (ja.eshampoo, ja.ekfac)
    )
    assert models.relative_error(got, other) > 1e-3


def test_one_position_needs_no_gradient():
    """Both ways to the sums are the same; the short one forms no array [b, in, out]."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (5, 2, 8), jnp.float64)
    d = jax.random.normal(keys[1], (5, 2, 9), jnp.float64)
    (factored,) = ja.featurizer(
        ja.eshampoo(lambda p, e, key: jnp.sum(jnp.tanh(e["x"] @ p["w"]))),
        {"w": jnp.zeros((8, 9))},
        {"x": x[0]},
    ).plan.factored
    g = np.einsum("nti,nto->nio", x, d)
    left, right = shampoo._sums(factored, x, d)
    np.testing.assert_allclose(left, np.einsum("nio,njo->ij", g, g), rtol=1e-12)
    np.testing.assert_allclose(right, np.einsum("nio,nip->op", g, g), rtol=1e-12)
    shapes = str(jax.make_jaxpr(lambda x, d: shampoo._sums(factored, x, d))(x, d))
    assert "[5,8,9]" not in shapes and "[5,2,2]" in shapes


def test_layers_in_a_scan_have_matrices_of_their_own():
    keys = jax.random.split(jax.random.key(7), 3)
    layers = {
        "w": jax.random.normal(keys[0], (2, 6, 6), jnp.float64),
        "b": jax.random.normal(keys[1], (2, 6), jnp.float64),
    }
    params = {"layers": layers, "head": jax.random.normal(keys[2], (6, 3), jnp.float64)}
    index = FEW(ja.eshampoo(stacked_loss), params, TRAIN)
    gradients = jax.jit(jax.vmap(jax.grad(stacked_loss), (None, 0, None)))(params, TRAIN, None)[
        "layers"
    ]
    g = np.concatenate([gradients["w"], gradients["b"][:, :, None]], axis=2)  # [n, 2, in, out]
    for vectors, matrices in zip(
        index.fitted[0].sides["layers/w"],
        (np.einsum("nlio,nljo->lij", g, g), np.einsum("nlio,nlip->lop", g, g)),
        strict=True,
    ):
        vectors = np.asarray(vectors)
        rotated = np.swapaxes(vectors, -1, -2) @ matrices @ vectors
        off = rotated * (1 - np.eye(rotated.shape[-1]))
        assert np.abs(off).max() < 1e-12 * np.abs(matrices).max()


def test_a_wide_side_is_projected_before_gradients_are_formed(monkeypatch):
    monkeypatch.setattr(eigenbases, "_WIDE", 4)
    monkeypatch.setattr(eigenbases, "_NARROW", 4)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "m": {
            "table": jax.random.normal(keys[0], (7, 3), jnp.float64),
            "bias": jax.random.normal(keys[1], (3,), jnp.float64),
        },
        "o": jax.random.normal(keys[2], (3, 3), jnp.float64),
    }
    data = {"id": jnp.arange(9) % 7, "y": jnp.arange(9) % 3}
    index = FEW(ja.eshampoo(looked_up, rank=8), params, data)
    gradient = jax.jit(jax.vmap(lambda x: jax.grad(looked_up)(params, x, None)["m"]))(data)
    rows = np.concatenate([gradient["table"], gradient["bias"][:, None]], axis=1)
    a, b = index.fitted[0].sides["m/table"]
    assert a.shape == (8, 4)
    span = np.linalg.qr(np.asarray(a))[0]  # of the random signs: A is signs times a rotation
    assert np.linalg.matrix_rank(span) == 4
    rotated = np.einsum("ir,nio,njo,js->rs", a, rows, rows, a)
    assert np.abs(rotated - np.diag(np.diag(rotated))).max() < 1e-12 * np.abs(rotated).max()
    expected = np.einsum("ir,nio,os->nrs", a, rows, b).reshape(9, -1)
    phi = index.featurizer(params, data, fitted=index.fitted[0])
    np.testing.assert_allclose(phi[:, index.layout.slices["m"]], expected, atol=1e-12)


@pytest.mark.parametrize("sizes", [((8,), ("data",)), ((4, 2), ("data", "model"))])
def test_any_mesh_and_batch_gives_the_same_numbers(sizes):
    loss, params, train, queries = CASES["attention"]
    method = ja.eshampoo(loss)
    expected = ja.score(ja.build_index(method, params, train), queries)
    spread = ja.build_index(method, params, train, batch_size=8, mesh=jax.make_mesh(*sizes))
    assert models.relative_error(ja.score(spread, queries), expected) <= 1e-9


def test_products_of_its_eigenvalues_are_no_curvature():
    with pytest.raises(ValueError, match="Shampoo's eigenvalues are no curvature"):
        eigenbases.Eigenbasis(eigenvalues=True, factors=shampoo.GradientFactors())
