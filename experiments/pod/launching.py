"""Starts the hosts of a job as processes, waits for them, and kills one in the middle."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jaxattr.store.folder import Folder
from jaxattr.store.ledger import finished

Hosts = list[subprocess.Popen]


def start(arguments: Sequence[str], own: Path, hosts: int, devices: int) -> Hosts:
    """Starts a job.

    Args:
      arguments: of each worker.
      own: the job's folder; what host i prints goes to `host-i.log` in it.
      hosts: processes.
      devices: of each.

    Returns:
      The processes.
    """
    own.mkdir(parents=True, exist_ok=True)
    # Most of the time goes to compiling, once on every host, and these programs run for moments.
    flags = (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
    )
    settings = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job = ["--processes", str(hosts), "--port", port, "--own", str(own), *arguments]
    started = []
    for number in range(hosts):
        command = [sys.executable, "-m", "experiments.pod.worker", "--process", str(number), *job]
        with (own / f"host-{number}.log").open("a") as log:
            started.append(
                subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)
            )
    return started


def finish(hosts: Hosts, own: Path, seconds: float) -> None:
    """Waits for a job; where one host fails, ends the others.

    Args:
      hosts: its processes.
      own: the job's folder.
      seconds: to wait at most.

    Raises:
      RuntimeError: if a host failed, or took too long, with the end of what it printed.
    """
    until = time.monotonic() + seconds
    while any(host.poll() is None for host in hosts):
        if time.monotonic() > until or any(host.poll() for host in hosts):
            break
        time.sleep(0.05)
    bad = next((i for i, host in enumerate(hosts) if host.poll() != 0), None)
    if bad is not None:
        end(hosts)
        printed = (own / f"host-{bad}.log").read_text()[-3000:]
        raise RuntimeError(f"Host {bad} of {own.name} failed, or took over {seconds} s:\n{printed}")


def end(hosts: Hosts) -> None:
    """Kills what is left of a job.

    Args:
      hosts: its processes.
    """
    for host in hosts:
        host.kill()
        host.wait()


def kill_one(hosts: Hosts, index: Path, blocks: int, seconds: float) -> dict[str, int]:
    """Kills one host in the middle of a build, and then the rest of the job, which waits for it.

    Args:
      hosts: its processes.
      index: the folder that the job builds in.
      blocks: how many blocks all hosts have finished before.
      seconds: to wait for those at most.

    Returns:
      {stage: blocks that were finished}.

    Raises:
      RuntimeError: if the job ended before, or took too long.
    """
    until = time.monotonic() + seconds
    while sum(finished(Folder(index)).values()) < blocks:
        if time.monotonic() > until or any(host.poll() is not None for host in hosts):
            end(hosts)
            raise RuntimeError(f"The job ended, or was too slow, before it was killed: {index}.")
        time.sleep(0.01)
    hosts[-1].send_signal(signal.SIGKILL)
    hosts[-1].wait()
    end(hosts)
    return finished(Folder(index))
