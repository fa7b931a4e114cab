"""Where arrays live: on one device, or over a mesh of many, on one host or on several.

Training examples go over the mesh axis `data`; columns of stored features over `model`, if the mesh
has such an axis. Parameters keep whatever sharding the training job gave them. Without a mesh all
is on the default device, so that the rest of the library is written once.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxattr.inputs.arrays import check_context, placed, with_auto_axes
from jaxattr.typing import Batch

DATA, MODEL = "data", "model"


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, or the default device. Made by `placement`.

    Attributes:
      mesh: the mesh, with axes that the compiler may use as it likes; or None.
    """

    mesh: Mesh | None = None

    @property
    def shards(self) -> int:
        """Over how many devices examples are spread."""
        return 1 if self.mesh is None else self.mesh.shape[DATA]

    @property
    def columns(self) -> int:
        """Over how many devices the columns of stored features are spread."""
        return 1 if self.mesh is None else self.mesh.shape.get(MODEL, 1)

    def sharding(self, *axes: str | None) -> NamedSharding | None:
        """How an array is spread: one name of a mesh axis, or None, per array axis."""
        return None if self.mesh is None else NamedSharding(self.mesh, _spec(self.mesh, axes))

    def jit(self, function: Callable, *axes: str | None, **options: Any) -> Any:
        """`jax.jit`, with all outputs spread as `sharding(*axes)`."""
        sharding = self.sharding(*axes)
        outputs: dict[str, Any] = {} if sharding is None else {"out_shardings": sharding}
        return jax.jit(function, **options, **outputs)

    def over_shards(
        self, function: Callable, inputs: Sequence[Any], outputs: Any
    ) -> Callable[..., Any]:
        """Runs a function on each device's own part; what it sums or gathers is all that moves.

        Args:
          function: of local arrays; may call `sum_columns`, `sum_shards`, `gather_shards` and
            `shard`.
          inputs: per argument, the axes as in `sharding`, as a tuple; a pytree prefix. Or a
            function that makes them of the argument.
          outputs: the same of the result.

        Returns:
          The function of global arrays; the function itself without a mesh.
        """
        if self.mesh is None:
            return function
        spec = functools.partial(_spec, self.mesh)

        def specs(tree: Any) -> Any:
            return jax.tree.map(spec, tree, is_leaf=_is_axes)

        def spread(*arguments: Any) -> Any:
            given = zip(inputs, arguments, strict=True)
            axes = [each(argument) if callable(each) else each for each, argument in given]
            return jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=tuple(specs(each) for each in axes),
                out_specs=specs(outputs),
                check_vma=False,
            )(*arguments)

        return spread

    def shard(self) -> jax.Array | int:
        """Inside `over_shards`: the number of this part of the examples."""
        return 0 if self.mesh is None else jax.lax.axis_index(DATA)

    def column(self) -> jax.Array | int:
        """Inside `over_shards`: the number of this part of the columns."""
        return 0 if self.columns == 1 else jax.lax.axis_index(MODEL)

    def sum_columns(self, x: Any) -> Any:
        """Inside `over_shards`: sums what was computed from each device's own columns."""
        return x if self.columns == 1 else jax.lax.psum(x, MODEL)

    def sum_shards(self, x: Any) -> Any:
        """Inside `over_shards`: sums over the parts of all examples."""
        return x if self.mesh is None else jax.lax.psum(x, DATA)

    def largest_of_shards(self, x: jax.Array) -> jax.Array:
        """Inside `over_shards`: the elementwise maximum over the parts of all examples."""
        return x if self.mesh is None else jax.lax.pmax(x, DATA)

    def gather_shards(self, x: Any) -> Any:
        """Inside `over_shards`: stacks the parts of all examples, in a new leading axis."""
        if self.mesh is None:
            return jax.tree.map(lambda leaf: leaf[None], x)
        return jax.lax.all_gather(x, DATA)

    def per_shard(self, function: Callable) -> Callable:
        """Makes a function of examples one that works on each shard's own.

        The results get a leading axis of shards, so that sums over examples stay where they are
        until `sum_of_shards`.

        Args:
          function: (shared, arrays [b, ...], ...) -> a pytree of arrays.

        Returns:
          (shared, arrays [b, ...], ...) -> arrays [shards, ...].
        """
        shards = self.shards
        if shards == 1:
            return lambda *args: jax.tree.map(lambda x: x[None], function(*args))

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(shards, x.shape[0] // shards, *x.shape[1:])

        def run(shared: Any, *args: Any) -> Any:
            parts = jax.tree.map(split, args)
            parts = jax.lax.with_sharding_constraint(parts, self.sharding(DATA))
            of_one = functools.partial(function, shared)
            return jax.vmap(of_one, spmd_axis_name=DATA)(*parts)

        return run

    def sum_of_shards(self, tree: Any) -> Any:
        """Sums over the leading axis of shards; every device gets the result."""
        return compiled(self, _summed)(tree)

    def zeros(self, shapes: Any, axes: Callable[[Any], tuple[str | None, ...]]) -> Any:
        """Makes zeros, in one program.

        Args:
          shapes: a pytree of shapes.
          axes: of the path of each, as in `jax.tree_util`: how it is spread, as in `sharding`.
        """
        paths, structure = jax.tree_util.tree_flatten_with_path(shapes)
        canonical = jax.dtypes.canonicalize_dtype
        described = tuple((leaf.shape, canonical(leaf.dtype), axes(path)) for path, leaf in paths)
        return jax.tree.unflatten(structure, _compiled_zeros(self, described)())

    def batch(self, read: Callable[[np.ndarray], Batch], rows: np.ndarray) -> Batch:
        """Reads examples; each host reads its own alone.

        Args:
          read: positions -> a batch.
          rows: positions [b]; b is a multiple of `shards`.

        Returns:
          A pytree of arrays [b, ...] over `data`.
        """
        sharding = self.sharding(DATA)
        if sharding is None:
            return jax.device_put(read(rows))
        spans = self._own(len(rows))
        local = _local_slices(spans)
        mine = read(np.concatenate([rows[a:b] for a, b in spans]))

        def spread(leaf: Any) -> jax.Array:
            def part(index: tuple[slice, ...]) -> Any:
                return leaf[local[_span(index[0], len(rows))]]

            return _from_parts((len(rows), *leaf.shape[1:]), sharding, part)

        return jax.tree.map(spread, mine)

    def blocks(self, rows: np.ndarray, block: int, axes: Sequence[str | None]) -> jax.Array:
        """Puts this host's rows of some blocks on its devices.

        Args:
          rows: [g, local rows, ...], those of `local_spans(block)` of each of g blocks.
          block: rows of a whole block.
          axes: as in `sharding`, of [g, block, ...].

        Returns:
          The array [g, block, ...].
        """
        sharding = self.sharding(*axes)
        if sharding is None:
            return jax.device_put(rows)
        local = _local_slices(self._own(block))

        def part(index: tuple[slice, ...]) -> np.ndarray:
            return rows[:, local[_span(index[1], block)], :, index[3]]

        return _from_parts((rows.shape[0], block, *rows.shape[2:]), sharding, part)

    def whole(self, tree: Any) -> Any:
        """Puts arrays that every host has on every device; those that are spread stay so.

        Without a mesh NumPy's go to the default device: as they are, each program would send them.
        """
        if self.mesh is None:
            # Copied on a CPU as well, where what is written to them later would be seen.
            put = functools.partial(jax.device_put, may_alias=False)
            is_numpy = (np.ndarray, np.generic)
            return jax.tree.map(lambda x: put(x) if isinstance(x, is_numpy) else x, tree)
        return jax.tree.map(functools.partial(_place, self.mesh), tree)

    def shared(self, tree: Any) -> Any:
        """As `whole` on a mesh; without one as they are, NumPy's on the host until used.

        Those are copied where their owner could write to them.
        """
        if self.mesh is not None:
            return self.whole(tree)
        copies: dict[int, np.ndarray] = {}  # checkpoints may hold the same array

        def own(x: Any) -> Any:
            if not (isinstance(x, np.ndarray) and x.flags.writeable):
                return x
            if id(x) not in copies:
                copies[id(x)] = x.copy()
            return copies[id(x)]

        return jax.tree.map(own, tree)

    def host(self, x: Any) -> np.ndarray:
        """Returns the whole array on every host."""
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    def gathered(self, x: jax.Array) -> jax.Array:
        """Returns the array, the same on every device."""
        if self.mesh is None:
            return x
        gathered = compiled(self, _identity)(x)
        # Several programs that wait for each other's devices can starve the few threads of a host.
        on_host = self.mesh.devices.flat[0].platform == "cpu"
        return jax.block_until_ready(gathered) if on_host else gathered

    def local_spans(self, rows: int) -> list[tuple[int, int]]:
        """Returns the runs of consecutive rows of a block that this host holds."""
        return _joined(self._own(rows))

    def owned_spans(self, rows: int) -> list[tuple[int, int]]:
        """Returns those of `local_spans` that are this host's to write.

        Where the columns go over hosts, several have the same rows: the first of them writes.
        """
        mine = jax.process_index()
        return _joined([span for span, held in self._holders(rows).items() if min(held) == mine])

    def agreed(self, tree: Any) -> Any:
        """Takes the first process's arrays on all: decompositions may differ by the last bits.

        Arrays that are spread over processes are the same everywhere, and stay.
        """
        if jax.process_count() == 1:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        own = [i for i, x in enumerate(leaves) if getattr(x, "is_fully_addressable", True)]
        shared = multihost_utils.broadcast_one_to_all([np.asarray(leaves[i]) for i in own])
        for i, value in zip(own, shared, strict=True):
            leaves[i] = jnp.asarray(value)
        return jax.tree.unflatten(structure, leaves)

    def boundaries(self, rows: int) -> list[int]:
        """Returns where rows of one host end and those of another begin, of all hosts."""
        holders = self._holders(rows)
        hosts = set().union(*holders.values())
        runs = [_joined([span for span in holders if host in holders[span]]) for host in hosts]
        return sorted({edge for spans in runs for span in spans for edge in span})

    def _own(self, rows: int) -> list[tuple[int, int]]:
        """The spans of a block that this host holds, in order."""
        mine = jax.process_index()
        return [span for span, held in self._holders(rows).items() if mine in held]

    def _holders(self, rows: int) -> dict[tuple[int, int], set[int]]:
        """Which processes hold each device's span of a block, in order of the spans."""
        sharding = self.sharding(DATA)
        if sharding is None:
            return {(0, rows): {jax.process_index()}}
        holders: dict[tuple[int, int], set[int]] = {}
        places: dict[Any, Any] = dict(sharding.devices_indices_map((rows,)))
        for device, index in places.items():
            holders.setdefault(_span(index[0], rows), set()).add(device.process_index)
        return dict(sorted(holders.items()))


def placement(mesh: Mesh | Placement | None) -> Placement:
    """Makes a placement of a user's mesh.

    Args:
      mesh: a mesh with an axis "data", and optionally "model" and others; or None.

    Returns:
      The placement.

    Raises:
      ValueError: if it is no mesh, or the mesh has no axis "data".
    """
    if mesh is None or isinstance(mesh, Placement):
        return mesh or Placement()
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh must be a jax.sharding.Mesh, got {mesh!r} of type {type(mesh).__name__}. A mesh "
            "names the axes of a grid of devices; of all devices along one axis it is "
            'jax.make_mesh((jax.device_count(),), ("data",)).'
        )
    check_context()
    if DATA not in mesh.axis_names:
        raise ValueError(
            f'The mesh has axes {mesh.axis_names}; training examples go over an axis named "data". '
            "Make one over the same devices, such as jax.make_mesh((jax.device_count(),), "
            '("data",)); parameters keep the sharding that they have.'
        )
    return Placement(with_auto_axes(mesh))


def process() -> tuple[int, int]:
    """Returns the number of this process, and how many there are."""
    return jax.process_index(), jax.process_count()


def agree(problem: str | None) -> str | None:
    """Tells every process of the first one that has a problem, so that none waits for it.

    Args:
      problem: this process's problem, or None.

    Returns:
      The problem of some process, or None if there is none.
    """
    if jax.process_count() == 1:
        return problem
    encoded = np.frombuffer((problem or "").encode()[:2048].ljust(2048, b"\0"), np.uint8)
    everywhere = np.asarray(multihost_utils.process_allgather(encoded))
    said = (bytes(each).rstrip(b"\0").decode(errors="replace") for each in everywhere)
    return next(filter(None, said), None)


class OtherProcessError(RuntimeError):
    """Another process of the job failed, and says why."""


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Makes a failure of one process within it one of all, at its end, so that none waits.

    Raises:
      OtherProcessError: where it was another process that failed.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    shared = agree(None if problem is None else f"{type(problem).__name__}: {problem}")
    if problem is not None:
        raise problem
    if shared is not None:
        raise OtherProcessError(f"Another process failed. {shared}")


def barrier(name: str) -> None:
    """Waits until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _is_axes(x: Any) -> bool:
    return type(x) is tuple and all(axis is None or isinstance(axis, str) for axis in x)


def _spec(mesh: Mesh, axes: Sequence[str | None]) -> PartitionSpec:
    """The axes that the mesh has; arrays are whole along others."""
    return PartitionSpec(*(axis if axis in mesh.axis_names else None for axis in axes))


def _local_slices(spans: Sequence[tuple[int, int]]) -> dict[tuple[int, int], slice]:
    """Where each span lies when they are put one after the other."""
    ends = np.cumsum([stop - start for start, stop in spans]).tolist()
    return {
        (start, stop): slice(end - (stop - start), end)
        for (start, stop), end in zip(spans, ends, strict=True)
    }


def _span(index: slice, size: int) -> tuple[int, int]:
    return index.start or 0, size if index.stop is None else index.stop


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _from_parts(
    shape: tuple[int, ...], sharding: NamedSharding, part: Callable[[tuple[slice, ...]], Any]
) -> jax.Array:
    places = sharding.addressable_devices_indices_map(shape)
    parts = [jax.device_put(part(index or ()), device) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _place(mesh: Mesh, leaf: Any) -> Any:
    if isinstance(leaf, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec()))
    if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
        if leaf.sharding.device_set == set(mesh.devices.flat):
            return placed(leaf)
    replicated = NamedSharding(mesh, PartitionSpec())
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _place(mesh, jax.random.key_data(leaf))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    value = np.asarray(leaf)
    value = value.astype(jax.dtypes.canonicalize_dtype(value.dtype))
    return jax.make_array_from_callback(value.shape, replicated, lambda index: value[index])


@functools.lru_cache(maxsize=32)
def _compiled_zeros(place: Placement, described: tuple[tuple, ...]) -> Any:
    def make() -> list[jax.Array]:
        return [jnp.zeros(shape, dtype) for shape, dtype, _ in described]

    if place.mesh is None:
        return jax.jit(make)
    return jax.jit(make, out_shardings=[place.sharding(*axes) for _, _, axes in described])


def _summed(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sum(axis=0, dtype=x.dtype), tree)


def _identity(x: jax.Array) -> jax.Array:
    return x


@functools.lru_cache(maxsize=64)
def compiled(place: Placement, function: Callable, *axes: str, **options: Any) -> Any:
    """The function, compiled once for each placement."""
    return place.jit(function, *axes, **options)


def split_rows(rows: int, place: Placement) -> int:
    """Returns the smallest number of rows, at least as many, that all shards can share.

    Args:
      rows: wanted.
      place: the placement.

    Returns:
      A multiple of the number of shards.
    """
    return -(-rows // place.shards) * place.shards
