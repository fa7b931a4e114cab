"""LoGRA, K-FAC, EK-FAC, TrackStar and influence functions against what they are defined to be."""

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxattr as ja
from jaxattr import kernels, linear_maps
from jaxattr.features import projections
from jaxattr.features.featurizer import FeatureRule
from jaxattr.fitting import eigenbases, optimizer_moments
from jaxattr.index.index import ConvergenceWarning
from tests import models

PARAMS = models.mlp_params()
TRAIN, QUERIES = models.data(20), models.data(4, seed=1)
EXACT = projections.identity()
FEW = functools.partial(ja.build_index, batch_size=7)


def adam_state(params=PARAMS):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    state = optimizer.init(params)
    for row in range(3):
        gradient = jax.grad(models.loss)(params, jax.tree.map(lambda x, r=row: x[r], TRAIN), None)
        _, state = optimizer.update(gradient, state)
    return state


def rank_one_moments():
    def moments(leaf):
        if leaf.ndim == 1:
            return jnp.arange(1.0, leaf.size + 1) / 50
        rows, columns = (jnp.arange(1.0, n + 1) for n in leaf.shape)
        return rows[:, None] * columns[None] / 50

    return optax.ScaleByRmsState(nu=jax.tree.map(moments, PARAMS))


METHODS = {
    "LoGRA": lambda: ja.logra(models.loss, rank=4),
    "LoGRA-PCA": lambda: ja.logra(models.loss, rank=4, basis="pca"),
    "K-FAC": lambda: ja.kfac(models.loss),
    "EK-FAC": lambda: ja.ekfac(models.loss),
    "EK-FAC, true": lambda: ja.ekfac(models.loss, fisher="true", sample=sampled),
    "TrackStar": lambda: ja.trackstar(models.loss, adam_state(), PARAMS, rank=4, queries=QUERIES),
    "Influence": lambda: ja.influence(models.loss, damping=ja.absolute(0.5)),
    "CG": lambda: ja.influence(models.loss, damping=ja.absolute(0.5), solver="cg", tolerance=1e-9),
    "DataInf": lambda: ja.data_inf(models.loss),
}


def sampled(params, example, key):
    return example | {"y": jax.random.categorical(key, models.mlp(params, example["x"]))}


@functools.cache
def method_of(name):
    """One method per name: what is compiled for it is compiled once."""
    return METHODS[name]()


@functools.cache
def index_of(name):
    return FEW(method_of(name), PARAMS, TRAIN)


@pytest.mark.parametrize("name", METHODS)
def test_batches_and_order_do_not_matter(name):
    method = method_of(name)
    whole = ja.score(ja.build_index(method, PARAMS, TRAIN), QUERIES)
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(ja.score(index_of(name), QUERIES), whole, rtol=1e-6)
    if "true" not in name:  # labels are drawn by id, and other examples have other ids then
        flipped = jax.tree.map(lambda x: x[::-1], TRAIN)
        got = ja.score(FEW(method, PARAMS, flipped), QUERIES)[:, ::-1]
        np.testing.assert_allclose(got, whole, rtol=1e-6)


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


@pytest.mark.parametrize("name", METHODS)
def test_an_example_that_is_not_finite_does_no_harm(name):
    bad = TRAIN | {"x": TRAIN["x"].at[5].set(jnp.nan)}
    with pytest.warns(ja.NonFiniteWarning, match="1 of 20 training examples.*ids 5"):
        index = FEW(method_of(name), PARAMS, bad)
    others = jax.tree.map(lambda x: jnp.delete(x, 5, axis=0), TRAIN)
    if "true" in name:
        assert np.isfinite(ja.score(index, QUERIES)).all()
        return
    expected = ja.score(FEW(method_of(name), PARAMS, others), QUERIES)
    got = ja.score(index, QUERIES)
    np.testing.assert_allclose(jnp.delete(got, 5, axis=1), expected, rtol=1e-7)
    assert (got[:, 5] == 0).all()


def test_without_curvature_ekfac_is_tracin():
    rule = ja.ekfac(models.loss).rule
    rotated = ja.Method("rotated", rule, kernels.Identity())
    expected = ja.score(FEW(ja.tracin(models.loss, projection=EXACT), PARAMS, TRAIN), QUERIES)
    index = FEW(rotated, PARAMS, TRAIN)
    np.testing.assert_allclose(ja.score(index, QUERIES), expected, rtol=1e-12)
    np.testing.assert_allclose(index.fitted[0].captured["layer0/kernel"], 1, rtol=1e-12)


@pytest.mark.parametrize("method", [ja.kfac, ja.ekfac])
def test_signs_of_eigenvectors_do_not_matter(method, monkeypatch):
    expected = ja.score(FEW(method(models.loss), PARAMS, TRAIN), QUERIES)
    eigen = eigenbases._eigen

    def flipped(matrix):
        values, vectors = eigen(matrix)
        return values, vectors * np.where(np.arange(values.shape[-1]) % 2, 1, -1)[None]

    monkeypatch.setattr(eigenbases, "_eigen", flipped)
    got = ja.score(FEW(method(models.loss), PARAMS, TRAIN), QUERIES)
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


@pytest.mark.parametrize("method", [ja.kfac, ja.ekfac, ja.logra])
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
    np.testing.assert_allclose(curvature[0], curvature[1], rtol=1e-9)


def masked(params, example, key):
    each = jax.vmap(lambda x, y: models.loss(params, {"x": x, "y": y}, key))
    return jnp.sum(each(example["x"], example["y"]) * example["mask"])


@pytest.mark.parametrize("method", [ja.kfac, ja.ekfac])
def test_padding_does_not_matter(method):
    x = jax.random.normal(jax.random.key(0), (12, 5, 6), jnp.float64)
    y = jax.random.randint(jax.random.key(1), (12, 5), 0, 3)
    lengths = jnp.arange(12) % 3 + 3
    data = {"x": x, "y": y, "mask": (jnp.arange(5)[None] < lengths[:, None]) * 1.0}
    padded = {
        "x": jnp.pad(x, ((0, 0), (0, 4), (0, 0)), constant_values=7.0),
        "y": jnp.pad(y, ((0, 0), (0, 4))),
        "mask": jnp.pad(data["mask"], ((0, 0), (0, 4))),
    }
    chosen = method(masked, mask=lambda example: example["mask"])
    short, long = (FEW(chosen, PARAMS, each) for each in (data, padded))
    np.testing.assert_allclose(ja.score(long, padded), ja.score(short, data), rtol=1e-9)


def test_parameters_of_no_linear_map_have_a_diagonal_fisher():
    def loss(params, example, key):
        scaled = example | {"x": example["x"] * params["scale"]}
        return models.loss(params["net"], scaled, key)

    params = {"net": PARAMS, "scale": jnp.ones(6)}
    index = FEW(ja.kfac(loss, damping=ja.absolute(0.01)), params, TRAIN)
    gradient = jax.vmap(lambda x: jax.grad(loss)(params, x, None)["scale"])
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
    gradient = jax.vmap(lambda x: jax.grad(loss)(params, x, None)["table"])(data)
    expected = jnp.einsum("ir,bio,os->brs", a, gradient, b).reshape(9, -1)
    phi = index.featurizer(params, data, fitted=index.fitted[0])
    np.testing.assert_allclose(phi[:, index.layout.slices["table"]], expected, rtol=1e-9)


def inverse_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors / np.sqrt(values)) @ vectors.T


@pytest.mark.parametrize("mixing", [None, 0.0, 0.7])
def test_trackstar_is_its_formula(mixing):
    state = adam_state()
    method = ja.trackstar(
        models.loss, state, PARAMS, rank=99, queries=QUERIES, mixing=mixing, epsilon=1e-3
    )
    index = FEW(method, PARAMS, TRAIN)
    nu = optimizer_moments.second_moments(state, PARAMS)
    scaled = [
        jax.vmap(
            lambda x: jax.tree.map(
                lambda g, v: g / (jnp.sqrt(v) + 1e-3), jax.grad(models.loss)(PARAMS, x, None), nu
            )
        )(data)
        for data in (TRAIN, QUERIES)
    ]
    white = [[], []]
    if mixing is None:
        spectra = []
        for each in scaled:
            blocks = [np.linalg.eigvalsh(second(each[name])) for name in PARAMS]
            spectra.append(np.sort(np.concatenate(blocks))[::-1][2])  # 2 = ceil(91 * 1000 / 65536)
        mixing = spectra[0] / sum(spectra)
    for name in PARAMS:
        train, queries = (second(each[name]) for each in scaled)
        r = mixing * queries + (1 - mixing) * train
        root = inverse_root(r + 0.1 * np.trace(r) / len(r) * np.eye(len(r)))
        for side, each in zip(white, scaled, strict=True):
            side.append(rows(each[name]) @ root)
    n, q = (np.concatenate(side, axis=1) for side in white)
    n, q = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (n, q))
    np.testing.assert_allclose(ja.score(index, QUERIES), q @ n.T, rtol=1e-7)
    np.testing.assert_allclose(ja.self_influence(index), 1, rtol=1e-9)


def rows(layer):
    kernel = layer["kernel"].reshape(len(layer["kernel"]), -1)
    return np.concatenate([kernel, layer["bias"]], axis=1)


def second(layer):
    x = rows(layer)
    return x.T @ x / len(x)


def test_second_moments_of_rank_one_need_no_weight_gradient():
    """By leaf, since the bias's moments are not of one rank with the kernel's."""
    scores = []
    for rank_one in (False, True):
        method = ja.trackstar(
            models.loss, rank_one_moments(), PARAMS, rank=4, rank_one=rank_one, epsilon=0.0
        )
        index = FEW(method, PARAMS, TRAIN, groups=ja.by_leaf)
        scores.append(ja.score(index, QUERIES))
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-8)


def test_adafactor_moments_are_restored():
    params = {"w": jnp.ones((3, 5)), "b": jnp.ones(4), "t": jnp.ones((2, 5, 3))}
    optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=2)
    gradient = jax.tree.map(lambda x: jnp.arange(1.0, x.size + 1).reshape(x.shape) / x.size, params)
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    found = optimizer_moments.second_moments(state, params)
    square = gradient["w"] ** 2
    row, column = square.mean(1), square.mean(0)
    expected = row[:, None] * column[None] / row.mean()
    ratio = found["w"] / expected  # one constant: the decay of the first step
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params)


def test_conjugate_gradients_report_where_they_end():
    method = functools.partial(ja.influence, models.loss, solver="cg")
    index = FEW(method(damping=ja.absolute(0.5), tolerance=1e-8), PARAMS, TRAIN)
    assert index.solve_errors.shape == (20,) and index.solve_errors.max() < 2e-8
    with pytest.warns(ConvergenceWarning, match="20 of 20 solves did not converge"):
        short = FEW(method(damping=ja.absolute(0.5), iterations=1), PARAMS, TRAIN)
    assert np.isfinite(ja.score(short, QUERIES)).all()


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
    with pytest.raises(ValueError, match="tolerance must be above 0 and iterations at least 1"):
        ja.influence(loss, damping=ja.absolute(0.1), solver="cg", tolerance=0)
    with pytest.raises(ValueError, match="mixing must be between 0 and 1, got 2"):
        ja.trackstar(loss, adam_state(), PARAMS, queries=QUERIES, mixing=2)
    with pytest.raises(ValueError, match="needs queries= to mix with"):
        ja.trackstar(loss, adam_state(), PARAMS, mixing=0.5)


def test_optimizer_states_without_second_moments():
    state = optax.sgd(0.1, momentum=0.9).init(PARAMS)
    with pytest.raises(ValueError, match=r"Missing: \['layer0/bias'.*'TraceState'"):
        ja.trackstar(models.loss, state, PARAMS)
    other = optax.adam(0.1).init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"of other names or shapes: \['w'\]"):
        ja.trackstar(models.loss, other, PARAMS)
    with pytest.raises(ValueError, match=r"found twice: \['layer0/bias'"):
        ja.trackstar(models.loss, (adam_state(), adam_state()), PARAMS)
    method = ja.trackstar(models.loss, [adam_state()], PARAMS)
    with pytest.raises(ValueError, match="there is none for checkpoint 1"):
        FEW(method, [PARAMS, PARAMS], TRAIN)


def test_second_moments_in_parts_and_those_that_the_optimizer_divides_by():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    gradient = {"a": jnp.arange(1.0, 3.0), "b": jnp.arange(1.0, 4.0)}
    optimizers = {"fast": optax.adam(0.1), "slow": optax.rmsprop(0.1, decay=0.999)}
    parts = optax.multi_transform(optimizers, {"a": "fast", "b": "slow"})
    found = [
        optimizer_moments.second_moments(opt.update(gradient, opt.init(params), params)[1], params)
        for opt in (parts, optax.adam(0.1))
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *found)
    assert optimizer_moments.second_moments(gradient, params) is gradient
    amsgrad = optax.amsgrad(0.1)
    _, state = amsgrad.update(gradient, amsgrad.init(params), params)
    _, state = amsgrad.update(jax.tree.map(jnp.zeros_like, params), state, params)
    largest = optimizer_moments.second_moments(state, params)
    np.testing.assert_allclose(largest["a"], gradient["a"] ** 2, rtol=1e-6)


def test_labels_that_cannot_be_sampled():
    method = ja.ekfac(models.loss, fisher="true", sample=lambda params, example, key: example["y"])
    with pytest.raises(ValueError, match="must return the example with other labels"):
        FEW(method, PARAMS, TRAIN)


def test_a_fitted_basis_is_needed_outside_of_an_index():
    featurize = ja.featurizer(ja.ekfac(models.loss), PARAMS, models.one(TRAIN))
    with pytest.raises(ValueError, match="is fitted to training data. Build an index"):
        featurize(PARAMS, TRAIN)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ja.kfac(models.loss, damping=ja.absolute(0.0)),
        lambda: ja.trackstar(models.loss, adam_state(), PARAMS, damping=ja.absolute(0.0)),
        lambda: ja.Method(
            "flat",
            FeatureRule(lambda p, x, key: jnp.sum(p["layer0"]["bias"]), EXACT),
            kernels.InverseHessian(ja.absolute(0.0)),
        ),
    ],
)
def test_singular_kernels(make):
    few = jax.tree.map(lambda x: x[:2], TRAIN)
    with pytest.raises(ValueError, match="singular"):
        FEW(make(), PARAMS, few)


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
    gradient = jax.vmap(lambda x: jax.grad(looked_up)(params, x, None)["m"])(data)
    rows = jnp.concatenate([gradient["table"], gradient["bias"][:, None]], axis=1)
    a, b = index.fitted[0].sides["m/table"]
    assert a.shape == (8, 4 if narrow else 8)
    expected = jnp.einsum("ir,bio,os->brs", a, rows, b).reshape(9, -1)
    np.testing.assert_allclose(index.features[:, index.layout.slices["m"]], expected, atol=1e-12)


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
