"""The settings that people debug with change nothing but speed."""

import contextlib
import functools

import jax
import numpy as np
import pytest

import jaxattr as ja
from jaxattr.features import projections
from tests import models

PARAMS, TRAIN, QUERIES = models.mlp_params(), models.data(13), models.data(4, seed=1)
WEIGHTS = {"layer0": 0.5, "layer1": 2.0, "layer2": 0.5}
METHODS = {
    "tracin": ja.tracin(models.loss, projection=projections.rademacher(8)),
    "trak": ja.trak(models.margin, projection=projections.rademacher(8)),
    "ekfac": ja.ekfac(models.loss, mask=lambda example: example["y"][None] >= 0),
}


@contextlib.contextmanager
def all_that_raise():
    """Settings that end in an error or change nothing: at once, since each compiles all anew."""
    with jax.debug_nans(True), jax.numpy_dtype_promotion("strict"):
        yield


MODES = {
    "debug_nans, strict promotion": all_that_raise,
    "checking_leaks": jax.checking_leaks,
    "disable_jit": jax.disable_jit,
}


def scores(method):
    index = ja.build_index(method, PARAMS, TRAIN, batch_size=8)
    features = ja.query_features(index, QUERIES)
    with models.slabs_of(8):
        top = ja.top_k(index, features, k=5, weights=WEIGHTS)
    return {
        "scores": ja.score(index, features),
        "weighted": ja.score(index, features, weights=WEIGHTS),
        "ids": top.ids,
        "top": top.scores,
        "self": ja.self_influence(index),
        "attributed": ja.attributor(index, k=5, weights=WEIGHTS)(QUERIES).scores,
    }


def weights(method):
    index = ja.build_index(method, PARAMS, TRAIN, batch_size=8)
    fit = ja.learn_weights(index, QUERIES, steps=3, top_k=4)
    return {"weights": np.array([fit.weights[name] for name in index.layout.names])}


def from_outcomes(method):
    index = ja.build_index(method, PARAMS, TRAIN, batch_size=8)
    masks = ja.evaluation.random_subsets(jax.random.key(0), 13, 9, fraction=0.25)
    outcomes = ja.Outcomes(masks, masks @ np.random.default_rng(0).normal(size=(13, 4)))
    with pytest.MonkeyPatch.context() as patch:  # without compilation each fit is slow
        patch.setattr("jaxattr.weights.outcome_fits.PULLS", (0.1, 0.032))
        fit = ja.learn_weights(index, QUERIES, outcomes=outcomes, steps=1)
    return {"weights": np.array([fit.weights[name] for name in index.layout.names])}


OUTCOMES = "weights from outcomes"
PARTS = {"scores": scores, "weights": weights, OUTCOMES: from_outcomes}


@functools.cache
def expected(part, name):
    return PARTS[part](METHODS[name])


# What is fitted to outcomes is the same for all methods, and without compilation slow.
CASES = [(name, part) for name in METHODS for part in PARTS if part != OUTCOMES or name == "trak"]


# Where all is traced again, or each operation is a program, of each part one method.
SLOW = ("checking_leaks", "disable_jit")
FEW = {("ekfac", "scores"), ("tracin", "weights"), ("trak", OUTCOMES)}
RUNS = [
    pytest.param(mode, *case, marks=[pytest.mark.slow] * (mode == "disable_jit"))
    for mode in MODES for case in CASES if mode not in SLOW or case in FEW
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::jaxattr.WeightWarning")
@pytest.mark.parametrize(("mode", "name", "part"), RUNS)
def test_debugging_changes_no_result(mode, name, part):
    plain = expected(part, name)
    if mode == "checking_leaks":
        jax.clear_caches()  # leaks are looked for while a function is traced
    with MODES[mode]():
        found = PARTS[part](METHODS[name])
    for what, value in plain.items():
        assert models.relative_error(found[what], value) <= 1e-9, what
