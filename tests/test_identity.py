"""Identity is content: equal where what is computed is equal, and nowhere else."""

import dataclasses
import inspect
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import jaxattr as ja
from jaxattr import identity, kernels
from jaxattr.features import bases, projections
from jaxattr.fitting.eigenbases import Eigenbasis
from jaxattr.identity import Contents, Program
from jaxattr.identity.programs import _Walk
from tests import models

PARAMS = models.mlp_params()
TRAIN = models.data(30)
ONE = models.one(TRAIN)
KEY = jax.random.key(0)
QUERY = {"image": ONE["x"], "trajectory": jnp.ones((3, *ONE["x"].shape)), "t": jnp.arange(3)}


def other(function, factor=2.0):
    return lambda *arguments: factor * function(*arguments)


def sample(params, example, key):
    return {**example, "y": jax.random.randint(key, (), 0, 3).astype(example["y"].dtype)}


def first_label(params, example, key):
    return {**example, "y": jnp.zeros_like(example["y"])}


def at(params, example, key, timestep):
    return models.loss(params, example, key) * timestep


def journey(params, query, key):
    return jnp.sum(query["trajectory"]) * jnp.sum(params["layer0"]["bias"])


class Together(dict):
    """Arguments that only go together."""


def moments(scale):
    return jax.tree.map(lambda x: scale * jnp.ones_like(x), PARAMS)


DAMPINGS = (ja.relative(0.1), ja.absolute(0.1))
PROJECTIONS = (ja.projections.rademacher(8), ja.projections.gaussian(8))
LOSSES = (models.loss, other(models.loss))
MARGINS = (models.margin, other(models.margin))
FISHERS = (Together(fisher="empirical"), Together(fisher="true", sample=sample))
FACTORED = {
    "loss": LOSSES,
    "damping": DAMPINGS,
    "rank": (4, 5),
    "fisher": FISHERS,
    "sample": (Together(fisher="true", sample=sample), Together(fisher="true", sample=first_label)),
    "mask": (None, lambda example: jnp.ones(1)),
    "bands": (1, 2),
}
TRAK_LIKE = {"damping": DAMPINGS, "dense": (False, True), "projection": PROJECTIONS}

# {factory: {argument: two values}}; None where it decides nothing that is computed.
FACTORIES = {
    ja.tracin: {
        "loss": LOSSES,
        "checkpoint_weights": ((1.0,), (2.0,)),
        "projection": PROJECTIONS,
    },
    ja.grad_cos: {
        "loss": LOSSES,
        "checkpoint_weights": ((1.0,), (2.0,)),
        "projection": PROJECTIONS,
    },
    ja.trak: {"margin": MARGINS, "residual": (None, models.loss)} | TRAK_LIKE,
    ja.d_trak: {"output": MARGINS} | TRAK_LIKE,
    ja.journey_trak: {"loss": LOSSES, "journey": (journey, other(journey))} | TRAK_LIKE,
    ja.das: {
        "output": MARGINS,
        "residual": (None, models.loss),
        "leverage": (True, False),
        "link": ("square", "identity"),
        "damping": DAMPINGS,
        "projection": PROJECTIONS,
    },
    ja.logra: {"loss": LOSSES, "rank": (4, 5), "basis": ("random", "pca"), "damping": DAMPINGS},
    ja.kfac: FACTORED,
    ja.ekfac: FACTORED,
    ja.eshampoo: {name: values for name, values in FACTORED.items() if name != "mask"},
    ja.source: {
        name: values for name, values in FACTORED.items() if name not in ("damping", "bands")
    } | {"learning_rate": (0.1, 0.2), "steps": (5, 6), "momentum": (0.0, 0.9)},
    ja.trackstar: {
        "loss": LOSSES,
        "optimizer_states": (moments(1.0), moments(2.0)),
        "params": None,  # a shape to look the states up with
        "rank": (4, 5),
        "queries": (TRAIN, models.data(30, seed=5)),
        "mixing": (Together(queries=TRAIN, mixing=0.1), Together(queries=TRAIN, mixing=0.2)),
        "damping": DAMPINGS,
        "rank_one": (False, True),
        "epsilon": (1e-8, 1e-6),
    },
    ja.influence: {
        "loss": LOSSES,
        "damping": (ja.absolute(0.1), ja.absolute(0.2)),
        "curvature": ("hessian", "fisher"),
        "solver": ("exact", "cg"),
        "tolerance": (Together(solver="cg", tolerance=1e-3), Together(solver="cg", tolerance=1e-4)),
        "iterations": (Together(solver="cg", iterations=5), Together(solver="cg", iterations=6)),
        "positive_only": (False, True),
        "projection": PROJECTIONS,
    },
    ja.data_inf: {"loss": LOSSES, "damping": DAMPINGS, "projection": PROJECTIONS},
    ja.expectation: {
        "loss": (at, other(at)),
        "timesteps": ((1, 2), (1, 3)),
        "draws": (1, 2),
        "steps": None,  # what timesteps are checked against
        "unit_norm": (False, True),
    },
    projections.rademacher: {"dim": (8, 9)},
    projections.gaussian: {"dim": (8, 9)},
    projections.srht: {"dim": (8, 9)},
    projections.sjlt: {"dim": (8, 9), "nonzeros": (2, 3)},
    projections.grass: {"size": (8, 9), "mask": (2, 3)},
    projections.factgrass: {"rank": (4, 5), "mask": (2, 3)},
    projections.two_sided: {
        "rank": (4, 5),
        "basis": (bases.Signs(), Eigenbasis(eigenvalues=True)),
    },
    kernels.Gram: {"damping": DAMPINGS, "dense": (False, True),
                   "leverage": (Together(dense=True), Together(dense=True, leverage=True))},
    kernels.SecondMoment: {"damping": DAMPINGS},
    kernels.Segment: {"time": (1.0, 2.0)},
    kernels.DataInf: {"damping": DAMPINGS},
    kernels.InverseHessian: {"damping": DAMPINGS, "positive_only": (False, True)},
    kernels.ConjugateGradient: {
        "damping": (ja.absolute(0.1), ja.absolute(0.2)),
        "tolerance": (1e-3, 1e-4),
        "iterations": (5, 6),
    },
    kernels.Whitening: {
        "damping": DAMPINGS,
        "queries": (Contents(TRAIN), Contents(models.data(30, seed=5))),
        "mixing": (Together(queries=Contents(TRAIN), mixing=0.1),
                   Together(queries=Contents(TRAIN), mixing=0.2)),
    },
}  # fmt: skip
REQUIRED = {
    "loss": models.loss, "margin": models.margin, "output": models.margin, "journey": journey,
    "optimizer_states": moments(1.0), "params": PARAMS, "timesteps": (1, 2), "dim": 8, "rank": 4,
    "size": 8, "time": 1.0, "learning_rate": 0.1, "steps": 5,
    "damping": ja.absolute(0.1), "tolerance": 1e-3, "iterations": 5,
}  # fmt: skip
CASES = [(f, argument) for f, table in FACTORIES.items() for argument in table]


def made(factory, argument=None, value=None):
    parameters = inspect.signature(factory).parameters
    given = {
        name: REQUIRED[name]
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    if factory is ja.expectation:
        given["loss"] = at
    if argument is not None:
        given |= value if isinstance(value, Together) else {argument: value}
    return factory(**given)


def identity_of(value):
    """What an index of it would say."""
    timestep = jax.ShapeDtypeStruct((), jnp.asarray(0).dtype)
    given = {"params": PARAMS, "example": ONE, "query": QUERY, "key": KEY, "timestep": timestep}
    return identity.digest(identity.describe(identity.traced(value, given)))


def test_every_factory_and_argument_is_in_the_table():
    public = {
        value
        for name in ("tracin", "grad_cos", "trak", "d_trak", "journey_trak", "das", "logra", "kfac",
                     "ekfac", "eshampoo", "source", "trackstar", "influence", "data_inf",
                     "expectation")
        for value in [getattr(ja, name)]
    }  # fmt: skip
    makers = {
        f
        for n, f in vars(projections).items()
        if inspect.isfunction(f) and f.__module__ == projections.__name__ and n[0] != "_"
    }
    classes = {
        k
        for k in vars(kernels).values()
        if dataclasses.is_dataclass(k) and k not in (kernels.Damping, kernels.Identity)
    }
    assert FACTORIES.keys() >= public | (makers - {projections.identity}) | classes
    for factory, table in FACTORIES.items():
        assert table.keys() == inspect.signature(factory).parameters.keys(), factory


@pytest.mark.parametrize(
    ("factory", "argument"), CASES, ids=[f"{f.__name__}-{a}" for f, a in CASES]
)
def test_another_value_is_another_identity(factory, argument):
    values = FACTORIES[factory][argument]
    if values is None:
        return
    first, again, second = (made(factory, argument, v) for v in (values[0], values[0], values[1]))
    assert identity_of(first) == identity_of(again)
    assert identity_of(first) != identity_of(second)


def test_identities_are_the_same_in_another_process():
    program = (
        "from tests import conftest\nfrom tests import test_identity as t\n"
        "print([t.identity_of(t.made(f)) for f in t.FACTORIES])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.strip() == str([identity_of(made(f)) for f in FACTORIES])


def test_functions_that_differ_on_other_queries_alone_are_told_apart():
    """They share a compiled step for training examples, which ran the first for queries."""

    def scores(factor):
        def loss(params, example, key):
            more = factor * example["v"] if "v" in example else 1
            return jnp.sum(jnp.sin(example["x"] @ params["w"])) * more

        x = np.linspace(-1, 1, 12).reshape(3, 4)
        index = ja.build_index(ja.tracin(loss), {"w": jnp.ones((4, 2))}, {"x": x})
        return np.asarray(ja.score(index, {"x": x, "v": np.ones(3)}))

    np.testing.assert_allclose(scores(10.0), 10 * scores(1.0), rtol=1e-9)


def test_what_a_callback_closes_over_is_part_of_a_program():
    def calling(number, power=2):
        def called(x):
            return np.asarray(number * x[0] ** power, x.dtype)

        def function(params, example, key):
            shape = jax.ShapeDtypeStruct((), example.dtype)
            factor = jax.pure_callback(called, shape, example, vmap_method="sequential")
            return jax.lax.stop_gradient(factor) * params.sum()

        return Program(function, (jnp.ones(3), jnp.ones(3), KEY))

    assert calling(2.0) == calling(2.0)
    assert calling(2.0) != calling(3.0)
    assert calling(2.0) != calling(2.0, 3)
    assert calling(jnp.float32(2)) == calling(jnp.float32(2)) != calling(jnp.float32(3))


def test_what_a_callback_logs_is_no_part_of_a_program():
    log = []

    def function(params, example, key):
        jax.debug.callback(lambda value: log.append(value), example.sum())
        return (params * example).sum()

    program = Program(function, (jnp.ones(3), jnp.ones(3), KEY))
    program(jnp.ones(3), jnp.ones(3), KEY)
    jax.effects_barrier()
    assert log and program == Program(function, (jnp.ones(3), jnp.ones(3), KEY))
    assert program(jnp.ones(4), jnp.ones(4), KEY) == 4  # traced anew


def test_the_order_of_a_set_does_not_matter():
    """As of the axes of a `shard_map`: it depends on the process."""
    first, second = (_Walk(), _Walk())
    first._parameter(frozenset(["data", "model"]))
    second._parameter({"model", "data"})
    assert first.hexdigest() == second.hexdigest()


def program_of(function, *arguments):
    return Program(function, arguments or (PARAMS, ONE, KEY))


def test_an_equal_function_made_anew_is_the_same_program():
    assert program_of(other(models.loss)) == program_of(other(models.loss))
    assert program_of(other(models.loss)) != program_of(models.loss)
    assert len({program_of(models.loss), program_of(models.loss)}) == 1


def inside_jit(value):
    base = jnp.full(3, value)
    return jax.jit(lambda x: x * base)


def inside_a_loop(value):
    base = jnp.full(3, value)
    return lambda x: jax.lax.scan(lambda c, _: (c * base, None), x, None, length=2)[0]


def inside_remat(value):
    base = jnp.full(3, value)
    return jax.jit(jax.checkpoint(lambda x: jax.jit(lambda y: jnp.sin(y * base))(x)))


def in_a_vjp_rule(value):
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g * jnp.full(3, value),))
    return jax.jit(rounded)


def in_a_jvp_rule(value):
    @jax.custom_jvp
    def rounded(x):
        return jnp.round(x)

    rounded.defjvp(lambda x, t: (jnp.round(x[0]), t[0] * jnp.full(3, value)))
    return rounded


def a_literal(value):
    return lambda x: x * value


@pytest.mark.parametrize(
    "make",
    [inside_jit, inside_a_loop, inside_remat, in_a_vjp_rule, in_a_jvp_rule, a_literal],
)
def test_constants_at_every_depth_are_part_of_it(make):
    one, same, two = (program_of(make(v), jnp.ones(3)) for v in (1.0, 1.0, 1.0 + 1e-7))
    assert one == same
    assert one != two
    np.testing.assert_array_equal(two(jnp.ones(3)), make(1.0 + 1e-7)(jnp.ones(3)))


def test_a_program_computes_what_the_function_computed():
    state = {"scale": 1.0}

    def loss(params, example, key):
        return state["scale"] * models.loss(params, example, key)

    program = program_of(loss)
    expected = loss(PARAMS, ONE, KEY)
    state["scale"] = 3.0
    assert program(PARAMS, ONE, KEY) == expected
    assert program_of(loss) != program
    assert program_of(loss)(PARAMS, ONE, KEY) == 3 * expected


def test_other_shapes_are_traced_anew_unless_the_function_has_changed():
    state = {"scale": 2.0}

    def total(x):
        return state["scale"] * x.sum()

    program = program_of(total, jnp.ones(3))
    assert program(jnp.ones(5)) == 10
    state["scale"] = 3.0
    assert program(jnp.ones(5)) == 10 and program(jnp.ones(3)) == 6
    with pytest.raises(ValueError, match="'total' computes something else .* has changed"):
        program(jnp.ones(4))


@pytest.mark.parametrize("method", [ja.tracin, ja.ekfac, ja.logra])
@pytest.mark.parametrize("shape", [(6,), ()])
def test_an_array_of_numpy_that_is_written_to_is_found(method, shape):
    scale = np.ones(shape)

    @jax.jit
    def scaled(x):  # a program within the program
        return x * scale

    def loss(params, example, key):
        return jnp.sum(jnp.tanh(scaled(example["x"]) @ params["w"]))

    params = {"w": jax.random.normal(jax.random.key(0), (6, 2), jnp.float64)}
    index = ja.build_index(method(loss), params, TRAIN)
    expected = ja.score(index, TRAIN)
    scale[...] = 10
    np.testing.assert_array_equal(ja.score(index, TRAIN), expected)
    with pytest.raises(ValueError, match="computes something else .* has changed"):
        ja.score(index, models.data(5, seed=9))


@pytest.mark.parametrize("method", [ja.tracin, ja.ekfac, ja.logra])
def test_an_index_of_a_mended_array_is_of_that(method):
    def made(scale):
        def loss(params, example, key):
            return jnp.sum(jnp.tanh((example["x"] * scale) @ params["w"]))

        return method(loss)

    params = {"w": jax.random.normal(jax.random.key(0), (6, 2), jnp.float64)}
    written = np.ones(6)
    expected = ja.score(ja.build_index(made(written), params, TRAIN), models.data(5, seed=9))
    written *= 10
    index = ja.build_index(made(np.ones(6)), params, TRAIN)
    np.testing.assert_array_equal(ja.score(index, models.data(5, seed=9)), expected)
    assert ja.score(index, models.data(3, seed=9)).shape == (3, 30)
    by_leaf = ja.build_index(made(np.ones(6)), params, TRAIN, groups=ja.by_leaf, microbatch=7)
    np.testing.assert_allclose(ja.score(by_leaf, models.data(5, seed=9)), expected, rtol=1e-9)


def test_the_same_method_with_changed_state():
    stats = {"scale": jnp.asarray(1.0)}

    def loss(params, example, key):
        return models.loss(params, jax.tree.map(lambda x: x, example), key) * stats["scale"]

    method = ja.tracin(loss)
    scores = []
    for value in (1.0, 3.0):
        stats["scale"] = jnp.asarray(value)
        index = ja.build_index(method, PARAMS, TRAIN)
        scores.append(np.asarray(ja.score(index, TRAIN)))
    np.testing.assert_allclose(scores[1], 9 * scores[0], rtol=1e-10)


def test_an_equal_method_made_anew_compiles_nothing():
    def build():
        loss = lambda params, example, key: 7 * models.loss(params, example, key)  # noqa: E731
        index = ja.build_index(ja.ekfac(loss, damping=ja.relative(0.3)), PARAMS, TRAIN)
        ja.top_k(index, TRAIN, k=3)

    build()
    with models.compilations() as count:
        build()
    assert count() == 0


DTYPES = [
    "bool", "int4", "uint4", "int8", "uint8", "int16", "int32", "int64", "float16", "bfloat16",
    "float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
    "float8_e4m3b11fnuz", "float4_e2m1fn",
]  # fmt: skip


@pytest.mark.parametrize("name", DTYPES)
def test_digests_of_every_dtype(name):
    dtype = getattr(ml_dtypes, name, None) or np.dtype(name)
    values = np.arange(12).reshape(3, 4) % 2
    changed = values.copy()
    changed[1, 2] = 1
    x, y = (jnp.asarray(each).astype(dtype) for each in (values, changed))
    assert identity.digest_of(x) == identity.digest_of(np.asarray(x))
    assert identity.digest_of(x) != identity.digest_of(y)
    assert identity.digest_of(x) != identity.digest_of(x.reshape(4, 3))


def test_digests_have_no_cheap_collisions():
    x = jax.random.normal(jax.random.key(1), (40, 50), jnp.float32)
    changed = [-x, 2 * x, x / 2, x.T.reshape(x.shape), x[::-1], x + 0.0, x.at[0, 0].add(1e-6)]
    for i in range(50):  # any two flipped signs
        changed.append(x.at[i % 7, i].multiply(-1).at[11 + i % 5, 49 - i].multiply(-1))
    digests = [identity.digest_of(y) for y in (x, *changed) if y is not changed[5]]
    assert len(set(digests)) == len(digests)
    assert identity.digest_of(x) == identity.digest_of(changed[5])


def test_digests_do_not_depend_on_sharding():
    x = jax.random.normal(jax.random.key(1), (16, 8), jnp.float32)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    spec = jax.sharding.PartitionSpec("b", "a")
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    assert identity.digest_of(spread) == identity.digest_of(x)
    keys = jax.random.split(jax.random.key(0), 4)
    assert identity.digest_of(keys) != identity.digest_of(keys[::-1])


def test_digests_of_rows_by_hand():
    """Each row by itself, each array by itself; batches of any size."""
    batch = {"x": jax.random.normal(KEY, (9, 4, 2)), "y": jnp.arange(9)}
    rows = np.asarray(identity.row_digests(batch))
    assert rows.shape == (9, 2 * identity.LANES) and rows.dtype == np.uint32 and rows.all()
    for i in range(9):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
        np.testing.assert_array_equal(identity.row_digests(one)[0], rows[i])
    moved = np.asarray(identity.row_digests(batch | {"y": batch["y"].at[3].set(99)}))
    assert np.argwhere(moved != rows)[:, 0].tolist() == [3, 3]
    sums = [
        sum(np.asarray(identity.sum_of_rows(rows[c], c, np.ones(len(c), bool)), np.uint64)
            for c in np.split(np.arange(9), cuts)) % 2**32
        for cuts in ([], [2, 5], [8])
    ]  # fmt: skip
    np.testing.assert_array_equal(sums[1:], [sums[0], sums[0]])
    swapped = identity.sum_of_rows(rows[::-1], np.arange(9), np.ones(9, bool))
    assert not np.array_equal(swapped, sums[0])


@dataclasses.dataclass(frozen=True)
class Custom:
    """A projection as a user writes it."""

    matrix: Contents
    name = "custom"
    basis = None

    def dim(self, size):
        return self.matrix.value.shape[1]

    def project(self, key, members):
        return jnp.concatenate(list(members.values()), axis=1) @ self.matrix.value


def test_projections_of_users_are_known_by_their_content():
    size = sum(x.size for x in jax.tree.leaves(PARAMS))
    matrices = [np.random.default_rng(i).normal(size=(size, 4)) for i in (0, 0, 1)]
    one, same, two = (
        ja.tracin(models.loss, projection=Custom(Contents(matrix))) for matrix in matrices
    )
    assert identity_of(one) == identity_of(same) != identity_of(two)
    index = ja.build_index(one, PARAMS, TRAIN, groups=lambda p: jax.tree.map(lambda _: "all", p))
    assert ja.score(index, TRAIN).shape == (30, 30)
    bad = dataclasses.replace(one, rule=dataclasses.replace(one.rule, projection=Custom(object())))
    with pytest.raises(TypeError, match="cannot be told from others by its content"):
        identity_of(bad)


def test_features_of_queries_belong_to_their_index():
    method = ja.tracin(models.loss, projection=ja.projections.rademacher(8))
    index = ja.build_index(method, PARAMS, TRAIN)
    features = ja.query_features(index, TRAIN)
    again = ja.build_index(method, PARAMS, models.data(20, seed=3))  # other data, the same features
    ja.score(again, features)
    others = [
        ja.build_index(method, PARAMS, TRAIN, key=jax.random.key(1)),
        ja.build_index(method, jax.tree.map(jnp.negative, PARAMS), TRAIN),
        ja.build_index(dataclasses.replace(method, rule=dataclasses.replace(
            method.rule, normalize=True)), PARAMS, TRAIN),
    ]  # fmt: skip
    for wrong in others:
        with pytest.raises(ValueError, match="features belong to another index"):
            ja.score(wrong, features)


def test_optimizer_states_of_optax_go_in():
    optimizer = optax.adam(1e-3)
    state = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)[1]
    assert identity_of(ja.trackstar(models.loss, state, PARAMS)) != identity_of(
        ja.trackstar(models.loss, moments(2.0), PARAMS)
    )
