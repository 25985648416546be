"""MXFP4 as GPT-OSS publishes it: E2M1 elements in groups of 32 with an E8M0 scale each.

`blocks` uint8 [..., rows, groups, 16] with two elements a byte, the even one in the low nibble; `scales` uint8
[..., rows, groups], a scale being 2^(byte - 127), 255 being NaN (OCP Microscaling Formats v1.0, sections 5.3.3 and
5.4.1).
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ...errors import ModelUnreadable
from . import Part, Stored

_NIBBLES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
# the two elements of each byte as one 8-byte item, so that decoding is a single look-up
_PAIRS = np.stack([np.tile(_NIBBLES, 16), np.repeat(_NIBBLES, 16)], axis=1).view(np.uint64).ravel()


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored | None:
    """`blocks` and `scales`, both uint8."""
    if parts.keys() != {"blocks", "scales"} or {part.dtype for part in parts.values()} != {"U8"}:
        return None
    blocks, scales = parts["blocks"], parts["scales"]
    if len(blocks.shape) < 3 or blocks.shape[-1] != 16 or scales.shape != blocks.shape[:-1]:
        raise ModelUnreadable(f"its blocks are {list(blocks.shape)} and its scales {list(scales.shape)}: not MXFP4")
    shape = (*blocks.shape[:-2], blocks.shape[-2] * 32)
    return Stored("mxfp4", shape, {"blocks": 1, "scales": 1}, decode)


def decode(parts: Mapping[str, NDArray[Any]], start: int, stop: int) -> NDArray[np.float32]:
    """uint8 [rows, groups, 16] and [rows, groups] -> float32 [rows, groups * 32]."""
    rows, groups, _ = parts["blocks"].shape
    elements: NDArray[np.float32] = _PAIRS[parts["blocks"]].view(np.float32)
    with np.errstate(over="ignore"):
        elements *= parts["scales"].view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[..., None]
    return elements.reshape(rows, groups * 32)
