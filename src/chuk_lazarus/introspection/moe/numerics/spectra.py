"""The energy spectrum of a matrix, its effective ranks, and the rank of noise of the same shape."""

from collections.abc import Sequence
from functools import cache
from math import atan, cos, pi, sin, sqrt, tan

import numpy as np
from numpy.typing import NDArray

from .gram import gram_matrix
from .lapack import symmetric_eigenvalues

SHARES = (0.90, 0.95, 0.99)  # of energy, whose ranks must be exact
DECAY_POINTS = 65  # of a spectrum that a report keeps
MARGIN = 1e-6  # error of leading energies in float32, as a share of their sum
ROUNDING = 1e-9
"""A delta with less than this share of its expert's energy is rounding, not structure."""


def energy_spectrum(matrix: NDArray[np.float32]) -> NDArray[np.float64]:
    """The squared singular values of a matrix [m, n], largest first, min(m, n) of them.

    They are the eigenvalues of the Gram matrix on the short side, which costs a fraction of a singular value
    decomposition. Product and solver work in float32, where the error of sums of leading values is below MARGIN of the
    whole; where that could change the rank at one of SHARES, they are done again in float64.
    """
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    product = gram_matrix(short)
    if product.dtype == np.float32:
        spectrum = symmetric_eigenvalues(product)[::-1].clip(min=0.0).astype(np.float64)
        if not any(is_close_call(spectrum, share) for share in SHARES):
            return spectrum
        wide = short.astype(np.float64)
        product = wide @ wide.T
    return np.asarray(np.linalg.eigvalsh(product)[::-1].clip(min=0.0))


def is_close_call(spectrum: NDArray[np.float64], fraction: float) -> bool:
    """Whether errors of MARGIN could change the effective rank, or the sum is too large for float32."""
    total = spectrum.sum()
    if not np.isfinite(total):
        return True
    sums = np.cumsum(spectrum)
    return bool(total > 0 and np.abs(sums[:-1] - fraction * total).min(initial=np.inf) < MARGIN * total)


def effective_rank(spectrum: NDArray[np.float64], fraction: float) -> int:
    """The least number of leading entries of an energy spectrum that sum to `fraction` of it; 0 for no energy."""
    total = spectrum.sum()
    if total <= 0:
        return 0
    return int(np.searchsorted(np.cumsum(spectrum), fraction * total * (1 - 1e-12))) + 1


@cache
def noise_rank(shape: tuple[int, int], fraction: float) -> float:
    """The effective rank to expect of an iid Gaussian matrix of this shape, at least 1.

    By the Marchenko-Pastur law, with c = m/n <= 1: at eigenvalue 1 + c + 2 sqrt(c) cos(t), the *energy* above follows a
    semicircle, (t - sin t cos t) / pi, and the *number* of eigenvalues above is the integral of
    2 sin^2 t / (pi (1 + c + 2 sqrt(c) cos t)) from 0 to t, which has a closed form. (scipy would solve both,
    and takes longer to load than an analysis.)
    """
    small, large = sorted(shape)
    if small == 0:
        return 0.0
    ratio = small / large
    low, angle = 0.0, pi
    while low < (middle := (low + angle) / 2) < angle:
        if middle - sin(middle) * cos(middle) < pi * fraction:
            low = middle
        else:
            angle = middle
    a, b = 1 + ratio, 2 * sqrt(ratio)
    turn = (1 - ratio) * atan((1 - sqrt(ratio)) / (1 + sqrt(ratio)) * tan(angle / 2))
    share = 2 / pi * ((a * angle - 2 * turn) / b**2 - sin(angle) / b)
    return max(1.0, share * small)


def sample_decay(spectrum: NDArray[np.float64], points: int = DECAY_POINTS) -> NDArray[np.float64]:
    """The singular values at evenly spaced ranks from the first to the last, over their root mean square; all zero for
    no energy."""
    finite = np.minimum(spectrum, np.finfo(np.float64).max)  # an energy may be more than float32 holds
    shares = finite / (finite.max(initial=0.0) or 1.0)
    places = np.linspace(0, len(spectrum) - 1, min(points, len(spectrum))).round().astype(int)
    return np.asarray(np.sqrt(shares[places]) / (sqrt(shares.mean()) or 1.0))


@cache
def noise_decay(shape: tuple[int, int], points: int = DECAY_POINTS) -> tuple[float, ...]:
    """The `sample_decay` to expect of an iid Gaussian matrix of this shape, by the law in `noise_rank`."""
    small, large = sorted(shape)
    ratio = small / large
    angles = np.linspace(0.0, pi, 2001)
    above = 2 * np.sin(angles) ** 2 / (pi * (1 + ratio + 2 * ratio**0.5 * np.cos(angles) + 1e-12))
    share = np.concatenate([[0.0], np.cumsum((above[1:] + above[:-1]) / 2 * np.diff(angles))])
    places = (np.linspace(0, small - 1, min(points, small)).round() + 0.5) / small
    angle = np.interp(places, share / share[-1], angles)
    return tuple(float(x) for x in np.sqrt(np.maximum(0.0, 1 + ratio + 2 * ratio**0.5 * np.cos(angle))))


def mean_rank(spectra: Sequence[NDArray[np.float64]], fraction: float) -> float:
    """The mean effective rank over several spectra."""
    return float(np.mean([effective_rank(spectrum, fraction) for spectrum in spectra]))
