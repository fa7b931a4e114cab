"""The store of the page on the code: what is built in it, and asked of it, is the same."""

import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jaxattr as ja
from jaxattr.index import building
from tests import models
from tests.pages import ROOT

HostRows = runpy.run_path(str(ROOT / "docs" / "scripts" / "host_rows.py"))["HostRows"]
TRAIN, QUERIES = models.data(37), models.data(5, seed=1)
CHECKPOINTS = [models.mlp_params(jax.random.key(seed)) for seed in range(2)]
MESH = {"mesh": Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))}
CASES = {
    "as it is": (ja.grad_cos(models.loss), {}),
    "a kernel, in one byte": (ja.logra(models.loss, rank=3), {"dtype": jnp.int8}),
    "solved, on a mesh": (
        ja.influence(models.loss, damping=ja.absolute(1.0), solver="cg"), MESH,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_index_in_rows_of_ones_own_is_the_same(name, monkeypatch):
    method, options = CASES[name]
    stored = ja.build_index(method, CHECKPOINTS, TRAIN, batch_size=8, **options)
    monkeypatch.setattr(building, "MemoryRows", HostRows)  # where `build_index` chooses
    own = ja.build_index(method, CHECKPOINTS, TRAIN, batch_size=8, **options)
    assert isinstance(own.rows, HostRows)
    np.testing.assert_array_equal(own.features, stored.features)
    np.testing.assert_array_equal(ja.self_influence(own), ja.self_influence(stored))
    same = dict(rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(ja.score(own, QUERIES), ja.score(stored, QUERIES), **same)
    among = ja.top_k(stored, QUERIES, k=6).ids
    for rows, asked in ((8192, {}), (8, {}), (8192, {"among": among})):
        with models.slabs_of(rows):
            tops = [ja.top_k(index, QUERIES, k=4, **asked) for index in (own, stored)]
        np.testing.assert_array_equal(tops[0].ids, tops[1].ids)
        np.testing.assert_allclose(tops[0].scores, tops[1].scores, **same)
