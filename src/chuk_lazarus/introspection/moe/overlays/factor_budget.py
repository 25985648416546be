"""Codes of low-rank deltas: how much energy is beyond a rank, and the codes of base, factors and rest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..numerics.hull import lower_hull
from ..numerics.spectra import energy_spectrum
from .codes import MatrixCode, RoleCodes
from .codes.bits import BitsCode
from .codes.code import Shape, code_bytes
from .codes.low_rank import FactorsCode, SumCode
from .codes.trellis import TrellisCode

Numbers = TypeVar("Numbers", float, NDArray[np.float64])

FACTOR_BITS = (BitsCode(4), BitsCode(8), BitsCode(16))
RANK_STEP = 1.3  # from one rank to the next
LEAST_KEPT = 0.1  # the smallest share that a code is assumed to keep
MOST_FACTORS = 4.0  # bits per weight that factors may take


@dataclass(frozen=True, slots=True)
class DeltaSpectrum:
    """How much of the deltas from the exact mean is in few directions.

    `share` is their share of the experts' energy, and `tails` has by rank the share of their own energy beyond it.
    """

    share: float
    tails: Mapping[int, float]

    def left_by(self, code: FactorsCode, shape: Shape, error: float) -> tuple[float, float]:
        """The shares that factors whose code has the error `error` leave of the deltas, and of added noise.

        Two factors with an error e keep (1 - e)**2 of what is within their rank. Of noise, that is the part in the rows
        or columns that deltas of this rank have.
        """
        kept = (1 - error) ** 2
        tail = float(np.interp(code.rank, [*self.tails], [*self.tails.values()]))
        outside = prod(1 - min(1.0, code.rank / side) for side in shape)
        return 1 - kept * (1 - tail), 1 - kept * (1 - outside)


def participation(rows: NDArray[np.float32]) -> float:
    """The number of directions in some rows [n, columns], by their participation ratio, relative to that of noise.

    The ratio is tr(G)**2 / tr(G**2), where G are the products of the rows; for Gaussian noise it is n m / (n + m + 1).
    """
    count, columns = rows.shape
    gram = rows.astype(np.float64) @ rows.T
    squares = float(np.square(gram).sum())
    return float(np.trace(gram)) ** 2 / squares * (count + columns + 1) / (count * columns) if squares else 1.0


def measure_tails(delta: NDArray[np.float32]) -> dict[int, float]:
    """By rank, the share of the energy of a delta [out, in] that is beyond it; empty where it has none."""
    spectrum = energy_spectrum(delta)
    total = float(spectrum.sum())
    if not 0 < total < np.inf:
        return {}
    left = np.append(1.0, 1 - np.cumsum(spectrum) / total).clip(min=0.0)
    return {rank: float(left[rank]) for rank in (0, *_ranks(len(spectrum)))}


def factor_ladder(
    shape: Shape,
    experts: int,
    bases: Sequence[MatrixCode],
    rungs: Sequence[BitsCode | TrellisCode],
    energies: Callable[[MatrixCode], tuple[float, float]],
    left_by: Callable[[MatrixCode], tuple[float, float]],
    missing: float,
    unbiased: bool,
) -> list[RoleCodes]:
    """The codes of base and deltas that do the least harm for their bytes, from the fewest bytes on.

    These are on the lower convex hull of all combinations: `bases` with deltas in `rungs`, in factors, and in sums of
    both. With a base, deltas have two `energies`, their own and that of the noise that the base's code adds. `left_by`
    gives the shares of these that the code of a delta leaves; those of a sum are the products of its parts' shares. If
    e is left of a delta, 1 - e of it is kept along its own direction, and what is missing there counts `missing` times.
    If the rest is `unbiased`, as that of a trellis always is, nothing is missing, and e / (1 - e) is noise.
    """
    most = MOST_FACTORS / 8 * prod(shape)
    factors = [FactorsCode(rank, bits) for bits in FACTOR_BITS for rank in _ranks(min(shape))]
    factors = [code for code in factors if code_bytes(code, shape) <= most]
    sides = [None, *factors], [None, *rungs]
    deltas = [*product(*sides)][1:]  # not without both
    sizes = np.add.outer(*([code_bytes(code, shape) if code else 0 for code in side] for side in sides)).ravel()[1:]
    of_factors, of_rest = (np.array([left_by(code) if code else (1.0, 1.0) for code in side]) for side in sides)
    is_unbiased = np.array([False, *(unbiased or isinstance(code, TrellisCode) for code in rungs)])
    of_rest = np.where(is_unbiased[:, None], as_noise(of_rest), of_rest)
    left = of_factors[:, None] * of_rest
    left[:, ~is_unbiased, 0] = as_harm(left[:, ~is_unbiased, 0], missing)
    left = left.reshape(-1, 2)[1:]
    taken = np.array([code_bytes(base, shape) + experts * sizes for base in bases])
    lost = np.array([left @ energies(base) for base in bases])
    chosen = (divmod(place, len(deltas)) for place in lower_hull(taken.ravel().tolist(), lost.ravel().tolist()))
    return [RoleCodes(bases[base], _sum_up(*deltas[delta]), unbiased=unbiased) for base, delta in chosen]


def as_harm(left: Numbers, missing: float) -> Numbers:
    """The harm of least-squares codes (numbers or an array) that leave such shares of deltas: 1 - e is kept along them,
    and what is missing there counts `missing` times."""
    return left * (1 - left + missing * left)


def as_noise(left: NDArray[np.float64]) -> NDArray[np.float64]:
    """The error of unbiased codes, from the share that the code with the least error leaves."""
    return left / np.maximum(1 - left, LEAST_KEPT)


def _sum_up(factors: FactorsCode | None, rest: BitsCode | TrellisCode | None) -> MatrixCode:
    """The code of a delta in factors and of what they leave, or in one of the two."""
    code = SumCode(factors, rest) if factors and rest else factors or rest
    assert code is not None
    return code


def _ranks(most: int) -> list[int]:
    """Ranks from 1 on, ever further apart."""
    ranks = [1]
    while (following := max(ranks[-1] + 1, round(RANK_STEP * ranks[-1]))) < most:
        ranks.append(following)
    return [*ranks, most] if most > 1 else ranks
