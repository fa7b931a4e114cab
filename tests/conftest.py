"""Hostile settings for all tests: float64, no promotion of ranks, eight fake CPU devices."""

import gc
import os
import shutil
import subprocess
import sys
import tempfile

import jax
import pytest
from xdist.scheduler import LoadFileScheduling

QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
"""Programs here run once or twice, and compiling them is most of the time."""


def known(flags):
    """Whether this release of XLA has flags: those that it lacks end the process."""
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    check = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(check, env=environment, capture_output=True).returncode == 0


def settled():
    """The flags of all processes of a run, those that tests start included."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    if "JAXATTR_TEST_CACHE" in os.environ:  # by the process that began the run
        return " ".join(flags)
    quick = QUICK.split() if known(QUICK) else []
    return " ".join([*quick, *flags, "--xla_force_host_platform_device_count=8"])


os.environ["XLA_FLAGS"] = settled()  # before the first array

# Many tests compile the same programs. Each worker keeps its own: older releases of JAX may read
# an entry that another process is still writing.
if "JAXATTR_TEST_CACHE" not in os.environ:
    os.environ["JAXATTR_TEST_CACHE"] = tempfile.mkdtemp(prefix="jaxattr-tests-")
CACHE = os.environ["JAXATTR_TEST_CACHE"]
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "alone")
jax.config.update("jax_compilation_cache_dir", f"{CACHE}/{WORKER}")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def programs_of_other_files_let_go():
    """A program holds many memory maps, of which a process may have 65,530."""
    yield
    jax.clear_caches()
    gc.collect()


def pytest_collection_finish(session):
    gc.collect()
    gc.freeze()  # libraries and tests are not looked at again
    # JAX traces into many small objects that stay: to look for cycles in them at each 700 of these
    # takes 6 % of the time. What a file leaves is collected at its end.
    gc.set_threshold(200_000, 50, 1000)


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):  # the run itself, and none of its workers
        shutil.rmtree(CACHE, ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keeps the tests of a file on one worker, which has compiled their programs by then."""
    return LoadFileScheduling(config, log)
