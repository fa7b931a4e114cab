"""Hostile settings for all tests: float64, no promotion of ranks, eight fake CPU devices."""

import gc
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import jax
import pytest
from xdist.scheduler import LoadFileScheduling

# Many tests compile the same programs. Each worker keeps its own: older releases of JAX may read
# an entry that another process is still writing.
CACHE = os.environ.setdefault("JAXATTR_TEST_CACHE", tempfile.mkdtemp(prefix="jaxattr-tests-"))
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


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):  # the run itself, and none of its workers
        shutil.rmtree(CACHE, ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keeps the tests of a file on one worker, which has compiled their programs by then."""
    return LoadFileScheduling(config, log)
