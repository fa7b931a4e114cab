"""TrackStar: gradients over second moments, projected, whitened and scaled to unit norm."""

from typing import Any

import numpy as np

from jaxattr import kernels
from jaxattr.features import projections
from jaxattr.features.featurizer import FeatureRule
from jaxattr.fitting import optimizer_moments
from jaxattr.identity import Contents
from jaxattr.kernels import Damping
from jaxattr.methods.method import Method
from jaxattr.sources import as_source
from jaxattr.typing import Batch, OutputFn, Params


def trackstar(
    loss: OutputFn,
    optimizer_states: Any,
    params: Params,
    *,
    rank: int = 16,
    queries: Any = None,
    mixing: float | None = None,
    damping: Damping | None = None,
    rank_one: bool = False,
    epsilon: float = 1e-8,
) -> Method:
    r"""TrackStar: gradients over second moments, projected, whitened, and scaled to unit norm.

    .. math:: u(x) = R^{-1/2} \, \mathrm{vec}\big(A^\top (\nabla\ell / \sqrt V) B\big), \qquad
              \tau = \frac{u(q)^\top u(n)}{\|u(q)\| \|u(n)\|}

    Guarantees: scores lie in [-1, 1]; checkpoints are averaged. Weight gradients are formed, a
    microbatch at a time, unless `rank_one`.
    Cost: as exact gradients; with `rank_one` as `logra`.

    Args:
      loss: (params, example, key) -> scalar, summed over the target's tokens.
      optimizer_states: an Optax state that holds second moments (Adam, RMSProp, Adafactor), or the
        moments themselves, a pytree like the parameters; or a list, one per checkpoint. As Orbax
        restores them they go in too. Parameters that the optimizer does not train (`optax.masked`,
        `partition`) must be excluded from the groups.
      params: the parameters, or their shapes, that the states belong to.
      rank: features per side of each linear map.
      queries: examples whose common directions are downweighted too, such as the queries; or None.
      mixing: share of the queries' autocorrelation in R; see `kernels.Whitening`.
      damping: of R. Default: `relative(0.1)`.
      rank_one: approximates V of a linear map by its row and column means, as Adafactor does, for
        which it is exact. Then no weight gradient is formed.
      epsilon: added to the root of V; with `rank_one`, its square is added to V.

    Returns:
      The method.

    Raises:
      ValueError: if a state has no second moments, or what it has are none (negative, not finite).

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxattr import absolute, build_index, score
      >>> def loss(params, example, key):
      ...     return 0.5 * jnp.sum((example["x"] @ params["w"] - example["y"]) ** 2)
      >>> data = {"x": jnp.eye(3), "y": jnp.ones((3, 1))}
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> optimizer = optax.adam(0.1)
      >>> _, state = optimizer.update({"w": -jnp.ones((3, 1))}, optimizer.init(params), params)
      >>> method = trackstar(loss, state, params, epsilon=1.0)
      >>> [round(x, 3) + 0.0 for x in score(build_index(method, params, data), data)[0].tolist()]
      [1.0, 0.0, 0.0]

    References:
      Chang et al. (2024), arXiv:2410.17413, section 3. Deviation: one block of R per group.
    """
    states = optimizer_moments.states_of(optimizer_states)
    moments = [optimizer_moments.second_moments(state, params) for state in states]
    basis = optimizer_moments.ScaledSigns(
        moments=tuple(map(Contents, moments)), epsilon=epsilon, materialize=not rank_one
    )
    rule = FeatureRule(loss, projections.two_sided(rank, basis=basis))
    others = None if queries is None else Contents(_all_of(queries))
    kernel = kernels.Whitening(kernels.or_relative(damping), others, mixing)
    return Method("TrackStar", rule, kernel, average_checkpoints=True, references=("trackstar",))


def _all_of(queries: Any) -> Batch:
    source = as_source(queries, "queries")
    return source.read(np.arange(source.size))
