r"""Agreement of weighted scores with retrained models: an objective of weights, in closed sums.

A subset's prediction is the sum of its examples' scores, so of contributions it is linear in the
weights, and its variance over random subsets a quadratic form of them. With :math:`\tilde c` the
contributions of query q, centred over the n training examples,

.. math:: G_q = \sum_n \tilde c_n \tilde c_n^\top, \qquad
          P_{qs} = \sum_{n \in s} \tilde c_n, \qquad
          f_{qs}(w) = \frac{w^\top P_{qs}}{\sqrt{v\, w^\top G_q w}}

where v makes the denominator the deviation over all subsets of that size, not over the few at
hand: only the slope is estimated from R models. With :math:`y_{qs}` the rank of the output of model
s on q among the models, of unit variance,

.. math:: J_s(w) = \operatorname{mean}_q\, y_{qs} f_{qs}(w)

is model s's share of the linear datamodelling score of these weights.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


class LinearSums(NamedTuple):
    """What predictions of subsets are made of, where they are linear in the weights.

    Attributes:
      sums: of centred contributions over each subset, [s, q, m].
      gram: w^T (...) w is the variance of a prediction over random subsets, [q, m, m].
    """

    sums: Array
    gram: Array

    def predictions(self, w: jax.Array) -> jax.Array:
        """Predictions [s, q] of unit variance over random subsets, under weights [m]."""
        product = jnp.matmul(self.gram, w, precision="highest")  # [q, m]
        return _over(
            jnp.matmul(self.sums, w, precision="highest"),
            jnp.matmul(product, w, precision="highest"),
        )


class SquaredSums(NamedTuple):
    """The same where scores are squares: quadratic in the weights.

    The variance of a sum of squares over all subsets is of fourth order in contributions; that over
    the subsets at hand stands in for it.

    Attributes:
      products: sums over each subset of the products of contributions, centred over the subsets,
        [s, q, m, m].
    """

    products: Array

    def predictions(self, w: jax.Array) -> jax.Array:
        """Predictions [s, q] of unit variance over the subsets, under weights [m]."""
        product = jnp.matmul(self.products, w, precision="highest")  # [s, q, m]
        found = jnp.matmul(product, w, precision="highest")
        return _over(found, jnp.mean(found**2, axis=0))


Sums = LinearSums | SquaredSums


class Evidence(NamedTuple):
    """What weights are fitted to.

    Attributes:
      sums: of the learning queries over the subsets.
      ranks: of each model's output on each query among the models, centred, of unit variance;
        zero for a query that says nothing, [s, q].
      copies: sums of noised copies, each over the one example that it was made of, [1, copies, ..];
        None if there are none.
    """

    sums: Sums
    ranks: Array
    copies: Sums | None


class Strengths(NamedTuple):
    """How strongly the parts of the objective count.

    Attributes:
      models: which models count, 1 or 0, [s].
      caution: standard errors of the gain that are taken off it (tau).
      copies: of the copies' term (mu).
      pull: towards uniform weights, of the variance of their logarithms (lambda).
    """

    models: jax.Array
    caution: jax.Array
    copies: jax.Array
    pull: jax.Array


def agreement(w: jax.Array, sums: Sums, ranks: Array) -> jax.Array:
    """Each model's share of the linear datamodelling score, J_s(w), [s].

    Guarantees: does not see the scale of the weights; the mean over models is the mean over queries
    of the correlation of predictions with ranks, up to the sampling error of the predictions'
    variance.

    Args:
      w: weights [m].
      sums: of contributions.
      ranks: [s, q]; a query of zeros does not count.
    """
    counted = jnp.any(ranks != 0, axis=0).sum()
    shares = jnp.asarray(ranks) * sums.predictions(w)
    return jnp.sum(shares, axis=1) / jnp.maximum(counted, 1)


def outcome_loss(weights: Any, evidence: Evidence, strengths: Strengths) -> jax.Array:
    r"""The loss of weights under evidence of retrained models, a pure function of a weight pytree.

    .. math:: -\frac{\operatorname{mean}_s d_s - \tau \operatorname{se}_s d_s}{J}
              - \mu \frac{J_c(w) - J_c(1)}{|J_c(1)|} + \lambda \operatorname{var}_j \log w_j

    with :math:`d_s = J_s(w) - J_s(1)`, J the mean of J_s(1) or two of its standard errors, if that
    is larger, and J_c the mean prediction, for a copy, of the example that it was made of.

    Guarantees: zero at uniform weights; does not see the scale of the weights.

    Args:
      weights: a pytree of m positive scalars whose leaves are in the order of the groups.
      evidence: what they are fitted to.
      strengths: of the parts.

    Returns:
      A scalar.
    """
    w = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(weights)])
    sums, ranks, copies = evidence
    uniform = jnp.ones_like(w)
    base = agreement(uniform, sums, ranks)
    unit = reference(base, strengths.models)
    mean, error = mean_and_error(agreement(w, sums, ranks) - base, strengths.models, 1e-4 * unit)
    gain = (mean - strengths.caution * error) / unit
    if copies is not None:
        found, before = copies.predictions(w).mean(), copies.predictions(uniform).mean()
        # Where uniform weights predict less than nothing, more of it is no gain.
        gain = gain + strengths.copies * (found - before) / jnp.maximum(jnp.abs(before), 1e-12)
    return strengths.pull * jnp.var(jnp.log(w)) - gain


def reference(base: jax.Array, models: jax.Array) -> jax.Array:
    """The unit of gains: the agreement of uniform weights, or two standard errors if larger."""
    mean, error = mean_and_error(base, models, jnp.asarray(0.0))
    return jnp.maximum(jnp.maximum(mean, 2 * error), 1e-12)


def mean_and_error(
    values: jax.Array, models: jax.Array, least: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean of some models' values, and its standard error.

    Args:
      values: [s].
      models: which count, 1 or 0, [s].
      least: deviation that is added in squares, so that no deviation at all has a gradient.
    """
    count = models.sum()
    mean = jnp.sum(models * values) / count
    variance = jnp.sum(models * (values - mean) ** 2) / (count - 1)
    return mean, jnp.sqrt((variance + least**2) / count)


def _over(predictions: jax.Array, variance: jax.Array) -> jax.Array:
    """Predictions [s, q] over their deviation; zero where there is none."""
    usable = variance > 0
    deviation = jnp.sqrt(jnp.where(usable, variance, 1))
    return jnp.where(usable[None], predictions / deviation[None], 0)
