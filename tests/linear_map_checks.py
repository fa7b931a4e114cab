"""What every test of linear maps compares: factored gradients against those of `jax.grad`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr import linear_maps
from jaxattr.leaves import leaf_names

EXACT = 1e-12


# These programs run once, on a handful of numbers: compiling them well takes longest of all.
jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def by_name(tree):
    return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def assert_close(got, expected, name, tolerance=EXACT):
    got, expected = np.asarray(got, float), np.asarray(expected, float)
    assert got.shape == expected.shape, name
    scale = np.abs(expected).max()
    assert scale > 0, f"{name}: nothing to compare"
    assert np.abs(got - expected).max() <= tolerance * scale, name


def random_bases(maps, rank=3):
    """Random A and B of different ranks, the bias included."""
    bases = {}
    for seed, (leaf, m) in enumerate(maps.items()):
        lead = () if m.stack is None else (m.stack,)
        rows = m.size_in + (m.bias is not None)
        a = normal(2 * seed, *lead, rows, rank).astype(m.dtype)
        b = normal(2 * seed + 1, *lead, m.size_out, rank - 1).astype(m.dtype)
        bases[leaf] = a, b
    return bases


def zeros(found, bases):
    """A Z for a rewritten loss."""
    z = {}
    for leaf, (a, b) in bases.items():
        m = found.maps[leaf]
        left = m.size_in if a is None else a.shape[-1]
        right = m.size_out if b is None else b.shape[-1]
        lead = () if m.stack is None else (m.stack,)
        z[leaf] = jnp.zeros((*lead, left, right), jnp.promote_types(jnp.float32, m.dtype))
    return z


def exact_matrices(found, grads):
    """The oracle: {leaf: matrix of the exact gradient}, the bias's as its last row."""
    grads = by_name(grads)
    return {
        leaf: linear_maps.matrix(m, grads[leaf], None if m.bias is None else grads[m.bias])
        for leaf, m in found.maps.items()
    }


def summed(linear_map, captured):
    """The gradients that captured factors stand for, the bias's as last row."""
    total = 0.0
    for inputs, cotangents, _ in captured:
        inputs, cotangents = np.asarray(inputs), np.asarray(cotangents)
        if np.issubdtype(inputs.dtype, np.integer):
            inputs = np.eye(linear_map.size_in + 1)[inputs][..., :-1]
        if linear_map.bias is not None:
            inputs = np.concatenate([inputs, np.ones_like(inputs[..., :1])], -1)
        total += np.swapaxes(inputs, -1, -2) @ cotangents
    return total


def check(loss, params, batch, keys=None, tolerance=EXACT):
    """Holds bottleneck and capture against `vmap(grad)`; returns what was found."""
    example, key = jax.tree.map(lambda x: x[0], (batch, keys))
    found = linear_maps.find(loss, params, example, key)
    biases = [m.bias for m in found.maps.values() if m.bias is not None]
    assert sorted([*found.maps, *found.exact, *biases]) == sorted(leaf_names(params))
    assert all(found.exact.values())
    rewritten = linear_maps.bottleneck(loss, params, example, key)
    capture = linear_maps.capture(loss, params, example, key)

    def one(params, bases, z, example, key):
        value, grads = jax.value_and_grad(loss)(params, example, key)
        rewritten_value, projected = jax.value_and_grad(rewritten, argnums=2)(
            params, bases, z, example, key
        )
        captured = capture(params, example, key)
        return value, rewritten_value, exact_matrices(found, grads), projected, captured

    bases = random_bases(found.maps)
    axes = (None, None, None, 0, None if keys is None else 0)
    value, rewritten_value, exact, projected, captured = jit(jax.vmap(one, axes))(
        params, bases, zeros(found, bases), batch, keys
    )
    assert_close(rewritten_value, value, "loss", tolerance)
    assert set(projected) == set(captured) == set(found.maps)
    for leaf, m in found.maps.items():
        a, b = bases[leaf]
        expected = np.swapaxes(a, -1, -2)[None] @ np.asarray(exact[leaf]) @ b[None]
        assert_close(projected[leaf], expected, leaf, tolerance)
        assert len(captured[leaf]) == m.uses
        assert_close(summed(m, captured[leaf]), exact[leaf], leaf, tolerance)
    return found


def case_batch():
    return {
        "x": normal(10, 3, 4, 6),
        "ids": jnp.array([[0, 2, 2, 5], [6, 1, 0, 3], [4, 4, 4, 2]]),
        "image": normal(11, 3, 5, 5, 4),
    }
