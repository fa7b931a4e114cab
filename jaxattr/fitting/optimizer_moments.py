"""An optimizer's second moments, and the basis that scales gradients by them (TrackStar)."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr import linear_maps
from jaxattr.features.bases import Factored, Fitted, Sides, Signs
from jaxattr.features.signs import seed_of
from jaxattr.fitting.passes import TrainingPass
from jaxattr.groups import GroupLayout
from jaxattr.identity import Contents
from jaxattr.inputs.arrays import shapes_and_tree
from jaxattr.leaves import named_leaves
from jaxattr.scales import wide
from jaxattr.typing import Params


def second_moments(optimizer_state: Any, params: Params) -> Params:
    """Finds the running mean of squared gradients in an Optax state.

    Knows Adam and its kin (`nu`), AMSGrad (`nu_max`), RMSProp (`nu`) and Adafactor (`v_row`,
    `v_col`, `v`), wherever they stand in a chain, each for all parameters or, under `masked` and
    `multi_transform`, for some. Adam's bias correction, one factor for all parameters, is left out;
    AdaBelief's variance is taken as it is. Adamax has a norm of gradients in a state like Adam's,
    which cannot be told apart: pass its squares. Whole numbers among the parameters, and batch
    statistics of linen's variables, are not trained and need no second moments.

    Args:
      optimizer_state: what `optimizer.init` or `optimizer.update` returned; or second moments, a
        pytree like the parameters, which are returned.
      params: the parameters that it belongs to.

    Returns:
      A pytree like the parameters: zeros for whole numbers and batch statistics, and a single NaN
      for what the optimizer has no second moments of (`optax.masked`, `multi_transform`), which
      must be excluded from the groups.

    Raises:
      ValueError: if no parameter has a second moment in the state, or one has two; if they are
        negative or not finite, or all zero. The error names them.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.ones(2)}
      >>> optimizer = optax.chain(optax.clip(1.0), optax.adamw(1e-3))
      >>> _, state = optimizer.update({"w": jnp.array([1.0, 2.0])}, optimizer.init(params), params)
      >>> print(second_moments(state, params)["w"].round(4))
      [0.001 0.001]
    """
    leaves = named_leaves(params)
    needed = {name for name, leaf in leaves.items() if _is_trained(name, leaf)}
    if shapes_and_tree(optimizer_state) == shapes_and_tree(params):
        _check({n: x for n, x in named_leaves(optimizer_state).items() if n in needed})
        return optimizer_state
    shapes = {name: jnp.shape(x) for name, x in leaves.items()}
    # An optimizer of linen's parameters alone does not know that they stand under "params".
    known = shapes | {name.removeprefix(_PARAMS): shape for name, shape in shapes.items()}
    each = [pair for node in _nodes(optimizer_state) for pair in _moments(node, known).items()]
    found, counts = dict(each), collections.Counter(name for name, _ in each)
    repeated = sorted(name for name, count in counts.items() if count > 1)
    given = _as_in(needed, named_leaves(optimizer_state))
    found = given if given.keys() == needed else _as_in(needed, found)
    missing = sorted(needed - found.keys())
    wrong = sorted(n for n, x in found.items() if shapes.get(n) != jnp.shape(x))
    if len(missing) == len(needed) or wrong or repeated:
        raise ValueError(
            f"Needed one second moment for each of {len(needed)} parameters. Missing: "
            f"{missing[:5]}; of other names or shapes: {wrong[:5]}; found twice: "
            f"{repeated[:5]}. The state holds {sorted(_kinds(optimizer_state))}: Adam, "
            "AdamW, NAdam, AMSGrad, RMSProp and Adafactor have second moments; SGD, Lion and "
            "momentum have none. You may pass a pytree of second moments like the parameters "
            "instead; several checkpoints go in as a list, [state] where params are a list too."
        )
    _check(found)
    found |= dict.fromkeys(missing, _UNKNOWN)
    moments = [found[n] if n in found else jnp.zeros(shape) for n, shape in shapes.items()]
    return jax.tree.unflatten(jax.tree.structure(params), moments)


def states_of(given: Any) -> list[Any]:
    """One optimizer's state per checkpoint.

    Orbax restores the tuple of a chain as a list, of which some links hold no second moments.

    Args:
      given: a state, or a list of them.

    Returns:
      A list of states.
    """
    if not isinstance(given, list):
        return [given]
    hold = [any(map(_has_second_moments, _nodes(each))) for each in given]
    return [given] if any(hold) and not all(hold) else given


_PARAMS, _STATISTICS = "params/", "batch_stats/"
_UNKNOWN: Any = np.float32(np.nan)


def _is_trained(name: str, leaf: Any) -> bool:
    return not name.startswith(_STATISTICS) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _as_in(needed: set[str], found: dict[str, Any]) -> dict[str, Any]:
    """Moments by the names of the parameters, if those alone have a "params" in front."""
    renamed = {_PARAMS + name: x for name, x in found.items()}
    return renamed if needed.isdisjoint(found) and not needed.isdisjoint(renamed) else found


@jax.jit
def _moments_and_any(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.all((x >= 0) & jnp.isfinite(x)), jnp.any(x != 0)


def _check(moments: Mapping[str, Any]) -> None:
    each = {name: _moments_and_any(leaf) for name, leaf in moments.items()}
    wrong = [name for name, (good, _) in each.items() if not good]
    if wrong:
        raise ValueError(
            f"Second moments are finite and not negative, and those of {wrong[:5]} are not: is "
            "this the first moment (mu), the parameters, or a run that diverged? Pass the state of "
            "the optimizer as it is, or its nu."
        )
    if each and not any(some for _, some in each.values()):
        raise ValueError(
            "All second moments are zero, as before the first step of training: pass the state "
            "that training ended with."
        )


def _moments(node: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """Second moments in one node of a state, by the name of the parameter.

    Parameters that `optax.masked` or `multi_transform` keeps from the node are not in it.
    """
    if not _has_second_moments(node):
        return {}
    fields = node if isinstance(node, Mapping) else node._asdict()
    if "v_row" in fields:
        rows, columns, wholes = (named_leaves(fields[name]) for name in ("v_row", "v_col", "v"))
        return {
            name: _restored(shapes[name], rows[name], columns[name], wholes[name])
            for name in wholes
            if name in shapes
        }
    return named_leaves(fields.get("nu_max", fields["nu"]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledSigns(Signs):
    r"""Random signs on gradients that are divided by the root of second moments.

    .. math:: \phi = A^\top (\nabla_W \ell \,/\, (\sqrt{V} + \epsilon)) B

    Unless gradients are formed (`materialize`), the V of a linear map is replaced by the product of
    its row and column means, over its mean, as Adafactor stores it: exact where V is of rank one.

    Attributes:
      moments: V, one pytree like the parameters per checkpoint.
      epsilon: added to the roots.
    """

    moments: tuple[Contents, ...]
    epsilon: float

    @property
    def name(self) -> str:
        """See `Basis`."""
        of_rank_one = "" if self.materialize else " of rank one"
        return f"two-sided random signs over second moments{of_rank_one}"

    def fit(self, over: TrainingPass) -> Fitted:
        """See `Fits`; looks at no data."""
        named = self._moments_of(over)
        plan = over.featurizer.plan
        roots = {name: jnp.sqrt(v.astype(wide(v.dtype))) for name, v in named.items()}
        scales = {name: 1 / (root + self.epsilon) for name, root in roots.items()}
        if self.materialize:
            kept = plan.rest | plan.covered
            return Fitted({}, {name: scales[name] for name in kept}, None, {})
        drawn = self.draw(seed_of(over.featurizer.key, over.number), plan.factored)
        sides = {
            f.map.leaf: _scaled(f, drawn[f.map.leaf], named, self.epsilon) for f in plan.factored
        }
        return Fitted(sides, {name: scales[name] for name in plan.rest}, None, {})

    @property
    def checkpoints(self) -> int:
        """How many checkpoints there must be."""
        return len(self.moments)

    def check(self, groups: GroupLayout) -> None:
        """See `Basis`."""
        for given in self.moments:
            used = _used(given.value, groups)
            unknown = [name for name, x in used.items() if np.ndim(x) == 0 and np.isnan(x)]
            if unknown:
                raise ValueError(
                    f"The optimizer has no second moments of {unknown[:5]}, {len(unknown)} of "
                    f"{len(used)} parameters: it does not train them, or by a rule without "
                    "(Muon's, SGD). Leave them out: groups=ja.by_layer(exclude=...), a pattern of "
                    "their names; or make the method of a loss of the others alone."
                )

    def _moments_of(self, over: TrainingPass) -> dict[str, Any]:
        groups = over.featurizer.groups
        given = _used(self.moments[over.number].value, groups)
        got, needed = (
            {n: jnp.shape(x) for n, x in of.items()} for of in (given, _used(over.params, groups))
        )
        if got != needed:
            raise ValueError(
                f"The second moments of checkpoint {over.number} do not fit its parameters: got "
                f"{got}, needed {needed}."
            )
        return given


def _used(tree: Params, groups: GroupLayout) -> dict[str, Any]:
    """The leaves that are in a group."""
    excluded = dict(groups.excluded)
    return {name: x for name, x in named_leaves(tree).items() if name not in excluded}


def _scaled(factored: Factored, sides: Sides, named: dict[str, Any], epsilon: float) -> Sides:
    """A and B with the rows multiplied by the roots of the two factors of 1 / V."""
    found = factored.map
    bias = named[str(found.bias)] if factored.bias else None
    v = linear_maps.matrix(found, named[found.leaf], bias).astype(factored.dtype)
    v = v + epsilon**2
    rows, columns = v.mean(axis=-1), v.mean(axis=-2)
    # V is about rows * columns / mean. A root of the mean for each side keeps numbers moderate.
    root = jnp.sqrt(jnp.where(v.mean(axis=(-1, -2)) > 0, v.mean(axis=(-1, -2)), 1))[..., None]
    left, right = (1 / jnp.sqrt(jnp.where(side > 0, side / root, 1)) for side in (rows, columns))

    def side(matrix: Any, scale: jax.Array) -> jax.Array:
        if matrix is None:
            matrix = jnp.broadcast_to(jnp.eye(scale.shape[-1]), (*scale.shape, scale.shape[-1]))
        return matrix.astype(scale.dtype) * scale[..., None]

    return side(sides[0], left), side(sides[1], right)


_FIELDS = ({"nu", "count"}, {"v", "v_row", "v_col"})
"""What no mapping but a state holds; that of RMSProp holds `nu` alone."""
_NAMES = {"count", "mu", "nu", "trace", "ema", "v"}


def _nodes(state: Any) -> list[Any]:
    return jax.tree.leaves(state, is_leaf=_has_second_moments)


def _has_second_moments(node: Any) -> bool:
    if isinstance(node, Mapping):  # as Orbax restores a state where it is not told its classes
        if node.keys() == {"mu", "nu"}:  # centred RMSProp, or SM3, whose mu is a list per leaf
            return shapes_and_tree(node["mu"]) == shapes_and_tree(node["nu"])
        return node.keys() == {"nu"} or any(fields <= node.keys() for fields in _FIELDS)
    # What SM3 calls nu is its momentum.
    known = hasattr(node, "_fields") and type(node).__name__ != "ScaleBySM3State"
    return known and (hasattr(node, "nu") or hasattr(node, "v_row"))


def _kinds(state: Any) -> set[str]:
    """Names of the NamedTuples in a state, or what stands in their place as Orbax restores them."""
    names: set[str] = set()

    def note(node: Any) -> bool:
        if hasattr(node, "_fields"):
            names.add(type(node).__name__)
        elif isinstance(node, Mapping) and _NAMES & node.keys():
            names.add(f"{{{', '.join(map(str, node))}}}")
        return False

    jax.tree.leaves(state, is_leaf=note)
    return names


def _restored(shape: tuple[int, ...], row: Any, column: Any, whole: Any) -> jax.Array:
    """V of one parameter of Adafactor, from its row and column means."""
    if jnp.shape(whole) == shape:
        return jnp.asarray(whole)
    # Optax factors along the two largest axes: the row's mean is over the largest.
    order = np.argsort(shape)
    over_rows, over_columns = int(order[-1]), int(order[-2])
    fitting = [tuple(np.delete(shape, axis)) for axis in (over_rows, over_columns)]
    if [jnp.shape(row), jnp.shape(column)] != fitting:
        raise ValueError(
            f"Adafactor's moments of shapes {jnp.shape(row)} and {jnp.shape(column)} do not fit a "
            f"parameter of shape {shape}."
        )
    wide_row = jnp.expand_dims(row, over_rows)
    mean = jnp.mean(wide_row, axis=over_columns, keepdims=True)
    return wide_row * jnp.expand_dims(column, over_columns) / jnp.where(mean == 0, 1, mean)
