"""Gram matrices: the products of all pairs of rows, the energy of a matrix, and cosines from products."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .device import gram

TINY = 1e-25  # an energy below this has lost digits in float32


def gram_matrix(rows: NDArray[np.float32]) -> NDArray[Any]:
    """The products of all pairs of rows, [n, n]; in float32, or in float64 where they would vanish or overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        product = gram(rows)
    if TINY < product.diagonal().max(initial=0.0) < np.inf:
        return product
    wide = rows.astype(np.float64)
    return wide @ wide.T


def total_energy(matrix: NDArray[np.float32]) -> float:
    """The sum of the squares of a matrix: of each row in float32, of the rows in float64."""
    with np.errstate(over="ignore"):
        total = float(np.einsum("ij,ij->i", matrix, matrix).sum(dtype=np.float64))
    return total if TINY < total < np.inf else float(np.square(matrix, dtype=np.float64).sum())


def pairwise_cosines(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cosine of every pair of vectors, [pairs], from their Gram matrix [vectors, vectors].

    A zero vector has cosine 0 with everything.
    """
    norms = np.sqrt(np.diag(gram))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    cosines = gram * inverse[:, None] * inverse[None, :]
    return np.clip(cosines[np.triu_indices(len(gram), 1)], -1.0, 1.0)
