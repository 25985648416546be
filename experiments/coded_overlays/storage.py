"""How numbers are stored, and in how many bits: what the peers are built from.

Functions take matrices [..., out, in] and return what a reader of the stored numbers gets. Groups run along the rows,
and over their ends where a row is shorter than a group.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def as_bf16(values: Array) -> Array:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def round_to_nearest(matrix: Array, bits: int, group: int = 64) -> Array:
    """Affine codes as `mx.quantize` makes them from least and greatest; scale and bias in bf16."""
    grouped = _group(matrix, group)
    low, high = grouped.min(-1, keepdims=True), grouped.max(-1, keepdims=True)
    low = as_bf16(low)
    step = as_bf16((high - low) / (2**bits - 1))
    levels = np.divide(grouped - low, step, out=np.zeros_like(grouped), where=step > 0)
    return _ungroup(low + step * np.clip(np.rint(levels), 0, 2**bits - 1), matrix)


def round_bits(bits: int, group: int = 64) -> float:
    """Bits a weight of `round_to_nearest`."""
    return bits + 32 / group


@cache
def gaussian_levels(count: int) -> tuple[float, ...]:
    """Lloyd and Max's levels for a standard Gaussian."""
    draws = np.sort(np.random.default_rng(0).standard_normal(100_000))
    levels = np.quantile(draws, (np.arange(count) + 0.5) / count)
    for _ in range(100):
        cells = np.searchsorted((levels[1:] + levels[:-1]) / 2, draws)
        levels = np.bincount(cells, draws, count) / np.bincount(cells, minlength=count)
    return tuple((levels - levels[::-1]) / 2)


def lloyd_max(matrix: Array, count: int, group: int = 128, unbiased: bool = True) -> Array:
    """The levels of a Gaussian in each group, with the scale of least squares in a byte (1/16 octave).

    With `unbiased`, one factor for each matrix undoes that such codes shrink it.
    """
    grouped = _group(matrix, group)
    levels = np.asarray(gaussian_levels(count), np.float32)
    middles = (levels[1:] + levels[:-1]) / 2
    scale = np.sqrt(np.square(grouped).mean(-1, keepdims=True))
    for _ in range(3):
        picked = levels[
            np.searchsorted(middles, np.divide(grouped, scale, out=np.zeros_like(grouped), where=scale > 0))
        ]
        square = np.square(picked).sum(-1, keepdims=True)
        scale = np.maximum(0, np.divide((grouped * picked).sum(-1, keepdims=True), square, where=square > 0, out=scale))
    with np.errstate(divide="ignore"):
        scale = np.exp2(np.rint(16 * np.log2(scale)) / 16)
    picked = levels[np.searchsorted(middles, np.divide(grouped, scale, out=np.zeros_like(grouped), where=scale > 0))]
    result = _ungroup(picked * scale, matrix)
    if unbiased:
        product = (result * matrix).sum((-2, -1), keepdims=True)
        energy = np.square(matrix).sum((-2, -1), keepdims=True)
        result *= np.divide(energy, product, out=np.ones_like(energy), where=product > 0)
    return result


def lloyd_bits(count: int, group: int = 128) -> float:
    """Bits a weight of `lloyd_max`; three levels are packed five to a byte."""
    return (1.6 if count == 3 else math.log2(count)) + 8 / group


def signs(matrix: Array) -> Array:
    """The sign of every weight times the mean of the absolute ones, one number in bf16 for each matrix."""
    return np.where(matrix >= 0, np.float32(1), np.float32(-1)) * as_bf16(np.abs(matrix).mean((-2, -1), keepdims=True))


def keep_largest(matrix: Array, share: float) -> Array:
    """The share of the weights of each matrix that are largest, and zeros."""
    flat = matrix.reshape(*matrix.shape[:-2], -1)
    count = max(1, round(share * flat.shape[-1]))
    least = np.partition(np.abs(flat), flat.shape[-1] - count, axis=-1)[..., -count, None]
    return np.where(np.abs(flat) >= least, flat, np.float32(0)).reshape(matrix.shape)


def place_bits(share: float) -> float:
    """Bits a weight to say which are kept: as few as any code could take (their entropy)."""
    return -sum(part * math.log2(part) for part in (share, 1 - share) if part)


@dataclass(frozen=True)
class Precision:
    """How a method stores the numbers that it keeps."""

    name: str
    bits: float
    store: Callable[[Array], Array]


BF16 = Precision("bf16", 16.0, as_bf16)
FOUR_BITS = Precision("4 bits", round_bits(4), lambda values: round_to_nearest(values, 4))
PRECISIONS = (BF16, FOUR_BITS)


def _group(matrix: Array, group: int) -> Array:
    flat = matrix.reshape(*matrix.shape[:-2], -1)
    pad = -flat.shape[-1] % group
    if pad:
        flat = np.concatenate([flat, np.repeat(flat[..., -1:], pad, axis=-1)], axis=-1)
    return flat.reshape(*flat.shape[:-1], -1, group)


def _ungroup(grouped: Array, like: Array) -> Array:
    flat = grouped.reshape(*grouped.shape[:-2], -1)
    return flat[..., : like.shape[-2] * like.shape[-1]].reshape(like.shape).astype(np.float32)
