"""The best path through a trellis (Viterbi, 1967), in compiled code; imports numba."""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

PIECE = 2048  # numbers whose path is settled at a time
AHEAD = 64  # later numbers that also affect it; further ones hardly do
RENEW = 32  # steps after which the least cost is taken off, so that float32 keeps the differences
UNREACHED = 1e30  # the cost of states where a piece can't begin


def best_states(numbers: NDArray[np.float32], table: NDArray[np.float32], bits: int) -> NDArray[np.uint16]:
    """The states [n] whose values in `table` [states] are nearest to the numbers [n], by the sum of squares.

    State s goes to the states (s >> bits) + b * (states >> bits), with b from 0 to 2**bits - 1. Numbers are taken by
    pieces; within the first piece the path is the best of all.
    """
    states = np.empty(numbers.size, np.uint16)
    _search(numbers, table, (True,) * bits, states)
    return states


def _compile(function: Callable[..., None]) -> Callable[..., None]:
    """The function as machine code, which lets other threads run, and is kept for the next process where it can be."""
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract", "nsz", "nnan"}}
    compiled: Callable[..., None]
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # there is no writable cache folder
        compiled = numba.njit(**options)(function)
    return compiled


@_compile
def _search(numbers: Any, table: Any, width: Any, found: Any) -> None:
    """As `best_states`, into `found`.

    `width` is a tuple of as many items as there are bits: its length is a constant to the compiler, which makes vector
    instructions of the loops.
    """
    bits = len(width)
    branches = 1 << bits
    shared = table.size >> bits  # what is left of a state when its oldest bits go
    cost = np.zeros(table.size, np.float32)
    best = np.empty(shared, np.float32)
    back = np.empty((min(PIECE + AHEAD, numbers.size), shared), np.uint8)
    for start in range(0, numbers.size, PIECE):
        stop = min(start + PIECE + AHEAD, numbers.size)
        if start:
            cost[:] = np.float32(UNREACHED)
            cost[found[start - 1]] = 0
        for step in range(stop - start):
            oldest = back[step]
            for rest in range(shared):
                least, which = cost[branches * rest], np.int32(0)
                for branch in range(1, branches):
                    other = cost[branches * rest + branch]
                    which = np.int32(branch) if other < least else which
                    least = other if other < least else least
                best[rest], oldest[rest] = least, which
            if step % RENEW == 0:
                least = best.min()
                for rest in range(shared):
                    best[rest] -= least
            number = numbers[start + step]
            for branch in range(branches):
                for rest in range(shared):
                    state = branch * shared + rest
                    difference = number - table[state]
                    cost[state] = best[rest] + difference * difference
        state = np.argmin(cost)
        for step in range(stop - start - 1, -1, -1):
            if step < PIECE:
                found[start + step] = state
            state = ((state & (shared - 1)) << bits) | back[step, state & (shared - 1)]
