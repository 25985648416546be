"""Scales of groups in a byte each: logarithmic, below one unit for the whole matrix.

Byte 0 is a scale of zero; byte k is unit * 2**((k - 255) / 16), so that neighbours differ by 4.4 % and the least is
2**-15.9 of the unit.
"""

import numpy as np
from numpy.typing import NDArray

STEPS = 16  # scales in an octave
TOP = 255
GREATEST = float(np.finfo(np.float32).max)
GRID = np.concatenate([[0.0], np.exp2((np.arange(1, TOP + 1) - TOP) / STEPS)])  # scales of the bytes, over the unit


def encode_scales(
    scales: NDArray[np.float32], rounding: float, unit: float | None = None
) -> tuple[NDArray[np.uint8], float]:
    """Non-negative scales of any shape -> their bytes, and the unit: the largest of them, or the one that is given.

    `rounding` steps are added before a scale is rounded to the nearest byte: 0.5 rounds up. A scale below the grid
    becomes zero.
    """
    unit = float(scales.max(initial=0.0)) if unit is None else unit
    if not unit:
        return np.zeros(scales.shape, np.uint8), 0.0
    with np.errstate(divide="ignore"):
        steps = np.rint(np.log2(scales / np.float32(unit)) * STEPS + np.float32(rounding)) + TOP
    return np.where(steps < 1, 0, np.minimum(steps, TOP)).astype(np.uint8), unit


def decode_scales(codes: NDArray[np.uint8], units: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scales [..., rows, groups] of bytes of that shape, whose units are [...]."""
    grids = (units.astype(np.float64)[..., None] * GRID).astype(np.float32)  # the scales that each matrix can have
    scales = np.take_along_axis(grids, codes.reshape(*units.shape, -1), axis=-1)
    return scales.reshape(codes.shape)
