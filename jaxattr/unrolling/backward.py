"""Back through the steps of a training run, for all queries of a group in one pass."""

import math
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.batches import leading_size, shapes_of_one
from jaxattr.counts import whole_number
from jaxattr.index.index import NonFiniteWarning, report_non_finite
from jaxattr.inputs.data import as_batch
from jaxattr.inputs.outputs import check_function, check_output, runs
from jaxattr.keys import example_keys, key_or_default
from jaxattr.sources import track
from jaxattr.typing import Batch, Key, OutputFn
from jaxattr.unrolling.runs import TrainingRun, floats_of, with_floats

# Queries of one backward pass; each has its own cotangents, as large as the state.
_AT_ONCE = 32


def unroll(
    run: TrainingRun,
    output: OutputFn,
    queries: Batch,
    *,
    key: Key | None = None,
    at_once: int | None = None,
    stored: int | None = None,
) -> np.ndarray:
    r"""Unrolled influence: the derivative of an output after training by each example's weight.

    .. math:: \tau(q, n) = \frac{\partial}{\partial w_n} f_q(\theta_T(w)) \Big|_{w = 1}

    where :math:`\theta_T(w)` is what the run's own steps make of its start when the loss of example
    n is multiplied by :math:`w_n` wherever n occurs. Reverse mode; states between steps are made
    anew from some that are kept.

    Scores are of the output as it is, larger = more of it, like those of models in `ja.lds` and
    `ja.outcomes`: with minus a loss they have the sign of `ja.tracin(loss)`, and after one step of
    gradient descent from a start they are TracIn there times the learning rate over the batch.

    Guarantees: exact, up to rounding, for this run: its start, its order of batches, its keys. How
    far that speaks for other seeds is for `ja.lds` to say. An example in no batch has zero.
    Cost: with the default `stored`, the training twice, and for each group of queries once more and
    the derivative of each step: a step's forward pass and one backward pass per query. Memory: 2
    sqrt(steps) states; and for each query of a group one state and a step's backward pass. On one
    device, or where the run's arrays are; a run that is killed starts again.

    Args:
      run: the training run; `ja.trainer(...).run(key)`, or `ja.TrainingRun(step, start, ...)`.
      output: (params, example, key) -> scalar, larger = more of what is attributed: a margin, or
        minus the loss. It is given `run.params(state)`.
      queries: a pytree of arrays [q, ...].
      key: of a stochastic output.
      at_once: queries of one backward pass. Default: 32.
      stored: states kept of each stretch of steps, at least 2. Stretches between them are cut
        again, so that memory is stored x ceil(log(steps) / log(stored)) states, and the training is
        repeated as many times as there are factors. Default: ceil(sqrt(steps)).

    Returns:
      Scores, float64 [q, n]; as those of an index in `ja.lds`, and a reference in
      `ja.learn_weights`. A query whose output or its gradient is not finite has NaN.

    Raises:
      TypeError: if an argument is none of what it may be.
      ValueError: if the output is no scalar, or the run ends with a state that is not finite.

    Warns:
      NonFiniteWarning: with the positions of queries whose output or its gradient is not finite,
        and with how many others have scores that are not. The root of Adam has no derivative where
        a second moment is zero, as of a parameter that has had no gradient: train with
        `optax.adam(..., eps_root=1e-8)`.
      UserWarning: if every score is zero.

    Example:
      >>> def step(w, batch, weights):  # gradient descent on (w - x)^2 / 2
      ...     return w - 0.5 * (weights * (w - batch)).mean()
      >>> run = TrainingRun(step, jnp.zeros(()), np.array([[0, 1], [1, 2]]), jnp.arange(3.0))
      >>> print(unroll(run, lambda w, query, key: query * w, jnp.array([1.0, 2.0])))
      [[0.     0.3125 0.4375]
       [0.     0.625  0.875 ]]

    References:
      Ilyas and Engstrom (2025), MAGIC, arXiv:2504.16430; Engstrom et al. (2025), arXiv:2503.13751,
      section 3, for states that are made anew.
    """
    if not isinstance(run, TrainingRun):
        raise TypeError(
            "run must be a training run, ja.trainer(...).run(key) or ja.TrainingRun(step, start, "
            f"batches, train); got {type(run).__name__}."
        )
    check_function(output, "output")
    params = jax.eval_shape(run.params, run.start)
    queries = as_batch(queries, "queries", lambda example: runs(output, params, example))
    queries = jax.tree.map(jnp.asarray, queries)
    key = key_or_default(key)
    check_output(output, params, shapes_of_one(queries), key)
    at_once = whole_number("at_once", _AT_ONCE if at_once is None else at_once)
    root = max(2, math.isqrt(len(run) - 1) + 1)
    stored = whole_number("stored", root if stored is None else stored, least=2)
    segments = _segments(run, _Segment(0, len(run), run.start), stored)
    final = _advanced(run, segments[-1].state, segments[-1].first, len(run))
    if not all(jnp.isfinite(leaf).all() for leaf in floats_of(final)):
        raise ValueError(
            "The run ends with a state that is not finite: training diverged. Lower its learning "
            "rate, or clip gradients."
        )
    count, gradients = leading_size(queries), _gradients(run, output, final)
    keys = example_keys(key, jnp.arange(count), "queries")
    scores, lost = np.zeros((count, run.size)), np.zeros(count, bool)

    def given() -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Yields (step, first query, ids [b], cotangents of weights [some queries, b])."""
        for first in range(0, count, at_once):
            some = jax.tree.map(lambda x, first=first: x[first : first + at_once], (queries, keys))
            cotangents, finite = gradients(floats_of(final), *some)
            lost[first : first + at_once] = ~np.asarray(finite)
            for number, ids, found in _back(run, segments, cotangents, stored):
                yield number, first, ids, np.asarray(found, np.float64)

    last_bad = -1
    for number, first, ids, found in track(given(), "unrolling", len(run) * -(-count // at_once)):
        if not np.isfinite(found).all():
            last_bad = max(last_bad, number)
        np.add.at(scores[first : first + len(found)].T, ids, found.T)
    report_non_finite(np.flatnonzero(lost), count, "queries")
    _warn(scores[~lost], last_bad, len(run))
    scores[lost] = np.nan
    return scores


unroll.references = ("magic", "replay")  # type: ignore[attr-defined]


class _Segment(NamedTuple):
    """Steps from `first` up to `last`, which is left out, and the state before them."""

    first: int
    last: int
    state: Any


def _advanced(run: TrainingRun, state: Any, first: int, last: int) -> Any:
    for number in range(first, last):
        batch, _, weights = run.given(number)
        state = run.forward(state, batch, weights)
    return state


def _segments(run: TrainingRun, whole: _Segment, stored: int) -> list[_Segment]:
    """Cuts a segment into so many, going forward through all but the last."""
    first, last, state = whole
    length = math.ceil((last - first) / stored)
    found: list[_Segment] = []
    for start in range(first, last, length):
        if found:
            state = _advanced(run, state, found[-1].first, start)
        found.append(_Segment(start, min(start + length, last), state))
    return found


def _gradients(run: TrainingRun, output: OutputFn, final: Any) -> Callable[..., Any]:
    """Makes (floats of the final state, queries, keys) -> gradients, and which are finite.

    The others are zero.
    """

    def value(floats: list[jax.Array], query: Any, key: Key) -> jax.Array:
        return output(run.params(with_floats(final, floats)), query, key)

    def gradient(floats: list[jax.Array], query: Any, key: Key) -> tuple[Any, jax.Array]:
        # An output that is none may have a gradient (a label out of range).
        found = jax.value_and_grad(value)(floats, query, key)
        finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(found)]).all()
        return jax.tree.map(lambda x: jnp.where(finite, x, 0), found[1]), finite

    return jax.jit(jax.vmap(gradient, in_axes=(None, 0, 0)))


def _back(
    run: TrainingRun, segments: list[_Segment], cotangents: Any, stored: int
) -> Generator[tuple[int, np.ndarray, jax.Array], None, Any]:
    """Yields what each step gives to weights, the last first; returns cotangents of the start."""
    for segment in reversed(segments):
        if segment.last - segment.first == 1:
            batch, ids, weights = run.given(segment.first)
            cotangents, found = run.backward(segment.state, batch, weights, cotangents)
            yield segment.first, ids, found
        else:
            within = _segments(run, segment, stored)
            cotangents = yield from _back(run, within, cotangents, stored)
    return cotangents


def _warn(scores: np.ndarray, last_bad: int, steps: int) -> None:
    bad = int((~np.isfinite(scores).all(axis=1)).sum())
    if bad:
        warnings.warn(
            f"Scores of {bad} of {len(scores)} queries are not finite: the derivative of step "
            f"{last_bad} of {steps} is not, and so those before. The root of Adam has none "
            "where a second moment is zero, as of a parameter that had no gradient yet: train with "
            "optax.adam(..., eps_root=1e-8), or its like.",
            NonFiniteWarning,
            stacklevel=3,
        )
    elif len(scores) and not scores.any():
        warnings.warn(
            "Every score is zero: the state depends on weights, but has no derivative by them. "
            "Does step compare them, round them or stop their gradient? It must multiply the loss "
            "of each example by its weight.",
            UserWarning,
            stacklevel=3,
        )
