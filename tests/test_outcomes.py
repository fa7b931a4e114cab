"""Weights fitted to retrained models: the objective, the fit, the gain, and what goes wrong."""

import functools
import io
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxattr as ja
from jaxattr import evaluation
from jaxattr.scores.subsets import Asked, subset_sums
from jaxattr.weights import outcome_fits
from jaxattr.weights.agreement import (
    Evidence,
    LinearSums,
    SquaredSums,
    Strengths,
    agreement,
    outcome_loss,
)
from jaxattr.weights.evidence import gather
from jaxattr.weights.outcomes import agreed, digests_of_queries, variance_of_sums
from jaxattr.weights.report import WeightWarning
from tests import models

N, Q, R = 60, 6, 16
TRAIN, QUERIES = models.data(N), models.data(Q, seed=1)
CHECKPOINTS = [models.mlp_params(jax.random.key(i)) for i in range(2)]
METHOD = ja.tracin(models.loss, projection=ja.projections.identity())
MASKS = evaluation.random_subsets(jax.random.key(0), N, R, fraction=0.25)
QUIET = pytest.mark.filterwarnings("ignore::jaxattr.weights.report.WeightWarning")
COPIES = (ja.noised(TRAIN, np.arange(8), jax.random.key(7)), np.arange(8))


@functools.cache
def index():
    return ja.build_index(METHOD, CHECKPOINTS, TRAIN, groups=ja.by_leaf, batch_size=16)


@functools.cache
def outcomes():
    """Outputs that follow the scores of some weights, and noise."""
    true = np.exp(np.random.default_rng(0).normal(size=6))
    scores = np.asarray(ja.contributions(index(), QUERIES)) @ true
    predicted = MASKS @ scores.T
    noise = np.random.default_rng(1).normal(size=predicted.shape) * predicted.std(axis=0)
    return ja.Outcomes(MASKS, predicted + 0.2 * noise)


@functools.cache
def fitted(copies=False):
    copies = COPIES if copies else None
    return ja.learn_weights(index(), QUERIES, outcomes=outcomes(), copies=copies)


def evidence_of(contributions, found, copies=None):
    """Evidence of contributions [q, n, m], in a few lines."""
    centred = contributions - contributions.mean(axis=1, keepdims=True)
    sums = np.einsum("sn,qnm->sqm", found.masks.astype(float), centred)
    gram = np.einsum("qnm,qnk->qmk", centred, centred)
    gram = gram * variance_of_sums(found.masks, contributions.shape[1])
    ranks = agreed(found, np.arange(len(contributions))).ranks
    return Evidence(LinearSums(sums - sums.mean(axis=0), gram), ranks, copies)


def test_sums_over_subsets_are_those_of_contributions():
    parts = np.asarray(ja.contributions(index(), QUERIES))
    phi = ja.query_features(index(), QUERIES).features
    own = np.array([3, -1, 0, 59, 17, -1])
    found = subset_sums(index(), Asked(phi, MASKS, own, products=True))[0]
    centred = parts - parts.mean(axis=1, keepdims=True)
    expected = np.einsum("sn,qnm->sqm", MASKS.astype(float), centred)
    np.testing.assert_allclose(found.sums, expected, atol=1e-12)
    np.testing.assert_allclose(found.gram, np.einsum("qnm,qnk->qmk", centred, centred), atol=1e-12)
    np.testing.assert_allclose(found.mean, parts.mean(axis=1), atol=1e-13)
    np.testing.assert_allclose(found.squares, (parts**2).sum(axis=1), rtol=1e-10)
    np.testing.assert_allclose(found.largest, np.abs(parts).max(axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.own[0], centred[0, 3], atol=1e-13)
    products = np.einsum("sn,qnm,qnk->sqmk", MASKS.astype(float), parts, parts)
    np.testing.assert_allclose(found.products, products, atol=1e-12)
    sums = evaluation.subset_contributions(index(), QUERIES, MASKS)
    np.testing.assert_allclose(sums, np.einsum("sn,qnm->qsm", MASKS, parts), atol=1e-12)


def test_sums_keep_their_digits_beside_a_large_mean():
    """In single precision, where squares of the mean would leave nothing of the deviation."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)).astype(np.float32) + np.float32(3000)

    def output(params, example, key):
        return params["a"] @ example["x"][:2] + params["b"] * example["x"][2]

    params = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones((), jnp.float32)}
    made = ja.build_index(ja.tracin(output), params, {"x": x}, batch_size=32)
    queries = {"x": np.ones((2, 3), np.float32)}
    phi = ja.query_features(made, queries).features
    found = subset_sums(made, Asked(phi, np.eye(200, dtype=bool)[:4]))[0]
    parts = np.stack([x[:, :2].astype(np.float64).sum(axis=1), x[:, 2].astype(np.float64)], axis=1)
    centred = parts - parts.mean(axis=0)
    np.testing.assert_allclose(found.gram[0], centred.T @ centred, rtol=2e-3)
    np.testing.assert_allclose(found.sums[:, 0], centred[:4], atol=3e-3)


def test_sums_keep_their_digits_beside_an_outlier():
    """Which the mean is made of, so that sums about it would hold nothing else."""
    x = np.random.default_rng(0).normal(size=(300, 1)).astype(np.float32)
    x[7] = 1e8
    params = {"w": jnp.ones(1, jnp.float32)}
    made = ja.build_index(ja.tracin(lambda p, e, key: p["w"] @ e), params, x)
    masks = np.random.default_rng(1).random((20, 300)) < 0.5
    masks[:, 7] = False
    sums = evaluation.subset_contributions(made, np.ones((1, 1), np.float32), masks)
    expected = masks @ x.astype(np.float64)
    np.testing.assert_allclose(sums[0], expected, atol=1e-4 * expected.std())


@QUIET
def test_subsets_of_different_sizes_predict_what_their_sums_do():
    x = np.abs(np.random.default_rng(0).normal(size=(60, 3)))
    queries = np.abs(np.random.default_rng(1).normal(size=(12, 3)))
    params = {"a": jnp.ones(2), "b": jnp.ones(1)}
    output = lambda p, e, key: p["a"] @ e[:2] + p["b"] @ e[2:]  # noqa: E731
    made = ja.build_index(ja.tracin(output), params, x, groups=ja.by_leaf())
    masks = np.random.default_rng(2).random((2000, 60)) < 0.4
    outputs = masks @ np.asarray(ja.score(made, queries)).T
    evidence = gather(made, queries, ja.Outcomes(masks, outputs), None)[0]
    predicted = np.asarray(evidence.sums.predictions(jnp.ones(2)))
    centred = outputs - outputs.mean(axis=0)
    np.testing.assert_allclose(predicted, centred / outputs.std(axis=0), atol=0.15)
    assert ja.learn_weights(made, queries, outcomes=ja.Outcomes(masks, outputs)).gain.uniform > 0.95


def test_agreement_is_the_correlation_of_predictions_with_ranks():
    parts = np.asarray(ja.contributions(index(), QUERIES))
    evidence = evidence_of(parts, outcomes())
    w = np.exp(np.random.default_rng(3).normal(size=6))
    centred = parts - parts.mean(axis=1, keepdims=True)
    scores = centred @ w  # [q, n]
    k = MASKS.sum(axis=1)[0]
    varying = int((MASKS.any(axis=0) & ~MASKS.all(axis=0)).sum())
    deviation = np.sqrt(k * (varying - k) / (varying - 1) * (scores**2).mean(axis=1))
    predicted = MASKS @ scores.T
    f = (predicted - predicted.mean(axis=0)) / deviation
    expected = (evidence.ranks * f).mean(axis=1)
    np.testing.assert_allclose(agreement(w, evidence.sums, evidence.ranks), expected, rtol=1e-10)
    np.testing.assert_allclose(agreement(3 * w, evidence.sums, evidence.ranks), expected)
    # With all subsets there are, the variance is exact, and the mean is a correlation.
    n = 8
    few = np.random.default_rng(4).normal(size=(2, n, 3))
    every = np.array([[i >> j & 1 for j in range(n)] for i in range(2**n)], bool)
    every = every[every.sum(axis=1) == 3]
    actual = np.random.default_rng(5).normal(size=(len(every), 2))
    evidence = evidence_of(few, ja.Outcomes(every, actual))
    got = agreement(np.ones(3), evidence.sums, evidence.ranks).mean()
    predicted = every @ few.sum(axis=2).T
    each = [np.corrcoef(predicted[:, i], evidence.ranks[:, i])[0, 1] for i in range(2)]
    assert got == pytest.approx(np.mean(each), rel=1e-9)


def loss_oracle(theta, evidence, models_, caution, copies, pull):
    w = np.exp(theta)
    shares = [np.mean(evidence.ranks * np.asarray(evidence.sums.predictions(v)), axis=1)[models_]
              for v in (w, np.ones_like(w))]  # fmt: skip
    d, count = shares[0] - shares[1], models_.sum()
    base, error = shares[1].mean(), shares[1].std(ddof=1) / np.sqrt(count)
    unit = max(base, 2 * error)
    noise = np.sqrt((d.var(ddof=1) + (1e-4 * unit) ** 2) / count)
    found = (d.mean() - caution * noise) / unit
    c = [np.mean(np.asarray(evidence.copies.predictions(v))) for v in (w, np.ones_like(w))]
    return pull * theta.var() - found - copies * (c[0] / c[1] - 1)


def test_the_loss_and_its_gradient_against_an_oracle():
    rng = np.random.default_rng(0)
    parts, noised = rng.normal(size=(5, 40, 4)), np.abs(rng.normal(size=(1, 9, 4)))
    gram = np.einsum("sqm,sqk->qmk", noised, noised) + np.eye(4)
    found = ja.Outcomes(rng.random((12, 40)) < 0.3, rng.normal(size=(12, 5)))
    evidence = evidence_of(parts, found, LinearSums(noised, gram))
    chosen = np.arange(12) % 4 != 1
    theta = rng.normal(size=4)

    @functools.partial(jax.jit, static_argnames=("caution", "copies", "pull"))
    def loss(theta, caution=1.0, copies=0.5, pull=0.02):
        strengths = Strengths(jnp.asarray(chosen, float), caution, copies, pull)
        return outcome_loss(jnp.exp(theta), evidence, strengths)

    expected = loss_oracle(theta, evidence, chosen, 1.0, 0.5, 0.02)
    assert loss(theta) == pytest.approx(expected, rel=1e-10)
    step = 1e-6
    numeric = [
        (loss_oracle(theta + step * e, evidence, chosen, 1.0, 0.5, 0.02)
         - loss_oracle(theta - step * e, evidence, chosen, 1.0, 0.5, 0.02)) / (2 * step)
        for e in np.eye(4)
    ]  # fmt: skip
    np.testing.assert_allclose(jax.grad(loss)(theta), numeric, rtol=1e-6, atol=1e-8)
    # A pytree of scalars is what weights are; their scale is not seen.
    tree = dict(zip("abcd", np.exp(theta), strict=True))
    strengths = Strengths(jnp.asarray(chosen, float), 1.0, 0.5, 0.02)
    assert outcome_loss(tree, evidence, strengths) == pytest.approx(expected)
    assert loss(theta + 3.0) == pytest.approx(expected)
    # At uniform weights it is zero, and has a gradient.
    assert loss(np.zeros(4)) == pytest.approx(0, abs=1e-4)
    assert np.isfinite(jax.grad(loss)(np.zeros(4))).all()
    # The limits: each part alone.
    for caution, copies, pull in ((0, 0, 0), (1e3, 0, 0), (0, 1e3, 0), (0, 0, 1e3)):
        expected = loss_oracle(theta, evidence, chosen, caution, copies, pull)
        assert loss(theta, caution, copies, pull) == pytest.approx(expected, rel=1e-9)


def planted(noise, n=400, m=6, q=16, r=64, seed=0):
    """Groups that read a sparse truth, each with more noise; and outcomes of the truth."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(q, n)) * (rng.random((q, n)) < 0.05)
    levels = noise * np.geomspace(0.1, 3, m)
    parts = truth[..., None] + rng.normal(size=(q, n, m)) * levels
    masks = evaluation.random_subsets(jax.random.key(seed), n, r, fraction=0.25)
    outputs = masks @ truth.T
    outputs = outputs + rng.normal(size=outputs.shape) * outputs.std()
    return parts, levels, ja.Outcomes(masks, outputs), truth


def test_planted_influence_is_found():
    parts, levels, found, truth = planted(1.0)
    fit = outcome_fits.cross_fitted(evidence_of(parts, found))
    assert fit.gain.low > 0 and fit.to_uniform < 0.01
    rank = np.corrcoef(np.argsort(np.argsort(fit.theta)), np.arange(6)[::-1])[0, 1]
    assert rank > 0.9
    # On other subsets and queries: nearly what inverse variances reach, which are the best.
    others, _, new, _ = planted(1.0, r=400, seed=1)
    predicted = np.einsum("sn,qnm->qsm", new.masks, others)
    reach = {
        name: evaluation.lds_of_predictions(predicted @ w, new.outputs).mean
        for name, w in {
            "uniform": np.ones(6), "learned": np.exp(fit.theta), "best": 1 / levels**2
        }.items()
    }  # fmt: skip
    assert reach["learned"] - reach["uniform"] > 0.95 * (reach["best"] - reach["uniform"])


def test_the_interval_of_the_gain_holds_what_is_gained_elsewhere():
    """On other queries and models, of which there are so many that little of it is chance."""
    held = 0
    for seed in range(20):
        parts, _, found, _ = planted(1.0, seed=seed)
        fit = outcome_fits.cross_fitted(evidence_of(parts, found))
        others, _, new, _ = planted(1.0, r=400, q=64, seed=100 + seed)
        predicted = np.einsum("sn,qnm->qsm", new.masks, others)
        reach = [
            evaluation.lds_of_predictions(predicted @ w, new.outputs, resamples=1).mean
            for w in (np.ones(6), np.exp(fit.theta))
        ]
        held += fit.gain.low <= reach[1] - reach[0] <= fit.gain.high
    assert held >= 17


def test_where_nothing_is_to_be_gained_weights_stay_near_uniform():
    """Groups that read the truth equally well: the interval holds zero, in nearly all of ten."""
    moved, held, lost = [], 0, []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        parts, _, found, truth = planted(1.0, seed=seed)
        parts = truth[..., None] + rng.normal(size=parts.shape)
        fit = outcome_fits.cross_fitted(evidence_of(parts, found))
        held += fit.gain.low <= 0
        moved.append(fit.theta.std())
        reached = [
            np.mean([np.corrcoef(parts[i] @ w, truth[i])[0, 1] for i in range(len(truth))])
            for w in (np.ones(6), np.exp(fit.theta))
        ]
        lost.append(1 - reached[1] / reached[0])
    assert held >= 9 and np.median(moved) < 0.15 and max(moved) < 0.5
    assert np.mean(lost) < 0.01 and max(lost) < 0.05


def test_outputs_that_are_noise_move_weights_little():
    """Less than they would move without cross-fitting; and the gain is not shown."""
    shown, moved = 0, []
    for seed in range(6):
        parts, _, found, _ = planted(1.0, seed=seed)
        noise = np.random.default_rng(100 + seed).normal(size=found.outputs.shape)
        fit = outcome_fits.cross_fitted(evidence_of(parts, ja.Outcomes(found.masks, noise)))
        shown += fit.gain.low > 0
        moved.append(fit.theta.std())
    assert shown <= 1 and np.median(moved) < 0.2


@QUIET
def test_learned_weights_have_a_gain_and_say_it_first():
    fit = fitted()
    assert np.mean(list(fit.weights.values())) == pytest.approx(1)
    gain = fit.gain
    assert (gain.models, gain.queries, gain.dropped, gain.skipped) == (R, Q, 0, 0)
    assert str(fit).startswith(f"gain {100 * gain.mean:+.1f} % LDS [{100 * gain.low:+.1f}, ")
    parts = np.asarray(ja.contributions(index(), QUERIES))
    expected = outcome_fits.cross_fitted(evidence_of(parts, outcomes()))
    got = np.log(list(fit.weights.values()))
    np.testing.assert_allclose(got - got.mean(), expected.theta, atol=1e-5)
    assert sum(fit.shares.values()) == pytest.approx(1)
    without = ja.learn_weights(index(), QUERIES, steps=2, top_k=5)
    assert without.gain is None
    assert str(without).startswith("gain over uniform weights: not known. Outcomes of small")


@QUIET
def test_copies_count():
    phi = ja.query_features(index(), COPIES[0])
    parts = np.asarray(ja.contributions(index(), COPIES[0]))
    centred = parts - parts.mean(axis=1, keepdims=True)
    copies = LinearSums(
        centred[np.arange(8), COPIES[1]][None], np.einsum("qnm,qnk->qmk", centred, centred) / N
    )
    evidence = evidence_of(np.asarray(ja.contributions(index(), QUERIES)), outcomes(), copies)
    expected = outcome_fits.cross_fitted(evidence).theta
    for given in (COPIES, (phi, COPIES[1])):
        fit = ja.learn_weights(index(), QUERIES, outcomes=outcomes(), copies=given)
        got = np.log(list(fit.weights.values()))
        np.testing.assert_allclose(got - got.mean(), expected, atol=1e-5)
    alone = fitted().weights
    assert alone != pytest.approx(fit.weights, rel=1e-3)


@QUIET
@pytest.mark.parametrize("shape", [(8,), (4, 2)])
def test_any_mesh_and_the_disk_give_the_same_weights(shape, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxattr.scores.subsets.SLAB", 16)
    mesh = jax.make_mesh(shape, ("data", "model")[: len(shape)])
    expected = fitted(copies=True)
    for options in ({}, {"path": tmp_path / "index"}):
        other = ja.build_index(
            METHOD, CHECKPOINTS, TRAIN, groups=ja.by_leaf, batch_size=16, mesh=mesh, **options
        )
        fit = ja.learn_weights(other, QUERIES, outcomes=outcomes(), copies=COPIES)
        assert fit.weights == pytest.approx(expected.weights, rel=1e-5)
        assert fit.gain.mean == pytest.approx(expected.gain.mean, abs=1e-6)


def test_squared_scores():
    """Fitted to what their own squares predict of models; oracle by direct sums."""
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(3, 30, 4))
    masks = evaluation.random_subsets(jax.random.key(1), 30, 12, fraction=0.25)
    products = np.einsum("sn,qnm,qnk->sqmk", masks.astype(float), parts, parts)
    sums = SquaredSums(products - products.mean(axis=0))
    w = np.exp(rng.normal(size=4))
    direct = masks @ ((parts @ w) ** 2).T
    expected = (direct - direct.mean(axis=0)) / direct.std(axis=0)
    np.testing.assert_allclose(sums.predictions(w), expected, rtol=1e-9)


def test_models_that_are_not_finite_are_dropped_and_counted():
    found = outcomes()
    outputs = np.concatenate([found.outputs, np.full((2, Q), np.nan)])
    outputs[-1, :3] = 1.0
    masks = np.concatenate([MASKS, MASKS[:2]])
    expected = fitted()
    with pytest.warns(WeightWarning, match="divergence: 2 models are not finite and were dropped"):
        fit = ja.learn_weights(index(), QUERIES, outcomes=ja.Outcomes(masks, outputs))
    assert fit.gain.dropped == 2 and "2 models dropped" in str(fit)
    assert fit.weights == pytest.approx(expected.weights, rel=1e-6)


@QUIET
def test_queries_that_say_nothing_are_skipped_and_counted():
    outputs = outcomes().outputs.copy()
    outputs[:, 2], outputs[:, 4] = 7.0, np.nan
    fit = ja.learn_weights(index(), QUERIES, outcomes=ja.Outcomes(MASKS, outputs))
    assert (fit.gain.skipped, fit.gain.queries) == (2, 4) and "2 queries skipped" in str(fit)
    some = np.array([0, 1, 3, 5])
    few = jax.tree.map(lambda x: x[some], QUERIES)
    expected = ja.learn_weights(index(), few, outcomes=ja.Outcomes(MASKS, outputs[:, some]))
    assert fit.weights == pytest.approx(expected.weights, rel=1e-6)


def test_a_query_that_few_models_are_finite_on_is_skipped_and_no_model_for_it():
    outputs = outcomes().outputs.copy()
    outputs[: R - 1, 4] = np.nan
    fit = ja.learn_weights(index(), QUERIES, outcomes=ja.Outcomes(MASKS, outputs))
    assert (fit.gain.skipped, fit.gain.queries, fit.gain.dropped) == (1, 5, 0)


@QUIET
def test_queries_without_a_gradient_are_left_out():
    bad = QUERIES | {"x": QUERIES["x"].at[1].set(jnp.nan)}
    with pytest.warns(ja.NonFiniteWarning, match="queries"):
        fit = ja.learn_weights(index(), bad, outcomes=outcomes())
    rest = np.array([0, 2, 3, 4, 5])
    few = jax.tree.map(lambda x: x[rest], QUERIES)
    expected = ja.learn_weights(
        index(), few, outcomes=ja.Outcomes(MASKS, outcomes().outputs[:, rest])
    )
    assert fit.weights == pytest.approx(expected.weights, rel=1e-6)


def test_outputs_of_the_wrong_sign_are_warned_of():
    wrong = ja.Outcomes(MASKS, -outcomes().outputs)
    with pytest.warns(WeightWarning, match="sign: .*a margin, or MINUS the loss"):
        ja.learn_weights(index(), QUERIES, outcomes=wrong)


def test_without_a_cpu_backend_the_default_device_fits(monkeypatch):
    """JAX_PLATFORMS=cuda leaves JAX none; only the fit asks for one."""
    devices = jax.local_devices

    def no_cpu(*arguments, backend=None, **options):
        if backend == "cpu":
            raise RuntimeError("Unknown backend cpu")
        return devices(*arguments, backend=backend, **options)

    expected = fitted()
    monkeypatch.setattr(jax, "local_devices", no_cpu)
    found = ja.learn_weights(index(), QUERIES, outcomes=outcomes())
    assert found.weights == expected.weights


@QUIET
def test_any_optimizer_of_optax():
    fit = fitted()
    searching = ja.learn_weights(index(), QUERIES, optimizer=optax.lbfgs(), steps=20)
    assert searching.losses[-1] < searching.losses[0]
    adam = ja.learn_weights(
        index(), QUERIES, outcomes=outcomes(), optimizer=optax.adam(0.05), steps=2000
    )
    assert adam.weights == pytest.approx(fit.weights, rel=0.01)


def test_subsets_of_different_sizes_and_of_a_pool():
    masks = np.zeros((3, 10), bool)
    masks[0, :2], masks[1, 2:5], masks[2, 1:4] = True, True, True
    masks[:, 9] = True  # in all, so that it makes no difference
    size, pool = (2 + 3 + 3) / 3, 5
    assert variance_of_sums(masks, 10) == pytest.approx(size * (pool - size) / (pool - 1) / 10)


OUTPUTS = np.zeros((R, Q))
TURNS = np.arange(R)[:, None] % Q == np.arange(Q)  # each model is finite on one query
REFUSED = {
    "other queries": (dict(outcomes=ja.Outcomes(MASKS, np.zeros((R, 4)))),
                      "Outcomes are of 4 queries, and there are 6: pass the queries"),
    "another n": (dict(outcomes=ja.Outcomes(MASKS[:, :50], OUTPUTS)),
                  r"masks must be bool \[subsets, 60\].*got bool \[16, 50\]"),
    "all the same": (dict(outcomes=ja.Outcomes(MASKS, OUTPUTS)),
                     "All 16 models have the same output on each of the 6 queries"),
    "diverged": (dict(outcomes=ja.Outcomes(MASKS, np.where(MASKS[:, :6], np.nan, 1.0))),
                 "models have finite outputs on all queries, and 8 are needed: training diverged"),
    "each query for few": (dict(outcomes=ja.Outcomes(MASKS, np.where(TURNS, 1.0, np.nan))),
                           "most of the 16 models are not finite on any of the 6 queries"),
    "top_k": (dict(outcomes=ja.Outcomes(MASKS, OUTPUTS), top_k=5, l2=1.0),
              "top_k, l2 belong to the objective without outcomes"),
    "copies alone": (dict(copies=COPIES), "copies complement outcomes, and there are none"),
    "no pair": (dict(outcomes=ja.Outcomes(MASKS, np.eye(R)[:, :Q]), copies=COPIES[0]),
                "copies must be a pair .*got dict"),
    "no ids": (dict(outcomes=ja.Outcomes(MASKS, np.eye(R)[:, :Q]),
                    copies=(COPIES[0], np.arange(8) + 55)),
               "The sources of 8 copies must be integers .* 0 to 59.*got int64 .*from 55 to 62"),
    "too few ids": (dict(outcomes=ja.Outcomes(MASKS, np.eye(R)[:, :Q]),
                         copies=(COPIES[0], np.arange(3))),
                    r"The sources of 8 copies must be integers.*got int64 \[3\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        ja.learn_weights(index(), QUERIES, **options)


@pytest.mark.parametrize(
    ("masks", "outputs", "message"),
    [
        (MASKS[:7], OUTPUTS[:7], "outcomes of at least 8 models, got 7"),
        (np.ones((R, N), bool), OUTPUTS, "subsets are all the same.*The masks are all True"),
        (np.repeat(MASKS[:1], R, axis=0), OUTPUTS, "subsets are all the same, so that"),
        (np.arange(R * 3).reshape(R, 3), OUTPUTS, "masks must be bool .*make a mask of each"),
        (MASKS, OUTPUTS[:9], r"a row for each of the 16 rows of masks; got float64 \[9, 6\]"),
        (MASKS, OUTPUTS.astype(complex), "outputs must be real numbers"),
    ],
)
def test_what_are_no_outcomes_is_refused(masks, outputs, message):
    with pytest.raises(ValueError, match=message):
        ja.Outcomes(masks, outputs)


def test_squares_of_many_groups_are_refused_before_they_fill_the_memory(monkeypatch):
    monkeypatch.setattr("jaxattr.weights.evidence._PRODUCT_BYTES", 1 << 10)
    from jaxattr.weights import evidence

    with pytest.raises(ValueError, match=re.escape("Take fewer groups (groups=ja.by_layer)")):
        evidence._check_products(64, 128, 55)


START = models.mlp_params()
TRAIN_FN = ja.trainer(models.loss, START, TRAIN, optimizer=optax.sgd(0.1), batch_size=4, epochs=2)
KEY = jax.random.key(3)


def made(**options):
    options = {"models": 10, "at_once": 4, "key": KEY} | options
    return ja.outcomes(TRAIN_FN, models.margin, QUERIES, N, **options)


def test_outcomes_are_outputs_of_models_trained_on_the_subsets():
    margins, found = jax.jit(jax.vmap(models.margin, (None, 0, None))), made(params=CHECKPOINTS)
    assert found.masks.shape == (10, N) and (found.masks.sum(axis=1) == 15).all()
    keys = jax.random.split(jax.random.split(KEY, 3)[1], 10)
    for key, mask, row in zip(keys, found.masks, found.outputs, strict=True):
        params = TRAIN_FN(key, jnp.asarray(np.flatnonzero(mask)))
        np.testing.assert_allclose(row, margins(params, QUERIES, None), rtol=1e-9)
    real = [margins(params, QUERIES, None) for params in CHECKPOINTS]
    np.testing.assert_allclose(found.reference, np.mean(real, axis=0), rtol=1e-9)
    assert "10 models on 15 of 60" in str(found) and "the real model's" in str(found)
    np.testing.assert_array_equal(made(at_once=10).outputs, found.outputs)
    mesh = jax.make_mesh((4,), ("data",))
    np.testing.assert_allclose(made(mesh=mesh).outputs, found.outputs, rtol=1e-9)


def test_subsets_of_a_pool_and_of_strata():
    found = made(pool=20)
    assert (found.masks.sum(axis=1) == 5).all() and found.masks.any(axis=0).sum() <= 20
    ids = np.arange(10, 34)
    found = made(pool=ids, strata=np.arange(N) % 2, fraction=0.5)
    assert set(np.flatnonzero(found.masks.any(axis=0))) <= set(ids)
    np.testing.assert_array_equal(found.masks[:, ::2].sum(axis=1), 6)
    np.testing.assert_array_equal(found.masks[:, 1::2].sum(axis=1), 6)


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    path, expected = tmp_path / "deep" / "outcomes.npz", made()
    calls, write = [], outcomes_module()._write

    def killed(file, identity, outputs, done):
        calls.append(done)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(file, identity, outputs, done)

    with monkeypatch.context() as patch:
        patch.setattr(outcomes_module(), "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            made(path=path)
    assert calls == [4, 8, 10]
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(outcomes_module(), "_write", killed)
        found = made(path=path)
    assert calls == [10]
    np.testing.assert_array_equal(found.outputs, expected.outputs)
    with monkeypatch.context() as patch:
        patch.setattr(outcomes_module(), "trained", lambda *a, **k: 1 / 0)
        np.testing.assert_array_equal(made(path=path).outputs, expected.outputs)
    for changed in ({"key": jax.random.key(4)}, {"fraction": 0.5}):
        with pytest.raises(ValueError, match="holds outcomes of something else"):
            made(path=path, **changed)
    with pytest.raises(ValueError, match=r"path must end in \.npz"):
        made(path=tmp_path / "outcomes")


def test_files_that_hold_no_outcomes_are_refused(tmp_path):
    path = tmp_path / "outcomes.npz"
    expected = made(path=path)
    with np.load(path) as stored:
        kept = dict(stored)
    whole = path.read_bytes()

    single = io.BytesIO()
    np.save(single, np.ones(3))

    def saved(**arrays):
        np.savez(path, **arrays)

    cases = [
        (lambda: saved(a=np.ones(3)), r"holds no outcomes: its arrays are \['a'\]"),
        (lambda: path.write_bytes(whole[:-50]), "holds no arrays as np.savez writes them"),
        (lambda: path.write_bytes(b"junk"), "holds no arrays as np.savez writes them"),
        (lambda: path.write_bytes(b""), "holds no arrays as np.savez writes them"),
        (lambda: path.write_bytes(single.getvalue()), "but one as np.save does"),
        (lambda: saved(**kept | {"outputs": kept["outputs"][:, :3]}), r"float64 \[10, 3\]"),
        (lambda: saved(**kept | {"outputs": kept["outputs"].astype(str)}), "damaged: its outputs"),
        (lambda: saved(**kept | {"done": 11}), r"11 are said to be there; \[10, 6\] are needed"),
        (lambda: saved(**kept | {"done": 9.5}), "9.5 are said to be there"),
        (lambda: saved(**kept | {"identity": "other"}), "holds outcomes of something else"),
    ]
    for damage, message in cases:
        damage()
        found = path.read_bytes()
        with pytest.raises(ValueError, match=f"{message}.*ive another path, or remove the file"):
            made(path=path)
        assert path.read_bytes() == found
    saved(**kept)
    np.testing.assert_array_equal(made(path=path).outputs, expected.outputs)


@pytest.mark.parametrize("path", ["gs://bucket/x.npz", "file:///tmp/x.npz", "s3:/bucket/x.npz"])
def test_outcomes_are_kept_on_local_disk(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is a URL, and this file is written to local disk alone"):
        made(path=path)
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(ValueError, match="folder.npz is a folder, and the path of a file"):
        made(path=tmp_path / "folder.npz")
    kept = made(path=tmp_path / "kept.npz")
    monkeypatch.setattr(os, "access", lambda *_: False)  # a reader's rights
    np.testing.assert_array_equal(made(path=tmp_path / "kept.npz").outputs, kept.outputs)
    (tmp_path / "kept.npz").unlink()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is no folder that may be written to"):
        made(path=tmp_path / "file/new/x.npz")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder.npz"]


def outcomes_module():
    import sys

    return sys.modules["jaxattr.evaluation.outcomes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": 7}, "models must be at least 8"),
        ({"pool": 61}, "A pool of 61 of 60"),
        ({"pool": [0, 60]}, "pool must be how many .* between 0 and 59"),
        ({"strata": [0, 1]}, r"strata must be integers \[60\]"),
        ({"fraction": 1.0}, "A fraction of 1.0 of 60"),
        ({"key": 0}, "key must be one PRNG key"),
    ],
)
def test_bad_requests_for_outcomes(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_a_train_function_that_ignores_what_it_is_given():
    options = {"key": KEY, "models": 8}
    with pytest.raises(ValueError, match="train_fn ignores its ids"):
        ja.outcomes(lambda key, ids: START, models.margin, QUERIES, N, **options)
    fixed = ja.trainer(models.loss, START, TRAIN, optimizer=optax.sgd(0.1), batch_size=4, epochs=1)
    with pytest.warns(UserWarning, match="train_fn ignores its key"):
        ja.outcomes(
            lambda key, ids: fixed(jax.random.key(0), ids), models.margin, QUERIES, N, **options
        )


@QUIET
def test_queries_may_hold_keys():
    def noisy(params, example, key):
        return params["w"] @ (example["x"] + 0.1 * jax.random.normal(example["key"], (3,)))

    def data(n):
        keys = jax.random.split(jax.random.key(n), n)
        return {"x": np.random.default_rng(n).normal(size=(n, 3)), "key": keys}

    made = ja.build_index(ja.tracin(noisy), {"w": jnp.ones(3)}, data(N))
    outputs = np.random.default_rng(0).normal(size=(R, Q))
    fit = ja.learn_weights(made, data(Q), outcomes=ja.Outcomes(MASKS, outputs))
    assert len(fit.learned_from) == Q


def test_copies_that_uniform_weights_say_less_than_nothing_of_do_not_turn_the_loss_round():
    one = LinearSums(np.array([[[-1.0, 0.2]]]), np.eye(2)[None])
    evidence = Evidence(LinearSums(np.zeros((8, 1, 2)), np.eye(2)[None]), np.zeros((8, 1)), one)
    strengths = Strengths(jnp.ones(8), jnp.zeros(()), jnp.ones(()), jnp.zeros(()))
    worse, better = (outcome_loss(jnp.array(w), evidence, strengths) for w in ([2, 0.1], [0.1, 2]))
    assert better < 0 < worse


@pytest.mark.filterwarnings("ignore:The features of the first", "ignore:Queries at positions")
def test_contributions_that_are_all_zero_are_refused():
    made = ja.build_index(
        ja.tracin(lambda p, e, key: p["w"] @ e * (e[0] > 9)), {"w": jnp.ones(3)}, np.ones((N, 3))
    )
    outputs = np.random.default_rng(0).normal(size=(R, 2))
    with pytest.raises(ValueError, match="Every contribution is zero"):
        ja.learn_weights(made, np.ones((2, 3)), outcomes=ja.Outcomes(MASKS, outputs))


def test_outcomes_know_their_queries():
    found = made()
    other = models.data(Q, seed=9)
    with pytest.raises(ValueError, match="Outcomes are of 6 other queries .* though as many"):
        ja.learn_weights(index(), other, outcomes=found)


def test_a_trainer_takes_the_steps_that_a_loop_takes():
    """Against a loop in Python, with a schedule over all steps and a start from the key."""

    def start(key):
        return models.mlp_params(key)

    def optimizer(steps):
        return optax.adam(optax.cosine_decay_schedule(0.01, steps))

    train_fn = ja.trainer(models.loss, start, TRAIN, optimizer=optimizer, batch_size=4, epochs=3)
    ids, key = jnp.asarray([3, 5, 8, 13, 21, 34, 55, 1, 2, 0]), jax.random.key(5)
    start_key, order_key, _ = jax.random.split(key, 3)
    params = start(start_key)
    chosen = optimizer(6)
    state, update = chosen.init(params), jax.jit(chosen.update)
    for epoch in range(3):
        order = jax.random.permutation(jax.random.split(order_key, 3)[epoch], ids)
        for batch in (order[:4], order[4:8]):

            def mean(params, batch=batch):
                return jnp.mean(jnp.stack([
                    models.loss(params, jax.tree.map(lambda x, i=i: x[i], TRAIN), None)
                    for i in batch
                ]))  # fmt: skip

            updates, state = update(jax.grad(mean)(params), state, params)
            params = optax.apply_updates(params, updates)
    got = train_fn(key, ids)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), got, params)


def trained_by(loss, start, train=TRAIN, **options):
    options = {"optimizer": optax.adam(0.1), "batch_size": 4, "epochs": 2} | options
    return ja.trainer(loss, start, train, **options)(KEY, jnp.arange(8))


def test_a_trainer_leaves_whole_numbers_and_what_is_excluded_as_they_are():
    """Against the same training of the rest alone, over which the loss closes."""
    fixed = {"count": jnp.asarray(2), "scale": jnp.asarray(0.5), "table": np.array([True, False])}

    def loss(params, example, key):
        inner = {name: leaf for name, leaf in params.items() if name not in fixed}
        assert params["count"].dtype == fixed["count"].dtype
        return models.loss(inner, example, key) * params["scale"] ** params["count"]

    expected = trained_by(lambda p, e, k: loss(p | fixed, e, k), START)
    for start in (START | fixed, lambda key: START | fixed):
        got = trained_by(loss, start, exclude="^scale$")
        assert got.keys() == (START | fixed).keys()
        for name, leaf in fixed.items():
            np.testing.assert_array_equal(got[name], leaf)
        for name in START:
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12),
                         got[name], expected[name])  # fmt: skip
    moved = trained_by(loss, START | fixed)
    assert abs(moved["scale"] - 0.5) > 1e-3 and int(moved["count"]) == 2
    train_fn = ja.trainer(loss, START | fixed, TRAIN, optimizer=optax.sgd(0.1), batch_size=4,
                          epochs=1)  # fmt: skip
    found = ja.retrain(train_fn, MASKS[:2], KEY)
    np.testing.assert_array_equal(found["count"], [[2], [2]])
    with pytest.raises(ValueError, match="only whole numbers"):
        trained_by(loss, {"count": fixed["count"]})
    with pytest.raises(ValueError, match="every leaf is excluded"):
        trained_by(loss, START | fixed, exclude="")


def test_a_trainer_moves_no_batch_statistics():
    """Nor does it leave them out unasked: the start says what they are."""
    statistics = {"mean": jnp.full(6, 0.3)}

    def loss(variables, example, key):
        seen = example | {"x": example["x"] - variables["batch_stats"]["mean"]}
        return models.loss(variables["params"], seen, key)

    start = {"params": START, "batch_stats": statistics}
    for each in (start, lambda key: start):
        with pytest.raises(ValueError, match=r"batch_stats/mean, .*exclude='batch_stats'"):
            trained_by(loss, each)
    got = trained_by(loss, start, exclude="batch_stats")
    np.testing.assert_array_equal(got["batch_stats"]["mean"], statistics["mean"])
    expected = trained_by(
        lambda p, e, k: loss({"params": p, "batch_stats": statistics}, e, k), START
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), got["params"], expected)


def test_parameters_that_can_be_called_are_parameters():
    equinox = pytest.importorskip("equinox")
    train = {"x": np.random.default_rng(0).normal(size=(8, 3)), "y": np.arange(8.0)}
    params, rest = equinox.partition(
        equinox.nn.Linear(3, 1, key=jax.random.key(0)), equinox.is_inexact_array
    )
    assert callable(params)

    def of_module(params, example, key):
        return (equinox.combine(params, rest)(example["x"])[0] - example["y"]) ** 2

    def of_arrays(params, example, key):
        return (params["w"] @ example["x"] + params["b"] - example["y"])[0] ** 2

    expected = trained_by(of_arrays, {"w": params.weight, "b": params.bias}, train)
    for start in (params, lambda key: params, jax.tree_util.Partial(lambda x, key: x, params)):
        got = trained_by(of_module, start, train)
        np.testing.assert_allclose(got.weight, expected["w"], rtol=1e-12)
        np.testing.assert_allclose(got.bias, expected["b"], rtol=1e-12)
    with pytest.raises(TypeError, match="start holds parameters, as checkpoints do: .*'act'"):
        trained_by(of_arrays, {"w": params.weight, "act": jax.nn.relu}, train)
    with pytest.raises(TypeError, match="start takes .*, and is called as .key."):
        trained_by(of_arrays, lambda: params, train)


def test_an_optimizer_is_what_has_init_and_update():
    """Steps of two batches together are steps of batches of twice the size."""
    ids = jnp.arange(8)
    options = {"epochs": 1, "batch_size": 4}
    got = trained_by(models.loss, START, optimizer=optax.MultiSteps(optax.sgd(0.1), 2), **options)
    by_steps = trained_by(
        models.loss, START, optimizer=lambda n: optax.MultiSteps(optax.sgd(0.1), n), **options
    )
    gradient = jax.grad(
        lambda p: jax.vmap(models.loss, (None, 0, None))(
            p, jax.tree.map(lambda x: x[ids], TRAIN), None
        ).mean()
    )(START)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, START, gradient)
    for each in (got, by_steps):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), each, expected)
    for wrong in (0.1, None, "adam", optax.MultiSteps, lambda steps: 0.1):
        with pytest.raises(TypeError, match="optimizer must be one of Optax, with init and update"):
            trained_by(models.loss, START, optimizer=wrong)


def test_subsets_of_another_number_of_examples_than_the_trainer_has_are_refused():
    for n in (N - 1, N + 10):
        masks = evaluation.random_subsets(KEY, n, 2)
        for train_fn in (TRAIN_FN, jax.jit(TRAIN_FN)):
            message = f"made of 60 training examples, and subsets of {n} are asked for"
            with pytest.raises(ValueError, match=message):
                ja.outcomes(train_fn, models.margin, QUERIES, n, key=KEY)
            with pytest.raises(ValueError, match=message):
                ja.retrain(train_fn, masks, KEY)
    assert TRAIN_FN.examples == N


def test_noise_is_on_floats_alone_and_of_the_size_that_is_said():
    train = {"x": np.random.default_rng(0).normal(size=(500, 30)) * 3, "y": np.arange(500)}
    ids = np.arange(100, 300)
    copies = ja.noised(train, ids, KEY, scale=0.5)
    np.testing.assert_array_equal(copies["y"], ids)
    assert (copies["x"] - train["x"][ids]).std() == pytest.approx(1.5, rel=0.05)
    np.testing.assert_array_equal(ja.noised(train, ids, KEY, scale=0.5)["x"], copies["x"])
    train["x"][150, 3] = np.nan  # alone, and no other copy with it
    assert np.argwhere(np.isnan(ja.noised(train, ids, KEY)["x"])).tolist() == [[50, 3]]
    with pytest.raises(ValueError, match="holds floats.*make copies of your own"):
        ja.noised({"tokens": np.zeros((5, 3), np.int32)}, [0, 1], KEY)
    for wrong in ([0, 500], [0.5], [[1]], []):
        with pytest.raises(ValueError, match="integers .b. from 0 to 499"):
            ja.noised(train, wrong, KEY)


@QUIET
def test_the_gain_is_measured_on_other_queries():
    fit = fitted()
    queries = models.data(9, seed=4)
    masks = evaluation.random_subsets(jax.random.key(9), N, 12)
    found = ja.Outcomes(masks, np.random.default_rng(0).normal(size=(12, 9)))
    gain = evaluation.measured_gain(index(), queries, fit, found)
    for weights, got in ((None, gain.uniform), (fit.weights, gain.learned)):
        expected = ja.lds(ja.score(index(), queries, weights=weights), masks, found.outputs)
        assert got.mean == pytest.approx(expected.mean, abs=1e-9)
    assert gain.difference.mean == pytest.approx(gain.learned.mean - gain.uniform.mean)
    with pytest.raises(ValueError, match="Outcomes are of 9 queries, and there are 6"):
        evaluation.measured_gain(index(), models.data(6, seed=5), fit, found)


def test_queries_that_were_learned_from_are_warned_of():
    fit = fitted()
    other = models.data(Q, seed=4)
    mixed = jax.tree.map(lambda a, b: jnp.concatenate([a[:3], b[3:]]), other, QUERIES)
    found = ja.Outcomes(MASKS, outcomes().outputs)
    with pytest.warns(WeightWarning, match=r"learned from 3 of the 6 .* positions \[3, 4, 5\]"):
        evaluation.measured_gain(index(), mixed, fit, found)
    evaluation.measured_gain(index(), other, fit, found)
    with jax.enable_x64(False):
        on_host, on_device = ({"x": f(2)} for f in (np.ones, jnp.ones))
        assert digests_of_queries(on_host) == digests_of_queries(on_device)


def test_a_gain_of_weights_of_another_index_is_warned_of_and_of_other_groups_refused():
    fit, queries = fitted(), models.data(9, seed=4)
    found = ja.Outcomes(MASKS, np.random.default_rng(0).normal(size=(R, 9)))
    other = ja.build_index(METHOD, CHECKPOINTS[:1], TRAIN, groups=ja.by_leaf)
    with pytest.warns(UserWarning, match="learned on another index"):
        evaluation.measured_gain(other, queries, fit, found)
    grouped = ja.build_index(METHOD, CHECKPOINTS, TRAIN, groups=ja.by_layer)
    with (
        pytest.warns(UserWarning, match="learned on another index"),
        pytest.raises(ValueError, match="exactly the index's groups"),
    ):
        evaluation.measured_gain(grouped, queries, fit, found)


@QUIET
def test_copies_of_squared_scores_do_not_see_the_sign_of_a_residual():
    def signed(params, example, key):
        return jnp.where(example["x"].sum() > 0, 1.0, -1.0) * models.loss(params, example, key)

    made = ja.build_index(ja.das(models.loss, residual=signed), CHECKPOINTS[0], TRAIN)
    found = ja.Outcomes(MASKS, MASKS @ np.asarray(ja.score(made, QUERIES)).T)
    evidence, *_ = gather(made, QUERIES, found, COPIES)
    batch, sources = COPIES
    sizes = np.sqrt(np.asarray(ja.score(made, batch))[np.arange(len(sources)), sources])
    predicted = evidence.copies.sums[0].sum(axis=1)
    assert np.corrcoef(sizes, predicted)[0, 1] > 0.95
