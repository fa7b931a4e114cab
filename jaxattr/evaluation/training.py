"""A training function for those who have none at hand."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxattr.batches import leading_size
from jaxattr.counts import whole_number
from jaxattr.evaluation.retraining import TrainFn
from jaxattr.groups import batch_statistics, by_leaf, leaf_names, resolve
from jaxattr.inputs.data import as_batch
from jaxattr.inputs.outputs import check_function
from jaxattr.inputs.parameters import as_checkpoints
from jaxattr.inputs.wording import brief, name_of
from jaxattr.typing import Batch, Key, OutputFn, Params


def trainer(
    loss: OutputFn,
    start: Params | Callable[[Key], Params],
    train: Batch,
    *,
    optimizer: optax.GradientTransformation | Callable[[int], optax.GradientTransformation],
    batch_size: int,
    epochs: int,
    exclude: str | None = None,
) -> TrainFn:
    """Makes a pure training function of a loss, for `ja.outcomes` and `ja.retrain`.

    Args:
      loss: (params, example, key) -> scalar, of one example, as methods take it.
      start: parameters, which are tuned; or key -> parameters, such as a model's initialisation.
        Whole numbers among them stay as they are.
      train: the training set, a pytree of arrays [n, ...]; stays on the device.
      optimizer: of Optax; or the number of steps -> one, for a schedule that ends with training.
      batch_size: examples per step; where there are fewer, all.
      epochs: passes over the examples, each in another order. Examples beyond the last full batch
        of a pass are left out of it.
      exclude: regular expression; parameters in whose names it is found stay as they are.

    Returns:
      (key, ids int [s]) -> params. The order of batches, the start and the loss's randomness come
      from the key. Its attribute `examples` is n.

    Raises:
      TypeError: if an argument is none of what it may be.
      ValueError: if the start holds batch statistics, or nothing that can be trained.

    Example:
      >>> def loss(params, example, key):
      ...     return (params * example - 1) ** 2
      >>> fit = trainer(loss, jnp.zeros(()), jnp.ones(8), optimizer=optax.sgd(0.1), batch_size=4,
      ...               epochs=20)
      >>> print(round(float(fit(jax.random.key(0), jnp.arange(6))), 2))
      0.99
    """
    batch_size = whole_number("batch_size", batch_size)
    epochs = whole_number("epochs", epochs)
    check_function(loss, "loss")
    module = getattr(optimizer, "__module__", None) or ""
    if inspect.isfunction(optimizer) and module.startswith("optax"):
        raise TypeError(
            f"optimizer is the function {name_of(optimizer)!r} of Optax itself, which would get "
            f"the number of steps for a learning rate: call it, optax.{name_of(optimizer)}(1e-3)."
        )
    if not callable(optimizer) or isinstance(optimizer, type):
        _check_optimizer(optimizer)
    data = jax.tree.map(jnp.asarray, as_batch(train, "train"))
    begin = _as_function(start)
    trained = _trained(jax.eval_shape(begin, jax.random.key(0)), exclude)

    def train_fn(key: Key, ids: jax.Array) -> Params:
        start_key, order_key, loss_key = jax.random.split(key, 3)
        moving, whole = _split(begin(start_key), trained)
        size = min(batch_size, len(ids))
        per_epoch = len(ids) // size
        orders = jax.vmap(jax.random.permutation, in_axes=(0, None))(
            jax.random.split(order_key, epochs), ids
        )
        batches = orders[:, : per_epoch * size].reshape(-1, size)
        steps = len(batches)
        chosen: Any = optimizer
        if not _is_optimizer(optimizer):
            chosen = optimizer(steps)
            _check_optimizer(chosen)

        def mean_loss(moving: Params, rows: jax.Array, key: Key) -> jax.Array:
            batch = jax.tree.map(lambda x: x[rows], data)
            keys = jax.random.split(key, len(rows))
            return jax.vmap(loss, in_axes=(None, 0, 0))(whole(moving), batch, keys).mean()

        def step(state: tuple, given: tuple) -> tuple[tuple, None]:
            moving, optimizer_state = state
            gradient = jax.grad(mean_loss)(moving, *given)
            updates, optimizer_state = chosen.update(gradient, optimizer_state, moving)
            return (optax.apply_updates(moving, updates), optimizer_state), None

        state = moving, chosen.init(moving)
        keys = jax.random.split(loss_key, steps)
        return whole(jax.lax.scan(step, state, (batches, keys))[0][0])

    train_fn.examples = leading_size(data)  # type: ignore[attr-defined]
    return train_fn


def _is_optimizer(value: Any) -> bool:
    has = all(callable(getattr(value, name, None)) for name in ("init", "update"))
    return has and not isinstance(value, type)


def _check_optimizer(value: Any) -> None:
    if not _is_optimizer(value):
        raise TypeError(
            "optimizer must be one of Optax, with init and update, such as optax.adam(1e-3), or a "
            f"function from the number of steps to one; got {type(value).__name__}: "
            f"{brief(repr(value), 60)}."
        )


def _as_function(start: Params | Callable[[Key], Params]) -> Callable[[Key], Params]:
    """The start as a function of a key. Modules of Equinox are called, and may be parameters."""
    arrays = any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(start))
    if callable(start) and (isinstance(start, functools.partial) or not arrays):
        check_function(start, "start", ("key",))
        return start
    _check_parameters(start)
    return lambda key: start


def _check_parameters(params: Params) -> None:
    try:
        as_checkpoints([params])
    except TypeError as error:
        raise TypeError(f"start holds parameters, as checkpoints do: {error}") from None


def _trained(shapes: Params, exclude: str | None) -> frozenset[str]:
    """Names of the parameters that training moves."""
    _check_parameters(shapes)
    layout = by_leaf(exclude=exclude)(shapes)
    names = frozenset(member.leaf for group in layout.members for member in group)
    statistics = batch_statistics(layout)
    if statistics:
        raise ValueError(
            f"start holds batch statistics, {len(statistics)} arrays ({statistics[0]}, ...), which "
            "training does not move along a gradient. Leave them as they are, "
            "exclude='batch_stats', or start from the parameters alone, and let the loss close "
            "over the statistics."
        )
    resolve(layout, shapes)  # refuses what is no parameter
    return names


def _split(params: Params, trained: frozenset[str]) -> tuple[Params, Callable[[Params], Params]]:
    """Parameters with None for those that stay, and the function that puts these back."""
    leaves, structure = jax.tree.flatten(params)
    moves = [name in trained for name in leaf_names(params)]

    def whole(moving: Params) -> Params:
        found = iter(jax.tree.leaves(moving))
        pairs = zip(leaves, moves, strict=True)
        return jax.tree.unflatten(structure, [next(found) if m else leaf for leaf, m in pairs])

    pairs = zip(leaves, moves, strict=True)
    return jax.tree.unflatten(structure, [leaf if m else None for leaf, m in pairs]), whole
