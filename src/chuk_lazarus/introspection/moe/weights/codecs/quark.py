"""The integers of AMD's Quark: INT8 and INT4, signed or unsigned, with zero points.

The dtype, the range that a scale spans and the order of packing are in the config (quark/torch/utils/pack.py and
export/nn/modules/realquantizer.py of Quark 0.13):

- per tensor and per channel: `weight` [out, in] in eight bits, or I32 [out, in / 8] in four; `weight_scale` [], [1],
  [out] or [out, 1], `weight_zero_point` of the same shape, or packed I32 [out / 8];
- per group: all turned: `weight` [in, out] in eight bits, or I32 [in, out / 8] in four; `weight_scale` [groups, out],
  `weight_zero_point` the same, or packed I32 [groups, out / 8].

A word holds eight numbers, from the lowest four bits on in the order 0, 2, 4, 6, 1, 3, 5, 7 if the config's
`pack_method` is `reorder`, and else in their own order. A weight is (integer - zero point) * scale; without zero points
they are 0.
"""

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelUnreadable, UnknownFormat
from .awq import unpack_in_turns
from .bits import unpack
from .codec import Grid, Part, Stored
from .gptq import scale_rows

WIDTHS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8}
PARTS = ("weight_scale", "weight_zero_point")


def weight_scheme(quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """What Quark's config says about a weight, {} where it is not Quark's or says nothing."""
    if quantization.get("quant_method") != "quark":
        return {}
    settings = quantization.get("global_quant_config")
    weight = settings.get("weight") if isinstance(settings, dict) else None
    if isinstance(weight, list) and weight:  # of several levels, the first is that of the elements
        weight = weight[0]
    return weight if isinstance(weight, dict) else {}


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored | None:
    """Takes `weight` beside `weight_scale` where the config says that they are Quark's integers."""
    scheme = weight_scheme(quantization)
    dtype = scheme.get("dtype")
    if dtype not in WIDTHS or not {"weight", "weight_scale"} <= parts.keys():
        return None
    if parts.keys() - {"weight", "weight_scale", "weight_zero_point"}:
        return None
    bits, weight, scale, zero = WIDTHS[dtype], parts["weight"], parts["weight_scale"], parts.get("weight_zero_point")
    stored_as = {"int8": ("I8",), "uint8": ("U8",)}.get(dtype, ("I32",))
    if weight.dtype not in stored_as or scale.dtype not in ("F32", "BF16", "F16"):
        raise ModelUnreadable(f"its weight is {weight.dtype} and its scale {scale.dtype}: not Quark's {dtype}")
    if zero and zero.dtype not in stored_as:
        raise ModelUnreadable(f"its weight_zero_point is {zero.dtype}, and its weight {weight.dtype}")
    if zero is None and scheme.get("symmetric") is False:
        raise ModelUnreadable("config.json says that it is not symmetric, but there is no weight_zero_point")
    if len(weight.shape) != 2 or not prod(weight.shape):
        raise UnknownFormat(f"Quark's {dtype} of shape {list(weight.shape)}: we read only matrices")
    per_word = 8 if bits == 4 else 1
    rows, columns = weight.shape[0], weight.shape[1] * per_word
    decoder = partial(_unpack, dtype=dtype, reorder=_reorders(quantization))
    if scheme.get("qscheme") == "per_group":
        groups, outputs = scale.shape if len(scale.shape) == 2 else (0, 0)
        size = scheme.get("group_size")
        size = rows if size == -1 else size
        if (
            type(size) is not int
            or size < 1
            or -(-rows // size) != groups
            or -(-outputs // per_word) * per_word != columns
        ):
            shapes = f"its weight is {list(weight.shape)}, its scale {list(scale.shape)}"
            raise ModelUnreadable(f"{shapes}, but config.json says group_size {size}")
        if zero and zero.shape not in ((groups, outputs), (groups, columns // per_word)):
            raise ModelUnreadable(f"its weight_zero_point is {list(zero.shape)} for {groups} groups of {outputs}")
        by_group = {name: size for name in ("weight_scale", "weight_zero_point") if name in parts}
        decode = partial(_decode_groups, unpack=decoder, size=size, outputs=outputs)
        grid = Grid("int", (size, 1), bits, has_zero=zero is not None)
        return Stored(dtype, (rows, outputs), {"weight": 1, **by_group}, decode, True, grid)
    one_per_row = scale.shape in ((rows,), (rows, 1)) and scheme.get("qscheme") != "per_tensor"
    if not one_per_row and prod(scale.shape) != 1:
        raise ModelUnreadable(f"its weight is {list(weight.shape)} and its scale {list(scale.shape)}")
    if zero and prod(zero.shape) not in (prod(scale.shape), -(-prod(scale.shape) // per_word)):
        raise ModelUnreadable(f"its weight_zero_point is {list(zero.shape)}, and its scale {list(scale.shape)}")
    per_zero = per_word if zero and zero.dtype == "I32" else 1
    spans: dict[str, int | None] = {"weight_scale": 1 if one_per_row else None}
    if zero:
        spans["weight_zero_point"] = per_zero if one_per_row else None
    decode_rows = partial(_decode_rows, unpack=decoder, per_zero=per_zero if one_per_row else None)
    grid = Grid("int", (1 if one_per_row else None, None), bits, has_zero=zero is not None)
    return Stored(dtype, (rows, columns), {"weight": 1, **spans}, decode_rows, grid=grid)


def _reorders(quantization: Mapping[str, Any]) -> bool:
    """Whether words hold the numbers of even place before those of odd place."""
    export = quantization.get("export")
    return not isinstance(export, dict) or export.get("pack_method", "reorder") == "reorder"


def _unpack(data: NDArray[Any], *, dtype: str, reorder: bool) -> NDArray[np.float32]:
    """The integers of [rows, columns], or of packed [rows, words], as float32."""
    if WIDTHS[dtype] == 8 or data.dtype.itemsize == 1:
        return data.astype(np.float32)
    words = data.reshape(len(data), -1)
    codes = unpack_in_turns(words) if reorder else unpack(words.view(np.uint32), 4, words.shape[1] * 8)
    if dtype == "int4":
        return (codes ^ np.uint8(8)).astype(np.float32) - np.float32(8)
    return codes.astype(np.float32)


def _decode_rows(
    parts: Mapping[str, NDArray[Any]], start: int, stop: int, *, unpack: Any, per_zero: int | None
) -> NDArray[np.float32]:
    """(Integers [rows, columns] - zero points) * scales, of each row, or of all rows where `per_zero` is None."""
    values: NDArray[np.float32] = unpack(parts["weight"])
    scales = parts["weight_scale"].astype(np.float32).reshape(-1, 1)
    if (zero := parts.get("weight_zero_point")) is not None:
        zeros = unpack(zero.reshape(1, -1)).reshape(-1, 1)
        values -= zeros[:1] if per_zero is None else zeros[start % per_zero :][: stop - start]
    with np.errstate(over="ignore", invalid="ignore"):
        values *= scales
    return values


def _decode_groups(
    parts: Mapping[str, NDArray[Any]], start: int, stop: int, *, unpack: Any, size: int, outputs: int
) -> NDArray[np.float32]:
    """(Integers [rows, outputs] - the zero points of their groups) * the scales of their groups, `size` rows each."""
    index = np.arange(start, stop) // size - start // size
    scales = parts["weight_scale"].astype(np.float32)
    zero = parts.get("weight_zero_point")
    zeros = np.zeros_like(scales) if zero is None else unpack(zero)[:, :outputs]
    return scale_rows(unpack(parts["weight"])[:, :outputs], zeros, scales, index)
