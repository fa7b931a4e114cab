"""What an index was made from, as plain data that can be compared and read by people."""

import collections
import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr import identity
from jaxattr.features.bases import Fitted
from jaxattr.features.featurizer import FeatureRule, Featurizer
from jaxattr.features.plans import FeatureLayout
from jaxattr.groups import GroupLayout, Member
from jaxattr.inputs.wording import listed
from jaxattr.leaves import named_leaves
from jaxattr.methods.method import Method
from jaxattr.sources import Source
from jaxattr.store.rows import RowLayout
from jaxattr.typing import Example, Params

FORMAT = 3

# What a manifest calls its parts, in words of the call that made it; the first that fits counts.
_WORDS = (
    ("method.rule.output", "the function that is attributed (the loss, margin or output)"),
    ("method.rule.residual", "the residual"),
    ("method.rule.projection.basis.sample", "sample="),
    ("method.rule.projection.basis.mask", "mask="),
    ("method.rule.projection.basis.moments", "the optimizer's second moments"),
    ("method.kernel.queries", "the method's queries"),
    ("params", "the parameters"),
    ("rows.block", "batch_size"),
    ("rows.checkpoints", "checkpoints"),
)


PRECISION = "jax_default_matmul_precision"
_PARTITIONABLE = "jax_threefry_partitionable"


def manifest(
    method: Method,
    featurize: Featurizer,
    checkpoints: Sequence[Params],
    source: Source,
    layout: RowLayout,
) -> dict[str, Any]:
    """Describes an index, but for the content of its data: see `verifying`.

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
        "method": describe_method(method, featurize.rule),
        "groups": describe_groups(featurize.groups),
        "layout": dataclasses.asdict(featurize.layout),
        "key": describe_key(featurize.key),
        "params": [describe_params(params) for params in checkpoints],
        "data": {"examples": source.size},
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
        "settings": {PRECISION: getattr(jax.config, PRECISION)},
    }
    return json.loads(json.dumps(described))


def differences(there: Any, here: Any) -> list[str]:
    """Compares two manifests, leaving out what does not change the numbers.

    Args:
      there: of the index.
      here: of what was asked for now.

    Returns:
      One line per difference, in words of the call. What follows from another one is left out.
    """
    found: dict[str, str] = {}
    follow: dict[str, str] = {}
    leaves: dict[str, list[str]] = {}
    for name, a, b in _unequal(there, here, ""):
        # Where an index was begun follows from how many examples it has.
        if name.partition(".")[0] in ("versions", "covered", "settings") or name == "data.begun":
            continue
        part, sep, end = name.rpartition(".")
        if end == "jax" and sep:
            found[part] = (
                f"{_worded(part)} was traced by jax {a}, and cannot be compared with that of jax "
                f"{b}: use the same version, or build the index again"
            )
        elif end == _PARTITIONABLE:
            then, now = ("off", "on") if b is None else ("on", "off")
            found[name] = f"{end} was {then}, and is {now}: keys give other random numbers"
        elif end in ("computes", "content"):
            what = "computes something else" if end == "computes" else "differs"
            why = _precisions(there) if end == "computes" else ""
            found.setdefault(part, f"{_worded(part)} {what} than when the index was built{why}")
        elif name.startswith("params."):
            _, number, leaf = name.split(".", 2)
            leaves.setdefault(number, []).append(leaf)
        else:
            if name == "groups" and _groups_in_words(a) != _groups_in_words(b):
                a, b = _groups_in_words(a), _groups_in_words(b)
            lines = follow if name.startswith(("layout.", "rows.widths.")) else found
            called = _worded(name) if name.startswith("rows.") else name
            lines[name] = f"{called}: the index has {_short(a)}, got {_short(b)}"
    if "method.name" in found:  # its settings are those of another method, and no more to mend
        settings = (
            "method.kernel.",
            "method.rule.projection.",
            "method.rule.normalize",
            "rows.dtypes.raw",
        )
        found = {name: line for name, line in found.items() if not name.startswith(settings)}
    if "data.examples" in found:
        found.pop("rows.block", None)  # which may be as many
        a, b = (described["data"]["examples"] for described in (there, here))
        more = "; extend=True adds new ones, where a method can" if b > a else ""
        found["data.examples"] = f"train: the index has {a} examples, got {b}{more}"
    for number, those in leaves.items():
        found[number] = f"the parameters of checkpoint {number} differ: {listed(those)}"
    return list((found or follow).values())


def _precisions(there: Any) -> str:
    """A likely reason why a function computes something else: how its products are multiplied."""
    now = getattr(jax.config, PRECISION)
    then = there.get("settings", {}).get(PRECISION, now)
    return "" if now == then else f" ({PRECISION} was {then!r} then, and is {now!r} now)"


def _groups_in_words(described: Sequence[Mapping[str, Any]]) -> str:
    sizes = {group["name"]: sum(each[2] for each in group["members"]) for group in described[:-1]}
    return listed(f"{name} of {size} parameters" for name, size in sizes.items())


def describe_method(method: Method, rule: FeatureRule) -> Any:
    """Describes a method as far as the training side goes.

    Args:
      method: the method.
      rule: its rule, traced.
    """
    return identity.describe(dataclasses.replace(method, rule=rule, query_output=None))


def describe_params(params: Params) -> dict[str, str]:
    """Returns {leaf name: digest of its dtype, shape and bits, however it is sharded}."""
    leaves = named_leaves(params)
    return dict(zip(leaves, identity.digests_of_leaves(list(leaves.values())), strict=True))


def query_side(
    featurize: Featurizer,
    checkpoints: Sequence[Params],
    fitted: Sequence[Fitted],
    operators: Sequence[Any],
) -> str:
    """Returns a digest of all that decides the features of a query.

    Args:
      featurize: the featurizer.
      checkpoints: the parameters.
      fitted: what was fitted to each.
      operators: of the kernel for each, where queries need them, or ().
    """
    rule = dataclasses.replace(featurize.rule, residual=None)
    arrays = jax.tree.leaves((fitted, operators))
    return identity.digest(
        {
            "rule": identity.describe(rule),
            "layout": dataclasses.asdict(featurize.layout),
            "key": describe_key(featurize.key),
            "params": [describe_params(params) for params in checkpoints],
            "fitted": identity.digests_of_leaves(arrays),
        }
    )


def describe_groups(groups: GroupLayout) -> list[dict[str, Any]]:
    """Describes a partition of the parameters; `groups_from` reads it."""
    described: list[dict[str, Any]] = [
        {"name": name, "members": [_described(member) for member in members]}
        for name, members in zip(groups.names, groups.members, strict=True)
    ]
    return [*described, {"excluded": groups.excluded}]


def _described(member: Member) -> list[Any]:
    """The axis of its layers is left out where it is the first, as it was before others were."""
    last = [member.axis] if member.axis else []
    return [member.leaf, member.layer, member.size, *last]


def groups_from(described: Sequence[Mapping[str, Any]]) -> GroupLayout:
    """Reads what `describe_groups` wrote."""
    *groups, last = described
    return GroupLayout(
        tuple(group["name"] for group in groups),
        tuple(tuple(Member(*member) for member in group["members"]) for group in groups),
        tuple((leaf, why) for leaf, why in last["excluded"]),
    )


def layout_from(described: Mapping[str, Any]) -> FeatureLayout:
    """Reads a layout as a dict, as JSON gives it back."""
    fields = {name: tuple(described[name]) for name in ("names", "sizes", "dims")}
    return FeatureLayout(**fields, blocks=tuple((b, width) for b, width in described["blocks"]))


def describe_key(key: jax.Array) -> dict[str, Any]:
    """Describes a PRNG key; `key_from` reads it."""
    words = np.asarray(jax.random.key_data(key)).tolist()
    described = {"impl": str(jax.random.key_impl(key)), "words": words}
    # What is drawn from a key depends on this setting of JAX.
    partitionable = getattr(jax.config, _PARTITIONABLE)
    return described if partitionable else described | {_PARTITIONABLE: False}


def key_from(described: Mapping[str, Any]) -> jax.Array:
    """Reads what `describe_key` wrote."""
    words = jnp.asarray(np.asarray(described["words"], np.uint32))
    return jax.random.wrap_key_data(words, impl=described["impl"])


def describe_example(example: Example) -> Any:
    """Describes the shapes of an example made of dicts and arrays; None for any other."""
    if isinstance(example, Mapping):
        # JAX keeps the order of the former, and sorts others by their names.
        ordered = isinstance(example, collections.OrderedDict)
        if ordered or not all(isinstance(name, str) for name in example):
            return None
        parts = {name: describe_example(part) for name, part in example.items()}
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
    return jax.ShapeDtypeStruct(tuple(described["shape"]), _dtype_from(described["dtype"]))


_KEYS = {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}


def _dtype_from(name: str) -> Any:
    """Of numbers, or of PRNG keys, as in "key<fry>"."""
    if not name.startswith("key<"):
        return name
    return jax.random.key(0, impl=_KEYS[name[4:-1]]).dtype


def _unequal(there: Any, here: Any, name: str) -> list[tuple[str, Any, Any]]:
    """(dotted name, value there, value here) of all that differs, as deep as both go."""
    if name == "params" and isinstance(there, list) and isinstance(here, list):
        if len(there) != len(here):
            return []  # their number is among the rows
        there, here = dict(enumerate(there)), dict(enumerate(here))
    if isinstance(there, Mapping) and isinstance(here, Mapping) and there and here:
        found = []
        for each in sorted({*there, *here}):
            found += _unequal(there.get(each), here.get(each), f"{name}.{each}" if name else each)
        return found
    return [] if there == here else [(name, there, here)]


def _worded(name: str) -> str:
    for prefix, words in _WORDS:
        if name.startswith(prefix):
            return words
    return name


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:60]} ... {text[-50:]}"
