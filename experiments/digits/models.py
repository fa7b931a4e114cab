"""Small deep networks for 8x8 digits in `flax.nnx`, seen as pure functions of their parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from experiments.networks import convolution, initializer

CLASSES = 10
SIZE = 8


class AttentionBlock(nnx.Module):
    """A pre-norm transformer block: attention over the patches, then a small MLP."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.mlp_up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.mlp_down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens [b, t, width] to [b, t, width]."""
        tokens = tokens + self.attention(self.attention_norm(tokens))
        return tokens + self.mlp_down(nnx.gelu(self.mlp_up(self.mlp_norm(tokens))))


class ViT(nnx.Module):
    """A vision transformer on 2x4 patches; its 55 parameter arrays are of many kinds."""

    def __init__(self, *, width: int = 32, heads: int = 4, depth: int = 3, rngs: nnx.Rngs):
        tokens = SIZE // 2 * SIZE // 4
        self.patches = nnx.Linear(8, width, rngs=rngs)
        self.position = nnx.Param(0.3 * jax.random.normal(rngs.params(), (tokens, width)))
        self.blocks = nnx.List([AttentionBlock(width, heads, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [b, 8, 8] to logits [b, 10]."""
        patches = images.reshape(len(images), SIZE // 2, 2, SIZE // 4, 4).swapaxes(2, 3)
        tokens = self.patches(patches.reshape(len(images), -1, 8))  # [b, t, width]
        tokens = tokens + self.position[...][None]
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens).mean(axis=1))


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions, each behind a GroupNorm, beside a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.GroupNorm(width_in, num_groups=4, rngs=rngs)
        self.conv1 = convolution(width_in, width, 3, stride, bias=False, rngs=rngs)
        self.norm2 = nnx.GroupNorm(width, num_groups=4, rngs=rngs)
        self.conv2 = convolution(width, width, 3, bias=False, rngs=rngs)
        same = stride == 1 and width_in == width
        self.shortcut = nnx.data(
            None if same else convolution(width_in, width, 1, stride, bias=False, rngs=rngs)
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [b, h, w, width_in] to [b, h / stride, w / stride, width]."""
        hidden = self.conv1(nnx.relu(self.norm1(images)))
        hidden = self.conv2(nnx.relu(self.norm2(hidden)))
        return hidden + (images if self.shortcut is None else self.shortcut(images))


class ResNet(nnx.Module):
    """A stem, three residual blocks with GroupNorm and a linear head."""

    def __init__(
        self, *, width: int = 8, channels: int = 1, classes: int = CLASSES, rngs: nnx.Rngs
    ):
        self.stem = convolution(channels, width, 3, bias=False, rngs=rngs)
        self.blocks = nnx.List(
            [
                ResidualBlock(width, width, 1, rngs=rngs),
                ResidualBlock(width, 2 * width, 2, rngs=rngs),
                ResidualBlock(2 * width, 2 * width, 1, rngs=rngs),
            ]
        )
        self.norm = nnx.GroupNorm(2 * width, num_groups=4, rngs=rngs)
        self.head = nnx.Linear(2 * width, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [b, h, w] or [b, h, w, channels] to logits [b, classes]."""
        hidden = self.stem(images if images.ndim == 4 else images[..., None])
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(nnx.relu(self.norm(hidden)).mean(axis=(1, 2)))


class MLP(nnx.Module):
    """Four dense layers: few groups, all of one kind, so weights have little to gain."""

    def __init__(self, *, width: int = 64, rngs: nnx.Rngs):
        sizes = [(SIZE * SIZE, width), (width, width), (width, width)]
        self.hidden = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in sizes])
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [b, 8, 8] to logits [b, 10]."""
        hidden = images.reshape(images.shape[0], -1)
        for layer in self.hidden:
            hidden = nnx.relu(layer(hidden))
        return self.head(hidden)


class Recipe(NamedTuple):
    """An architecture and how it is trained to more than 90 % on half of the digits.

    Attributes:
      make: makes the module, given `rngs`.
      learning_rate: at its peak.
      epochs: passes over the training set.
    """

    make: Callable[..., nnx.Module]
    learning_rate: float
    epochs: int


RECIPES = {
    "vit": Recipe(ViT, 1.5e-2, 12),
    "resnet": Recipe(ResNet, 2e-2, 8),
    "mlp": Recipe(MLP, 5e-3, 10),
    "cifar2": Recipe(functools.partial(ResNet, channels=3, classes=2), 2e-2, 12),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A network as two pure functions.

    Attributes:
      name: key of `RECIPES`.
      recipe: how it is trained.
      init: key -> params, a nested dict of arrays with names such as `blocks/0/attention/out/bias`.
      apply: (params, images [b, 8, 8]) -> logits [b, 10].
    """

    name: str
    recipe: Recipe
    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]


def make_model(name: str) -> Model:
    """Makes a model.

    Args:
      name: key of `RECIPES`.

    Returns:
      The model.
    """
    recipe = RECIPES[name]
    make = recipe.make
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), nnx.Param)

    def apply(params: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graph, nnx.State(params))(images)

    reference = nnx.to_pure_dict(nnx.state(make(rngs=nnx.Rngs(0)), nnx.Param))
    return Model(name, recipe, initializer(reference), apply)
