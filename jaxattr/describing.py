"""Which parameter goes which way: nothing is skipped without a word."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxattr import groups as groups_lib
from jaxattr.groups import Groups
from jaxattr.methods import Method, featurizer
from jaxattr.typing import Example, Params


@dataclasses.dataclass(frozen=True)
class LeafDescription:
    """What becomes of one parameter leaf.

    Attributes:
      name: the leaf's name.
      shape: its shape.
      groups: the groups that it belongs to; several if it is stacked over layers.
      route: "exact", "projected ..." or "excluded: ...".
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
    """

    method: str
    kernel: str
    leaves: tuple[LeafDescription, ...]
    features: int
    covered: float

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
            f"{self.covered:.1%} of the parameters covered"
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
    featurize = featurizer(method, params, example, groups=groups)
    layout = featurize.groups
    routes: dict[str, list[tuple[str, str]]] = {}
    for group, members, size, dim in zip(
        layout.names, layout.members, layout.sizes, featurize.layout.dims, strict=True
    ):
        kept = f"projected, {method.rule.projection.name}: group {size} -> {dim}"
        route = "exact" if dim == size else kept
        for member in members:
            routes.setdefault(member.leaf, []).append((group, route))
    excluded = dict(layout.excluded)
    leaves = []
    for name, leaf in zip(groups_lib.leaf_names(params), jax.tree.leaves(params), strict=True):
        found = routes.get(name, [])
        route = found[0][1] if found else f"excluded: {excluded[name]}"
        leaves.append(LeafDescription(name, jnp.shape(leaf), tuple(g for g, _ in found), route))
    total = sum(math.prod(leaf.shape) for leaf in leaves)
    return Description(
        method=method.name,
        kernel=method.kernel.name,
        leaves=tuple(leaves),
        features=featurize.layout.total,
        covered=sum(layout.sizes) / total,
    )
