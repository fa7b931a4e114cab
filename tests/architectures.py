"""Tiny models of the kinds that people train, in linen, nnx and bare JAX, all in float64."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

BATCH, VOCABULARY, CLASSES = 3, 11, 3


class Model(NamedTuple):
    loss: Any
    params: Any
    batch: Any


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()


def filled(shapes):
    """Random parameters of these shapes; no initialiser is compiled, and no parameter is zero."""
    numbers = np.random.default_rng(0)
    return jax.tree.map(lambda x: numbers.normal(0, 0.4, x.shape), shapes)


def images(channels=3, size=6):
    numbers = np.random.default_rng(1)
    x = numbers.normal(size=(BATCH, size, size, channels))
    return x, numbers.integers(0, CLASSES, BATCH)


def tokens(length=6):
    return np.random.default_rng(2).integers(0, VOCABULARY, (BATCH, length))


def from_linen(module, inputs, batch):
    """`inputs` picks what the module is called with from an example, and the labels."""
    one = inputs(jax.tree.map(lambda x: x[0], batch))[0]
    params = filled(jax.eval_shape(module.init, jax.random.key(0), one)["params"])

    def loss(params, example, key):
        del key
        x, labels = inputs(example)
        return cross_entropy(module.apply({"params": params}, x), labels)

    return Model(loss, params, batch)


def from_nnx(make, inputs, batch):
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def loss(params, example, key):
        del key
        x, labels = inputs(example)
        return cross_entropy(nnx.merge(graph, params)(x), labels)

    return Model(loss, filled(state), batch)


def shifted(ids):
    return ids[:-1], ids[1:]


def image(example):
    return example[0][None], example[1][None]


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        x = nn.tanh(nn.Dense(7, name="first")(x))
        x = nn.jit(nn.Dense)(5, name="jitted")(x)
        return nn.Dense(CLASSES, name="last")(nn.relu(x))


def mlp_linen():
    return from_linen(LinenMLP(), image, images(1, 3))


class Block(nnx.Module):
    def __init__(self, width, out, stride, rngs):
        self.first = nnx.Conv(
            width, out, (3, 3), strides=stride, padding="SAME", use_bias=False, rngs=rngs
        )
        self.norm = nnx.GroupNorm(out, num_groups=2, rngs=rngs)
        self.second = nnx.Conv(out, out, (3, 3), padding="SAME", use_bias=False, rngs=rngs)
        self.short = nnx.Conv(width, out, (1, 1), strides=stride, rngs=rngs)

    def __call__(self, x):
        y = self.second(nnx.relu(self.norm(self.first(x))))
        return nnx.relu(y + self.short(x))


class ResNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), padding="SAME", rngs=rngs)
        self.one = Block(4, 4, 1, rngs)
        self.two = Block(4, 6, 2, rngs)
        self.head = nnx.Linear(6, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(self.two(self.one(self.stem(x))).mean((1, 2)))


def resnet_nnx():
    return from_nnx(ResNet, image, images())


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), strides=2, padding="VALID", name="patch")(x)
        x = x.reshape(x.shape[0], -1, 8)
        x = x + self.param("position", nn.initializers.normal(1.0), (1, *x.shape[1:]))
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(y, y)
        y = nn.LayerNorm(name="norm2")(x)
        x = x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(12, name="up")(y)))
        return nn.Dense(CLASSES, name="head")(x.mean(1))


def vit_linen():
    return from_linen(ViT(), image, images())


class GPT(nnx.Module):
    """Tied embeddings, and one block that is used twice."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, 8, dtype=jnp.float64, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, dtype=jnp.float64, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)[None]
        for _ in range(2):
            mask = nnx.make_causal_mask(ids[None])
            x = x + self.attention(self.norm(x), mask=mask)
            x = x + self.down(nnx.gelu(self.up(self.norm(x))))
        return self.embed.attend(x)[0]


def gpt_tied_nnx():
    return from_nnx(GPT, shifted, tokens())


class ScanBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(name="norm")(x)
        query, key, value = (nn.DenseGeneral((2, 4), name=name)(y) for name in "qkv")
        y = nn.dot_product_attention(query, key, value, mask=nn.make_causal_mask(x[:, 0]))
        x = x + nn.DenseGeneral(8, axis=(-2, -1), name="o")(y)
        return x + nn.Dense(8, name="down")(nn.silu(nn.Dense(12, name="up")(x))), None


class ScanGPT(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(VOCABULARY, 8, name="embed")
        layers = nn.scan(
            nn.remat(ScanBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layers(name="layers")(embed(ids), None)
        return embed.attend(x)


def gpt_scan_linen():
    return from_linen(ScanGPT(), shifted, tokens())


def conv(x, kernel, **options):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        options.pop("strides", (1, 1)),
        options.pop("padding", "SAME"),
        dimension_numbers=options.pop("layout", ("NHWC", "HWIO", "NHWC")),
        **options,
    )


def separable_bare():
    """Depthwise and pointwise convolutions in two layouts, and a stack unrolled by hand."""
    shapes = {
        "depthwise": (3, 3, 1, 6),
        "pointwise": (4, 6, 1, 1),
        "grouped": (3, 2, 2, 6),
        "grouped_bias": (6,),
        "stack": (3, 6, 6),
        "stack_bias": (3, 6),
        "head": (6, CLASSES),
        "temperature": (),
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    params = filled(jax.tree.map(np.empty, shapes, is_leaf=is_shape))

    def loss(params, example, key):
        del key
        x, label = example[0][None], example[1]
        x = conv(x, params["depthwise"], feature_group_count=3, strides=(2, 1), padding="VALID")
        x = jnp.tanh(x).transpose(0, 3, 1, 2)
        x = conv(x, params["pointwise"], layout=("NCHW", "OIHW", "NCHW"))
        x = jnp.tanh(x).transpose(0, 2, 3, 1)
        x = conv(
            x, params["grouped"], feature_group_count=2, rhs_dilation=(1, 2), padding=((1, 2),) * 2
        )
        x = jnp.tanh(x + params["grouped_bias"].reshape(1, 1, 1, -1)).mean((0, 1, 2))
        for i in range(3):
            x = x + jnp.tanh(x @ params["stack"][i] + params["stack_bias"][i])
        return cross_entropy(x @ params["head"] * jnp.exp(params["temperature"]), label)

    return Model(loss, params, images())


ALL = {
    make.__name__: make
    for make in (mlp_linen, resnet_nnx, vit_linen, gpt_tied_nnx, gpt_scan_linen, separable_bare)
}
