r"""The loss of weights on a shortlist, the Optax loop that minimises it, and what it comes to.

Li et al. (2025, arXiv:2506.05647) maximise, over the simplex, the mean of each query's largest
scores relative to the norm of all of them:

.. math:: L(w) = E_q\Big[-\frac{\frac1k \sum_{n \in \mathrm{top}_k} s_n}{\|s\|_2}\Big]
          + \lambda \|w\|_2^2, \qquad s = \tau(q, \cdot; w)

Of a squared method the largest are those of the largest size, which rank as the squares do and stay
linear in the weights.

Each function here is one compiled program for all fits of the same shapes and options: what changes
from fit to fit is an argument.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxattr.typing import Key
from jaxattr.weights import shortlists
from jaxattr.weights.shortlists import Shortlist


class FitOptions(NamedTuple):
    """How weights are to be learned.

    Attributes:
      top_k: number of training examples taken for the signal.
      squared: whether scores are squares.
      optimizer: over theta; None for Adam with a cosine schedule.
      steps: number of updates.
    """

    top_k: int
    squared: bool
    optimizer: optax.GradientTransformation | None
    steps: int


class LoopState(NamedTuple):
    """The state of the optimisation.

    Attributes:
      theta: logits [m].
      optimizer: the optimizer's state.
      step: number of updates made.
      losses: the objective before each update, [steps].
      certain: whether the shortlist still holds the strongest examples.
    """

    theta: jax.Array
    optimizer: Any
    step: jax.Array
    losses: jax.Array
    certain: jax.Array


class AtWeights(NamedTuple):
    """What some weights come to.

    Attributes:
      losses: without the penalty, of the queries that are learned from, and of the others; zero
        where there are none.
      certain: whether the strongest examples of every query are certainly on its list.
      strongest: their ids, [q, k].
    """

    losses: list[Any]
    certain: jax.Array
    strongest: jax.Array


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


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def begin(key: Key, queries: int, m: int, options: FitOptions) -> tuple[jax.Array, LoopState]:
    """The queries in random order, of which the first are held out; and the state to begin with."""
    theta = jnp.zeros(m)
    losses = jnp.zeros(options.steps, theta.dtype)
    state = _optimizer(options).init(theta)
    loop = LoopState(theta, state, jnp.asarray(0), losses, jnp.asarray(True))
    return jax.random.permutation(jax.random.split(key)[0], queries), loop


@functools.partial(jax.jit, static_argnames="options")
def run(
    listed: Shortlist,
    rows: jax.Array,
    state: LoopState,
    gauge: jax.Array,
    loss_at_start: jax.Array,
    l2: jax.Array,
    options: FitOptions,
) -> LoopState:
    """Updates until all steps are made, or the shortlist may no longer be certain.

    Args:
      listed: the shortlist, made with the weights of the state.
      rows: queries that are learned from.
      state: where to begin.
      gauge: weights that the softmax is multiplied with, [m].
      loss_at_start: what the loss is divided by.
      l2: strength of the pull towards the start.
      options: of the fit.
    """
    m, listed = len(gauge), listed.rows(rows)
    optimizer = optax.with_extra_args_support(_optimizer(options))  # some search along a line
    first, scale = state.step, jnp.where(loss_at_start == 0, 1, abs(loss_at_start))

    def objective(theta: jax.Array) -> tuple[jax.Array, jax.Array]:
        share = m * jax.nn.softmax(theta)
        loss, certain = loss_of_list(listed, gauge * share, options.top_k, options.squared)
        spread = jnp.mean(share**2) - 1  # squared coefficient of variation
        return loss / scale + l2 * spread, certain

    def update(state: LoopState) -> LoopState:
        (loss, certain), gradient = jax.value_and_grad(objective, has_aux=True)(state.theta)
        updates, optimizer_state = optimizer.update(
            gradient, state.optimizer, state.theta,
            value=loss, grad=gradient, value_fn=lambda theta: objective(theta)[0],
        )  # fmt: skip
        theta = optax.apply_updates(state.theta, updates)
        losses = state.losses.at[state.step].set(loss.astype(state.losses.dtype))
        certain |= state.step == first  # the pass was made with these very weights
        made = LoopState(theta, optimizer_state, state.step + 1, losses, certain)
        # What was found among other examples than all is dropped.
        kept = jax.tree.map(lambda new, old: jnp.where(certain, new, old), made, state)
        return kept._replace(certain=certain)

    def unfinished(state: LoopState) -> jax.Array:
        return (state.step < options.steps) & state.certain

    with jax.numpy_dtype_promotion("standard"):  # which Optax's schedules take for granted
        return jax.lax.while_loop(unfinished, update, state._replace(certain=jnp.asarray(True)))


@functools.partial(jax.jit, static_argnums=(3, 4))
def at_weights(
    listed: Shortlist, rows: tuple[jax.Array, jax.Array], w: jax.Array, top_k: int, squared: bool
) -> AtWeights:
    """The losses of some weights, and the strongest examples under them.

    Args:
      listed: the shortlist.
      rows: queries that are learned from, and those that are held out.
      w: weights [m].
      top_k: see `FitOptions`.
      squared: likewise.
    """
    found = [loss_of_list(listed.rows(each), w, top_k, squared) for each in rows if len(each)]
    losses = [loss for loss, _ in found] + [0.0] * (2 - len(found))
    certain = functools.reduce(jnp.logical_and, [certain for _, certain in found])
    places = jax.lax.top_k(shortlists.strengths(listed, w, squared), top_k)[1]
    return AtWeights(losses, certain, jnp.take_along_axis(listed.ids, places, axis=1))


def hub(strongest: np.ndarray) -> tuple[int, float]:
    """The example that is among the strongest of the most queries, and of what share of them.

    Args:
      strongest: ids [q, k].
    """
    found, counts = np.unique(strongest[strongest >= 0], return_counts=True)
    return int(found[counts.argmax()]), float(counts.max() / len(strongest))


def _optimizer(options: FitOptions) -> optax.GradientTransformation:
    if options.optimizer is not None:
        return options.optimizer
    return optax.adam(optax.cosine_decay_schedule(0.05, options.steps))
