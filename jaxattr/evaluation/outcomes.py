"""Outcomes for learning weights: small models retrained on subsets, asked the learning queries."""

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxattr.batches import leading_size, shapes_of_one
from jaxattr.counts import whole_number
from jaxattr.evaluation.retraining import TrainFn, asking, check_number, random_subsets, trained
from jaxattr.files import local_file, read_arrays, writable_file, written_whole
from jaxattr.identity import Program, digest
from jaxattr.inputs.outputs import check_function, check_output
from jaxattr.inputs.parameters import as_checkpoints
from jaxattr.keys import check_key
from jaxattr.sharding import barrier
from jaxattr.store.folder import on_first_process
from jaxattr.typing import Batch, Key, OutputFn, Params
from jaxattr.weights.outcomes import Outcomes, digest_of_queries


def outcomes(
    train_fn: TrainFn,
    output: OutputFn,
    queries: Batch,
    n: int,
    *,
    key: Key,
    models: int = 64,
    fraction: float = 0.25,
    pool: Any = None,
    strata: Any = None,
    at_once: int | None = None,
    mesh: Mesh | None = None,
    path: str | os.PathLike[str] | None = None,
    params: Params | None = None,
) -> Outcomes:
    """Trains models on random subsets and asks each the learning queries.

    One set serves every method and index of a model: `ja.learn_weights(index, queries,
    outcomes=...)`. Models may be worse than the real one, but must be trained to an end (a full
    schedule on fewer examples, not a few steps from a checkpoint, which misleads): where a quarter
    of the examples makes few steps, halve the batch. Each has a key
    of its own: from one key for all, the gain that is said would be that of one initialisation,
    and its interval too narrow (BUILD_NOTES.md).

    Args:
      train_fn: (key, ids int [s]) -> params, pure: initialisation and batches from the key, data
        from the ids, as in `ja.retrain`; `ja.trainer` makes one.
      output: (params, example, key) -> scalar, larger = more of what scores attribute: a margin, or
        minus the loss.
      queries: the learning queries, a pytree of arrays [q, ...].
      n: number of training examples of the index.
      key: PRNG key.
      models: number of subsets.
      fraction: share of the training set, or of the pool, in each.
      pool: how many training examples, or the ids of which, subsets are drawn from, so that n does
        not enter the cost. Default: all.
      strata: integers [n], such as labels: the share is then the same in each stratum.
      at_once: models in memory at once. Default: 16, or one per device.
      mesh: devices to spread the models over. Default: the default device.
      path: a local file (.npz) that results are kept in, whole after every chunk of models: a
        killed run goes on from there, and a finished one is read.
      params: of the real model, or a list of checkpoints: its outputs stand beside the others in
        `Outcomes.reference`.

    Returns:
      Masks and outputs. Those that are not finite are left to `learn_weights`, which drops and
      counts them.

    Raises:
      ValueError: if an argument is out of its range, the train function ignores its ids or has
        another number of examples, or `path` holds outcomes of something else, or none.

    Warns:
      UserWarning: if the train function ignores its key.

    Cost: models * fraction trainings: 16 by default, and 4 for 16 models.
    """
    n, models = whole_number("n", n), whole_number("models", models, least=8)
    check_function(output, "output")
    check_number(train_fn, n)
    subset_key, train_key, output_key = jax.random.split(check_key(key), 3)
    masks = _subsets(subset_key, n, models, fraction, pool, strata)
    size = int(masks[0].sum())
    queries, ask = asking(train_fn, output, queries, (train_key, output_key), size)
    real = () if params is None else as_checkpoints(params)
    for each in real:
        check_output(output, each, shapes_of_one(queries), output_key)
    found, done = np.full((models, leading_size(queries)), np.nan), 0
    file, identity = None if path is None else local_file(path), ""
    if file is not None:
        if file.suffix != ".npz":
            raise ValueError(f"path must end in .npz, got {str(file)!r}.")
        identity = _identity(train_fn, ask, masks, train_key, size)
        if file.exists():
            found, done = _read(file, identity, found.shape)
    if done < models:
        if file is not None:
            writable_file(file)  # before the models, which take long
        keys = jax.random.split(train_key, models)
        chunks = trained(train_fn, masks, keys, at_once=at_once, mesh=mesh, then=ask, done=done)
        for chunk in chunks:
            found[done : done + len(chunk)] = chunk
            done += len(chunk)
            if file is not None:
                on_first_process(functools.partial(_write, file, identity, found, done))
                barrier("outcomes written")
    of_real = np.mean([np.asarray(jax.jit(ask)(each)) for each in real], axis=0) if real else None
    return Outcomes(masks, found, digest_of_queries(queries), of_real)


def _subsets(key: Key, n: int, models: int, fraction: float, pool: Any, strata: Any) -> np.ndarray:
    """Masks [models, n], of examples of the pool alone."""
    strata = None if strata is None else np.asarray(strata)
    if strata is not None and strata.shape != (n,):
        raise ValueError(f"strata must be integers [{n}], got shape {strata.shape}.")
    pool = np.arange(n) if pool is None else np.asarray(pool)
    if pool.ndim == 0:
        count = whole_number("pool", pool.item())
        if count > n:
            raise ValueError(f"A pool of {count} of {n} training examples is more than there are.")
        data = np.asarray(jax.random.key_data(jax.random.fold_in(key, 1)))
        pool = np.random.default_rng(data).choice(n, count, replace=False)
    elif pool.ndim != 1 or pool.dtype.kind not in "iu" or not ((pool >= 0) & (pool < n)).all():
        raise ValueError(
            f"pool must be how many training examples subsets are drawn from, or ids of such "
            f"between 0 and {n - 1}; got {pool.dtype} {list(pool.shape)}."
        )
    pool = np.unique(pool)
    strata = None if strata is None else strata[pool]
    masks = np.zeros((models, n), bool)
    masks[:, pool] = random_subsets(key, len(pool), models, fraction=fraction, strata=strata)
    return masks


def _identity(train_fn: TrainFn, ask: Any, masks: np.ndarray, key: Key, size: int) -> str:
    """A digest of all that outcomes depend on."""

    def run(key: Key, ids: jax.Array) -> jax.Array:
        return ask(train_fn(key, ids))

    program = Program(run, (key, jax.ShapeDtypeStruct((size,), jnp.int32))).digest
    data = np.asarray(jax.random.key_data(key)).tolist()
    return digest([program, data, 1, np.packbits(masks).tobytes().hex(), list(masks.shape)])


def _read(file: Path, identity: str, shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """What an earlier run left of these outcomes [models, q], and of how many models."""
    remedy = "Give another path, or remove the file."
    try:
        stored = read_arrays(file)
    except ValueError as error:
        raise ValueError(f"{error} {remedy}") from error
    if stored.keys() != {"identity", "outputs", "done"}:
        raise ValueError(f"{file} holds no outcomes: its arrays are {sorted(stored)}. {remedy}")
    found, done = stored["outputs"], stored["done"]
    if str(stored["identity"]) != identity:
        if found.ndim == 2 and found.shape != shape:
            raise ValueError(
                f"{file} holds outcomes of {found.shape[0]} models on {found.shape[1]} queries; "
                f"{shape[0]} on {shape[1]} were asked for, which are of other subsets. {remedy}"
            )
        raise ValueError(
            f"{file} holds outcomes of something else: the training function or its data, "
            f"the output, the queries, the subsets or the key differ. {remedy}"
        )
    whole = done.shape == () and done.dtype.kind in "iu" and 0 <= done <= shape[0]
    if found.shape != shape or found.dtype.kind != "f" or not whole:
        raise ValueError(
            f"{file} is damaged: its outputs are {found.dtype} {list(found.shape)}, of which "
            f"{done} are said to be there; {list(shape)} are needed. {remedy}"
        )
    return found, int(done)


def _write(file: Path, identity: str, outputs: np.ndarray, done: int) -> None:
    with written_whole(file) as partial:
        np.savez(partial, identity=identity, outputs=outputs, done=done)
