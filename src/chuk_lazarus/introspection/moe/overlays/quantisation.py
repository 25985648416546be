"""What storage does to numbers: rounding to bfloat16, and plain affine quantisation."""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..numerics.low_rank import BYTES_PER_NUMBER

BF16 = np.dtype(ml_dtypes.bfloat16)


def as_stored(array: NDArray[Any]) -> NDArray[np.float32]:
    """The array after a round trip through a bfloat16 file."""
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def round_to_bits(matrix: NDArray[np.float32], bits: int, group: int = 64) -> NDArray[np.float32]:
    """The matrix [rows, columns] after plain affine quantisation to `bits` per weight.

    Each `group` weights of a row have a scale and a least value, which are rounded to bfloat16. The last group of a row
    may be shorter.
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
    """Bytes of a matrix that is quantised as `round_to_bits` does, with two bytes each for scale and least value."""
    rows, columns = shape
    return rows * (-(-columns * bits // 8) + 2 * BYTES_PER_NUMBER * -(-columns // group))
