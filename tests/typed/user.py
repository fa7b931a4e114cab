"""A user's script, as a type checker sees it: `mypy --strict` and `pyright` must pass."""

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxattr as ja

params = {"w": jnp.ones((4, 2))}
train = {"x": np.zeros((40, 4), np.float32)}


def loss(params: Any, example: Any, key: jax.Array) -> jax.Array:
    """The squared size of an output."""
    return jnp.sum((example["x"] @ params["w"]) ** 2)


method: ja.Method = ja.tracin(loss, projection=ja.projections.two_sided(4))
described: str = str(ja.describe(method, params, jax.tree.map(lambda x: x[0], train)))
index: ja.Index = ja.build_index(method, params, train, groups=ja.by_layer(exclude="bias"))
layout = ja.by_layer(params)
names: tuple[str, ...] = layout.names

fit = ja.learn_weights(index, train, steps=2)
weights: dict[str, float] = fit.weights
assert_type(ja.score(index, train, weights=fit), jax.Array)
ids: jax.Array = ja.top_k(index, train, k=3, weights={"w": 1.0}).ids
selves: jax.Array = ja.self_influence(index, weights=weights)
attribute = ja.attributor(index, k=3)
best: jax.Array = attribute(train).scores


def start(key: jax.Array) -> Any:
    """Parameters to begin with."""
    return params


train_fn = ja.trainer(loss, start, train, optimizer=optax.adam(1e-2), batch_size=4, epochs=1)
exact: np.ndarray = ja.unroll(train_fn.run(jax.random.key(0)), loss, train)
outcomes: ja.Outcomes = ja.outcomes(train_fn, loss, train, 40, key=jax.random.key(0), models=8)
measured = ja.lds(np.zeros((40, 40)), outcomes.masks, outcomes.outputs)
mean: float = measured.mean
