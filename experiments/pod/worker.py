"""One host of the job: what would run on every host of a pod, and the same on one device.

The launcher starts it, see `experiments.pod.launching`; all that differs between a pod and one
device is `jax.distributed.initialize` and the mesh.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

import jaxattr as ja
from experiments.pod import lowering, model
from experiments.pod.data import RowFiles
from jaxattr import language
from jaxattr.weights.report import WeightWarning

METHODS = ("ekfac", "logra")
BLOCK, TOP, READING = 8, 5, 0.01
MODEL_AXIS = 2


class Job(NamedTuple):
    """What a host needs.

    Attributes:
      folder: of the run; rows, queries and checkpoint are in it.
      own: of this job, for its indexes and what it finds.
      mesh: of all hosts' devices, or None.
      subject: the model.
    """

    folder: Path
    own: Path
    mesh: Mesh | None
    subject: model.Subject


def main() -> None:
    """Restores, builds, attributes, and writes what it found."""
    given = _arguments()
    warnings.simplefilter("ignore", WeightWarning)  # few queries, and weights are compared only
    warnings.simplefilter("ignore", ja.TruncationWarning)
    jax.config.update("jax_compilation_cache_dir", f"{given.own}/compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    mesh = None
    if given.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{given.port}", given.processes, given.process)
        shape = (jax.device_count() // MODEL_AXIS, MODEL_AXIS)
        mesh = jax.make_mesh(shape, ("data", "model"))
    subject = model.make(model.Types(given.activations, given.dtype))
    run(Job(given.folder.absolute(), given.own.absolute(), mesh, subject))


def run(job: Job) -> None:
    """Does all that is compared.

    Args:
      job: what the host needs.
    """
    checkpoint, queries = job.folder / "checkpoint", _columns(job.folder / "queries")
    if not checkpoint.exists():
        _save(checkpoint, model.trained(job.subject, _columns(job.folder / "rows")))
    params = restored(job, checkpoint).params
    found: dict[str, Any] = {}
    reads = {}
    for name in METHODS:
        rows = RowFiles(job.folder / "rows", READING if job.mesh is not None else 0.0)
        index = ja.build_index(
            method_of(name, job.subject.loss), params, grain.MapDataset.source(rows),
            batch_size=BLOCK, mesh=job.mesh, path=job.own / name,
        )  # fmt: skip
        reads[name] = rows.read
        found |= {f"{name}/{key}": value for key, value in findings(index, queries).items()}
        if job.mesh is not None:
            moved = lowering.steps(index, _columns(job.folder / "rows"), queries)
            if jax.process_index() == 0:
                (job.own / f"{name}-steps.json").write_text(json.dumps(moved))
    number = jax.process_index()
    (job.own / f"reads-{number}.json").write_text(json.dumps(reads))
    if number == 0:
        np.savez(job.own / "found.npz", **found)


def method_of(name: str, loss: Any) -> ja.Method:
    """Makes one of `METHODS`, small.

    Args:
      name: of the method.
      loss: of a packed row.
    """
    return ja.ekfac(loss, rank=16) if name == "ekfac" else ja.logra(loss, rank=8)


def restored(job: Job, checkpoint: Path) -> model.TrainState:
    """Restores a state; every host reads the parts that its devices have.

    Args:
      job: what the host needs.
      checkpoint: the path.
    """
    shapes = jax.eval_shape(job.subject.start)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(checkpoint, model.places(shapes, job.mesh))


def findings(index: ja.Index, queries: Any) -> dict[str, np.ndarray]:
    """What must not depend on hosts, devices, or a death on the way.

    Args:
      index: the index.
      queries: rows.

    Returns:
      Arrays by name.
    """
    fit = ja.learn_weights(index, queries, top_k=TOP, steps=50)
    top = ja.top_k(index, queries, k=TOP, weights=fit)
    tokens = ja.score(index, language.token_features(index, queries))
    weights = np.array([fit.weights[name] for name in index.layout.names])
    found = {
        "scores": ja.score(index, queries), "weights": weights, "token scores": tokens,
        "weighted": ja.score(index, queries, weights=fit), "top k": top.scores, "ids": top.ids,
    }  # fmt: skip
    return {name: np.asarray(value) for name, value in found.items()}


def _save(path: Path, state: model.TrainState) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)


def _columns(folder: Path) -> language.Rows:
    return {path.stem: np.load(path) for path in sorted(folder.glob("*.npy"))}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--own", type=Path, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--activations", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
