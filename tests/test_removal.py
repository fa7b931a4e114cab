"""What the removal of proponents and opponents does to a model, against loops and closed forms."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jaxattr as ja
from jaxattr import evaluation
from tests import models
from tests.test_evaluation import QUERIES, TRAIN, train

POINTS = np.random.default_rng(0).normal(size=40)
ASKED = np.array([-0.5, 0.3, 1.0])


def mean_of(key, ids):
    """The model is the mean of its data: what a removal does is known."""
    return jnp.asarray(POINTS)[ids].mean() + 0 * jax.random.normal(key)


def minus_loss(params, example, key):
    return -((params - example) ** 2)


@pytest.mark.parametrize("devices", [None, 8])
def test_removal_equals_a_loop_that_retrains(devices):
    scores = np.random.default_rng(1).normal(size=(5, 24))
    mesh = devices and Mesh(np.array(jax.devices()), ("data",))
    found = evaluation.removal(
        train, models.margin, scores, QUERIES, jax.random.key(1), fractions=[0.1, 0.25],
        random=3, seeds=2, at_once=4, mesh=mesh,
    )  # fmt: skip
    _, train_key, _ = jax.random.split(jax.random.key(1), 3)
    one = jax.jit(train)

    def output(query, removed):
        kept = np.setdiff1d(np.arange(24), removed)
        trained = [one(key, kept) for key in jax.random.split(train_key, 2)]
        example = jax.tree.map(lambda x: x[query], QUERIES)
        return np.mean([models.margin(params, example, None) for params in trained])

    assert found.fractions == (0.1, 0.25)
    for count, most, least in zip((2, 6), found.proponents, found.opponents, strict=True):
        order = np.argsort(-scores, axis=1)
        assert most.count == least.count == count
        np.testing.assert_allclose(most.outputs, [output(i, order[i, :count]) for i in range(5)])
        np.testing.assert_allclose(least.outputs, [output(i, order[i, -count:]) for i in range(5)])
        np.testing.assert_array_equal(most.random, least.random)
        np.testing.assert_allclose(most.per_query, most.random.mean(axis=0) - most.outputs)
        assert most.mean == pytest.approx(most.per_query.mean())


def test_opponents_need_not_be_removed():
    run = functools.partial(
        evaluation.removal, mean_of, minus_loss, np.arange(120.0).reshape(3, 40), ASKED,
        jax.random.key(2), fractions=[0.05, 0.1], random=5,
    )  # fmt: skip
    found, both = run(opponents=False), run()
    assert found.opponents == () and len(both.opponents) == 2
    assert [str(fall) for fall in found.proponents] == [str(fall) for fall in both.proponents]
    assert str(both).count("opponents") == 2 and "opponents" not in str(found)
    assert found._repr_html_().count("<tr>") == both._repr_html_().count("<tr>")


def test_scores_may_be_of_a_narrow_type():
    scores = jnp.arange(120.0).reshape(3, 40)
    run = functools.partial(
        evaluation.removal, mean_of, minus_loss, queries=ASKED, key=jax.random.key(2),
        fractions=[0.05], random=2, opponents=False,
    )  # fmt: skip
    assert str(run(scores=scores.astype(jnp.bfloat16))) == str(run(scores=scores))


def test_random_removal_is_that_of_models_without_as_many():
    found = evaluation.removal(
        mean_of, minus_loss, np.ones((3, 40)), ASKED, jax.random.key(2), fractions=[0.05], random=5
    ).proponents[0]
    removed = evaluation.random_subsets(
        jax.random.split(jax.random.key(2), 3)[0], 40, 5, fraction=0.05
    )
    means = np.array([POINTS[~mask].mean() for mask in removed])
    assert removed.sum(axis=1).tolist() == [2] * 5
    np.testing.assert_allclose(found.random, -((means[:, None] - ASKED) ** 2))


def test_the_exact_influence_on_a_mean_finds_the_largest_fall():
    """Scores that know the truth are positive for both; those of chance are about zero."""
    without = (POINTS.sum() - POINTS) / 39
    truth = (ASKED[:, None] - without) ** 2  # the loss without each example
    chance = np.random.default_rng(3).normal(size=truth.shape)
    run = lambda scores: evaluation.removal(  # noqa: E731
        mean_of, minus_loss, scores, ASKED, jax.random.key(0), fractions=[1 / 40], random=64
    )
    exact, random = run(truth), run(chance)
    most, least = exact.proponents[0], exact.opponents[0]
    np.testing.assert_allclose(most.outputs, -truth.max(axis=1))
    np.testing.assert_allclose(least.outputs, -truth.min(axis=1))
    assert (most.per_query > 0).all() and (least.per_query < 0).all()
    assert (most.per_query > random.proponents[0].per_query).all()
    # The draws are the same for every method, so methods are paired.
    np.testing.assert_array_equal(most.random, random.proponents[0].random)


def test_flips_are_the_predictions_that_turn():
    """The mean of ten points is 0.1 above zero; it is not without the largest of them."""
    points = jnp.array([1.0, *[0.0] * 9])
    output = lambda params, example, key: example * params  # noqa: E731
    found = evaluation.removal(
        lambda key, ids: points[ids].mean() + 0 * jax.random.normal(key), output,
        np.stack([np.arange(10)[::-1], np.arange(10)[::-1], np.arange(10), np.arange(10)]),
        np.array([1.0, 1.0, 1.0, -1.0]), jax.random.key(0), fractions=[0.1], random=16,
    )  # fmt: skip
    # Two queries lose it, one loses another point, and the last was wrong before.
    most = found.proponents[0]
    assert most.flips == pytest.approx(2 / 3)
    assert most.random_flips == (most.random[:, 0] == 0).mean()
    assert found.opponents[0].flips == pytest.approx(1 / 3)


def test_minus_a_loss_has_no_flips():
    found = evaluation.removal(
        mean_of, minus_loss, np.ones((3, 40)), ASKED, jax.random.key(0), fractions=[0.1]
    )
    assert np.isnan(found.proponents[0].flips) and "flip" not in str(found)


def test_the_interval_covers_about_as_often_as_it_says(monkeypatch):
    """Of queries and random draws from a known law, some 95 % of the intervals hold its mean."""
    from jaxattr.evaluation.removal import _fall

    monkeypatch.setattr(sys.modules[_fall.__module__], "_RESAMPLES", 400)
    generator, covered = np.random.default_rng(0), 0
    for _ in range(200):
        luck = generator.normal(size=(32, 1))  # of a draw, shared by all queries
        own = generator.normal(size=40)
        random = own + luck + generator.normal(size=(32, 40))
        outputs = own - 1.0 + generator.normal(size=40)
        fall = _fall(1, outputs, random)
        covered += fall.low <= 1.0 <= fall.high
    assert 0.9 <= covered / 200 <= 0.99


def test_queries_that_are_not_finite_are_skipped_and_counted():
    output = lambda params, example, key: jnp.log(example) * params  # noqa: E731
    found = evaluation.removal(
        mean_of, output, np.random.default_rng(5).normal(size=(3, 40)), np.array([2.0, -1.0, 3.0]),
        jax.random.key(0), fractions=[0.1],
    ).proponents[0]  # fmt: skip
    assert found.skipped == 1 and np.isnan(found.per_query).tolist() == [False, True, False]
    assert found.mean == pytest.approx(np.nanmean(found.per_query))
    assert "(1 queries skipped)" in str(found)


def test_what_is_shown():
    found = evaluation.removal(
        train, lambda *given: models.margin(*given) + 1,
        np.random.default_rng(1).normal(size=(5, 24)), QUERIES, jax.random.key(1),
        fractions=[0.1, 0.25], random=2,
    )  # fmt: skip
    lines, html = str(found).splitlines(), found._repr_html_()
    for line, share, fall, other in zip(
        lines, ("10 % (2)", "25 % (6)"), found.proponents, found.opponents, strict=True
    ):
        assert line.startswith(f"without {share}: proponents {fall.mean:+.3g} [{fall.low:+.3g}, ")
        assert f"{100 * fall.flips:.0f} % flip; opponents {other.mean:+.3g} [" in line
        assert share in html and str(fall) in html and str(other) in html


NAN = np.where(np.arange(40) == 3, np.nan, np.ones((3, 40)))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"scores": np.ones(40)}, ValueError, r"real numbers .q, n., got float64 .40."),
        ({"scores": np.ones((2, 40))}, ValueError, r"of the 3 queries, got .2, 40."),
        ({"scores": NAN}, ValueError, "3 queries have scores that are not finite, at positions"),
        ({"fractions": 0.1}, TypeError, r"fractions must be a list, of one fraction .0.1."),
        ({"fractions": []}, TypeError, "fractions must be a list"),
        ({"fractions": [0.01]}, ValueError, "0.01 of 40 training examples is 0"),
        ({"fractions": [0.1, 1.0]}, ValueError, "more than none and fewer than all"),
        ({"random": 0}, ValueError, "random"),
        ({"seeds": 1.5}, TypeError, "seeds"),
        ({"key": 0}, ValueError, "key"),
        ({"train_fn": None}, TypeError, "train_fn"),
        ({"train_fn": lambda key, ids: jax.random.normal(key)}, ValueError, "ignores its ids"),
        ({"output_fn": lambda params, example, key: jnp.ones(2)}, ValueError, "scalar"),
        ({"output_fn": 3}, TypeError, "^output_fn must be a function"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(given, error, message):
    usual = {
        "train_fn": mean_of, "output_fn": minus_loss, "scores": np.ones((3, 40)),
        "queries": ASKED, "key": jax.random.key(0), "fractions": [0.1],
    }  # fmt: skip
    with pytest.raises(error, match=message):
        evaluation.removal(**usual | given)


def test_a_trainer_of_another_number_of_examples_is_refused():
    import optax

    fit = ja.trainer(
        models.loss, models.mlp_params, TRAIN, optimizer=optax.sgd(0.1), batch_size=8, epochs=1
    )
    with pytest.raises(ValueError, match="made of 24 training examples"):
        evaluation.removal(fit, models.margin, np.ones((5, 30)), QUERIES, jax.random.key(0))
