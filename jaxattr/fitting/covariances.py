"""The two matrices of each linear map whose eigenvectors are a basis, summed over the data.

What they are sums of is a strategy: `Covariances` of inputs and cotangents at each position, or
`shampoo.GradientFactors`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr import identity, linear_maps
from jaxattr.batches import each_example, shapes_of_one
from jaxattr.features.bases import Factored
from jaxattr.features.expectations import number_of_draws, refuse_unit_norm, sum_over_draws
from jaxattr.features.featurizer import FeatureRule
from jaxattr.fitting.passes import NumberedBatch
from jaxattr.inputs.outputs import check_function
from jaxattr.keys import example_keys
from jaxattr.linear_maps import Captured
from jaxattr.scales import exponent_of, scaled, wide
from jaxattr.typing import Batch, Example, Key, OutputFn, Params

MaskFn = Callable[[Example], jax.Array]
"""Which positions of ONE example count, [t]."""

Narrow: TypeAlias = tuple[jax.Array | None, jax.Array | None]
"""What the inputs and the outputs of a wide linear map are projected with; None: nothing."""

Uses: TypeAlias = Sequence[Captured]
"""Of a linear map in a batch: inputs [b, *stack, t, in] and cotangents [b, *stack, t, out], each
over 2 to its exponent, and zero for examples that do not count; `applied` as in `Captured`."""


class Exponents(NamedTuple):
    """Inputs and cotangents of a leaf are taken over 2 to these powers, int32 []."""

    inputs: Any
    cotangents: Any


class Covariance(NamedTuple):
    """Sums for one leaf.

    Attributes:
      inputs: of the inputs' matrix, [in, in], or [stack, in, in].
      cotangents: of the cotangents' matrix, [out, out], or [stack, out, out].
      counts: how many each is a sum over, [2], or [2, stack].
      sizes: sums over examples of the exponents of their largest input and cotangent, and how many
        were not zero, [2, 2].
    """

    inputs: jax.Array
    cotangents: jax.Array
    counts: jax.Array
    sizes: jax.Array


class Factors(Protocol):
    """What the two matrices of a linear map are: a frozen dataclass, so that equal ones hash alike.

    Attributes:
      name: what `describe` shows.
      far: inputs and cotangents up to 2 to this power, and down to its inverse, add up.
      multiply: whether products of their eigenvalues are a curvature.
    """

    name: ClassVar[str]
    far: ClassVar[int]
    multiply: ClassVar[bool]

    def __hash__(self) -> int: ...

    def weights(self, batch: Batch) -> jax.Array | None:
        """Returns how much each position counts, [b, t]; None if all do."""

    def in_range(self, inputs: jax.Array, cotangents: jax.Array) -> jax.Array:
        """Which examples with such squared norms [b] can be summed up, bool [b]."""

    def sums(
        self, factored: Factored, uses: Uses, kept: jax.Array, weights: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the first three of `Covariance`; `kept` is which examples count, bool [b]."""


def fits(squares: jax.Array) -> jax.Array:
    """Which numbers can be summed up by the million within the range of their type.

    Args:
      squares: float, NaN where that is not known.

    Returns:
      bool.
    """
    return squares < jnp.finfo(squares.dtype).max * 2.0**-40


@dataclasses.dataclass(frozen=True)
class Covariances:
    """K-FAC's: x^T x and d^T d, means over positions.

    Attributes:
      mask: which positions count. Applied to maps with as many positions as the mask. Whole numbers
        count where they are not zero; floats are weights.
    """

    mask: MaskFn | None = identity.function("example", default=None)
    name: ClassVar[str] = "K-FAC"
    far: ClassVar[int] = 30
    multiply: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.mask is not None:
            check_function(self.mask, "mask", ("example",))

    def weights(self, batch: Batch) -> jax.Array | None:
        """See `Factors`."""
        if self.mask is None:
            return None
        found: Any = jax.vmap(self.mask)(batch)
        if not isinstance(found, jax.Array):
            got = "None" if found is None else f"a {type(found).__name__}"
            raise ValueError(
                "mask must return which of an example's t positions count, [t], but returned "
                f"{got}: write mask=lambda example: example['mask']."
            )
        if found.dtype == bool:
            return found
        floats = jnp.issubdtype(found.dtype, jnp.floating)
        counted = found if floats else found.astype(bool).astype(jnp.result_type(float))
        return jnp.where(found >= 0, counted, jnp.nan)  # `check_masked` says so

    def check_masked(self, sums: Mapping[str, Covariance]) -> None:
        """Refuses a mask that leaves nothing, or is none.

        Args:
          sums: over the data, of each linear map.

        Raises:
          ValueError: if it is negative or not finite, or keeps no position with a gradient.
        """
        needed = "mask must return True, or 1, for the positions that count, and False, or 0, for"
        for leaf, found in sums.items() if self.mask is not None else ():
            if not np.isfinite(found.counts).all():
                raise ValueError(
                    f"{needed} the others: this one is negative or not finite, as masks that are "
                    "added to logits are."
                )
            if np.asarray(found.sizes)[1].all() and not np.any(found.cotangents):
                raise ValueError(
                    f"{needed} padding: of {leaf!r} it keeps no position with a gradient. Is it "
                    "the other way round?"
                )

    def in_range(self, inputs: jax.Array, cotangents: jax.Array) -> jax.Array:
        """See `Factors`."""
        return fits(inputs) & fits(cotangents)

    def sums(
        self, factored: Factored, uses: Uses, kept: jax.Array, weights: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `Factors`."""
        totals = []
        for use in uses:
            t = use.cotangents.shape[-2]
            counted = jnp.broadcast_to(kept[:, None], (kept.shape[0], t)).astype(factored.dtype)
            if weights is not None and weights.shape[1:] == (t,):
                counted = jnp.where(kept[:, None], weights.astype(counted.dtype), 0)
            positions = jnp.sum(counted) * use.applied.astype(counted.dtype)
            # A convolution's feature groups share a position's cotangents.
            counts = jnp.stack([positions, positions / factored.map.groups])
            inputs = _weighted_gram(use.inputs, counted, factored)
            totals.append((inputs, _weighted_gram(use.cotangents, counted, factored), counts))
        return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), totals)


def _check_mask(shape: tuple[int, ...], uses: Mapping[str, Uses]) -> None:
    """Refuses a mask that fits no linear map, though some have several positions."""
    counts = {use.cotangents.shape[-2] for each in uses.values() for use in each}
    if len(shape) != 1 or (counts - {1} and shape[0] not in counts):
        raise ValueError(
            "mask must return which of an example's t positions count, [t], but returned "
            f"{list(shape)}, and linear maps have {sorted(counts)} positions. Positions that the "
            "model adds, such as a class token, are in the mask too."
        )


@functools.lru_cache(maxsize=16)
def covariance_sums(
    rule: FeatureRule, factored: tuple[Factored, ...], factors: Factors
) -> Callable[..., tuple[dict[str, Covariance], jax.Array]]:
    """One function for all checkpoints, so that it is compiled once."""
    by_leaf = {each.map.leaf: each for each in factored}
    return functools.partial(_sums_of_batch, rule.output, by_leaf, factors)


def _sums_of_batch(
    output: OutputFn,
    factored: Mapping[str, Factored],
    factors: Factors,
    shared: tuple[Key, Params, Mapping[str, Narrow], Mapping[str, Exponents]],
    numbered: NumberedBatch,
    read: tuple[jax.Array, jax.Array],
) -> tuple[dict[str, Covariance], jax.Array]:
    """Sums of examples that count; and the digest of all that were read, `read` (digests, real)."""
    key, params, projected, exponents = shared
    keys = example_keys(key, numbered.ids)
    weights = factors.weights(numbered.batch)

    def sums(
        real: jax.Array, output: OutputFn, batch: Batch, keys: Key
    ) -> tuple[dict[str, Covariance], jax.Array]:
        shapes = shapes_of_one((batch, keys))
        captured = linear_maps.capture(output, params, *shapes, leaves=list(factored))
        uses = each_example(functools.partial(captured, params))(batch, keys)
        if weights is not None:
            _check_mask(weights.shape[1:], uses)
        finite = real & _all_finite(uses)
        kept = finite & _in_range(uses, exponents, factors)
        found = {}
        for leaf, captured_uses in uses.items():
            own, narrow, over = factored[leaf], projected[leaf], exponents[leaf]
            given = [_use(own, each, kept, narrow, over) for each in captured_uses]
            sums = factors.sums(own, given, kept, weights)
            found[leaf] = Covariance(*sums, sizes=_sizes(captured_uses, finite))
        return found, (real & ~finite).astype(jnp.int32)

    def of_all_draws(real: jax.Array) -> tuple[dict[str, Covariance], jax.Array]:
        # Each draw counts as a position, like the tokens of a text, or as an example.
        return sum_over_draws(output, numbered.batch, keys, functools.partial(sums, real))

    refuse_unit_norm(output, "A basis of covariances (ja.kfac, ja.ekfac, ja.eshampoo, ja.logra)")
    if number_of_draws(output) == 1:
        found, _ = of_all_draws(numbered.real)
    else:
        found = _of_whole_examples(of_all_draws, numbered.real)
    digests, real = read
    return found, identity.sum_of_rows(digests, numbered.ids, real)


def _of_whole_examples(sums: Callable[[jax.Array], tuple[Any, jax.Array]], real: jax.Array) -> Any:
    """Sums over examples all of whose draws are finite: the others have no features.

    Args:
      sums: which examples count, bool [b] -> sums, and how many draws of each were lost, int [b].
      real: which rows are examples, bool [b].
    """
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sums, real)[0])

    def add(carry: tuple) -> tuple:
        kept, _, _ = carry
        found, lost = sums(kept)
        return kept & (lost == 0), found, (lost > 0).any()

    # Once more where some were lost, and no second program for that.
    return jax.lax.while_loop(lambda carry: carry[2], add, (real, zeros, jnp.array(True)))[1]


def _all_finite(uses: Mapping[str, tuple[Captured, ...]]) -> jax.Array:
    """Which examples have finite inputs and cotangents everywhere, [b]."""
    finite = [
        jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))
        for x in jax.tree.leaves(dict(uses))
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    return functools.reduce(jnp.logical_and, finite)


def _in_range(
    uses: Mapping[str, tuple[Captured, ...]], exponents: Mapping[str, Exponents], factors: Factors
) -> jax.Array:
    """Which examples have sums that those of many can hold, [b]."""
    kept = [
        factors.in_range(
            _squares(use.inputs, exponents[leaf].inputs),
            _squares(use.cotangents, exponents[leaf].cotangents),
        )
        for leaf, each in uses.items()
        for use in each
    ]
    return functools.reduce(jnp.logical_and, kept)


def _squares(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """Squared norms of x over 2 to a power, [b]; an id stands for a one."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.full(x.shape[0], math.prod(x.shape[1:]), jnp.float32)
    x = scaled(x.astype(wide(x.dtype)), -exponent)
    return jnp.sum(x**2, axis=tuple(range(1, x.ndim)))


def _sizes(uses: tuple[Captured, ...], finite: jax.Array) -> jax.Array:
    """See `Covariance.sizes`."""
    columns = []
    for side in zip(*((use.inputs, use.cotangents) for use in uses), strict=True):
        totals = jnp.zeros(2, jnp.float32)
        for x in side:
            axes = tuple(range(1, x.ndim))
            if jnp.issubdtype(x.dtype, jnp.floating):
                counts = finite & (x != 0).any(axis=axes)
                sizes = jnp.where(counts, exponent_of(jnp.where(jnp.isfinite(x), x, 0), axes), 0)
                totals += jnp.stack([sizes.sum(), counts.sum()]).astype(jnp.float32)
        columns.append(totals)
    return jnp.stack(columns, axis=1)


def _use(
    factored: Factored, use: Captured, kept: jax.Array, narrow: Narrow, exponents: Exponents
) -> Captured:
    inputs = _inputs(factored, use.inputs, narrow[0])
    cotangents = _project(use.cotangents, narrow[1])

    def clean(x: jax.Array, exponent: jax.Array) -> jax.Array:
        # Not finite times zero is not zero, so what does not count is taken out.
        counts = kept.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(counts, scaled(x.astype(factored.dtype), -exponent), 0)

    sides = clean(inputs, exponents.inputs), clean(cotangents, exponents.cotangents)
    return Captured(*sides, use.applied[0])


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
    weights = weights.reshape(weights.shape[0], *(1 for _ in factored.lead), -1, 1)
    x = jnp.where(weights > 0, x, 0) * jnp.sqrt(weights)
    return products(x, x, factored)


def products(x: jax.Array, y: jax.Array, factored: Factored) -> jax.Array:
    """Sum over examples and positions of x^T y.

    Args:
      x: [b, *stack, t, f].
      y: [b, *stack, t, g].
      factored: the linear map.

    Returns:
      [*stack, f, g].
    """
    x, y = (jnp.moveaxis(side, 0, -3) for side in (x, y))  # [*stack, b, t, f]
    x, y = (side.reshape(*factored.lead, -1, side.shape[-1]) for side in (x, y))
    layers = tuple(range(len(factored.lead)))
    positions = (len(layers),)
    # Not einsum, which transposes first: 40 ms against 27 for [2048, 1024] on two cores.
    dimensions = ((positions, positions), (layers, layers))
    return jax.lax.dot_general(x, y, dimensions, precision="highest")  # [*stack, f, g]


def mean(covariance: Covariance, side: int, at: tuple[int, ...]) -> np.ndarray:
    """One matrix as a mean, [f, f] in float64.

    Args:
      covariance: of a leaf, on the host.
      side: 0 for inputs, 1 for cotangents.
      at: its place in the stack; () where there is none.
    """
    total = (covariance.inputs, covariance.cotangents)[side][at]
    return np.asarray(total, np.float64) / (float(covariance.counts[side][at]) or 1.0)
