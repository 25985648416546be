"""Storage formats that we know and don't decode, by the names of their parts or the config's quant_method."""

from collections.abc import Mapping
from typing import Any

from ...errors import UnknownFormat
from .codec import Part

IK_LLAMA = "ik_llama.cpp's "  # precedes the name of a type in the dtype of a GGUF file's tensor
METHODS = {
    "torchao": "torchao",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "quip": "QuIP#",
    "quip#": "QuIP#",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "vptq": "VPTQ",
    "eetq": "EETQ",
    "higgs": "HIGGS",
    "spqr": "SpQR",
    "sinq": "SINQ",
    "fp_quant": "FP-Quant",
    "bitnet": "BitNet",
    "quanto": "Quanto",
    "marlin": "Marlin",
}
PARTS = {
    "EXL2": ({"q_weight", "q_scale"}, {"q_weight", "q_groups"}),
    "EXL3": ({"trellis"},),
    "HQQ": ({"W_q"},),
    "AQLM": ({"codes", "codebooks"},),
    "QuIP#": ({"Qidxs"},),
    "VPTQ": ({"centroids", "indices"},),
    "Quanto": ({"weight._data", "weight._scale"},),
    "torchao": ({"weight_qdata"}, {"weight:qdata"}, {"_weight_qdata"}, {"weight_tensor_data"}),
    "Marlin": ({"B"},),
    "ModelSlim's W4A8": ({"weight", "scale_bias"}, {"weight", "weight_scale_second"}),
}
"""By the format's name: sets of parts, one of which is there."""


def name_method(quantization: Mapping[str, Any]) -> str | None:
    """The name of the config's quantisation method where it is one that we don't decode."""
    return METHODS.get(str(quantization.get("quant_method")).lower())


def check(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> None:
    """Raise UnknownFormat, with the format's name, where the parts or the config are those of a known format.

    Plain numbers under such a config are parts that the quantiser left as they were.
    """
    is_plain = all(part.dtype in ("BF16", "F16", "F32", "F64") for part in parts.values())
    found = None if is_plain else name_method(quantization)
    found = found or next((name for name, sets in PARTS.items() if any(names <= parts.keys() for names in sets)), None)
    found = found or next((part.dtype for part in parts.values() if part.dtype.startswith(IK_LLAMA)), None)
    if found:
        raise UnknownFormat(
            f"stored as {found}, which we don't decode: {', '.join(sorted(parts))}",
            "use the original model, or one in a format that docs/families.md lists",
        )
