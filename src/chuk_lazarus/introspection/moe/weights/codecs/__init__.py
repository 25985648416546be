"""Storage formats: the parts that a stored tensor consists of -> float32.

A format is one module with a `recognise` function, which is told which parts there are (dtype and shape, by the part's
own name: "weight", "scales", ...) and answers None or how to decode them. A codec never sees a tensor's name.
"""

from collections.abc import Mapping
from typing import Any

from ...errors import UnknownFormat
from . import awq, bitsandbytes, fp8, gguf, gptq, mlx, mxfp4, mxfp8, nvfp4, pack_quantized, plain
from .codec import NOT_DECODED, SAME_PART, Codec, Decode, Part, Stored

__all__ = ["NOT_DECODED", "SAME_PART", "Codec", "Decode", "Part", "Stored", "recognise"]

# asked in this order: a later one takes what an earlier one has refused
CODECS: tuple[Codec, ...] = (plain, mxfp8, fp8, mxfp4, nvfp4, mlx, pack_quantized, gptq, awq, bitsandbytes, gguf)


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored:
    """How the tensor that consists of `parts` is stored; raises UnknownFormat when no codec knows.

    Parts go by their usual names (`SAME_PART`), without those that are not decoded. `quantization` is what the config
    says about the quantisation of this tensor, {} when nothing.
    """
    for codec in CODECS:
        if stored := codec.recognise(parts, quantization):
            return stored
    listing = ", ".join(f"{name} ({part.dtype})" for name, part in sorted(parts.items()))
    method = quantization.get("quant_method")
    raise UnknownFormat(
        f"stored in a format we can't decode: {listing}" + (f", quant_method {method}" if method else ""),
        "docs/families.md lists the formats that we read",
    )
