"""The four-bit integers of ModelOpt's AWQ: signed, in groups of inputs, two outputs a byte.

`weight` U8 [..., out / 2, in] holds the number of an even output in its low nibble and that of the next output in its
high one, in two's complement; `weight_scale` is of floats [..., out, in / group] (`pack_int4_in_uint8` in
modelopt/torch/export/quant_utils.py, 0.47). A weight is integer * scale. The `weight_scale_2` of W4A8_AWQ
is the scale of the FP8 numbers that a runtime rounds these weights to, and no factor of them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelUnreadable
from .codec import Grid, Part, Stored
from .small_floats import is_one_per_matrix, scale_groups

PARTS = ("weight_scale", "weight_scale_2")


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored | None:
    """Takes `weight` in bytes beside float scales where the config is ModelOpt's."""
    if quantization.get("quant_method") != "modelopt" or not {"weight", "weight_scale"} <= parts.keys():
        return None
    weight, scales = parts["weight"], [parts[name] for name in PARTS if name in parts]
    if parts.keys() - {"weight", *PARTS} or weight.dtype != "U8" or len(weight.shape) < 2:
        return None
    if any(scale.dtype not in ("F32", "BF16", "F16") for scale in scales):
        return None
    *leading, pairs, columns = weight.shape
    scale, *second = scales
    groups = scale.shape[-1] if scale.shape else 0
    if scale.shape != (*leading, 2 * pairs, groups) or not groups or columns % groups:
        raise ModelUnreadable(
            f"its weight is {list(weight.shape)} and its weight_scale {list(scale.shape)}: not ModelOpt's INT4"
        )
    if second and not is_one_per_matrix(second[0].shape, tuple(leading)):
        raise ModelUnreadable(f"its weight_scale_2 is {list(second[0].shape)}, not one number per matrix")
    grid = Grid("int", (1, columns // groups), 4)
    return Stored("int4", (*leading, 2 * pairs, columns), {"weight": 2, "weight_scale": 1}, decode, grid=grid)


def decode(parts: Mapping[str, NDArray[Any]], start: int, stop: int) -> NDArray[np.float32]:
    """Bytes [rows / 2, columns] and scales [rows, groups] -> float32 [rows, columns]."""
    data, scales = parts["weight"], parts["weight_scale"].astype(np.float32)
    codes = np.stack([data & 15, data >> 4], axis=1).reshape(2 * len(data), -1)[start % 2 :][: stop - start]
    values = (codes ^ np.uint8(8)).astype(np.float32) - np.float32(8)
    scale_groups(values, scales, values.shape[1] // scales.shape[1])
    return values
