"""Eigenbases of linear maps: K-FAC's, of the covariances of inputs and cotangents, and others.

For y = x W, with gradient sum over t of x_t^T d_t, K-FAC takes A = E[x x^T] and S = E[d d^T] over
positions t as the two factors of the Fisher matrix of W. Their eigenvectors are a basis in which it
is nearly diagonal.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr import identity
from jaxattr.batches import each_example
from jaxattr.features.bases import UNKNOWN, Basis, Factored, Fitted, Sides
from jaxattr.features.featurizer import FeatureRule
from jaxattr.fitting.covariances import (
    Covariance,
    Covariances,
    Exponents,
    Factors,
    Narrow,
    covariance_sums,
    mean,
)
from jaxattr.fitting.passes import (
    NumberedBatch,
    TrainingPass,
    row_digests,
    typical_exponent,
)
from jaxattr.kernels.base import Sums
from jaxattr.kernels.diagonal import squares
from jaxattr.keys import example_keys, named_key
from jaxattr.scales import scaled
from jaxattr.threads import side_by_side
from jaxattr.typing import Example, Key, Params

SampleFn = Callable[[Params, Example, Key], Example]
"""Draws the labels of ONE example from the model: returns the example with other labels."""

# A side with more inputs or outputs than this, such as a vocabulary, is projected at random to
# `_NARROW` dimensions before its covariance is taken.
_WIDE, _NARROW = 4096, 1024
# Examples whose activations are in memory at once, where the user does not say.
_MICROBATCH = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eigenbasis(Basis):
    """The leading eigenvectors of both covariances of each linear map, largest first.

    Guarantees: exact covariances of the training set (of sampled labels with `sample`), whatever
    the batch size; examples that are not finite are left out. A side with more than 4,096 inputs
    or outputs is first projected by random signs to 1,024.
    Cost: a pass over the data without weight gradients, b t (in^2 + out^2) operations each batch,
    and an eigendecomposition in float64 on the host per side and layer, by one thread each, 16 at
    once. With `sample`, a second pass, unless `eigenvalues` leave no feature without.

    Attributes:
      eigenvalues: whether the products of the covariances' eigenvalues are the curvature of the
        features (K-FAC); otherwise that is left to the kernel, or, with `sample`, measured in a
        second pass (EK-FAC).
      sample: draws labels from the model; or None for the labels of the data.
      factors: what the two matrices are; K-FAC's covariances.

    References:
      Martens and Grosse (2015), arXiv:1503.05671; George et al. (2018), arXiv:1806.03884.
    """

    eigenvalues: bool
    sample: SampleFn | None = identity.function("params", "example", "key", default=None)
    factors: Factors = Covariances()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eigenvalues and not self.factors.multiply:
            raise ValueError(
                f"Products of {self.factors.name}'s eigenvalues are no curvature: use "
                "eigenvalues=False, with a kernel that measures it."
            )

    @property
    def name(self) -> str:
        """See `Basis`."""
        return f"{self.factors.name} eigenbasis"

    def side(self, size: int) -> int:
        """See `Basis`."""
        return super().side(size if size <= _WIDE else _NARROW)

    def fit(self, over: TrainingPass) -> Fitted:
        """See `Fits`."""
        sampler = None if self.sample is None else _sampler(self.sample, over)
        covariances, data, exponents, projected = _covariances(over, sampler, self.factors)
        sides: dict[str, Sides] = {}
        captured, curvature = {}, {}
        plan = over.featurizer.plan
        for leaf, both in _eigen(covariances, plan.factored).items():
            (a, rows, of_a), (b, columns, of_b) = map(_side, both, projected[leaf])
            sides[leaf], captured[leaf] = (a, b), jnp.asarray([of_a, of_b])
            products = rows[..., :, None] * columns[..., None, :]
            curvature[leaf] = np.ldexp(products, 2 * sum(map(int, exponents[leaf])))
        _warn_of_loss(captured)
        fitted = Fitted(sides, {}, None, captured, data=data)
        known = np.full(over.featurizer.layout.total, UNKNOWN)
        values = plan.scatter(curvature) if self.eigenvalues else known
        if sampler is not None and (values == UNKNOWN).any():
            known = second_moments(over, fitted, sampler)
        return _with_curvature(fitted, np.where(values == UNKNOWN, known, values))


def _with_curvature(fitted: Fitted, curvature: np.ndarray) -> Fitted:
    """Keeps the curvature over a power of two, since squares of gradients may leave float32."""
    exponent = int(np.frexp(np.max(curvature, initial=0))[1])
    shown = np.where(curvature == UNKNOWN, UNKNOWN, np.ldexp(curvature, -exponent))
    return fitted._replace(curvature=jnp.asarray(shown), exponent=jnp.asarray(exponent))


class TruncationWarning(UserWarning):
    """The leading eigenvectors hold little of what they were to stand for."""


def _warn_of_loss(captured: Mapping[str, jax.Array]) -> None:
    poor = {leaf: float(share.min()) for leaf, share in captured.items() if share.min() < 0.5}
    if poor:
        shown = ", ".join(f"{leaf} {share:.0%}" for leaf, share in list(poor.items())[:5])
        warnings.warn(
            f"The leading eigenvectors capture less than half of the trace of {len(poor)} linear "
            f"maps: {shown}. Use a higher rank=.",
            TruncationWarning,
            stacklevel=2,
        )


def _sampler(sample: SampleFn, over: TrainingPass) -> Callable[[NumberedBatch], NumberedBatch]:
    example = over.source.example
    drawn = jax.eval_shape(sample, over.params, example, over.featurizer.key)
    describe = functools.partial(jax.tree.map, lambda x: f"{x.dtype}{list(x.shape)}")
    if describe(drawn) != describe(example):
        raise ValueError(
            "sample(params, example, key) must return the example with other labels, of the same "
            f"structure, shapes and dtypes: got {describe(drawn)}, needed {describe(example)}."
        )

    step = _compiled_sampler(sample, over.featurizer.rule)
    return functools.partial(step, over.featurizer.key, over.params)


@functools.lru_cache(maxsize=16)
def _compiled_sampler(
    sample: SampleFn, rule: FeatureRule
) -> Callable[[Key, Params, NumberedBatch], NumberedBatch]:
    def draw(key: Key, params: Params, numbered: NumberedBatch) -> NumberedBatch:
        keys = example_keys(key, numbered.ids, "labels")
        batch = jax.vmap(sample, in_axes=(None, 0, 0))(params, numbered.batch, keys)
        # One that is left out with its own label is not to come back with another.
        values = each_example(functools.partial(rule.output, params))(
            numbered.batch, example_keys(key, numbered.ids)
        )
        return numbered._replace(batch=batch, real=numbered.real & jnp.isfinite(values))

    return jax.jit(draw)


def _covariances(
    over: TrainingPass,
    sampler: Callable[[NumberedBatch], NumberedBatch] | None,
    factors: Factors,
) -> tuple[dict[str, Covariance], jax.Array | None, dict[str, Exponents], dict[str, Narrow]]:
    """Sums over the data, its digest, the units of the sums, what wide sides are projected with."""
    featurizer = over.featurizer
    factored = {f.map.leaf: f for f in featurizer.plan.factored}
    key = jax.random.fold_in(featurizer.key, over.number)
    projected = {
        leaf: (
            _narrowing(named_key(key, f"{leaf} inputs"), f, f.rows),
            _narrowing(named_key(key, f"{leaf} outputs"), f, f.map.size_out),
        )
        for leaf, f in factored.items()
    }
    if not factored:
        return {}, None, {}, {}
    # All activations of a batch are in memory at once, so batches are small.
    size = min(over.block, featurizer.microbatch, _MICROBATCH * over.place.shards)
    smaller = dataclasses.replace(over, block=over.source.block_size(size, over.place))
    digests = row_digests(over.place)
    function = covariance_sums(featurizer.rule, featurizer.plan.factored, factors)

    def sums(exponents: dict[str, Exponents]) -> tuple[dict[str, Covariance], jax.Array]:
        shared = over.place.whole((featurizer.key, over.params, projected, exponents))
        given = (
            (shared, each if sampler is None else sampler(each), (digests(each.batch), each.real))
            for each in smaller.batches("covariances")
        )
        return over.sums(function, given)

    none = Exponents(np.zeros((), np.int32), np.zeros((), np.int32))
    exponents = dict.fromkeys(factored, none)
    found, data = sums(exponents)
    typical = {leaf: _typical(covariance) for leaf, covariance in found.items()}
    if any(abs(int(each)) > factors.far for both in typical.values() for each in both):
        # Sums of numbers as large or small as these leave the range of float32: once more.
        exponents = typical
        found, data = sums(exponents)
    if isinstance(factors, Covariances):
        factors.check_masked(found)
    return found, data, exponents, projected


def _typical(covariance: Covariance) -> Exponents:
    """The exponents of the geometric mean of the examples' largest inputs and cotangents."""
    totals, counts = np.asarray(covariance.sizes, np.float64)
    return Exponents(*np.round(totals / np.maximum(counts, 1)).astype(np.int32))


def _narrowing(key: Key, factored: Factored, size: int) -> jax.Array | None:
    if size <= _WIDE:
        return None
    return jax.random.rademacher(key, (size, _NARROW), factored.dtype) / _NARROW**0.5


class _Eigen(NamedTuple):
    """All eigenvalues [*stack, f] of a side, the largest first, and its leading eigenvectors."""

    values: np.ndarray
    leading: np.ndarray


def _eigen(
    covariances: Mapping[str, Covariance], maps: Sequence[Factored]
) -> dict[str, tuple[_Eigen, _Eigen]]:
    """Of both sides of each leaf; each matrix of a stack on its own, since few have room."""
    by_leaf = {each.map.leaf: each for each in maps}
    held = {leaf: jax.tree.map(np.asarray, covariances[leaf]) for leaf in by_leaf}
    places = {leaf: list(np.ndindex(*each.counts.shape[1:])) for leaf, each in held.items()}

    def of(item: tuple[str, int, tuple[int, ...]]) -> _Eigen:
        leaf, side, at = item
        matrix, factored = mean(held[leaf], side, at), by_leaf[leaf]
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        leading = vectors[:, ::-1][:, : (factored.left, factored.right)[side]]
        return _Eigen(np.maximum(values[::-1], 0), leading.astype(factored.dtype, order="C"))

    items = [(leaf, side, at) for leaf in by_leaf for side in (0, 1) for at in places[leaf]]
    found = dict(zip(items, side_by_side(of, items), strict=True))

    def whole(leaf: str, side: int) -> _Eigen:
        stack = held[leaf].counts.shape[1:]
        parts = zip(*(found[leaf, side, at] for at in places[leaf]), strict=True)
        return _Eigen(*(np.stack(each).reshape(*stack, *each[0].shape) for each in parts))

    return {leaf: (whole(leaf, 0), whole(leaf, 1)) for leaf in by_leaf}


def _side(found: _Eigen, wide: jax.Array | None) -> tuple[jax.Array, np.ndarray, float]:
    """The leading eigenvectors of a side, their eigenvalues, and their share of the trace.

    Of a side that is projected they are vectors of the side itself.
    """
    vectors = jnp.asarray(found.leading)
    kept, total = found.values[..., : vectors.shape[-1]], found.values.sum()
    share = float(kept.sum() / total) if total > 0 else 1.0
    return vectors if wide is None else wide @ vectors, kept, share


def second_moments(
    over: TrainingPass,
    fitted: Fitted,
    transform: Callable[[NumberedBatch], NumberedBatch] | None = None,
) -> np.ndarray:
    """Mean square of each feature, float64 [p]; a pass over the data.

    Args:
      over: the checkpoint and the data.
      fitted: what was fitted to the checkpoint.
      transform: applied to each batch first, such as other labels.
    """
    exponent: int | None = None

    def blocks() -> Iterator[tuple[int, jax.Array, jax.Array]]:
        nonlocal exponent
        for each in over.features(over.place.whole(fitted), "eigenvalues", transform):
            if exponent is None:
                exponent = typical_exponent(over.place, each.features, each.kept)
            yield exponent, each.features, each.kept

    return np.ldexp(over.sums(_squares, blocks()).means(), 2 * (exponent or 0))


def _squares(exponent: int, phi: jax.Array, kept: jax.Array) -> Sums:
    return squares(scaled(phi, -exponent), kept)
