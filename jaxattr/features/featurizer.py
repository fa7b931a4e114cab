"""Per-example gradient features: one slice of columns per parameter group.

    phi(x) = [ P_1 g_1(x) | ... | P_m g_m(x) ]        g(x) = d output(params, x) / d params

Where the projection has a basis for linear maps, the features of those are gradients in a small Z
(see `linear_maps`), and no weight gradient is formed. The gradient of every other parameter is
taken exactly, in the same backward pass, and projected. That is done a microbatch at a time, so
memory is set by the microbatch and not by the batch.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattr import groups as groups_lib
from jaxattr import identity, linear_maps
from jaxattr.batches import each_example, in_microbatches, leading_size, shapes_of_one
from jaxattr.counts import whole_number
from jaxattr.features import projections, signs
from jaxattr.features.bases import NOTHING, Drawn, Fits, Fitted, cut_sides
from jaxattr.features.expectations import (
    at_one_draw,
    has_unit_norm,
    number_of_draws,
    sum_over_draws,
)
from jaxattr.features.plans import FeatureLayout, Plan, make_plan
from jaxattr.features.projections import Projection
from jaxattr.features.random_maps import draw_groups
from jaxattr.features.whole_gradients import as_function_of, project_gradients
from jaxattr.groups import GroupLayout, Groups
from jaxattr.inputs.outputs import check_function, check_output
from jaxattr.inputs.traces import activation_bytes, shapes_of, traced_once
from jaxattr.keys import example_keys, key_or_default
from jaxattr.scales import unit_norm, wide
from jaxattr.sharding import Placement
from jaxattr.typing import Batch, Example, Features, Key, OutputFn, Params


@dataclasses.dataclass(frozen=True)
class FeatureRule:
    """How one example becomes features.

    Attributes:
      output: scalar function of one example, whose gradient is the feature.
      projection: applied to each group's gradient.
      normalize: whether the features of an example, all groups together, get unit norm.
      residual: scalar of one example that multiplies its column of scores, or None for one.
    """

    output: OutputFn = identity.function("params", "example", "key")
    projection: Projection = dataclasses.field(default_factory=projections.identity)
    normalize: bool = False
    residual: OutputFn | None = identity.function("params", "example", "key", default=None)

    def __post_init__(self) -> None:
        check_function(self.output)
        if not hasattr(self.projection, "basis"):
            raise TypeError(
                "projection must be one of ja.projections, such as ja.projections.rademacher(1024) "
                f"or ja.projections.identity(), got {self.projection!r}."
            )
        if self.residual is not None:
            check_function(self.residual, "the residual")

    def check(self, params: Params, example: Example, key: Key) -> None:
        """Raises if one of the user's functions does not map one example to a float scalar."""
        check_output(self.output, params, example, key)
        if self.residual is not None:  # which may be a constant
            check_output(self.residual, params, example, key, constant=True)

    def traced(
        self, params: Params, example: Example, key: Key, *, anew: bool = False
    ) -> "FeatureRule":
        """Returns the rule with the user's functions as what they compute now.

        Args:
          params: parameters, or their shapes.
          example: ONE example, or its shapes.
          key: any key.
          anew: whether those that were traced are traced again, for other shapes.
        """
        timestep = jax.ShapeDtypeStruct((), jax.dtypes.canonicalize_dtype(int))
        given = {"params": params, "example": example, "key": key, "timestep": timestep}
        return identity.traced(self, given, anew)


class Featurized(NamedTuple):
    """Features of a batch and what comes with them.

    Attributes:
      features: float [b, p].
      residual: float [b].
    """

    features: Features
    residual: jax.Array


Step = Callable[[Key, Params, Batch, jax.Array, Drawn, Fitted], Featurized]


@dataclasses.dataclass(frozen=True, eq=False)
class Featurizer:
    """Maps a batch to its features; pure and jittable. Made by `featurizer`.

    Attributes:
      layout: which columns belong to which group.
      groups: which parameters belong to which group.
      plan: which parameter becomes which features.
      rule: how one example becomes features.
      key: of projections and stochastic outputs.
      example: shapes of ONE example that it was made for.
      microbatch: examples whose gradients are in memory at once.
      step: (key, params, batch, ids, drawn, fitted) -> features and residual; jitted, and the same
        function for the same rule, plan and microbatch.
    """

    layout: FeatureLayout
    groups: GroupLayout
    plan: Plan
    rule: FeatureRule
    key: Key
    example: Example
    microbatch: int
    step: Step

    def draw(
        self,
        checkpoint: int = 0,
        fitted: Fitted = NOTHING,
        place: Placement | None = None,
    ) -> Drawn:
        """Draws the projections of a checkpoint, once for all of its batches.

        Args:
          checkpoint: its number.
          fitted: what was fitted to it; sides that are there are not drawn.
          place: the devices that get them, all of them all. Default: the default device.

        Returns:
          What is drawn; (in + out) * rank numbers for each linear map.
        """
        basis: Any = self.rule.projection.basis
        seed = signs.seed_of(self.key, operator.index(checkpoint))
        factored = () if fitted.sides else self.plan.factored
        sides = {} if basis is None else basis.draw(seed, factored)
        sides = {f.map.leaf: cut_sides(f, sides[f.map.leaf]) for f in factored if sides}
        rest = draw_groups(self.rule.projection, seed, self.plan.rest_sizes)
        mixing = () if basis is None else basis.draw_mixing(seed, self.plan.factored)
        return (place or Placement()).whole(Drawn(sides, rest, mixing))

    def unscaled(self) -> Callable[..., Featurized]:
        """Returns the step without unit norm, whose features are linear in the output."""
        return _compiled_step(
            dataclasses.replace(self.rule, normalize=False), self.plan, self.microbatch
        )

    def of(self, output: OutputFn, params: Params, example: Example) -> "Featurizer":
        """Returns the featurizer of another output function, with the same columns.

        Args:
          output: scalar function of one example. Where it uses a leaf in another way than the
            function that this was made for, the gradient of that leaf is formed.
          params: parameters, or their shapes.
          example: ONE example, or its shapes.
        """
        check_output(output, params, example, self.key)
        # The residual is of training examples, whose fields this one may lack.
        rule = dataclasses.replace(self.rule, output=output, residual=None)
        rule, plan = rule.traced(params, example, self.key), self.plan
        if plan.factored:
            of_draw, one = at_one_draw(rule.output, example)
            plan = plan.for_output(linear_maps.find(of_draw, params, one, self.key))
        step = _compiled_step(rule, plan, self.microbatch)
        return dataclasses.replace(self, rule=rule, plan=plan, step=step)

    def __call__(
        self,
        params: Params,
        batch: Batch,
        ids: jax.Array | None = None,
        checkpoint: int = 0,
        fitted: Fitted | None = None,
        drawn: Drawn | None = None,
    ) -> Features:
        """Computes features.

        Args:
          params: the parameters, of the structure that the featurizer was made for.
          batch: a pytree of arrays [b, ...].
          ids: integers [b], the examples' identities: a stochastic loss draws its randomness from
            them and the run's key alone. Default: 0, 1, ...
          checkpoint: number of the checkpoint; each has a projection of its own.
          fitted: what the method fitted to that checkpoint, `index.fitted[checkpoint]`; only for
            methods that fit a basis to the training data, such as EK-FAC.
          drawn: `draw(checkpoint)`, if it is at hand. Default: drawn anew. Hand it in where you
            call this within `jax.jit`: what is drawn there makes compiling slow.

        Returns:
          Features [b, p], float32 or wider. Rows of examples whose gradient is not finite are not
          finite: whoever ranks them must look.
        """
        if ids is None:
            ids = jnp.arange(leading_size(batch))
        basis = self.rule.projection.basis
        if fitted is None and isinstance(basis, Fits):
            raise ValueError(
                f"The basis of these features ({basis.name}) is fitted to training data. Build an "
                "index, and pass fitted=index.fitted[checkpoint]."
            )
        fitted = NOTHING if fitted is None else fitted
        drawn = self.draw(checkpoint, fitted) if drawn is None else drawn
        return self.step(self.key, params, batch, jnp.asarray(ids), drawn, fitted).features


def featurize_with(
    rule: FeatureRule,
    params: Params,
    example: Example,
    *,
    groups: Groups = groups_lib.by_layer,
    key: Key | None = None,
    microbatch: int | None = None,
) -> Featurizer:
    """Makes a featurizer from a rule.

    Args:
      rule: how one example becomes features.
      params: parameters, or their shapes.
      example: ONE example, or its shapes.
      groups: see `jaxattr.groups.resolve`.
      key: key of the projections and of stochastic outputs. Default: `jax.random.key(0)`.
      microbatch: examples whose gradients are in memory at once. Default: as many as
        have room in a quarter of the device's memory (1 GiB on a CPU), by an upper bound of their
        activations.

    Returns:
      The featurizer.

    Raises:
      ValueError: if the output is not a float scalar, the parameters are not float arrays, or the
        groups are no partition of them.
    """
    layout = groups_lib.resolve(groups, params)
    key = key_or_default(key)
    with traced_once():
        rule.check(params, example, key)
        rule = rule.traced(params, example, key)
    if microbatch is not None:
        microbatch = whole_number("microbatch", microbatch)
    found, (output, one) = None, at_one_draw(rule.output, example)
    if rule.projection.basis is not None:
        found = linear_maps.find(output, params, one, key)
        if callable(groups):
            layout = groups_lib.split_layers(layout, found.stacked, found.layer_axes)
            still = {leaf: why for leaf, why in found.exact.items() if why == linear_maps.STOPPED}
            layout = groups_lib.leave_out(layout, still)
    plan = make_plan(layout, rule.projection, found)
    if microbatch is None:
        program = identity.program_of(output, shapes_of((params, one, key)))
        microbatch = _default_microbatch(rule, layout, plan, activation_bytes(program.jaxpr))
    step = _compiled_step(rule, plan, microbatch)
    shapes = shapes_of(example)
    return Featurizer(plan.layout, layout, plan, rule, key, shapes, microbatch, step)


@functools.lru_cache(maxsize=64)  # one for each length of queries, too
def _compiled_step(rule: FeatureRule, plan: Plan, microbatch: int) -> Step:
    """The jitted step; an index of other data by the same method compiles nothing anew."""

    def step(
        key: Key,
        params: Params,
        batch: Batch,
        ids: jax.Array,
        drawn: Drawn,
        fitted: Fitted,
    ) -> Featurized:
        of_each_draw, count = has_unit_norm(rule.output), number_of_draws(rule.output)
        gradients_of = functools.partial(_gradients, rule, plan, params, fitted.with_sides(drawn))

        def assembled(z: Any, rest: Any, value: jax.Array) -> Features:
            # An output that is none may have a gradient (a label out of range).
            phi = plan.assemble(rule.projection, drawn, z, rest)
            return jnp.where(jnp.isfinite(value)[:, None], phi, jnp.nan)

        def of_draw(output: OutputFn, batch: Batch, keys: Key) -> Any:
            found = gradients_of(output, batch, keys)
            if of_each_draw:
                return unit_norm(assembled(*found))
            # Sums of many draws would stand still in a narrow type.
            return jax.tree.map(lambda x: x.astype(wide(x.dtype)), found)

        def chunk(batch: Batch, ids: jax.Array) -> Featurized:
            keys = example_keys(key, ids)
            total = sum_over_draws(rule.output, batch, keys, of_draw)
            mean = jax.tree.map(lambda x: x / count, total) if count > 1 else total
            # Projecting is linear, so it is done once, for the mean.
            phi = mean if of_each_draw else assembled(*mean)
            phi = unit_norm(phi) if rule.normalize else phi
            return Featurized(phi, _residual(rule.residual, params, batch, keys))

        return in_microbatches(chunk, microbatch)(batch, ids)

    return jax.jit(step)


def _gradients(
    rule: FeatureRule,
    plan: Plan,
    params: Params,
    fitted: Fitted,
    output: OutputFn,
    batch: Batch,
    keys: Key,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], jax.Array]:
    """What `Plan.assemble` takes, for a batch, and the outputs [b]: the backward pass."""
    basis = rule.projection.basis
    if basis is None or basis.materialize or not plan.factored:
        of_leaves, leaves = as_function_of(output, plan.rest | plan.covered, params)

        def exact(example: Example, key: Key) -> tuple[dict, dict, jax.Array]:
            value, gradients = jax.value_and_grad(of_leaves)(leaves, example, key)
            return *project_gradients(plan, fitted, gradients), value

        return each_example(exact)(batch, keys)

    # Traced here, and not once for all, since shapes of examples may differ between batches.
    zeros = {f.map.leaf: jnp.zeros((*f.lead, *f.inner), f.dtype) for f in plan.factored}
    unused = {leaf: zeros.pop(leaf) for leaf in plan.unused}
    formed = tuple(f for f in plan.factored if f.map.leaf in plan.formed)
    whole = dataclasses.replace(plan, factored=formed)
    zeros = {leaf: z for leaf, z in zeros.items() if leaf not in plan.formed}
    shapes = shapes_of_one((batch, keys))
    rewritten = linear_maps.bottleneck(output, params, *shapes, leaves=zeros)

    def rewritten_output(params: Params, example: Example, key: Key) -> jax.Array:
        z, example = example
        return rewritten(params, fitted.sides, z, example, key)

    of_rest, rest = as_function_of(rewritten_output, whole.rest | whole.covered, params)

    def factored(example: Example, key: Key) -> tuple[dict, dict, jax.Array]:
        def of_both(z: dict[str, jax.Array], rest: dict[str, jax.Array]) -> jax.Array:
            return of_rest(rest, (z, example), key)

        value, (z, exact) = jax.value_and_grad(of_both, argnums=(0, 1))(zeros, rest)
        of_formed, exact_rest = project_gradients(whole, fitted, exact)
        return z | of_formed | unused, exact_rest, value

    return each_example(factored)(batch, keys)


def _residual(residual: OutputFn | None, params: Params, batch: Batch, keys: Key) -> jax.Array:
    if residual is None:
        return jnp.ones(keys.shape[0])
    return each_example(functools.partial(residual, params))(batch, keys)


def _default_microbatch(
    rule: FeatureRule, layout: GroupLayout, plan: Plan, activations: int
) -> int:
    """As many examples as their gradients and activations leave room for."""
    basis, numbers = rule.projection.basis, sum(layout.sizes)
    if basis is not None and not basis.materialize:
        rest = {member for group in plan.groups for member in group.rest}
        numbers = sum(member.size for member in rest) + plan.layout.total
    return max(1, min(_LARGEST_MICROBATCH, room() // max(4 * numbers + activations, 1)))


_LARGEST_MICROBATCH, _ROOM_OF_HOST = 256, 1 << 30


def room() -> int:
    """Returns the bytes that a feature step may take: a quarter of the device's memory.

    Not of what is free now, since a build that goes on must do as it did before.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return _ROOM_OF_HOST if limit is None else limit // 4
