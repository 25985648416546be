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
from .codec import NOT_DECODED, SAME_PART, Codec, Decode, Part, Stored

__all__ = ["NOT_DECODED", "PARTS", "SAME_PART", "Codec", "Decode", "Part", "Stored", "recognise"]

# The order matters: some parts fit several formats, and the first codec that recognises them decodes them.
CODECS: tuple[Codec, ...] = (
    plain, quark, w4afp8, mxfp8, fp8, mxfp6, mxfp4, nvfp4, mlx, pack_quantized, gptq, awq, bitsandbytes, gguf,
)  # fmt: skip

PARTS = frozenset({*SAME_PART, *(part for codec in CODECS for part in codec.PARTS)})
"""Every name of a part that a storage format puts beside a weight, or in its place."""


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored:
    """How the tensor that consists of `parts` is stored.

    The parts have their usual names (`SAME_PART`), and those in `NOT_DECODED` are left out. `quantization` are the
    config's settings for this tensor, {} where it has none. Raises UnknownFormat where no codec recognises the parts,
    and UnknownFormat or ModelUnreadable where a codec recognises them and can't decode them.
    """
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
