"""Models, data and indexes that the tests of methods with curvature share."""

import functools

import jax
import jax.numpy as jnp
import optax

import jaxattr as ja
from jaxattr.features import projections
from tests import models

PARAMS = models.mlp_params()


TRAIN, QUERIES = models.data(20), models.data(4, seed=1)


EXACT = projections.identity()


FEW = functools.partial(ja.build_index, batch_size=7)


def adam_state(params=PARAMS):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for row in range(3):
        gradient = models.gradient(params, jax.tree.map(lambda x, r=row: x[r], TRAIN), None)
        _, state = update(gradient, state)
    return state


def rank_one_moments():
    def moments(leaf):
        if leaf.ndim == 1:
            return jnp.arange(1.0, leaf.size + 1) / 50
        rows, columns = (jnp.arange(1.0, n + 1) for n in leaf.shape)
        return rows[:, None] * columns[None] / 50

    return optax.ScaleByRmsState(nu=jax.tree.map(moments, PARAMS))


METHODS = {
    "LoGRA": lambda: ja.logra(models.loss, rank=4),
    "LoGRA-PCA": lambda: ja.logra(models.loss, rank=4, basis="pca"),
    "K-FAC": lambda: ja.kfac(models.loss),
    "EK-FAC": lambda: ja.ekfac(models.loss),
    "EK-FAC, true": lambda: ja.ekfac(models.loss, fisher="true", sample=sampled),
    "EShampoo": lambda: ja.eshampoo(models.loss),
    "EShampoo, true": lambda: ja.eshampoo(models.loss, fisher="true", sample=sampled),
    "TrackStar": lambda: ja.trackstar(models.loss, adam_state(), PARAMS, rank=4, queries=QUERIES),
    "Influence": lambda: ja.influence(models.loss, damping=ja.absolute(0.5)),
    "CG": lambda: ja.influence(models.loss, damping=ja.absolute(0.5), solver="cg", tolerance=1e-9),
    "DataInf": lambda: ja.data_inf(models.loss),
}


def sampled(params, example, key):
    return example | {"y": jax.random.categorical(key, models.mlp(params, example["x"]))}


@functools.cache
def method_of(name):
    """One method per name: what is compiled for it is compiled once."""
    return METHODS[name]()


@functools.cache
def index_of(name):
    return FEW(method_of(name), PARAMS, TRAIN)
