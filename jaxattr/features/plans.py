"""Which parameter becomes which features: decided once, from the groups and the linear maps."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.features.bases import UNKNOWN, Basis, Drawn, Factored
from jaxattr.features.projections import Projection
from jaxattr.features.random_maps import project_groups
from jaxattr.groups import GroupLayout, Member
from jaxattr.linear_maps import STOPPED, UNUSED, LinearMap, LinearMaps
from jaxattr.scales import wide, widest
from jaxattr.typing import Features


@dataclasses.dataclass(frozen=True)
class FeatureLayout:
    """Which columns of the features belong to which group.

    Attributes:
      names: group names, sorted.
      sizes: parameters per group.
      dims: features per group.
      blocks: (number of a block, columns) of consecutive columns; the features of one matrix, or
        of the leftover parameters of one group, are a block. Empty: each group is one.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    dims: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...] = ()

    @property
    def total(self) -> int:
        """Number of features p."""
        return sum(self.dims)

    @property
    def slices(self) -> dict[str, slice]:
        """The columns of each group."""
        edges = itertools.pairwise(np.cumsum([0, *self.dims]).tolist())
        return dict(zip(self.names, itertools.starmap(slice, edges), strict=True))

    @property
    def column_blocks(self) -> np.ndarray:
        """The number of the block of each column, int [p]."""
        blocks = self.blocks or tuple(enumerate(self.dims))
        numbers, widths = zip(*blocks, strict=True)
        return np.repeat(numbers, widths)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A rectangle of the features [r, r'] of a linear map, or of one layer of a stacked one.

    Attributes:
      leaf: the map's leaf.
      layer: index into the stack, or None if there is none.
      rows: first and last-plus-one row.
      columns: first and last-plus-one column.
    """

    leaf: str
    layer: int | None
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def size(self) -> int:
        """Number of features."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])

    def of(self, z: Any) -> Any:
        """Cuts it out of [b, r, r'] or [b, stack, r, r'], flat: [b, size]."""
        z = z if self.layer is None else z[:, self.layer]
        return z[:, slice(*self.rows), slice(*self.columns)].reshape(z.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class PlannedGroup:
    """How the features of a group are put together.

    Attributes:
      name: of the group.
      size: number of parameters.
      pieces: of linear maps, that come first.
      rest: parameters whose gradient is taken exactly and projected, all together.
      rest_dim: features of the rest.
    """

    name: str
    size: int
    pieces: tuple[Piece, ...]
    rest: tuple[Member, ...]
    rest_dim: int

    @property
    def dim(self) -> int:
        """Number of features."""
        return sum(piece.size for piece in self.pieces) + self.rest_dim


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which parameter becomes which features.

    Attributes:
      groups: in the order of the features.
      factored: the linear maps whose features are taken from both sides.
      reasons: (leaf, why it is not one of them), where linear maps were looked for.
      formed: those of the linear maps, by leaf, whose gradient is formed and then multiplied from
        both sides, since the output at hand uses them in another way.
      unused: those that the output at hand does not use, whose features are zero.
    """

    groups: tuple[PlannedGroup, ...]
    factored: tuple[Factored, ...]
    reasons: tuple[tuple[str, str], ...]
    formed: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()

    @property
    def layout(self) -> FeatureLayout:
        """The columns of the features."""
        numbers: dict[Any, int] = {}
        blocks = []
        for group in self.groups:
            for piece in group.pieces:
                number = numbers.setdefault((piece.leaf, piece.layer), len(numbers))
                blocks.append((number, piece.size))
            if group.rest:
                blocks.append((numbers.setdefault(group.name, len(numbers)), group.rest_dim))
        return FeatureLayout(
            tuple(group.name for group in self.groups),
            tuple(group.size for group in self.groups),
            tuple(group.dim for group in self.groups),
            tuple(blocks),
        )

    @property
    def covered(self) -> frozenset[str]:
        """Leaves whose features are taken from both sides, biases among them."""
        leaves = {factored.map.leaf for factored in self.factored}
        return frozenset(leaves | {str(f.map.bias) for f in self.factored if f.bias})

    @property
    def rest(self) -> frozenset[str]:
        """Leaves whose gradient is taken exactly."""
        return frozenset(member.leaf for group in self.groups for member in group.rest)

    @property
    def rest_sizes(self) -> dict[str, dict[str, int]]:
        """{group: {name of a leaf whose gradient is taken exactly: its size}}."""
        return {
            group.name: {member.name: member.size for member in group.rest}
            for group in self.groups
            if group.rest
        }

    def for_output(self, found: LinearMaps) -> "Plan":
        """Returns the plan for an output other than the one that it was made for.

        Args:
          found: the linear maps of that output.
        """
        still = {leaf for leaf, why in found.exact.items() if why in (STOPPED, UNUSED)}
        formed, unused = set(), set()
        for factored in self.factored:
            leaf = factored.map.leaf
            if {leaf, *([factored.map.bias] if factored.bias else [])} <= still:
                unused.add(leaf)
            elif not _is_same(factored, found.maps.get(leaf)):
                formed.add(leaf)
        return dataclasses.replace(self, formed=frozenset(formed), unused=frozenset(unused))

    def scatter(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Lays values of linear maps out as the features are.

        Args:
          values: {leaf: [r, r'], or [stack, r, r']}.

        Returns:
          Float [p], `UNKNOWN` where no value is given.
        """
        columns = []
        for group in self.groups:
            for piece in group.pieces:
                known = values.get(piece.leaf)
                unknown = np.full(piece.size, UNKNOWN)
                columns.append(unknown if known is None else piece.of(known[None])[0])
            columns.append(np.full(group.rest_dim, UNKNOWN))
        return np.concatenate(columns)

    def assemble(
        self,
        projection: Projection,
        drawn: Drawn,
        z: Mapping[str, jax.Array],
        rest: Mapping[str, jax.Array],
    ) -> Features:
        """Puts features together; linear in `z` and `rest`.

        Args:
          projection: of all.
          drawn: what it drew.
          z: {leaf of a linear map: [b, *stack, *inner]}.
          rest: {leaf: gradients [b, *shape]}.

        Returns:
          Float [b, p], float32 or wider.
        """
        members = {
            group.name: {member.name: _wide(_flat(member, rest)) for member in group.rest}
            for group in self.groups
            if group.rest
        }
        projected = project_groups(projection, drawn.rest, members)
        if projection.basis is not None:
            z = projection.basis.mix(drawn.mixing, self.factored, z)
        columns = []
        for group in self.groups:
            columns += [_wide(piece.of(z[piece.leaf])) for piece in group.pieces]
            if group.rest:
                columns.append(projected[group.name])
        dtype = widest(*(column.dtype for column in columns))
        return jnp.concatenate([column.astype(dtype) for column in columns], axis=1)  # [b, p]


def make_plan(groups: GroupLayout, projection: Projection, found: LinearMaps | None) -> Plan:
    """Decides what becomes of each parameter.

    Args:
      groups: which parameters belong to which group.
      projection: how gradients are projected.
      found: the linear maps of the output function; None if the projection has no use for them.

    Returns:
      The plan.
    """
    basis, bands = projection.basis, 1
    factored: dict[str, Factored] = {}
    reasons: dict[str, str] = {}
    if basis is not None and found is not None:
        (factored, reasons), bands = _factored(groups, basis, found), basis.bands
    planned = []
    for name, members in zip(groups.names, groups.members, strict=True):
        planned += _banded(projection, bands, factored, name, members)
    return Plan(
        tuple(sorted(planned, key=lambda group: group.name)),
        tuple(factored.values()),
        tuple(sorted(reasons.items())),
    )


def _factored(
    groups: GroupLayout, basis: Basis, found: LinearMaps
) -> tuple[dict[str, Factored], dict[str, str]]:
    """The linear maps that the groups leave whole, and why each other leaf is none."""
    places: dict[str, set[tuple[str, int | None]]] = {}
    axes: dict[str, int] = {}  # that the groups split
    for name, members in zip(groups.names, groups.members, strict=True):
        for member in members:
            places.setdefault(member.leaf, set()).add((name, member.layer))
            if member.layer is not None:
                axes[member.leaf] = member.axis
    reasons = {leaf: why for leaf, why in found.exact.items() if leaf in places}
    factored = {}
    for leaf, linear_map in found.maps.items():
        if leaf not in places:
            continue
        if not linear_map.size_in * linear_map.size_out:
            reasons[leaf] = "it has no entries"
            continue
        if leaf in axes and linear_map.stack_axes != (axes[leaf],):
            reasons[leaf] = "its groups split an axis that does not number its layers"
            continue
        bias = linear_map.bias is not None and places.get(linear_map.bias) == places[leaf]
        sizes = linear_map.size_in + bias, linear_map.size_out
        left, right = (basis.side(size) for size in sizes)
        inner = basis.inner(sizes[0]), basis.inner(sizes[1])
        factored[leaf] = Factored(linear_map, bias, left, right, inner)
        if linear_map.bias in places and not bias:
            reasons[str(linear_map.bias)] = f"the bias of {leaf}, which is in another group"
    for leaf, linear_map in found.maps.items():
        if linear_map.bias in places and leaf not in factored:
            reasons[str(linear_map.bias)] = f"the bias of {leaf}, which is not covered"
    return factored, reasons


def _banded(
    projection: Projection,
    bands: int,
    factored: Mapping[str, Factored],
    name: str,
    members: tuple[Member, ...],
) -> list[PlannedGroup]:
    """The groups that a group becomes: itself, or one per band of its maps and one for the rest."""
    biases = {f.map.bias for f in factored.values() if f.bias}
    rest = tuple(m for m in members if m.leaf not in factored and m.leaf not in biases)
    dim = projection.dim(sum(member.size for member in rest)) if rest else 0
    cut: dict[str, list[Piece]] = {}
    for member in members:
        if member.leaf in factored:
            for band, piece in _pieces(member, factored[member.leaf], bands):
                cut.setdefault(band, []).append(piece)
    if bands == 1 or not cut:
        pieces = tuple(itertools.chain(*cut.values()))
        return [PlannedGroup(name, sum(member.size for member in members), pieces, rest, dim)]
    planned = [
        PlannedGroup(f"{name}[{band}]", sum(piece.size for piece in pieces), tuple(pieces), (), 0)
        for band, pieces in cut.items()
    ]
    if rest:
        size = sum(member.size for member in rest)
        planned.append(PlannedGroup(f"{name}[rest]", size, (), rest, dim))
    return planned


def _pieces(member: Member, factored: Factored, bands: int) -> list[tuple[str, Piece]]:
    """The pieces of a member, each with the name of its band."""
    layers: list[int | None] = [member.layer]
    if member.layer is None and factored.map.stack is not None:
        layers = list(range(factored.map.stack))
    rows, columns = (_cuts(size, bands) for size in (factored.left, factored.right))
    return [
        (f"{i},{j}", Piece(member.leaf, layer, row, column))
        for layer in layers
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]


def _cuts(size: int, bands: int) -> list[tuple[int, int]]:
    edges = [round(size * i / bands) for i in range(bands + 1)]
    return [(a, b) for a, b in itertools.pairwise(edges) if a < b]


def _is_same(factored: Factored, other: LinearMap | None) -> bool:
    """Whether an output multiplies by the same matrix, and adds the same bias."""
    if other is None:
        return False
    names = ["in_axes", "out_axes", "stack_axes"]
    names += ["bias", "bias_stack_axes"] if factored.bias else []
    return all(getattr(factored.map, name) == getattr(other, name) for name in names)


def _flat(member: Member, leaves: Mapping[str, jax.Array]) -> jax.Array:
    leaf = leaves[member.leaf]
    if member.layer is not None:
        leaf = jnp.take(leaf, member.layer, axis=1 + member.axis)
    return leaf.reshape(leaf.shape[0], -1)  # [b, size]


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(wide(x.dtype))
