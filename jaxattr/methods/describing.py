"""Which parameter goes which way: nothing is skipped without a word."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxattr import groups as groups_lib
from jaxattr.features.featurizer import Featurizer
from jaxattr.groups import Groups
from jaxattr.identity import program_of
from jaxattr.inputs.outputs import runs
from jaxattr.inputs.traces import read_inputs, shapes_of
from jaxattr.keys import key_or_default
from jaxattr.leaves import leaf_names
from jaxattr.linear_maps.analysis import UNUSED
from jaxattr.methods.method import Method, check_method, featurizer
from jaxattr.typing import Example, Params


@dataclasses.dataclass(frozen=True)
class LeafDescription:
    """What becomes of one parameter leaf.

    Attributes:
      name: the leaf's name.
      shape: its shape.
      groups: the groups that it belongs to; several if it is stacked over layers.
      route: "factored: ..." for a linear map whose gradient is projected from both sides and not
        formed, "exact: ..." or "projected: ..." for others, or "excluded: ...".
    """

    name: str
    shape: tuple[int, ...]
    groups: tuple[str, ...]
    route: str


@dataclasses.dataclass(frozen=True)
class Description:
    """What a method does to a model's parameters. Print it.

    Attributes:
      method: the method's name.
      kernel: the kernel's name.
      leaves: one entry per parameter leaf.
      features: number of features per example and checkpoint.
      covered: share of the parameters that is in a group.
      factored: share of the parameters whose gradient is not formed.
    """

    method: str
    kernel: str
    leaves: tuple[LeafDescription, ...]
    features: int
    covered: float
    factored: float

    def __str__(self) -> str:
        rows = [("leaf", "shape", "group", "route")]
        for leaf in self.leaves:
            shape = "x".join(map(str, leaf.shape)) or "scalar"
            shown = leaf.groups[0] if leaf.groups else "-"
            more = f" ... ({len(leaf.groups)} groups)" if len(leaf.groups) > 1 else ""
            rows.append((leaf.name, shape, shown + more, leaf.route))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        head = (
            f"{self.method}: kernel {self.kernel}; {self.features} features per example; "
            f"{self.covered:.1%} of the parameters covered, factored {self.factored:.1%}"
        )
        return "\n".join([head, *table])


def describe(
    method: Method, params: Params, example: Example, *, groups: Groups = groups_lib.by_layer
) -> Description:
    """Says for every parameter leaf which group it is in and how it enters the features.

    Args:
      method: the attribution method.
      params: parameters, or their shapes.
      example: ONE example, without a batch axis, or its shapes.
      groups: as in `build_index`.

    Returns:
      A description; `print` shows it as a table.

    Raises:
      ValueError: as `featurizer`.
    """
    output = check_method(method).rule.output
    if isinstance(params, list) and params and not runs(output, params, example):
        if runs(output, params[0], example):
            raise TypeError(
                f"params is a list of {len(params)}: describe takes the parameters of ONE "
                "checkpoint, as groups and routes are the same for all. Pass the first."
            )
    featurize = featurizer(method, params, example, groups=groups)
    plan, sizes = featurize.plan, featurize.groups.sizes
    places: dict[str, list[str]] = {}
    for name, members in zip(featurize.groups.names, featurize.groups.members, strict=True):
        for member in members:
            places.setdefault(member.leaf, []).append(name)
    routes = _routes(featurize) | _unused(featurize, params)
    leaves = tuple(
        LeafDescription(name, jnp.shape(leaf), tuple(places.get(name, ())), routes[name])
        for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True)
    )
    total = sum(math.prod(leaf.shape) for leaf in leaves)
    not_formed = frozenset() if _formed(featurize) else plan.covered
    return Description(
        method=method.name,
        kernel=method.kernel.name,
        leaves=leaves,
        features=featurize.layout.total,
        covered=sum(sizes) / total,
        factored=sum(math.prod(leaf.shape) for leaf in leaves if leaf.name in not_formed) / total,
    )


def _routes(featurize: Featurizer) -> dict[str, str]:
    """What becomes of each leaf, in words."""
    plan, projection = featurize.plan, featurize.rule.projection
    excluded = featurize.groups.excluded
    routes = {leaf: f"excluded: {why.removeprefix('excluded ')}" for leaf, why in excluded}
    reasons, basis = dict(plan.reasons), projection.basis
    rest = projection.name if basis is None else f"rademacher({projection.dim(1 << 62)})"
    for group in plan.groups:
        size = sum(member.size for member in group.rest)
        kept = size == group.rest_dim
        projected = f"projected, {rest}: group {size} -> {group.rest_dim}"
        route = "exact" if kept else projected
        for member in group.rest:
            why = reasons.get(member.leaf)
            routes[member.leaf] = route if why is None else f"{route}: {why}"
    for factored in plan.factored:
        found = factored.map
        stack = "" if found.stack is None else f"{found.stack} layers of "
        route = (
            f"{'formed, then' if _formed(featurize) else 'factored'}: {stack}{found.kind} "
            f"{factored.rows}x{found.size_out} -> {factored.left}x{factored.right}"
        )
        rank = None if basis is None else basis.rank
        whole = (factored.left == factored.rows) + (factored.right == found.size_out)
        if rank is not None and whole:
            route += f" (rank {rank}: {'whole' if whole == 2 else 'one side whole'})"
        if found.uses > 1:
            route += f", used {found.uses} times"
        routes[found.leaf] = route
        if factored.bias:
            routes[str(found.bias)] = f"bias of {found.leaf}"
    return routes


def _unused(featurize: Featurizer, params: Params) -> dict[str, str]:
    """Leaves that are in a group, and that the function does not read."""
    given = shapes_of((params, featurize.example, key_or_default(None)))
    names = leaf_names(params)
    read = read_inputs(program_of(featurize.rule.output, given).jaxpr)
    excluded = dict(featurize.groups.excluded)
    zero = f"exact: {UNUSED}, so its gradient is zero"
    return {
        name: zero
        for name, is_read in zip(names, read, strict=False)
        if not is_read and name not in excluded
    }


def _formed(featurize: Featurizer) -> bool:
    basis = featurize.rule.projection.basis
    return basis is None or basis.materialize
