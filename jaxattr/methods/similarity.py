"""Baselines that compare embeddings: what a model or another encoder makes of two examples."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxattr.features import projections
from jaxattr.features.featurizer import FeatureRule
from jaxattr.inputs.outputs import check_function
from jaxattr.inputs.wording import brief, shapes
from jaxattr.kernels import Identity
from jaxattr.methods.method import Method
from jaxattr.typing import Example, Key, Params

EmbedFn = Callable[[Params, Example], Any]
"""(params, ONE example) -> its embedding: an array, or a pytree of arrays."""


@dataclasses.dataclass(frozen=True)
class Probed:
    """An output that is linear in its probe, so that its gradient is the embedding.

    Attributes:
      embed: makes the embedding.
    """

    embed: EmbedFn

    def __call__(self, params: Params, example: Example, key: Key) -> jax.Array:
        """Returns the inner product of the probe and the embedding."""
        probe, model = _parts(params)
        found = self.embed(model, example)
        if jax.tree.map(jnp.shape, probe) != jax.tree.map(jnp.shape, found):
            raise ValueError(
                "The probe must have the shapes of the embedding, "
                f"{brief(shapes(found), 200)}, got {brief(shapes(probe), 200)}: make it of zeros."
            )
        products = jax.tree.map(jnp.vdot, probe, found)
        return jax.tree.reduce(jnp.add, products)


def embedding(embed: EmbedFn, *, cosine: bool = True, name: str = "embedding") -> Method:
    r"""Similarity of embeddings, a baseline: activations of the model itself, or another encoder's.

    .. math:: \tau(q, n) = \cos(e(q), e(n))

    The parameters are a probe and the model, `{"probe": zeros, "model": params}`, where the probe
    has the shapes of an embedding. The output is the inner product of the probe and the embedding,
    so its gradient in the probe is the embedding, and all that works for a method works for this
    one. Leave the model out of the groups: `groups=ja.by_leaf(exclude="^model")`. Where an
    embedding is a dict of arrays, such as activations of several layers, each is a group.

    Guarantees: exact.

    Args:
      embed: (params, example) -> an array, or a pytree of arrays; pure.
      cosine: whether embeddings are scaled to unit norm, all groups together.
      name: what tables show.

    Returns:
      The method.

    Raises:
      TypeError: if embed is no function of parameters and an example.

    References:
      Hanawa et al. (2021), Evaluation of similarity-based explanations, arXiv:2006.04528.

    Example:
      >>> import jaxattr as ja
      >>> def hidden(params, example):
      ...     return jnp.tanh(params["w"] @ example)
      >>> params = {"w": jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])}
      >>> train = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5]])
      >>> index = ja.build_index(embedding(hidden), {"probe": jnp.zeros(3), "model": params}, train,
      ...                        groups=ja.by_leaf(exclude="^model"))
      >>> print(ja.top_k(index, train[:1], k=1).ids)
      [[0]]
    """
    check_function(embed, "embed", ("params", "example"))
    rule = FeatureRule(Probed(embed), projections.identity(), normalize=cosine)
    return Method(name, rule, Identity(), raised=True)


def compares(method: Method | None) -> bool:
    """Whether a method compares examples, and does not say what training on them did.

    Args:
      method: of an index, if it is known.
    """
    return method is not None and isinstance(method.rule.output, Probed)


def _parts(params: Any) -> tuple[Any, Any]:
    if not isinstance(params, dict) or set(params) != {"probe", "model"}:
        got = sorted(params) if isinstance(params, dict) else type(params).__name__
        raise ValueError(
            'The parameters of an embedding are {"probe": jnp.zeros(d), "model": params}, where d '
            f"is the length of an embedding; got {got}."
        )
    return params["probe"], params["model"]
