r"""The loss of weights, a pure function of them, on the contributions of a shortlist.

Li et al. (2025, arXiv:2506.05647) maximise, over the simplex, the mean of each query's largest
scores relative to the norm of all of them:

.. math:: L(w) = E_q\Big[-\frac{\frac1k \sum_{n \in \mathrm{top}_k} s_n}{\|s\|_2}\Big]
          + \lambda \|w\|_2^2, \qquad s = \tau(q, \cdot; w)

Of a squared method the largest are those of the largest size, which rank as the squares do and stay
linear in the weights.
"""

import jax
import jax.numpy as jnp

from jaxattr.weights import shortlists
from jaxattr.weights.shortlists import Shortlist


def loss_of_list(
    listed: Shortlist, w: jax.Array, top_k: int, squared: bool
) -> tuple[jax.Array, jax.Array]:
    """The loss without its penalty, the mean over queries.

    Guarantees: invariant to the scale of the weights; with non-negative scores between -1/sqrt(k)
    and 0. The set of the top k is piecewise constant in the weights, so the gradient is that of the
    set found with the present ones.

    Args:
      listed: the shortlist.
      w: weights [m].
      top_k: number of training examples taken for the signal.
      squared: whether scores are squares.

    Returns:
      The loss; and whether the strongest examples of every query are certainly on its list.
    """
    w = w.astype(listed.parts.dtype)
    ranked = shortlists.strengths(listed, jax.lax.stop_gradient(w), squared)  # [q, s]
    strongest, places = jax.lax.top_k(ranked, top_k)
    # Contributions are gathered before they meet the weights, so that the gradient is they
    # themselves: that of sorted scores would be scattered over the whole list.
    picked = jnp.take_along_axis(listed.parts, places[..., None], axis=1)  # [q, k, m]
    scores = jnp.matmul(picked, w, precision="highest")
    found = (jnp.abs(scores) if squared else scores).mean(axis=1)
    squares = shortlists.sum_of_squares(listed, w)
    # A query whose scores are all zero has no signal; the inner `where` keeps its gradient finite.
    norm = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    loss = -jnp.mean(jnp.where(squares > 0, found / norm, 0))
    # Not the last of the k: for a slice of them XLA sorts everything, at thirty times the cost.
    return loss, jnp.all(strongest.min(axis=-1) >= shortlists.bounds(listed, w))
