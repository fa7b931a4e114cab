"""A small UNet that predicts noise, in `flax.nnx`, seen as pure functions of its parameters."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.diffusion.schedule import ALPHA_BAR
from experiments.networks import convolution, initializer

NORM_GROUPS = 4


class UNetConfig(NamedTuple):
    """The shape of a UNet.

    Attributes:
      channels: of the images.
      widths: channels at each level, of half the resolution of the one before.
      heads: of the attention at the lowest level.
      patch: side of the squares of pixels that are one position of the first level.
      conditions: (attribute, number of its values) of each; any may be left out of a request.
      predicts_image: whether the network's own output is the clean image, from which the noise
        follows; else the noise. For positions of more numbers than the network has channels, which
        can say what an image is but not what noise is.
      adapter_rank: of low-rank adapters beside the attention's matrices; 0 for none.
      patches: whether convolutions on a CPU are patches times a matrix, which is faster under
        `vmap` over models or gradients, and slower without.
    """

    channels: int = 1
    widths: tuple[int, ...] = (16, 32)
    heads: int = 4
    patch: int = 1
    conditions: tuple[tuple[str, int], ...] = ()
    predicts_image: bool = False
    adapter_rank: int = 0
    patches: bool = True


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions behind GroupNorms; what is asked for is added in between."""

    def __init__(self, width_in: int, width: int, embedding: int, *, patches: bool, rngs: nnx.Rngs):
        convolve = functools.partial(convolution, patches=patches, rngs=rngs)
        self.norm1 = nnx.GroupNorm(width_in, num_groups=NORM_GROUPS, rngs=rngs)
        self.conv1 = convolve(width_in, width, 3)
        self.asked = nnx.Linear(embedding, width, rngs=rngs)
        self.norm2 = nnx.GroupNorm(width, num_groups=NORM_GROUPS, rngs=rngs)
        self.conv2 = convolve(width, width, 3)
        same = width_in == width
        self.shortcut = nnx.data(None if same else convolve(width_in, width, 1))

    def __call__(self, images: jax.Array, asked: jax.Array) -> jax.Array:
        """Maps images [b, h, w, width_in] and embeddings [b, e] to [b, h, w, width]."""
        hidden = self.conv1(nnx.silu(self.norm1(images)))
        hidden = hidden + self.asked(asked)[:, None, None]
        hidden = self.conv2(nnx.silu(self.norm2(hidden)))
        return hidden + (images if self.shortcut is None else self.shortcut(images))


class Attention(nnx.Module):
    """Self-attention over positions, with low-rank adapters if they are wanted."""

    def __init__(self, width: int, heads: int, rank: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.norm = nnx.GroupNorm(width, num_groups=NORM_GROUPS, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.qkv_adapter = nnx.data(nnx.LoRA(width, rank, 3 * width, rngs=rngs) if rank else None)
        self.out_adapter = nnx.data(nnx.LoRA(width, rank, width, rngs=rngs) if rank else None)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [b, h, w, width] to the same shape."""
        b, h, w, width = images.shape
        tokens = self.norm(images).reshape(b, h * w, width)
        qkv = _adapted(self.qkv, self.qkv_adapter, tokens)
        q, k, v = jnp.split(qkv.reshape(b, h * w, self.heads, -1), 3, axis=-1)
        mixed = jax.nn.dot_product_attention(q, k, v).reshape(b, h * w, width)
        return images + _adapted(self.out, self.out_adapter, mixed).reshape(images.shape)


def _adapted(linear: Any, adapter: Any, x: jax.Array) -> jax.Array:
    return linear(x) if adapter is None else linear(x) + adapter(x)


class UNet(nnx.Module):
    """Down, through the middle with attention, and up again beside what was seen going down."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        widths, pixels = config.widths, config.channels * config.patch**2
        embedding = 2 * widths[-1]
        self.config = config
        convolve = functools.partial(convolution, patches=config.patches, rngs=rngs)
        residual = functools.partial(
            ResidualBlock, embedding=embedding, patches=config.patches, rngs=rngs
        )
        self.time1 = nnx.Linear(widths[0] * 2, embedding, rngs=rngs)
        self.time2 = nnx.Linear(embedding, embedding, rngs=rngs)
        # The last row stands for "not asked for".
        self.conditions = nnx.data({
            name: nnx.Embed(values + 1, embedding, rngs=rngs)
            for name, values in config.conditions
        })  # fmt: skip
        self.first = convolve(pixels, widths[0], 3)
        self.down = nnx.List(
            [
                residual(before, width)
                for before, width in zip((widths[0], *widths), widths, strict=False)
            ]
        )
        self.smaller = nnx.List([convolve(width, width, 3, 2) for width in widths[:-1]])
        self.middle1 = residual(widths[-1], widths[-1])
        self.attention = Attention(widths[-1], config.heads, config.adapter_rank, rngs=rngs)
        self.middle2 = residual(widths[-1], widths[-1])
        after = (*widths[1:], widths[-1])
        self.up = nnx.List(
            [residual(above + width, width) for above, width in zip(after, widths, strict=True)]
        )
        self.norm = nnx.GroupNorm(widths[0], num_groups=NORM_GROUPS, rngs=rngs)
        self.last = convolve(widths[0], pixels, 3)

    def __call__(
        self, images: jax.Array, timesteps: jax.Array, asked: Mapping[str, jax.Array]
    ) -> jax.Array:
        """Predicts noise.

        Args:
          images: noisy, [b, h, w, channels].
          timesteps: int [b].
          asked: {attribute: value [b]}, the number of values where it is left open.
        """
        embedding = self._embedding(timesteps, asked)
        hidden, seen = self._down(images, embedding)
        for level in range(len(self.up))[::-1]:
            if level < len(self.smaller):
                hidden = jnp.repeat(jnp.repeat(hidden, 2, axis=1), 2, axis=2)
            hidden = self.up[level](jnp.concatenate([hidden, seen[level]], axis=-1), embedding)
        return _unfold(self.last(nnx.silu(self.norm(hidden))), self.config.patch)

    def middle(
        self, images: jax.Array, timesteps: jax.Array, asked: Mapping[str, jax.Array]
    ) -> jax.Array:
        """What the network sees in images, [b, width of its lowest level]; arguments as above."""
        return self._down(images, self._embedding(timesteps, asked))[0].mean(axis=(1, 2))

    def _embedding(self, timesteps: jax.Array, asked: Mapping[str, jax.Array]) -> jax.Array:
        embedding = _sinusoids(timesteps, 2 * self.config.widths[0])
        embedding = self.time2(nnx.silu(self.time1(embedding)))
        for name, embed in self.conditions.items():
            embedding = embedding + embed(asked[name])
        return nnx.silu(embedding)

    def _down(self, images: jax.Array, embedding: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Through the middle; and what was seen at each level."""
        hidden = self.first(_fold(images, self.config.patch))
        seen = []
        for level, block in enumerate(self.down):
            hidden = block(hidden, embedding)
            seen.append(hidden)
            if level < len(self.smaller):
                hidden = self.smaller[level](hidden)
        return self.middle2(self.attention(self.middle1(hidden, embedding)), embedding), seen


def _sinusoids(timesteps: jax.Array, width: int) -> jax.Array:
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(width // 2) / (width // 2))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)  # [b, width]


def _fold(images: jax.Array, patch: int) -> jax.Array:
    """[b, h p, w p, c] -> [b, h, w, p p c]."""
    b, height, width, c = images.shape
    h, w = height // patch, width // patch
    split = images.reshape(b, h, patch, w, patch, c).swapaxes(2, 3)
    return split.reshape(b, h, w, patch * patch * c)


def _unfold(images: jax.Array, patch: int) -> jax.Array:
    """[b, h, w, p p c] -> [b, h p, w p, c]."""
    b, h, w, width = images.shape
    split = images.reshape(b, h, w, patch, patch, width // patch**2).swapaxes(2, 3)
    return split.reshape(b, h * patch, w * patch, width // patch**2)


@dataclasses.dataclass(frozen=True)
class Model:
    """A UNet as pure functions.

    Attributes:
      config: its shape.
      init: key -> params, a nested dict of arrays.
      init_adapters: key -> params of the adapters; {} if there are none.
      apply: (params, images [b, h, w, c], timesteps [b], asked) -> predicted noise; `params` are
        those of `init`, and with adapters a pair of those and theirs.
      embed: the same arguments -> what the middle of the network sees, [b, e].
    """

    config: UNetConfig
    init: Callable[[jax.Array], Any]
    init_adapters: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array, jax.Array, Mapping[str, jax.Array]], jax.Array]
    embed: Callable[[Any, jax.Array, jax.Array, Mapping[str, jax.Array]], jax.Array]


@functools.lru_cache(maxsize=8)
def make_model(config: UNetConfig) -> Model:
    """Makes a model.

    Args:
      config: its shape.

    Returns:
      The model.
    """
    module = UNet(config, rngs=nnx.Rngs(0))
    graph, *states = nnx.split(module, nnx.LoRAParam, nnx.Param)
    adapters, params = states
    count = len(jax.tree.leaves(adapters))

    def merged(params: Any) -> UNet:
        base, extra = params if count else (params, {})
        return nnx.merge(graph, nnx.State(extra), nnx.State(base))

    def apply(
        params: Any, images: jax.Array, timesteps: jax.Array, asked: Mapping[str, jax.Array]
    ) -> jax.Array:
        found = merged(params)(images, timesteps, asked)
        if not config.predicts_image:
            return found
        left = jnp.asarray(ALPHA_BAR)[timesteps][:, None, None, None]
        return (images - jnp.sqrt(left) * found) / jnp.sqrt(1 - left)

    init_adapters = initializer(nnx.to_pure_dict(adapters)) if count else lambda key: {}
    return Model(
        config=config,
        init=initializer(nnx.to_pure_dict(params)),
        init_adapters=init_adapters,
        apply=apply,
        embed=lambda params, *arguments: merged(params).middle(*arguments),
    )
