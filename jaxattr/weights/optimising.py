"""The Optax loop that weights are learned in, and what is asked of its results.

Each function here is one compiled program for all fits of the same shapes and options: what changes
from fit to fit is an argument.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxattr.typing import Key
from jaxattr.weights import shortlists
from jaxattr.weights.loss import Signal, certain, loss_of_list, signs_of
from jaxattr.weights.shortlists import Shortlist

Start = Literal["unit_rms", "uniform"]


class FitOptions(NamedTuple):
    """How weights are to be learned.

    Attributes:
      top_k: number of training examples taken for the signal.
      l2: strength of the pull towards the start.
      signal: "top_k", "top_k_abs" or "top_minus_bottom".
      start: where learning starts, "uniform" or "unit_rms".
      optimizer: over theta; None for Adam with a cosine schedule.
      steps: number of updates.
      batch_size: queries per step; None for all.
      held_out: share of the queries that is not learned from.
    """

    top_k: int
    l2: float
    signal: Signal
    start: Start
    optimizer: optax.GradientTransformation | None
    steps: int
    batch_size: int | None
    held_out: float


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


class Beginning(NamedTuple):
    """What a fit begins with.

    Attributes:
      order: of the queries, at random; the first are held out, [q].
      keys: one per step, for its minibatch, [steps].
      loop: the state before the first update.
    """

    order: np.ndarray
    keys: Key
    loop: LoopState


class AtWeights(NamedTuple):
    """What some weights come to.

    Attributes:
      losses: without the penalty, of the queries that are learned from, and of the others; zero
        where there are none.
      certain: whether the strongest examples of every query are certainly on its list.
      strongest: their ids, [q, k].
    """

    losses: tuple[float, float]
    certain: bool
    strongest: np.ndarray


def begin(key: Key, queries: int, m: int, options: FitOptions) -> Beginning:
    """Splits the queries, and makes the keys of the minibatches and the state of the loop.

    Args:
      key: of the fit.
      queries: q.
      m: number of groups.
      options: of the fit.
    """
    order, keys, loop = _begin(key, queries, m, options.optimizer, options.steps)
    return Beginning(np.asarray(order), keys, loop)


def run(
    listed: Shortlist,
    rows: np.ndarray,
    state: LoopState,
    keys: Key,
    gauge: np.ndarray,
    loss_at_start: float,
    options: FitOptions,
) -> LoopState:
    """Updates until all steps are made, or the shortlist may no longer be certain.

    Args:
      listed: the shortlist, made with the weights of the state.
      rows: queries that are learned from.
      state: where to begin.
      keys: of the minibatches, one per step.
      gauge: weights that the softmax is multiplied with, [m].
      loss_at_start: what the loss is divided by.
      options: of the fit.
    """
    dynamic = (gauge, abs(loss_at_start) or 1.0, float(options.l2))
    static = options._replace(l2=0.0, held_out=0.0, start="uniform")
    with jax.numpy_dtype_promotion("standard"):  # which Optax's schedules take for granted
        return _run(listed, rows, state, keys, *dynamic, options=static)


def at_weights(
    listed: Shortlist, rows: tuple[np.ndarray, np.ndarray], w: np.ndarray, options: FitOptions
) -> AtWeights:
    """The losses of some weights, and the strongest examples under them.

    Args:
      listed: the shortlist.
      rows: queries that are learned from, and those that are held out.
      w: weights [m].
      options: of the fit.
    """
    losses, certain, strongest = _at_weights(listed, rows, w, options.top_k, options.signal)
    learned, held = map(float, losses)
    return AtWeights((learned, held), bool(certain), np.asarray(strongest))


def hub(strongest: np.ndarray) -> tuple[int, float]:
    """The example that is among the strongest of the most queries, and of what share of them.

    Args:
      strongest: ids [q, k].
    """
    found, counts = np.unique(strongest[strongest >= 0], return_counts=True)
    return int(found[counts.argmax()]), float(counts.max() / len(strongest))


def _optimizer(
    given: optax.GradientTransformation | None, steps: int
) -> optax.GradientTransformation:
    if given is not None:
        return given
    return optax.adam(optax.cosine_decay_schedule(0.05, steps))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _begin(
    key: Key, queries: int, m: int, optimizer: optax.GradientTransformation | None, steps: int
) -> tuple[jax.Array, Key, LoopState]:
    split_key, batch_key = jax.random.split(key)
    theta = jnp.zeros(m)
    losses = jnp.zeros(steps, theta.dtype)
    state = _optimizer(optimizer, steps).init(theta)
    loop = LoopState(theta, state, jnp.asarray(0), losses, jnp.asarray(True))
    return jax.random.permutation(split_key, queries), jax.random.split(batch_key, steps), loop


@functools.partial(jax.jit, static_argnames="options")
def _run(
    listed: Shortlist,
    rows: jax.Array,
    state: LoopState,
    keys: Key,
    gauge: jax.Array,
    scale: jax.Array,
    l2: jax.Array,
    *,
    options: FitOptions,
) -> LoopState:
    m, q = len(gauge), len(rows)
    listed = listed.rows(rows)
    optimizer = _optimizer(options.optimizer, options.steps)

    def weights(theta: jax.Array) -> jax.Array:
        return gauge * m * jax.nn.softmax(theta)

    def objective(theta: jax.Array, listed: Shortlist) -> jax.Array:
        loss = loss_of_list(listed, weights(theta), options.top_k, options.signal)
        spread = jnp.mean((m * jax.nn.softmax(theta)) ** 2) - 1  # squared coefficient of variation
        return loss / scale + l2 * spread

    def update(state: LoopState) -> LoopState:
        chosen = listed
        if options.batch_size is not None and options.batch_size < q:
            drawn = jax.random.choice(keys[state.step], q, (options.batch_size,), replace=False)
            chosen = listed.rows(drawn)
        loss, gradient = jax.value_and_grad(objective)(state.theta, chosen)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.theta)
        theta = optax.apply_updates(state.theta, updates)
        still = certain(listed, weights(theta), options.top_k, options.signal)
        losses = state.losses.at[state.step].set(loss.astype(state.losses.dtype))
        return LoopState(theta, optimizer_state, state.step + 1, losses, still)

    return jax.lax.while_loop(
        lambda state: (state.step < options.steps) & state.certain,
        update,
        # The pass was made with these very weights.
        state._replace(certain=jnp.asarray(True)),
    )


@functools.partial(jax.jit, static_argnums=(3, 4))
def _at_weights(
    listed: Shortlist,
    rows: tuple[jax.Array, jax.Array],
    w: jax.Array,
    top_k: int,
    signal: Signal,
) -> tuple[list[Any], jax.Array, jax.Array]:
    losses = [
        loss_of_list(listed.rows(each), w, top_k, signal) if len(each) else 0 for each in rows
    ]
    return losses, certain(listed, w, top_k, signal), _strongest(listed, w, top_k, signal)


def _strongest(listed: Shortlist, w: jax.Array, top_k: int, signal: Signal) -> jax.Array:
    """Ids of the strongest examples of each query, [q, k]."""
    signs = signs_of(signal)
    scores = shortlists.signed_scores(listed, w, signs)  # [l, q, s]
    lists = [listed.ids[0 if listed.complete else i] for i in range(len(signs))]
    if signal != "top_k_abs":
        scores, lists = scores[:1], lists[:1]
    places = jax.lax.top_k(jnp.concatenate(list(scores), axis=-1), top_k)[1]
    return jnp.take_along_axis(jnp.concatenate(lists, axis=-1), places, axis=1)
