"""TRAK and its kin for diffusion models: inverse Gram matrices of projected gradients."""

import dataclasses

import jax

from jaxattr import kernels
from jaxattr.features import projections
from jaxattr.features.featurizer import FeatureRule
from jaxattr.features.projections import Projection
from jaxattr.inputs.outputs import check_function
from jaxattr.kernels import Damping
from jaxattr.methods.method import Method
from jaxattr.typing import Example, Key, Link, OutputFn, Params


def trak(
    margin: OutputFn,
    *,
    residual: OutputFn | None = None,
    damping: Damping | None = None,
    dense: bool = False,
    projection: Projection | None = None,
) -> Method:
    r"""TRAK: one Newton step of the linearised model, averaged over an ensemble.

    .. math:: \tau(q, n) = \Big[\tfrac1C \sum_c \phi_c(q)^\top (\Phi_c^\top\Phi_c + \lambda I)^{-1}
              \phi_c(n)\Big] \cdot \Big[\tfrac1C \sum_c (1 - p_c(n))\Big]

    with phi the projected gradient of the margin log(p / (1 - p)). The two averages are taken
    apart, as in the published code.

    Args:
      margin: (params, example, key) -> scalar, for instance the logit of the label minus the
        log-sum-exp of the other logits.
      residual: scalar of one training example. Default: 1 - p = sigmoid(-margin).
      damping: of the Gram matrix, which carries no 1/n. Default: `relative(0.1)`.
      dense: one kernel for all groups instead of one for each.
      projection: of each group's gradient. Default: `rademacher(512)`.

    Returns:
      The method.

    References:
      Park et al. (2023), arXiv:2303.14186, Eq. 12-13. Deviations: the kernel is block-diagonal by
      group unless `dense`; damped; not divided by its mean absolute entry; the projection is per
      group and scaled by 1/sqrt(p).
    """
    check_function(margin, "the margin")
    residual = one_minus(margin) if residual is None else residual
    method = _trak_like("TRAK", margin, residual, projection, damping, dense=dense)
    return dataclasses.replace(method, references=("trak",), raised=True)


def one_minus(margin: OutputFn) -> OutputFn:
    """Makes 1 - p = sigmoid(-margin) of a margin."""

    def one_minus(params: Params, example: Example, key: Key) -> jax.Array:
        return jax.nn.sigmoid(-margin(params, example, key))

    return one_minus


def d_trak(
    output: OutputFn,
    *,
    damping: Damping | None = None,
    dense: bool = False,
    projection: Projection | None = None,
) -> Method:
    r"""D-TRAK: TRAK for diffusion, with another function of the predicted noise than the loss.

    .. math:: \tau(q, n) = \tfrac1C \sum_c \phi_c(q)^\top (\Phi_c^\top\Phi_c + \lambda I)^{-1}
              \phi_c(n)

    with phi the projected gradient, averaged over timesteps and noise, of the same function on both
    sides. With the loss as that function it is TRAK for diffusion. Why others do better is not
    known; the published default is the mean square of the predicted noise.

    Args:
      output: `ja.expectation(ja.diffusion.output(denoiser), timesteps=range(0, 1000, 100))`.
      damping: of the Gram matrix, which carries no 1/n. Default: `relative(0.1)`.
        `ja.evaluation.damping_path` tries many for the price of one.
      dense: one kernel for all groups instead of one for each.
      projection: of each group's gradient. Default: `rademacher(512)`.

    Returns:
      The method.

    References:
      Zheng et al. (2024), arXiv:2311.00500, Eq. 10-13. Deviations: the kernel is block-diagonal by
      group unless `dense`; damping in units of the mean eigenvalue, not chosen by the LDS of the
      queries that are evaluated; not divided by its mean absolute entry; Rademacher projection per
      group; the noise of an example depends on its place in the data, whatever the batch.
    """
    return _trak_like("D-TRAK", output, None, projection, damping, dense=dense)


def journey_trak(
    loss: OutputFn,
    journey: OutputFn,
    *,
    damping: Damping | None = None,
    dense: bool = False,
    projection: Projection | None = None,
) -> Method:
    """Journey-TRAK: TRAK whose query side is the loss along the sampler's trajectory.

    For generated queries, which must hold their trajectory; see `ja.diffusion.journey`.

    Args:
      loss: of training examples, `ja.expectation(ja.diffusion.loss(denoiser), timesteps=...)`.
      journey: of queries, `ja.diffusion.journey(denoiser, steps=50)`.
      damping: of the Gram matrix, which carries no 1/n. Default: `relative(0.1)`.
      dense: one kernel for all groups instead of one for each.
      projection: of each group's gradient. Default: `rademacher(512)`.

    Returns:
      The method.

    References:
      Georgiev et al. (2023), arXiv:2312.06205; one score for the whole trajectory as in Zheng et
      al. (2024), arXiv:2311.00500, appendix C.
    """
    method = _trak_like("Journey-TRAK", loss, None, projection, damping, dense=dense)
    return dataclasses.replace(method, query_output=journey, references=("journey_trak",))


def das(
    output: OutputFn,
    *,
    residual: OutputFn | None = None,
    leverage: bool = True,
    link: Link = "square",
    damping: Damping | None = None,
    projection: Projection | None = None,
) -> Method:
    r"""DAS: how far the predicted noise moves when an example is left out, squared.

    .. math:: \tau(q, n) = \Big[\tfrac1C \sum_c \phi_c(q)^\top K_c \phi_c(n)\,
              \frac{r(n)}{1 - h_c(n)}\Big]^2, \qquad h(n) = \phi(n)^\top K \phi(n)

    with one dense K for all groups, as in `d_trak`. For a linear model this is the exact effect of
    leaving n out (Sherman-Morrison), squared. Squares have no sign: every example is a proponent.

    Args:
      output: `ja.expectation(ja.diffusion.output(denoiser, "mean"), timesteps=..., unit_norm=True)`
        as published: the mean of the predicted noise, each draw's gradient at unit norm.
      residual: r, a scalar of one training example; `ja.diffusion.error_profile(denoiser, ...)` as
        published. Default: one.
      leverage: whether to divide by 1 - h.
      link: "square", or "identity" for scores with a sign.
      damping: of the Gram matrix. Default: `relative(0.1)`.
      projection: of each group's gradient. Default: `rademacher(512)`.

    Returns:
      The method.

    References:
      Lin et al. (2025), DAS, ICLR, Eq. 16. Deviations: the exponent of 1 - h is one, as Newton's
      step has it, where the published code has two; h belongs to the training example and to the
      kernel that is used, where the published code mixes queries and examples and rescales; as in
      the published code, the square is outside the mean over timesteps and pixels.
    """
    method = _trak_like("DAS", output, residual, projection, damping, dense=True, leverage=leverage)
    return dataclasses.replace(method, link=link, references=("das",))


def _trak_like(
    name: str,
    output: OutputFn,
    residual: OutputFn | None,
    projection: Projection | None,
    damping: Damping | None,
    **gram: bool,
) -> Method:
    chosen = projections.rademacher(512) if projection is None else projection
    rule = FeatureRule(output, chosen, residual=residual)
    kernel = kernels.Gram(kernels.or_relative(damping), **gram)
    return Method(name, rule, kernel, average_checkpoints=True, references=("d_trak",))
