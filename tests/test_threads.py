"""Linear algebra on the host leaves other work its cores."""

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
    return {each["num_threads"] for each in threadpoolctl.threadpool_info()}


def test_results_are_in_order_and_each_is_of_one_thread():
    with threadpoolctl.threadpool_limits(2):
        before = threads()
        assert side_by_side(lambda n: (n, threads()), range(20)) == [(n, {1}) for n in range(20)]
        assert threads() == before == {2}


def test_the_first_error_is_raised():
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda n: 1 / n, [1, 0])


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
