"""Linear algebra on the host leaves other work its cores."""

import os
import threading
import time

import jax
import numpy as np
import optax
import pytest
import scipy.linalg
import threadpoolctl

import jaxattr as ja
from jaxattr.threads import side_by_side
from tests import models

TRAIN, PARAMS = models.data(40), models.mlp_params()
ADAM = optax.adam(1e-3).update(PARAMS, optax.adam(1e-3).init(PARAMS))[1]


def threads():
    found = threadpoolctl.threadpool_info()
    return {each["num_threads"] for each in found if each["user_api"] == "blas"}


def test_results_are_in_order_and_each_is_of_one_thread():
    with threadpoolctl.threadpool_limits(2):
        before = threads()
        assert side_by_side(lambda n: (n, threads()), range(20)) == [(n, {1}) for n in range(20)]
        assert threads() == before == {2}


def test_items_are_taken_by_the_caller_as_they_are_needed(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    done, ahead = [], []

    def items():
        for n in range(20):
            ahead.append(n - len(done))
            yield n, threading.get_ident()

    found = side_by_side(lambda item: done.append(item) or item, items())
    assert found == [(n, threading.get_ident()) for n in range(20)]
    assert max(ahead) <= 2


def test_the_error_of_the_first_item_is_raised_and_the_limit_left():
    def failing(n):
        time.sleep(0.1 if n == 1 else 0)
        raise ValueError(f"item {n}")

    with threadpoolctl.threadpool_limits(2):
        with pytest.raises(ValueError, match="item 1"):
            side_by_side(failing, [1, 2])
        assert threads() == {2}


def test_callers_in_several_threads_wait_for_each_other_and_leave_what_was():
    found = []

    def caller():
        for _ in range(20):
            found.extend(side_by_side(lambda _: threads(), range(3)))

    before = threads()
    callers = [threading.Thread(target=caller) for _ in range(3)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    assert found == [{1}] * 180 and threads() == before


@pytest.mark.parametrize(
    ("where", "name", "method"),
    [
        (np.linalg, "eigh", ja.ekfac(models.loss, rank=8)),
        (np.linalg, "eigh", ja.trackstar(models.loss, ADAM, PARAMS, rank=2)),
        (np.linalg, "eigh", ja.influence(models.loss, damping=ja.absolute(10.0))),
        (scipy.linalg, "cholesky", ja.trak(models.loss, projection=ja.projections.rademacher(4))),
    ],
    ids=["ekfac", "trackstar", "influence", "trak"],
)
def test_factorisations_keep_to_one_thread(monkeypatch, where, name, method):
    """With more, they waited for another process at every column: 57 s for 0.6."""
    found, original = [], getattr(where, name)

    def watched(*arguments, **options):
        found.append(threads())
        return original(*arguments, **options)

    monkeypatch.setattr(where, name, watched)
    with threadpoolctl.threadpool_limits(2):
        jax.block_until_ready(ja.build_index(method, PARAMS, TRAIN).features)
    assert found and set.union(*found) == {1}


@pytest.mark.parametrize("dense", [False, True])
def test_blocks_of_a_gram_matrix_are_inverted_side_by_side_and_a_single_one_here(
    monkeypatch, dense
):
    callers, original = [], scipy.linalg.cho_solve

    def watched(*arguments, **options):
        callers.append((threading.current_thread() is threading.main_thread(), *threads()))
        return original(*arguments, **options)

    monkeypatch.setattr(scipy.linalg, "cho_solve", watched)
    with threadpoolctl.threadpool_limits(2):
        projection = ja.projections.rademacher(4)
        method = ja.trak(models.loss, projection=projection, dense=dense)
        jax.block_until_ready(ja.build_index(method, PARAMS, TRAIN).features)
    assert set(callers) == {(dense, 2 if dense else 1)}
