"""Ways in which models write their parameters: what the features of each come to."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr import linear_maps
from jaxattr.batches import OneAtATimeWarning
from jaxattr.features import bases, projections
from tests import architectures
from tests.linear_map_checks import (
    assert_close,
    check,
    exact_matrices,
    jit,
    normal,
    random_bases,
    zeros,
)

RANK = 3


def two_sided(loss, params, batch, materialize=False, rank=RANK, **kwargs):
    basis = bases.Signs(materialize=materialize)
    method = ja.tracin(loss, projection=projections.two_sided(rank, basis=basis))
    example = jax.tree.map(lambda x: x[0], batch)
    return ja.featurizer(method, params, example, **kwargs)


def assert_features_are_exact(loss, params, batch, **kwargs):
    """Features of the rewritten loss are those of gradients that are formed; returns them."""
    fast = two_sided(loss, params, batch, **kwargs)
    slow = two_sided(loss, params, batch, materialize=True, **kwargs)
    assert fast.layout == slow.layout
    got, expected = fast(params, batch), slow(params, batch)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    return fast


def test_a_scale_that_is_an_einsum_is_one_group():
    def loss(params, x, key):
        del key
        x = x @ params["dense"]["kernel"]
        return jnp.sum(jnp.tanh(jnp.einsum("td,d->td", x, params["norm"]["scale"])) ** 2)

    params = {"dense": {"kernel": normal(0, 6, 5)}, "norm": {"scale": normal(1, 5)}}
    featurize = assert_features_are_exact(loss, params, normal(2, 3, 4, 6))
    assert featurize.layout.names == ("dense", "norm")
    assert featurize.layout.dims == (9, 5)


def test_a_leaf_whose_gradient_is_stopped_is_left_out():
    def loss(params, x, key):
        del key
        frozen = jax.lax.stop_gradient(params["frozen"])
        x = x @ (frozen["kernel"] + params["delta"])
        return jnp.sum(jnp.tanh(x + frozen["bias"][None]) ** 2)

    frozen = {"kernel": normal(0, 6, 5), "bias": normal(1, 5)}
    params, batch = {"frozen": frozen, "delta": normal(2, 6, 5)}, normal(3, 3, 4, 6)
    featurize = assert_features_are_exact(loss, params, batch)
    assert featurize.layout.names == ("delta",)
    text = str(ja.describe(ja.logra(loss, rank=RANK), params, batch[0]))
    assert text.count("excluded: its gradient is stopped") == 2
    # Groups that the user spells out are left as they are: the features are zero.
    labels = jax.tree.map(lambda _: "all", params)
    whole = assert_features_are_exact(loss, params, batch, groups=labels)
    assert dict(whole.plan.reasons)["frozen/bias"] == "its gradient is stopped"
    stopped = lambda params, x, key: loss(jax.lax.stop_gradient(params), x, key)  # noqa: E731
    with pytest.raises(ValueError, match="No parameter is in a group: .*gradient is stopped"):
        two_sided(stopped, params, batch)


def mixture_of_experts(params, x, key):
    del key
    second = x[:, 0] > 0
    x = x[jnp.argsort(second)] @ params["dense"]
    sizes = jnp.stack([(~second).sum(), second.sum()]).astype(jnp.int32)
    return jnp.sum(jnp.tanh(jax.lax.ragged_dot(x, params["experts"], sizes)) ** 2)


def test_an_operation_that_cannot_be_batched_runs_one_example_at_a_time():
    params, batch = {"dense": normal(0, 6, 4), "experts": normal(1, 2, 4, 5)}, normal(2, 3, 7, 6)
    with pytest.warns(OneAtATimeWarning, match="ragged_dot"):
        featurize = assert_features_are_exact(mixture_of_experts, params, batch)
    assert dict(featurize.plan.reasons) == {"experts": "used by ragged_dot_general"}
    exact = ja.tracin(mixture_of_experts, projection=ja.projections.identity())
    featurize = ja.featurizer(exact, params, batch[0])
    gradients = [jax.grad(mixture_of_experts)(params, x, None) for x in batch]
    with pytest.warns(OneAtATimeWarning):
        got = featurize(params, batch)
    for leaf in params:
        expected = np.stack([each[leaf].reshape(-1) for each in gradients])
        assert_close(got[:, featurize.layout.slices[leaf]], expected, leaf)
    with pytest.warns(OneAtATimeWarning):
        index = ja.build_index(ja.ekfac(mixture_of_experts), params, batch)
    assert np.isfinite(ja.score(index, batch)).all()


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(name="norm")(x)
        heads = nn.DenseGeneral((2, 3), name="heads")(y)
        x = x + nn.DenseGeneral(6, axis=(-2, -1), name="out")(jnp.tanh(heads))
        return x + nn.Dense(6, name="down")(nn.silu(nn.Dense(7, name="up")(x))), None


class Layers(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Layer, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
        )
        return layers(name="layers")(x, None)[0]


@pytest.mark.parametrize("axis", [1, -1])  # the scan of `architectures` is along the first
def test_layers_that_are_stacked_along_any_axis_are_groups(axis):
    module, batch = Layers(axis), normal(0, 3, 4, 6)
    params = architectures.filled(jax.eval_shape(module.init, jax.random.key(0), batch[0]))

    def loss(params, x, key):
        del key
        return jnp.sum(jnp.tanh(module.apply(params, x)) ** 2)

    found = check(loss, params, batch)
    kinds = {"norm/scale", "norm/bias"}
    assert {leaf.removeprefix("params/layers/") for leaf in found.exact} == kinds
    featurize = assert_features_are_exact(loss, params, batch)
    parts = ("down", "heads", "norm", "out", "up")
    expected = [f"params/layers/{part}[{i}]" for part in parts for i in range(3)]
    assert list(featurize.layout.names) == expected
    # The features of the norms are their gradients, layer by layer.
    gradient = jax.jit(jax.vmap(jax.grad(loss), (None, 0, None)))(params, batch, None)
    norm = gradient["params"]["layers"]["norm"]
    whole = two_sided(loss, params, batch, rank=10)
    phi = whole(params, batch)
    for i in range(3):
        expected = [
            np.take(np.asarray(norm[name]), i, axis=axis % 2 + 1) for name in ("bias", "scale")
        ]
        of_layer = np.concatenate(expected, axis=1)
        assert_close(phi[:, whole.layout.slices[f"params/layers/norm[{i}]"]], of_layer, "norm")


def test_an_index_remembers_along_which_axis_layers_are_stacked(tmp_path):
    module, batch = Layers(1), normal(0, 3, 4, 6)
    params = architectures.filled(jax.eval_shape(module.init, jax.random.key(0), batch[0]))

    def loss(params, x, key):
        del key
        return jnp.sum(jnp.tanh(module.apply(params, x)) ** 2)

    index = ja.build_index(ja.logra(loss, rank=2), params, batch, path=tmp_path / "index")
    opened = ja.open_index(tmp_path / "index", ja.logra(loss, rank=2), params)
    np.testing.assert_array_equal(ja.score(index, batch), ja.score(opened, batch))
    assert opened.layout == index.layout


def test_mixed_derivatives_through_weight_expressions():
    """The derivative of dL/dZ along a direction of the parameters is A^T (H v) B here too."""

    def loss(params, x, key):
        del key
        x = jnp.tanh(x @ (params["w"] + params["a"] @ params["b"] / 2))
        return jnp.sum(jnp.sin(x @ jnp.concatenate([params["w"].T, 3 * params["v"]], 1)) ** 2)

    shapes = {"w": (6, 5), "a": (6, 2), "b": (2, 5), "v": (5, 3)}
    params = {leaf: normal(i, *shape) / 2 for i, (leaf, shape) in enumerate(shapes.items())}
    x = normal(9, 4, 6)
    found = linear_maps.find(loss, params, x)
    assert set(found.maps) == set(shapes)
    bases = random_bases(found.maps)
    z = zeros(found, bases)
    rewritten = linear_maps.bottleneck(loss, params, x)

    def both(params):
        projected = jax.grad(rewritten, argnums=2)(params, bases, z, x)
        return projected, exact_matrices(found, jax.grad(loss)(params, x, None))

    direction = jax.tree.map(np.cos, params)
    got, exact = jit(lambda p, v: jax.jvp(both, (p,), (v,))[1])(params, direction)
    for leaf, (a, b) in bases.items():
        assert_close(got[leaf], a.T @ exact[leaf] @ b, leaf)


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this JAX has no references")
def test_what_is_written_into_a_reference_is_a_use():
    def loss(params, x, key):
        del key
        reference = jax.new_ref(jnp.zeros((6, 5)))
        reference[...] = params["w"]
        return jnp.sum(jnp.sin(x @ reference[...]) + x @ params["w"])

    found = linear_maps.find(loss, {"w": normal(0, 6, 5)}, normal(1, 4, 6))
    assert found.exact == {"w": "used by swap"}


def assert_gradients_are_exact(loss, params, batch):
    """The features without a projection are the gradients, of each leaf alone."""
    groups = {leaf: leaf for leaf in params}
    method = ja.tracin(loss, projection=ja.projections.identity())
    featurize = ja.featurizer(method, params, batch[0], groups=groups)
    got = featurize(params, batch)
    gradients = jit(jax.vmap(jax.grad(loss), (None, 0, None)))(params, batch, None)
    for leaf, gradient in gradients.items():
        rows = np.asarray(gradient).reshape(len(batch), -1)
        assert_close(got[:, featurize.layout.slices[leaf]], rows, leaf)


def test_a_mask_along_both_sides_makes_a_leaf_exact():
    """Pruned weights: A^T (mask * (x^T d)) B is no product of what a side makes of x and of d."""
    mask = np.random.default_rng(0).integers(2, size=(6, 5)).astype(float)

    def loss(params, x, key):
        del key
        pruned = x @ (params["pruned"] * mask) + x @ jnp.where(mask > 0, params["where"], 0)
        return jnp.sum(jnp.tanh(pruned @ params["dense"]) ** 2)

    shapes = {"pruned": (6, 5), "where": (6, 5), "dense": (5, 4)}
    params = {leaf: normal(i, *shape) for i, (leaf, shape) in enumerate(shapes.items())}
    batch = normal(3, 3, 4, 6)
    featurize = assert_features_are_exact(loss, params, batch)
    reasons = dict(featurize.plan.reasons)
    assert set(reasons) == {"pruned", "where"}
    assert "along its inputs and outputs" in reasons["pruned"]
    assert_gradients_are_exact(loss, params, batch)
    gradient = jax.jit(jax.vmap(jax.grad(loss), (None, 0, None)))(params, batch, None)
    assert (np.asarray(gradient["pruned"])[:, mask == 0] == 0).all()


SHARDED = {
    "positions": (("d",), (), ("d",), jnp.matmul, {}),
    "positions, unchecked": (("d",), (), ("d",), jnp.matmul, {"check_vma": False}),
    "outputs": ((), (None, "d"), (None, "d"), jnp.matmul, {}),
    "inputs": ((None, "d"), ("d",), (), lambda x, w: jax.lax.psum(x @ w, "d"), {}),
    "gathered": (
        ("d",),
        ("d",),
        ("d",),
        lambda x, w: x @ jax.lax.all_gather(w, "d", axis=0, tiled=True),
        {},
    ),
}


@pytest.mark.parametrize("name", SHARDED)
def test_a_shard_map_makes_the_leaves_inside_exact(name):
    x_spec, w_spec, y_spec, product, options = SHARDED[name]
    x_spec, w_spec, y_spec = (jax.sharding.PartitionSpec(*s) for s in (x_spec, w_spec, y_spec))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("d",))
    inside = jax.shard_map(
        product, mesh=mesh, in_specs=(x_spec, w_spec), out_specs=y_spec, **options
    )

    def loss(params, x, key, product=inside):
        del key
        return jnp.sum(jnp.tanh(product(x, params["inside"]) @ params["after"]) ** 2)

    params, batch = {"inside": normal(0, 8, 12), "after": normal(1, 12, 3)}, normal(2, 3, 4, 8)
    featurize = assert_features_are_exact(loss, params, batch)
    assert dict(featurize.plan.reasons) == {"inside": "used by shard_map"}
    assert_gradients_are_exact(loss, params, batch)
    plain = functools.partial(loss, product=jnp.matmul)
    got, expected = (
        jax.jit(jax.vmap(jax.grad(f), (None, 0, None)))(params, batch, None) for f in (loss, plain)
    )
    assert_close(got["inside"], expected["inside"], "inside")


def expression(numbers, params):
    """A weight [4, 6] that random leaves, their parts, sums and multiples make up."""
    ways = ["leaf", "rows", "sum", "stopped", "scaled", "joined", "flipped", "product", "rounded"]
    match numbers.choice(ways):
        case "leaf":
            return params["wide"][:, numbers.integers(4) :][:, :6]
        case "rows":
            first = expression(numbers, params)
            return jnp.concatenate([first[numbers.integers(1, 4) :], first])[:4]
        case "sum":
            return expression(numbers, params) - 3 * expression(numbers, params)
        case "stopped":
            return expression(numbers, params) + jax.lax.stop_gradient(params["tall"][:4])
        case "scaled":
            along = [np.arange(4.0)[:, None], np.arange(6.0)[None], np.ones((1, 1)) / 3]
            return expression(numbers, params) * along[numbers.integers(3)]
        case "joined":
            parts = [params["tall"][numbers.integers(5) :][:2], params["wide"][2:, :6]]
            return jnp.concatenate(parts if numbers.integers(2) else parts[::-1])
        case "flipped":
            return jnp.flip(expression(numbers, params), numbers.integers(2))
        case "product":
            size = numbers.integers(1, 5)
            return params["wide"][:, ::-1][:, :size] @ (params["tall"] / 2)[-size:]
        case "rounded":
            exact = expression(numbers, params)
            return exact + jax.lax.stop_gradient(jnp.round(exact) - exact)


def applied(numbers, params, x):
    """Multiplies x [5, 4] by a random weight, somewhere in the control flow."""

    def multiply(x, params):
        return x @ expression(numbers, params)

    match numbers.choice(["here", "remat", "cond", "scan"]):
        case "here":
            return multiply(x, params)
        case "remat":
            return jax.checkpoint(multiply)(x, params)
        case "cond":
            other = lambda x, params: jnp.sin(x) @ params["wide"][:, -6:]  # noqa: E731
            return jax.lax.cond(x[0, 0] > 0, multiply, other, x, params)
        case "scan":
            step = lambda y, c: (y + multiply(x * c, params), None)  # noqa: E731
            return jax.lax.scan(step, jnp.zeros((5, 6)), jnp.arange(1.0, 3))[0]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_weights_are_made_of_the_numbers_are_right(seed):
    def loss(params, x, key):
        del key
        numbers = np.random.default_rng(seed)
        y = jnp.tanh(applied(numbers, params, x))
        return jnp.sum(jnp.sin(y @ expression(numbers, params).T) @ params["wide"])

    params = {"wide": normal(seed, 4, 9), "tall": normal(seed + 1, 7, 6)}
    check(loss, params, normal(seed + 2, 3, 5, 4))
