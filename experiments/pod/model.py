"""A small Llama in `flax.nnx`: scanned and recomputed layers, parameters spread over a mesh.

Its layers are one stack, [depth, ...] per parameter, as models of many layers are written: compiled
once, and their activations computed anew in the backward pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxattr import language
from jaxattr.sharding import DATA, MODEL
from jaxattr.typing import Example, OutputFn, Params

VOCABULARY, WIDTH, DEPTH, HEADS = 64, 32, 2, 4
STEPS, BATCH = 40, 32

# Which axes of a matrix [inputs, outputs] go where: what comes out of the first is spread over
# `model`, and what goes into the second; so each pair needs one sum over `model`.
INTO, OUT_OF = (DATA, MODEL), (MODEL, DATA)
PLACES = {
    "query": INTO, "key": INTO, "value": INTO, "gate": INTO, "up": INTO, "head": INTO,
    "out": OUT_OF, "down": OUT_OF, "embed": OUT_OF,
}  # fmt: skip


class TrainState(NamedTuple):
    """What a training job saves.

    Attributes:
      params: the parameters.
      optimizer: the state of the optimizer.
      step: how many steps were taken.
    """

    params: Params
    optimizer: Any
    step: jax.Array


class Types(NamedTuple):
    """Types of numbers.

    Attributes:
      dtype: of activations.
      param_dtype: of parameters.
    """

    dtype: str
    param_dtype: str


class Block(nnx.Module):
    """RMSNorm, rotary attention, and a gated feed-forward; no biases."""

    def __init__(self, types: Types, *, rngs: nnx.Rngs):
        def dense(size_in: int, size_out: int) -> nnx.Linear:
            return nnx.Linear(size_in, size_out, use_bias=False, rngs=rngs, **types._asdict())

        self.norm1, self.norm2 = _norm(types, rngs), _norm(types, rngs)
        self.query, self.key = dense(WIDTH, WIDTH), dense(WIDTH, WIDTH)
        self.value, self.out = dense(WIDTH, WIDTH), dense(WIDTH, WIDTH)
        self.gate, self.up = dense(WIDTH, 2 * WIDTH), dense(WIDTH, 2 * WIDTH)
        self.down = dense(2 * WIDTH, WIDTH)

    def __call__(self, x: jax.Array, row: Example) -> jax.Array:
        """Maps [t, width] to [t, width]."""
        t, width = x.shape
        seen, positions = self.norm1(x), row["positions"]
        q = _rotated(self.query(seen).reshape(t, HEADS, -1), positions)
        k = _rotated(self.key(seen).reshape(t, HEADS, -1), positions)
        v = self.value(seen).reshape(t, HEADS, -1)
        together = row["segments"][:, None] == row["segments"]
        attended = jax.nn.dot_product_attention(q, k, v, mask=together[None], is_causal=True)
        x = x + self.out(attended.reshape(t, width))
        seen = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(seen)) * self.up(seen))


class Llama(nnx.Module):
    """A small Llama on packed rows, which keeps their documents apart."""

    def __init__(self, types: Types, *, rngs: nnx.Rngs):
        given = types._asdict()
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs, **given)

        @nnx.split_rngs(splits=DEPTH)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs: nnx.Rngs) -> Block:
            return Block(types, rngs=rngs)

        self.blocks = blocks(rngs)
        self.norm = _norm(types, rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs, **given)

    def __call__(self, row: Example) -> jax.Array:
        """Maps a row of t tokens to logits [t, vocabulary]."""

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def through(block: Block, x: jax.Array) -> jax.Array:
            return block(x, row)

        return self.head(self.norm(through(self.blocks, self.embed(row["inputs"]))))


class Subject(NamedTuple):
    """A model as a function.

    Attributes:
      loss: of a packed row.
      start: makes the state before training.
    """

    loss: OutputFn
    start: Callable[[], TrainState]


def make(types: Types) -> Subject:
    """Makes the model; no parameter is in memory before `start` is called.

    Args:
      types: of its numbers.

    Returns:
      Its loss, and how its training starts.
    """

    def split() -> Any:
        return nnx.split(Llama(types, rngs=nnx.Rngs(0)), nnx.Param, ...)

    graph, _, rest = nnx.eval_shape(split)

    def logits(params: Params, row: Example) -> jax.Array:
        return nnx.merge(graph, nnx.State(params), rest)(row)

    def start() -> TrainState:
        params = nnx.to_pure_dict(split()[1])
        return TrainState(params, _OPTIMIZER.init(params), jnp.zeros((), jnp.int32))

    return Subject(language.loss(logits), start)


def trained(subject: Subject, rows: language.Rows) -> TrainState:
    """Takes a few steps of training.

    Args:
      subject: the model.
      rows: packed rows.

    Returns:
      The state after them.
    """

    def mean(params: Params, batch: Any) -> jax.Array:
        return jax.vmap(subject.loss, (None, 0, None))(params, batch, jax.random.key(0)).mean()

    @jax.jit
    def step(state: TrainState, batch: Any) -> TrainState:
        gradient = jax.grad(mean)(state.params, batch)
        change, optimizer = _OPTIMIZER.update(gradient, state.optimizer, state.params)
        return TrainState(optax.apply_updates(state.params, change), optimizer, state.step + 1)

    state, numbers = subject.start(), np.random.default_rng(0)
    for _ in range(STEPS):
        chosen = numbers.choice(len(rows["inputs"]), BATCH)
        state = step(state, {name: column[chosen] for name, column in rows.items()})
    return state


def places(state: TrainState, mesh: Mesh | None) -> TrainState:
    """Says where a job has each array of a state: over `data` (FSDP) and over `model` (tensor).

    Args:
      state: a state, or its shapes.
      mesh: with axes "data" and "model"; or None, for the default device.

    Returns:
      Shapes with shardings, to restore a checkpoint into.
    """

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        if mesh is None:
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        names = [str(getattr(part, "key", "")) for part in path]
        axes = next((PLACES[name] for name in names if name in PLACES), ())
        spread = NamedSharding(mesh, PartitionSpec(*(None,) * (leaf.ndim - len(axes)), *axes))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spread)

    return jax.tree_util.tree_map_with_path(place, state)


_OPTIMIZER = optax.adamw(3e-3)


def _norm(types: Types, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(WIDTH, rngs=rngs, **types._asdict())


def _rotated(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Turns pairs of numbers of [t, heads, each] by their position within the document."""
    each = x.shape[-1]
    angles = positions[:, None] / 10_000 ** (jnp.arange(0, each, 2) / each)
    cos, sin = (f(angles)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
