"""GPT-2 in `flax.nnx`, for one sequence: batches are for `vmap`, devices for `jit`.

Layers are one stack, scanned over and rematerialised, so that compilation and memory do not grow
with depth. Query, key and value are matrices of their own, so that each can have a weight.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    """Size of a GPT-2.

    Attributes:
      vocabulary: number of tokens.
      context: longest sequence.
      width: of the residual stream.
      depth: number of blocks.
      heads: of attention in each.
      dtype: what is computed in; parameters, attention weights and logits are float32.
      remat: computes each block again in the backward pass: memory does not grow with depth, for a
        third more arithmetic.
    """

    vocabulary: int
    context: int
    width: int
    depth: int
    heads: int
    dtype: Any = jnp.float32
    remat: bool = True

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(
                f"The width {self.width} must be a multiple of the {self.heads} heads."
            )


class Attention(nnx.Module):
    """Causal self-attention within segments."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.heads = config.heads
        linear = _linear(config, rngs)
        self.query, self.key, self.value = (linear(config.width, config.width) for _ in range(3))
        self.out = linear(config.width, config.width, residual=True)

    def __call__(self, x: jax.Array, visible: jax.Array) -> jax.Array:
        """Maps [t, width] to [t, width], where `visible` [t, t] says which positions see which."""
        t = x.shape[0]
        q, k, v = (f(x).reshape(t, self.heads, -1) for f in (self.query, self.key, self.value))
        scores = _wide(jnp.einsum("qhd,khd->hqk", q, k)) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(visible, scores, -1e30)).astype(x.dtype)
        return self.out(jnp.einsum("hqk,khd->qhd", weights, v).reshape(t, -1))


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        linear = _linear(config, rngs)
        self.norm1 = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.norm2 = _norm(config, rngs)
        self.up = linear(config.width, 4 * config.width)
        self.down = linear(4 * config.width, config.width, residual=True)

    def __call__(self, x: jax.Array, visible: jax.Array) -> jax.Array:
        """Maps [t, width] to [t, width]."""
        x = x + self.attention(self.norm1(x), visible)
        return x + self.down(nnx.gelu(self.up(self.norm2(x)), approximate=True))


class GPT2(nnx.Module):
    """GPT-2, whose embeddings also make the logits."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = _embed(config, config.vocabulary, 0.02, rngs)
        self.position = _embed(config, config.context, 0.01, rngs)

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.blocks = stack(rngs)
        self.norm = _norm(config, rngs)

    def __call__(
        self, ids: jax.Array, segments: jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
        """Computes logits.

        Args:
          ids: tokens, int [t].
          segments: documents are numbered, int [t]; tokens see only their own. Default: one.
          positions: of the tokens within their documents, int [t]. Default: 0, 1, ...

        Returns:
          Logits of the next tokens, float32 [t, vocabulary].
        """
        return self.embed.attend(self.hidden(ids, segments, positions))

    def hidden(
        self, ids: jax.Array, segments: jax.Array | None, positions: jax.Array | None
    ) -> jax.Array:
        """Computes what the logits are made of, float32 [t, width]."""
        t = ids.shape[0]
        positions = jnp.arange(t) if positions is None else positions
        visible = jnp.tril(jnp.ones((t, t), bool))
        if segments is not None:
            visible &= segments[:, None] == segments[None, :]
        x = (self.embed(ids) + self.position(positions)).astype(self.config.dtype)

        def through(block: Block, x: jax.Array) -> jax.Array:
            return block(x, visible)

        through = nnx.remat(through) if self.config.remat else through
        x = nnx.scan(through, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)
        return _wide(self.norm(x))


def initial(config: Config, key: jax.Array) -> dict[str, Any]:
    """Draws parameters as GPT-2 does.

    Args:
      config: the size.
      key: PRNG key.

    Returns:
      Nested dicts of float32 arrays.
    """
    return nnx.to_pure_dict(nnx.state(GPT2(config, rngs=nnx.Rngs(key)), nnx.Param))


def logits_fn(config: Config) -> Callable[[Any, Any], jax.Array]:
    """Makes the model a pure function.

    Args:
      config: the size.

    Returns:
      (params, example) -> logits [t, vocabulary], for an example with `inputs` and, if documents
      are packed, `segments` and `positions`.
    """
    return _pure(config, GPT2.__call__)


def hidden_fn(config: Config) -> Callable[[Any, Any], jax.Array]:
    """Makes the model's last activations a pure function.

    Args:
      config: the size.

    Returns:
      (params, example) -> activations [t, width], of examples as in `logits_fn`.
    """
    return _pure(config, GPT2.hidden)


def _pure(config: Config, method: Callable[..., jax.Array]) -> Callable[[Any, Any], jax.Array]:
    model = nnx.eval_shape(lambda: GPT2(config, rngs=nnx.Rngs(0)))
    graph, _, *rest = nnx.split(model, nnx.Param, ...)

    def apply(params: Any, example: Any) -> jax.Array:
        model = nnx.merge(graph, nnx.State(params), *rest)
        return method(model, example["inputs"], example.get("segments"), example.get("positions"))

    return apply


def _wide_dtype(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(_wide_dtype(x.dtype))


def _embed(config: Config, size: int, scale: float, rngs: nnx.Rngs) -> nnx.Embed:
    init, dtype = nnx.initializers.normal(scale), _wide_dtype(config.dtype)
    return nnx.Embed(size, config.width, embedding_init=init, dtype=dtype, rngs=rngs)


def _linear(config: Config, rngs: nnx.Rngs) -> Callable[..., nnx.Linear]:
    def make(size_in: int, size_out: int, *, residual: bool = False) -> nnx.Linear:
        scale = 0.02 / (2 * config.depth) ** 0.5 if residual else 0.02
        init = nnx.initializers.normal(scale)
        return nnx.Linear(size_in, size_out, kernel_init=init, dtype=config.dtype, rngs=rngs)

    return make


def _norm(config: Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.width, epsilon=1e-5, dtype=config.dtype, rngs=rngs)
