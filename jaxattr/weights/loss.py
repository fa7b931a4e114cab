r"""Losses of weights, pure functions of a weight pytree.

Li et al. (2025, arXiv:2506.05647) maximise, over the simplex, the mean of each query's largest
scores relative to the norm of all of them:

.. math:: L(w) = E_q\Big[-\frac{\frac1k \sum_{n \in \mathrm{top}_k} s_n}{\|s\|_2}\Big]
          + \lambda \|w\|_2^2, \qquad s = \tau(q, \cdot; w)
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxattr.counts import whole_number
from jaxattr.weights import shortlists
from jaxattr.weights.shortlists import Shortlist

Signal = Literal["top_k", "top_k_abs", "top_minus_bottom"]


def self_supervised_loss(
    weights: Any,
    contributions: jax.Array,
    *,
    top_k: int = 20,
    l2: float = 0.0,
    signal: Signal = "top_k",
) -> jax.Array:
    r"""The paper's loss, a pure function of a weight pytree.

    Guarantees: invariant to the scale of the weights if `l2` is zero; with non-negative signal
    between -1/sqrt(k) and 0. The set of the top k is piecewise constant in the weights, so the
    gradient is that of the set found with the present ones.

    Args:
      weights: a pytree of m scalars, such as {group name: weight}, whose leaves are in the order of
        the groups (group names are sorted, as the keys of a dict pytree are).
      contributions: float [q, n, m], as `ja.contributions` returns them.
      top_k: number of training examples taken for the signal, at most n.
      l2: weight of ||w||^2.
      signal: "top_k", the paper's; "top_k_abs", of absolute scores; "top_minus_bottom", half the
        distance between the means of the k largest and the k smallest.

    Returns:
      A scalar, the mean over queries.

    Example:
      >>> import jax.numpy as jnp
      >>> contributions = jnp.array([[[3.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
      >>> print(self_supervised_loss({"a": 1.0, "b": 0.0}, contributions, top_k=1))
      -1.0
    """
    w = jnp.stack([jnp.asarray(leaf) for leaf in jax.tree.leaves(weights)])
    w = w.astype(contributions.dtype)
    if contributions.ndim != 3 or contributions.shape[-1] != len(w):
        raise ValueError(
            f"contributions must be [q, n, m] with m = {len(w)} weights, got shape "
            f"{contributions.shape}."
        )
    check_signal(signal, top_k, contributions.shape[1])
    listed = shortlists.everything(contributions, w)
    return loss_of_list(listed, w, top_k, signal) + l2 * jnp.sum(w**2)


def signs_of(signal: Signal) -> tuple[int, ...]:
    """Which ends of the scores a signal looks at: the largest, or the smallest too."""
    return (1,) if signal == "top_k" else (1, -1)


def certain(listed: Shortlist, w: jax.Array, top_k: int, signal: Signal) -> jax.Array:
    """Whether the strongest examples of every query are certainly on its list."""
    if listed.complete:
        return jnp.asarray(True)
    limits = shortlists.bounds(listed, w)  # [l, q]
    scores = shortlists.signed_scores(listed, w, signs_of(signal))  # [l, q, s]
    if signal == "top_k_abs":
        scores = jnp.concatenate(list(scores), axis=-1)[None]
    # Not the last of the k: for a slice of them XLA sorts everything, at thirty times the cost.
    kth = jax.lax.top_k(scores, top_k)[0].min(axis=-1)
    return jnp.all(kth >= limits)


def loss_of_list(listed: Shortlist, w: jax.Array, top_k: int, signal: Signal) -> jax.Array:
    """The loss without its penalty."""
    signs = signs_of(signal)
    scores = shortlists.signed_scores(listed, jax.lax.stop_gradient(w), signs)  # [l, q, s]
    lists = [(i, sign) for i, sign in enumerate(signs)]
    if signal == "top_k_abs":
        length = scores.shape[2]
        places = jax.lax.top_k(jnp.concatenate(list(scores), axis=-1), top_k)[1]  # [q, k]
        each = [_signal(listed, w, i, sign, places - i * length) for i, sign in lists]
        found = jnp.stack(each).sum(axis=0)
    else:
        places = jax.lax.top_k(scores, top_k)[1]  # [l, q, k]
        each = [_signal(listed, w, i, sign, places[i]) for i, sign in lists]
        found = jnp.stack(each).mean(axis=0)
    return _relative(found, shortlists.sum_of_squares(listed, w))


def _signal(
    listed: Shortlist, w: jax.Array, number: int, sign: int, places: jax.Array
) -> jax.Array:
    """The mean signed score of some places of a list, [q]; those beyond its ends count as zero.

    Their contributions are gathered before they meet the weights, so that the gradient is they
    themselves: that of sorted scores would be scattered over the whole list.
    """
    parts = listed.parts[0 if listed.complete else number]
    inside = (places >= 0) & (places < parts.shape[1])
    picked = jnp.take_along_axis(parts, jnp.where(inside, places, 0)[..., None], axis=1)
    mean = jnp.where(inside[..., None], picked, 0).mean(axis=1)  # [q, m]
    return sign * jnp.matmul(mean, w.astype(mean.dtype), precision="highest")


def _relative(found: jax.Array, squares: jax.Array) -> jax.Array:
    # A query whose scores are all zero has no signal; the inner `where` keeps its gradient finite.
    norm = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    return -jnp.mean(jnp.where(squares > 0, found / norm, 0))


def check_signal(signal: str, top_k: int, n: int) -> None:
    """Raises if the signal is unknown, or top_k is no whole number between 1 and n."""
    if signal not in ("top_k", "top_k_abs", "top_minus_bottom"):
        raise ValueError(
            f'signal must be "top_k", "top_k_abs" or "top_minus_bottom", got {signal!r}.'
        )
    if not 1 <= whole_number("top_k", top_k, least=None) <= n:
        raise ValueError(f"top_k must be between 1 and the {n} training examples, got {top_k}.")
