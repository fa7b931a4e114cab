"""Partitions of a parameter pytree into named groups, one learned weight each.

Li et al. (2025, arXiv:2506.05647, section 3) split the parameters "by layer or tensor". A layout is
plain data: every leaf is in exactly one group, or is excluded by name with a reason.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, overload

import jax
import jax.numpy as jnp

from jaxattr.leaves import leaf_names, named_leaves
from jaxattr.typing import Params


@dataclasses.dataclass(frozen=True)
class Member:
    """A leaf of a group, or one layer of a leaf that is stacked over layers.

    Attributes:
      leaf: the leaf's name.
      layer: index into an axis of the leaf, or None for the whole leaf.
      size: number of parameters.
      axis: the axis that numbers the layers.
    """

    leaf: str
    layer: int | None
    size: int
    axis: int = 0

    @property
    def name(self) -> str:
        """The leaf's name, with the layer in brackets where there is one."""
        return self.leaf if self.layer is None else f"{self.leaf}[{self.layer}]"


@dataclasses.dataclass(frozen=True)
class GroupLayout:
    """Which parameters belong to which group.

    Groups are sorted by name, as JAX orders the keys of a dict: leaf i of a weight pytree
    `{group: scalar}` is group i of every array with a group axis.

    Attributes:
      names: group names, sorted.
      members: the leaves (or layers of leaves) of each group, in the order of `names`.
      excluded: (leaf name, reason) of every leaf that is in no group.
    """

    names: tuple[str, ...]
    members: tuple[tuple[Member, ...], ...]
    excluded: tuple[tuple[str, str], ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of parameters per group."""
        return tuple(sum(member.size for member in group) for group in self.members)


Groups: TypeAlias = GroupLayout | Callable[[Params], Any] | Any
"""What `groups=` takes: a layout, a function of the parameters that returns a layout or labels, or
a pytree of labels with the structure of the parameters (as in `optax.multi_transform`)."""


@overload
def by_leaf(
    params: None = None, *, exclude: str | None = None, stacked: str | None = None
) -> Callable[[Params], GroupLayout]: ...


@overload
def by_leaf(
    params: Params, *, exclude: str | None = None, stacked: str | None = None
) -> GroupLayout: ...


def by_leaf(
    params: Params | None = None, *, exclude: str | None = None, stacked: str | None = None
) -> Any:
    """Makes each parameter array a group of its own.

    Args:
      params: a pytree of arrays. Without: returns the function of them, with the other arguments
        as they are here, for `groups=ja.by_leaf(exclude="embed")`.
      exclude: as in `by_layer`.
      stacked: as in `by_layer`.

    Returns:
      The layout.

    Raises:
      ValueError: if `exclude` or `stacked` is found in no name, or is no regular expression.
    """
    if params is None:
        return lambda params: by_leaf(params, exclude=exclude, stacked=stacked)
    return _by_name(params, lambda name: name, exclude, stacked)


@overload
def by_layer(
    params: None = None, *, exclude: str | None = None, stacked: str | None = None
) -> Callable[[Params], GroupLayout]: ...


@overload
def by_layer(
    params: Params, *, exclude: str | None = None, stacked: str | None = None
) -> GroupLayout: ...


def by_layer(
    params: Params | None = None, *, exclude: str | None = None, stacked: str | None = None
) -> Any:
    """Groups a module's own parameters together: kernel and bias, scale and bias.

    A leaf's group is its path without the last part; a leaf at the top is a group of its own.

    Args:
      params: a pytree of arrays. Without: returns the function of them, with the other arguments
        as they are here, for `groups=ja.by_layer(exclude="batch_stats")`. Given a function,
        `build_index` also splits matrices that the loss scans over by layer, where features have
        two sides (EK-FAC, LoGRA): `index.layout.names` are the groups. A layout it takes as it is.
      exclude: regular expression; leaves in whose names it is found are left out.
      stacked: regular expression; leaves in whose names it is found hold one layer per index of
        their leading axis (as `nn.scan` makes them), and each layer gets its own group.

    Returns:
      The layout.

    Raises:
      ValueError: if `exclude` or `stacked` is found in no name, or is no regular expression.

    Example:
      >>> import jax.numpy as jnp
      >>> dense = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
      >>> params = {"dense": dense, "scale": jnp.ones(1)}
      >>> by_layer(params).names
      ('dense', 'scale')
    """
    if params is None:
        return lambda params: by_layer(params, exclude=exclude, stacked=stacked)
    return _by_name(params, lambda name: name.rpartition("/")[0] or name, exclude, stacked)


@overload
def by_regex(
    params: Mapping[str, str], *, exclude: str | None = None, stacked: str | None = None
) -> Callable[[Params], GroupLayout]: ...


@overload
def by_regex(
    params: Params,
    patterns: Mapping[str, str],
    *,
    exclude: str | None = None,
    stacked: str | None = None,
) -> GroupLayout: ...


def by_regex(
    params: Params = None,
    patterns: Mapping[str, str] | None = None,
    *,
    exclude: str | None = None,
    stacked: str | None = None,
) -> Any:
    """Groups the leaves by regular expressions, searched for in their names.

    Args:
      params: a pytree of floating-point arrays. Patterns alone give the function of parameters, for
        `groups=ja.by_regex({"attention": "attn", "rest": "mlp|embed"})`.
      patterns: {group name: regular expression}.
      exclude: as in `by_layer`.
      stacked: as in `by_layer`.

    Returns:
      The layout.

    Raises:
      TypeError: if patterns are no mapping of names to patterns.
      ValueError: if a leaf matches no pattern or several, or a pattern no leaf; as `by_layer`.
    """
    given = params if patterns is None else patterns
    fits = isinstance(given, Mapping)
    if patterns is None:  # and not parameters whose patterns were forgotten
        fits = fits and all(isinstance(each, str | re.Pattern) for each in given.values())
    if not fits:
        raise TypeError(f"patterns must be {{group name: pattern}}, got {given!r:.80}.")
    if patterns is None or params is None:
        return lambda params: by_regex(params, given, exclude=exclude, stacked=stacked)
    for group, pattern in patterns.items():
        _check_pattern(f"{pattern!r} of group {group!r}", pattern, leaf_names(params))

    def label(name: str) -> str:
        matches = [group for group, pattern in patterns.items() if re.search(pattern, name)]
        if len(matches) != 1:
            found = f"matches {len(matches)} patterns: {matches}" if matches else "matches none"
            raise ValueError(
                f"Leaf {name!r} {found} of {dict(patterns)}. Every leaf needs exactly one group: "
                "change the patterns, or leave it out with exclude=."
            )
        return matches[0]

    return _by_name(params, label, exclude, stacked)


def resolve(groups: Groups, params: Params) -> GroupLayout:
    """Turns whatever a user passed as `groups` into a layout that fits `params`.

    Args:
      groups: a layout, a function of the parameters, or a pytree of labels (None: left out).
      params: the parameters that are grouped.

    Returns:
      The layout.

    Raises:
      TypeError: if groups are a string.
      ValueError: if parameters are not floating-point arrays (integers are left out), a leaf is in
        no group or in two, no leaf is in a group, or batch statistics are.
    """
    _check_parameters(params)
    if isinstance(groups, str | int | float):
        raise TypeError(
            f"groups must be a function such as ja.by_layer or ja.by_leaf, or a pytree of labels, "
            f"got {groups!r}. Of patterns: ja.by_regex({{group name: pattern}})."
        )
    labels = all(isinstance(leaf, str) for leaf in jax.tree.leaves(groups))  # of a model, say
    if callable(groups) and not labels and not isinstance(groups, GroupLayout):
        groups = groups(params)
    layout = groups if isinstance(groups, GroupLayout) else _by_labels(params, groups)
    _check_partition(layout, params)
    _check_statistics(layout, params)
    return layout


def split_layers(
    layout: GroupLayout, stacked: Mapping[str, int], axes: Mapping[str, int] | None = None
) -> GroupLayout:
    """Makes a group for each layer out of a group whose leaves are all stacked over layers.

    Args:
      layout: the groups.
      stacked: {leaf name: number of layers} of leaves of which an axis numbers layers.
      axes: {leaf name: that axis}, where it is not the first.

    Returns:
      The layout, in which group `name` has become `name[0]`, `name[1]`, ...
    """
    labelled: list[tuple[str, Member]] = []
    axes = axes or {}
    for name, members in zip(layout.names, layout.members, strict=True):
        counts = {stacked.get(m.leaf) if m.layer is None else None for m in members}
        layers = counts.pop() if len(counts) == 1 else None
        if layers is None:
            labelled += [(name, member) for member in members]
            continue
        labelled += [
            (f"{name}[{i}]", Member(m.leaf, i, m.size // layers, axes.get(m.leaf, 0)))
            for m in members
            for i in range(layers)
        ]
    return _collect(labelled, layout.excluded)


def leave_out(layout: GroupLayout, reasons: Mapping[str, str]) -> GroupLayout:
    """Takes leaves out of their groups.

    Args:
      layout: the groups.
      reasons: {leaf name: why it is in no group}.

    Returns:
      The layout without them; a group that has no other leaf is gone.

    Raises:
      ValueError: if no group is left.
    """
    labelled = [
        (name, member)
        for name, members in zip(layout.names, layout.members, strict=True)
        for member in members
        if member.leaf not in reasons
    ]
    grouped = {member.leaf for members in layout.members for member in members}
    taken = [(leaf, why) for leaf, why in reasons.items() if leaf in grouped]
    if not labelled:
        raise ValueError(f"No parameter is in a group: {dict(taken)}.")
    return _collect(labelled, (*layout.excluded, *taken))


def _by_name(
    params: Params, label: Callable[[str], str | None], exclude: str | None, stacked: str | None
) -> GroupLayout:
    if isinstance(params, str):
        raise TypeError(f"params must be a pytree of arrays, got {params!r}; is it exclude=?")
    leaves = named_leaves(params)
    for role, pattern in (("exclude", exclude), ("stacked", stacked)):
        if pattern is not None:
            _check_pattern(f"{role}={pattern!r}", pattern, leaves)
    labelled: list[tuple[str, Member]] = []
    excluded = []
    for name, leaf in leaves.items():
        if exclude is not None and re.search(exclude, name):
            excluded.append((name, f"excluded by {exclude!r}"))
        elif _is_whole(leaf):
            excluded.append((name, f"{leaf.dtype} has no gradient"))
        elif stacked is not None and re.search(stacked, name):
            labelled += [(f"{label(name)}[{m.layer}]", m) for m in _layers(name, jnp.shape(leaf))]
        elif (group := label(name)) is None:
            excluded.append((name, "labelled None"))
        else:
            labelled.append((group, Member(name, None, math.prod(jnp.shape(leaf)))))
    return _collect(labelled, excluded)


def _check_pattern(what: str, pattern: Any, names: Iterable[str]) -> None:
    """Refuses what is no regular expression, and one that is found in no name."""
    if not isinstance(pattern, str | re.Pattern):
        raise TypeError(
            f"Needed one regular expression, got {what}. Several are joined by |: 'norm|bias'."
        )
    try:
        found = any(re.search(pattern, name) for name in names)
    except re.error as error:
        raise ValueError(f"{what} is no regular expression: {error}. Any text is .*") from None
    if not found:
        raise ValueError(
            f"{what} is found in no parameter's name, so that it does nothing. Upper and lower "
            f"case differ. The first names: {', '.join([*names][:5])}."
        )


def _layers(name: str, shape: tuple[int, ...]) -> list[Member]:
    if not shape:
        raise ValueError(f"Leaf {name!r} is a scalar and cannot be stacked over layers.")
    return [Member(name, layer, math.prod(shape[1:])) for layer in range(shape[0])]


def _by_labels(params: Params, labels: Any) -> GroupLayout:
    found = named_leaves(labels, is_leaf=lambda node: node is None)
    leaves = named_leaves(params)
    for above in [name for name, label in found.items() if label is None and name not in leaves]:
        below = [name for name in leaves if name.startswith(f"{above}/")]
        if below:  # None for a whole part of the tree
            del found[above]
            found |= dict.fromkeys(below)
    if found.keys() != leaves.keys():
        raise ValueError(
            "The labels must have the tree structure of the parameters, one string per leaf (None "
            f"leaves it out). Without a label: {sorted(leaves.keys() - found.keys())}; labels of "
            f"no leaf: {sorted(found.keys() - leaves.keys())}."
        )

    def label(name: str) -> str | None:
        if not isinstance(found[name], str | None):
            raise ValueError(
                f"The label of leaf {name!r} must be a string or None, got {found[name]!r}."
            )
        return found[name]

    return _by_name(params, label, None, None)


def _collect(
    labelled: Iterable[tuple[str, Member]], excluded: Iterable[tuple[str, str]]
) -> GroupLayout:
    members: dict[str, list[Member]] = {}
    for group, member in labelled:
        members.setdefault(group, []).append(member)
    names = tuple(sorted(members))
    return GroupLayout(names, tuple(tuple(members[name]) for name in names), tuple(excluded))


def batch_statistics(layout: GroupLayout, params: Params) -> list[str]:
    """Names of the running statistics of batch norm, of linen or nnx, that are in a group.

    What nnx saved and Orbax restored without a target, dicts of one value, is told by its names: a
    mean and a var beside a scale or a bias.
    """
    nnx = sys.modules.get("flax.nnx")

    def is_one(node: Any) -> bool:
        return nnx is not None and isinstance(node, nnx.BatchStat)

    grouped = {member.leaf for group in layout.members for member in group}
    leaves = named_leaves(params, is_one)
    of_nnx = [name for name, leaf in leaves.items() if is_one(leaf) and name in grouped]
    siblings: dict[str, set[str]] = {}
    for name in leaves:
        place, _, variable = name.removesuffix("/value").rpartition("/")
        if name.endswith("/value"):
            siblings.setdefault(place, set()).add(variable)
    norms = [place for place, names in siblings.items() if _is_batch_norm(names)]
    restored = {f"{place}/{each}/value".lstrip("/") for place in norms for each in _STATISTICS}
    of_linen = {name for name in grouped if name.startswith("batch_stats/")}
    return sorted(of_linen | (restored & grouped) | set(of_nnx))


_STATISTICS = {"mean", "var"}


def _is_batch_norm(names: set[str]) -> bool:
    return _STATISTICS < names <= _STATISTICS | {"scale", "bias"}


def pattern_of(chosen: Sequence[str], names: Sequence[str]) -> str:
    """Returns a regular expression for some leaves and no others, as short as that can be.

    Args:
      chosen: names of the leaves.
      names: of all leaves.
    """
    heads = {name.partition("/")[0] for name in chosen}
    if not any(name.partition("/")[0] in heads for name in {*names} - {*chosen}):
        return "|".join(sorted(heads))
    return f"^({'|'.join(map(re.escape, chosen))})$"


def _is_whole(leaf: Any) -> bool:
    """Whether a leaf holds whole numbers, such as a counter; it is no parameter that is trained."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and (
        jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)
    )


def _check_statistics(layout: GroupLayout, params: Params) -> None:
    """Refuses a group of running statistics."""
    inside = batch_statistics(layout, params)
    if inside:
        exclude = pattern_of(inside, leaf_names(params))
        raise ValueError(
            f"The parameters hold batch statistics, {len(inside)} arrays ({inside[0]}, ...), which "
            "training does not move along a gradient. Exclude them: "
            f"groups=ja.by_layer(exclude={exclude!r})."
        )


def _check_parameters(params: Params) -> None:
    leaves = jax.tree.leaves(params)
    if all(_is_whole(leaf) for leaf in leaves):
        got = "only whole numbers" if leaves else "an empty pytree"
        raise ValueError(f"The parameters hold no floating-point arrays: got {got}.")
    for name, leaf in named_leaves(params).items():
        dtype = getattr(leaf, "dtype", None)
        if _is_whole(leaf):
            continue
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            got = f"dtype {dtype}" if dtype is not None else type(leaf).__name__
            raise ValueError(
                f"Parameter {name!r} must be a floating-point array, got {got}. Keep keys, "
                "functions and settings out of the parameters and let the loss close over them: "
                "nnx.split(model, nnx.Param, ...), eqx.partition(model, eqx.is_inexact_array). "
                "Make arrays of lists of numbers: jnp.asarray(values)."
            )


def _check_partition(layout: GroupLayout, params: Params) -> None:
    if not layout.names:
        raise ValueError("No parameter is in a group: every leaf is excluded.")
    shapes = {name: jnp.shape(leaf) for name, leaf in named_leaves(params).items()}
    seen: dict[str, int] = {}
    for member in (member for group in layout.members for member in group):
        if member.leaf not in shapes:
            raise ValueError(f"The groups name a leaf {member.leaf!r} that the parameters lack.")
        seen[member.leaf] = seen.get(member.leaf, 0) + member.size
    for name, shape in shapes.items():
        excluded = any(leaf == name for leaf, _ in layout.excluded)
        needed = 0 if excluded else math.prod(shape)
        if seen.get(name, 0) != needed:
            raise ValueError(
                f"Leaf {name!r} has {math.prod(shape)} parameters, of which the groups hold "
                f"{seen.get(name, 0)}{' although it is excluded' if excluded else ''}. Every leaf "
                "belongs to exactly one group or is excluded."
            )
