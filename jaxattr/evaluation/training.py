"""A training function for those who have none at hand."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxattr.batches import leading_size
from jaxattr.counts import checked_ids, whole_number
from jaxattr.groups import batch_statistics, by_leaf, pattern_of, resolve
from jaxattr.inputs.data import as_batch
from jaxattr.inputs.outputs import check_function
from jaxattr.inputs.parameters import as_checkpoints
from jaxattr.inputs.wording import brief, name_of
from jaxattr.keys import check_key, key_or_default
from jaxattr.leaves import leaf_names
from jaxattr.typing import Batch, Key, OutputFn, Params
from jaxattr.unrolling.runs import StepFn, TrainingRun, rows_of


class Trainer(Protocol):
    """A training function, as `ja.trainer` makes it.

    Attributes:
      examples: how many it can train on.
    """

    examples: int

    def __call__(self, key: Key, ids: jax.Array) -> Params:
        """Trains from the key on the examples that ids name."""

    def run(self, key: Key, ids: Any = None) -> TrainingRun:
        """Returns the same training as steps, for `ja.unroll`; of all examples without ids."""


def trainer(
    loss: OutputFn,
    start: Params | Callable[[Key], Params],
    train: Batch,
    *,
    optimizer: optax.GradientTransformation | Callable[[int], optax.GradientTransformation],
    batch_size: int,
    epochs: int,
    exclude: str | None = None,
) -> Trainer:
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
      from the key. Its attribute `examples` is n; `run(key)`, or `run(key, ids)`, is the same
      training as a `ja.TrainingRun`, for `ja.unroll`.

    Raises:
      TypeError: if an argument is none of what it may be.
      ValueError: if the start holds batch statistics, or nothing that can be trained; if `exclude`
        is found in no name.

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
        check_optimizer(optimizer)
    data = jax.tree.map(jnp.asarray, as_batch(train, "train"))
    begin = _as_function(start)
    trained = trained_names(jax.eval_shape(begin, key_or_default(None)), exclude, "start")

    def parts(key: Key, ids: jax.Array) -> tuple[StepFn, tuple, _Steps, Callable[[Params], Params]]:
        """What training from a key is made of; the last makes parameters of those that move."""
        start_key, order_key, loss_key = jax.random.split(key, 3)
        moving, whole = split_parameters(begin(start_key), trained)
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
            check_optimizer(chosen)

        def mean_loss(moving: Params, batch: Batch, key: Key, weights: jax.Array) -> jax.Array:
            keys = jax.random.split(key, len(weights))
            losses = jax.vmap(loss, in_axes=(None, 0, 0))(whole(moving), batch, keys)
            return (weights.astype(losses.dtype) * losses).mean()

        def step(state: tuple, given: tuple, weights: jax.Array) -> tuple:
            moving, optimizer_state = state
            gradient = jax.grad(mean_loss)(moving, *given, weights)
            updates, optimizer_state = chosen.update(gradient, optimizer_state, moving)
            return optax.apply_updates(moving, updates), optimizer_state

        keys = jax.random.split(loss_key, steps)
        return step, (moving, chosen.init(moving)), _Steps(data, batches, keys), whole

    def train_fn(key: Key, ids: jax.Array) -> Params:
        if not any(isinstance(each, jax.core.Tracer) for each in (key, ids)):
            key, ids = check_key(key), jnp.asarray(_checked(ids, examples))
        step, start, steps, whole = parts(key, ids)
        ones = jnp.ones(steps.ids.shape[1])

        def next_state(state: tuple, each: tuple) -> tuple[tuple, None]:
            return step(state, steps.batch(*each), ones), None

        return whole(jax.lax.scan(next_state, start, (steps.ids, steps.keys))[0][0])

    def run(key: Key, ids: Any = None) -> TrainingRun:
        chosen = np.arange(examples) if ids is None else _checked(ids, examples)
        step, start, steps, whole = parts(check_key(key), jnp.asarray(chosen))
        # On the host, where they are looked at: else each step waits for the one before.
        steps = dataclasses.replace(steps, ids=np.asarray(steps.ids))
        return TrainingRun(
            step, start, steps, examples=examples, params=lambda state: whole(state[0])
        )

    examples = leading_size(data)
    train_fn.examples = examples  # type: ignore[attr-defined]
    train_fn.run = run  # type: ignore[attr-defined]
    return cast(Trainer, train_fn)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The batches of all steps, one by one, with the ids of their examples.

    Attributes:
      data: the training set.
      ids: [steps, b].
      keys: of the losses, [steps].
    """

    data: Batch
    ids: jax.Array | np.ndarray
    keys: Key

    def batch(self, ids: jax.Array | np.ndarray, key: Key) -> tuple[Batch, Key]:
        return rows_of(self.data, ids), key

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> tuple[tuple[Batch, Key], jax.Array | np.ndarray]:
        ids = self.ids[number]
        return self.batch(ids, self.keys[number]), ids


def _checked(ids: Any, examples: int) -> np.ndarray:
    ids = checked_ids(ids, examples, "ids")
    if len(ids) == examples >= 8 and ids.max() < 2:  # of fewer examples a bootstrap may be so
        raise ValueError(
            f"ids must be those of training examples, and these {examples} are all 0 or 1, as a "
            "mask is: pass np.flatnonzero(mask)."
        )
    return ids


def _is_optimizer(value: Any) -> bool:
    has = all(callable(getattr(value, name, None)) for name in ("init", "update"))
    return has and not isinstance(value, type)


def check_optimizer(value: Any) -> None:
    """Raises if something is no optimizer of Optax."""
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
    parameters = _checked_parameters(start)
    return lambda key: parameters


def _checked_parameters(params: Params) -> Params:
    try:
        return as_checkpoints([params])[0]
    except TypeError as error:
        raise TypeError(f"start holds parameters, as checkpoints do: {error}") from None


def trained_names(shapes: Params, exclude: str | None, what: str) -> frozenset[str]:
    """Names of the parameters that training moves.

    Args:
      shapes: of the parameters.
      exclude: regular expression; parameters in whose names it is found stay as they are.
      what: the argument that they are, for messages.

    Raises:
      ValueError: if there are batch statistics among them, or nothing that can be trained.
    """
    _checked_parameters(shapes)
    layout = by_leaf(exclude=exclude)(shapes)
    names = frozenset(member.leaf for group in layout.members for member in group)
    statistics = batch_statistics(layout, shapes)
    if statistics:
        exclude = pattern_of(statistics, leaf_names(shapes))
        raise ValueError(
            f"{what} holds batch statistics, {len(statistics)} arrays ({statistics[0]}, ...), "
            "which training does not move along a gradient. Leave them as they are, "
            f"exclude={exclude!r}, or pass the parameters alone, and let the loss close over the "
            "statistics."
        )
    resolve(layout, shapes)  # refuses what is no parameter
    return names


def split_parameters(
    params: Params, trained: frozenset[str]
) -> tuple[Params, Callable[[Params], Params]]:
    """Takes out what training does not move.

    Args:
      params: all parameters.
      trained: names of those that training moves.

    Returns:
      The parameters with None for those that stay, and the function that puts these back.
    """
    leaves, structure = jax.tree.flatten(params)
    named = zip(leaf_names(params), leaves, strict=True)
    moving = jax.tree.unflatten(structure, [x if name in trained else None for name, x in named])

    def whole(moving: Params) -> Params:
        return jax.tree.map(
            lambda new, old: old if new is None else new,
            moving, params, is_leaf=lambda x: x is None,
        )  # fmt: skip

    return moving, whole
