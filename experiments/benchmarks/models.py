"""Models of usual shape for benchmarks, in `flax.nnx`, as losses of ONE example."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxattr as ja
from jaxattr.typing import OutputFn


class Subject(NamedTuple):
    """A model to benchmark.

    Attributes:
      loss: of one example.
      params: the parameters.
      batch: examples, a pytree of arrays [b, ...].
    """

    loss: OutputFn
    params: Any
    batch: Any


class Embed(nnx.Module):
    """Rows of the type that the parameter has, where flax keeps to the one that it began with."""

    def __init__(self, size: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(size, width, rngs=rngs).embedding

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps ids [t] to [t, width]."""
        return self.embedding[...][ids]

    def attend(self, query: jax.Array) -> jax.Array:
        """Maps [t, width] to logits [t, vocabulary]."""
        return query @ self.embedding[...].T


class GPTBlock(nnx.Module):
    """A pre-norm transformer block; its four projections are dense layers."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [t, width] to [t, width]."""
        t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(t, 3, self.heads, -1).swapaxes(0, 1)
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(t, width))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    """A small GPT with tied embeddings."""

    def __init__(
        self, *, vocabulary: int, width: int, depth: int, length: int, heads: int, rngs: nnx.Rngs
    ):
        self.embed = Embed(vocabulary, width, rngs=rngs)
        self.position = Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([GPTBlock(width, heads, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps ids [t] to logits [t, vocabulary]."""
        x = self.embed(ids) + self.position(jnp.arange(ids.shape[0]))
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


class LlamaBlock(nnx.Module):
    """RMSNorm, rotary attention with grouped keys, and a gated feed-forward; no biases."""

    def __init__(self, width: int, heads: int, groups: int, *, rngs: nnx.Rngs):
        self.heads, self.groups, each = heads, groups, width // heads

        def dense(size_in: int, size_out: int) -> nnx.Linear:
            return nnx.Linear(size_in, size_out, use_bias=False, rngs=rngs)

        self.norm1, self.norm2 = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.query, self.out = dense(width, width), dense(width, width)
        self.key, self.value = dense(width, groups * each), dense(width, groups * each)
        self.gate, self.up = dense(width, 3 * width), dense(width, 3 * width)
        self.down = dense(3 * width, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [t, width] to [t, width]."""
        t, width = x.shape
        seen = self.norm1(x)
        q = _rotated(self.query(seen).reshape(t, self.heads, -1))
        k = _rotated(self.key(seen).reshape(t, self.groups, -1))
        v = self.value(seen).reshape(t, self.groups, -1)
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(t, width))
        seen = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(seen)) * self.up(seen))


class Llama(nnx.Module):
    """A small Llama, its head apart from its embeddings."""

    def __init__(self, *, vocabulary: int, width: int, depth: int, heads: int, rngs: nnx.Rngs):
        self.embed = Embed(vocabulary, width, rngs=rngs)
        self.blocks = nnx.List([LlamaBlock(width, heads, heads // 2, rngs=rngs)
                                for _ in range(depth)])  # fmt: skip
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps ids [t] to logits [t, vocabulary]."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _rotated(x: jax.Array) -> jax.Array:
    """Rotary positions: turns pairs of numbers of [t, heads, each] by their position."""
    t, _, each = x.shape
    angles = jnp.arange(t)[:, None] / 10_000 ** (jnp.arange(0, each, 2) / each)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class ConvBlock(nnx.Module):
    """A 3x3 convolution, GroupNorm and ReLU."""

    def __init__(self, width_in: int, width: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(width_in, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.GroupNorm(width, num_groups=8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, width_in] to [b, h, w, width]."""
        return nnx.relu(self.norm(self.conv(x)))


class ResNet9(nnx.Module):
    """The ResNet-9 of the attribution literature for images of 32x32, with GroupNorm."""

    def __init__(self, *, width: int, classes: int, rngs: nnx.Rngs):
        w = width
        self.prepare = ConvBlock(3, w, rngs=rngs)
        self.down1 = ConvBlock(w, 2 * w, rngs=rngs)
        self.residual1 = nnx.List([ConvBlock(2 * w, 2 * w, rngs=rngs) for _ in range(2)])
        self.down2 = ConvBlock(2 * w, 4 * w, rngs=rngs)
        self.down3 = ConvBlock(4 * w, 4 * w, rngs=rngs)
        self.residual2 = nnx.List([ConvBlock(4 * w, 4 * w, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(4 * w, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [b, 32, 32, 3] to logits [b, classes]."""

        def pool(x: jax.Array) -> jax.Array:
            return nnx.max_pool(x, (2, 2), (2, 2))

        x = pool(self.down1(self.prepare(x)))
        x = x + self.residual1[1](self.residual1[0](x))
        x = pool(self.down3(pool(self.down2(x))))
        x = x + self.residual2[1](self.residual2[0](x))
        return self.head(x.max(axis=(1, 2)))


class ViT(nnx.Module):
    """A small vision transformer on 4x4 patches of images of 32x32."""

    def __init__(self, *, width: int, depth: int, heads: int, classes: int, rngs: nnx.Rngs):
        self.patches = nnx.Conv(3, width, (4, 4), strides=4, padding="VALID", rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (64, width)))
        self.blocks = nnx.List([ViTBlock(width, heads, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [b, 32, 32, 3] to logits [b, classes]."""
        x = self.patches(x).reshape(x.shape[0], 64, -1) + self.position[...][None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


class ViTBlock(nnx.Module):
    """A pre-norm block of flax's own attention."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, t, width] to [b, t, width]."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


def gpt(batch: int, *, depth: int = 4, width: int = 256, length: int = 128) -> Subject:
    """A GPT of 4 layers, 16 dense ones among them, on random tokens of a vocabulary of 512."""
    module = GPT(vocabulary=512, width=width, depth=depth, length=length, heads=4, rngs=nnx.Rngs(0))
    return _language_model(module, batch, length)


def gpt2(batch: int, *, length: int = 512, depth: int = 12) -> Subject:
    """A GPT of GPT-2's width and vocabulary."""
    shape: dict[str, int] = {
        "vocabulary": 50257,
        "width": 768,
        "depth": depth,
        "length": length,
        "heads": 12,
    }
    return _language_model(GPT(**shape, rngs=nnx.Rngs(0)), batch, length)


def llama(batch: int, *, depth: int = 4, width: int = 256, length: int = 128) -> Subject:
    """A Llama of 4 layers, 28 dense ones among them, on random tokens of a vocabulary of 512."""
    module = Llama(vocabulary=512, width=width, depth=depth, heads=4, rngs=nnx.Rngs(0))
    return _language_model(module, batch, length)


def _language_model(module: nnx.Module, batch: int, length: int) -> Subject:
    ids = np.random.default_rng(0).integers(0, 512, (batch, length + 1))
    apply, params = _split(module)

    def loss(params: Any, example: jax.Array, key: jax.Array) -> jax.Array:
        del key
        logits = apply(params, example[:-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, example[1:]).sum()

    return Subject(loss, params, jnp.asarray(ids))


def resnet9(batch: int, *, width: int = 64) -> Subject:
    """A ResNet-9 on random images."""
    return _classifier(ResNet9(width=width, classes=10, rngs=nnx.Rngs(0)), batch)


def vit(batch: int, *, width: int = 192, depth: int = 6) -> Subject:
    """A small ViT on random images."""
    return _classifier(ViT(width=width, depth=depth, heads=3, classes=10, rngs=nnx.Rngs(0)), batch)


ALL: dict[str, Callable[[int], Subject]] = {
    "gpt": gpt,
    "llama": llama,
    "resnet9": resnet9,
    "vit": vit,
}


def cast(subject: Subject, dtype: Any) -> Subject:
    """The model with parameters of another type."""

    def of(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return subject._replace(params=jax.tree.map(of, subject.params))


def dense_layers(params: Any) -> Any:
    """Groups of the layers in the blocks alone: no embeddings, no norms."""
    return ja.by_layer(params, exclude=r"norm|^embed|^position|^patches|^head")


def _classifier(module: nnx.Module, batch: int) -> Subject:
    numbers = np.random.default_rng(0)
    images = numbers.normal(size=(batch, 32, 32, 3)).astype(np.float32)
    apply, params = _split(module)

    def loss(params: Any, example: Any, key: jax.Array) -> jax.Array:
        del key
        logits = apply(params, example["image"][None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])

    labels = numbers.integers(0, 10, batch)
    return Subject(loss, params, {"image": jnp.asarray(images), "label": jnp.asarray(labels)})


def _split(module: Any) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    graph, params, *rest = nnx.split(module, nnx.Param, ...)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, nnx.State(params), *rest)(x)

    return apply, nnx.to_pure_dict(params)
