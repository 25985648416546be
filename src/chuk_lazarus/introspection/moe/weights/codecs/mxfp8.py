"""MXFP8: E4M3 or E5M2 elements in groups of 32 inputs with an E8M0 scale each.

`weight` [..., rows, columns] is FP8, `weight_scale` or `weight_scale_inv` [..., rows, columns / 32] is E8M0 or uint8
with the same bytes. A scale is 2^(byte - 127), where 255 is NaN (OCP Microscaling Formats v1.0, sections 5.2 and
5.4.1). compressed-tensors calls this `mxfp8-quantized`; ModelOpt and MiniMax-M3 store the same.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codec import Grid, Part, Stored
from .fp8 import ELEMENTS, SCALE_NAMES, WEIGHTS, find_blocks, grid
from .small_floats import E8M0, is_grid, scale_groups, widen

GROUP = 32
PARTS = ("weight_scale", "weight_scale_inv")


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored | None:
    """Takes `weight` in FP8 beside exponents of 32 inputs each, unless the config's blocks fit these scales as well."""
    scale = next((name for name in SCALE_NAMES if parts.keys() == {"weight", name}), None)
    if scale is None or parts["weight"].dtype not in WEIGHTS or parts[scale].dtype not in ("U8", "F8_E8M0"):
        return None
    shape = parts["weight"].shape
    if len(shape) < 2 or shape[-1] % GROUP or not is_grid(parts[scale].shape, grid(shape, (1, GROUP))):
        return None
    if any(block != (1, GROUP) and grid(shape, block) == parts[scale].shape for block in find_blocks(quantization)[1]):
        return None
    grid_of_numbers = Grid(ELEMENTS[parts["weight"].dtype], (1, GROUP), scale="e8m0")
    return Stored("mxfp8", shape, {"weight": 1, scale: 1}, partial(decode, scale=scale), grid=grid_of_numbers)


def decode(parts: Mapping[str, NDArray[Any]], start: int, stop: int, *, scale: str) -> NDArray[np.float32]:
    """FP8 [rows, columns] times 2^(exponent - 127) [rows, columns / 32]."""
    values = widen(parts["weight"])
    scale_groups(values, widen(parts[scale], E8M0), GROUP)
    return values
