"""Factorisations on the host, which may have other work: one thread each, several side by side.

With many threads, LAPACK waits for all of them at every column. Where another process has a core,
each wait takes that process's turn: the eigenvectors of a small GPT took 57 s for 0.6 s.
"""

import collections
import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import ThreadpoolController

# An eigendecomposition holds about six matrices in float64.
_MOST_AT_ONCE = 16

T = TypeVar("T")
R = TypeVar("R")

# Limits of two threads that overlap are not undone: the second takes the first's for what was.
_lock = threading.RLock()
_worker = threading.local()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limits BLAS and LAPACK of NumPy and SciPy to the thread that calls them.

    The limit is the whole process's, other threads' calls included; a second thread that comes here
    waits for the first, but for the workers of `side_by_side`, for whom the limit holds already.
    Apple's Accelerate is not covered.
    """
    if getattr(_worker, "limited", False):
        yield
        return
    with _lock, _libraries("scipy.linalg" in sys.modules).limit(limits=1, user_api="blas"):
        yield


@functools.lru_cache(maxsize=2)
def _libraries(with_scipy: bool) -> ThreadpoolController:
    """To look for them takes 2 ms, or more: they are among the memory maps of the process."""
    return ThreadpoolController()


def side_by_side(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Maps items with linear algebra on the host, as many at once as there are cores, 16 at most.

    Args:
      function: of one item; NumPy's and SciPy's work alone, since what a context sets for JAX stays
        behind.
      items: finitely many, taken by the caller's thread as they are needed.

    Returns:
      The results in the order of the items.

    Raises:
      Exception: what the first item, in their order, raised that did; others are not begun.
    """
    count = min(_cores(), _MOST_AT_ONCE)
    found: list[R] = []
    begun: collections.deque[Future[R]] = collections.deque()
    with one_thread(), ThreadPoolExecutor(count, initializer=_limited) as pool:
        try:
            for item in items:
                if len(begun) == count:
                    found.append(begun.popleft().result())
                begun.append(pool.submit(function, item))
            found.extend(each.result() for each in begun)
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def _limited() -> None:
    _worker.limited = True


def _cores() -> int:
    """Those that this process may run on, where the system says."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
