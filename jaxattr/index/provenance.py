"""What an index was made from, as plain data that can be compared and read by people."""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.features.expectations import has_unit_norm
from jaxattr.features.featurizer import Featurizer
from jaxattr.features.plans import FeatureLayout
from jaxattr.groups import GroupLayout, Member, leaf_names
from jaxattr.methods.method import Method
from jaxattr.sources import Source
from jaxattr.store.rows import RowLayout
from jaxattr.typing import Example, OutputFn, Params

FORMAT = 1
# Examples that the fingerprint of a data set looks at.
_SAMPLES = 64


def manifest(
    method: Method,
    featurize: Featurizer,
    checkpoints: Sequence[Params],
    source: Source,
    layout: RowLayout,
) -> dict[str, Any]:
    """Describes an index.

    Args:
      method: the attribution method.
      featurize: its featurizer.
      checkpoints: the parameters.
      source: the training data.
      layout: the shapes of its rows.

    Returns:
      JSON-like data; `differences` compares two of them.
    """
    described = {
        "format": FORMAT,
        "method": describe_method(method, checkpoints[0], source.example),
        "groups": describe_groups(featurize.groups),
        "layout": describe_layout(featurize.layout),
        "covered": _covered(featurize, checkpoints[0]),
        "key": describe_key(featurize.key),
        "params": [fingerprint(params) for params in checkpoints],
        "data": {"examples": source.size, "fingerprint": fingerprint_data(source, source.size)},
        "example": describe_example(source.example),
        "rows": {
            "block": layout.block,
            "checkpoints": layout.checkpoints,
            "widths": dict(layout.widths),
            "dtypes": {name: np.dtype(dtype).name for name, dtype in layout.dtypes.items()},
        },
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "orbax-checkpoint")
        },
    }
    return json.loads(json.dumps(described))


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Compares two manifests, leaving out what does not change the numbers.

    Args:
      there: of the index.
      here: of what was asked for now.
      prefix: of the names.

    Returns:
      One "name: the index has ..., got ..." per difference.
    """
    found = []
    for name in sorted({*there, *here} - {"versions", "covered"}):
        a, b = there.get(name), here.get(name)
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}: the index has {_short(a)}, got {_short(b)}")
    return found


def describe_method(method: Method, params: Params, example: Example) -> dict[str, Any]:
    """Describes a method: its name, its parts, and fingerprints of the user's functions."""
    rule, eta = method.rule, method.checkpoint_weights
    # Named where they are not as usual, so that indexes from before they existed still match.
    unusual: dict[str, Any] = {}
    if method.link != "identity":
        unusual["link"] = method.link
    if has_unit_norm(rule.output):
        unusual["unit_norm_per_draw"] = True
    return unusual | {
        "name": method.name,
        "kernel": method.kernel.name,
        "projection": rule.projection.name,
        "basis": None if rule.projection.basis is None else rule.projection.basis.name,
        "unit_norm": rule.normalize,
        "checkpoint_weights": None if eta is None else list(eta),
        "average_checkpoints": method.average_checkpoints,
        "output": _fingerprint_function(rule.output, params, example),
        "residual": None
        if rule.residual is None
        else _fingerprint_function(rule.residual, params, example),
    }


def describe_groups(groups: GroupLayout) -> list[dict[str, Any]]:
    """Describes a partition of the parameters; `groups_from` reads it."""
    named = zip(groups.names, groups.members, strict=True)
    described: list[dict[str, Any]] = [
        {"name": name, "members": [[m.leaf, m.layer, m.size] for m in members]}
        for name, members in named
    ]
    return [*described, {"excluded": [list(pair) for pair in groups.excluded]}]


def groups_from(described: Sequence[Mapping[str, Any]]) -> GroupLayout:
    """Reads what `describe_groups` wrote."""
    *groups, last = described
    return GroupLayout(
        tuple(group["name"] for group in groups),
        tuple(tuple(Member(*member) for member in group["members"]) for group in groups),
        tuple((leaf, why) for leaf, why in last["excluded"]),
    )


def describe_layout(layout: FeatureLayout) -> dict[str, Any]:
    """Describes the columns of the features; `layout_from` reads it."""
    return {
        "names": list(layout.names),
        "sizes": list(layout.sizes),
        "dims": list(layout.dims),
        "blocks": [list(block) for block in layout.blocks],
    }


def layout_from(described: Mapping[str, Any]) -> FeatureLayout:
    """Reads what `describe_layout` wrote."""
    return FeatureLayout(
        tuple(described["names"]),
        tuple(described["sizes"]),
        tuple(described["dims"]),
        tuple((number, width) for number, width in described["blocks"]),
    )


def describe_key(key: jax.Array) -> dict[str, Any]:
    """Describes a PRNG key; `key_from` reads it."""
    words = np.asarray(jax.random.key_data(key)).tolist()
    return {"impl": str(jax.random.key_impl(key)), "words": words}


def key_from(described: Mapping[str, Any]) -> jax.Array:
    """Reads what `describe_key` wrote."""
    words = jnp.asarray(np.asarray(described["words"], np.uint32))
    return jax.random.wrap_key_data(words, impl=described["impl"])


def describe_example(example: Example) -> Any:
    """Describes the shapes of an example made of dicts and arrays; None for any other."""
    if isinstance(example, Mapping):
        parts = {str(name): describe_example(part) for name, part in example.items()}
        return None if any(part is None for part in parts.values()) else {"dict": parts}
    if hasattr(example, "shape") and hasattr(example, "dtype"):
        return {"shape": list(example.shape), "dtype": str(example.dtype)}
    return None


def example_from(described: Any) -> Example | None:
    """Reads what `describe_example` wrote."""
    if described is None:
        return None
    if "dict" in described:
        return {name: example_from(part) for name, part in described["dict"].items()}
    return jax.ShapeDtypeStruct(tuple(described["shape"]), described["dtype"])


def fingerprint(params: Params) -> str:
    """Returns a hash of a pytree's leaf names, shapes, types and bits, however it is sharded."""
    digest = hashlib.sha256()
    for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True):
        words = [int(word) for word in _hash_bits(jnp.asarray(leaf))]
        digest.update(f"{name} {leaf.dtype} {jnp.shape(leaf)} {words}".encode())
    return digest.hexdigest()[:32]


def fingerprint_data(source: Source, size: int) -> str:
    """Returns a hash of the first `size` examples, of which it reads 64, evenly spread.

    Args:
      source: the data.
      size: how many of them count.
    """
    rows = np.unique(np.linspace(0, size - 1, min(size, _SAMPLES)).round().astype(np.int64))
    batch = source.read(rows)
    digest = hashlib.sha256(str(size).encode())
    for name, leaf in zip(leaf_names(batch), jax.tree.leaves(batch), strict=True):
        value = np.ascontiguousarray(_plain(leaf))
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()[:32]


def _plain(leaf: Any) -> np.ndarray:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


@jax.jit
def _hash_bits(x: jax.Array) -> jax.Array:
    """Two sums of the bits of an array, mod 2^32: one plain, one weighted by position."""
    size = x.dtype.itemsize
    integers = jax.lax.bitcast_convert_type(x, jnp.uint32 if size in (4, 8) else jnp.uint16)
    words = integers.astype(jnp.uint32).reshape(-1)
    position = jax.lax.iota(jnp.uint32, words.size)
    weight = (position * jnp.uint32(2654435761)) ^ jnp.uint32(0x9E3779B9) | jnp.uint32(1)
    sums = [words.sum(dtype=jnp.uint32), (words * weight).sum(dtype=jnp.uint32)]
    return jnp.stack(sums)


def _fingerprint_function(function: OutputFn, params: Params, example: Example) -> str:
    """A hash of what a function computes, as JAX traces it, constants included."""
    # Shapes alone: where parameters are does not change what is computed.
    params, example = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, example)
    )
    closed = jax.make_jaxpr(function)(params, example, jax.random.key(0))
    # Addresses of Python objects differ from run to run.
    text = re.sub(r"0x[0-9a-f]+", "", str(closed.jaxpr))
    digest = hashlib.sha256(text.encode())
    for constant in closed.consts:
        digest.update(np.ascontiguousarray(_plain(constant)).tobytes())
    return f"{digest.hexdigest()[:32]} (jax {jax.__version__})"


def _covered(featurize: Featurizer, params: Params) -> float:
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    return sum(featurize.groups.sizes) / total


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:60]} ... {text[-50:]}"
