"""The error of plain rounding to few bits: each group scaled to its largest number, and rounded. Pure arrays."""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .neurons import Array

SAMPLE = 8192  # numbers of a matrix by which its error is estimated
LEAST_GROUPS = 8  # of a sample, if there are that many


def table_levels(codes: int, kind: type) -> Array:
    """The finite values of a small float with that many codes, ascending."""
    values = np.arange(codes, dtype=np.uint8).view(kind).astype(np.float32)
    return np.unique(values[np.isfinite(values)])


def sample_groups(matrix: Array, height: int | None, width: int | None, count: int = SAMPLE) -> Array:
    """Some groups of `height` x `width` numbers of a matrix [rows, columns], seeded, each as a row: [n, numbers].

    None is the whole length. Groups that would reach over the edge are cut off, unless they are all there is.
    """
    rows, columns = matrix.shape
    height, width = (min(size or length, length) for size, length in zip((height, width), matrix.shape, strict=True))
    down, across = rows // height, columns // width
    wanted = max(LEAST_GROUPS, count // (height * width))
    places: NDArray[np.integer] = np.arange(down * across)
    if wanted < len(places):
        places = np.sort(np.random.default_rng(0).choice(len(places), wanted, replace=False))
    grouped = matrix[: down * height, : across * width].reshape(down, height, across, width)
    taken = grouped[places // across, :, places % across]
    return np.ascontiguousarray(taken.reshape(len(places), -1))


def round_integers(
    groups: Array, bits: int, has_zero: bool, kind: Any = np.float32, largest: float | None = None
) -> Array:
    """Groups [n, numbers] as integers of `bits` bits times a scale, and plus a least value where they have a zero.

    Scales and least values are numbers of the type `kind`. `largest` is the magnitude that the scale is for, by default
    the greatest in each group.
    """
    top = (1 << bits) - 1

    def keep(numbers: Array) -> Array:
        return numbers.astype(kind).astype(np.float32)

    if has_zero:
        low = groups.min(axis=1, keepdims=True)
        step = _or_one((groups.max(axis=1, keepdims=True) - low) / np.float32(top))
        return np.asarray(np.rint((groups - low) / step) * keep(step) + keep(low))
    scale = _or_one(keep(_magnitudes(groups, largest) / np.float32(top / 2)))
    half = 1 << (bits - 1)
    return np.asarray(np.clip(np.rint(groups / scale), -half, half - 1) * scale)


def round_levels(groups: Array, levels: Array, scale: str, whole: float, largest: float | None = None) -> Array:
    """Groups [n, numbers] as the nearest of `levels`, ascending, times a scale.

    `scale` is a float type, "e8m0" or "e4m3"; scales of the latter are eight bits below a second one, which is for a
    matrix whose greatest magnitude is `whole`. `largest` as in `round_integers`. Powers of two are chosen as the OCP
    Microscaling Formats v1.0 do, section 6.3.
    """
    top = np.float32(np.abs(levels).max())
    magnitudes = _magnitudes(groups, largest)
    if scale == "e8m0":
        exponents = np.floor(np.log2(_or_one(magnitudes))) - np.floor(np.log2(top))
        scales = np.exp2(exponents, dtype=np.float32)
    elif scale == "e4m3" and whole > 0:
        second = np.float32(whole) / (top * np.float32(448))
        scales = (magnitudes / (top * second)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * second
    else:
        scales = magnitudes / top
    scales = _or_one(scales)
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, groups / scales)] * scales


def _magnitudes(groups: Array, largest: float | None) -> Array:
    """The greatest magnitude of each group, [n, 1], or the one that is given for all."""
    if largest is not None:
        return np.full((len(groups), 1), largest, np.float32)
    return np.asarray(np.abs(groups).max(axis=1, keepdims=True))


def _or_one(scales: Array) -> Array:
    return np.where(scales > 0, scales, np.float32(1))
