"""AWQ in the GEMM version of AutoAWQ: unsigned 4-bit integers in groups of inputs.

The stored matrix is [in, out]. `qweight` is I32 [in, out / 8], `qzeros` I32 [groups, out / 8], `scales` [groups, out].
A word holds eight outputs, from the lowest four bits on in the order 0, 2, 4, 6, 1, 3, 5, 7. A weight is
(integer - zero point) * scale (utils/packing_utils.py of AutoAWQ 0.2.7, `dequantize_gemm`).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelUnreadable, UnknownFormat
from .codec import Grid, Part, Stored
from .gptq import may_differ, scale_rows

PARTS = ("qweight", "qzeros", "scales")


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored | None:
    """Takes `qweight`, `qzeros` and `scales` of AWQ's shapes, unless the config names another method."""
    if parts.keys() != {"qweight", "qzeros", "scales"}:
        return None
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    if {qweight.dtype, qzeros.dtype} != {"I32"} or scales.dtype not in ("F16", "BF16", "F32"):
        return None
    method, packing = quantization.get("quant_method"), str(quantization.get("packing_format"))
    if method in ("auto-round", "auto_round"):
        if packing not in ("auto_round:auto_awq", "auto_round:awq"):
            raise UnknownFormat(f"AutoRound's packing_format {packing}, which we can't decode")
    elif method not in ("awq", None):
        return None
    version = next((quantization[key] for key in ("version", "checkpoint_format", "format") if key in quantization), "")
    if str(version).lower() not in ("", "gemm"):
        raise UnknownFormat(f"AWQ's version {version}, which we can't decode")
    bits = next((quantization[key] for key in ("bits", "w_bit") if key in quantization), 4)
    if bits != 4:
        raise UnknownFormat(f"AWQ in {bits} bits, which we can't decode")
    if len(qweight.shape) < 2 or len(scales.shape) != len(qweight.shape) or not scales.shape[-2]:
        raise ModelUnreadable(f"not the shapes of AWQ: {_list_shapes(parts)}")
    *leading, inputs, words = qweight.shape
    groups = scales.shape[-2]
    if not inputs * words or scales.shape != (*leading, groups, words * 8) or qzeros.shape != (*leading, groups, words):
        raise ModelUnreadable(f"not the shapes of AWQ: {_list_shapes(parts)}")
    stated = next((quantization[key] for key in ("group_size", "q_group_size") if key in quantization), None)
    size = inputs if stated == -1 else stated
    is_other = type(size) is int and size > 0 and -(-inputs // size) != groups and may_differ(stated, quantization)
    if (stated is None or is_other) and inputs % groups == 0:
        size = inputs // groups
    if type(size) is not int or size < 1 or -(-inputs // size) != groups:
        raise UnknownFormat(f"{groups} groups of {inputs} inputs, but config.json says group_size {stated}")
    spans = {"qweight": 1, "qzeros": size, "scales": size}
    grid = Grid("int", (size, 1), 4, has_zero=True)
    return Stored("awq", (*leading, inputs, words * 8), spans, partial(decode, size=size), True, grid)


def decode(parts: Mapping[str, NDArray[Any]], start: int, stop: int, *, size: int) -> NDArray[np.float32]:
    """(Integers [rows, outputs] - the zero points of their groups) * the scales of their groups, `size` rows each."""
    index = np.arange(start, stop) // size - start // size
    zeros = unpack_in_turns(parts["qzeros"]).astype(np.float32)
    return scale_rows(unpack_in_turns(parts["qweight"]), zeros, parts["scales"].astype(np.float32), index)


def unpack_in_turns(packed: NDArray[Any]) -> NDArray[np.uint8]:
    """I32 [rows, words] -> uint8 [rows, words * 8].

    The lower half of a word has the values of even number, the upper half those of odd number.
    """
    wide = np.ascontiguousarray(packed, "<i4").view("<u4").astype("<u8")
    # bytes 0 and 2 go to the lower half and bytes 1 and 3 to the upper half, then each four bits go to a byte
    wide = (wide & 0xFF) | (wide & 0xFF0000) >> 8 | (wide & 0xFF00) << 24 | (wide & 0xFF000000) << 16
    wide = (wide & 0x00000F0F_00000F0F) | (wide & 0x0000F0F0_0000F0F0) << 12
    return wide.view(np.uint8)


def _list_shapes(parts: Mapping[str, Part]) -> str:
    return ", ".join(f"{name} {list(part.shape)}" for name, part in parts.items())
