"""One writer at a time, whoever dies, sleeps or races."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

import jaxattr as ja
from jaxattr.store.folder import Folder, StoreError
from jaxattr.store.lease import Lease, identity
from tests import models

ROOT = pathlib.Path(__file__).parent.parent
TRAIN, PARAMS = models.data(40), models.mlp_params()
METHOD = ja.tracin(models.loss)
ELSEWHERE = {"host": "elsewhere", "boot": "another", "namespace": "pid:[1]"}

# Holds a lease as another host would, and goes on when it is told to.
SLEEPER = """
import sys
from jaxattr.store import lease
from jaxattr.store.folder import Folder, StoreError
from jaxattr.store.lease import Lease
here = lease.identity
lease.identity = lambda pid: here(pid) | {"host": "elsewhere", "boot": "another"}
with Lease(Folder(sys.argv[1]), expires=1.0) as held:
    print("held", flush=True)
    sys.stdin.readline()
    held.check()
"""


def holder(pid=1, **changes):
    return {"id": "other", "renewed": 0.0} | identity(pid) | changes


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "index")


def taken(folder, expires=0.3):
    with Lease(folder, expires) as lease:
        lease.check()
        return folder.read("lease.json")["id"]


def test_a_lease_is_there_while_it_is_held(folder):
    with Lease(folder):
        held = folder.read("lease.json")
        assert held | identity(os.getpid()) == held
    assert folder.names() == []


def test_a_process_that_lives_is_waited_for(folder):
    folder.write("lease.json", holder(os.getppid()))
    for call in (lambda: taken(folder), lambda: ja.build_index(METHOD, PARAMS, TRAIN,
                                                               path=folder.path)):  # fmt: skip
        with pytest.raises(StoreError, match=f"by another job: process {os.getppid()} on .*Wait"):
            call()
    assert folder.names() == ["lease.json"]


def test_two_leases_of_one_process_refuse_each_other(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder.path)
    with Lease(folder) as first:
        for other in (folder, Folder(folder.path), Folder(tmp_path / "link")):
            with pytest.raises(StoreError, match="by this very process .*in another call"):
                taken(other)
        first.check()
    taken(folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_a_process_that_ended_is_dead_before_its_parent_asks(folder):
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    folder.write("lease.json", holder(child.pid))
    began = time.monotonic()
    assert taken(folder, expires=60.0) != "other"
    assert time.monotonic() - began < 5
    child.wait()


def test_leases_of_the_dead_are_taken_at_once(folder):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for gone in (
        holder(dead.pid),
        holder(os.getpid()),  # of this process, which knows nothing of it
        holder(os.getppid(), started="12"),  # another process had its number
    ):
        folder.write("lease.json", gone)
        began = time.monotonic()
        assert taken(folder, expires=60.0) != "other"
        assert time.monotonic() - began < 5
        assert folder.read("lease.json") is None


@pytest.mark.parametrize(
    "change",
    [
        {"host": "elsewhere"},
        {"boot": "another"},  # another machine of that name
        {"namespace": "pid:[1]"},  # another container of that name: its numbers mean nothing here
        {"started": None},  # a system that does not say
    ],
)
def test_those_who_cannot_be_looked_up_are_watched(folder, change):
    for pid in (os.getppid(), 2**22 + 1):
        folder.write("lease.json", holder(pid, **change))
        began = time.monotonic()
        assert taken(folder) != "other"
        if pid == os.getppid() or "started" not in change:
            assert time.monotonic() - began >= 0.3


def test_a_lease_that_another_host_renews_is_kept(folder):
    stop, other = threading.Event(), holder(**ELSEWHERE)
    folder.write("lease.json", other)

    def renew():
        count = 0
        while not stop.wait(0.05):
            count += 1
            folder.write("lease.json", other | {"renewed": count})

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(StoreError, match="another job: process 1 on elsewhere"):
            taken(folder, expires=1.0)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("gone", [{"started": "12"}, ELSEWHERE], ids=["dead", "expired"])
def test_one_of_many_takers_gets_a_dead_lease(folder, gone):
    for _ in range(10):
        folder.write("lease.json", holder(os.getppid(), **gone))
        results, start, end = [], threading.Barrier(6), threading.Barrier(6)

        def take(results=results, start=start, end=end):
            lease = Lease(Folder(folder.path), expires=0.1)
            start.wait()
            try:
                with lease:
                    end.wait()
                    lease.check()
                    results.append("took")
            except StoreError:
                end.wait()
                results.append("refused")

        threads = [threading.Thread(target=take) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == ["refused"] * 5 + ["took"]
        assert folder.read("lease.json") is None


def test_one_that_slept_through_a_takeover_stops(folder):
    sleeper = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, folder.path],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert sleeper.stdout.readline() == "held\n"
    with pytest.raises(StoreError, match=f"process {sleeper.pid} on elsewhere"):
        taken(folder, expires=2.0)  # it is awake, and renews
    sleeper.send_signal(signal.SIGSTOP)
    with Lease(folder, expires=1.0) as lease:
        sleeper.send_signal(signal.SIGCONT)
        time.sleep(1.0)  # it would renew now
        _, error = sleeper.communicate("go on\n", timeout=60)
        assert sleeper.returncode == 1 and "is no longer this job's: another job: " in error
        lease.check()


def test_a_lease_that_was_renewed_while_the_answer_was_lost_is_still_held(folder):
    with Lease(folder) as lease:
        folder.write("lease.json", folder.read("lease.json") | {"renewed": 1.0})
        lease._renew()
        lease.check()
        lease._renew()
        lease.check()
    assert folder.names() == []


class TakenOver:
    """A source during whose reading another job takes over."""

    def __init__(self, folder, at):
        self.folder, self.at = folder, at

    def __len__(self):
        return 40

    def __getitem__(self, i):
        if i == self.at and self.folder.read("lease.json") is not None:
            self.folder.write("lease.json", holder(**ELSEWHERE))
        return {name: value[i] for name, value in TRAIN.items()}


@pytest.mark.parametrize("at", [9, 37])
@pytest.mark.parametrize("method", [METHOD, ja.trak(models.margin)], ids=lambda m: m.name)
def test_a_build_that_was_taken_over_stops(folder, at, method, monkeypatch):
    monkeypatch.setattr("jaxattr.index.verifying._SAMPLES", 2)
    with pytest.raises(StoreError, match="no longer this job's: another job: process 1 on elsewh"):
        ja.build_index(method, PARAMS, TakenOver(folder, at), batch_size=8, path=folder.path)
    assert folder.read("complete.json") is None
    assert folder.read("lease.json")["id"] == "other"  # whose it is
    folder.delete("lease.json")
    index = ja.build_index(method, PARAMS, TakenOver(folder, None), batch_size=8, path=folder.path)
    expected = ja.build_index(method, PARAMS, TRAIN, batch_size=8)
    assert (index.features == expected.features).all()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '"x"', "{}", "\xff", "[" * 100_000]
    + [json.dumps(holder() | change) for change in (
        {"pid": "1"}, {"pid": [1]}, {"pid": None}, {"id": 3}, {"host": None}, {"renewed": "now"},
        {"started": 5}, {"boot": {}}, {"namespace": 0},
    )]
    + [json.dumps({k: v for k, v in holder().items() if k != name}) for name in ("id", "pid")],
)  # fmt: skip
def test_a_malformed_lease_says_what_to_delete(folder, content):
    path = pathlib.Path(folder.path) / "lease.json"
    path.parent.mkdir()
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(StoreError, match=f"delete lease.json .{path}. and run the same again"):
        taken(folder)
    assert path.exists()


@pytest.mark.parametrize("pid", [0, -1, 10**30])
def test_numbers_that_no_process_has_hold_for_no_one(folder, pid):
    folder.write("lease.json", holder(pid))
    assert taken(folder) != "other"
