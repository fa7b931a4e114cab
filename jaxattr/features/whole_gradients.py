"""Whole gradients of one example, and the linear map from them to its features."""

from collections.abc import Callable, Collection, Mapping

import jax

from jaxattr import linear_maps
from jaxattr.features.bases import Drawn, Fitted, apply_sides
from jaxattr.features.plans import Plan
from jaxattr.features.projections import Projection
from jaxattr.leaves import named_leaves
from jaxattr.scales import wide
from jaxattr.typing import Example, Key, OutputFn, Params


def project_gradients(
    plan: Plan, fitted: Fitted, gradients: Mapping[str, jax.Array]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Maps whole gradients of one example to what `Plan.assemble` takes; linear.

    Args:
      plan: which parameter becomes which features.
      fitted: what they are multiplied with, elementwise and from both sides.
      gradients: {leaf: of the leaf's shape}.

    Returns:
      {leaf of a linear map: [*stack, *inner]}, and {any other leaf: gradient}.
    """
    # A scale may be past the range of half precision, and its product within.
    scaled = {
        name: leaf.astype(wide(leaf.dtype)) * fitted.scales[name].astype(wide(leaf.dtype))
        if name in fitted.scales
        else leaf
        for name, leaf in gradients.items()
    }
    z = {}
    for factored in plan.factored:
        found = factored.map
        bias = scaled[str(found.bias)] if factored.bias else None
        matrix = linear_maps.matrix(found, scaled[found.leaf], bias).astype(factored.dtype)
        z[found.leaf] = apply_sides(matrix, fitted.sides[found.leaf])
    return z, {name: scaled[name] for name in plan.rest}


def coordinates(
    projection: Projection, plan: Plan, drawn: Drawn, fitted: Fitted
) -> Callable[[Mapping[str, jax.Array]], jax.Array]:
    """Makes the linear map from whole gradients of one example to its features.

    Args:
      projection: of the method's rule.
      plan: which parameter becomes which features.
      drawn: what is drawn for the checkpoint.
      fitted: what is fitted to it.

    Returns:
      {leaf: of the leaf's shape} -> [p].
    """
    fitted = fitted.with_sides(drawn)

    def to_features(gradients: Mapping[str, jax.Array]) -> jax.Array:
        z, rest = project_gradients(plan, fitted, gradients)
        z, rest = jax.tree.map(lambda x: x[None], (z, rest))
        return plan.assemble(projection, drawn, z, rest)[0]

    return to_features


def as_function_of(
    output: OutputFn, chosen: Collection[str], params: Params
) -> tuple[Callable[..., jax.Array], dict[str, jax.Array]]:
    """Makes the output a function of some leaves alone.

    Args:
      output: the function.
      chosen: names of leaves.
      params: the parameters; the other leaves stay as they are here.

    Returns:
      (leaves, example, key) -> output, and those leaves {name: leaf}.
    """
    leaves, structure = named_leaves(params), jax.tree.structure(params)

    def of_leaves(chosen: dict[str, jax.Array], example: Example, key: Key) -> jax.Array:
        merged = [chosen.get(name, leaf) for name, leaf in leaves.items()]
        return output(jax.tree.unflatten(structure, merged), example, key)

    return of_leaves, {name: leaf for name, leaf in leaves.items() if name in chosen}
