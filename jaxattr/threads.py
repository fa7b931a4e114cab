"""Factorisations on the host, which may have other work: one thread each, several side by side.

With many threads, LAPACK waits for all of them at every column. Where another process has a core,
each wait takes that process's turn: the eigenvectors of a small GPT took 57 s for 0.6 s.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import ThreadpoolController

# Each thread holds a few matrices, in float64.
_MOST = 16

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within it, each call of BLAS or LAPACK, from NumPy or SciPy, keeps to its own thread."""
    with _libraries("scipy.linalg" in sys.modules).limit(limits=1, user_api="blas"):
        yield


@functools.lru_cache(maxsize=2)
def _libraries(with_scipy: bool) -> ThreadpoolController:
    """To look for them takes 2 ms, or more: they are among the memory maps of the process."""
    return ThreadpoolController()


def side_by_side(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Maps items with linear algebra on the host, as many at once as there are cores, 16 at most.

    Args:
      function: of one item; NumPy's work alone, since what a context sets for JAX stays behind.
      items: finitely many.

    Returns:
      The results in the order of the items.

    Raises:
      Exception: the first that a call raised.
    """
    with one_thread(), ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST)) as pool:
        return list(pool.map(function, items))
