"""W4AFP8: signed four-bit integers in groups of 128 inputs, as DeepSeek's experts are stored for FP8 inputs.

`weight` int8 [..., out, in / 2] holds two numbers a byte in two's complement, the even one in the low nibble;
`weight_scale_inv` [..., out, in / 128] is *multiplied* despite its name (quantization/w4afp8.py of SGLang). The
config's `quant_method` is w4afp8.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelUnreadable
from .codec import Grid, Part, Stored
from .fp8 import SCALE_NAMES
from .small_floats import is_grid, scale_groups, widen

GROUP = 128
PARTS = SCALE_NAMES


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored | None:
    """Takes `weight` in bytes beside float scales where the config says w4afp8."""
    scale = next((name for name in SCALE_NAMES if parts.keys() == {"weight", name}), None)
    if scale is None or quantization.get("quant_method") != "w4afp8" or parts["weight"].dtype not in ("I8", "U8"):
        return None
    *rows, width = parts["weight"].shape
    stated = quantization.get("group_size")
    group = stated if type(stated) is int and stated > 0 else GROUP
    columns, scales = 2 * width, parts[scale]
    if scales.dtype not in ("F32", "BF16", "F16") or not is_grid(scales.shape, (*rows, -(-columns // group))):
        raise ModelUnreadable(
            f"its weight is {list(parts['weight'].shape)} and its {scale} {scales.dtype} {list(scales.shape)}: not "
            f"four-bit integers in groups of {group}"
        )
    decoder, grid = partial(decode, scale=scale, group=group), Grid("int", (1, group), 4)
    return Stored("w4afp8", (*rows, columns), {"weight": 1, scale: 1}, decoder, grid=grid)


def decode(parts: Mapping[str, NDArray[Any]], start: int, stop: int, *, scale: str, group: int) -> NDArray[np.float32]:
    """Bytes [rows, columns / 2] and scales [rows, groups] -> float32 [rows, columns]."""
    data = np.ascontiguousarray(parts["weight"]).view(np.uint8)
    codes = np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1)
    values = (codes ^ np.uint8(8)).astype(np.float32) - np.float32(8)
    scale_groups(values, widen(parts[scale]), group)
    return values
