import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr.features import projections
from tests import models

CHECKPOINTS = [models.mlp_params(jax.random.key(i)) for i in range(2)]
TRAIN, QUERIES = models.data(41), models.data(6, seed=1)
METHODS = {
    "tracin": ja.tracin(models.loss, projection=projections.rademacher(12)),
    "grad_cos": ja.grad_cos(models.loss),
    "trak": ja.trak(models.margin),
    "dense trak": ja.trak(models.margin, dense=True),
}
BY_METHOD = pytest.mark.parametrize("name", METHODS)
WEIGHTS = {"layer0": 0.2, "layer1": 2.5, "layer2": 0.0}


@functools.cache
def index(name):
    return ja.build_index(METHODS[name], CHECKPOINTS, TRAIN, batch_size=16)


@BY_METHOD
def test_contributions_sum_to_scores(name):
    parts = ja.contributions(index(name), QUERIES)
    assert parts.shape == (6, 41, 3)
    assert models.relative_error(parts.sum(axis=-1), ja.score(index(name), QUERIES)) <= 1e-12
    w = jnp.array([WEIGHTS[group] for group in index(name).layout.names])
    weighted = ja.score(index(name), QUERIES, weights=WEIGHTS)
    assert models.relative_error(parts @ w, weighted) <= 1e-12


@BY_METHOD
def test_uniform_weights_are_the_base_method_bit_for_bit(name):
    uniform = dict.fromkeys(index(name).layout.names, 1.0)
    np.testing.assert_array_equal(
        ja.score(index(name), QUERIES), ja.score(index(name), QUERIES, weights=uniform)
    )
    # The base method without any notion of weights: one product of features.
    phi = ja.query_features(index(name), QUERIES).features
    residual = index(name).residual
    base = jnp.matmul(phi, index(name).features.T, precision="highest")
    np.testing.assert_array_equal(
        jax.jit(lambda: base * residual[None])(), ja.score(index(name), QUERIES)
    )


def test_weights_multiply_raw_query_features_not_preconditioned_ones():
    method, w = METHODS["dense trak"], np.array([WEIGHTS[f"layer{i}"] for i in range(3)])
    built = ja.build_index(method, CHECKPOINTS[0], TRAIN)
    featurize = ja.featurizer(method, CHECKPOINTS[0], models.one(TRAIN))
    phi, query = (np.asarray(featurize(CHECKPOINTS[0], data)) for data in (TRAIN, QUERIES))
    gram = phi.T @ phi
    kernel = np.linalg.inv(gram + 0.1 * np.trace(gram) / len(gram) * np.eye(len(gram)))
    expected = (query * np.repeat(w, featurize.layout.dims)) @ kernel @ phi.T
    got = ja.score(built, QUERIES, weights=WEIGHTS) / built.residual[None]
    assert models.relative_error(got, expected) <= 1e-8


@BY_METHOD
@pytest.mark.parametrize("block_size", [7, 1000])
@pytest.mark.parametrize("opponents", [False, True])
def test_top_k_is_the_top_of_the_scores(name, block_size, opponents):
    with models.slabs_of(block_size):
        top = ja.top_k(index(name), QUERIES, k=9, weights=WEIGHTS, opponents=opponents)
    scores = np.asarray(ja.score(index(name), QUERIES, weights=WEIGHTS))
    order = np.argsort(scores if opponents else -scores, axis=1, kind="stable")[:, :9]
    np.testing.assert_array_equal(top.ids, order)
    np.testing.assert_allclose(top.scores, np.take_along_axis(scores, order, axis=1), rtol=1e-9)


def test_queries_without_a_gradient_are_named_and_ranked_by_id():
    def loss(params, example, key):
        return (params["w"] * example["x"] - 1) ** 2

    train = {"x": np.arange(6, dtype=np.float32)}
    index = ja.build_index(ja.tracin(loss), {"w": jnp.ones(())}, train)
    queries = {"x": np.array([1, 2, 1], np.float32)}
    with pytest.warns(UserWarning, match="positions 0, 2 have a gradient of zero"):
        top = ja.top_k(index, queries, k=3)
    np.testing.assert_array_equal(top.ids[jnp.array([0, 2])], [[0, 1, 2]] * 2)


def test_ties_go_to_the_lower_id():
    same = jax.tree.map(lambda x: jnp.repeat(x[:1], 20, axis=0), TRAIN)
    built = ja.build_index(METHODS["tracin"], CHECKPOINTS, same)
    with models.slabs_of(6):
        top = ja.top_k(built, QUERIES, k=3)
    np.testing.assert_array_equal(top.ids, np.broadcast_to(np.arange(3), (6, 3)))


@BY_METHOD
def test_self_influence_is_the_diagonal(name):
    # Queries that are the training set differ in their ids alone, and the outputs ignore the key.
    diagonal = jnp.diagonal(ja.score(index(name), TRAIN, weights=WEIGHTS))
    got = ja.self_influence(index(name), weights=WEIGHTS)
    assert models.relative_error(got, diagonal) <= 1e-9


@BY_METHOD
def test_attributor_is_one_compiled_top_k(name):
    with models.slabs_of(10):
        attribute = ja.attributor(index(name), weights=WEIGHTS, k=4)
        got = attribute(QUERIES)
    expected = ja.top_k(index(name), QUERIES, k=4, weights=WEIGHTS)
    np.testing.assert_array_equal(got.ids, expected.ids)
    np.testing.assert_allclose(got.scores, expected.scores, rtol=1e-9)
    nested = jax.jit(lambda batch: attribute(batch).ids)(QUERIES)
    np.testing.assert_array_equal(nested, expected.ids)


def test_attributor_takes_a_list_of_examples():
    attribute = ja.attributor(index("tracin"), k=3)
    listed = [jax.tree.map(lambda x, i=i: x[i], QUERIES) for i in range(2)]
    expected = attribute(jax.tree.map(lambda x: x[:2], QUERIES))
    jax.tree.map(np.testing.assert_array_equal, attribute(listed), expected)


def test_attributor_traces_once_per_shape():
    chex.clear_trace_counter()
    built = index("tracin")
    attribute = ja.attributor(built, k=2)
    counted = jax.jit(chex.assert_max_traces(attribute, n=1))
    for seed in range(3):
        counted(models.data(6, seed))


def test_attributor_in_a_jit_that_comes_first_leaves_the_index_whole():
    built = ja.build_index(ja.logra(models.loss, rank=2), CHECKPOINTS, TRAIN)
    attribute = ja.attributor(built, k=3)
    got = jax.jit(attribute)(QUERIES)  # the first that asks for what was drawn
    np.testing.assert_array_equal(got.ids, ja.top_k(built, QUERIES, k=3).ids)
    np.testing.assert_array_equal(got.ids, attribute(QUERIES).ids)


def test_scores_can_be_traced_by_their_weights():
    names = index("tracin").layout.names
    phi = ja.query_features(index("tracin"), QUERIES)
    weigh = lambda w: dict(zip(names, w, strict=True))  # noqa: E731
    total = lambda w: ja.score(index("tracin"), phi, weights=weigh(w)).sum()  # noqa: E731
    expected = np.asarray(ja.contributions(index("tracin"), phi)).sum(axis=(0, 1))
    np.testing.assert_allclose(jax.grad(total)(jnp.ones(3)), expected, rtol=1e-9)
    top = jax.jit(lambda w: ja.top_k(index("tracin"), phi, k=4, weights=weigh(w)))(jnp.ones(3))
    np.testing.assert_array_equal(top.ids, ja.top_k(index("tracin"), phi, k=4).ids)


def test_positive_scores_are_proponents():
    # One step of training on n lowers the query's loss by about the step times the TracIn score.
    built = ja.build_index(
        ja.tracin(models.loss, projection=projections.identity()), CHECKPOINTS[0], TRAIN
    )
    scores = np.asarray(ja.score(built, QUERIES))
    query, step = models.one(QUERIES), 1e-5
    for n in (int(scores[0].argmax()), int(scores[0].argmin())):
        example = jax.tree.map(lambda x, n=n: x[n], TRAIN)
        gradient = models.gradient(CHECKPOINTS[0], example, None)
        moved = jax.tree.map(lambda p, g: p - step * g, CHECKPOINTS[0], gradient)
        drop = models.loss(CHECKPOINTS[0], query, None) - models.loss(moved, query, None)
        np.testing.assert_allclose(drop / step, scores[0, n], rtol=1e-3)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"layer0": 1.0, "layer1": 1.0}, r"Missing: \['layer2'\]; unknown: \[\]"),
        (WEIGHTS | {"layer9": 1.0}, r"Missing: \[\]; unknown: \['layer9'\]"),
        (WEIGHTS | {"layer1": -0.5}, r"at least 0, got {'layer1': -0.5}"),
        (WEIGHTS | {"layer1": float("nan")}, "finite and at least 0, got {'layer1': nan}"),
        (WEIGHTS | {"layer1": 1 + 2j}, "must be real numbers, got complex128"),
        (dict.fromkeys(WEIGHTS, jnp.ones(2)), r"must be one number, and that of .* shape \[2\]"),
    ],
)
def test_bad_weights(weights, message):
    for use in (ja.score, ja.top_k):
        with pytest.raises(ValueError, match=message):
            use(index("tracin"), QUERIES, weights=weights)
    with pytest.raises(ValueError, match=message):
        ja.self_influence(index("tracin"), weights=weights)


@pytest.mark.parametrize("k", [0, 42])
def test_bad_k(k):
    with pytest.raises(ValueError, match=f"between 1 and the 41 training examples, got {k}"):
        ja.top_k(index("tracin"), QUERIES, k=k)
    with pytest.raises(ValueError, match=f"got {k}"):
        ja.attributor(index("tracin"), k=k)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -0.5])
@pytest.mark.parametrize("method", [ja.tracin, ja.grad_cos])
def test_bad_checkpoint_weights(method, wrong):
    with pytest.raises(ValueError, match=f"finite and at least 0, one per .*got {{1: {wrong}}}"):
        method(models.loss, checkpoint_weights=[0.5, wrong])
    assert method(models.loss, checkpoint_weights=[0.5, 0]).checkpoint_weights == (0.5, 0.0)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        ("contributions", "made anew"),
        ("score", "made anew"),
        ("top_k", "memory"),
        ("score", "mesh"),
    ],
)
def test_an_index_may_be_asked_in_a_jit_first(function, kind):
    """And is as usable after it: what it keeps of the first question are arrays."""
    options = {
        "memory": dict,
        "made anew": lambda: {"store": False},
        "mesh": lambda: {"mesh": jax.make_mesh((4,), ("data",))},
    }[kind]()
    built = ja.build_index(METHODS["tracin"], CHECKPOINTS, TRAIN, batch_size=16, **options)
    phi = ja.query_features(built, QUERIES)

    def asked(features):
        given = phi._replace(features=features)
        if function == "top_k":
            return ja.top_k(built, given, k=3).scores
        return getattr(ja, function)(built, given)

    found = jax.jit(asked)(phi.features)
    np.testing.assert_allclose(found, asked(phi.features), rtol=1e-9)
    np.testing.assert_allclose(ja.score(built, phi), ja.score(index("tracin"), QUERIES), rtol=1e-9)


def test_an_index_built_anew_takes_features_and_weights_of_before_in_a_jit():
    before = index("tracin")
    phi, fit = ja.query_features(before, QUERIES), ja.learn_weights(before, QUERIES)
    expected = ja.score(before, phi, weights=fit)
    anew = ja.build_index(METHODS["tracin"], CHECKPOINTS, TRAIN, batch_size=16)
    found = jax.jit(lambda f: ja.score(anew, phi._replace(features=f), weights=fit))(phi.features)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_parameters_of_numpy_may_be_written_to_once_the_index_is_built():
    given = [jax.tree.map(np.array, params) for params in CHECKPOINTS]
    built = ja.build_index(METHODS["tracin"], given, TRAIN, batch_size=16)
    jax.tree.leaves(given)[0][...] = 7.0
    np.testing.assert_allclose(ja.score(built, QUERIES), ja.score(index("tracin"), QUERIES))


def test_parameters_that_a_step_of_training_took_are_said_to_be():
    params = jax.tree.map(jnp.copy, CHECKPOINTS[0])
    built = ja.build_index(METHODS["tracin"], params, TRAIN, batch_size=16)
    jax.block_until_ready(jax.jit(lambda p: jax.tree.map(jnp.sin, p), donate_argnums=0)(params))
    with pytest.raises(ValueError, match=r"\(donate_argnums\).*a copy"):
        ja.score(built, QUERIES)


@pytest.mark.parametrize("function", [ja.score, functools.partial(ja.top_k, k=2)])
def test_features_of_no_query_are_refused(function):
    phi = ja.query_features(index("tracin"), QUERIES)
    with pytest.raises(ValueError, match="of no query"):
        function(index("tracin"), phi._replace(features=phi.features[:0]))


def test_scores_on_a_mesh_have_gradients_by_their_weights():
    built = ja.build_index(
        METHODS["tracin"], CHECKPOINTS, TRAIN, mesh=jax.make_mesh((4,), ("data",))
    )
    phi = ja.query_features(built, QUERIES)

    def total(w, index):
        return ja.score(index, phi if index is built else QUERIES, weights=WEIGHTS | {"layer0": w})[
            0
        ].sum()

    found, expected = (jax.grad(total)(0.2, each) for each in (built, index("tracin")))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
