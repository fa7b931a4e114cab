import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxattr as ja
from jaxattr.features import projections
from jaxattr.features.bases import NOTHING
from tests import models

PARAMS = models.mlp_params()
DATA = models.data(11)
EXACT = projections.identity()


def make(method=None, **kwargs):
    return ja.featurizer(
        method or ja.tracin(models.loss, projection=EXACT), PARAMS, models.one(DATA), **kwargs
    )


def noisy_loss(params, example, key):
    return models.loss(params, example, key) * jax.random.uniform(key, dtype=jnp.float64)


def test_features_are_each_example_s_gradient():
    phi = make(groups=ja.by_leaf)(PARAMS, DATA)
    for row in range(11):
        example = jax.tree.map(lambda x, row=row: x[row], DATA)
        gradient = models.gradient(PARAMS, example, None)
        expected = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])
        np.testing.assert_allclose(phi[row], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("projection", "microbatch"),
    [(EXACT, 3), *((projections.rademacher(8), size) for size in (1, 3, 64))],
    ids=str,
)
def test_batch_microbatch_and_order_do_not_matter(projection, microbatch):
    method = ja.grad_cos(noisy_loss, projection=projection)
    featurize = make(method, microbatch=microbatch)
    ids = jnp.arange(11)
    whole = make(method)(PARAMS, DATA, ids)
    order = jax.random.permutation(jax.random.key(0), 11)
    shuffled = jax.tree.map(lambda x: x[order], DATA)
    np.testing.assert_allclose(featurize(PARAMS, shuffled, ids[order]), whole[order], rtol=1e-9)
    parts = [
        featurize(PARAMS, jax.tree.map(lambda x, s=s: x[s], DATA), ids[s])
        for s in (slice(0, 4), slice(4, 11))
    ]
    np.testing.assert_allclose(jnp.concatenate(parts), whole, rtol=1e-9)


def test_randomness_comes_from_ids():
    featurize = make(ja.tracin(noisy_loss, projection=EXACT))
    same = jax.tree.map(lambda x: jnp.repeat(x[:1], 2, axis=0), DATA)
    first, second = featurize(PARAMS, same, jnp.array([4, 9]))
    assert not np.allclose(first, second)
    again = featurize(PARAMS, same, jnp.array([9, 4]))
    np.testing.assert_array_equal(again[0], second)


def test_each_checkpoint_has_its_own_projection():
    featurize = make(ja.tracin(models.loss, projection=projections.rademacher(8)))
    first, second = (featurize(PARAMS, DATA, checkpoint=c) for c in (0, 1))
    assert not np.allclose(first, second)


def test_unit_norm_even_of_tiny_and_zero_gradients():
    def scaled(params, example, key):
        return models.loss(params, example, key) * example["scale"]

    data = DATA | {"scale": jnp.array([1e-200] + [0.0] + [1.0] * 9)}
    method = ja.grad_cos(scaled, projection=EXACT)
    phi = ja.featurizer(method, PARAMS, models.one(data))(PARAMS, data)
    expected = np.array([1.0, 0.0] + [1.0] * 9)
    np.testing.assert_allclose(jnp.linalg.norm(phi, axis=1), expected, rtol=1e-12)


def test_groups_are_columns():
    layout = make(ja.tracin(models.loss, projection=projections.rademacher(16))).layout
    assert layout.names == ("layer0", "layer1", "layer2")
    assert layout.sizes == (49, 40, 18)
    assert layout.dims == (16, 16, 16)
    assert layout.slices["layer1"] == slice(16, 32)
    assert layout.total == 48


def test_excluded_leaves_have_no_gradient():
    phi = make(groups=lambda p: ja.by_leaf(p, exclude="bias"))(PARAMS, DATA)
    assert phi.shape == (11, 6 * 7 + 7 * 5 + 5 * 3)


def test_residual_of_trak_is_one_minus_p():
    featurize = make(ja.trak(models.margin))
    given = (featurize.key, PARAMS, DATA, jnp.arange(11), featurize.draw(), NOTHING)
    got = featurize.step(*given).residual
    logits = jax.vmap(lambda x: models.mlp(PARAMS, x))(DATA["x"])
    p = jax.nn.softmax(logits)[jnp.arange(11), DATA["y"]]
    np.testing.assert_allclose(got, 1 - p, rtol=1e-12)


def test_traces_once_per_shape():
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(models.loss, n=3)  # the check of its shape, and one gradient
    featurize = ja.featurizer(ja.tracin(traced, projection=EXACT), PARAMS, models.one(DATA))
    for seed in range(4):
        featurize(PARAMS, models.data(11, seed), jnp.arange(11) + seed, checkpoint=seed)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Dense(5, name="hidden", param_dtype=jnp.float64)(x))
        return linen.Dense(3, name="head", param_dtype=jnp.float64)(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(6, 5, rngs=rngs, param_dtype=jnp.float64)
        self.head = nnx.Linear(5, 3, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        return self.head(jnp.tanh(self.hidden(x)))


def bare(params, x):
    x = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def test_linen_nnx_and_bare_functions_agree():
    net = LinenNet()
    params = jax.jit(net.init)(jax.random.key(0), DATA["x"][:1])["params"]
    graph, state = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
    applies = {
        "linen": (params, lambda p, x: net.apply({"params": p}, x[None])[0]),
        "nnx": (state, lambda p, x: nnx.merge(graph, p)(x[None])[0]),
        "bare": (params, bare),
    }

    def features(params, apply):
        def margin(params, example, key):
            del key
            return models.margin_of(apply(params, example["x"]), example["y"])

        method = ja.trak(margin, projection=projections.rademacher(9))
        return ja.featurizer(method, params, models.one(DATA))(params, DATA)

    found = {name: features(*arguments) for name, arguments in applies.items()}
    np.testing.assert_allclose(found["linen"], found["bare"], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found["nnx"], found["bare"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda p, e, k: models.mlp(p, e["x"]), r"float64\[3\]"),
        (lambda p, e, k: models.loss(p, e, k)[None], r"float64\[1\]"),
        (lambda p, e, k: e["y"], r"int\d+\[\]"),
        (lambda p, e, k: (models.loss(p, e, k), e["x"]), r"float64\[\], float64\[6\]"),
        (lambda p, e, k: None, "nothing"),
    ],
)
def test_output_must_be_a_float_scalar(output, got):
    with pytest.raises(ValueError, match=f"one float scalar; it returned {got}.*add the axis"):
        make(ja.tracin(output))


def test_bad_arguments():
    with pytest.raises(ValueError, match="microbatch must be at least 1, got 0"):
        make(microbatch=0)
    with pytest.raises(ValueError, match="same leading axis"):
        make()(PARAMS, {"x": DATA["x"], "y": DATA["y"][:4]})


def test_a_loss_that_updates_batch_statistics():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.BatchNorm(use_running_average=False)(linen.Dense(3)(x)).sum()

    net = Net()
    variables = jax.jit(net.init)(jax.random.key(0), DATA["x"][:1])

    def loss(params, example, key):
        del key
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        return net.apply(given, example["x"][None], mutable=["batch_stats"])

    with pytest.raises(ValueError, match="let layers with batch statistics use their running"):
        ja.featurizer(ja.tracin(loss), variables["params"], models.one(DATA))
