"""Floats of four and eight bits, and the scales that groups of them share.

E2M1, E4M3 and E8M0 are defined in the OCP Microscaling Formats specification v1.0 (section 5.3), E4M3 and E5M2 in the
OCP 8-bit Floating Point specification v1.0. Since they have at most 256 codes, we decode them by a look-up, which is
several times faster than a cast.
"""

from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ...numerics.device import look_up

E4M3, E5M2, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu

_CODES = np.arange(256, dtype=np.uint8)
_VALUES: dict[np.dtype[Any], NDArray[np.float32]] = {
    np.dtype(kind): _CODES.view(kind).astype(np.float32)[:, None] for kind in (E4M3, E5M2, E8M0)
}
_NIBBLES = _CODES[:16].view(ml_dtypes.float4_e2m1fn).astype(np.float32)
_PAIRS = np.stack([np.tile(_NIBBLES, 16), np.repeat(_NIBBLES, 16)], axis=1)  # the two elements of each byte


def widen(array: NDArray[Any], kind: type | None = None) -> NDArray[np.float32]:
    """Numbers -> a new float32 array of the same shape; `kind` is the elements' type where their dtype is bytes."""
    values = _VALUES.get(np.dtype(kind) if kind else array.dtype)
    if values is None:
        return array.astype(np.float32)
    return look_up(values, _as_codes(array)).reshape(array.shape)


def unpack_e2m1(data: NDArray[Any]) -> NDArray[np.float32]:
    """Bytes [..., n] -> float32 [..., 2n]; the low nibble of a byte is the even element."""
    return look_up(_PAIRS, _as_codes(data))


def _as_codes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).view(np.uint8)


def scale_groups(values: NDArray[np.float32], scales: NDArray[np.float32], span: int) -> None:
    """Multiply groups of `span` columns of [rows, columns] in place by scales [rows, ceil(columns / span)]."""
    rows, columns = values.shape
    with np.errstate(over="ignore", invalid="ignore"):  # numbers that are too large become infinite, reported later
        if columns % span:
            values *= np.repeat(scales, span, axis=1)[:, :columns]
        else:
            grouped = values.reshape(rows, columns // span, span)
            grouped *= scales[:, :, None]


def is_grid(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether scales of this shape are those of `expected`, [..., rows, groups].

    The rows of all matrices of a stack may lie below each other, as Quark stores them.
    """
    return shape in (expected, (prod(expected[:-1]), expected[-1]))


def is_one_per_matrix(shape: tuple[int, ...], leading: tuple[int, ...]) -> bool:
    """Whether a part of this shape has one number for each matrix of a stack, or one number for all of them."""
    return set(shape) <= {1} or shape in (leading, (*leading, 1), (*leading, 1, 1))
