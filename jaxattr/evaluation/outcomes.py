"""Outcomes for learning weights: small models retrained on subsets, asked the learning queries."""

import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxattr.batches import leading_size, shapes_of_one
from jaxattr.counts import whole_number
from jaxattr.evaluation.retraining import (
    AT_ONCE,
    TrainFn,
    check_number,
    explaining_training,
    models_over,
    of_queries,
    random_subsets,
    trained,
)
from jaxattr.files import local_file, read_arrays, written_whole
from jaxattr.identity import Program, digest
from jaxattr.inputs.data import as_batch
from jaxattr.inputs.outputs import check_function, check_output, runs
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
    seeds: int = 1,
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
      seeds: models per subset, over which outputs are averaged.
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

    Cost: models * seeds * fraction trainings: 16 by default, and 4 for 16 models.
    """
    n, models = whole_number("n", n), whole_number("models", models, least=8)
    key, seeds = check_key(key), whole_number("seeds", seeds)
    check_function(output, "output")
    check_function(train_fn, "train_fn", ("key", "ids"))
    check_number(train_fn, n)
    place = models_over(mesh)
    at_once = max(AT_ONCE, place.shards) if at_once is None else whole_number("at_once", at_once)
    subset_key, train_key, output_key = jax.random.split(key, 3)
    masks = _subsets(subset_key, n, models, fraction, pool, strata)
    ids = jax.ShapeDtypeStruct((int(masks[0].sum()),), jnp.int32)
    with explaining_training():
        shapes = jax.eval_shape(train_fn, train_key, ids)
    queries = as_batch(queries, "queries", functools.partial(runs, output, shapes))
    ask = of_queries(output, shapes, queries, output_key)
    real = () if params is None else as_checkpoints(params)
    for each in real:
        check_output(output, each, shapes_of_one(queries), output_key)
    kept = _Kept.opened(path, masks, seeds, leading_size(queries), lambda: _identity(
        train_fn, ask, masks, train_key, ids, seeds
    ))  # fmt: skip
    if kept.done < len(kept.outputs):
        keys = jax.random.split(train_key, len(kept.outputs))
        chunks = trained(
            train_fn, masks, keys, seeds=seeds, at_once=at_once, place=place, then=ask,
            done=kept.done,
        )  # fmt: skip
        for chunk in chunks:
            kept = kept.with_more(np.asarray(chunk))
    found = kept.outputs.reshape(models, seeds, -1).mean(axis=1)
    return Outcomes(masks, found, digest_of_queries(queries), _of_real(ask, real) if real else None)


def _subsets(key: Key, n: int, models: int, fraction: float, pool: Any, strata: Any) -> np.ndarray:
    """Masks [models, n], of examples of the pool alone."""
    strata = None if strata is None else np.asarray(strata)
    if strata is not None and strata.shape != (n,):
        raise ValueError(f"strata must be integers [{n}], got shape {strata.shape}.")
    if pool is None:
        return random_subsets(key, n, models, fraction=fraction, strata=strata)
    pool = np.asarray(pool)
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
    inner = random_subsets(
        key, len(pool), models, fraction=fraction, strata=None if strata is None else strata[pool]
    )
    masks = np.zeros((models, n), bool)
    masks[:, pool] = inner
    return masks


def _identity(
    train_fn: TrainFn, ask: Any, masks: np.ndarray, key: Key, ids: Any, seeds: int
) -> str:
    """A digest of all that outcomes depend on."""

    def run(key: Key, ids: jax.Array) -> jax.Array:
        return ask(train_fn(key, ids))

    program = Program(run, (key, ids)).digest
    data = np.asarray(jax.random.key_data(key)).tolist()
    return digest([program, data, seeds, np.packbits(masks).tobytes().hex(), list(masks.shape)])


def _of_real(ask: Any, checkpoints: tuple[Params, ...]) -> np.ndarray:
    """Outputs of the real model, the mean over its checkpoints, [q]."""
    return np.mean([np.asarray(jax.jit(ask)(each)) for each in checkpoints], axis=0)


class _Kept(NamedTuple):
    """Outputs so far, and where they are kept.

    Attributes:
      path: of the file, or None.
      identity: of what they are outputs of.
      outputs: [runs, q]; NaN where there are none yet.
      done: runs that were made.
    """

    path: Path | None
    identity: str
    outputs: np.ndarray
    done: int

    @classmethod
    def opened(cls, path: Any, masks: np.ndarray, seeds: int, q: int, identity: Any) -> "_Kept":
        """What an earlier run left, or nothing yet."""
        nothing = np.full((len(masks) * seeds, q), np.nan)
        if path is None:
            return cls(None, "", nothing, 0)
        path = local_file(path)
        if path.suffix != ".npz":
            raise ValueError(f"path must end in .npz, got {str(path)!r}.")
        made = cls(path, identity(), nothing, 0)
        return made._read() if path.exists() else made

    def _read(self) -> "_Kept":
        """What is in the file, if it is of these outcomes."""
        assert self.path is not None
        remedy = "Give another path, or remove the file."
        try:
            stored = read_arrays(self.path)
        except ValueError as error:
            raise ValueError(f"{error} {remedy}") from error
        if stored.keys() != {"identity", "outputs", "done"}:
            raise ValueError(
                f"{self.path} holds no outcomes: its arrays are {sorted(stored)}. {remedy}"
            )
        if str(stored["identity"]) != self.identity:
            raise ValueError(
                f"{self.path} holds outcomes of something else: the training function or its data, "
                f"the output, the queries, the subsets or the key differ. {remedy}"
            )
        outputs, done = stored["outputs"], stored["done"]
        runs = len(self.outputs)
        whole = done.shape == () and done.dtype.kind in "iu" and 0 <= done <= runs
        if outputs.shape != self.outputs.shape or outputs.dtype.kind != "f" or not whole:
            raise ValueError(
                f"{self.path} is damaged: its outputs are {outputs.dtype} {list(outputs.shape)}, "
                f"of which {done} are said to be there; {list(self.outputs.shape)} are needed. "
                f"{remedy}"
            )
        return self._replace(outputs=outputs, done=int(done))

    def with_more(self, chunk: np.ndarray) -> "_Kept":
        """Takes in the next runs, and writes the file whole or not at all."""
        outputs = self.outputs.copy()
        outputs[self.done : self.done + len(chunk)] = chunk
        more = self._replace(outputs=outputs, done=self.done + len(chunk))
        if more.path is not None:
            on_first_process(more._write)
            barrier("outcomes written")
        return more

    def _write(self) -> None:
        assert self.path is not None
        with written_whole(self.path) as partial:
            np.savez(partial, identity=self.identity, outputs=self.outputs, done=self.done)
