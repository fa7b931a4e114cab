"""Queries of another function than the index's: what taught the model a concept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr import language, linear_maps
from jaxattr.features import projections
from tests import diffusion_models as toy
from tests import models

TRAIN, QUERIES = models.data(41), {"x": models.data(6, seed=1)["x"]}  # a concept has no label
CHECKPOINTS = [models.mlp_params(jax.random.key(i)) for i in range(2)]
DIRECTION = jnp.array([1.0, -2.0, 0.5, 3.0, -1.0, 0.2, 0.7])


def concept(params, example, key):
    """A direction times the activations of the first layer: the other two are not used."""
    del key
    first = params["layer0"]
    return DIRECTION @ jnp.tanh(example["x"] @ first["kernel"] + first["bias"])


def otherwise(params, example, key):
    """Each leaf of it is used, and not as the loss uses it, but for the kernel of the last."""
    first, second, last = (params[f"layer{i}"] for i in range(3))
    back = first["kernel"] @ jnp.tanh(second["kernel"] @ jnp.tanh(second["bias"]))
    size = jnp.sum(jnp.sin(first["kernel"])) + jnp.sum(last["bias"] ** 3)
    return jnp.tanh(example["x"]) @ back * size + jnp.sum(jnp.cos(second["bias"] @ last["kernel"]))


OUTPUTS = {"concept": concept, "otherwise": otherwise, "margin": lambda params, example, key: (
    models.margin(params, example | {"y": 1}, key))}  # fmt: skip
METHODS = {
    "tracin": ja.tracin(models.loss, projection=projections.identity()),
    "two_sided": ja.tracin(models.loss, projection=projections.two_sided(3)),
    "ekfac": ja.ekfac(models.loss),
    "trak": ja.trak(models.margin, projection=projections.two_sided(3)),
}


@functools.cache
def index(name):
    return ja.build_index(METHODS[name], CHECKPOINTS, TRAIN, batch_size=16)


def by_hand(built, output, queries):
    """Features of an output in NumPy: whole gradients, multiplied from both sides."""
    columns = []
    for number, params in enumerate(built.checkpoints):
        dense = jax.jit(jax.vmap(jax.grad(output), in_axes=(None, 0, None)))(params, queries, None)
        found = {}
        for group, gradient in dense.items():
            layer = gradient if isinstance(gradient, dict) else {"kernel": gradient}
            found[group] = {name: np.asarray(leaf) for name, leaf in layer.items()}
        columns += [_projected(built, number, group, found[group]) for group in built.layout.names]
    return np.concatenate(columns, axis=1)


def _projected(built, number, group, gradient):
    q = len(gradient["kernel"])
    maps = {f.map.leaf.split("/")[0]: f for f in built.featurizer.plan.factored}
    if group not in maps:
        flat = [gradient[name].reshape(q, -1) for name in sorted(gradient)]
        return np.concatenate(flat, axis=1)
    factored = maps[group]
    sides = built.fitted[number].sides or built.drawn[number].sides
    a, b = sides[factored.map.leaf]
    a = np.concatenate(a) if isinstance(a, linear_maps.WithBias) else a
    matrix = gradient["kernel"] if factored.map.in_axes == (0,) else gradient["kernel"].mT
    if factored.bias:
        matrix = np.concatenate([matrix, gradient["bias"][:, None]], axis=1)
    matrix = matrix if a is None else np.swapaxes(np.asarray(a), 0, 1) @ matrix
    return (matrix if b is None else matrix @ np.asarray(b)).reshape(q, -1)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", METHODS)
def test_features_are_those_of_whole_gradients(name, output):
    built, sign = index(name), 1 if name == "trak" else -1
    found = ja.query_features(built, QUERIES, output=OUTPUTS[output]).features
    expected = sign * by_hand(built, OUTPUTS[output], QUERIES)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13 * np.abs(expected).max())


def test_a_matrix_that_the_output_uses_the_other_way_round():
    rows = language.rows([[1, 5, 7, 2], [3, 4, 9], [8, 2, 6, 5]], 3, vocabulary=10)
    embed = jax.random.normal(jax.random.key(0), (10, 4))

    def logits(params, row):
        return jnp.cumsum(params["embed"][row["inputs"]], axis=0) @ params["embed"].T

    def unembedding(params, row, key):
        return jnp.sum(jnp.tanh(params["embed"] @ jnp.arange(4.0)) * row["inputs"].sum())

    for method in (ja.ekfac, functools.partial(ja.logra, rank=2)):
        built = ja.build_index(method(language.loss(logits)), {"embed": embed}, rows)
        one = models.one(rows)
        assert built.featurizer.plan.factored and not built.featurizer.plan.formed
        assert built.featurizer.of(unembedding, {"embed": embed}, one).plan.formed == {"embed"}
        found = ja.query_features(built, rows, output=unembedding).features
        expected = -by_hand(built, unembedding, rows)
        np.testing.assert_allclose(found, expected, atol=1e-12 * np.abs(expected).max())


def test_of_layers_that_the_output_does_not_use_nothing_is_computed():
    featurize = index("ekfac").featurizer.of(concept, CHECKPOINTS[0], models.one(QUERIES))
    assert featurize.plan.unused == {"layer1/kernel", "layer2/kernel"}
    assert not featurize.plan.formed
    other = index("ekfac").featurizer.of(otherwise, CHECKPOINTS[0], models.one(QUERIES))
    assert other.plan.formed == {"layer0/kernel", "layer1/kernel", "layer2/kernel"}


def test_a_step_of_training_raises_the_concept_as_the_score_says():
    built = ja.build_index(METHODS["tracin"], CHECKPOINTS[0], TRAIN)
    scores = np.asarray(ja.score(built, ja.query_features(built, QUERIES, output=concept)))
    assert (scores[0] > 0).any() and (scores[0] < 0).any()
    for n in (int(scores[0].argmax()), int(scores[0].argmin())):
        example = jax.tree.map(lambda x, n=n: x[n], TRAIN)
        gradient = models.gradient(CHECKPOINTS[0], example, None)
        moved = _moved(gradient, -1e-6)
        np.testing.assert_allclose(_slope(moved, 1e-6), scores[0, n], rtol=1e-4)


def test_a_newton_step_of_a_margin_raises_it_as_the_score_says():
    method = ja.trak(models.margin, projection=projections.identity(), dense=True,
                     damping=ja.absolute(0.5))  # fmt: skip
    built = ja.build_index(method, CHECKPOINTS[0], TRAIN)
    scores = np.asarray(ja.score(built, ja.query_features(built, QUERIES, output=concept)))
    of_margin = jax.jit(jax.vmap(jax.grad(models.margin), in_axes=(None, 0, None)))
    dense = of_margin(CHECKPOINTS[0], TRAIN, None)
    phi = np.stack([jax.flatten_util.ravel_pytree(jax.tree.map(lambda x, n=n: x[n], dense))[0]
                    for n in range(41)])  # fmt: skip
    steps = phi @ np.linalg.inv(phi.T @ phi + 0.5 * np.eye(phi.shape[1]))
    p = jax.vmap(lambda each: jax.nn.sigmoid(models.margin(CHECKPOINTS[0], each, None)))(TRAIN)
    _, unravel = jax.flatten_util.ravel_pytree(CHECKPOINTS[0])
    for n in (int(scores[0].argmax()), int(scores[0].argmin())):
        moved = _moved(unravel(steps[n] * float(1 - p[n])), 1e-6)
        np.testing.assert_allclose(_slope(moved, 1e-6), scores[0, n], rtol=1e-4)


def _moved(direction, step):
    return jax.tree.map(lambda p, d: p + step * d, CHECKPOINTS[0], direction)


def _slope(moved, step):
    query = models.one(QUERIES)
    return (concept(moved, query, None) - concept(CHECKPOINTS[0], query, None)) / step


def test_the_loss_itself_negated_is_the_index_own_query():
    negated = lambda params, example, key: -models.loss(params, example, key)  # noqa: E731
    for name in ("two_sided", "ekfac"):
        queries = models.data(6, seed=1)
        own = ja.query_features(index(name), queries)
        other = ja.query_features(index(name), queries, output=negated)
        np.testing.assert_allclose(own.features, other.features, rtol=1e-12, atol=1e-14)


def test_wherever_queries_go_these_go(tmp_path):
    built = index("ekfac")
    queries = ja.query_features(built, QUERIES, output=concept)
    scores = np.asarray(ja.score(built, queries))
    top = ja.top_k(built, queries, k=3)
    np.testing.assert_array_equal(top.ids, np.argsort(-scores, axis=1)[:, :3])
    page = ja.report(built, queries, path=tmp_path / "page.html").read_text()
    assert "proponent" in page.lower()
    refined = ja.astra(built, queries, damping=ja.absolute(5.0), tolerance=1e-8, iterations=300)
    assert refined.residuals.max() < 1e-8 and np.abs(refined.features).max() > 0


def test_on_a_mesh_and_on_disk(tmp_path):
    expected = ja.score(index("ekfac"), ja.query_features(index("ekfac"), QUERIES, output=concept))
    spread = ja.build_index(METHODS["ekfac"], CHECKPOINTS, TRAIN, batch_size=16,
                            mesh=jax.make_mesh((8,), ("data",)))  # fmt: skip
    path = tmp_path / "index"
    ja.build_index(METHODS["ekfac"], CHECKPOINTS, TRAIN, batch_size=16, path=path)
    opened = ja.open_index(path, METHODS["ekfac"], CHECKPOINTS)
    for built in (spread, opened):
        found = ja.score(built, ja.query_features(built, QUERIES, output=concept))
        assert models.relative_error(found, expected) < 1e-9


@pytest.mark.parametrize("name", ["two_sided", "trak"])
def test_a_contrast_of_concepts(name):
    built, other = index(name), {"x": models.data(6, seed=2)["x"]}
    found = ja.score(built, ja.contrast(built, QUERIES, other, output=concept))
    each = [ja.score(built, ja.query_features(built, q, output=concept)) for q in (QUERIES, other)]
    assert models.relative_error(found, each[0] - each[1]) < 1e-12


def test_unit_norm_is_that_of_the_concept():
    built = ja.build_index(ja.grad_cos(models.loss, projection=projections.identity()),
                           CHECKPOINTS, TRAIN)  # fmt: skip
    phi = -by_hand(built, concept, QUERIES).reshape(6, 2, -1)
    phi /= np.linalg.norm(phi, axis=-1, keepdims=True)
    found = ja.query_features(built, QUERIES, output=concept).features
    np.testing.assert_allclose(found, phi.reshape(6, -1), atol=1e-13)


def test_an_output_that_is_noisy_is_the_mean_over_its_draws():
    images = toy.images(9)
    built = ja.build_index(ja.tracin(toy.expected_loss()), toy.params(), images)
    negated = ja.expectation(lambda *given: -toy.expected_loss().loss(*given),
                             timesteps=toy.expected_loss().timesteps)  # fmt: skip
    found = ja.query_features(built, images, output=negated).features
    own = ja.query_features(built, images).features
    np.testing.assert_allclose(found, own, rtol=1e-10, atol=1e-12)


def test_journeys_and_the_like_may_use_their_leaves_otherwise_too():
    method = dataclasses.replace(METHODS["two_sided"], query_output=otherwise)
    built = ja.build_index(method, CHECKPOINTS, TRAIN, batch_size=16)
    found = ja.query_features(built, QUERIES).features
    expected = by_hand(built, otherwise, QUERIES)
    np.testing.assert_allclose(found, expected, atol=1e-12 * np.abs(expected).max())


def test_what_is_no_output():
    built = index("two_sided")
    with pytest.raises(ValueError, match=r"one float scalar; it returned float64\[7\]"):
        ja.query_features(built, QUERIES, output=lambda params, example, key: (
            example["x"] @ params["layer0"]["kernel"]))  # fmt: skip
    with pytest.raises(ValueError, match="does not depend on its parameters"):
        ja.query_features(built, QUERIES, output=lambda params, example, key: example["x"].sum())
    with pytest.raises(TypeError, match="must be a function .* got str"):
        ja.query_features(built, QUERIES, output="layer0")
    with pytest.raises(TypeError, match=r"takes \(params, example\), and is called as"):
        ja.query_features(
            built, QUERIES, output=lambda params, example: concept(params, example, 0)
        )
    with pytest.raises(ValueError, match="are QueryFeatures already: pass the queries themselves"):
        ja.query_features(built, ja.query_features(built, TRAIN), output=concept)
    with pytest.raises(ValueError, match="fails on one example: KeyError"):
        ja.query_features(built, {"z": QUERIES["x"]}, output=concept)


def test_a_gradient_that_is_zero_is_said():
    def still(params, example, key):
        return concept(jax.lax.stop_gradient(params), example, key)

    with pytest.warns(UserWarning, match="gradient of 'still' is zero for all queries"):
        ja.query_features(index("two_sided"), QUERIES, output=still)
