"""What a build will take, known before it begins."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jaxattr as ja
from jaxattr.features import projections
from jaxattr.index import budgets
from tests import models

TRAIN = models.data(200, features=64, dtype=jnp.float32)
PARAMS = models.mlp_params(sizes=(64, 128, 128, 3), dtype=jnp.float32)
METHOD = ja.tracin(models.loss, projection=projections.identity())
FEATURES = sum(x.size for x in jax.tree.leaves(PARAMS))


def test_bytes_are_those_of_the_arrays():
    plan = ja.plan(METHOD, [PARAMS, PARAMS], TRAIN, batch_size=64)
    index = ja.build_index(METHOD, [PARAMS, PARAMS], TRAIN, batch_size=64)
    assert plan.index_bytes == sum(x.nbytes for x in index.rows.arrays.values())
    assert plan.params_bytes == 2 * sum(x.nbytes for x in jax.tree.leaves(PARAMS))
    assert (plan.examples, plan.blocks, plan.block, plan.features) == (200, 4, 64, FEATURES)
    assert plan.statistics_bytes == 0 and plan.flops > 0
    for part in ("200 examples x 2 checkpoints", "4 blocks of 64 examples", "index"):
        assert part in str(plan)


def test_disk_and_meshes_in_the_plan(tmp_path):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    trak = ja.trak(models.margin, projection=projections.rademacher(50))
    plan = ja.plan(trak, PARAMS, TRAIN, mesh=mesh, on_disk=True, dtype=jnp.bfloat16, batch_size=64)
    assert plan.shards == 4 and plan.microbatch == 16
    assert plan.statistics_bytes == 3 * 50 * 50 * 4
    # Features twice while building; the digests of two arrays.
    assert plan.index_bytes == 200 * (2 * 150 * 2 + 2 * 4 + (3 + 2) * 4 + 2 * 2 * 4)
    assert plan.device_bytes == plan.params_bytes + plan.step_bytes + plan.statistics_bytes
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    assert ja.plan(METHOD, shapes, TRAIN).params_bytes == plan.params_bytes


def test_the_microbatch_is_the_largest_that_fits():
    method = ja.tracin(models.loss, projection=projections.sjlt(20, nonzeros=1))
    planned = functools.partial(ja.plan, method, PARAMS, TRAIN, batch_size=32)
    small, large = (planned(microbatch=m).device_bytes for m in (2, 32))
    memory = (small + large) // 2
    plan = planned(memory=memory)
    assert 2 < plan.microbatch < 32 and plan.device_bytes <= memory
    above = planned(microbatch=2 * plan.microbatch)
    assert above.device_bytes > memory
    index = ja.build_index(method, PARAMS, TRAIN, batch_size=32, memory=memory)
    assert index.featurizer.microbatch == plan.microbatch


def test_what_cannot_fit_is_refused_with_the_amounts():
    with pytest.raises(
        ValueError, match="(?s)does not fit 1e.03 KiB .*Needed:.*parameters .*path="
    ):
        ja.build_index(METHOD, PARAMS, TRAIN, memory=1_024_000)
    with pytest.raises(ValueError, match="Give microbatch or memory, not both"):
        ja.plan(METHOD, PARAMS, TRAIN, memory=1 << 30, microbatch=3)


def test_an_index_larger_than_the_device_is_refused(monkeypatch):
    class Small:
        device_kind = "a small device"

        def memory_stats(self):
            return {"bytes_limit": 1000}

    monkeypatch.setattr(budgets.jax, "local_devices", lambda: [Small()])
    with pytest.raises(ValueError, match="needs .* MiB per device, and a small device has 1e.03 B"):
        ja.build_index(METHOD, PARAMS, TRAIN)


@pytest.mark.parametrize("method", [
    ja.ekfac(models.loss), ja.logra(models.loss, rank=4),
    ja.influence(models.loss, damping=ja.absolute(1.0), solver="cg"),
], ids=lambda m: m.name)  # fmt: skip
def test_plans_of_other_methods(method):
    plan = ja.plan(method, PARAMS, TRAIN)
    assert plan.step_bytes > 0 and plan.index_bytes > 0
