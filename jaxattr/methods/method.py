"""Attribution methods, each a composition of an output function, a projection and a kernel.

The score of every method is, over checkpoints c and with one weight per parameter group,

    score(q, n) = r(n) * sum_c eta_c phi_c(q)^T Diag(w) K_c phi_c(n)

and what makes a method says what phi, K, r and eta are. Positive: training on n makes the model do
more of what the query did.
"""

import dataclasses
from typing import Any

import jax

from jaxattr import groups, identity
from jaxattr.features import featurizer as features
from jaxattr.features.featurizer import FeatureRule, Featurizer
from jaxattr.groups import Groups
from jaxattr.inputs.outputs import check_function
from jaxattr.inputs.wording import brief, name_of, shapes
from jaxattr.kernels import Kernel
from jaxattr.methods.citations import BIBTEX
from jaxattr.typing import Example, Key, Link, OutputFn, Params


@dataclasses.dataclass(frozen=True, repr=False)
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
      raised: whether training on an example raises the output, as it does a margin, or the two are
        only compared; else it is taken to lower it, as it does a loss.
    """

    name: str
    rule: FeatureRule
    kernel: Kernel
    checkpoint_weights: tuple[float, ...] | None = None
    average_checkpoints: bool = False
    references: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    query_output: OutputFn | None = identity.function("params", "query", "key", default=None)
    link: Link = "identity"
    raised: bool = dataclasses.field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.link not in ("identity", "square"):
            raise ValueError(f'link must be "identity" or "square", got {self.link!r}.')
        if self.query_output is not None:
            check_function(self.query_output, "the output of queries")

    def __repr__(self) -> str:
        basis = self.rule.projection.basis
        projection = self.rule.projection.name if basis is None else basis.name
        output = name_of(self.rule.output)
        return f"Method({self.name} of {output}: {projection}, kernel {self.kernel.name})"

    def weights_of(self, checkpoints: int) -> tuple[float, ...]:
        """Returns eta for a number of checkpoints, for which the method must be made."""
        basis = self.rule.projection.basis
        given = None if basis is None else basis.checkpoints
        if given not in (None, checkpoints):
            raise ValueError(
                f"{self.name} was given {given} states of an optimizer, and there are "
                f"{checkpoints} checkpoints: pass one for each, in the same order."
            )
        if self.checkpoint_weights is None:
            return (1 / checkpoints if self.average_checkpoints else 1.0,) * checkpoints
        if len(self.checkpoint_weights) != checkpoints:
            raise ValueError(
                f"{self.name} was given {len(self.checkpoint_weights)} checkpoint weights for "
                f"{checkpoints} checkpoints."
            )
        return self.checkpoint_weights


def check_method(method: Any) -> Method:
    """Returns what a user passed as a method, if it is one.

    Args:
      method: `ja.tracin(loss)`, `ja.trak(margin)`, ...

    Raises:
      TypeError: if it is a function that a method is made of, or anything else.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, dict | list | tuple) and jax.tree.leaves(method):
        got = f"a pytree ({shapes(method)})"
        remedy = (
            "ja.tracin(loss), and pass it where it belongs: ja.build_index(method, checkpoints, "
            "train), ja.open_index(path, method, checkpoints)"
        )
    elif isinstance(method, type) or not callable(method):
        got, remedy = brief(repr(method), 60), "ja.tracin(loss), ja.trak(margin), ..."
    elif getattr(method, "__module__", "").startswith("jaxattr.methods"):
        got, remedy = f"ja.{name_of(method)} itself", f"ja.{name_of(method)}(loss)"
    else:
        got = f"the function {name_of(method)!r}"
        remedy = f"ja.tracin({name_of(method)}), say, if it is a loss"
    raise TypeError(
        f"method must be an attribution method, got {got}. Make one of a loss: {remedy}."
    )


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
      microbatch: examples whose gradients are in memory at once. Default: as many as
        have room in a quarter of the device's memory (1 GiB on a CPU), activations included.

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
      >>> import jaxattr as ja
      >>> featurize = ja.featurizer(ja.tracin(loss), params, {"x": jnp.ones(2), "y": jnp.ones(())})
      >>> print(featurize(params, batch))
      [[-1. -2.]
       [-3. -4.]]
    """
    return features.featurize_with(
        check_method(method).rule, params, example, groups=groups, key=key, microbatch=microbatch
    )


def citation(method: Any) -> str:
    """Returns BibTeX for the method, its projection and learned weights.

    Args:
      method: the attribution method; or `ja.unroll` or `ja.astra`, which are functions, themselves.

    Returns:
      BibTeX entries, separated by blank lines.

    Example:
      >>> import jaxattr as ja
      >>> print(ja.citation(ja.tracin(lambda params, example, key: 0.0)).splitlines()[0])
      @inproceedings{pruthi2020tracin,
    """
    if callable(method) and hasattr(method, "references"):
        return _bibtex(method.references)
    # Projections that users write have none.
    projected = getattr(check_method(method).rule.projection, "references", ())
    return _bibtex((*method.references, *projected))


def _bibtex(references: tuple[str, ...]) -> str:
    return "\n\n".join(BIBTEX[name] for name in (*references, "weights"))
