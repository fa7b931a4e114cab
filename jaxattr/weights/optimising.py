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
    """Arguments of `learn_weights`, as there."""

    top_k: int
    l2: float
    signal: Signal
    start: Start
    optimizer: optax.GradientTransformation | None
    steps: int
    batch_size: int | None
    held_out: float


class Draws(NamedTuple):
    """What is random in a fit.

    Attributes:
      order: of the queries; the first are held out, [q].
      keys: one per step, for its minibatch, [steps].
    """

    order: np.ndarray
    keys: Key


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


def draw(key: Key, queries: int, options: FitOptions) -> Draws:
    """Splits the queries and makes the keys of the minibatches.

    Args:
      key: of the fit.
      queries: q.
      options: of the fit.
    """
    order, keys = _draw(key, queries, options.steps)
    return Draws(np.asarray(order), keys)


def start(m: int, options: FitOptions) -> LoopState:
    """The state before the first update.

    Args:
      m: number of groups.
      options: of the fit.
    """
    return _start(m, options.optimizer, options.steps)


def run(
    listed: Shortlist,
    rows: np.ndarray,
    state: LoopState,
    keys: Key | None,
    gauge: np.ndarray,
    loss_at_start: float,
    options: FitOptions,
) -> LoopState:
    """Updates until all steps are made, or the shortlist may no longer be certain.

    Args:
      listed: the shortlist, made with the weights of the state.
      rows: queries that are learned from.
      state: where to begin.
      keys: of the minibatches; None where there are none.
      gauge: weights that the softmax is multiplied with, [m].
      loss_at_start: what the loss is divided by.
      options: of the fit.
    """
    dynamic = (gauge, abs(loss_at_start) or 1.0, options.l2)
    static = options._replace(l2=0.0, held_out=0.0, start="uniform")
    with jax.numpy_dtype_promotion("standard"):  # which Optax's schedules take for granted
        return _run(listed, rows, state, keys, *dynamic, options=static)


def loss_of(listed: Shortlist, rows: np.ndarray, w: np.ndarray, options: FitOptions) -> float:
    """The loss of some queries without its penalty; zero for none.

    Args:
      listed: the shortlist.
      rows: the queries.
      w: weights [m].
      options: of the fit.
    """
    if not len(rows):
        return 0.0
    return float(_loss(listed, rows, w, options.top_k, options.signal))


def is_certain(listed: Shortlist, w: np.ndarray, options: FitOptions) -> bool:
    """Whether the strongest examples of every query are certainly on its list.

    Args:
      listed: the shortlist.
      w: weights [m].
      options: of the fit.
    """
    return listed.complete or bool(_certain(listed, w, options.top_k, options.signal))


def hub(listed: Shortlist, w: np.ndarray, options: FitOptions) -> tuple[int, float]:
    """The example that is among the strongest of the most queries, and of what share of them.

    Args:
      listed: the shortlist.
      w: weights [m].
      options: of the fit.
    """
    ids = np.asarray(_strongest(listed, w, options.top_k, options.signal))
    found, counts = np.unique(ids[ids >= 0], return_counts=True)
    return int(found[counts.argmax()]), float(counts.max() / len(ids))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: Key, queries: int, steps: int) -> tuple[jax.Array, Key]:
    split_key, batch_key = jax.random.split(key)
    return jax.random.permutation(split_key, queries), jax.random.split(batch_key, steps)


def _optimizer(
    given: optax.GradientTransformation | None, steps: int
) -> optax.GradientTransformation:
    if given is not None:
        return given
    return optax.adam(optax.cosine_decay_schedule(0.05, steps))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _start(m: int, optimizer: optax.GradientTransformation | None, steps: int) -> LoopState:
    theta = jnp.zeros(m)
    losses = jnp.zeros(steps, theta.dtype)
    state = _optimizer(optimizer, steps).init(theta)
    return LoopState(theta, state, jnp.asarray(0), losses, jnp.asarray(True))


@functools.partial(jax.jit, static_argnames="options")
def _run(
    listed: Shortlist,
    rows: jax.Array,
    state: LoopState,
    keys: Key | None,
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
            assert keys is not None
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
def _loss(
    listed: Shortlist, rows: jax.Array, w: jax.Array, top_k: int, signal: Signal
) -> jax.Array:
    return loss_of_list(listed.rows(rows), w, top_k, signal)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _certain(listed: Shortlist, w: jax.Array, top_k: int, signal: Signal) -> jax.Array:
    return certain(listed, w, top_k, signal)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _strongest(listed: Shortlist, w: jax.Array, top_k: int, signal: Signal) -> jax.Array:
    """Ids of the strongest examples of each query, [q, k]."""
    signs = signs_of(signal)
    scores = shortlists.signed_scores(listed, w, signs)  # [l, q, s]
    lists = [listed.ids[0 if listed.complete else i] for i in range(len(signs))]
    if signal != "top_k_abs":
        scores, lists = scores[:1], lists[:1]
    places = jax.lax.top_k(jnp.concatenate(list(scores), axis=-1), top_k)[1]
    return jnp.take_along_axis(jnp.concatenate(lists, axis=-1), places, axis=1)
