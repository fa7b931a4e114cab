"""An optimizer's second moments, and the basis that scales gradients by them (TrackStar)."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr import linear_maps
from jaxattr.bases import Basis, Factored, Fitted, Sides, draw_signs
from jaxattr.groups import leaf_names
from jaxattr.training_passes import TrainingPass
from jaxattr.typing import Params


def second_moments(optimizer_state: Any, params: Params) -> Params:
    """Finds the running mean of squared gradients in an Optax state.

    Knows Adam and its kin (`nu`), RMSProp (`nu`) and Adafactor (`v_row`, `v_col`, `v`), wherever
    they stand in a chain. Adam's bias correction, one factor for all parameters, is left out.

    Args:
      optimizer_state: what `optimizer.init` or `optimizer.update` returned.
      params: the parameters that it belongs to.

    Returns:
      A pytree like the parameters.

    Raises:
      ValueError: if the state holds no second moments, those of other parameters, or several.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.ones(2)}
      >>> optimizer = optax.chain(optax.clip(1.0), optax.adamw(1e-3))
      >>> _, state = optimizer.update({"w": jnp.array([1.0, 2.0])}, optimizer.init(params), params)
      >>> print(second_moments(state, params)["w"].round(4))
      [0.001 0.001]
    """
    found = [
        node
        for node in jax.tree.leaves(optimizer_state, is_leaf=_has_second_moments)
        if _has_second_moments(node)
    ]
    if len(found) != 1:
        kinds = sorted(_kinds(optimizer_state))
        raise ValueError(
            f"Needed one second moment in the optimizer's state, found {len(found)}. It holds "
            f"{kinds}; of those that ship with Optax, Adam, AdamW, NAdam, AMSGrad, RMSProp and "
            "Adafactor have one, SGD, Lion and momentum have none. Pass second_moments=, a pytree "
            "like the parameters, instead."
        )
    (node,) = found
    if hasattr(node, "v_row"):
        restore = functools.partial(_restored, params)
        return restore(node)
    moments = node.nu
    if jax.tree.map(jnp.shape, moments) != jax.tree.map(jnp.shape, params):
        raise ValueError(
            "The optimizer's second moments do not fit the parameters: got "
            f"{jax.tree.map(jnp.shape, moments)}, needed {jax.tree.map(jnp.shape, params)}."
        )
    return moments


def scaled_signs(moments: Sequence[Params], *, rank_one: bool, epsilon: float) -> Basis:
    r"""Random signs on gradients that are divided by the root of second moments.

    .. math:: \phi = A^\top (\nabla_W \ell \,/\, (\sqrt{V} + \epsilon)) B

    Args:
      moments: V, one pytree like the parameters per checkpoint.
      rank_one: whether the V of a linear map is replaced by the product of its row and column
        means, over its mean, as Adafactor stores it. Then no gradient is formed. Exact where V is
        of rank one.
      epsilon: added to the roots.

    Returns:
      The basis.
    """

    def fit(over: TrainingPass) -> Fitted:
        if over.number >= len(moments):
            raise ValueError(
                f"Got second moments for {len(moments)} checkpoints, needed one for each: there is "
                f"none for checkpoint {over.number}."
            )
        given = moments[over.number]
        if jax.tree.map(jnp.shape, given) != jax.tree.map(jnp.shape, over.params):
            raise ValueError(
                f"The second moments of checkpoint {over.number} do not fit its parameters: got "
                f"{jax.tree.map(jnp.shape, given)}, needed "
                f"{jax.tree.map(jnp.shape, over.params)}."
            )
        named = dict(zip(leaf_names(given), jax.tree.leaves(given), strict=True))
        plan = over.featurizer.plan
        scales = {name: 1 / (jnp.sqrt(v) + epsilon) for name, v in named.items()}
        if not rank_one:
            kept = plan.rest | plan.covered
            return Fitted({}, {name: scales[name] for name in kept}, None, {})
        key = jax.random.fold_in(over.featurizer.key, over.number)
        sides = {f.map.leaf: _scaled(f, draw_signs(key, f), named, epsilon) for f in plan.factored}
        return Fitted(sides, {name: scales[name] for name in plan.rest}, None, {})

    name = "two-sided random signs over second moments"
    return Basis(
        f"{name} of rank one" if rank_one else name, draw_signs, fit, materialize=not rank_one
    )


def _scaled(factored: Factored, sides: Sides, named: dict[str, Any], epsilon: float) -> Sides:
    """A and B with the rows multiplied by the roots of the two factors of 1 / V."""
    found = factored.map
    bias = named[str(found.bias)] if factored.bias else None
    v = linear_maps.matrix(found, named[found.leaf], bias).astype(factored.dtype)
    rows, columns = v.mean(axis=-1), v.mean(axis=-2)
    mean = rows.mean(axis=-1, keepdims=True)
    # V is about rows * columns / mean; a half of epsilon's effect goes to each side.
    left = 1 / (jnp.sqrt(rows / jnp.sqrt(jnp.maximum(mean, 1e-30))) + epsilon**0.5)
    right = 1 / (jnp.sqrt(columns / jnp.sqrt(jnp.maximum(mean, 1e-30))) + epsilon**0.5)

    def side(matrix: jax.Array | None, scale: jax.Array) -> jax.Array:
        if matrix is None:
            matrix = jnp.broadcast_to(jnp.eye(scale.shape[-1]), (*scale.shape, scale.shape[-1]))
        return matrix.astype(scale.dtype) * scale[..., None]

    return side(sides[0], left), side(sides[1], right)


def _has_second_moments(node: Any) -> bool:
    return hasattr(node, "_fields") and (hasattr(node, "nu") or hasattr(node, "v_row"))


def _kinds(state: Any) -> set[str]:
    """Names of the NamedTuples in a state."""
    names: set[str] = set()

    def note(node: Any) -> bool:
        if hasattr(node, "_fields"):
            names.add(type(node).__name__)
        return False

    jax.tree.leaves(state, is_leaf=note)
    return names


def _restored(params: Params, state: Any) -> Params:
    """V of Adafactor, from its row and column means."""

    def leaf(param: Any, row: Any, column: Any, whole: Any) -> jax.Array:
        shape = jnp.shape(param)
        if jnp.shape(whole) == shape:
            return jnp.asarray(whole)
        rows = [axis for axis in range(len(shape)) if _without(shape, axis) == jnp.shape(row)]
        columns = [axis for axis in range(len(shape)) if _without(shape, axis) == jnp.shape(column)]
        # Optax factors along the two largest axes: the row's mean is over the largest.
        order = np.argsort(shape)
        over_rows, over_columns = int(order[-1]), int(order[-2])
        if over_rows not in rows or over_columns not in columns:
            raise ValueError(
                f"Adafactor's moments of shapes {jnp.shape(row)} and {jnp.shape(column)} do not "
                f"fit a parameter of shape {shape}."
            )
        wide_row = jnp.expand_dims(row, over_rows)
        wide_column = jnp.expand_dims(column, over_columns)
        mean = jnp.mean(wide_row, axis=over_columns, keepdims=True)
        return wide_row * wide_column / jnp.where(mean == 0, 1, mean)

    return jax.tree.map(leaf, params, state.v_row, state.v_col, state.v)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])
