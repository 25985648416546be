"""The error that a storage format should cause: that of plain rounding of the same weights to it."""

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from ..numerics.deviation import deviation
from ..numerics.neurons import Array
from ..numerics.rounding import round_integers, round_levels, sample_groups, table_levels
from ..weights.codecs import Grid

ARITHMETIC = 2.0**-8  # the relative error of numbers that went through bfloat16 once or twice on their way
CASTS: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
SMALL_FLOATS: dict[str, tuple[int, type]] = {
    "e4m3": (256, ml_dtypes.float8_e4m3fn),
    "e5m2": (256, ml_dtypes.float8_e5m2),
    "e2m3": (64, ml_dtypes.float6_e2m3fn),
    "e3m2": (64, ml_dtypes.float6_e3m2fn),
    "e2m1": (16, ml_dtypes.float4_e2m1fn),
}
TABLES = {
    # QLoRA, arXiv 2305.14314, appendix E
    "nf4": (
        -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ),
    # bitsandbytes, create_fp4_map of functional.py
    "fp4": (-12, -8, -6, -4, -3, -2, -0.0625, 0, 0.0625, 2, 3, 4, 6, 8, 12),
    "ternary": (-1, 0, 1),
    # llama.cpp, kvalues_iq4nl of ggml-common.h
    "iq4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
}  # fmt: skip


def format_error(matrix: Array, grid: Grid) -> float:
    """The relative error of plain rounding of a matrix [rows, columns], as the format's rows lie, to the format.

    Estimated from a sample of its groups.
    """
    if grid.scale == "none":
        taken = sample_groups(matrix, 1, 64)
        with np.errstate(over="ignore"):
            return deviation(taken.astype(CASTS[grid.element]).astype(np.float32), taken)
    height, width = grid.group
    is_whole = height is None and width is None
    taken = sample_groups(matrix, *((1, 64) if is_whole else grid.group))
    # a second scale only keeps the first ones in range, so the sample's is good enough
    whole = float(max(matrix.max(), -matrix.min()) if is_whole else np.abs(taken).max())
    largest = whole if is_whole else None
    if grid.element == "int":
        kind = CASTS[grid.scale]
        rounded = round_integers(taken, grid.bits, grid.has_zero and not is_whole, kind, largest)
    else:
        rounded = round_levels(taken, _levels(grid.element), grid.scale, whole, largest)
    return deviation(rounded, taken)


@cache
def _levels(element: str) -> Array:
    if element in TABLES:
        return np.array(TABLES[element], np.float32)
    return table_levels(*SMALL_FLOATS[element])
