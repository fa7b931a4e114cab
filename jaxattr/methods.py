"""Attribution methods, each a composition of an output function, a projection and a kernel.

The score of every method is, over checkpoints c and with one weight per parameter group,

    score(q, n) = r(n) * sum_c eta_c phi_c(q)^T Diag(w) K_c phi_c(n)

and the functions below say what phi, K, r and eta are. Positive: training on n makes the model do
more of what the query did.
"""

import dataclasses
from collections.abc import Sequence

import jax

from jaxattr import features, groups, kernels, projections
from jaxattr.citations import BIBTEX
from jaxattr.features import FeatureRule, Featurizer
from jaxattr.groups import Groups
from jaxattr.kernels import Damping, Kernel
from jaxattr.projections import Projection
from jaxattr.typing import Example, Key, Link, OutputFn, Params


@dataclasses.dataclass(frozen=True)
class Method:
    """An attribution method, ready for `build_index`.

    Attributes:
      name: what tables show.
      rule: how one example becomes features.
      kernel: what multiplies the training side.
      checkpoint_weights: eta, one per checkpoint; or None for the same for all.
      average_checkpoints: whether that same eta is 1/C (an ensemble's mean) or 1 (a sum).
      references: keys of `citation`.
      query_output: output function of queries, where it is another than that of training examples.
      link: "square" if scores are squares of sums of contributions, else "identity".
    """

    name: str
    rule: FeatureRule
    kernel: Kernel
    checkpoint_weights: tuple[float, ...] | None = None
    average_checkpoints: bool = False
    references: tuple[str, ...] = ()
    query_output: OutputFn | None = None
    link: Link = "identity"

    def __post_init__(self) -> None:
        if self.link not in ("identity", "square"):
            raise ValueError(f'link must be "identity" or "square", got {self.link!r}.')

    def weights_of(self, checkpoints: int) -> tuple[float, ...]:
        """Returns eta for a number of checkpoints."""
        if self.checkpoint_weights is None:
            return (1 / checkpoints if self.average_checkpoints else 1.0,) * checkpoints
        if len(self.checkpoint_weights) != checkpoints:
            raise ValueError(
                f"{self.name} was given {len(self.checkpoint_weights)} checkpoint weights for "
                f"{checkpoints} checkpoints."
            )
        return self.checkpoint_weights


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

    References:
      Pruthi et al. (2020), arXiv:2002.08484, Eq. 5.
    """
    rule = FeatureRule(loss, projections.rademacher(1024) if projection is None else projection)
    eta = _checkpoint_weights(checkpoint_weights)
    return Method("TracIn", rule, kernels.identity(), eta, references=("tracin",))


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

    References:
      Charpiat et al. (2019), arXiv:1906.01930; Hammoudeh and Lowd (2022), arXiv:2201.10055.
    """
    base = tracin(loss, checkpoint_weights=checkpoint_weights, projection=projection)
    rule = base.rule._replace(normalize=True)
    return dataclasses.replace(base, name="GradCos", rule=rule, references=("grad_cos",))


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

    def one_minus_p(params: Params, example: Example, key: Key) -> jax.Array:
        return jax.nn.sigmoid(-margin(params, example, key))

    rule = FeatureRule(
        margin,
        projections.rademacher(512) if projection is None else projection,
        residual=one_minus_p if residual is None else residual,
    )
    kernel = kernels.gram(_damping(damping), dense=dense)
    return Method("TRAK", rule, kernel, average_checkpoints=True, references=("trak",))


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
      group; the noise of an example depends on its id and not on its place in the batch.
    """
    return _trak_like("D-TRAK", output, kernels.gram(_damping(damping), dense=dense), projection)


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
      damping: as in `d_trak`, as all that follow.
      dense: see there.
      projection: see there.

    Returns:
      The method.

    References:
      Georgiev et al. (2023), arXiv:2312.06205; one score for the whole trajectory as in Zheng et
      al. (2024), arXiv:2311.00500, appendix C.
    """
    kernel = kernels.gram(_damping(damping), dense=dense)
    method = _trak_like("Journey-TRAK", loss, kernel, projection)
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
    kernel = kernels.gram(_damping(damping), dense=True, leverage=leverage)
    method = _trak_like("DAS", output, kernel, projection)
    rule = method.rule._replace(residual=residual)
    return dataclasses.replace(method, rule=rule, link=link, references=("das",))


def featurizer(
    method: Method,
    params: Params,
    example: Example,
    *,
    groups: Groups = groups.by_layer,
    key: Key | None = None,
    microbatch: int | None = None,
) -> Featurizer:
    """Makes the step that everything streams: a batch to its features.

    Args:
      method: the attribution method.
      params: parameters, or their shapes.
      example: ONE example, without a batch axis, or its shapes.
      groups: a function such as `by_layer`, a layout, or a pytree of labels.
      key: key of the projections and of stochastic outputs. Default: `jax.random.key(0)`.
      microbatch: examples whose gradients are in memory at once. Default: as many as fit 256 MiB.

    Returns:
      `featurize(params, batch, ids) -> [b, p]`, pure and jittable, with a `.layout`.

    Raises:
      ValueError: if the output is not a float scalar, the parameters are not float arrays, or the
        groups are no partition of them.

    Example:
      >>> import jax.numpy as jnp
      >>> def loss(params, example, key):
      ...     return 0.5 * (params["w"] @ example["x"] - example["y"]) ** 2
      >>> batch = {"x": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "y": jnp.ones(2)}
      >>> params = {"w": jnp.zeros(2)}
      >>> featurize = featurizer(tracin(loss), params, {"x": jnp.ones(2), "y": jnp.ones(())})
      >>> print(featurize(params, batch))
      [[-1. -2.]
       [-3. -4.]]
    """
    return features.featurize_with(
        method.rule, params, example, groups=groups, key=key, microbatch=microbatch
    )


def citation(method: Method) -> str:
    """Returns BibTeX for the method and for learned weights.

    Args:
      method: the attribution method.

    Returns:
      BibTeX entries, separated by blank lines.

    Example:
      >>> print(citation(tracin(lambda params, example, key: 0.0)).splitlines()[0])
      @inproceedings{pruthi2020tracin,
    """
    return "\n\n".join(BIBTEX[reference] for reference in (*method.references, "weights"))


def _trak_like(
    name: str, output: OutputFn, kernel: Kernel, projection: Projection | None
) -> Method:
    rule = FeatureRule(output, projections.rademacher(512) if projection is None else projection)
    return Method(name, rule, kernel, average_checkpoints=True, references=("d_trak",))


def _damping(damping: Damping | None) -> Damping:
    return kernels.relative(0.1) if damping is None else damping


def _checkpoint_weights(weights: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if weights is None else tuple(float(weight) for weight in weights)
