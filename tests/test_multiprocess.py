"""Real processes that talk through gloo, and processes that are killed."""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import pytest
import tensorstore as ts

import jaxattr as ja
from jaxattr.store.folder import Folder
from jaxattr.weights.report import WeightWarning
from tests import models
from tests.multiprocess import worker

ROOT = pathlib.Path(__file__).parent.parent


def start(task, folder, processes, **environment):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.multiprocess.worker", str(i), str(processes), port]
            + [task, str(folder)],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]


def finish(jobs, seconds=300):
    outputs = [job.communicate(timeout=seconds)[0] for job in jobs]
    for job, output in zip(jobs, outputs, strict=True):
        assert job.returncode == 0, output
    return outputs


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    jobs = start("attribute", tmp_path, 2)
    train, checkpoints = models.data(worker.SIZE), worker.checkpoints()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WeightWarning)
        expected = {
            name: worker.results(
                ja.build_index(method, checkpoints, train, batch_size=worker.BATCH)
            )
            for name, method in worker.methods().items()
        }
    finish(jobs)
    for name, values in expected.items():
        got = np.load(tmp_path / f"{name}.npz")
        for key, value in values.items():
            if key == "ids":
                np.testing.assert_array_equal(got[key], value)
            else:
                assert models.relative_error(got[key], value) <= 1e-9, (name, key)


@pytest.mark.slow
def test_two_processes_compress_as_one_does(tmp_path):
    finish(start("compressed", tmp_path, 2, METHOD="tracin"))
    method, queries = worker.methods()["tracin"], models.data(6, seed=1)
    train = models.data(worker.SIZE)
    index = ja.build_index(
        method, worker.checkpoints(), train, batch_size=worker.BATCH, dtype=np.int8
    )
    got, among = np.load(tmp_path / "compressed.npz"), np.arange(0, worker.SIZE, 3)
    expected = np.asarray(ja.score(index, queries))
    assert models.relative_error(got["scores"], expected) <= 1e-9
    order = np.argsort(-expected[:, among], axis=1)[:, :4]
    np.testing.assert_array_equal(got["ids"], among[order])


@pytest.mark.slow
def test_two_processes_retrain_what_one_does(tmp_path):
    jobs = start("retrain", tmp_path, 2)
    expected = ja.retrain(*worker.retraining(), seeds=3)
    expected = {**expected, "outputs": worker.outputs_of(expected)}
    finish(jobs)
    for number, process in np.ndindex(2, 2):
        got = np.load(tmp_path / f"{number}-{process}.npz")
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_data_that_are_arrays_of_all_processes(tmp_path):
    jobs = start("global_data", tmp_path, 2)
    method, checkpoints = worker.methods()["tracin"], worker.checkpoints()
    index = ja.build_index(method, checkpoints, models.data(64), batch_size=worker.BATCH)
    expected = ja.score(index, models.data(6, seed=1))
    finish(jobs)
    for process in range(2):
        assert models.relative_error(np.load(tmp_path / f"{process}.npy"), expected) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tracin", "trak"])
def test_a_full_disk_of_one_process_ends_all(tmp_path, method):
    began = time.time()
    jobs = start("fail", tmp_path, 2, METHOD=method)
    first, second = (job.communicate(timeout=90)[0] for job in jobs)
    assert jobs[0].returncode and jobs[1].returncode
    assert "OtherProcessError: Another process failed. StoreError: Cannot write" in first
    assert "StoreError: Cannot write: no space left" in second
    assert time.time() - began < 90  # and not when JAX misses a heartbeat
    finish(start("build", tmp_path, 2, METHOD=method))


@pytest.mark.slow
def test_columns_over_processes(tmp_path):
    finish(start("over_columns", tmp_path, 2, METHOD="trak"))
    method, train = worker.methods()["trak"], models.data(worker.SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WeightWarning)
        index = ja.build_index(method, worker.checkpoints(), train, batch_size=worker.BATCH)
        expected = worker.results(index)
    found = [np.load(tmp_path / f"{process}.npz") for process in range(2)]
    for name, value in expected.items():
        assert models.relative_error(found[0][name], value) <= 1e-9, name
        np.testing.assert_array_equal(found[1][name], found[0][name])
    assert found[0]["writes"] > 0 and found[1]["writes"] == 0


# How often each job is killed: enough for a run of all tests; set it for more.
KILLS = int(os.environ.get("JAXATTR_KILLS", "1"))


def contents(folder):
    """All that a job wrote: rows as they are stored, scores, and what files there are."""
    rows = ja.open_index(folder / "index").rows
    found = {
        (name, c): rows.column(name, c)
        for name in ("features", "examples", "self", "digests")
        for c in range(2)
    }
    if (folder / "scores").exists():
        spec = {"driver": "zarr3", "kvstore": Folder(folder / "scores").spec("")}
        found["scores"] = ts.open(spec).result().read().result()
    files = {str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file()}
    # Who counted the blocks, and how Orbax names its parts, depends on who was there at the end.
    found["files"] = sorted(f for f in files if "ledger/" not in f and "ocdbt" not in f)
    return found


def prepare(folder, task, processes, job):
    """The index that a job starts from, by as many processes: chunks are theirs."""
    folder.mkdir()
    if task != "build":
        finish(start("build", folder, processes, **job))
    return folder


def kill_and_go_on(folder, task, method, processes, devices, seed):
    """Kills all processes of a job again and again, then lets it end."""
    job = {"METHOD": method, "DEVICES": str(devices)}
    whole = prepare(folder / "whole", task, processes, job)
    began = time.time()
    finish(start(task, whole, processes, **job))
    length = time.time() - began
    killed = prepare(folder / "killed", task, processes, job)
    generator = random.Random(seed)
    for _ in range(KILLS):
        jobs = start(task, killed, processes, **job)
        if task == "use":  # nothing says how far it is
            time.sleep(generator.uniform(0.3, 0.95) * length)
        else:
            wait_for_progress(killed / "index", jobs)
            time.sleep(generator.uniform(0, 0.5))
        for each in generator.sample(jobs, len(jobs)):
            each.send_signal(signal.SIGKILL)
            time.sleep(generator.choice([0, 0, 0.05]))
        for each in jobs:
            each.communicate()
        if task == "build" and (killed / "index" / "complete.json").exists():
            shutil.rmtree(killed / "index")  # it was quicker than the signal
        if task == "use" and not (killed / "scores" / "unfinished.json").exists():
            shutil.rmtree(killed / "scores", ignore_errors=True)
    finish(start(task, killed, processes, **job))
    expected, found = contents(whole), contents(killed)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=str(name))


def check_eight_devices(path, name):
    """One process with eight devices reads what other jobs wrote."""
    queries, checkpoints = models.data(6, seed=1), worker.checkpoints()
    method = worker.methods()[name]
    expected = ja.build_index(method, checkpoints, models.data(worker.SIZE * 5), batch_size=8)
    opened = ja.open_index(path, method, checkpoints, mesh=jax.make_mesh((8,), ("data",)))
    got = ja.score(opened, queries)
    assert models.relative_error(got, ja.score(expected, queries)) <= 1e-9


def wait_for_progress(index, jobs):
    """Returns when this run has finished a block on all processes."""
    began = time.time()
    ledgers = [index / "ledger" / f"process-{i}.json" for i in range(len(jobs))]
    while all(job.poll() is None for job in jobs):
        with contextlib.suppress(FileNotFoundError):  # a new run begins by deleting old ones
            if all(each.stat().st_mtime > began for each in ledgers):
                return
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "processes", "devices"),
    [*((name, 2, 2) for name in worker.methods()), ("tracin", 1, 4), ("ekfac", 1, 4)],
)
def test_a_build_that_is_killed(tmp_path, method, processes, devices):
    kill_and_go_on(tmp_path, "build", method, processes, devices, seed=1)
    check_eight_devices(tmp_path / "killed" / "index", method)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "method", "processes", "devices"),
    [("extend", "tracin", 2, 2), ("use", "trak", 2, 2), ("use", "trak", 1, 4)],
)
def test_other_jobs_that_are_killed(tmp_path, task, method, processes, devices):
    kill_and_go_on(tmp_path, task, method, processes, devices, seed=2)


def test_importing_the_package_starts_no_backend():
    """So that jax.distributed.initialize may come after the imports."""
    program = (
        "import jaxattr, socket, jax\n"
        "probe = socket.socket(); probe.bind(('127.0.0.1', 0)); port = probe.getsockname()[1]\n"
        "probe.close()\n"
        "jax.distributed.initialize(f'127.0.0.1:{port}', 1, 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
