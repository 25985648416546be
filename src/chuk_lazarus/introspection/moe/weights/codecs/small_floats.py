"""Floats of four and eight bits, and the scales that groups of them share.

E2M1, E4M3 and E8M0 are those of the OCP Microscaling Formats specification v1.0 (section 5.3), E4M3 and E5M2 those of
the OCP 8-bit Floating Point specification v1.0. There are at most 256 codes, so that decoding is a look-up, several
times faster than a cast.
"""

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
    """Numbers -> a new float32 array; `kind` says what the elements are where their dtype is bytes."""
    values = _VALUES.get(np.dtype(kind) if kind else array.dtype)
    if values is None:
        return array.astype(np.float32)
    return look_up(values, _as_codes(array)).reshape(array.shape)


def unpack_e2m1(data: NDArray[Any]) -> NDArray[np.float32]:
    """Bytes [..., n] -> float32 [..., 2n]: the low nibble is the even element."""
    return look_up(_PAIRS, _as_codes(data))


def _as_codes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).view(np.uint8)


def scale_groups(values: NDArray[np.float32], scales: NDArray[np.float32], span: int) -> None:
    """Multiply each `span` columns of [rows, columns] by their scale, [rows, ceil(columns / span)], in place."""
    rows, columns = values.shape
    with np.errstate(over="ignore", invalid="ignore"):  # what is too large becomes infinite, and is reported as such
        if columns % span:
            values *= np.repeat(scales, span, axis=1)[:, :columns]
        else:
            grouped = values.reshape(rows, columns // span, span)
            grouped *= scales[:, :, None]


def is_one_per_matrix(shape: tuple[int, ...], leading: tuple[int, ...]) -> bool:
    """Whether a part of this shape has one number for each matrix of a stack, or a single one for all."""
    return set(shape) <= {1} or shape in (leading, (*leading, 1), (*leading, 1, 1))
