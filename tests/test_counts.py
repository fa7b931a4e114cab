"""Counts are whole numbers: what only equals one is refused, and spoils nothing for the next."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxattr as ja
from jaxattr import evaluation
from jaxattr.features import projections
from tests import models

TRAIN, QUERIES = models.data(12), models.data(3, seed=1)
METHOD = ja.tracin(models.loss, projection=projections.rademacher(4))
MASKS = np.random.default_rng(0).permuted(np.tile(np.arange(12) < 6, (4, 1)), axis=1)
SCORES, RELEVANT = np.random.default_rng(0).normal(size=(3, 12)), np.tile(np.arange(12) < 2, (3, 1))
KEY = jax.random.key(0)
OUTCOMES = ja.Outcomes(
    np.random.default_rng(1).permuted(np.tile(np.arange(12) < 6, (9, 1)), axis=1),
    np.random.default_rng(2).normal(size=(9, 3)),
)


@functools.cache
def index():
    return ja.build_index(METHOD, models.mlp_params(), TRAIN)


def mean(key, ids):
    return {"w": jax.random.normal(key) + TRAIN["x"][ids].mean()}


def patched(at_once):
    return evaluation.tail_patch(
        models.loss, models.margin, models.mlp_params(), TRAIN, QUERIES, [[0], [1], [2]],
        optimizer=optax.sgd(0.1), at_once=at_once,
    )  # fmt: skip


USES = {
    "k": lambda n: ja.top_k(index(), QUERIES, k=n),
    "k of attributor": lambda n: ja.attributor(index(), k=n)(QUERIES),
    "seeds": lambda n: ja.retrain(mean, MASKS, KEY, seeds=n),
    "at_once": lambda n: ja.retrain(mean, MASKS, KEY, at_once=n),
    "n": lambda n: evaluation.random_subsets(KEY, n, 2),
    "count": lambda n: evaluation.random_subsets(KEY, 12, n),
    "classes": lambda n: evaluation.flip_labels(KEY, [0, 1, 1, 0], classes=n, fraction=0.5),
    "resamples": lambda n: ja.lds(SCORES, MASKS, MASKS @ SCORES.T, resamples=n).resampled,
    "k of strongest": lambda n: evaluation.strongest(SCORES, n),
    "k of hit_at_k": lambda n: evaluation.hit_at_k(SCORES, RELEVANT, n),
    "k of recall_at_k": lambda n: evaluation.recall_at_k(SCORES, RELEVANT, n),
    "k of precision_at_k": lambda n: evaluation.precision_at_k(SCORES, RELEVANT, n),
    "at_once of tail_patch": patched,
    "steps": lambda n: ja.learn_weights(index(), QUERIES, steps=n, outcomes=OUTCOMES).losses,
}


@pytest.mark.filterwarnings("ignore::jaxattr.weights.report.WeightWarning")
@pytest.mark.parametrize("name", USES)
def test_counts_are_ints(name):
    use = USES[name]
    for wrong in (2.0, True, np.True_, np.float64(2), "2", jnp.array(2.0), [2], None):
        if wrong is None and name in ("at_once", "classes"):  # the default
            continue
        with pytest.raises(TypeError, match=f"^{name.split()[0]} must be a whole number, an int"):
            use(wrong)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=r"at least \d|must be between 1 and"):
            use(wrong)
    expected = jax.tree.map(np.asarray, use(2))
    for right in (np.int64(2), np.uint8(2), jnp.array(2)):
        jax.tree.map(np.testing.assert_array_equal, use(right), expected)


def test_a_float_is_not_remembered():
    for _ in range(2):
        with pytest.raises(TypeError, match="k must be a whole number"):
            ja.top_k(index(), QUERIES, k=5.0)
        assert ja.top_k(index(), QUERIES, k=5).ids.shape == (3, 5)
