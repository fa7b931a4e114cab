"""What travels between host and device, and how often: on a GPU that is what takes long."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr.fitting import passes
from jaxattr.index import building
from jaxattr.index.queries import state_of
from tests import models
from tests.stored import Interrupted

TRAIN, QUERIES = models.data(53), models.data(6, seed=1)
ON_HOST = [jax.tree.map(np.asarray, models.mlp_params(jax.random.key(seed))) for seed in range(2)]
TRACIN = ja.tracin(models.loss, projection=ja.projections.identity())


def on_device(tree):
    return all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree))


def test_parameters_and_batches_of_numpy_are_sent_once(monkeypatch):
    """Each program would send its own: of 390 blocks and GPT-2's parameters 195 GB."""
    seen, clean = [], passes.TrainingPass._clean

    def looked_at(self, given, drawn, fitted):
        seen.append((self.params, given.batch))
        return clean(self, given, drawn, fitted)

    monkeypatch.setattr(passes.TrainingPass, "_clean", looked_at)
    index = ja.build_index(TRACIN, ON_HOST, TRAIN, batch_size=16)
    assert len(seen) == 8 and on_device(seen)
    assert len({id(params["layer0"]["kernel"]) for params, _ in seen}) == 2
    assert not on_device(index.checkpoints[0])  # of many checkpoints one at a time
    assert on_device(state_of(index).checkpoints)
    given = ja.build_index(TRACIN, jax.tree.map(jnp.asarray, ON_HOST), TRAIN, batch_size=16)
    np.testing.assert_array_equal(ja.score(index, QUERIES), ja.score(given, QUERIES))


@pytest.mark.parametrize("function", [ja.score, ja.contributions])
def test_scores_stay_on_the_device(function, monkeypatch):
    """Of 256 queries and 100,000 examples a copy to the host takes longer than the scores do."""
    index = ja.build_index(TRACIN, ON_HOST, TRAIN)
    phi, copied, asarray = ja.query_features(index, QUERIES), [], np.asarray

    def copying(x, *arguments, **options):
        copied.append(np.size(x))
        return asarray(x, *arguments, **options)

    monkeypatch.setattr(np, "asarray", copying)
    function(index, phi)
    assert copied and max(copied) < 6 * 53


def test_a_kernel_that_asks_for_rows_group_by_group_makes_them_once():
    source = Interrupted()
    method = ja.data_inf(models.loss)
    kept, anew = (
        ja.build_index(method, ON_HOST[0], source, batch_size=16, store=store)
        for store in (True, False)
    )
    first = source.read.count(0)
    ja.build_index(method, ON_HOST[0], source, batch_size=16, store=False)
    assert len(kept.layout.names) == 3
    # The statistics' pass, one for the rows of all groups, and a look at an example or two.
    assert source.read.count(0) - first <= 5
    np.testing.assert_allclose(ja.score(anew, QUERIES), ja.score(kept, QUERIES), rtol=1e-9)


def test_operators_that_queries_do_not_need_are_let_go(monkeypatch):
    """A dual Gram matrix is as large as the index, for each checkpoint."""
    found, build = [], building.build_checkpoint

    def built(*arguments):
        found.append(build(*arguments))
        return found[-1]

    monkeypatch.setattr(building, "build_checkpoint", built)
    ja.build_index(ja.trak(models.margin), ON_HOST, TRAIN)
    assert [each.operator for each in found] == [None, None]


@pytest.mark.parametrize("kind", ["to disk", "int8"])
def test_scores_that_would_fill_the_memory_are_made_in_parts(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxattr.scores.scoring.SLAB", 16)
    dtype = jnp.int8 if kind == "int8" else None
    index = ja.build_index(TRACIN, ON_HOST, TRAIN, batch_size=16, dtype=dtype)
    expected, asked, slabs = ja.score(index, QUERIES), [], type(index.rows).slabs

    def counted(self, names, rows, checkpoint=None):
        asked.append(rows)
        return slabs(self, names, rows, checkpoint)

    monkeypatch.setattr(type(index.rows), "slabs", counted)
    if kind == "to disk":
        found = ja.score(index, QUERIES, path=tmp_path / "scores")[:].read().result()
    else:
        found = ja.score(index, QUERIES)
    assert asked == [16]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
