"""Numbers as files hold them: bfloat16, and plain affine quantisation."""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..numerics.low_rank import BYTES_PER_NUMBER

BF16 = np.dtype(ml_dtypes.bfloat16)


def as_stored(array: NDArray[Any]) -> NDArray[np.float32]:
    """The numbers as a bfloat16 file would give them back."""
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def round_to_bits(matrix: NDArray[np.float32], bits: int, group: int = 64) -> NDArray[np.float32]:
    """The matrix after plain affine quantisation: `bits` per weight, a scale and a least value per group of a row.

    Scale and least value are rounded to bfloat16, as they are stored. A last, shorter group is a group too.
    """
    result = np.empty_like(matrix)
    for start in range(0, matrix.shape[1], group):
        part = matrix[:, start : start + group]
        low = as_stored(part.min(axis=1, keepdims=True))
        step = as_stored((part.max(axis=1, keepdims=True) - low) / (2**bits - 1))
        levels = np.divide(part - low, step, out=np.zeros_like(part), where=step > 0)
        result[:, start : start + group] = low + step * np.clip(np.rint(levels), 0, 2**bits - 1)
    return result


def quantised_bytes(shape: Sequence[int], bits: int, group: int = 64) -> int:
    """Bytes of a matrix at `bits` per weight, with two numbers of two bytes per group of a row."""
    rows, columns = shape
    return rows * (-(-columns * bits // 8) + 2 * BYTES_PER_NUMBER * -(-columns // group))
