"""How similar two projections are, and whether one model's hidden dimensions are another's, permuted and with other
signs. Pure arrays.

A projection has the hidden side as its columns, which are scaled to equal length: [rows, hidden]. Row cosines compare
rows at the same position. CKA compares W^T W over the hidden side instead, so it does not change under any rotation of
the rows: neither the order nor the number of heads matters. Both ignore the scales of columns, such as the weights of a
norm. The measures, and the assignment, are those of Zeng et al., AWM: Accurate Weight-Matrix Fingerprint for Large
Language Models, ICLR 2026 (arXiv 2510.06738).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .neurons import Array, unit_rows

COLUMNS = 1024  # of the hidden side that CKA is taken over, evenly spaced
LEAST_COLUMNS = 4  # that the unbiased estimate takes
ASSIGNED = 0.5  # the least mean correlation of the columns of two embeddings with the same, permuted hidden side
GAIN = 1.25  # by which an assignment must fit better than the order as it is


@dataclass(frozen=True, slots=True)
class Assignment:
    """A hidden side as a signed permutation of another: column `order[i]` times `signs[i]` is the other's column i.

    `correlation` is the mean correlation of the columns that are so brought together.
    """

    order: NDArray[np.intp]
    signs: Array
    correlation: float

    def apply(self, columns: Array) -> Array:
        """A matrix [rows, hidden] in the order and with the signs of the other hidden side."""
        return columns[:, self.order] * self.signs

    @property
    def is_identity(self) -> bool:
        return bool((self.order == np.arange(len(self.order))).all() and (self.signs > 0).all())


def even_columns(matrix: Array) -> Array:
    """A matrix [rows, hidden] with columns of length 1; those of zeros stay zeros."""
    return np.ascontiguousarray(unit_rows(np.ascontiguousarray(matrix.T)).T)


def row_cosine(left: Array, right: Array) -> float | None:
    """The mean cosine of rows at equal places, those of zeros left out; None where the shapes differ, or all rows are
    zeros."""
    if left.shape != right.shape:
        return None
    left, right = unit_rows(left), unit_rows(right)
    alive = left.any(axis=1) & right.any(axis=1)
    if not alive.any():
        return None
    return float(np.einsum("ij,ij->i", left[alive], right[alive]).mean(dtype=np.float64))


def kernel(matrix: Array, columns: int = COLUMNS) -> NDArray[np.float64]:
    """W^T W over evenly spaced columns of a matrix [rows, hidden], the diagonal set to zero; [n, n]."""
    places = np.linspace(0, matrix.shape[1] - 1, min(columns, matrix.shape[1])).round().astype(np.intp)
    chosen = matrix[:, places]
    product = (chosen.T @ chosen).astype(np.float64)
    np.fill_diagonal(product, 0.0)
    return product


def unbiased_hsic(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion, up to a factor that depends on n alone.

    Song et al., Feature Selection via Dependence Maximization, JMLR 2012, equation 5. Kernels are [n, n], with a
    diagonal of zeros; n is 4 at least.
    """
    n = len(left)
    sums, others = left.sum(axis=0), right.sum(axis=0)
    return float(
        np.einsum("ij,ij->", left, right)
        + sums.sum() * others.sum() / ((n - 1) * (n - 2))
        - 2 * (sums @ others) / (n - 2)
    )


def unbiased_cka(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """The centered kernel alignment of two kernels of `kernel`: 1 for equal ones, about 0 for unrelated ones.

    With the unbiased estimate, as by Nguyen et al., ICLR 2021 (arXiv 2010.15327): the biased one grows with n over the
    number of rows. 0 where a kernel says nothing.
    """
    if len(left) < LEAST_COLUMNS:
        return 0.0
    scale = unbiased_hsic(left, left) * unbiased_hsic(right, right)
    return unbiased_hsic(left, right) / float(np.sqrt(scale)) if scale > 0 else 0.0


def find_assignment(left: Array, right: Array) -> Assignment:
    """The signed permutation of the columns of `left` that fits `right` best, or the order as it is, where no other
    fits well and better; both are embeddings [tokens, hidden] of the same tokens."""
    correlations = _unit_columns(right).T @ _unit_columns(left)  # [right's columns, left's]
    sizes, places = np.abs(correlations), np.arange(len(correlations))
    identity = Assignment(places, np.ones(len(places), np.float32), float(np.diagonal(correlations).mean()))
    least = max(ASSIGNED, GAIN * identity.correlation)
    best = sizes.argmax(axis=1)
    if sizes[places, best].mean() < least:  # no assignment fits better than each column's best
        return identity
    if len(set(best.tolist())) < len(best):
        from scipy.optimize import linear_sum_assignment  # here, because it takes long to load

        best = linear_sum_assignment(sizes, maximize=True)[1]
    assigned = correlations[places, best]
    found = Assignment(best, np.where(assigned < 0, np.float32(-1), np.float32(1)), float(np.abs(assigned).mean()))
    return found if found.correlation >= least else identity


def _unit_columns(rows: Array) -> Array:
    """Columns of mean 0 and length 1, those that do not vary of zeros."""
    return unit_rows(np.ascontiguousarray((rows - rows.mean(axis=0)).T)).T
