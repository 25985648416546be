"""A matrix as two factors of low rank, each in few bits; with the rest in few bits, or without it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...numerics.low_rank import Factors, factorise
from .bits import BitsCode
from .code import PartLayout, Parts, Shape, as_shape, check_finite, inner
from .trellis import TrellisCode

MORE, ITERATIONS = 8, 2  # of the random start: vectors beside those of the rank, and iterations
SMALL_SHARE = 6  # the shorter side must be this many times the number of vectors for the random start to be faster


@dataclass(frozen=True, slots=True)
class FactorsCode:
    """`left @ right` of a rank, both in the code `bits`: parts `left.*` of left transposed [rank, out], so that groups
    run along the outputs, and `right.*` of right [rank, in].

    The right factor is fitted by least squares to the left one as it is stored, which is the best fit whatever the
    moments of the inputs.
    """

    rank: int
    bits: BitsCode

    def __str__(self) -> str:
        return f"rank{self.rank}:{self.bits}"

    def layout(self, shape: Shape) -> dict[str, PartLayout]:
        sides = {"left": (self.rank, shape[0]), "right": (self.rank, shape[1])}
        return {
            f"{side}.{name}": part
            for side, side_shape in sides.items()
            for name, part in self.bits.layout(side_shape).items()
        }

    def encode(
        self, matrix: NDArray[np.float32], *, unbiased: bool = False, moments: NDArray[np.float32] | None = None
    ) -> dict[str, NDArray[Any]]:
        """See `Code`; factors are never made unbiased, since leaving out directions does not shrink the others.

        With moments the left factor is that of the matrix times their Cholesky factor. Raises ValueError for a rank
        above min(out, in), too.
        """
        exponent = int(np.frexp(check_finite(matrix))[1])
        matrix = np.ldexp(matrix, -exponent)
        whitened = matrix if moments is None else matrix @ np.linalg.cholesky(moments)
        factors = _factorise(whitened, self.rank)
        left = self.bits.encode(np.ascontiguousarray(factors.left.T) / _norm(factors.left))
        stored = self.bits.decode(left, (self.rank, matrix.shape[0]))
        right = np.linalg.lstsq(stored @ stored.T, stored @ matrix)[0] if self.rank else factors.right
        coded = self.bits.encode(np.ldexp(right.astype(np.float32), exponent), moments=moments)
        return {f"left.{name}": part for name, part in left.items()} | {
            f"right.{name}": part for name, part in coded.items()
        }

    def decode(self, parts: Parts, shape: Shape) -> NDArray[np.float32]:
        left = self.bits.decode(inner(parts, "left"), (self.rank, shape[0]))
        right = self.bits.decode(inner(parts, "right"), (self.rank, shape[1]))
        with np.errstate(over="ignore", invalid="ignore"):
            return left.T @ right


@dataclass(frozen=True, slots=True)
class SumCode:
    """Factors, and the rest in few bits: parts `factors.*` and `rest.*`."""

    factors: FactorsCode
    rest: BitsCode | TrellisCode

    def __str__(self) -> str:
        return f"{self.factors}+{self.rest}"

    def layout(self, shape: Shape) -> dict[str, PartLayout]:
        return {
            f"{side}.{name}": part
            for side, code in (("factors", self.factors), ("rest", self.rest))
            for name, part in code.layout(shape).items()
        }

    def encode(
        self, matrix: NDArray[np.float32], *, unbiased: bool = False, moments: NDArray[np.float32] | None = None
    ) -> dict[str, NDArray[Any]]:
        factors = self.factors.encode(matrix, moments=moments)
        left_over = matrix - self.factors.decode(factors, as_shape(matrix))
        rest = self.rest.encode(left_over, unbiased=unbiased, moments=moments)
        return {f"factors.{name}": part for name, part in factors.items()} | {
            f"rest.{name}": part for name, part in rest.items()
        }

    def decode(self, parts: Parts, shape: Shape) -> NDArray[np.float32]:
        matrix = self.rest.decode(inner(parts, "rest"), shape)
        matrix += self.factors.decode(inner(parts, "factors"), shape)
        return matrix


def _factorise(matrix: NDArray[np.float32], rank: int) -> Factors:
    """Factors of that rank; of a low one by a random start and two iterations (Halko, Martinsson and Tropp 2011), many
    times faster than the best ones, and nearly as good."""
    if SMALL_SHARE * (rank + MORE) > min(matrix.shape):
        return factorise(matrix, rank)
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + MORE), dtype=np.float32)
    basis = np.linalg.qr(matrix @ start)[0]
    for _ in range(ITERATIONS):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    inside = factorise(basis.T @ matrix, rank)
    return Factors(basis @ inside.left, inside.right)


def _norm(left: NDArray[np.float32]) -> np.float32:
    """A length by which the left factor's numbers become about one."""
    return np.float32(np.sqrt(np.mean(left**2)) or 1.0) if left.size else np.float32(1.0)
