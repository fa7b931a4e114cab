"""Parameters and checkpoints: pytrees of arrays, and not the modules or states that hold them."""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, ValuesView
from typing import Any

import jax
import jax.numpy as jnp

from jaxattr.inputs.arrays import in_byte_order, placed
from jaxattr.inputs.wording import brief, listed, shape
from jaxattr.leaves import named_leaves
from jaxattr.typing import Params


def as_checkpoints(checkpoints: Params | Sequence[Params]) -> tuple[Params, ...]:
    """Returns one or several params pytrees as a tuple.

    Args:
      checkpoints: as in `build_index`.

    Raises:
      TypeError: if one is no pytree of arrays, but holds one.
      ValueError: if there are none, or they differ in structure or shapes.

    Warns:
      UserWarning: if two are the same arrays.
    """
    if isinstance(checkpoints, Iterator | ValuesView):
        raise TypeError(
            f"checkpoints is {_a(type(checkpoints).__name__)}, which is read once: pass a list of "
            "them, list(...)."
        )
    parameters = tuple(checkpoints) if are_several(checkpoints) else (checkpoints,)
    if not parameters:
        raise ValueError("checkpoints is empty: pass one params pytree, or a list of them.")
    for number, params in enumerate(parameters):
        _refuse_what_holds_parameters(params)
        if number:
            _check_same(number, parameters[0], params)
    _warn_of_the_same(parameters)
    return tuple(
        jax.tree.map(lambda leaf: placed(in_byte_order(leaf)), params) for params in parameters
    )


def are_several(checkpoints: Any) -> bool:
    """Whether what was passed is a list or tuple of checkpoints, and no NamedTuple of one."""
    return isinstance(checkpoints, list | tuple) and not hasattr(checkpoints, "_fields")


def _warn_of_the_same(checkpoints: Sequence[Params]) -> None:
    leaves = [jax.tree.leaves(params) for params in checkpoints]  # kept, for their addresses
    first: dict[tuple[int, ...], int] = {}
    for number, own in enumerate(leaves):
        arrays = tuple(map(id, own))
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in own):
            return  # shapes of several may be one object
        if first.setdefault(arrays, number) != number:
            warnings.warn(
                f"Checkpoints {first[arrays]} and {number} are the same arrays. If they are states "
                "of nnx, which change as the model is trained, keep a copy of each: "
                "jax.tree.map(jnp.copy, nnx.state(model, nnx.Param)).",
                UserWarning,
                stacklevel=3,
            )
            return


def _check_same(number: int, first: Params, params: Params) -> None:
    expected, found = named_leaves(first), named_leaves(params)
    if expected.keys() != found.keys():
        other = listed(sorted(expected.keys() ^ found.keys()))
        differs = f"these are in one of them alone: {other}"
    else:
        unlike = [name for name in found if _kind(found[name]) != _kind(expected[name])]
        if not unlike:
            return
        pairs = (f"{n} {shape(found[n])} instead of {shape(expected[n])}" for n in unlike)
        differs = listed(pairs)
    raise ValueError(
        f"Checkpoint {number} differs from checkpoint 0 in its tree or shapes: {differs}. A list "
        "or tuple holds checkpoints, and no state of an optimizer; if your params are themselves "
        "one, pass [params]."
    )


def _kind(leaf: Any) -> tuple[tuple[int, ...], bool]:
    """The shape of an array, and whether it has a gradient."""
    dtype = getattr(leaf, "dtype", float)
    return jnp.shape(leaf), jnp.issubdtype(dtype, jnp.floating)


def _refuse_what_holds_parameters(params: Any) -> None:
    kind = type(params).__name__
    if isinstance(params, str | bytes) or hasattr(params, "__fspath__"):
        raise TypeError(
            f"checkpoints is {brief(repr(params))}: restore it as for training, and pass the "
            "params, such as manager.restore(step)['params'] of Orbax."
        )
    for is_one, remedy in _HOLDERS:
        if is_one(params):
            raise TypeError(f"checkpoints must be a pytree of arrays, got {_a(kind)}: {remedy}")
    for name, leaf in named_leaves(params).items():
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float | complex):
            raise TypeError(
                f"checkpoints must be a pytree of arrays, but {name!r} is "
                f"{_a(type(leaf).__name__)} ({brief(repr(leaf), 40)}). Take the arrays apart and "
                "let the function close over the rest: graph, params, rest = nnx.split(model, "
                "nnx.Param, ...), or of equinox params, rest = eqx.partition(model, "
                "eqx.is_inexact_array)."
            )


def _a(kind: str) -> str:
    return f"an {kind}" if kind[:1] in "AEIOUaeiou" or kind.startswith("nnx") else f"a {kind}"


def _instance(module: str, name: str) -> Callable[[Any], bool]:
    """Whether something is an instance of a class, which is not imported to find out."""
    return lambda value: isinstance(value, getattr(sys.modules.get(module), name, ()))


def _nnx_state_of_more(value: Any) -> bool:
    """Whether an nnx state holds keys beside parameters; running statistics are found by name."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(value, nnx.State):
        return False
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    variables = jax.tree.leaves(value, is_leaf=is_variable)
    return any(isinstance(each, nnx.RngState) for each in variables)


_SPLIT = "graph, params, rest = nnx.split(model, nnx.Param, ...)"
_HOLDERS = (
    (
        _instance("flax.nnx", "Module"),
        f"an nnx Module. Split it, {_SPLIT}, pass params, and merge inside the function: "
        "nnx.merge(graph, params, rest)(x).",
    ),
    (_instance("flax.nnx", "GraphDef"), f"pass the params alone, of {_SPLIT}."),
    (
        _nnx_state_of_more,
        f"it holds random state beside parameters. Pass params of {_SPLIT}.",
    ),
    (
        _instance("flax.linen", "Module"),
        "a linen Module has no parameters of its own. Pass those that it was trained to: "
        "variables['params'] of variables = model.init(...).",
    ),
    (
        lambda value: hasattr(value, "params") and hasattr(value, "opt_state"),
        "pass state.params, the parameters alone.",
    ),
    (
        lambda value: isinstance(value, Mapping) and {"params", "opt_state"} <= value.keys(),
        "it holds the state of an optimizer. Pass state['params'], the parameters alone, or with "
        "batch statistics {'params': state['params'], 'batch_stats': state['batch_stats']}.",
    ),
)
