"""Memory and threads: how much of them the work on layers may take."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod

from threadpoolctl import threadpool_limits

from ..errors import InvalidRequest
from ..text import parse_size
from ..weights.expert_layer import ExpertLayer

LEAST_MEMORY = 256_000_000  # bytes; the libraries alone take half of it
_memory: ContextVar[int] = ContextVar("memory", default=2_000_000_000)
_threads: ContextVar[int | None] = ContextVar("threads", default=None)


@contextmanager
def memory_limit(size: int | str | None) -> Iterator[None]:
    """Within this context, work on layers takes about `size` bytes ("1GB") of memory; 2 GB outside of it, or for None.

    A few matrices of one expert must fit whatever the limit. Raises InvalidRequest for what is no size, or too little.
    """
    wanted = parse_size(size, "the memory") if isinstance(size, str) else size
    if wanted is not None and wanted < LEAST_MEMORY:
        raise InvalidRequest(f"{size} of memory is too little", f"allow {LEAST_MEMORY // 10**6}MB or more")
    token = _memory.set(_memory.get() if wanted is None else wanted)
    try:
        yield
    finally:
        _memory.reset(token)


@contextmanager
def thread_limit(count: int) -> Iterator[None]:
    """Within this context, work on layers takes `count` threads; a thread per core outside of it."""
    token = _threads.set(count)
    try:
        yield
    finally:
        _threads.reset(token)


def memory() -> int:
    """About how many bytes the work on layers may take."""
    return _memory.get()


def window_weights() -> int:
    """Weights of all experts that are decoded at a time, by all threads together: 2.8 % of the memory.

    Larger windows were slower: what a thread decodes is memory that glibc keeps only up to 32 MB, beyond which the
    kernel clears it anew for every window.
    """
    return memory() * 7 // 1000


def kept_weights() -> int:
    """Weights of chosen experts that are kept between the passes: 28 % of the memory."""
    return memory() * 7 // 100


def matrix_memory() -> int:
    """Bytes that the matrices which threads work on may take together: half of the memory."""
    return memory() // 2


@contextmanager
def worker_threads(layer: ExpertLayer | None = None, matrices: int = 2) -> Iterator[ThreadPoolExecutor]:
    """As many threads as `cores`, each with a BLAS of one thread; fewer where `matrices` for each took too much room.

    Experts side by side beat one BLAS call on all cores as soon as another program wants a core.
    """
    with threadpool_limits(1, user_api="blas"):
        pool = ThreadPoolExecutor(worker_count(layer, matrices))
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def worker_count(layer: ExpertLayer | None = None, matrices: int = 2) -> int:
    """How many threads `worker_threads` has."""
    largest = 4 * max(prod(layer.shape(role)) for role in layer.roles) if layer else 1
    return max(1, min(cores(), matrix_memory() // (matrices * largest)))


def cores() -> int:
    """How many cores work on layers may use: those of this process, or what `thread_limit` says."""
    if count := _threads.get():
        return count
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
