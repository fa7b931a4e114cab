"""TrackStar, and an optimizer's second moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jaxattr as ja
from jaxattr.fitting import optimizer_moments
from tests import models
from tests.curvature import FEW, PARAMS, QUERIES, TRAIN, adam_state, rank_one_moments


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
        jax.jit(
            jax.vmap(
                lambda x: jax.tree.map(
                    lambda g, v: g / (jnp.sqrt(v) + 1e-3), models.gradient(PARAMS, x, None), nu
                )
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
    _, state = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    found = optimizer_moments.second_moments(state, params)
    square = gradient["w"] ** 2
    row, column = square.mean(1), square.mean(0)
    expected = row[:, None] * column[None] / row.mean()
    ratio = found["w"] / expected  # one constant: the decay of the first step
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params)


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
    with pytest.raises(ValueError, match="given 1 states of an optimizer, and there are 2"):
        FEW(method, [PARAMS, models.mlp_params(jax.random.key(1))], TRAIN)


def test_states_of_more_checkpoints_than_there_are():
    method = ja.trackstar(models.loss, [adam_state(), adam_state()], PARAMS)
    with pytest.raises(ValueError, match="given 2 states of an optimizer, and there are 1"):
        FEW(method, PARAMS, TRAIN)


def test_what_is_no_second_moment_is_refused():
    found = optimizer_moments.second_moments(adam_state(), PARAMS)
    for wrong in (PARAMS, jax.tree.map(lambda x: x.at[0].set(jnp.nan), found)):
        with pytest.raises(ValueError, match="finite and not negative, and those of .*mu"):
            ja.trackstar(models.loss, wrong, PARAMS)


def test_statistics_beside_moments_are_not_looked_at():
    given = {"params": {"w": jnp.ones(3)}, "batch_stats": {"mean": -jnp.ones(3)}}
    optimizer_moments.second_moments(given, given)


def test_a_frozen_part_is_excluded(tmp_path):
    labels = {name: "frozen" if name == "layer0" else "trained" for name in PARAMS}
    frozen = {"trained": optax.adam(0.1), "frozen": optax.set_to_zero()}
    optimizer = optax.multi_transform(frozen, labels)
    gradient = models.gradient(PARAMS, models.one(TRAIN), None)
    _, state = jax.jit(optimizer.update)(gradient, optimizer.init(PARAMS), PARAMS)
    method = ja.trackstar(models.loss, state, PARAMS, rank=4)
    with pytest.raises(ValueError, match=r"moments of \['layer0/bias', 'layer0/kernel'\], 2 of 6"):
        FEW(method, PARAMS, TRAIN, path=tmp_path / "index")
    assert not (tmp_path / "index").exists()  # so that the mended call finds no other index
    index = FEW(method, PARAMS, TRAIN, groups=ja.by_layer(exclude="layer0"))
    trained = {name: leaf for name, leaf in PARAMS.items() if name != "layer0"}

    def alone(params, example, key):
        return models.loss(PARAMS | params, example, key)

    _, own = jax.jit(optax.adam(0.1).update)(
        {name: gradient[name] for name in trained}, optax.adam(0.1).init(trained)
    )
    expected = FEW(ja.trackstar(alone, own, trained, rank=4), trained, TRAIN)
    scores = ja.score(index, QUERIES), ja.score(expected, QUERIES)
    np.testing.assert_allclose(*scores, rtol=1e-9)


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


@pytest.mark.parametrize("rank_one", [False, True])
def test_whole_numbers_need_no_second_moments(rank_one):
    """Parameters with a counter score as those without, whatever the optimizer leaves out."""
    counted = PARAMS | {"count": jnp.asarray(7), "table": jnp.arange(3)}
    moments = rank_one_moments().nu
    trained = {name: name in PARAMS for name in counted}
    masked = optax.masked(optax.adam(0.1), trained).init(counted)
    adam = masked.inner_state[0]
    masked = masked._replace(inner_state=(adam._replace(nu=adam.nu | moments), None))

    def loss(params, example, key):
        return models.loss({name: params[name] for name in PARAMS}, example, key)

    def scores(state, params):
        method = ja.trackstar(loss, state, params, rank=4, rank_one=rank_one, epsilon=0.0)
        return ja.score(FEW(method, params, TRAIN, groups=ja.by_leaf), QUERIES)

    expected = scores(moments, PARAMS)
    for state in (masked, moments, moments | {"count": None, "table": None}):
        np.testing.assert_allclose(scores(state, counted), expected, rtol=1e-9)
    with pytest.raises(ValueError, match=r"each of 6 parameters. Missing: \['layer0/bias'"):
        optimizer_moments.second_moments({"layer1": moments["layer1"]}, counted)


def test_what_sm3_calls_nu_is_a_momentum():
    with pytest.raises(ValueError, match="second moment for each of .*ScaleBySM3State"):
        optimizer_moments.second_moments(optax.sm3(0.1).init(PARAMS), PARAMS)


def test_second_moments_too_small_for_half_precision():
    """Of 1e-12, whose inverse root is past float16."""
    exact = {"w": jnp.asarray([[0.1, -0.2], [0.3, 0.05]], jnp.float32), "b": jnp.zeros(2)}
    x = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)

    def loss(params, example, key):
        output = jnp.tanh(example.astype(params["w"].dtype) @ params["w"] + params["b"])
        return 0.01 * jnp.sum(output.astype(jnp.float32) ** 2)

    def scores(dtype):
        params = jax.tree.map(lambda a: a.astype(dtype), exact)
        moments = jax.tree.map(lambda a: jnp.full(a.shape, 1e-12, jnp.float32), params)
        return ja.score(ja.build_index(ja.trackstar(loss, moments, params), params, x), x)

    np.testing.assert_allclose(scores(jnp.float16), scores(jnp.float32), atol=0.02)


def restored(state):
    """Without its classes, as Orbax restores it where it is told none."""
    return [dict(state[0]._asdict()), [], {}]


@pytest.mark.parametrize(
    ("optimizer", "given_as"),
    [(optax.adam(0.1), tuple), (optax.adafactor(0.1), tuple), (optax.adam(0.1), restored)],
)
def test_an_optimizer_of_linens_parameters_fits_its_variables(optimizer, given_as):
    inner = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
    gradient = jax.tree.map(lambda x: jnp.arange(1.0, x.size + 1).reshape(x.shape), inner)
    state = jax.jit(optimizer.update)(gradient, optimizer.init(inner), inner)[1]
    expected = optimizer_moments.second_moments(state, inner)
    state = given_as(state)
    variables = {"params": inner, "batch_stats": {"norm": {"mean": jnp.zeros(4)}}}
    found = optimizer_moments.second_moments(state, variables)
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, found["params"], expected)
    given = optimizer_moments.second_moments(expected, variables)  # moments, like the parameters
    jax.tree.map(np.testing.assert_array_equal, given, found)


CENTRED = functools.partial(optax.rmsprop, centered=True)


@pytest.mark.parametrize(
    "make", [optax.adam, optax.rmsprop, CENTRED, optax.adafactor, optax.amsgrad]
)
def test_a_state_is_the_same_as_orbax_restores_it(tmp_path, make):
    gradient = jax.tree.map(lambda x: jnp.arange(1.0, x.size + 1).reshape(x.shape), PARAMS)
    optimizer = optax.chain(optax.clip_by_global_norm(1e3), make(0.1))
    state = jax.jit(optimizer.update)(gradient, optimizer.init(PARAMS), PARAMS)[1]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", {"state": state})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "saved")["state"]
    assert isinstance(restored, list)
    expected = moments_of(state)
    for given in (restored, [restored], [state, state], [restored, restored]):
        for found in moments_of(given):
            jax.tree.map(np.testing.assert_array_equal, found, expected[0])
    assert len(moments_of([restored, restored])) == 2


def moments_of(states):
    basis = ja.trackstar(models.loss, states, PARAMS).rule.projection.basis
    return [each.value for each in basis.moments]


@pytest.mark.parametrize("make", [optax.adam(0.1).init, lambda p: jax.tree.map(jnp.zeros_like, p)])
def test_a_state_of_before_the_first_step_is_refused(make):
    with pytest.raises(ValueError, match="All second moments are zero, as before the first step"):
        ja.trackstar(models.loss, make(PARAMS), PARAMS)
