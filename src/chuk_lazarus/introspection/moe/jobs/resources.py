"""Memory and threads: how much of them a job may use.

A job reads the limits once, when it opens its model, and passes them on: `memory_limit` and `thread_limit` apply in
their context, which the threads of a pool do not inherit.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Protocol

from threadpoolctl import threadpool_limits

from ..arguments import byte_size
from ..errors import InvalidRequest

LEAST_MEMORY = 256_000_000  # bytes; the libraries alone take half of it
_memory: ContextVar[int] = ContextVar("memory", default=2_000_000_000)
_threads: ContextVar[int | None] = ContextVar("threads", default=None)


@contextmanager
def memory_limit(size: int | str | None) -> Iterator[None]:
    """Within this context, jobs use about `size` bytes ("1GB") of memory; by default, and for None, 2 GB.

    A few matrices of one expert must fit whatever the limit. Raises InvalidRequest for an invalid or too small size.
    """
    wanted = None if size is None else byte_size(size, "the memory")
    if wanted is not None and wanted < LEAST_MEMORY:
        raise InvalidRequest(f"{size} of memory is too little", f"allow {LEAST_MEMORY // 10**6}MB or more")
    token = _memory.set(_memory.get() if wanted is None else wanted)
    try:
        yield
    finally:
        _memory.reset(token)


@contextmanager
def thread_limit(count: int) -> Iterator[None]:
    """Within this context, jobs use `count` threads; by default one per core."""
    token = _threads.set(count)
    try:
        yield
    finally:
        _threads.reset(token)


class Shaped(Protocol):
    """What has a matrix for each of some roles, such as a layer's experts."""

    @property
    def roles(self) -> tuple[str, ...]:
        """gate, up and down, or some of them."""

    def shape(self, role: str) -> tuple[int, int]:
        """(out, in) of a role's matrix."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one job may use: about `memory` bytes, and `threads`."""

    memory: int
    threads: int

    @classmethod
    def current(cls) -> "Resources":
        """The limits in the current context; for the thread that starts a job."""
        return cls(_memory.get(), _threads.get() or _count_cores())

    def share(self, jobs: int) -> "Resources":
        """The share of each of several jobs that run at the same time."""
        return Resources(max(LEAST_MEMORY, self.memory // jobs), max(1, self.threads // jobs))

    @property
    def window_weights(self) -> int:
        """Weights of all experts that are decoded at a time, by all threads together: 2.8 % of the memory.

        Larger windows were slower: what a thread decodes is memory that glibc keeps only up to 32 MB, beyond which the
        kernel clears it again for every window.
        """
        return self.memory * 7 // 1000

    @property
    def kept_weights(self) -> int:
        """Weights of chosen experts that are kept between the passes: 28 % of the memory."""
        return self.memory * 7 // 100

    @property
    def matrix_memory(self) -> int:
        """Bytes that the matrices which threads work on may take together: half of the memory."""
        return self.memory // 2

    def worker_count(self, layer: Shaped | None = None, matrices: int = 2) -> int:
        """How many threads fit: fewer than `threads` if `matrices` of the layer for each would take too much memory."""
        largest = 4 * max(prod(layer.shape(role)) for role in layer.roles) if layer is not None else 1
        return max(1, min(self.threads, self.matrix_memory // (matrices * largest)))

    @contextmanager
    def worker_threads(self, layer: Shaped | None = None, matrices: int = 2) -> Iterator[ThreadPoolExecutor]:
        """A pool of `worker_count` threads, each with a BLAS of one thread.

        Experts side by side beat one BLAS call on all cores as soon as another program wants a core.
        """
        with threadpool_limits(1, user_api="blas"):
            pool = ThreadPoolExecutor(self.worker_count(layer, matrices))
            try:
                yield pool
            finally:
                pool.shutdown(cancel_futures=True)


def _count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
