import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxattr as ja
from jaxattr import groups
from jaxattr.leaves import leaf_names

PARAMS = {
    "embed": {"embedding": jnp.ones((5, 4))},
    "layers": {"dense": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))}},
    "scale": jnp.ones(()),
}


def test_by_leaf_names_are_paths():
    layout = ja.by_leaf(PARAMS)
    assert layout.names == ("embed/embedding", "layers/dense/bias", "layers/dense/kernel", "scale")
    assert layout.sizes == (20, 12, 48, 1)


def test_by_layer_keeps_a_module_together():
    layout = ja.by_layer(PARAMS)
    assert layout.names == ("embed", "layers/dense", "scale")
    assert layout.sizes == (20, 60, 1)


def test_names_are_sorted_as_a_dict_pytree_is():
    names = ja.by_leaf(
        {"b": jnp.ones(1), "B": jnp.ones(1), "a/c": jnp.ones(1), "a": {"z": jnp.ones(1)}}
    )
    weights = {name: i for i, name in enumerate(names.names)}
    assert jax.tree.leaves(weights) == [0, 1, 2, 3]


def test_stacked_leaves_split_into_layers():
    layout = ja.by_layer(PARAMS, stacked="^layers/")
    assert layout.names == (
        "embed", "layers/dense[0]", "layers/dense[1]", "layers/dense[2]", "scale",
    )  # fmt: skip
    assert [member.name for member in layout.members[2]] == [
        "layers/dense/bias[1]", "layers/dense/kernel[1]",
    ]  # fmt: skip


def test_layers_found_by_tracing_split_as_those_named():
    stacked = {"layers/dense/bias": 3, "layers/dense/kernel": 3}
    found = groups.split_layers(ja.by_layer(PARAMS), stacked)
    assert found == ja.by_layer(PARAMS, stacked="^layers/")
    # A group that holds anything else stays whole, as does one that is split already.
    assert groups.split_layers(ja.by_layer(PARAMS), {"layers/dense/bias": 3}) == ja.by_layer(PARAMS)
    assert groups.split_layers(found, stacked) == found


def test_labels_and_exclusion():
    labels = jax.tree.map(lambda _: "rest", PARAMS) | {"scale": None}
    layout = groups.resolve(labels, PARAMS)
    assert layout.names == ("rest",)
    assert layout.excluded == (("scale", "labelled None"),)
    layout = groups.resolve(lambda p: ja.by_layer(p, exclude="embed"), PARAMS)
    assert "embed" not in layout.names
    assert layout.excluded[0][0] == "embed/embedding"


def test_nnx_state_is_named_as_its_dict():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert leaf_names(state) == leaf_names(nnx.to_pure_dict(state))


class Normed(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.dense, self.norm = nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)


@pytest.mark.parametrize("restored", [False, True], ids=["a state", "restored without a target"])
def test_running_averages_of_nnx_are_found(restored):
    state = nnx.state(Normed())
    if restored:  # a dict of one value for each variable
        state = jax.tree.map(lambda x: {"value": x}, nnx.to_pure_dict(state))
    with pytest.raises(ValueError, match=r"2 arrays .*Exclude them: .*norm/mean.*norm/var"):
        groups.resolve(ja.by_layer, state)
    layout = groups.resolve(ja.by_layer(exclude="mean|var"), state)
    assert sum(layout.sizes) == 15 and not any("mean" in name for name in layout.names)
    # Parameters of these names are trained.
    prior = {"prior": {"mean": jnp.ones(3), "var": jnp.ones(3), "scale": jnp.ones(3)}}
    assert groups.resolve(ja.by_layer, prior).sizes == (9,)


def test_only_the_value_of_a_variable_loses_its_name():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Registered:
        query: jax.Array
        key: jax.Array
        value: jax.Array

    @flax.struct.dataclass
    class Struct:
        query: jax.Array
        key: jax.Array
        value: jax.Array

    class Tuple(NamedTuple):
        query: jax.Array
        key: jax.Array
        value: jax.Array

    for attention in (Registered, Struct, Tuple):
        one = attention(jnp.ones((2, 3)), jnp.ones((2, 4)), jnp.ones((2, 5)))
        params = {"net": {"a": one, "b": one}}
        layout = groups.resolve(ja.by_layer, params)
        assert layout.names == ("net/a", "net/b")
        for name, members in zip(layout.names, layout.members, strict=True):
            sizes = {member.leaf: member.size for member in members}
            assert sizes == {f"{name}/query": 6, f"{name}/key": 8, f"{name}/value": 10}
        labels = jax.tree.map(lambda _: "rest", params)
        assert groups.resolve(labels, params).sizes == (48,)

    # Inside a variable, too, an attribute keeps its name.
    variable = nnx.Param(Registered(*[jnp.ones(3)] * 3))
    names = ["a/value/query", "a/value/key", "a/value/value"]
    assert leaf_names(nnx.State({"a": variable})) == names


def test_labels_of_an_nnx_state():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    labels = {"kernel": "rest", "bias": None}
    assert groups.resolve(labels, state).excluded == (("bias", "labelled None"),)
    as_state = jax.tree.map(lambda x: "rest" if x.ndim == 2 else None, state)
    assert groups.resolve(as_state, state) == groups.resolve(labels, state)


def test_leaves_that_share_a_name_are_refused():
    params = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(3)}}
    for grouping in (ja.by_leaf, ja.by_layer, jax.tree.map(lambda _: "rest", params)):
        with pytest.raises(ValueError, match=r"'a/b': \['a'\]\['b'\] and \['a/b'\]"):
            groups.resolve(grouping, params)


def test_every_parameter_is_in_exactly_one_group():
    for layout in (ja.by_leaf(PARAMS), ja.by_layer(PARAMS, stacked="layers")):
        assert sum(layout.sizes) == sum(leaf.size for leaf in jax.tree.leaves(PARAMS))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"dense": "dense"}, "'embed/embedding' matches none"),
        ({"dense": "dense", "all": "."}, "'layers/dense/bias' matches 2 patterns"),
    ],
)
def test_by_regex_needs_exactly_one_match(patterns, message):
    with pytest.raises(ValueError, match=message):
        ja.by_regex(PARAMS, patterns)


def test_by_regex_groups():
    layout = ja.by_regex(PARAMS, {"dense": "dense", "other": "embed|scale"})
    assert dict(zip(layout.names, layout.sizes, strict=True)) == {"dense": 60, "other": 21}
    assert ja.by_regex({"dense": "dense"}, exclude="embed|scale")(PARAMS).names == ("dense",)


@pytest.mark.parametrize(
    ("grouping", "params", "message"),
    [
        (ja.by_leaf, {"step": jnp.arange(3)}, "no floating-point arrays: got only whole numbers"),
        (ja.by_leaf, {"name": "adam"}, "'name' must be a floating-point array, got str"),
        (ja.by_leaf, {}, "no floating-point arrays: got an empty pytree"),
        ({"embed": "a"}, PARAMS, "Without a label: .'embed/embedding', 'layers/dense/bias'"),
        (jax.tree.map(lambda _: 3, PARAMS), PARAMS, "must be a string or None, got 3"),
        (jax.tree.map(lambda _: None, PARAMS), PARAMS, "every leaf is excluded"),
        (lambda p: ja.by_layer(p, stacked="scale"), PARAMS, "'scale' is a scalar"),
        (ja.by_leaf({"other": jnp.ones(3)}), PARAMS, "name a leaf 'other'"),
        (ja.by_leaf({**PARAMS, "scale": jnp.ones(4)}), PARAMS, "'scale' has 1 parameters"),
    ],
)  # fmt: skip
def test_bad_groups(grouping, params, message):
    with pytest.raises(ValueError, match=message):
        groups.resolve(grouping, params)


def test_a_leaf_in_two_groups_is_refused():
    layout = ja.by_leaf({"w": jnp.ones(3)})
    twice = groups.GroupLayout(("a", "b"), layout.members * 2)
    with pytest.raises(ValueError, match="of which the groups hold 6"):
        groups.resolve(twice, {"w": jnp.ones(3)})
