"""What a build will take, known before it begins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr.features import featurizer as featurizer_lib
from jaxattr.features import projections
from jaxattr.index import budgets
from jaxattr.inputs.traces import activation_bytes
from tests import models

TRAIN = models.data(200, features=64, dtype=jnp.float32)
PARAMS = models.mlp_params(sizes=(64, 128, 128, 3), dtype=jnp.float32)
METHOD = ja.tracin(models.loss, projection=projections.identity())
FEATURES = sum(x.size for x in jax.tree.leaves(PARAMS))


def test_bytes_are_those_of_the_arrays():
    checkpoints = [PARAMS, jax.tree.map(jnp.copy, PARAMS)]
    plan = ja.plan(METHOD, checkpoints, TRAIN, batch_size=64)
    index = ja.build_index(METHOD, checkpoints, TRAIN, batch_size=64)
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


def test_activations_are_counted_in_loops_and_branches():
    def run(x):
        def turn(carry, _):
            return jnp.tanh(carry), None

        y = jax.lax.scan(turn, x * 2, None, length=5)[0]  # 1 + 5 arrays
        return jax.lax.cond(y.sum() > 0, lambda y: y + y * y, lambda y: y, y)  # 2 arrays, scalars

    x = jnp.ones(1000, jnp.float32)
    found = activation_bytes(jax.make_jaxpr(run)(x).jaxpr)
    assert 8 * 4000 <= found <= 8 * 4000 + 100


@pytest.mark.parametrize("vocabulary", [100, 8000])
def test_the_default_microbatch_leaves_room_for_activations(vocabulary, monkeypatch):
    """A step needs at most what it was to have, and no more than a training step by 1.3."""
    width, length, room = 16, 32, 1 << 26
    monkeypatch.setattr(featurizer_lib, "_ROOM_OF_HOST", room)
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "embed": jax.random.normal(keys[0], (vocabulary, width), jnp.float32),
        "head": jax.random.normal(keys[1], (width, vocabulary), jnp.float32),
    }

    def loss(params, example, key):
        del key
        logits = jnp.tanh(params["embed"][example[:-1]]) @ params["head"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), example[1:, None], axis=1).sum()

    train = np.zeros((256, length + 1), np.int32)
    found = ja.plan(ja.logra(loss, rank=8), params, train)
    assert found.microbatch == 256 if vocabulary == 100 else found.microbatch < 64
    features = 4 * 256 * found.features
    assert found.step_bytes <= room + 2 * features

    def training_step(params, batch):
        each = jax.vmap(loss, in_axes=(None, 0, None))(params, batch, None)
        return each.sum()

    analysis = jax.jit(jax.grad(training_step)).lower(params, train).compile().memory_analysis()
    training = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    # In the small one the projected sides weigh as much as the logits.
    assert found.step_bytes <= (2.2 if vocabulary == 100 else 0.5) * training + 2 * features
