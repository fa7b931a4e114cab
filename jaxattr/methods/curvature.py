"""Methods whose kernel is the curvature of the loss: LoGRA, K-FAC, EK-FAC, EShampoo and others.

As in `methods`, each is a composition of an output function, a projection and a kernel.
"""

from typing import Literal, TypeAlias

import numpy as np

from jaxattr import kernels
from jaxattr.counts import real_number, whole_number
from jaxattr.features import projections
from jaxattr.features.featurizer import FeatureRule
from jaxattr.fitting import eigenbases
from jaxattr.fitting.covariances import Covariances, Factors, MaskFn
from jaxattr.fitting.eigenbases import SampleFn
from jaxattr.fitting.shampoo import GradientFactors
from jaxattr.kernels import Damping
from jaxattr.methods.method import Method
from jaxattr.typing import OutputFn

Fisher: TypeAlias = Literal["empirical", "true"]


def logra(
    loss: OutputFn,
    *,
    rank: int = 16,
    basis: Literal["random", "pca"] = "random",
    damping: Damping | None = None,
) -> Method:
    r"""LoGRA: two-sided projections of each weight gradient, and their inverse Gram matrix.

    .. math:: \tau = \sum_j \phi_j(q)^\top (\Phi_j^\top\Phi_j + \lambda I)^{-1} \phi_j(n),
              \qquad \phi = \mathrm{vec}(A^\top \nabla_W\ell\, B)

    with a Gram matrix per group j; group by layer to have LoGRA's.

    Guarantees: no weight gradient of a linear map is formed. With a rank as large as every layer,
    exact (block-diagonal empirical Fisher influence).
    Cost: less than a training step per batch; rank^2 features per linear map.

    Args:
      loss: (params, example, key) -> scalar, summed over the example's tokens or pixels.
      rank: largest number of features per side; a smaller side is kept whole.
      basis: "random" signs, or "pca", the leading eigenvectors of the covariances of inputs and
        cotangents, at the price of one more pass over the data.
      damping: of the Gram matrix, which carries no 1/n. Default: `relative(0.1)`.

    Returns:
      The method.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxattr import absolute, build_index, score
      >>> def loss(params, example, key):
      ...     return 0.5 * jnp.sum((example["x"] @ params["w"] - example["y"]) ** 2)
      >>> data = {"x": jnp.eye(3), "y": jnp.ones((3, 1))}
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> method = logra(loss, damping=absolute(1.0))
      >>> [round(x, 3) + 0.0 for x in score(build_index(method, params, data), data)[0].tolist()]
      [0.5, 0.0, 0.0]

    References:
      Choe et al. (2024), arXiv:2405.13954, sections 3.1 and 3.2. Deviations: A and B are scaled so
      that inner products are unbiased; biases are included, and parameters of no linear map too.
    """
    if basis not in ("random", "pca"):
        raise ValueError(f"basis must be 'random' or 'pca', got {basis!r}.")
    chosen = eigenbases.Eigenbasis(eigenvalues=False) if basis == "pca" else None
    rule = FeatureRule(loss, projections.two_sided(rank, basis=chosen))
    kernel = kernels.Gram(kernels.or_relative(damping))
    name = "LoGRA" if basis == "random" else "LoGRA-PCA"
    return Method(name, rule, kernel, references=("logra",))


def kfac(
    loss: OutputFn,
    *,
    damping: Damping | None = None,
    rank: int = 128,
    fisher: Fisher = "empirical",
    sample: SampleFn | None = None,
    mask: MaskFn | None = None,
    bands: int = 1,
) -> Method:
    r"""K-FAC influence: the Fisher matrix of a layer as a product of two covariances.

    .. math:: \tau = \sum_\ell \phi_\ell(q)^\top
              \mathrm{diag}(\lambda_A \otimes \lambda_S + \lambda)^{-1} \phi_\ell(n),
              \qquad \phi = \mathrm{vec}(Q_A^\top \nabla_{[W; b]}\ell\; Q_S)

    The covariances are means over positions. Parameters of no linear map get a diagonal Fisher, in
    a random basis where a group has more than rank^2 of them.

    Guarantees and cost: as `ekfac`.

    Args:
      loss: (params, example, key) -> scalar, summed over the example's tokens or pixels.
      damping: added to the products of eigenvalues; relative to their mean, layer by layer.
        Default: `relative(0.1)`.
      rank: eigenvectors per side, at most.
      fisher: "empirical", of the data's own labels; or "true", of labels drawn from the model.
      sample: (params, example, key) -> the example with labels drawn from the model, for
        `fisher="true"`. Default: the loss's attribute `sample`.
      mask: (example) -> [t], which token positions count in the covariances. The loss must ignore
        the others already. Applied to maps with t positions; those that the model adds, such as
        a class token, are to be in it. Whole numbers count where they are not zero; floats are
        weights. What is negative, or leaves no gradient, is refused.
      bands: splits each side of each layer's eigenbasis into so many groups, from large to small
        eigenvalues: groups `layer[i,j]`, for weights by curvature.

    Returns:
      The method.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxattr import absolute, build_index, score
      >>> def loss(params, example, key):
      ...     return 0.5 * jnp.sum((example["x"] @ params["w"] - example["y"]) ** 2)
      >>> data = {"x": jnp.eye(3), "y": jnp.ones((3, 1))}
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> method = kfac(loss, damping=absolute(2 / 3))
      >>> [round(x, 3) + 0.0 for x in score(build_index(method, params, data), data)[0].tolist()]
      [1.0, 0.0, 0.0]

    References:
      Martens and Grosse (2015), arXiv:1503.05671, section 3.
    """
    rule = _eigen_rule(loss, True, rank, fisher, sample, Covariances(mask), bands)
    kernel = kernels.SecondMoment(kernels.or_relative(damping))
    return Method("K-FAC", rule, kernel, references=("kfac",))


def ekfac(
    loss: OutputFn,
    *,
    damping: Damping | None = None,
    rank: int = 128,
    fisher: Fisher = "empirical",
    sample: SampleFn | None = None,
    mask: MaskFn | None = None,
    bands: int = 1,
) -> Method:
    r"""EK-FAC influence: in K-FAC's eigenbasis, each feature divided by its own mean square.

    .. math:: \tau = \sum_\ell \phi_\ell(q)^\top \mathrm{diag}(\Lambda + \lambda)^{-1}
              \phi_\ell(n), \qquad \Lambda_i = \tfrac1N \sum_n \phi_i(n)^2

    Scores carry no 1/n: the curvature is a mean over training examples. Parameters of no linear map
    get a diagonal Fisher, in a random basis where a group has more than rank^2 of them.

    Guarantees: exact EK-FAC for layers with at most `rank` inputs (bias included) and outputs. Of
    larger ones the leading eigenvectors of each side are kept, a heuristic;
    `index.fitted[c].captured` is the share of the trace that they hold, and `build_index` warns
    where it is below a half.
    Cost: a pass for the covariances (see `eigenbases.Eigenbasis`), one for the features, which are
    in memory; one more for sampled labels.

    Args:
      loss: (params, example, key) -> scalar, summed over the example's tokens or pixels.
      damping: added to Lambda; relative to its mean, layer by layer. Default: `relative(0.1)`.
      rank: eigenvectors per side, at most.
      fisher: "empirical", of the data's own labels; or "true", of labels drawn from the model.
      sample: (params, example, key) -> the example with labels drawn from the model, for
        `fisher="true"`. Default: the loss's attribute `sample`.
      mask: (example) -> [t], which token positions count in the covariances. The loss must ignore
        the others already. Applied to maps with t positions; those that the model adds, such as
        a class token, are to be in it. Whole numbers count where they are not zero; floats are
        weights. What is negative, or leaves no gradient, is refused.
      bands: splits each side of each layer's eigenbasis into so many groups, from large to small
        eigenvalues: groups `layer[i,j]`, for weights by curvature.

    Returns:
      The method.

    Raises:
      ValueError: if `fisher="true"` without a way to sample.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxattr import absolute, build_index, score
      >>> def loss(params, example, key):
      ...     return 0.5 * jnp.sum((example["x"] @ params["w"] - example["y"]) ** 2)
      >>> data = {"x": jnp.eye(3), "y": jnp.ones((3, 1))}
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> method = ekfac(loss, damping=absolute(2 / 3))
      >>> [round(x, 3) + 0.0 for x in score(build_index(method, params, data), data)[0].tolist()]
      [1.0, 0.0, 0.0]

    References:
      Grosse et al. (2023), arXiv:2308.03296, section 2; George et al. (2018), arXiv:1806.03884.
    """
    rule = _eigen_rule(loss, False, rank, fisher, sample, Covariances(mask), bands)
    kernel = kernels.SecondMoment(kernels.or_relative(damping))
    return Method("EK-FAC", rule, kernel, references=("ekfac", "kfac"))


def source(
    loss: OutputFn,
    *,
    learning_rate: float,
    steps: int,
    momentum: float = 0.0,
    rank: int = 128,
    fisher: Fisher = "empirical",
    sample: SampleFn | None = None,
    mask: MaskFn | None = None,
) -> Method:
    r"""SOURCE: what one segment of training did, as gradient descent on a quadratic.

    .. math:: \tau = \nabla\ell(q)^\top \big(I - e^{-tH}\big) H^{-1} \nabla\ell(n), \qquad
              t = \frac{\eta K}{1 - \beta}

    with the curvature H of EK-FAC: TracIn times t where t H is small, influence where it is large,
    so there is no damping, and training need not have converged. An index of one segment is scored
    as any other; several, each at a checkpoint of its own, by `ja.score_segments`.

    Guarantees and cost: as `ekfac`. Scores carry no 1/n.

    Args:
      loss: (params, example, key) -> scalar, summed over the example's tokens or pixels.
      learning_rate: eta, the mean over the segment. Adam has no one such rate: on two small models
        100 times the length of its steps over that of the gradient was better than that itself.
      steps: K, the number of steps in it.
      momentum: beta of heavy-ball momentum.
      rank: eigenvectors per side, at most.
      fisher: as in `ekfac`.
      sample: as in `ekfac`.
      mask: as in `ekfac`.

    Returns:
      The method.

    Raises:
      ValueError: if the segment takes no time, or momentum is not at least 0 and below 1.

    References:
      Bae et al. (2024), arXiv:2405.12186.
    """
    if callable(learning_rate) or np.ndim(learning_rate):
        raise ValueError(
            "learning_rate must be one number, the mean over the segment: "
            "float(np.mean(learning_rates))."
        )
    rate = real_number("learning_rate", learning_rate)
    if not 0 < rate < np.inf:
        raise ValueError(f"learning_rate must be finite and above 0, got {rate}.")
    if not 0 <= real_number("momentum", momentum) < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}.")
    rule = _eigen_rule(loss, False, rank, fisher, sample, Covariances(mask), bands=1)
    # A schedule's value is an array, and what a method is made of must have a hash.
    time = rate * whole_number("steps", steps) / (1 - float(momentum))
    return Method("SOURCE", rule, kernels.Segment(time), references=("source", "ekfac", "kfac"))


def eshampoo(
    loss: OutputFn,
    *,
    damping: Damping | None = None,
    rank: int = 128,
    fisher: Fisher = "empirical",
    sample: SampleFn | None = None,
    bands: int = 1,
) -> Method:
    r"""Eigenvalue-corrected Shampoo: as `ekfac`, in the eigenbasis of the examples' gradients.

    .. math:: L = \tfrac1N \sum_n G_n G_n^\top, \qquad R = \tfrac1N \sum_n G_n^\top G_n,
              \qquad \phi = \mathrm{vec}(Q_L^\top \nabla_{[W; b]}\ell\; Q_R)

    G is the gradient of an example, summed over positions. EK-FAC's basis comes of inputs and
    cotangents apart, as if positions were independent of one another; with one position and
    independent inputs and cotangents the two are the same.

    Guarantees: as `ekfac`.
    Cost: as `ekfac`, and in out (in + out) operations per example and map for L and R; see
    `shampoo.GradientFactors`.

    Args:
      loss: (params, example, key) -> scalar, summed over the example's tokens or pixels.
      damping: added to Lambda; relative to its mean, layer by layer. Default: `relative(0.1)`.
      rank: eigenvectors per side, at most.
      fisher: "empirical", of the data's own labels; or "true", of labels drawn from the model.
      sample: (params, example, key) -> the example with labels drawn from the model, for
        `fisher="true"`. Default: the loss's attribute `sample`.
      bands: splits each side of each layer's eigenbasis into so many groups, from large to small
        eigenvalues: groups `layer[i,j]`, for weights by curvature.

    Returns:
      The method.

    Raises:
      ValueError: if `fisher="true"` without a way to sample.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxattr import absolute, build_index, score
      >>> def loss(params, example, key):
      ...     return 0.5 * jnp.sum((example["x"] @ params["w"] - example["y"]) ** 2)
      >>> data = {"x": jnp.eye(3), "y": jnp.ones((3, 1))}
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> method = eshampoo(loss, damping=absolute(2 / 3))
      >>> [round(x, 3) + 0.0 for x in score(build_index(method, params, data), data)[0].tolist()]
      [1.0, 0.0, 0.0]

    References:
      Eschenhagen et al. (2025), arXiv:2506.03595; Gupta et al. (2018), arXiv:1802.09568.
      Deviations: an optimizer there, influence functions here; so L, R and Lambda are means over
      examples at fixed parameters, not running averages over batches, and Lambda is not rooted.
    """
    rule = _eigen_rule(loss, False, rank, fisher, sample, GradientFactors(), bands)
    kernel = kernels.SecondMoment(kernels.or_relative(damping))
    return Method("EShampoo", rule, kernel, references=("eshampoo", "shampoo"))


def _eigen_rule(
    loss: OutputFn,
    eigenvalues: bool,
    rank: int,
    fisher: Fisher,
    sample: SampleFn | None,
    factors: Factors,
    bands: int,
) -> FeatureRule:
    if fisher not in ("empirical", "true"):
        raise ValueError(f"fisher must be 'empirical' or 'true', got {fisher!r}.")
    if sample is not None and fisher == "empirical":
        raise ValueError("sample= is for fisher='true': pass that too, or leave sample out.")
    sample = getattr(loss, "sample", None) if sample is None else sample
    if fisher == "true" and sample is None:
        raise ValueError(
            "The true Fisher needs labels drawn from the model: pass sample=, a function (params, "
            "example, key) -> the example with other labels, or use fisher='empirical'."
        )
    drawn = sample if fisher == "true" else None
    basis = eigenbases.Eigenbasis(
        eigenvalues=eigenvalues, sample=drawn, factors=factors, bands=bands
    )
    return FeatureRule(loss, projections.two_sided(rank, basis=basis))
