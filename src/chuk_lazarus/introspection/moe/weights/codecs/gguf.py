"""The types of llama.cpp's GGML: blocks of 32 to 256 elements that include their scales.

The gguf package decodes them. Rows of blocks are bytes, uint8 [..., rows, row bytes]. NVFP4 has a second scale beside
the blocks, `weight_scale` F32 [experts] or a single number, which multiplies the elements. Beside any other type, a
part of this name does not belong to the matrix (in Gemma 4 it is the router's scale of each expert).
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelUnreadable, UnknownFormat
from . import plain
from .codec import Grid, Part, Stored

SCALE = "weight_scale"
PARTS = (SCALE,)

# for vectors from a table, which have smaller errors, the integers with one bit less
GRIDS = {
    **{f"Q{bits}_0": Grid("int", (1, 32), bits) for bits in (4, 5, 8)},
    **{f"Q{bits}_1": Grid("int", (1, 32), bits, has_zero=True) for bits in (4, 5)},
    "Q2_K": Grid("int", (1, 16), 2, has_zero=True),
    "Q3_K": Grid("int", (1, 16), 3),
    "Q4_K": Grid("int", (1, 32), 4, has_zero=True),
    "Q5_K": Grid("int", (1, 32), 5, has_zero=True),
    "Q6_K": Grid("int", (1, 16), 6),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), Grid("iq4", (1, 32))),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S"), Grid("int", (1, 32), 3, has_zero=True)),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S"), Grid("int", (1, 32), 2, has_zero=True)),
    **dict.fromkeys(("IQ1_S", "IQ1_M"), Grid("int", (1, 32), 1, has_zero=True)),
    **dict.fromkeys(("TQ1_0", "TQ2_0"), Grid("ternary", (1, 256))),
    "MXFP4": Grid("e2m1", (1, 32), scale="e8m0"),
    "NVFP4": Grid("e2m1", (1, 16), scale="e4m3"),
}


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored | None:
    """Takes `weight` in blocks of a GGML type, or in plain numbers of a GGUF file, with or without `weight_scale`."""
    if "weight" not in parts or not parts.keys() <= {"weight", SCALE}:
        return None
    weight, scale = parts["weight"], parts.get(SCALE)
    if weight.dtype in plain.NAMES:
        return plain.recognise({"weight": weight}, {}) if quantization.get("quant_method") == "gguf" else None
    if not _is_blocks(weight.dtype):
        return None
    if not _is_decoded(weight.dtype):
        raise UnknownFormat(f"stored as {weight.dtype}, a GGML type that the gguf package does not decode")
    rows_per_row: dict[str, int | None] = {"weight": 1}
    if scale and weight.dtype == "NVFP4":
        if scale.dtype not in plain.NAMES or scale.shape not in ((), (1,), weight.shape[:-2]):
            raise ModelUnreadable(f"its weight is {list(weight.shape)} and its scale {scale.dtype} {list(scale.shape)}")
        rows_per_row[SCALE] = None
    decoder = partial(decode, weight.dtype)
    return Stored(weight.dtype, weight.shape, rows_per_row, decoder, grid=GRIDS.get(weight.dtype))


def decode(dtype: str, parts: Mapping[str, NDArray[Any]], start: int, stop: int) -> NDArray[np.float32]:
    """uint8 [rows, row bytes] in the GGML type `dtype`, with or without a scale -> float32 [rows, columns]."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(over="ignore", invalid="ignore"):  # infinite values and NaN are reported later
        values: NDArray[np.float32] = dequantize(parts["weight"], GGMLQuantizationType[dtype])
        if SCALE in parts:
            values *= parts[SCALE].astype(np.float32)
    return values


def _is_blocks(dtype: str) -> bool:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return dtype in GGMLQuantizationType.__members__ and GGML_QUANT_SIZES[GGMLQuantizationType[dtype]][0] > 1


@cache
def _is_decoded(dtype: str) -> bool:
    """Whether the gguf package decodes the type, which we try with one block."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[dtype]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
