"""What building an index will take, before it is done: memory, disk, arithmetic."""

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxattr import groups as groups_lib
from jaxattr.counts import counted, whole_number
from jaxattr.features.bases import NOTHING, Drawn, Factored, Fits, Fitted, Sides
from jaxattr.features.featurizer import Featurizer, room
from jaxattr.groups import Groups
from jaxattr.identity import LANES
from jaxattr.inputs.outputs import explaining_swaps, is_one_model, runs
from jaxattr.inputs.parameters import as_checkpoints
from jaxattr.inputs.wording import name_of
from jaxattr.kernels import Identity, Iterates
from jaxattr.leaves import named_leaves
from jaxattr.methods.method import Method, check_method, featurizer
from jaxattr.scales import widest
from jaxattr.sharding import DATA, Placement, placement, split_rows
from jaxattr.sources import Source, as_source
from jaxattr.store.compression import is_compressed, scales_per_row
from jaxattr.store.rows import (
    DIGESTS,
    ERRORS,
    EXAMPLES,
    FEATURES,
    RAW,
    SCALES,
    SELF,
    SELF_COLUMNS,
    RowLayout,
)
from jaxattr.typing import Example, Key, Params

# More examples than this at once do not make a step faster.
_LARGEST_MICROBATCH = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What `build_index` will take. Print it.

    Attributes:
      examples: training examples n.
      checkpoints: number of them.
      blocks: steps over the data, per checkpoint.
      block: examples per step.
      microbatch: examples whose gradients are in memory at once, per device.
      shards: devices that examples are spread over.
      features: per example and checkpoint.
      params_bytes: the parameters of all checkpoints, per device.
      step_bytes: temporary memory of the compiled feature step, per device.
      statistics_bytes: the kernel's sums, per device.
      index_bytes: all rows, in memory per device, or on disk.
      on_disk: whether the rows are on disk.
      flops: of all feature steps of all devices together, as XLA counts them: loops count as one
        turn, so this is scaled by the microbatches.
    """

    examples: int
    checkpoints: int
    blocks: int
    block: int
    microbatch: int
    shards: int
    features: int
    params_bytes: int
    step_bytes: int
    statistics_bytes: int
    index_bytes: int
    on_disk: bool
    flops: float

    @property
    def device_bytes(self) -> int:
        """Memory per device, all together."""
        rows = 0 if self.on_disk else self.index_bytes
        return self.params_bytes + self.step_bytes + self.statistics_bytes + rows

    def __str__(self) -> str:
        where = "on disk" if self.on_disk else "per device"
        return "\n".join(
            [
                f"{counted(self.examples, 'example')} x {counted(self.checkpoints, 'checkpoint')} "
                f"x {counted(self.features, 'feature')}, over {counted(self.shards, 'device')}",
                f"  {counted(self.blocks, 'block')} of {counted(self.block, 'example')}, "
                f"{self.microbatch} at once per device",
                f"  index       {size_in_words(self.index_bytes)} {where}",
                f"  per device  {size_in_words(self.device_bytes)}: "
                f"parameters {size_in_words(self.params_bytes)}, "
                f"feature step {size_in_words(self.step_bytes)}, "
                f"statistics {size_in_words(self.statistics_bytes)}"
                + ("" if self.on_disk else f", index {size_in_words(self.index_bytes)}"),
                f"  arithmetic  {self.flops:.2g} floating-point operations, loops counted once",
            ]
        )


def plan(
    method: Method,
    checkpoints: Params | Sequence[Params],
    train: Any,
    *,
    groups: Groups = groups_lib.by_layer,
    key: Key | None = None,
    batch_size: int = 256,
    microbatch: int | None = None,
    memory: int | None = None,
    mesh: Mesh | None = None,
    on_disk: bool = False,
    dtype: Any = None,
) -> BuildPlan:
    """Says what `build_index` will take, from one compilation of its step; computes nothing.

    Args:
      method: the attribution method.
      checkpoints: one params pytree, or a list or tuple of them; or their shapes.
      train: a pytree of arrays with a common leading axis, or a random-access source.
      groups: `by_layer`, `by_leaf`, a layout, or a pytree of labels.
      key: key of projections and of stochastic outputs. Default: `jax.random.key(0)`.
      batch_size: examples per step, and per chunk on disk.
      microbatch: examples whose gradients are in memory at once, per device. Default: as many as
        have room in a quarter of the device's memory (1 GiB on a CPU), activations included.
      memory: instead of `microbatch`: bytes per device; the largest microbatch that fits is found.
      mesh: devices to use, with an axis "data". Default: the default device.
      on_disk: whether the index will be.
      dtype: of the stored features, as in `build_index`.

    Returns:
      The plan. Bytes are those of XLA's memory analysis and of the arrays; a program around them,
      the data's own prefetching, and fitting a basis (EK-FAC) come on top.

    Raises:
      ValueError: as `build_index`, and if `memory` does not suffice.
    """
    place = placement(mesh)
    with looking_at(method, checkpoints, train) as (parameters, source):
        request = BuildRequest(method, parameters, source, groups, key, place, on_disk, dtype)
        featurize = request.settle(batch_size, microbatch, memory)
    return request.plan(featurize, request.block(featurize, batch_size))


@contextlib.contextmanager
def looking_at(
    method: Method, checkpoints: Params | Sequence[Params], train: Any
) -> Iterator[tuple[tuple[Params, ...], Source]]:
    """Looks at what an index is to be made from, before anything is traced or allocated.

    Args:
      method: as in `build_index`, as the others.
      checkpoints: see there.
      train: see there.

    Yields:
      The checkpoints and the data. If what is done with them fails as it would not had they changed
      places, the error says that.
    """
    output = check_method(method).rule.output
    with explaining_swaps(output, checkpoints, train):
        parameters = as_checkpoints(checkpoints)
        source = as_source(train, "train", functools.partial(runs, output, parameters[0]))
        if is_one_model(output, checkpoints, train):
            said = (
                f"checkpoints is a list or tuple of {len(parameters)}, taken for that many "
                f"checkpoints, and {name_of(output)!r} takes all of it as the parameters of one "
                "model: if it is one, pass [params]."
            )
            if not runs(output, parameters[0], source.example):
                raise ValueError(said)
            warnings.warn(said, UserWarning, stacklevel=4)
        method.weights_of(len(parameters))
        yield parameters, source


@dataclasses.dataclass(frozen=True)
class BuildRequest:
    """What an index is asked to be made of, before it is known how many examples go at once.

    Attributes:
      method: the attribution method.
      checkpoints: the parameters.
      source: the data.
      groups: the parameter groups.
      key: of projections and stochastic outputs.
      place: the devices.
      on_disk: whether rows are on disk.
      dtype: of the stored features; None for the default.
    """

    method: Method
    checkpoints: tuple[Params, ...]
    source: Source
    groups: Groups
    key: Key | None
    place: Placement
    on_disk: bool
    dtype: Any

    def settle(self, batch_size: int, microbatch: int | None, memory: int | None) -> Featurizer:
        """Decides the microbatch; compiles nothing unless a memory is given.

        Args:
          batch_size: wanted.
          microbatch: wanted, or None.
          memory: bytes per device, or None.

        Raises:
          ValueError: if the memory does not suffice for a microbatch of one, or the basis has
            nothing for some of the parameters.
        """
        batch_size = whole_number("batch_size", batch_size)
        if memory is None:
            return self._featurizer(batch_size, microbatch)
        if microbatch is not None:
            raise ValueError("Give microbatch or memory, not both.")
        return self._fitting(batch_size, whole_number("memory, in bytes,", memory))

    def block(self, featurize: Featurizer, batch_size: int, size: int | None = None) -> int:
        """Examples per block: every device has as many, in whole microbatches.

        Args:
          featurize: the featurizer.
          batch_size: wanted.
          size: of the data set as the index was begun, where it has grown since.
        """
        wanted = min(batch_size, self.source.size if size is None else size)
        block = split_rows(wanted, self.place)
        if self.place.mesh is None:
            return block
        return -(-block // featurize.microbatch) * featurize.microbatch

    def smaller(self, featurize: Featurizer, batch_size: int) -> int:
        """Examples per block whose features, of all checkpoints, have room on a device."""
        itemsize = feature_dtype(featurize, self.checkpoints[0]).itemsize
        each = len(self.checkpoints) * featurize.layout.total * itemsize
        return max(1, min(batch_size, room() // each))

    def rows(self, featurize: Featurizer, block: int) -> RowLayout:
        """The shapes of the rows."""
        computed = feature_dtype(featurize, self.checkpoints[0])
        try:
            stored = np.dtype(computed if self.dtype is None else self.dtype)
        except TypeError:
            raise _unkept(repr(self.dtype)) from None
        floats = (np.dtype(computed), np.dtype(jnp.float32), np.dtype(jnp.bfloat16))
        if stored not in floats and not is_compressed(stored):
            raise _unkept(stored.name)
        layout = featurize.layout
        widths = {FEATURES: layout.total, EXAMPLES: 2, SELF: len(layout.names) + len(SELF_COLUMNS)}
        if not isinstance(self.method.kernel, Identity):
            widths[RAW] = layout.total
        if isinstance(self.method.kernel, Iterates):
            widths[ERRORS] = 1
        dtypes = {
            name: stored if name in (FEATURES, RAW) else np.dtype(computed) for name in widths
        }
        if is_compressed(stored):
            widths[SCALES] = scales_per_row(stored, layout.total)
            dtypes[SCALES] = np.dtype(computed)
            if RAW in widths:  # an inverse would make much of little errors
                dtypes[RAW] = np.dtype(jnp.bfloat16)
        if self.on_disk:
            widths[DIGESTS] = LANES * len(jax.tree.leaves(self.source.example))
            dtypes[DIGESTS] = np.dtype(np.uint32)
        return RowLayout(self.source.size, block, len(self.checkpoints), widths, dtypes)

    def _featurizer(self, batch_size: int, microbatch: int | None) -> Featurizer:
        make = functools.partial(
            featurizer, self.method, self.checkpoints[0], self.source.example, groups=self.groups
        )
        made = make(key=self.key, microbatch=microbatch)
        if (basis := self.method.rule.projection.basis) is not None:
            basis.check(made.groups)
        if self.place.mesh is None:
            return made
        local = self.source.block_size(batch_size, self.place) // self.place.shards
        shared = min(made.microbatch, local) * self.place.shards
        return make(key=self.key, microbatch=shared)

    def _fitting(self, batch_size: int, memory: int) -> Featurizer:
        """The featurizer with the largest microbatch that fits; memory grows near linearly."""
        smallest = self._planned(batch_size, 1)
        spare = memory - smallest[1].device_bytes
        if spare < 0:
            raise ValueError(
                f"The index does not fit {size_in_words(memory)} per device, even one example at a "
                f"time. Needed:\n{smallest[1]}\nMake room with path= (the index on disk), "
                "dtype=jnp.int8 or jnp.bfloat16, a projection with a smaller dim or rank, fewer "
                "checkpoints, or a mesh over more devices."
            )
        local = -(-min(batch_size, self.source.size) // self.place.shards)
        largest = min(local, _LARGEST_MICROBATCH)
        second = self._planned(batch_size, min(2, largest))
        slope = max(second[1].step_bytes - smallest[1].step_bytes, 1)
        wanted = max(1, min(largest, 1 + spare // slope))
        while wanted > 1:
            featurize, planned = self._planned(batch_size, wanted)
            if planned.device_bytes <= memory:
                return featurize
            wanted //= 2
        return smallest[0]

    def _planned(self, batch_size: int, microbatch: int) -> tuple[Featurizer, BuildPlan]:
        featurize = self._featurizer(batch_size, microbatch)
        return featurize, self.plan(featurize, self.block(featurize, batch_size))

    def plan(self, featurize: Featurizer, block: int) -> BuildPlan:
        """Compiles the feature step, and says what the build will take."""
        rows, shards = self.rows(featurize, block), self.place.shards
        compiled = _compile(featurize, self.checkpoints[0], self.source.example, block, self.place)
        analysis, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
        turns = math.ceil(block / featurize.microbatch)
        sums = functools.partial(self.method.kernel.sums, featurize.layout, rows.size)
        phi = jax.ShapeDtypeStruct((1, featurize.layout.total), rows.wide)
        statistics = jax.eval_shape(sums, phi, jax.ShapeDtypeStruct((1,), bool))
        return BuildPlan(
            examples=rows.size,
            checkpoints=rows.checkpoints,
            blocks=rows.blocks,
            block=block,
            microbatch=min(featurize.microbatch, block) // shards,
            shards=shards,
            features=featurize.layout.total,
            params_bytes=sum(_local_bytes(params) for params in self.checkpoints),
            step_bytes=int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes),
            statistics_bytes=_local_bytes(statistics),
            index_bytes=rows.bytes_on_disk() if self.on_disk else rows.bytes_in_memory(self.place),
            on_disk=self.on_disk,
            flops=float(cost.get("flops", 0.0)) * turns * rows.blocks * rows.checkpoints * shards,
        )


def _unkept(dtype: str) -> ValueError:
    return ValueError(
        f"dtype must be float32, bfloat16, int8 or float8_e4m3fn, got {dtype:.40}: float16 "
        "overflows at 65,504, which gradients reach, and features of other types are not kept."
    )


def feature_dtype(featurize: Featurizer, params: Params) -> Any:
    """Returns the dtype of features, float32 or wider.

    Args:
      featurize: the featurizer.
      params: the parameters, or their shapes.
    """
    plan, leaves = featurize.plan, named_leaves(params)
    dtypes = [factored.dtype for factored in plan.factored]
    dtypes += [leaves[name].dtype for name in plan.rest]
    # Of NumPy's float64 JAX makes float32, unless it is told to keep it.
    return np.dtype(widest(jnp.float32, *map(jax.dtypes.canonicalize_dtype, dtypes)))


def check_device(planned_bytes: int, place: Placement, what: str) -> None:
    """Raises if rows do not fit the memory that the device says it has.

    Args:
      planned_bytes: per device.
      place: the devices.
      what: needs them.
    """
    device = jax.local_devices()[0] if place.mesh is None else place.mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is not None and planned_bytes > limit:
        raise ValueError(
            f"{what} needs {size_in_words(planned_bytes)} per device, and {device.device_kind} has "
            f"{size_in_words(limit)}. Give a path= to keep the index on disk, dtype=jnp.int8 or "
            "jnp.bfloat16, a projection with a smaller dim or rank, or a mesh over more devices."
        )


def _compile(
    featurize: Featurizer, params: Params, example: Example, block: int, place: Placement
) -> Any:
    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place.sharding())

    def batched(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((block, *x.shape), x.dtype, sharding=place.sharding(DATA))

    kept = jax.tree.map(lambda x: x if _is_spread(x) else shape(x), params)
    ids = jax.ShapeDtypeStruct((), np.dtype(np.int32))
    batch = jax.tree.map(batched, (example, ids))
    fitted, drawn = jax.tree.map(shape, _shapes_beside(featurize))
    step = place.jit(lambda *arguments: featurize.step(*arguments), DATA)
    return step.lower(shape(featurize.key), kept, *batch, drawn, fitted).compile()


def _shapes_beside(featurize: Featurizer) -> tuple[Fitted, Drawn]:
    """Shapes of what is fitted and drawn."""

    def side(f: Factored, size: int, rank: int) -> Any:
        return jax.ShapeDtypeStruct((*f.lead, size, rank), f.dtype)

    basis: Any = featurize.rule.projection.basis
    if not isinstance(basis, Fits):
        return NOTHING, jax.eval_shape(featurize.draw)
    sides: dict[str, Sides] = {
        f.map.leaf: (side(f, f.rows, f.left), side(f, f.map.size_out, f.right))
        for f in featurize.plan.factored
    }
    fitted = Fitted(sides, {}, None, {})
    return fitted, jax.eval_shape(lambda: featurize.draw(0, fitted))


def _is_spread(x: Any) -> bool:
    return isinstance(x, jax.Array) and len(x.sharding.device_set) > 1


def _local_bytes(tree: Any) -> int:
    """Bytes of a pytree on one device, as it is sharded."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if _is_spread(leaf) else leaf.shape
        total += math.prod(shape) * np.dtype(leaf.dtype).itemsize
    return total


def size_in_words(count: float) -> str:
    """Returns a number of bytes as people read it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.4g} TiB"
