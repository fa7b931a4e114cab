"""Whether TRAK was given a loss, or a log-probability, where a margin belongs."""

import warnings
from typing import Any

import jax
import numpy as np
import optax

from jaxattr.features.bases import Fitted
from jaxattr.index.checkpoint_builds import BuildJob
from jaxattr.inputs.wording import name_of
from jaxattr.methods.trak import one_minus
from jaxattr.store.rows import COLUMNS, EXAMPLES, Rows
from jaxattr.typing import Key, Params

# A margin has both signs when parameters are at random; of fewer examples that could be chance.
_ENOUGH, _SHUFFLES, _CHANGE = 16, 3, 0.1
_CLOSE, _MANY = 0.05, 0.1  # below zero; of all examples
_ODDS = (
    "TRAK takes the log-odds of the label, larger for better: its logit minus the log-sum-exp of "
    "the others."
)


def warn_of_losses(job: BuildJob, rows: Rows, fitted: Fitted) -> None:
    """Warns if what TRAK takes for margins has one sign, as losses have; heuristic.

    Of a model that fits, log-probabilities end at zero, and many are close to it; margins pass it.

    Margins of a model that fits its data may all be positive. So parameters are shuffled, whose
    model fits nothing, and a block of examples is looked at again, by the step that is compiled.

    Args:
      job: what the index is made from.
      rows: of its first checkpoint, written.
      fitted: what the basis was fitted to there.
    """
    residual = job.featurizer.rule.residual
    if residual is None or name_of(residual) != one_minus.__name__:
        return
    columns, output = rows.column(EXAMPLES, 0), job.featurizer.rule.output
    column, finite = columns[:, COLUMNS.residual], columns[:, COLUMNS.finite] > 0
    if _ends_at_zero(column[finite]):
        warnings.warn(
            f"{name_of(output)!r} was given to TRAK as the margin, but is never positive, and "
            f"often just below zero: it looks like a log-probability. {_ODDS} With a "
            "log-probability, scores are other ones.",
            UserWarning,
            stacklevel=4,
        )
        return
    if _has_both_signs(column[finite]) or job.place.mesh is not None:
        return
    over = job.pass_over(0)
    first = next(over.batches("looking at margins"))
    drawn, count = job.featurizer.draw(0, fitted), int(first.real.sum())
    known, there = column[:count], finite[:count]
    for seed in range(_SHUFFLES):
        params = _shuffled(jax.random.key(seed), over.params)
        given = (job.featurizer.key, params, first.batch, first.ids, drawn, fitted)
        found = np.asarray(job.featurizer.step(*given).residual)[:count]
        # Small adapters of a model that fits, or a single number, say nothing when shuffled.
        changed = np.abs(found - known)[there].max(initial=0)
        if _has_both_signs(found[there]) or changed < _CHANGE:
            return
    warnings.warn(
        f"{name_of(output)!r} was given to TRAK as the margin, but is never "
        f"negative, not even with shuffled parameters: it looks like a loss. {_ODDS} With a loss, "
        "scores have the wrong sign and scale.",
        UserWarning,
        stacklevel=4,
    )


def _has_both_signs(residual: Any) -> bool:
    """Whether some margin is not positive, 1 - p = sigmoid(-margin) at least a half."""
    return len(residual) < _ENOUGH or bool((residual >= 0.5).any())


def _ends_at_zero(residual: np.ndarray) -> bool:
    """Whether no margin is positive, but many are all but zero: see `_has_both_signs`."""
    if len(residual) < _ENOUGH or not (residual >= 0.5).all():
        return False
    # At zero itself are also outputs that are whole numbers.
    close = (residual > 0.5) & (residual < 1 / (1 + np.exp(-_CLOSE)))
    return bool(close.mean() >= _MANY)


def _shuffled(key: Key, params: Params) -> Params:
    def mixed(key: Key, x: jax.Array) -> jax.Array:
        return jax.random.permutation(key, x.ravel()).reshape(x.shape)

    return jax.tree.map(mixed, optax.tree.split_key_like(key, params), params)
