"""Tiny models and data that several tests share."""

import contextlib

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxattr.scores import ranking, scoring

CLASSES = 3


def mlp_params(key=None, sizes=(6, 7, 5, CLASSES), dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0) if key is None else key, len(sizes))
    return {
        f"layer{i}": {
            "kernel": jax.random.normal(keys[i], (a, b), dtype) / a**0.5,
            "bias": jax.random.normal(jax.random.fold_in(keys[i], 1), (b,), dtype),
        }
        for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    }


def mlp(params, x):
    for i in range(len(params)):
        x = x @ params[f"layer{i}"]["kernel"] + params[f"layer{i}"]["bias"]
        x = jnp.tanh(x) if i < len(params) - 1 else x
    return x


def margin_of(logits, label):
    others = jnp.where(jnp.arange(logits.shape[0]) == label, -jnp.inf, logits)
    return logits[label] - jax.nn.logsumexp(others)


def loss(params, example, key):
    del key
    return optax.softmax_cross_entropy_with_integer_labels(mlp(params, example["x"]), example["y"])


gradient = jax.jit(jax.grad(loss))
"""Of one example. Without `jit` each of its operations is a program that is compiled."""


def margin(params, example, key):
    del key
    return margin_of(mlp(params, example["x"]), example["y"])


def data(n, seed=0, features=6, dtype=jnp.float64):
    x_key, y_key = jax.random.split(jax.random.key(seed))
    return {
        "x": jax.random.normal(x_key, (n, features), dtype),
        "y": jax.random.randint(y_key, (n,), 0, CLASSES),
    }


def one(batch):
    return jax.tree.map(lambda x: x[0], batch)


def relative_error(got, expected):
    return float(jnp.abs(jnp.asarray(got) - expected).max() / jnp.abs(expected).max())


@contextlib.contextmanager
def compilations():
    """Counts the programs that are compiled meanwhile: call what it gives."""
    found = []

    def note(event, duration, **kwargs):
        del duration, kwargs
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield lambda: len(found)
    jax.monitoring.unregister_event_duration_listener(note)


@contextlib.contextmanager
def slabs_of(rows):
    """Within this, so many training examples are scored at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "SLAB", rows)
        patch.setattr(ranking, "_WHOLE", 0)
        yield
