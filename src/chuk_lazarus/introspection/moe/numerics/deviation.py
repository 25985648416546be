"""How far one matrix is from another, in pieces that stay in a processor's cache. Pure arrays."""

from math import inf, isfinite, sqrt

import numpy as np

from .gram import TINY
from .neurons import Array

PIECE = 1 << 15  # numbers at a time: three such pieces take 400 kB


def deviation(matrix: Array, exact: Array) -> float:
    """The Frobenius norm of the difference over that of the exact matrix [rows, columns].

    Infinite where a matrix is not finite, or the exact one is zero and the other is not.
    """
    step = max(1, PIECE // matrix.shape[1])
    buffer = np.empty((step, matrix.shape[1]), np.float32)
    lost = energy = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(matrix), step):
            piece = exact[start : start + step]
            difference = np.subtract(matrix[start : start + step], piece, out=buffer[: len(piece)]).ravel()
            flat = piece.ravel(order="K")
            lost += float(difference @ difference)
            energy += float(flat @ flat)
        if not (TINY < energy < inf and TINY < lost < inf) and lost != 0:
            energy = float(np.square(exact, dtype=np.float64).sum())
            lost = float(np.square(matrix - exact, dtype=np.float64).sum())
    if not (isfinite(lost) and isfinite(energy)):
        return inf
    return sqrt(lost / energy) if energy > 0 else (inf if lost > 0 else 0.0)
