"""A training run, step by step, as a function of one weight per example."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.batches import leading_size
from jaxattr.counts import checked_ids, whole_number
from jaxattr.inputs.data import as_batch
from jaxattr.inputs.outputs import check_function
from jaxattr.inputs.traces import read_inputs, shapes_of, trace
from jaxattr.inputs.wording import brief, listed, shape, shapes
from jaxattr.leaves import named_leaves
from jaxattr.typing import Batch, Params

StepFn = Callable[[Any, Batch, jax.Array], Any]
"""(state, batch, weights float [b]) -> state: one step of training. Pure."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingRun:
    """A training run as `ja.unroll` goes back through it. `ja.trainer(...).run(key)` makes one.

    Attributes:
      step: (state, batch, weights float [b]) -> state, pure: one step, whose loss multiplies that
        of each example by its weight. Weights are ones in training, so a mean is
        `(weights * losses).mean()`; zero leaves an example out.
      start: the state before the first step, any pytree: parameters, the optimizer's state,
        running averages, a key. Of whole numbers and keys nothing is differentiated.
      batches: ids of the examples of each step: integers [steps, b], or a sequence of such [b] if
        batches differ in size; or, without `train`, a sequence of pairs (batch, ids) with `len` and
        [t], which are read several times and must be the same each time.
      train: the training set, a pytree of arrays [n, ...]; a step gets its rows.
      examples: n. Default: that of `train`.
      params: state -> what an output function is given. Default: the state itself.

    Raises:
      TypeError: if an argument is none of what it may be.
      ValueError: if ids are out of range, or the step fails, ignores its weights, cannot be
        differentiated, or returns a state of other shapes than it was given.

    Example:
      >>> def step(w, batch, weights):  # gradient descent on (w - x)^2 / 2
      ...     return w - 0.5 * (weights * (w - batch)).mean()
      >>> run = TrainingRun(step, jnp.zeros(()), np.array([[0, 1], [1, 2]]), jnp.arange(3.0))
      >>> print(run.trained(), run.trained(np.array([1.0, 0.0, 1.0])))
      0.875 0.5
    """

    step: StepFn
    start: Any
    batches: Any
    train: Batch | None = None
    examples: int | None = None
    params: Callable[[Any], Params] = lambda state: state

    def __post_init__(self) -> None:
        check_function(self.step, "step", ("state", "batch", "weights"))
        check_function(self.params, "params", ("state",))
        object.__setattr__(self, "start", jax.tree.map(jnp.asarray, self.start))
        if self.train is not None:
            train = jax.tree.map(jnp.asarray, as_batch(self.train, "train"))
            object.__setattr__(self, "train", train)
        object.__setattr__(self, "examples", _examples(self.train, self.examples))
        _check_sequence(self.batches)
        if self.train is not None:
            for number in range(len(self)):
                checked_ids(self.batches[number], self.size, _name(number))
        batch, _, weights = self.given(0)
        _check_step(self.step, self.start, batch, weights)
        _check_derivative(self.backward, self.start, batch, weights)

    @property
    def size(self) -> int:
        """The number of training examples, n."""
        assert self.examples is not None
        return self.examples

    def __len__(self) -> int:
        """Returns the number of steps."""
        return len(self.batches)

    def trained(self, weights: Any = None) -> Any:
        """Trains, with a weight for each training example.

        Args:
          weights: float [n], or [m, n] for m runs at once; 0 and 1 for subsets in the same order of
            batches. Default: ones.

        Returns:
          The state after the last step; of m runs its leaves are [m, ...], and parameters
          `jax.vmap(run.params)(states)`.

        Raises:
          ValueError: if there is not one weight for each example.
        """
        values = np.ones(self.size) if weights is None else np.asarray(weights)
        if values.ndim not in (1, 2) or values.shape[-1] != self.size:
            raise ValueError(
                f"weights must be one for each of {self.size} training examples, [n] or "
                f"[m, n]; got {list(values.shape)}."
            )
        values, step, state = values.astype(jnp.result_type(float)), jax.jit(self.step), self.start
        if values.ndim == 2:
            step = jax.jit(jax.vmap(self.step, in_axes=(0, None, 0)))
            state = jax.vmap(lambda row: state)(values)
        for number in range(len(self)):
            batch, ids, _ = self.given(number)
            state = step(state, batch, values[..., ids])
        return state

    def given(self, number: int) -> tuple[Batch, np.ndarray, np.ndarray]:
        """Returns the batch of a step, the ids of its examples, and weights of one."""
        item = self.batches[number]
        if self.train is None:
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise TypeError(
                    f"Batch {number} must be a pair (batch, ids), got {type(item).__name__}: pass "
                    "ids alone together with train=, or pairs."
                )
            batch, ids = item[0], checked_ids(item[1], self.size, _name(number))
        else:
            ids = checked_ids(item, self.size, _name(number))
            batch = rows_of(self.train, ids)
        return batch, ids, np.ones(len(ids), jnp.result_type(float))

    @functools.cached_property
    def forward(self) -> Callable[[Any, Batch, Any], Any]:
        """The step, compiled."""
        return jax.jit(self.step)

    @functools.cached_property
    def backward(self) -> Callable[[Any, Batch, Any, Any], tuple[Any, jax.Array]]:
        """Back through a step, compiled.

        (state, batch, weights [b], cotangents of the next state's floats, leaves [q, ...]) -> those
        of the state, and of the weights [q, b].
        """

        def pull(
            state: Any, batch: Batch, weights: jax.Array, cotangents: Any
        ) -> tuple[Any, jax.Array]:
            def floats_after(moving: list[jax.Array], weights: jax.Array) -> list[jax.Array]:
                return floats_of(self.step(with_floats(state, moving), batch, weights))

            pullback = jax.vjp(floats_after, floats_of(state), weights)[1]
            return jax.vmap(pullback)(cotangents)

        return jax.jit(pull)


def floats_of(state: Any) -> list[jax.Array]:
    """Returns the leaves of a state that have derivatives."""
    return [leaf for leaf in jax.tree.leaves(state) if _is_float(leaf)]


def with_floats(state: Any, floats: list[jax.Array]) -> Any:
    """Returns a state with other leaves in place of those of `floats_of`."""
    others = iter(floats)
    return jax.tree.map(lambda leaf: next(others) if _is_float(leaf) else leaf, state)


@jax.jit
def rows_of(data: Batch, ids: jax.Array) -> Batch:
    """Returns some rows of each array of a data set."""
    return jax.tree.map(lambda x: x[ids], data)


def _name(number: int) -> str:
    return f"the ids of batch {number}"


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _examples(train: Batch | None, examples: int | None) -> int:
    if examples is not None:
        examples = whole_number("examples", examples)
    found = examples if train is None else leading_size(train)
    if found is None:
        raise ValueError("examples= is needed where train= is not given: how many there are.")
    if examples not in (None, found):
        raise ValueError(f"examples is {examples}, and train has {found}: leave examples out.")
    return found


def _check_sequence(batches: Any) -> None:
    readable = all(hasattr(batches, name) for name in ("__len__", "__getitem__"))
    if not readable or isinstance(batches, dict | str | bytes):
        raise TypeError(
            "batches must be ids [steps, b] or a sequence with len and [t], since each batch is "
            f"read several times; got {type(batches).__name__}. Of a generator pass list(batches)."
        )
    if not len(batches):
        raise ValueError("batches is empty: there is no step to go back through.")


def _check_step(step: StepFn, start: Any, batch: Batch, weights: np.ndarray) -> None:
    batch = jax.tree.map(jnp.asarray, batch)
    given = f"It was given a state of {shapes(start)};\na batch of {shapes(batch)};\nand weights."
    try:
        program, after = trace(step, shapes_of((start, batch, weights)))
    except Exception as error:
        raise ValueError(
            f"step fails: {type(error).__name__}: {brief(error, 200)} It is compiled, so it must "
            f"be JAX alone.\n{given}"
        ) from error
    before, found = (
        {name: shape(leaf) for name, leaf in named_leaves(each).items()}
        for each in (shapes_of(start), after)
    )
    unlike = [
        f"{name} {found.get(name, 'missing')} instead of {before.get(name, 'nothing')}"
        for name in sorted(before.keys() | found.keys())
        if before.get(name) != found.get(name)
    ]
    structure: Any = jax.tree.structure(after)
    if unlike or structure != jax.tree.structure(start):
        differs = listed(unlike) or f"{structure} instead of {jax.tree.structure(start)}"
        raise ValueError(
            f"step must return a state like the one it is given, and no more; it differs: {differs}"
        )
    if not read_inputs(program.jaxpr)[-1]:
        raise ValueError(
            "step ignores its weights: the state that it returns does not depend on them. It must "
            "multiply the loss of each example by its weight: (weights * losses).mean()."
        )


def _check_derivative(backward: Callable, start: Any, batch: Batch, weights: np.ndarray) -> None:
    one = [jnp.zeros((1, *leaf.shape), leaf.dtype) for leaf in floats_of(start)]
    try:
        jax.eval_shape(backward, start, batch, weights, one)
    except Exception as error:
        raise ValueError(
            f"step cannot be differentiated: {type(error).__name__}: {brief(error, 300)} Loops "
            "must be jax.lax.scan, or fori_loop with a fixed number of turns, and no callbacks."
        ) from error
