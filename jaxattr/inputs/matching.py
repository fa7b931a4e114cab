"""Queries beside training examples: the same fields, shapes and kinds of numbers."""

from typing import Any

import jax.numpy as jnp

from jaxattr.inputs.arrays import fields_of
from jaxattr.inputs.outputs import check_output, read_leaves
from jaxattr.inputs.wording import listed, shape, shapes
from jaxattr.typing import Example, Key, OutputFn, Params


def check_match(
    function: OutputFn, params: Params, train: Example, query: Example, key: Key
) -> None:
    """Checks that queries can be scored by a function that was made for training examples.

    Fields that the function does not read may differ, and so may sizes that it can do with, such as
    lengths of sequences.

    Args:
      function: of one training example.
      params: parameters, or their shapes.
      train: shapes of ONE training example.
      query: shapes of ONE query.
      key: a PRNG key.

    Raises:
      ValueError: naming the fields that differ.
    """
    known, found = fields_of(train), fields_of(query)
    shared = [name for name in found if name in known]
    unlike = [n for n in shared if _what(known[n]) != _what(found[n])]
    if known.keys() == found.keys() and not unlike:
        return
    read = dict(zip(known, read_leaves(function, params, train), strict=True))
    for name in unlike:
        if read[name]:
            _check_axes(name, known[name], found[name])
            _check_kind(name, known[name], found[name])
    try:
        check_output(function, params, query, key)
    except ValueError as error:
        raise ValueError(_difference(train, query, known, found)) from error


def _check_axes(name: str, known: Any, found: Any) -> None:
    less, more = sorted((found.shape, known.shape), key=len)
    said = _beside(name, known, found)
    if len(more) != len(less) + 1 or more[1:] != less:
        stretched = any(1 in pair and pair[0] != pair[1] for pair in zip(less, more, strict=False))
        if len(more) != len(less) or stretched:  # what broadcasts runs, and scores something else
            raise ValueError(f"{said}: give queries the axes of a training example.")
        return
    fewer = len(known.shape) > len(found.shape)
    batched = "the training data" if fewer else "queries"
    single = " If this is ONE query, add an axis: jax.tree.map(lambda x: x[None], query)."
    raise ValueError(
        f"{said}: one axis of {more[0]} more. If {batched} come in batches, take the batching out: "
        f"each item must be ONE example.{single if fewer else ''}"
    )


def _check_kind(name: str, known: Any, found: Any) -> None:
    kinds = [_kind(each) for each in (found, known)]
    if "bool" not in kinds and kinds[0] != kinds[1]:
        raise ValueError(
            f"{_beside(name, known, found)}. Convert one to the other, and scale pictures "
            "alike: .astype(...)."
        )


def _what(leaf: Any) -> tuple[tuple[int, ...], str]:
    return leaf.shape, _kind(leaf)


def _kind(leaf: Any) -> str:
    kinds = {"bool": jnp.bool_, "int": jnp.integer, "float": jnp.floating}
    return next((n for n, kind in kinds.items() if jnp.issubdtype(leaf.dtype, kind)), "other")


def _difference(
    train: Example, query: Example, known: dict[str, Any], found: dict[str, Any]
) -> str:
    missing = [name for name in known if name not in found]
    new = [name for name in found if name not in known]
    unlike = [
        f"{_named(n)} is {shape(found[n])} in queries, and {shape(known[n])} in training examples"
        for n in found
        if n in known and _what(found[n]) != _what(known[n])
    ]
    parts = []
    if new or missing:
        had = f"have {listed(map(_named, new))}" if new else "lack fields"
        parts.append(f"queries {had}, training examples {listed(map(_named, missing)) or 'do not'}")
    return (
        f"The function that was given to the method does not take these queries: "
        f"{'; '.join(parts + unlike[:3])}.\nOne of queries is {shapes(query)};\n"
        f"a training example is {shapes(train)}.\nGive queries the fields that the function reads."
    )


def _beside(name: str, known: Any, found: Any) -> str:
    return f"In queries {_named(name)} is {shape(found)}, in training examples {shape(known)}"


def _named(name: str) -> str:
    return repr(name) if name else "an array without a name"
