"""Tail-patch: does one more step on a proponent make the model say the query's target?"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxattr.batches import leading_size, shapes_of_one
from jaxattr.counts import whole_number
from jaxattr.evaluation.training import check_optimizer, split_parameters, trained_names
from jaxattr.inputs.data import as_batch
from jaxattr.inputs.outputs import check_output
from jaxattr.sources import track
from jaxattr.typing import Batch, Example, OutputFn, Params


def tail_patch(
    loss: OutputFn,
    measure: OutputFn,
    params: Params,
    train: Batch,
    queries: Batch,
    ids: Any,
    *,
    optimizer: optax.GradientTransformation,
    optimizer_state: Any = None,
    exclude: str | None = None,
    at_once: int = 8,
) -> np.ndarray:
    """Takes one optimizer step on a single training example, and measures the change of a query.

    Every step starts from the same parameters and optimizer state: nothing is kept.

    Args:
      loss: (params, example, key) -> scalar that the step descends. Its scale matters to
        optimizers without normalisation: a mean over tokens if training used that.
      measure: (params, example, key) -> scalar of a query, such as its target's probability.
      params: the model at the end of its training.
      train: training examples, a pytree of arrays [n, ...].
      queries: a pytree of arrays [q, ...].
      ids: integers [q, k], each query's proponents; or what `ja.top_k` returned.
      optimizer: takes the step, with its learning rate.
      optimizer_state: where the training left it. Default: that of a training that begins.
      exclude: as in `ja.trainer`: parameters in whose names it is found stay as they are, as whole
        numbers do. The state is of the others, `None` in the place of these.
      at_once: steps in memory at once, each with its own parameters and optimizer state.

    Returns:
      measure after the step minus before, float [q, k]; the paper reports 100 times its mean. NaN
      for proponents that are missing (id -1), or have a loss that is not finite.

    Raises:
      ValueError: if ids are no [q, k] of training examples, there are batch statistics among the
        parameters, or a state is not of this optimizer and these parameters.

    Cost: q k gradient steps; a pair that occurs several times is computed once.

    References:
      Chang et al. (2024), TrackStar, arXiv:2410.17413, section 4.2. Deviation: their optimizer and
      learning rate are not published in full, so both are arguments.
    """
    train, queries = as_batch(train, "train"), as_batch(queries, "queries")
    n, q, ids = leading_size(train), leading_size(queries), np.asarray(getattr(ids, "ids", ids))
    if ids.ndim != 2 or len(ids) != q or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids must be integers [{q}, k], got {ids.dtype} {list(ids.shape)}.")
    if ids.size and not -1 <= ids.min() <= ids.max() < n:
        raise ValueError(
            f"ids must be those of the {n} training examples, or -1; got {ids.min()}, {ids.max()}."
        )
    at_once = whole_number("at_once", at_once)
    key = jax.random.key(0)
    train, queries = jax.tree.map(jnp.asarray, (train, queries))
    check_output(loss, params, shapes_of_one(train), key)
    check_output(measure, params, shapes_of_one(queries), key)
    check_optimizer(optimizer)
    trained = trained_names(jax.eval_shape(lambda: params), exclude, "params")
    moving, _ = split_parameters(params, trained)
    state = optimizer.init(moving) if optimizer_state is None else optimizer_state
    expected: Any = jax.tree.structure(jax.eval_shape(optimizer.init, moving))
    if expected != jax.tree.structure(state):
        raise ValueError(
            f"optimizer_state must be of this optimizer and these parameters, {expected}, got "
            f"{jax.tree.structure(state)}."
        )
    params, state = jax.device_put((params, state))  # once, and not for each block
    step = _compiled_steps(loss, measure, optimizer, trained, at_once)
    pairs = np.stack([np.repeat(np.arange(q), ids.shape[1]), ids.reshape(-1)], axis=1)
    there = pairs[:, 1] >= 0
    once, places = np.unique(pairs[there], axis=0, return_inverse=True)
    changes, found = np.full(len(pairs), np.nan), np.empty(len(once))
    block = 8 * at_once
    starts = range(0, len(once), block)
    for start in track(iter(starts), "tail-patch", len(starts)):
        chosen = np.arange(start, min(start + block, len(once)))
        padded = once[np.resize(chosen, block)]
        found[chosen] = np.asarray(step(params, state, train, queries, padded))[: len(chosen)]
    changes[there] = found[places.reshape(-1)]
    return changes.reshape(ids.shape)


def _compiled_steps(
    loss: OutputFn,
    measure: OutputFn,
    optimizer: optax.GradientTransformation,
    trained: frozenset[str],
    at_once: int,
) -> Any:
    @jax.jit
    def run(params: Params, state: Any, train: Batch, queries: Batch, pairs: jax.Array) -> Any:
        key = jax.random.key(0)
        moving, whole = split_parameters(params, trained)

        def of_moving(moving: Params, example: Example) -> jax.Array:
            return loss(whole(moving), example, key)

        def change(pair: jax.Array) -> jax.Array:
            query = jax.tree.map(lambda x: x[pair[0]], queries)
            example = jax.tree.map(lambda x: x[pair[1]], train)
            value, gradient = jax.value_and_grad(of_moving)(moving, example)
            updates, _ = optimizer.update(gradient, state, moving)
            patched = whole(optax.apply_updates(moving, updates))
            found = measure(patched, query, key) - measure(params, query, key)
            # A label out of range: the gradient is finite, and wrong.
            return jnp.where(jnp.isfinite(value), found, jnp.nan)

        return jax.lax.map(change, pairs, batch_size=at_once)

    return run
