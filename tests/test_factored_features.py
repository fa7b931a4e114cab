"""Features of linear maps, which form no weight gradient, against those that are formed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr import linear_maps
from jaxattr.features import bases, projections
from jaxattr.features.plans import FeatureLayout
from jaxattr.leaves import leaf_names
from tests import architectures, models

RANK = 3


@functools.cache
def model(name):
    return architectures.ALL[name]()


def materialized(rank):
    """The same projection of gradients that are formed first."""
    signs = bases.Signs(materialize=True)
    return projections.two_sided(rank, basis=signs)


def featurizer(name, projection, **kwargs):
    loss, params, batch = model(name)
    method = ja.tracin(loss, projection=projection)
    return ja.featurizer(method, params, models.one(batch), **kwargs)


@pytest.mark.parametrize(
    ("name", "groups"),
    [*((name, ja.by_layer) for name in architectures.ALL), ("gpt_scan_linen", ja.by_leaf)],
)
def test_no_weight_gradient_is_needed(name, groups):
    _, params, batch = model(name)
    fast = featurizer(name, projections.two_sided(RANK), groups=groups)
    slow = featurizer(name, materialized(RANK), groups=groups)
    assert fast.layout == slow.layout
    got, expected = fast(params, batch), slow(params, batch)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


# Biases, convolutions in groups and stacks by hand, a scan with remat.
@pytest.mark.parametrize("name", ["mlp_linen", "separable_bare", "gpt_scan_linen"])
def test_full_rank_features_are_the_gradient(name):
    loss, params, batch = model(name)
    exact = ja.tracin(loss, projection=projections.identity())
    factored = ja.tracin(loss, projection=projections.two_sided(10_000))
    example = models.one(batch)
    inner = []
    for method in (exact, factored):
        phi = ja.featurizer(method, params, example)(params, batch)
        inner.append(phi @ phi.T)
    np.testing.assert_allclose(inner[1], inner[0], rtol=1e-12)


@pytest.mark.parametrize("name", architectures.ALL)
def test_every_parameter_is_planned_once(name):
    loss, params, _ = model(name)
    for groups in (ja.by_layer, ja.by_leaf):
        featurize = featurizer(name, projections.two_sided(RANK), groups=groups)
        plan = featurize.plan
        everything = {name for name in leaf_names(params)}
        assert plan.covered | plan.rest == everything
        assert not plan.covered & plan.rest
        assert {leaf for leaf, _ in plan.reasons} == plan.rest
        assert sum(featurize.layout.sizes) == sum(x.size for x in jax.tree.leaves(params))


def test_a_scanned_stack_has_one_group_per_layer():
    featurize = featurizer("gpt_scan_linen", projections.two_sided(RANK))
    names = featurize.layout.names
    for part in ("q", "k", "v", "o", "up", "down", "norm"):
        assert [name for name in names if name.startswith(f"layers/{part}[")] == [
            f"layers/{part}[{i}]" for i in range(3)
        ]
    # Groups that the user spells out are left as they are.
    loss, params, batch = model("gpt_scan_linen")
    labels = jax.tree.map(lambda _: "all", params)
    method = ja.tracin(loss, projection=projections.two_sided(RANK))
    whole = ja.featurizer(method, params, models.one(batch), groups=labels)
    assert whole.layout.names == ("all",)


@pytest.mark.parametrize("name", ["mlp_linen", "separable_bare"])
def test_batches_and_microbatches_do_not_change_features(name):
    _, params, batch = model(name)
    whole = featurizer(name, projections.two_sided(RANK))
    alone = featurizer(name, projections.two_sided(RANK), microbatch=1)
    rows = [alone(params, jax.tree.map(lambda x, i=i: x[i : i + 1], batch)) for i in range(3)]
    expected = whole(params, batch)
    np.testing.assert_allclose(jnp.concatenate(rows), expected, rtol=1e-9, atol=1e-12)
    flipped = jax.tree.map(lambda x: x[::-1], batch)
    np.testing.assert_allclose(whole(params, flipped)[::-1], expected, rtol=1e-9, atol=1e-12)


def test_a_stochastic_loss_draws_the_same_noise():
    def noisy(params, example, key):
        keep = jax.random.bernoulli(key, 0.5, (6,))
        return models.loss(params, example | {"x": example["x"] * keep}, key)

    params, data = models.mlp_params(), models.data(7)
    rows = []
    for projection in (projections.two_sided(RANK), materialized(RANK)):
        featurize = ja.featurizer(ja.tracin(noisy, projection=projection), params, models.one(data))
        rows.append(featurize(params, data, jnp.arange(7) + 3))
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-10, atol=1e-13)


def test_two_sided_inner_products_are_unbiased():
    params, data = models.mlp_params(sizes=(6, 9, 8, 3)), models.data(2)
    method = ja.tracin(models.loss, projection=projections.two_sided(4))
    exact = ja.tracin(models.loss, projection=projections.identity())
    truth = ja.featurizer(exact, params, models.one(data))(params, data)
    featurize = ja.featurizer(method, params, models.one(data))
    products = []
    for number in range(300):
        phi = featurize(params, data, checkpoint=number)
        products.append([phi[0] @ phi[1], phi[0] @ phi[0]])
    mean, error = np.mean(products, axis=0), np.std(products, axis=0) / 300**0.5
    expected = np.array([truth[0] @ truth[1], truth[0] @ truth[0]])
    assert (np.abs(mean - expected) < 4 * error).all()


def test_a_bias_in_another_group_is_exact():
    params, data = models.mlp_params(), models.data(3)
    method = ja.tracin(models.loss, projection=projections.two_sided(RANK))
    featurize = ja.featurizer(method, params, models.one(data), groups=ja.by_leaf)
    gradient = jax.jit(jax.vmap(jax.grad(models.loss), (None, 0, None)))(params, data, None)
    got = featurize(params, data)[:, featurize.layout.slices["layer1/bias"]]
    np.testing.assert_allclose(got, gradient["layer1"]["bias"], rtol=1e-12)
    assert dict(featurize.plan.reasons)["layer1/bias"] == (
        "the bias of layer1/kernel, which is in another group"
    )


def test_excluded_leaves_have_no_features():
    params, data = models.mlp_params(), models.data(3)
    method = ja.tracin(models.loss, projection=projections.two_sided(RANK))
    groups = functools.partial(ja.by_layer, exclude="layer1/kernel")
    featurize = ja.featurizer(method, params, models.one(data), groups=groups)
    assert featurize.layout.dims[1] == 5  # the bias alone
    assert dict(featurize.plan.reasons)["layer1/bias"] == (
        "the bias of layer1/kernel, which is not covered"
    )


def test_layers_of_an_axis_that_is_no_stack_fall_back():
    params, data = models.mlp_params(), models.data(3)
    method = ja.tracin(models.loss, projection=projections.two_sided(RANK))
    groups = functools.partial(ja.by_leaf, stacked="layer0/kernel")
    featurize = ja.featurizer(method, params, models.one(data), groups=groups)
    assert "layer0/kernel" in featurize.plan.rest
    assert "does not number its layers" in dict(featurize.plan.reasons)["layer0/kernel"]
    assert featurize(params, data).shape == (3, featurize.layout.total)


def test_examples_of_another_length():
    def loss(params, example, key):
        del key
        return jnp.sum(jnp.tanh(example @ params["w"]) ** 2)

    params = {"w": jnp.arange(20.0).reshape(4, 5) / 20}
    phi = []
    for projection in (projections.two_sided(RANK), materialized(RANK)):
        method = ja.tracin(loss, projection=projection)
        featurize = ja.featurizer(method, params, jnp.ones((3, 4)))
        phi.append(featurize(params, jax.random.normal(jax.random.key(0), (2, 7, 4))))
    np.testing.assert_allclose(phi[0], phi[1], rtol=1e-12)


def test_nothing_is_a_linear_map():
    def loss(params, example, key):
        del key
        return jnp.sum(jnp.sin(params["scale"] * example))

    params, data = {"scale": jnp.arange(1.0, 9.0)}, jnp.ones((2, 8)) * jnp.arange(1.0, 3.0)[:, None]
    method = ja.tracin(loss, projection=projections.two_sided(10))
    phi = ja.featurizer(method, params, data[0])(params, data)
    np.testing.assert_allclose(phi, data * jnp.cos(params["scale"][None] * data), rtol=1e-12)
    assert "factored 0.0%" in str(ja.describe(method, params, data[0]))


def test_no_array_of_a_weight_gradient_per_example_is_in_the_program():
    """b x i x o numbers would show as an array of that many elements; none is that large."""
    i, o, b = 48, 80, 16
    params = {"w": jnp.ones((i, o)), "v": jnp.ones((o, i))}
    batch = jnp.ones((b, 4, i))

    def loss(params, example, key):
        del key
        return jnp.sum(jnp.tanh(example @ params["w"]) @ params["v"])

    def largest(projection):
        method = ja.tracin(loss, projection=projection)
        featurize = ja.featurizer(method, params, batch[0])
        text = jax.jit(featurize).lower(params, batch).compile().as_text()
        return max(_sizes(text))

    assert largest(projections.two_sided(4)) < b * i * o
    assert largest(materialized(4)) >= b * i * o  # the search does find them


def test_memory_grows_with_the_rank_and_not_with_the_parameters():
    """Twice the examples need more by their activations and features, not by weight gradients."""
    width, t, b = 256, 2, 16
    params = {"w": jnp.ones((width, width)), "v": jnp.ones((width, width))}

    def loss(params, example, key):
        del key
        return jnp.sum(jnp.tanh(example @ params["w"]) @ params["v"])

    method = ja.tracin(loss, projection=projections.two_sided(4))
    featurize = ja.featurizer(method, params, jnp.ones((t, width)))

    def memory(b):
        program = jax.jit(featurize).lower(params, jnp.ones((b, t, width))).compile()
        return program.memory_analysis().temp_size_in_bytes

    per_example = (memory(2 * b) - memory(b)) / b
    assert per_example < 8 * 10 * t * width  # ten activations in float64
    assert per_example < 8 * width * width / 10  # a tenth of one weight gradient


def _sizes(program):
    import math
    import re

    shapes = re.findall(r"\bf(?:32|64)\[([0-9,]+)\]", program)
    return [math.prod(map(int, shape.split(","))) for shape in shapes]


def test_bands_are_blocks_of_columns():
    params, data = models.mlp_params(), models.data(9)
    method = ja.ekfac(models.loss, bands=2)
    index = ja.build_index(method, params, data)
    plain = ja.build_index(ja.ekfac(models.loss), params, data)
    assert index.layout.names[:4] == ("layer0[0,0]", "layer0[0,1]", "layer0[1,0]", "layer0[1,1]")
    np.testing.assert_allclose(ja.score(index, data), ja.score(plain, data), rtol=1e-9)


def test_a_rank_that_leaves_a_layer_whole_says_so():
    params, data = models.mlp_params(), models.data(3)
    method = ja.tracin(models.loss, projection=projections.two_sided(6))
    text = str(ja.describe(method, params, models.one(data)))
    assert "dense 7x7 -> 6x6\n" in text  # with the bias
    assert "dense 6x3 -> 6x3 (rank 6: whole)" in text
    method = ja.tracin(models.loss, projection=projections.two_sided(4))
    text = str(ja.describe(method, params, models.one(data)))
    assert "dense 6x3 -> 4x3 (rank 4: one side whole)" in text


def test_layout_without_blocks_takes_groups_as_blocks():
    layout = FeatureLayout(("a", "b"), (4, 4), (2, 3))
    assert layout.column_blocks.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("name", ["mlp_linen", "gpt_tied_nnx", "separable_bare"])
def test_describe_accounts_for_every_parameter(name):
    loss, params, batch = model(name)
    described = ja.describe(ja.logra(loss, rank=RANK), params, models.one(batch))
    assert [leaf.name for leaf in described.leaves] == leaf_names(params)
    found = linear_maps.find(loss, params, models.one(batch), jax.random.key(0))
    for leaf in described.leaves:
        if leaf.name in found.maps:
            assert f"{found.maps[leaf.name].kind} " in leaf.route
        elif leaf.name in found.exact:
            assert found.exact[leaf.name] in leaf.route
    assert dataclasses.is_dataclass(described)
