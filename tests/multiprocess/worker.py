"""One process of a job: python -m tests.multiprocess.worker PROCESS PROCESSES PORT TASK FOLDER."""

import os
import sys

if __name__ == "__main__":  # and not where a test imports what it compares with
    devices = os.environ.get("DEVICES", "2")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = flags  # the last one counts

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import jaxattr as ja
from jaxattr.features import projections
from jaxattr.store.disk_rows import DiskRows
from jaxattr.weights import learning
from tests import models

SIZE, BATCH = 61, 8
FIT = {"steps": 5, "top_k": 5}


def checkpoints():
    return [models.mlp_params(jax.random.key(i)) for i in range(2)]


def methods():
    return {
        "tracin": ja.tracin(models.loss, checkpoint_weights=[0.5, 2.0]),
        "trak": ja.trak(models.margin, projection=projections.rademacher(10)),
        "ekfac": ja.ekfac(models.loss),
        "das": ja.das(models.margin, projection=projections.rademacher(10)),
    }


class Examples:
    """Says which examples were read."""

    def __init__(self, size=SIZE):
        self.arrays = jax.tree.map(np.asarray, models.data(size))
        self.read = set()

    def __len__(self):
        return len(self.arrays["y"])

    def __getitem__(self, index):
        self.read.add(index)
        return jax.tree.map(lambda x: x[index], self.arrays)


def mesh():
    return jax.make_mesh((jax.device_count(),), ("data",))


def outcomes():
    """Of no models, but of numbers that say something of the training examples."""
    masks = ja.evaluation.random_subsets(jax.random.key(2), SIZE, 12, fraction=0.25)
    return ja.Outcomes(masks, masks @ np.random.default_rng(0).normal(size=(SIZE, 6)))


def copies():
    """Some training examples with noise, and their ids."""
    ids = np.array([3, 60, 17])
    return ja.noised(models.data(SIZE), ids, jax.random.key(3)), ids


def results(index):
    """What must not depend on how many processes there are."""
    queries = models.data(6, seed=1)
    top = ja.top_k(index, queries, k=5)
    fit = ja.learn_weights(index, queries, **FIT)
    found = {"scores": ja.score(index, queries), "ids": top.ids, "top": top.scores}
    among = (7 * np.arange(6)[:, None] + 5 * np.arange(12)) % SIZE
    with models.slabs_of(9):
        found["among"] = ja.top_k(index, queries, k=4, among=among).ids
    if index.link == "identity":
        others = models.data(6, seed=2)
        found["contrast"] = ja.score(index, ja.contrast(index, queries, others))
    found["weights"] = np.array([fit.weights[name] for name in index.layout.names])
    fit = ja.learn_weights(index, queries, outcomes=outcomes(), copies=copies())
    found["from outcomes"] = np.array([fit.weights[name] for name in index.layout.names])
    found["self"] = ja.self_influence(index)
    return {name: np.asarray(value) for name, value in found.items()}


def attribute(folder):
    """Builds with every method, in memory or on disk, and scores."""
    for name, method in methods().items():
        source, path = Examples(), f"{folder}/{name}" if name != "tracin" else None
        index = ja.build_index(
            method, checkpoints(), source, batch_size=BATCH, mesh=mesh(), path=path
        )
        if path is None:  # each process reads its own part
            assert len(source.read) < 0.75 * SIZE, len(source.read)
        else:
            index = ja.open_index(
                path, method, checkpoints(), mesh=mesh(), in_memory=name == "trak"
            )
        found = results(index)
        if jax.process_index() == 0:
            np.savez(f"{folder}/{name}.npz", **found)


def build(folder):
    """Builds one index, that the test kills and begins anew."""
    make(folder, SIZE * 5)


def make(folder, size, **options):
    method, path = methods()[os.environ["METHOD"]], f"{folder}/index"
    arguments = {"batch_size": BATCH, "mesh": mesh(), "path": path} | options
    return ja.build_index(method, checkpoints(), models.data(size), **arguments)


def compressed(folder):
    """Builds an index with a byte per feature, opens it, and scores."""
    make(folder, SIZE, dtype=np.int8)
    method = methods()[os.environ["METHOD"]]
    index = ja.open_index(f"{folder}/index", method, checkpoints(), mesh=mesh())
    queries = models.data(6, seed=1)
    top = ja.top_k(index, queries, k=4, among=np.tile(np.arange(0, SIZE, 3), (6, 1)))
    scores = np.asarray(ja.score(index, queries))
    if jax.process_index() == 0:
        np.savez(f"{folder}/compressed.npz", scores=scores, ids=np.asarray(top.ids))


def fail(folder):
    """Builds, where the disk of the second process is full after some blocks."""
    write, written = DiskRows._start_write, []

    def full(self, *arguments):
        written.append(arguments)
        if jax.process_index() == 1 and len(written) > 20:
            raise ja.StoreError("Cannot write: no space left")
        return write(self, *arguments)

    DiskRows._start_write = full
    build(folder)


def over_columns(folder):
    """Builds on a mesh whose columns go over the processes, so that both have all rows."""
    devices = np.array(jax.devices()).reshape(2, 2).T
    place = jax.sharding.Mesh(devices, ("data", "model"))
    write, mine = DiskRows._start_write, []

    def noted(self, *arguments):
        futures = write(self, *arguments)
        mine.extend(futures)
        return futures

    DiskRows._start_write = noted
    make(folder, SIZE, mesh=place)
    index = ja.open_index(f"{folder}/index", methods()["trak"], checkpoints(), mesh=place)
    found = results(index) | {"writes": len(mine)}
    np.savez(f"{folder}/{jax.process_index()}.npz", **found)


def extend(folder):
    """Extends a finished index to twice its examples, or goes on with that."""
    make(folder, SIZE * 10, extend=True)


def use(folder):
    """Learns weights from a finished index, and writes scores beside it."""
    method, queries = methods()[os.environ["METHOD"]], models.data(6, seed=1)
    index = ja.open_index(f"{folder}/index", method, checkpoints(), mesh=mesh())
    fit = ja.learn_weights(index, queries, **FIT)
    ja.score(index, queries, weights=fit.weights, path=f"{folder}/scores")


def mean_model(key, ids):
    """A model that one step of arithmetic trains."""
    x = models.data(SIZE)["x"][ids]
    return {"w": x.mean(axis=0) + jax.random.normal(key, (6,)), "steps": ids.sum()}


def retraining():
    """The arguments of `ja.retrain`, the same everywhere; the runs do not divide over devices."""
    return mean_model, ja.evaluation.random_subsets(jax.random.key(0), SIZE, 7), jax.random.key(1)


def outputs_of(retrained):
    """What is done with models next, on one process."""
    queries = models.data(6, seed=1)
    return ja.evaluation.outputs(lambda p, x, key: p["w"] @ x["x"], retrained, queries)


def retrain(folder):
    """Trains models on all processes; each uses all of them."""
    for number, at_once in enumerate((None, 3)):
        retrained = ja.retrain(*retraining(), seeds=3, at_once=at_once, mesh=mesh())
        found = {name: np.asarray(x) for name, x in retrained.items()}
        found["outputs"] = np.asarray(outputs_of(retrained))
        np.savez(f"{folder}/{number}-{jax.process_index()}.npz", **found)


def global_data(folder):
    """Data that are arrays of all processes: read where each has all, else refused."""
    spread = NamedSharding(mesh(), PartitionSpec("data"))
    whole = NamedSharding(mesh(), PartitionSpec())
    train = jax.tree.map(np.asarray, models.data(64))

    def put(sharding):
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), train
        )

    method = methods()["tracin"]
    try:
        ja.build_index(method, checkpoints(), put(spread), mesh=mesh())
        raise AssertionError("Data that are spread over processes were taken.")
    except ValueError as error:
        assert "spread over several processes" in str(error), error
        assert "source with __len__ and __getitem__" in str(error), error
    index = ja.build_index(method, checkpoints(), put(whole), batch_size=BATCH, mesh=mesh())
    scores = np.asarray(ja.score(index, models.data(6, seed=1)))
    np.save(f"{folder}/{jax.process_index()}.npy", scores)


if __name__ == "__main__":
    process, processes, port, task, folder = sys.argv[1:]
    cache = f"{os.environ['JAXATTR_TEST_CACHE']}/process-{process}-of-{processes}"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if int(processes) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    tasks = {
        "attribute": attribute, "build": build, "extend": extend, "use": use, "retrain": retrain,
        "global_data": global_data, "fail": fail, "over_columns": over_columns,
        "compressed": compressed,
    }  # fmt: skip
    learning._WHOLE_BYTES = 0  # contributions are not kept
    tasks[task](folder)
