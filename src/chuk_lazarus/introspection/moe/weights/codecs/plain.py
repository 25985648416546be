"""Plain floating point numbers: bfloat16, float16, float32, float64.

Paddle writes bfloat16 through numpy, which has none: there the dtype is that of its bits, U16.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .codec import Element, Grid, Part, Stored

NAMES = {"BF16": "bf16", "U16": "bf16", "F16": "f16", "F32": "f32", "F64": "f64"}
ELEMENTS: dict[str, Element] = {
    "BF16": "bfloat16", "U16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64",
}  # fmt: skip
PARTS = ()


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored | None:
    """Takes `weight` of a floating point dtype, without other parts."""
    if parts.keys() != {"weight"} or (weight := parts["weight"]).dtype not in NAMES:
        return None
    return Stored(
        NAMES[weight.dtype], weight.shape, {"weight": 1}, decode, grid=Grid(ELEMENTS[weight.dtype], scale="none")
    )


def decode(parts: Mapping[str, NDArray[Any]], start: int, stop: int) -> NDArray[np.float32]:
    """[rows, columns] of any floating point dtype, or bits of bfloat16 -> float32."""
    weight = parts["weight"]
    if weight.dtype == np.uint16:
        weight = weight.view(ml_dtypes.bfloat16)
    with np.errstate(over="ignore"):  # a float64 that is too large becomes infinite, which is reported later
        return weight.astype(np.float32)
