"""The only code that uses a GPU: products of rows and the decoding of small numbers, by numpy on the CPU or MLX on a
GPU.

MLX is used on Apple Silicon, and elsewhere if LAZARUS_DEVICE is "gpu"; "cpu" keeps everything on the CPU, where BLAS is
a hundred times faster than MLX.
"""

import os
import platform
from contextlib import suppress
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidRequest

_PIECE = 1 << 15
_one_at_a_time = Lock()  # threads share the GPU


def gram(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The products of all pairs of rows, [n, n], in float32."""
    device = gpu()
    return rows @ rows.T if device is None else gram_by_mlx(rows, device)


def look_up(table: NDArray[np.float32], codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The table's row of one number or two for each code: [codes, n] and [..., k] -> [..., k * n]."""
    device = gpu()
    return look_up_by_numpy(table, codes) if device is None else look_up_by_mlx(table, codes, device)


@cache
def gpu() -> Any:
    """MLX's GPU device, None if there is none or the CPU was requested.

    Raises InvalidRequest if a GPU was requested and there is none.
    """
    wanted = os.environ.get("LAZARUS_DEVICE", "")
    if wanted not in ("", "cpu", "gpu"):
        raise InvalidRequest(f"LAZARUS_DEVICE is {wanted}", "set it to cpu or gpu")
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    if wanted == "gpu" or (apple and wanted != "cpu"):
        os.environ.setdefault("MLX_ENABLE_TF32", "0")  # ten bits of a product are too few for a rank
        with suppress(ImportError, RuntimeError, ValueError):
            import mlx.core as mx

            device = mx.Device(mx.gpu, 0)
            with _one_at_a_time:  # a device that can't work says so here
                mx.eval(mx.zeros((1,), stream=device))
            return device
    if wanted == "gpu":
        raise InvalidRequest("LAZARUS_DEVICE is gpu, but MLX finds no GPU", "unset it")
    return None


def gram_by_mlx(rows: NDArray[np.float32], device: Any) -> NDArray[np.float32]:
    """As `gram`, on a device of MLX."""
    import mlx.core as mx

    with _one_at_a_time:
        array = mx.array(rows)
        return np.array(mx.matmul(array, array.T, stream=device))


def look_up_by_mlx(table: NDArray[np.float32], codes: NDArray[np.uint8], device: Any) -> NDArray[np.float32]:
    """As `look_up`, on a device of MLX."""
    import mlx.core as mx

    with _one_at_a_time:
        rows = np.array(mx.take(mx.array(table), mx.array(codes), axis=0, stream=device))
    return rows.reshape(*codes.shape[:-1], -1)


def look_up_by_numpy(table: NDArray[np.float32], codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """As `look_up`; a piece at a time, because numpy makes eight bytes of each index."""
    items = table.view(f"u{4 * table.shape[1]}").ravel()  # each row as one number
    result = np.empty(codes.shape, items.dtype)
    flat_codes, flat_result = codes.reshape(-1), result.reshape(-1)
    for start in range(0, len(flat_codes), _PIECE):
        items.take(flat_codes[start : start + _PIECE], out=flat_result[start : start + _PIECE], mode="clip")
    return result.view(np.float32)
