"""Training on many subsets of the training set at once: the ground truth of attribution."""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxattr.batches import leading_size, shapes_of_one
from jaxattr.counts import real_number, whole_number
from jaxattr.inputs.data import as_batch
from jaxattr.inputs.outputs import check_function, check_output, runs
from jaxattr.inputs.traces import read_inputs
from jaxattr.inputs.wording import brief
from jaxattr.keys import check_key, key_or_default
from jaxattr.scores.subsets import checked_masks
from jaxattr.sharding import DATA, Placement, placement, split_rows
from jaxattr.sources import track
from jaxattr.typing import Batch, Key, OutputFn, Params

# Models in memory at once, where nothing is said: few enough to show progress, and to resume.
_AT_ONCE = 16

TrainFn = Callable[[Key, jax.Array], Params]
"""(key, ids int [s]) -> params: trains from scratch on the examples that ids name. Pure."""


def random_subsets(
    key: Key,
    n: int,
    count: int,
    *,
    fraction: float = 0.5,
    strata: Any = None,
) -> np.ndarray:
    """Draws subsets of one size, without replacement.

    Args:
      key: PRNG key.
      n: number of training examples.
      count: number of subsets.
      fraction: share of the training set in each, between 0 and 1, both excluded.
      strata: integers [n], such as labels: the share is then the same in each stratum.

    Returns:
      Masks, bool [count, n]; every row has the same number of True.

    Raises:
      ValueError: if a subset would be empty or the whole set.

    Example:
      >>> masks = random_subsets(jax.random.key(0), 10, 4)
      >>> masks.shape, masks.sum(axis=1)
      ((4, 10), array([5, 5, 5, 5]))
    """
    n, count = whole_number("n", n), whole_number("count", count)
    strata = np.zeros(n, np.int64) if strata is None else np.asarray(strata)
    if strata.shape != (n,):
        raise ValueError(f"strata must be integers [{n}], got shape {strata.shape}.")
    missing = np.flatnonzero(strata != strata)  # NaN, in columns with gaps
    if len(missing):
        raise ValueError(
            f"strata must have a value for each example, and {len(missing)} are NaN, at positions "
            f"{missing[:10].tolist()}: give these one of their own."
        )
    members = [np.flatnonzero(strata == value) for value in np.unique(strata)]
    share = real_number("fraction", fraction)  # one of NaN has no size
    sizes = [round(share * len(ids)) for ids in members] if 0 < share < 1 else []
    if not 0 < sum(sizes) < n:
        raise ValueError(
            f"A fraction of {fraction} of {n} training examples is {sum(sizes)}: needed more than "
            "none and fewer than all."
        )
    generator = np.random.default_rng(np.asarray(jax.random.key_data(check_key(key))))
    masks = np.zeros((count, n), bool)
    for mask in masks:
        for ids, size in zip(members, sizes, strict=True):
            mask[generator.choice(ids, size, replace=False)] = True
    return masks


def retrain(
    train_fn: TrainFn,
    masks: Any,
    key: Key,
    *,
    seeds: int = 1,
    at_once: int | None = None,
    mesh: Mesh | None = None,
) -> Params:
    """Trains one model per subset and seed, many at once.

    All subsets are trained from the same `seeds` keys, so that models differ by their data and not
    by their luck.

    Args:
      train_fn: (key, ids int [s]) -> params, pure: initialisation and batches from the key, data
        from the ids. It is vmapped, so it must not depend on values outside JAX.
      masks: bool [m, n], all rows with the same number s of True.
      key: PRNG key.
      seeds: models per subset. Their mean is closer to the expected output.
      at_once: models in memory at once; with a mesh, on all its devices together. Default: all.
      mesh: devices to spread the models over, of one process or of several that all call this
        with the same arguments. Default: the default device.

    Returns:
      Params whose leaves are [m, seeds, ...]. With several processes each gets all of them.

    Raises:
      ValueError: if subsets differ in size, the train function ignores its ids or has another
        number of examples, or the key, a count or the mesh is none.

    Warns:
      UserWarning: if runs ended with parameters that are not finite.

    Cost: m * seeds trainings; vmapped, small models take little more time together than one.
    """
    masks, seeds = _of_one_size(masks), whole_number("seeds", seeds)
    keys = jax.random.split(check_key(key), seeds)
    check_number(train_fn, masks.shape[1])
    at_once = len(masks) * seeds if at_once is None else at_once
    chunks = trained(train_fn, masks, keys, seeds=seeds, at_once=at_once, mesh=mesh)
    params = jax.tree.map(lambda *parts: jnp.concatenate(parts), *chunks)
    _warn_of_divergence(params, seeds)
    return jax.tree.map(lambda leaf: leaf.reshape(len(masks), seeds, *leaf.shape[1:]), params)


def trained(
    train_fn: TrainFn,
    masks: np.ndarray,
    keys: Key,
    *,
    seeds: int = 1,
    at_once: int | None = None,
    mesh: Mesh | None = None,
    then: Callable[[Params], Any] = lambda params: params,
    done: int = 0,
) -> Iterator[Any]:
    """Trains one model after the other, some at once.

    Args:
      train_fn: as in `retrain`, as all that follow.
      masks: see there.
      keys: one per run, or one per seed that all subsets share.
      seeds: see there.
      at_once: models in memory at once. Default: 16, or one per device.
      mesh: see there.
      then: what is wanted of a model, of its parameters; pure.
      done: runs that need not be made again.

    Yields:
      What is wanted of the next runs, stacked; run i is of subset i // seeds and seed i % seeds.
    """
    ids = np.stack([np.flatnonzero(mask) for mask in masks])  # [m, s]
    count, place = len(ids) * seeds, placement(mesh)
    at_once = max(_AT_ONCE, place.shards) if at_once is None else whole_number("at_once", at_once)
    check_inputs_matter(train_fn, keys[0], ids[0])
    at_once = split_rows(min(count, at_once), place)

    def run(key: Key, ids: jax.Array) -> Any:
        return then(train_fn(key, ids))

    train = jax.jit(place.over_shards(jax.vmap(run), ((DATA,), (DATA,)), (DATA,)))
    starts = range(done, count, at_once)
    for start in track(iter(starts), "retraining", len(starts)):
        wanted = np.minimum(np.arange(start, start + at_once), count - 1)
        given = place.whole((keys[wanted % len(keys)], jnp.asarray(ids[wanted // seeds])))
        found = jax.tree.map(functools.partial(_everywhere, place), train(*given))
        yield jax.tree.map(lambda leaf, start=start: leaf[: count - start], found)


def outputs(
    output_fn: OutputFn, params: Params, queries: Batch, *, key: Key | None = None
) -> jax.Array:
    """Outputs of retrained models on queries, averaged over seeds.

    Args:
      output_fn: (params, example, key) -> scalar; larger = more of it, so a margin or minus a loss.
      params: leaves [m, seeds, ...], as `retrain` returns them.
      queries: a pytree of arrays [q, ...].
      key: key of a stochastic output; query i gets the same randomness from every model.

    Returns:
      Float [m, q].
    """
    key = key_or_default(key)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), params)
    on_queries = of_queries(output_fn, one, queries, key)

    def of_subset(params: Params) -> jax.Array:
        return jax.vmap(on_queries)(params).mean(axis=0)

    # One subset at a time bounds the memory.
    return jax.jit(functools.partial(jax.lax.map, of_subset))(params)


def of_queries(
    output_fn: OutputFn, params: Params, queries: Batch, key: Key
) -> Callable[[Params], jax.Array]:
    """Makes a function from parameters to the outputs on all queries, [q].

    Args:
      output_fn: (params, example, key) -> scalar.
      params: of one model, or their shapes.
      queries: a pytree of arrays [q, ...].
      key: of a stochastic output; query i gets the same randomness from every model.

    Raises:
      ValueError: if the output is no scalar.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(leading_size(queries)))
    check_output(output_fn, params, shapes_of_one(queries), key)
    on_queries = jax.vmap(output_fn, in_axes=(None, 0, 0))
    return lambda params: on_queries(params, queries, keys)


def asking(
    train_fn: TrainFn, output_fn: OutputFn, queries: Any, keys: Sequence[Key], size: int
) -> tuple[Batch, Callable[[Params], jax.Array]]:
    """Looks at what is trained and asked; returns queries as arrays, and `of_queries` of them.

    Args:
      train_fn: (key, ids) -> params.
      output_fn: (params, example, key) -> scalar; its caller has looked at it, by its own name.
      queries: of a user, [q, ...].
      keys: of training and of the output.
      size: number of ids of a subset.
    """
    check_function(train_fn, "train_fn", ("key", "ids"))
    ids = jax.ShapeDtypeStruct((size,), jnp.int32)
    with _explaining_training(train_fn, keys[0], ids):
        shapes = jax.eval_shape(train_fn, keys[0], ids)
    queries = as_batch(queries, "queries", functools.partial(runs, output_fn, shapes))
    return queries, of_queries(output_fn, shapes, queries, keys[1])


def _everywhere(place: Placement, leaf: jax.Array) -> jax.Array:
    """The whole array on every process, for all that is done with models from then on."""
    return leaf if leaf.is_fully_addressable else jnp.asarray(place.host(leaf))


def _of_one_size(masks: Any) -> np.ndarray:
    masks = checked_masks(masks)
    sizes = masks.sum(axis=1)
    if len(set(sizes)) != 1 or not sizes[0]:
        raise ValueError(
            "All subsets need the same number of examples, at least one, so that they can be "
            f"trained together; got sizes from {sizes.min()} to {sizes.max()}. "
            "See `random_subsets`."
        )
    return masks


@contextlib.contextmanager
def _explaining_training(train_fn: TrainFn, key: Key, ids: Any) -> Iterator[None]:
    """Where tracing a train function fails, says what it must be made of."""
    try:
        yield
    except Exception as error:
        if _traces(train_fn, ids, key):
            raise TypeError(
                "train_fn is called as (key, ids), and takes them the other way round. Write: "
                "lambda key, ids: train_fn(ids, key)."
            ) from None
        if not isinstance(error, jax.errors.JAXTypeError | jax.errors.JAXIndexError):
            raise
        raise ValueError(
            f"train_fn cannot be traced: {type(error).__name__}: {brief(error, 200)} Many models "
            "are trained at once, by one compiled program, so it must be JAX alone: "
            "jax.random.permutation for NumPy's, jax.lax.scan for a loop over steps; ja.trainer "
            "makes one. Or train models elsewhere, and pass ja.Outcomes(masks, outputs)."
        ) from error


def _traces(function: Callable[..., Any], *arguments: Any) -> bool:
    try:
        jax.eval_shape(function, *arguments)
    except Exception:
        return False
    return True


def check_number(train_fn: TrainFn, n: int) -> None:
    """Refuses a train function of another number of examples, where it says of how many it is.

    Beyond the last JAX takes the last again, so that subsets would not be what masks say.

    Args:
      train_fn: (key, ids) -> params; that of `ja.trainer` has `examples`.
      n: number of training examples.
    """
    has = getattr(inspect.unwrap(train_fn), "examples", None)
    if has is not None and has != n:
        raise ValueError(
            f"train_fn was made of {has} training examples, and subsets of {n} are asked for: make "
            "it of the training set of the index, ja.trainer(loss, start, train, ...)."
        )


def check_inputs_matter(train_fn: TrainFn, key: Key, ids: np.ndarray) -> None:
    """Refuses a train function that ignores its ids, and warns of one that ignores its key.

    Args:
      train_fn: (key, ids) -> params.
      key: any.
      ids: of one subset, [s].
    """
    check_function(train_fn, "train_fn", ("key", "ids"))
    with _explaining_training(train_fn, key, ids):
        closed = jax.make_jaxpr(train_fn)(key, ids)
    keyed, identified = read_inputs(closed.jaxpr)
    if not identified:
        raise ValueError(
            "train_fn ignores its ids: the parameters that it returns do not depend on which "
            "examples it is given. It must train on data[ids] alone."
        )
    if not keyed:
        warnings.warn(
            "train_fn ignores its key: every seed gives the same model.", UserWarning, stacklevel=3
        )


def _warn_of_divergence(params: Params, seeds: int) -> None:
    finite = np.all(
        [
            np.asarray(jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))))
            for leaf in jax.tree.leaves(params)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        ],
        axis=0,
    )
    if not finite.all():
        subsets = sorted({int(run) // seeds for run in np.flatnonzero(~finite)})
        warnings.warn(
            f"{(~finite).sum()} of {len(finite)} retrained models have parameters that are not "
            f"finite, for subsets {subsets[:10]}: training diverged.",
            UserWarning,
            stacklevel=3,
        )
