"""Low-rank deltas: every expert as one base, shared by all, plus factors of its own.

`expert ≈ base + left @ right`. The base is the mean of all experts; the factors of each delta are the best of their
rank (Eckart and Young, 1936).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt

import numpy as np
from numpy.typing import NDArray

from .gram import gram_matrix, total_energy
from .lapack import symmetric_eigenvectors

BYTES_PER_NUMBER = 2


@dataclass(frozen=True, slots=True)
class Factors:
    """A low-rank matrix, `left @ right`: float32 [out, rank] and [rank, in]."""

    left: NDArray[np.float32]
    right: NDArray[np.float32]


def factorise(delta: NDArray[np.float32], rank: int) -> Factors:
    """The best factors of that rank in the Frobenius norm, for a delta [out, in].

    The factor on the shorter side of the delta is orthonormal: the leading eigenvectors of the Gram matrix of that
    side. Raises ValueError for a rank below 0 or above min(out, in).
    """
    out, inner = delta.shape
    if not 0 <= rank <= min(out, inner):
        raise ValueError(f"rank {rank} of a {out} x {inner} matrix")
    if rank == 0:
        return Factors(np.zeros((out, 0), np.float32), np.zeros((0, inner), np.float32))
    if out > inner:
        transposed = factorise(delta.T, rank)
        return Factors(np.ascontiguousarray(transposed.right.T), np.ascontiguousarray(transposed.left.T))
    gram = gram_matrix(delta)
    _, vectors = symmetric_eigenvectors(gram) if gram.dtype == np.float32 else np.linalg.eigh(gram)
    left = np.ascontiguousarray(vectors[:, : -rank - 1 : -1].astype(np.float32))
    return Factors(left, left.T @ delta)


def rebuild(base: NDArray[np.float32], factors: Factors) -> NDArray[np.float32]:
    """`base + left @ right`, [out, in]."""
    return base + factors.left @ factors.right


def relative_error(approximation: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    """The Frobenius norm of the difference over that of the exact array, of two axes or more.

    Of a zero array the error is 0 where the approximation is zero, too, and 1 otherwise.
    """
    shape = len(exact), -1  # energies are taken of matrices
    energy, lost = total_energy(exact.reshape(shape)), total_energy((approximation - exact).reshape(shape))
    return sqrt(lost / energy) if energy else float(lost > 0)


def overlay_bytes(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, float], experts: int) -> int:
    """Bytes of base and factors of one layer, at two bytes per number; shapes [out, in] and ranks are by role."""
    numbers = sum(out * inner + experts * ranks[role] * (out + inner) for role, (out, inner) in shapes.items())
    return round(BYTES_PER_NUMBER * numbers)


def original_bytes(shapes: Mapping[str, tuple[int, int]], experts: int) -> int:
    """Bytes of the experts themselves, at two bytes per weight."""
    return BYTES_PER_NUMBER * experts * sum(prod(shape) for shape in shapes.values())
