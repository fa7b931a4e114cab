"""Output functions of diffusion models, and the methods made for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr import diffusion, evaluation, kernels
from jaxattr.features import projections
from jaxattr.index.index import NonFiniteWarning
from tests import diffusion_models as toy
from tests import models

EXACT = projections.identity()
TRAIN, QUERIES = toy.images(24), toy.images(5, seed=1)


def squared_norm(**options):
    return ja.expectation(diffusion.output(toy.DENOISER), timesteps=toy.TIMESTEPS, **options)


def index_of(method, train=TRAIN, params=None, **options):
    params = toy.params() if params is None else params
    return ja.build_index(method, params, train, batch_size=8, **options)


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("loss", lambda p, e, t: np.mean((p - e) ** 2)),
        ("squared_norm", lambda p, e, t: np.mean(p**2)),
        ("mean", lambda p, e, t: np.mean(p)),
        ("l1_norm", lambda p, e, t: np.abs(p).sum()),
        ("l2_norm", lambda p, e, t: np.sqrt((p**2).sum())),
        ("linf_norm", lambda p, e, t: np.abs(p).max()),
    ],
)
def test_outputs(name, by_hand):
    one, key, t = models.one(QUERIES), jax.random.key(7), 7
    noise = jax.random.normal(key, one["image"].shape, jnp.float64)
    left = toy.ALPHA_BAR[t]
    noisy = left**0.5 * one["image"] + (1 - left) ** 0.5 * noise
    predicted = np.asarray(toy.predict(toy.params(), noisy, t, one))
    got = diffusion.output(toy.DENOISER, name)(toy.params(), one, key, jnp.array(t))
    np.testing.assert_allclose(got, by_hand(predicted, np.asarray(noise), t), rtol=1e-12)


def test_the_weighted_loss_has_the_weights_of_the_bound():
    one, key = models.one(QUERIES), jax.random.key(7)
    alpha_bar = toy.ALPHA_BAR
    for t in (0, 9):
        alpha = alpha_bar[t] / (alpha_bar[t - 1] if t else 1.0)
        expected = (1 - alpha) / (2 * alpha * (1 - alpha_bar[t]))
        losses = [
            diffusion.output(toy.DENOISER, name)(toy.params(), one, key, jnp.array(t))
            for name in ("weighted_loss", "loss")
        ]
        assert losses[0] / losses[1] == pytest.approx(expected, rel=1e-12)


def test_the_error_profile_is_scaled_over_timesteps():
    residual = diffusion.error_profile(toy.DENOISER, timesteps=range(toy.STEPS), draws=2)
    one, key = models.one(QUERIES), jax.random.key(7)
    errors = []
    for t in range(toy.STEPS):
        keys = [jax.random.fold_in(jax.random.fold_in(key, t), draw) for draw in range(2)]
        losses = [toy.LOSS(toy.params(), one, k, jnp.array(t)) for k in keys]
        errors.append(np.sqrt(np.mean(losses)))
    expected = np.mean(np.array(errors) / np.linalg.norm(errors))
    assert residual(toy.params(), one, key) == pytest.approx(expected, rel=1e-12)


def test_d_trak_with_the_loss_is_trak():
    loss, damping = toy.expected_loss(), ja.relative(0.1)
    for dense in (False, True):
        trak = ja.trak(
            loss, residual=lambda params, example, key: 1.0 + 0 * params["layer0"]["bias"][0],
            damping=damping, dense=dense,
        )  # fmt: skip
        d_trak = ja.d_trak(loss, damping=damping, dense=dense)
        scores = [ja.score(index_of(method), QUERIES) for method in (trak, d_trak)]
        np.testing.assert_allclose(*scores, rtol=1e-10)


def test_d_trak_is_the_formula():
    checkpoints = [toy.params(0), toy.params(1)]
    method = ja.d_trak(squared_norm(), damping=ja.absolute(0.3), dense=True, projection=EXACT)
    index = ja.build_index(method, checkpoints, TRAIN)
    featurize, expected = index.featurizer, 0
    for number, params in enumerate(checkpoints):
        phi = featurize(params, TRAIN, jnp.arange(24), number)
        of_queries = featurize(params, QUERIES, -1 - jnp.arange(5), number)
        inverse = np.linalg.inv(phi.T @ phi + 0.3 * np.eye(phi.shape[1]))
        expected = expected + of_queries @ inverse @ phi.T / 2
    np.testing.assert_allclose(ja.score(index, QUERIES), expected, rtol=1e-8, atol=1e-12)


def test_das_is_the_exact_effect_of_leaving_one_out_of_a_ridge_regression():
    x = np.asarray(jax.random.normal(jax.random.key(0), (30, 6), jnp.float64))
    y = np.asarray(jax.random.normal(jax.random.key(1), (30,), jnp.float64))
    queries = np.asarray(jax.random.normal(jax.random.key(2), (4, 6), jnp.float64))
    ridge = 0.7

    def fit(x, y):
        return np.linalg.solve(x.T @ x + ridge * np.eye(6), x.T @ y)

    params = {"w": jnp.asarray(fit(x, y))}
    method = ja.das(
        lambda params, example, key: params["w"] @ example["x"],
        residual=lambda params, example, key: example["y"] - params["w"] @ example["x"],
        damping=ja.absolute(ridge), projection=EXACT, link="identity",
    )  # fmt: skip
    asked = {"x": queries, "y": np.zeros(4)}
    index = ja.build_index(method, params, {"x": x, "y": y})
    left_out = [fit(np.delete(x, n, 0), np.delete(y, n)) for n in range(30)]
    expected = queries @ np.stack([np.asarray(params["w"]) - other for other in left_out]).T
    np.testing.assert_allclose(ja.score(index, asked), expected, rtol=0, atol=1e-8)
    squared = ja.build_index(dataclasses.replace(method, link="square"), params, {"x": x, "y": y})
    np.testing.assert_allclose(ja.score(squared, asked), expected**2, rtol=0, atol=1e-8)


def das(**options):
    output = ja.expectation(
        diffusion.output(toy.DENOISER, "mean"), timesteps=toy.TIMESTEPS, unit_norm=True
    )
    residual = diffusion.error_profile(toy.DENOISER, timesteps=range(0, toy.STEPS, 4))
    return ja.das(output, residual=residual, **options)


def test_squared_scores_are_the_same_wherever_they_come_from(tmp_path):
    index, signed = index_of(das()), index_of(das(link="identity"))
    w = {name: 0.5 + i for i, name in enumerate(index.layout.names)}
    parts = ja.contributions(index, QUERIES)
    np.testing.assert_array_equal(parts, ja.contributions(signed, QUERIES))
    weighted = np.asarray(parts) @ np.array([w[name] for name in index.layout.names])
    scores = np.asarray(ja.score(index, QUERIES, weights=w))
    np.testing.assert_allclose(scores, weighted**2, rtol=1e-9)
    order = np.argsort(-scores, axis=1)[:, :4]
    on_disk = index_of(das(), path=tmp_path / "index")
    reopened = ja.open_index(tmp_path / "index")
    assert on_disk.link == reopened.link == "square"
    features = ja.query_features(index, QUERIES)
    for top in (
        ja.top_k(index, QUERIES, k=4, weights=w),
        ja.top_k(on_disk, QUERIES, k=4, weights=w),
        ja.top_k(reopened, features, k=4, weights=w),
        ja.attributor(index, k=4, weights=w)(QUERIES),
    ):
        np.testing.assert_array_equal(top.ids, order)
        np.testing.assert_allclose(top.scores, np.take_along_axis(scores, order, 1), rtol=1e-9)
    own = ja.self_influence(signed, weights=w) ** 2
    np.testing.assert_allclose(ja.self_influence(index, weights=w), own, rtol=1e-12)


def test_weights_of_squared_scores_are_learned_from_absolute_ones():
    index = index_of(das())
    fit = ja.learn_weights(index, QUERIES, top_k=5, steps=20, held_out=0.0)
    parts = np.asarray(ja.contributions(index, QUERIES))
    weights = np.ones(parts.shape[2]), list(fit.weights.values())
    for w, loss in zip(weights, fit.loss, strict=True):
        sizes = np.sort(np.abs(parts @ w), axis=1)
        expected = -np.mean(sizes[:, -5:].mean(axis=1) / np.linalg.norm(sizes, axis=1))
        assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore::jaxattr.weights.report.WeightWarning")
def test_lds_of_groups_and_weights_from_outcomes_of_squared_scores():
    index = index_of(das())
    masks = evaluation.random_subsets(jax.random.key(0), 24, 40)
    true = {name: float(i % 2) for i, name in enumerate(index.layout.names)}
    outputs = masks @ np.asarray(ja.score(index, QUERIES, weights=true)).T
    for name, found in evaluation.group_lds(index, QUERIES, masks, outputs).items():
        alone = dict.fromkeys(index.layout.names, 0.0) | {name: 1.0}
        expected = ja.lds(ja.score(index, QUERIES, weights=alone), masks, outputs)
        assert found.mean == pytest.approx(expected.mean)
    fit = ja.learn_weights(index, QUERIES, outcomes=ja.Outcomes(masks, outputs))
    reached = ja.lds(ja.score(index, QUERIES, weights=fit.weights), masks, outputs).mean
    assert reached > 0.95 > ja.lds(ja.score(index, QUERIES), masks, outputs).mean


def test_opponents_of_squares_are_refused():
    for call in (ja.top_k, lambda index, queries, **kw: ja.attributor(index, **kw)):
        with pytest.raises(ValueError, match='are squares, so there are no opponents.*link="id'):
            call(index_of(das()), QUERIES, opponents=True)


def test_leverage_is_of_one_matrix():
    with pytest.raises(ValueError, match="leverage=True needs dense=True"):
        kernels.Gram(ja.relative(1.0), leverage=True)


def journey_queries(steps=4):
    timesteps = np.linspace(toy.STEPS - 1, 0, steps).astype(np.int32)
    trajectory = jax.random.normal(jax.random.key(5), (5, steps, toy.PIXELS), jnp.float64)
    return QUERIES | {"trajectory": trajectory, "timesteps": np.tile(timesteps, (5, 1))}


def test_journey_trak_takes_queries_along_their_trajectory():
    queries = journey_queries()
    loss = toy.expected_loss()
    method = ja.journey_trak(loss, diffusion.journey(toy.DENOISER, steps=4), projection=EXACT)
    index, plain = index_of(method), index_of(ja.d_trak(loss, projection=EXACT))
    np.testing.assert_array_equal(index.features, plain.features)
    got = ja.query_features(index, queries).features
    gradient_of = jax.jit(jax.grad(toy.LOSS))
    for q in range(5):
        one = jax.tree.map(lambda x, q=q: x[q], queries)
        steps = []
        for s, t in enumerate(np.asarray(one["timesteps"])):
            still = one | {"image": jnp.clip(one["trajectory"][s], -1, 1)}
            key = toy.example_keys(jax.random.key(0), jnp.array([-1 - q]))[0]
            noise_key = jax.random.fold_in(jax.random.fold_in(key, s), 0)
            gradient = gradient_of(toy.params(), still, noise_key, jnp.array(t))
            steps.append(toy.flat(gradient))
        featurized = np.sort(np.asarray(got[q]))  # groups are laid out in another order
        np.testing.assert_allclose(featurized, np.sort(np.mean(steps, axis=0)), rtol=1e-10)


def test_a_query_without_its_trajectory():
    method = ja.journey_trak(toy.expected_loss(), diffusion.journey(toy.DENOISER, steps=4))
    index = index_of(method)
    with pytest.raises(ValueError, match="has no trajectory and no timesteps: .* a sampler that"):
        ja.query_features(index, QUERIES)
    with pytest.raises(ValueError, match="made for 4 steps; the query has a trajectory of 3"):
        ja.query_features(index, journey_queries(3))


def test_a_timestep_that_the_model_does_not_know_is_not_finite():
    method = ja.journey_trak(toy.expected_loss(), diffusion.journey(toy.DENOISER, steps=4))
    queries = journey_queries()
    queries["timesteps"][2, 1] = toy.STEPS
    with pytest.warns(NonFiniteWarning, match="1 of 5 queries .* ids 2"):
        ja.query_features(index_of(method), queries)


def test_an_unknown_link_is_refused():
    with pytest.raises(ValueError, match='link must be "identity" or "square", got \'squared\''):
        das(link="squared")


@pytest.mark.parametrize("make", [ja.d_trak, das], ids=["d_trak", "das"])
@pytest.mark.parametrize("n", [24, 200])  # dual, and primal
def test_a_damping_path_is_as_many_indexes(make, n):
    train, params = toy.images(n), [toy.params(0), toy.params(1)]
    options = {"groups": ja.by_leaf, "batch_size": 8}
    dampings = [ja.relative(0.01), ja.absolute(0.5), ja.relative(10.0)]

    def method(damping):
        if make is das:
            return das(damping=damping)
        return ja.d_trak(squared_norm(), damping=damping)

    path = evaluation.damping_path(method(None), params, train, dampings, **options)
    for damping, index in path:
        apart = ja.build_index(method(damping), params, train, **options)
        for got, expected in (
            (ja.score(index, QUERIES), ja.score(apart, QUERIES)),
            (ja.self_influence(index), ja.self_influence(apart)),
        ):
            size = np.abs(expected).max()
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-8 * size)
        assert index.method.kernel.name == apart.method.kernel.name


def test_bad_damping_paths():
    method = ja.d_trak(squared_norm())

    def path(method, dampings, **options):
        return evaluation.damping_path(method, toy.params(), TRAIN, dampings, **options)

    with pytest.raises(ValueError, match="cannot hold zero: .*got 0 x mean eigenvalue"):
        path(method, [ja.relative(0.1), ja.relative(0.0)])
    with pytest.raises(ValueError, match="TracIn has no damping path: its kernel .identity."):
        path(ja.tracin(toy.expected_loss()), [ja.relative(0.1)])
    with pytest.raises(ValueError, match="dampings is empty"):
        path(method, [])
    with pytest.raises(ValueError, match="no path, no mesh"):
        path(method, [ja.relative(0.1)], path="somewhere")
    with pytest.raises(ValueError, match="no store=False"):
        path(method, [ja.relative(0.1)], store=False)


def test_a_diverged_checkpoint_is_named():
    diverged = jax.tree.map(lambda x: x * jnp.inf, toy.params())
    with pytest.raises(ValueError, match="No training example .* at checkpoint 1: .*diverged"):
        index_of(ja.d_trak(squared_norm()), params=[toy.params(), diverged])


def test_examples_without_a_gradient_are_counted_by_checkpoint():
    bad = TRAIN | {"image": TRAIN["image"].at[jnp.array([3, 7])].set(jnp.nan)}
    checkpoints = [toy.params(0), toy.params(1)]
    with pytest.warns(NonFiniteWarning, match="2 at checkpoint 0, 2 at checkpoint 1.: ids 3, 7"):
        index = index_of(ja.d_trak(squared_norm()), bad, checkpoints)
    assert (np.asarray(ja.score(index, QUERIES))[:, [3, 7]] == 0).all()


@pytest.mark.parametrize(
    ("alpha_bar", "message"),
    [
        (np.linspace(1.5, 0, 9), "values from 0 to 1.5"),
        (np.ones((3, 3)), r"Got \[3, 3\]"),
        (np.linspace(1e-4, 0.02, 9), "never rising"),  # betas
    ],
)
def test_a_schedule_that_is_none(alpha_bar, message):
    with pytest.raises(ValueError, match=f"alpha_bar must be the share.*{message}"):
        diffusion.loss(toy.DENOISER._replace(alpha_bar=alpha_bar))


def test_unknown_outputs_and_wrong_predictions():
    with pytest.raises(ValueError, match="must be one of loss, .*got 'median'"):
        diffusion.output(toy.DENOISER, "median")
    short = diffusion.loss(toy.DENOISER._replace(predict=lambda p, x, t, e: x[:2]))
    with pytest.raises(ValueError, match=r"noise of the image's shape \[5\], got \[2\]"):
        short(toy.params(), models.one(TRAIN), jax.random.key(0), jnp.array(0))


@pytest.mark.parametrize("make", [lambda: ja.d_trak(squared_norm()), das], ids=["d_trak", "das"])
def test_citations(make):
    assert "@inproceedings{" in ja.citation(make()).split("\n\n")[0]
