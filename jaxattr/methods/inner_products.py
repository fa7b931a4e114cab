"""Methods with inner products of gradients: TracIn and its cosine."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxattr import kernels
from jaxattr.counts import real_numbers
from jaxattr.features import projections
from jaxattr.features.featurizer import FeatureRule
from jaxattr.features.projections import Projection
from jaxattr.methods.method import Method
from jaxattr.typing import OutputFn


def tracin(
    loss: OutputFn,
    *,
    checkpoint_weights: Sequence[float] | None = None,
    projection: Projection | None = None,
) -> Method:
    r"""TracIn: inner products of loss gradients, summed over checkpoints.

    .. math:: \tau(q, n) = \sum_c \eta_c \nabla\ell(\theta_c, q)^\top \nabla\ell(\theta_c, n)

    Guarantees: exact for groups of at most `dim` parameters of the projection, unbiased for larger.

    Args:
      loss: (params, example, key) -> scalar, summed over the example's tokens or pixels.
      checkpoint_weights: eta, for instance the learning rates. Default: one each.
      projection: of each group's gradient. Default: `rademacher(1024)`.

    Returns:
      The method.

    Raises:
      ValueError: if a checkpoint's weight is negative or not finite.

    References:
      Pruthi et al. (2020), arXiv:2002.08484, Eq. 5.
    """
    rule = FeatureRule(loss, projections.rademacher(1024) if projection is None else projection)
    eta = _checkpoint_weights(checkpoint_weights)
    return Method("TracIn", rule, kernels.Identity(), eta, references=("tracin",))


def grad_cos(
    loss: OutputFn,
    *,
    checkpoint_weights: Sequence[float] | None = None,
    projection: Projection | None = None,
) -> Method:
    r"""Cosine similarity of loss gradients, summed over checkpoints.

    All groups together are scaled to unit norm, per checkpoint, after projection.

    Args:
      loss: (params, example, key) -> scalar, summed over the example's tokens or pixels.
      checkpoint_weights: as in `tracin`.
      projection: of each group's gradient. Default: `rademacher(1024)`.

    Returns:
      The method.

    Raises:
      ValueError: if a checkpoint's weight is negative or not finite.

    References:
      Charpiat et al. (2019), arXiv:1906.01930; Hammoudeh and Lowd (2022), arXiv:2201.10055.
    """
    base = tracin(loss, checkpoint_weights=checkpoint_weights, projection=projection)
    rule = dataclasses.replace(base.rule, normalize=True)
    return dataclasses.replace(base, name="GradCos", rule=rule, references=("grad_cos",))


def _checkpoint_weights(weights: Sequence[float] | None) -> tuple[float, ...] | None:
    if weights is None:
        return None
    if np.ndim(weights) != 1:
        raise TypeError(
            f"checkpoint_weights must be a list, one number per checkpoint, got {weights!r}: of "
            f"one checkpoint [{weights!r}]."
        )
    found = tuple(real_numbers("checkpoint_weights", weights).tolist())
    bad = {c: weight for c, weight in enumerate(found) if not 0 <= weight < math.inf}
    if bad:
        raise ValueError(
            f"checkpoint_weights must be finite and at least 0, one per checkpoint, got {bad} "
            "(checkpoint: weight). Pass learning rates, or 0 to leave a checkpoint out."
        )
    return found
