"""K-FAC's eigenbasis: eigenvectors of the covariances of each linear map's inputs and cotangents.

For y = x W, with gradient sum over t of x_t^T d_t, K-FAC takes A = E[x x^T] and S = E[d d^T] over
positions t as the two factors of the Fisher matrix of W. Their eigenvectors are a basis in which it
is nearly diagonal.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr import identity, linear_maps
from jaxattr.batches import shapes_of_one
from jaxattr.features.bases import Basis, Factored, Fitted, Sides
from jaxattr.features.expectations import refuse_unit_norm, sum_over_draws
from jaxattr.features.featurizer import FeatureRule
from jaxattr.fitting.passes import NumberedBatch, TrainingPass, row_digests
from jaxattr.kernels.diagonal import sum_of_squares
from jaxattr.keys import example_keys, named_key
from jaxattr.linear_maps import Captured
from jaxattr.typing import Batch, Example, Key, OutputFn, Params

SampleFn = Callable[[Params, Example, Key], Example]
"""Draws the labels of ONE example from the model: returns the example with other labels."""

MaskFn = Callable[[Example], jax.Array]
"""Which positions of ONE example count, [t]."""

# A side with more inputs or outputs than this, such as a vocabulary, is projected at random to
# `_NARROW` dimensions before its covariance is taken.
_WIDE, _NARROW = 4096, 1024
# Examples whose activations are in memory at once, where the user does not say.
_MICROBATCH = 64


class Covariance(NamedTuple):
    """Sums over positions, for one leaf.

    Attributes:
      inputs: of x^T x, [in, in], or [stack, in, in].
      cotangents: of d^T d, [out, out], or [stack, out, out].
      positions: how many, [], or [stack].
    """

    inputs: jax.Array
    cotangents: jax.Array
    positions: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eigenbasis(Basis):
    """The leading eigenvectors of both covariances of each linear map, largest first.

    Guarantees: exact covariances of the training set (of sampled labels with `sample`), whatever
    the batch size; examples that are not finite are left out. A side with more than 4,096 inputs
    or outputs is first projected by random signs to 1,024.
    Cost: a pass over the data without weight gradients, b t (in^2 + out^2) operations each batch,
    and an eigendecomposition in float64 on the host per side and layer. With `sample`, a second
    pass, unless `eigenvalues` leave no feature without.

    Attributes:
      eigenvalues: whether the products of the covariances' eigenvalues are the curvature of the
        features (K-FAC); otherwise that is left to the kernel, or, with `sample`, measured in a
        second pass (EK-FAC).
      sample: draws labels from the model; or None for the labels of the data.
      mask: which positions count. Applied to maps with as many positions as the mask.

    References:
      Martens and Grosse (2015), arXiv:1503.05671; George et al. (2018), arXiv:1806.03884.
    """

    eigenvalues: bool
    sample: SampleFn | None = identity.function("params", "example", "key", default=None)
    mask: MaskFn | None = identity.function("example", default=None)
    narrow: ClassVar[tuple[int, int] | None] = (_WIDE, _NARROW)

    def __post_init__(self) -> None:
        if self.bands < 1:
            raise ValueError(f"bands must be at least 1, got {self.bands}.")

    @property
    def name(self) -> str:
        """See `Basis`."""
        return "K-FAC eigenbasis"

    def fit(self, over: TrainingPass) -> Fitted:
        """See `Fits`."""
        sampler = None if self.sample is None else _sampler(self.sample, over)
        (covariances, data), projected = _covariances(over, sampler, self.mask)
        sides: dict[str, Sides] = {}
        captured, curvature = {}, {}
        for factored in over.featurizer.plan.factored:
            leaf = factored.map.leaf
            found = [_eigen(matrix) for matrix in _means(covariances[leaf], factored.map.groups)]
            ranks = (factored.left, factored.right)
            kept = [
                (values[..., :rank], vectors[..., :rank])
                for (values, vectors), rank in zip(found, ranks, strict=True)
            ]
            a, b = (
                _in_full(vectors, wide, factored.dtype)
                for (_, vectors), wide in zip(kept, projected[leaf], strict=True)
            )
            sides[leaf] = (a, b)
            captured[leaf] = jnp.asarray(
                [_share(k[0], f[0]) for k, f in zip(kept, found, strict=True)]
            )
            curvature[leaf] = kept[0][0][..., :, None] * kept[1][0][..., None, :]
        _warn_of_loss(captured)
        fitted = Fitted(sides, {}, None, captured, data)
        known = np.full(over.featurizer.layout.total, np.nan)
        values = over.featurizer.plan.scatter(curvature) if self.eigenvalues else known
        if sampler is not None and np.isnan(values).any():
            known = _second_moments(over, fitted, sampler)
        return fitted._replace(curvature=jnp.asarray(np.where(np.isnan(values), known, values)))


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

    step = _compiled_sampler(sample)
    return functools.partial(step, over.featurizer.key, over.params)


@functools.lru_cache(maxsize=16)
def _compiled_sampler(
    sample: SampleFn,
) -> Callable[[Key, Params, NumberedBatch], NumberedBatch]:
    def draw(key: Key, params: Params, numbered: NumberedBatch) -> NumberedBatch:
        keys = example_keys(key, numbered.ids, "labels")
        batch = jax.vmap(sample, in_axes=(None, 0, 0))(params, numbered.batch, keys)
        return numbered._replace(batch=batch)

    return jax.jit(draw)


def _covariances(
    over: TrainingPass,
    sampler: Callable[[NumberedBatch], NumberedBatch] | None,
    mask: MaskFn | None,
) -> tuple[
    tuple[dict[str, Covariance], jax.Array | None],
    dict[str, tuple[jax.Array | None, jax.Array | None]],
]:
    """Sums over the data, with the digest of them; and what wide sides were projected with."""
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
        return ({}, None), {}
    # All activations of a batch are in memory at once, so batches are small.
    size = min(over.block, featurizer.microbatch, _MICROBATCH * over.place.shards)
    smaller = dataclasses.replace(over, block=over.source.block_size(size, over.place))
    digests = row_digests(over.place)
    given = (
        (numbered if sampler is None else sampler(numbered), digests(numbered.batch))
        for numbered in smaller.batches("covariances")
    )
    function = _covariance_sums(featurizer.rule, featurizer.plan.factored, mask)
    shared = over.place.whole((featurizer.key, over.params, projected))
    return over.sums(function, shared, given), projected


@functools.lru_cache(maxsize=16)
def _covariance_sums(
    rule: FeatureRule, factored: tuple[Factored, ...], mask: MaskFn | None
) -> Callable[..., tuple[dict[str, Covariance], jax.Array]]:
    """One function for all checkpoints, so that it is compiled once."""
    by_leaf = {each.map.leaf: each for each in factored}
    sums = functools.partial(_sums_of_batch, rule.output, by_leaf, mask)

    def with_digest(shared: Any, numbered: NumberedBatch, digests: jax.Array) -> tuple:
        total = identity.sum_of_rows(digests, numbered.ids, numbered.real)
        return sums(shared, numbered), total

    return with_digest


def _sums_of_batch(
    output: OutputFn,
    factored: Mapping[str, Factored],
    mask: MaskFn | None,
    shared: tuple[Key, Params, Mapping[str, tuple[jax.Array | None, jax.Array | None]]],
    numbered: NumberedBatch,
) -> dict[str, Covariance]:
    key, params, projected = shared
    keys = example_keys(key, numbered.ids)
    counted = None if mask is None else jax.vmap(mask)(numbered.batch)

    def sums(output: OutputFn, batch: Batch, keys: Key) -> dict[str, Covariance]:
        shapes = shapes_of_one((batch, keys))
        captured = linear_maps.capture(output, params, *shapes, leaves=list(factored))
        uses = jax.vmap(captured, in_axes=(None, 0, 0))(params, batch, keys)
        kept = numbered.real & _all_finite(uses)
        return {
            leaf: _covariance(factored[leaf], each, kept, counted, *projected[leaf])
            for leaf, each in uses.items()
        }

    refuse_unit_norm(output, "A basis of covariances (ja.kfac, ja.ekfac, ja.logra)")
    # Each draw counts as a position, like the tokens of a text.
    return sum_over_draws(output, numbered.batch, keys, sums)


def _all_finite(uses: Mapping[str, tuple[Captured, ...]]) -> jax.Array:
    """Which examples have finite inputs and cotangents everywhere, [b]."""
    finite = [
        jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))
        for x in jax.tree.leaves(dict(uses))
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    return functools.reduce(jnp.logical_and, finite)


def _covariance(
    factored: Factored,
    uses: tuple[Captured, ...],
    kept: jax.Array,
    counted: jax.Array | None,
    narrow_inputs: jax.Array | None,
    narrow_outputs: jax.Array | None,
) -> Covariance:
    """Sums of one leaf over the positions of all its uses, [*stack, ...] each."""
    totals = []
    for use in uses:
        t = use.cotangents.shape[-2]
        weights = jnp.broadcast_to(kept[:, None], (kept.shape[0], t)).astype(factored.dtype)
        if counted is not None and counted.shape[1:] == (t,):
            weights = weights * counted.astype(weights.dtype)
        inputs = _inputs(factored, use.inputs, narrow_inputs)
        totals.append(
            Covariance(
                _weighted_gram(inputs, weights, factored),
                _weighted_gram(_project(use.cotangents, narrow_outputs), weights, factored),
                jnp.sum(weights) * use.applied[0].astype(weights.dtype),
            )
        )
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), totals)


def _inputs(factored: Factored, inputs: jax.Array, narrow: jax.Array | None) -> jax.Array:
    """Inputs [b, *stack, t, in], with a one for the bias; ids become rows of the projection."""
    if jnp.issubdtype(inputs.dtype, jnp.integer):
        size = factored.map.size_in
        if narrow is not None:
            rows = narrow[:size].at[inputs].get(mode="fill", fill_value=0)
            return rows + jnp.broadcast_to(narrow[size], rows.shape) if factored.bias else rows
        inputs = jax.nn.one_hot(inputs, size, dtype=factored.dtype)
    inputs = inputs.astype(factored.dtype)
    if factored.bias:
        ones = jnp.ones((*inputs.shape[:-1], 1), inputs.dtype)
        inputs = jnp.concatenate([inputs, ones], axis=-1)
    return _project(inputs, narrow)


def _project(x: jax.Array, narrow: jax.Array | None) -> jax.Array:
    return x if narrow is None else x @ narrow.astype(x.dtype)


def _weighted_gram(x: jax.Array, weights: jax.Array, factored: Factored) -> jax.Array:
    """Sum over examples and positions of w x^T x, for x [b, *stack, t, f]; [*stack, f, f]."""
    x = x.astype(factored.dtype)
    weights = weights.reshape(weights.shape[0], *(1 for _ in factored.lead), -1, 1)
    # Not finite times zero is not zero, so what does not count is taken out before.
    x = jnp.where(weights > 0, x, 0)
    x = jnp.moveaxis(x * jnp.sqrt(weights), 0, -3)  # [*stack, b, t, f]
    rows = x.reshape(*factored.lead, -1, x.shape[-1])
    layers = tuple(range(len(factored.lead)))
    positions = (len(layers),)
    # Not einsum, which transposes first: 40 ms against 27 for [2048, 1024] on two cores.
    dimensions = ((positions, positions), (layers, layers))
    return jax.lax.dot_general(rows, rows, dimensions, precision="highest")  # [*stack, f, f]


def _narrowing(key: Key, factored: Factored, size: int) -> jax.Array | None:
    if size <= _WIDE:
        return None
    return jax.random.rademacher(key, (size, _NARROW), factored.dtype) / _NARROW**0.5


def _means(covariance: Covariance, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over positions; a convolution's feature groups share a position's cotangents."""
    positions = np.maximum(np.asarray(covariance.positions, np.float64), 1.0)[..., None, None]
    return (
        np.asarray(covariance.inputs, np.float64) / positions,
        np.asarray(covariance.cotangents, np.float64) / (positions / groups),
    )


def _eigen(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors, the largest first."""
    values, vectors = np.linalg.eigh((matrix + np.swapaxes(matrix, -1, -2)) / 2)
    return np.maximum(values[..., ::-1], 0), vectors[..., ::-1]


def _in_full(vectors: np.ndarray, wide: jax.Array | None, dtype: Any) -> jax.Array:
    """Eigenvectors of a projected side, as vectors of the side itself."""
    found = jnp.asarray(np.ascontiguousarray(vectors), dtype)
    return found if wide is None else wide @ found


def _share(kept: np.ndarray, all_of_them: np.ndarray) -> float:
    total = all_of_them.sum()
    return float(kept.sum() / total) if total > 0 else 1.0


def _second_moments(
    over: TrainingPass, fitted: Fitted, sampler: Callable[[NumberedBatch], NumberedBatch]
) -> np.ndarray:
    """Mean square of each feature under sampled labels, [p]."""
    clean = over.features(over.place.whole(fitted), "eigenvalues", sampler)
    blocks = ((each.features, each.kept) for each in clean)
    total, count = over.sums(_squares_and_count, (), blocks)
    return np.asarray(total, np.float64) / max(float(count), 1.0)


def _squares_and_count(
    shared: tuple[()], phi: jax.Array, kept: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del shared
    return sum_of_squares(phi), kept.sum()
