"""FP8 with one scale per block, as DeepSeek-V3 publishes it.

`weight` [M, N] in E4M3 or E5M2, `weight_scale_inv` [ceil(M / b0), ceil(N / b1)]; despite its name the scale is
*multiplied* (README_WEIGHTS.md of deepseek-ai/DeepSeek-V3). Blocks at the right and lower edge may be ragged. The
block's size comes from the config: it can't be told from the shapes.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelUnreadable, UnknownFormat
from . import Part, Stored

SCALES = ("F32", "BF16", "F16", "F8_E8M0")


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored | None:
    """`weight` in FP8 beside `weight_scale_inv`."""
    scale = "weight_scale_inv"
    if parts.keys() != {"weight", scale} or parts[scale].dtype not in SCALES:
        return None
    weight = parts["weight"]
    if weight.dtype not in ("F8_E4M3", "F8_E5M2") or len(weight.shape) < 2:
        return None
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise UnknownFormat(
            "FP8 with block scales, and config.json has no quantization_config.weight_block_size",
            "put the config.json that belongs to the model beside its weights",
        )
    *leading, rows, columns = weight.shape
    block = [min(block[0], max(1, rows)), min(block[1], max(1, columns))]
    expected = (*leading, -(-rows // block[0]), -(-columns // block[1]))
    if parts[scale].shape != expected:
        raise ModelUnreadable(f"its {scale} is {list(parts[scale].shape)}, expected {list(expected)}")
    return Stored("fp8", weight.shape, {"weight": 1, scale: block[0]}, partial(decode, block=tuple(block)))


def decode(parts: Mapping[str, NDArray[Any]], start: int, stop: int, *, block: tuple[int, int]) -> NDArray[np.float32]:
    """FP8 [rows, columns] times the scales of its blocks."""
    weight = parts["weight"].astype(np.float32)
    per_column = np.repeat(parts["weight_scale_inv"].astype(np.float32), block[1], axis=1)[:, : weight.shape[1]]
    skipped = start % block[0]
    weight *= np.repeat(per_column, block[0], axis=0)[skipped : skipped + len(weight)]
    return weight
