"""MXFP4: E2M1 elements in groups of 32 inputs with an E8M0 scale each.

A byte holds two elements, the even one in the low nibble. A scale is 2^(byte - 127), where 255 is NaN (OCP Microscaling
Formats v1.0, sections 5.3.3 and 5.4.1). Publishers store it as

- `blocks` uint8 [..., rows, groups, 16] and `scales` uint8 [..., rows, groups]: GPT-OSS;
- `weight_packed` uint8 [..., rows, columns / 2] and `weight_scale` [..., rows, columns / 32]: compressed-tensors,
  `mxfp4-pack-quantized`;
- `weight` int8 or uint8 [..., rows, columns / 2], or of the safetensors dtype F4, whose shape counts elements
  [..., rows, columns], beside the same scales: DeepSeek-V4, ModelOpt.

The dtype of the scales is E8M0, or uint8 with the same bytes. In a stack, the rows of all matrices' scales may lie
below each other, [experts * rows, groups]: Quark.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelUnreadable
from .codec import Grid, Part, Stored
from .fp8 import SCALE_NAMES
from .small_floats import E8M0, is_grid, scale_groups, unpack_e2m1, widen

GROUP = 32
GRID = Grid("e2m1", (1, GROUP), scale="e8m0")
PARTS = ("blocks", "scales", "weight_packed", "weight_scale", "weight_scale_inv")


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored | None:
    """Takes pairs of E2M1 elements beside exponents."""
    if parts.keys() == {"blocks", "scales"}:
        return _recognise_blocks(parts["blocks"], parts["scales"])
    scale = next((name for name in SCALE_NAMES if name in parts), None)
    packed = find_pairs(parts)
    if len(parts) != 2 or scale is None or packed is None or parts[scale].dtype not in ("U8", "F8_E8M0"):
        return None
    shape, scales = pairs_shape(parts[packed]), parts[scale].shape
    if shape[-1] % GROUP or not is_grid(scales, (*shape[:-1], shape[-1] // GROUP)):
        raise ModelUnreadable(f"its {packed} is {list(parts[packed].shape)} and its {scale} {list(scales)}: not MXFP4")
    return Stored("mxfp4", shape, {packed: 1, scale: 1}, partial(decode, elements=packed, scale=scale), grid=GRID)


def decode(
    parts: Mapping[str, NDArray[Any]], start: int, stop: int, *, elements: str, scale: str
) -> NDArray[np.float32]:
    """Bytes [rows, ...] and exponents [rows, groups] -> float32 [rows, groups * 32].

    `elements` and `scale` are the names of the parts.
    """
    values = unpack_e2m1(parts[elements].reshape(len(parts[elements]), -1))
    scale_groups(values, widen(parts[scale], E8M0), GROUP)
    return values


def find_pairs(parts: Mapping[str, Part]) -> str | None:
    """The name of the part that may hold pairs of E2M1 elements."""
    for name, dtypes in (("weight_packed", ("U8",)), ("weight", ("U8", "I8", "F4"))):
        if name in parts and parts[name].dtype in dtypes and len(parts[name].shape) > 1:
            return name
    return None


def pairs_shape(part: Part) -> tuple[int, ...]:
    """The shape in elements of a part of pairs; its own shape counts elements in F4, and bytes in other dtypes."""
    return part.shape if part.dtype == "F4" else (*part.shape[:-1], part.shape[-1] * 2)


def _recognise_blocks(blocks: Part, scales: Part) -> Stored | None:
    if {blocks.dtype, scales.dtype} != {"U8"}:
        return None
    if len(blocks.shape) < 3 or blocks.shape[-1] != GROUP // 2 or scales.shape != blocks.shape[:-1]:
        raise ModelUnreadable(f"its blocks are {list(blocks.shape)} and its scales {list(scales.shape)}: not MXFP4")
    shape = (*blocks.shape[:-2], blocks.shape[-2] * GROUP)
    decoder = partial(decode, elements="blocks", scale="scales")
    return Stored("mxfp4", shape, {"blocks": 1, "scales": 1}, decoder, grid=GRID)
