"""Storage formats: how the parts of a stored tensor become float32.

A format is a module with a `recognise` function and the names of its parts, `PARTS`. The function gets the dtype and
shape of each part, by the part's name ("weight", "scales", ...), and returns how to decode them, or None where they are
not of its format. A codec never gets a tensor's name.
"""

from collections.abc import Mapping
from typing import Any

from ...errors import UnknownFormat
from . import (
    awq,
    bitsandbytes,
    fp8,
    gguf,
    gptq,
    mlx,
    modelopt,
    mxfp4,
    mxfp6,
    mxfp8,
    nvfp4,
    pack_quantized,
    plain,
    quark,
    refused,
    w4afp8,
)
from .codec import NOT_DECODED, SAME_PART, Codec, Decode, Grid, Part, Stored
from .scaled_inputs import PRE_QUANT_SCALE, OtherInputs, multiply_inputs

__all__ = [
    "NOT_DECODED", "PARTS", "PRE_QUANT_SCALE", "SAME_PART", "Codec", "Decode", "Grid", "OtherInputs", "Part", "Stored",
    "recognise",
]  # fmt: skip

# The order matters: some parts fit several formats, and the first codec that recognises them decodes them.
CODECS: tuple[Codec, ...] = (
    plain, quark, w4afp8, modelopt, mxfp8, fp8, mxfp6, mxfp4, nvfp4, mlx, pack_quantized, gptq, awq, bitsandbytes, gguf,
)  # fmt: skip

PARTS = frozenset({*SAME_PART, PRE_QUANT_SCALE, *(part for codec in CODECS for part in codec.PARTS)})
"""Every name of a part that a storage format puts beside a weight, or in its place."""


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any], inputs_first: bool | None = None) -> Stored:
    """How the tensor that consists of `parts` is stored.

    The parts have their usual names (`SAME_PART`), and those in `NOT_DECODED` are left out. `quantization` are the
    config's settings for this tensor, {} where it has none; `inputs_first` is as in `multiply_inputs`. Raises
    UnknownFormat where no codec recognises the parts, and UnknownFormat or ModelUnreadable where a codec recognises
    them and can't decode them.
    """
    if factors := parts.get(PRE_QUANT_SCALE):
        rest = {name: part for name, part in parts.items() if name != PRE_QUANT_SCALE}
        return multiply_inputs(recognise(rest, quantization), factors, inputs_first)
    refused.check(parts, quantization)
    for codec in CODECS:
        if stored := codec.recognise(parts, quantization):
            return stored
    listing = ", ".join(f"{name} ({part.dtype})" for name, part in sorted(parts.items()))
    method = quantization.get("quant_method")
    raise UnknownFormat(
        f"stored in a format we can't decode: {listing}" + (f", quant_method {method}" if method else ""),
        "docs/families.md lists the formats that we read",
    )
