"""Eigenbases of K-FAC and EK-FAC: covariances, sampled labels, masks, narrow and stacked sides."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxattr as ja
from jaxattr import kernels, linear_maps
from jaxattr.fitting import eigenbases
from tests import models
from tests.curvature import FEW, PARAMS, QUERIES, TRAIN, index_of, method_of, sampled


def test_signs_of_eigenvectors_do_not_matter(monkeypatch):
    expected = ja.score(index_of("EK-FAC"), QUERIES)
    eigh = np.linalg.eigh

    def flipped(matrix):
        values, vectors = eigh(matrix)
        return values, vectors * np.where(np.arange(values.shape[-1]) % 2, 1, -1)

    monkeypatch.setattr(np.linalg, "eigh", flipped)
    got = ja.score(FEW(method_of("EK-FAC"), PARAMS, TRAIN), QUERIES)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def stacked_loss(params, example, key):
    del key

    def layer(x, weights):
        return jnp.tanh(x @ weights["w"] + weights["b"]), None

    x, _ = jax.lax.scan(layer, example["x"], params["layers"])
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["head"], example["y"])


def unrolled_loss(params, example, key):
    del key
    x = example["x"]
    for name in ("layers[0]", "layers[1]"):
        x = jnp.tanh(x @ params[name]["w"] + params[name]["b"])
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["head"], example["y"])


def test_what_is_factorised_is_on_the_host_one_matrix_at_a_time(monkeypatch):
    """Contexts of JAX end at a thread, and a stack of layers in float64 may have no room."""
    found, mean = [], eigenbases.mean

    def watched(covariance, side, at):
        matrix = mean(covariance, side, at)
        found.append((type(covariance.inputs), matrix.ndim))
        return matrix

    monkeypatch.setattr(eigenbases, "mean", watched)
    layers = {"w": jnp.ones((2, 6, 6)), "b": jnp.zeros((2, 6))}
    ja.build_index(ja.kfac(stacked_loss), {"layers": layers, "head": jnp.ones((6, 3))}, TRAIN)
    assert found == [(np.ndarray, 2)] * 6


@pytest.mark.parametrize("method", [ja.kfac, ja.logra])
def test_layers_in_a_scan_are_as_layers_apart(method):
    keys = jax.random.split(jax.random.key(7), 3)
    layers = {
        "w": jax.random.normal(keys[0], (2, 6, 6), jnp.float64),
        "b": jax.random.normal(keys[1], (2, 6), jnp.float64),
    }
    head = jax.random.normal(keys[2], (6, 3), jnp.float64)
    apart = {f"layers[{i}]": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(2)}
    options = {"rank": 10} if method is ja.logra else {}
    stacked = FEW(method(stacked_loss, **options), {"layers": layers, "head": head}, TRAIN)
    unrolled = FEW(method(unrolled_loss, **options), apart | {"head": head}, TRAIN)
    assert stacked.layout.names == unrolled.layout.names == ("head", "layers[0]", "layers[1]")
    got, expected = (ja.contributions(index, QUERIES) for index in (stacked, unrolled))
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_true_fisher_of_a_linear_model():
    """With one input and many draws, mean phi^2 approaches the Fisher matrix diag(p) - p p^T."""
    n, x = 4000, jnp.array([1.0, -2.0])
    params = {"w": jnp.array([[0.3, -0.2, 0.1], [0.5, 0.1, -0.3]])}

    def loss(params, example, key):
        del key
        logits = example["x"] @ params["w"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])

    def sample(params, example, key):
        return example | {"y": jax.random.categorical(key, example["x"] @ params["w"])}

    data = {"x": jnp.tile(x[None], (n, 1)), "y": jnp.zeros(n, int)}
    index = ja.build_index(ja.ekfac(loss, fisher="true", sample=sample), params, data)
    p = jax.nn.softmax(x @ params["w"])
    fisher = np.kron(np.outer(x, x), np.diag(p) - np.outer(p, p))
    a, b = index.fitted[0].sides["w"]
    vectors = np.kron(a, b)
    expected = np.diag(vectors.T @ fisher @ vectors)
    error = 4 * expected.max() / n**0.5
    np.testing.assert_allclose(index.fitted[0].curvature_over(0), expected, atol=error)
    assert expected.max() > 10 * error  # the empirical Fisher of label 0 differs by more than that
    empirical = ja.build_index(ja.kfac(loss), params, data).fitted[0].curvature_over(0)
    assert np.abs(np.sort(empirical) - np.sort(expected)).max() > 2 * error


def test_sampled_labels_come_from_ids_and_a_loss_may_carry_the_sampler():
    def loss(params, example, key):
        return models.loss(params, example, key)

    loss.sample = sampled
    curvature = [
        build(ja.kfac(method, fisher="true", **options), PARAMS, TRAIN).fitted[0].curvature_over(0)
        for build, method, options in (
            (FEW, loss, {}),
            (ja.build_index, models.loss, {"sample": sampled}),
        )
    ]
    np.testing.assert_allclose(curvature[0], curvature[1], rtol=1e-9, atol=1e-15)


def masked(params, example, key):
    each = jax.vmap(lambda x, y: models.loss(params, {"x": x, "y": y}, key))
    return jnp.sum(each(example["x"], example["y"]) * example["mask"])


def test_padding_does_not_matter():
    x = jax.random.normal(jax.random.key(0), (12, 5, 6), jnp.float64)
    y = jax.random.randint(jax.random.key(1), (12, 5), 0, 3)
    lengths = jnp.arange(12) % 3 + 3
    data = {"x": x, "y": y, "mask": (jnp.arange(5)[None] < lengths[:, None]) * 1.0}
    padded = {
        "x": jnp.pad(x, ((0, 0), (0, 4), (0, 0)), constant_values=7.0),
        "y": jnp.pad(y, ((0, 0), (0, 4))),
        "mask": jnp.pad(data["mask"], ((0, 0), (0, 4))),
    }
    chosen = ja.ekfac(masked, mask=lambda example: example["mask"])
    short, long = (FEW(chosen, PARAMS, each) for each in (data, padded))
    np.testing.assert_allclose(ja.score(long, padded), ja.score(short, data), rtol=1e-9)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (lambda example: None, "but returned None"),
        (lambda example: [True] * 5, "but returned a list"),
        (
            lambda example: jnp.where(example["mask"] > 0, 0.0, -1e9),
            "negative or not finite, as mas",
        ),
        (lambda example: example["mask"] * jnp.nan, "negative or not finite"),
        (lambda example: (example["mask"] > 0).astype(int) - 1, "negative or not finite"),
        (lambda example: example["mask"] < 0, "keeps no position with a gradient"),
        (lambda example: 1 - example["mask"], "Is it the other way round"),
    ],
)
def test_masks_that_are_none_are_refused(mask, words):
    data = {"x": jnp.ones((12, 5, 6)), "y": jnp.zeros((12, 5), int)}
    data["mask"] = jnp.tile(jnp.arange(5) < 3, (12, 1)) * 1.0
    with pytest.raises(ValueError, match=f"mask must return .*{words}"):
        FEW(ja.ekfac(masked, mask=mask), PARAMS, data)


def test_an_example_with_a_mask_of_nan_is_left_out():
    x = jax.random.normal(jax.random.key(0), (12, 5, 6), jnp.float64)
    data = {"x": x, "y": jnp.zeros((12, 5), int), "mask": jnp.ones((12, 5)).at[3].set(jnp.nan)}
    method = ja.ekfac(masked, mask=lambda example: example["mask"])
    with pytest.warns(ja.NonFiniteWarning, match="ids 3"):
        index = FEW(method, PARAMS, data)
    others = jax.tree.map(lambda leaf: jnp.delete(leaf, 3, axis=0), data)
    scores = ja.score(index, others), ja.score(FEW(method, PARAMS, others), others)
    np.testing.assert_allclose(np.delete(scores[0], 3, axis=1), scores[1], rtol=1e-8)


def test_whole_numbers_of_a_mask_count_once():
    x = jax.random.normal(jax.random.key(0), (12, 5, 6), jnp.float64)
    mask = jnp.tile(jnp.arange(5) < 3, (12, 1))
    data = {"x": x, "y": jnp.arange(60).reshape(12, 5) % 3, "mask": mask * 1.0}
    data["ids"] = jnp.where(mask, jnp.arange(60).reshape(12, 5) + 1, 0)
    masks = (lambda example: example["mask"], lambda example: example["ids"])
    scores = [ja.score(FEW(ja.kfac(masked, mask=each), PARAMS, data), data) for each in masks]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-9)


@pytest.mark.parametrize("weight", [1e-4, 0.01, 3.0])
def test_weights_of_a_mask_count_by_their_ratios(weight):
    x = jax.random.normal(jax.random.key(0), (12, 5, 6), jnp.float64)
    data = {"x": x, "y": jnp.arange(60).reshape(12, 5) % 3, "mask": jnp.ones((12, 5))}
    masks = (lambda example: example["mask"], lambda example: weight * example["mask"])
    scores = [ja.score(FEW(ja.kfac(masked, mask=each), PARAMS, data), data) for each in masks]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-9)


def test_parameters_of_no_linear_map_have_a_diagonal_fisher():
    def loss(params, example, key):
        scaled = example | {"x": example["x"] * params["scale"]}
        return models.loss(params["net"], scaled, key)

    params = {"net": PARAMS, "scale": jnp.ones(6)}
    index = FEW(ja.kfac(loss, damping=ja.absolute(0.01)), params, TRAIN)
    gradient = jax.jit(jax.vmap(lambda x: jax.grad(loss)(params, x, None)["scale"]))
    g, q = gradient(TRAIN), gradient(QUERIES)
    expected = q @ (g / (jnp.mean(g**2, axis=0) + 0.01)[None]).T
    place = index.layout.names.index("scale")
    np.testing.assert_allclose(ja.contributions(index, QUERIES)[..., place], expected, rtol=1e-9)


def test_leading_eigenvectors_are_kept_and_their_share_reported():
    with pytest.warns(eigenbases.TruncationWarning, match="less than half.*layer"):
        index = FEW(ja.ekfac(models.loss, rank=1), PARAMS, TRAIN)
    inputs = jnp.concatenate([TRAIN["x"], jnp.ones((20, 1))], axis=1)
    values, vectors = np.linalg.eigh(inputs.T @ inputs / 20)
    a, _ = index.fitted[0].sides["layer0/kernel"]
    np.testing.assert_allclose(np.abs(a[:, 0]), np.abs(vectors[:, -1]), rtol=1e-9)
    share = index.fitted[0].captured["layer0/kernel"][0]
    np.testing.assert_allclose(share, values[-1] / values.sum(), rtol=1e-9)


def test_a_wide_side_is_narrowed_before_its_covariance_is_taken(monkeypatch):
    monkeypatch.setattr(eigenbases, "_WIDE", 20)
    monkeypatch.setattr(eigenbases, "_NARROW", 8)
    rows, width = 30, 4

    def loss(params, example, key):
        del key
        x = params["table"][example["ids"]]
        return jnp.sum(jnp.tanh(x @ params["w"] @ params["table"].T) ** 2)

    params = {
        "table": jax.random.normal(jax.random.key(0), (rows, width), jnp.float64),
        "w": jax.random.normal(jax.random.key(1), (width, width), jnp.float64),
    }
    data = {"ids": jax.random.randint(jax.random.key(2), (9, 5), 0, rows)}
    index = FEW(ja.ekfac(loss, rank=6), params, data)
    a, b = index.fitted[0].sides["table"]
    assert a.shape == (rows, 6) and b.shape == (width, width)
    gradient = jax.jit(jax.vmap(lambda x: jax.grad(loss)(params, x, None)["table"]))(data)
    expected = jnp.einsum("ir,bio,os->brs", a, gradient, b).reshape(9, -1)
    phi = index.featurizer(params, data, fitted=index.fitted[0])
    np.testing.assert_allclose(phi[:, index.layout.slices["table"]], expected, rtol=1e-9)


def test_labels_that_cannot_be_sampled():
    method = ja.ekfac(models.loss, fisher="true", sample=lambda params, example, key: example["y"])
    with pytest.raises(ValueError, match="must return the example with other labels"):
        FEW(method, PARAMS, TRAIN)


def test_a_fitted_basis_is_needed_outside_of_an_index():
    featurize = ja.featurizer(ja.ekfac(models.loss), PARAMS, models.one(TRAIN))
    with pytest.raises(ValueError, match="is fitted to training data. Build an index"):
        featurize(PARAMS, TRAIN)


def looked_up(params, example, key):
    del key
    hidden = jnp.tanh(params["m"]["table"][example["id"]] + params["m"]["bias"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["o"], example["y"])


@pytest.mark.parametrize("narrow", [False, True])
def test_the_bias_of_a_looked_up_row_counts(narrow, monkeypatch):
    if narrow:
        monkeypatch.setattr(eigenbases, "_WIDE", 4)
        monkeypatch.setattr(eigenbases, "_NARROW", 4)
    keys = jax.random.split(jax.random.key(0), 3)
    table, bias = jax.random.normal(keys[0], (7, 3)), jax.random.normal(keys[1], (3,))
    params = {"m": {"table": table, "bias": bias}, "o": jax.random.normal(keys[2], (3, 3))}
    data = {"id": jnp.arange(9) % 7, "y": jnp.arange(9) % 3}
    method = ja.Method("rotated", ja.ekfac(looked_up, rank=8).rule, kernels.Identity())
    index = FEW(method, params, data)
    gradient = jax.jit(jax.vmap(lambda x: jax.grad(looked_up)(params, x, None)["m"]))(data)
    rows = jnp.concatenate([gradient["table"], gradient["bias"][:, None]], axis=1)
    a, b = index.fitted[0].sides["m/table"]
    assert a.shape == (8, 4 if narrow else 8)
    expected = jnp.einsum("ir,bio,os->brs", a, rows, b).reshape(9, -1)
    np.testing.assert_allclose(index.features[:, index.layout.slices["m"]], expected, atol=1e-12)


def test_layers_that_are_used_unequally_often():
    def apply(layers, head, example):
        x = example["x"]
        for layer in (0, 0, 1):
            x = jnp.tanh(x @ layers[layer])
        return optax.softmax_cross_entropy_with_integer_labels(x @ head, example["y"])

    keys = jax.random.split(jax.random.key(0))
    stack = jax.random.normal(keys[0], (2, 6, 6), jnp.float64)
    head = jax.random.normal(keys[1], (6, 3), jnp.float64)
    stacked = FEW(
        ja.kfac(lambda p, x, key: apply(p["s"], p["t"], x)), {"s": stack, "t": head}, TRAIN
    )
    apart = FEW(
        ja.kfac(lambda p, x, key: apply((p["s[0]"], p["s[1]"]), p["t"], x)),
        {"s[0]": stack[0], "s[1]": stack[1], "t": head},
        TRAIN,
    )
    assert stacked.layout.names == apart.layout.names
    got, expected = (ja.contributions(index, QUERIES) for index in (stacked, apart))
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_feature_groups_of_a_convolution_do_not_dilute_its_curvature():
    """S is the covariance of the cotangents at a position, whatever the number of groups."""

    def loss(params, example, key):
        del key
        y = jax.lax.conv_general_dilated(
            jnp.tile(example["x"].reshape(1, 6, 1), (1, 1, 2)),
            params["w"],
            (1,),
            "VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=2,
        )
        logits = jnp.tanh(y).mean((0, 1))[:3]
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])

    params = {"w": jax.random.normal(jax.random.key(0), (3, 1, 4), jnp.float64)}
    index = FEW(ja.kfac(loss), params, TRAIN)
    captured = linear_maps.capture(loss, params, models.one(TRAIN))
    (use,) = jax.vmap(captured, in_axes=(None, 0))(params, TRAIN)["w"]
    t = use.cotangents.shape[1] // 2
    inputs, cotangents = (x.reshape(-1, x.shape[-1]) for x in (use.inputs, use.cotangents))
    a = np.linalg.eigvalsh(inputs.T @ inputs / (20 * 2 * t))
    s = np.linalg.eigvalsh(cotangents.T @ cotangents / (20 * t))
    expected = np.sort(np.outer(a, s).ravel())
    np.testing.assert_allclose(np.sort(index.fitted[0].curvature_over(0)), expected, atol=1e-12)


def test_a_rank_above_what_a_wide_side_is_narrowed_to(monkeypatch):
    monkeypatch.setattr(eigenbases, "_WIDE", 4)
    monkeypatch.setattr(eigenbases, "_NARROW", 3)
    index = FEW(ja.ekfac(models.loss, rank=6), PARAMS, TRAIN)
    a, b = index.fitted[0].sides["layer0/kernel"]
    assert a.shape == (7, 3) and b.shape == (7, 3)
