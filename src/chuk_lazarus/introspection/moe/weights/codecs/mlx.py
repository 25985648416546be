"""MLX's quantised matrices: `weight` uint32 and `scales`, with `biases` in the affine mode.

The modes (documentation of `mlx.core.quantize`; mlx/ops.cpp), for matrices that may be stacked:

- affine: elements of 1 to 8 bits in one dense stream, lowest bit first; `scales` and `biases` float [..., rows,
  columns / group_size]; a weight is scale * element + bias. A config without a mode means this mode;
- mxfp4, mxfp8: E2M1 or E4M3 elements, `scales` uint8 E8M0 for groups of 32;
- nvfp4: E2M1 elements, `scales` uint8 E4M3 for groups of 16. Some files have a `global_scale`, the largest magnitude
  of the matrix; the scales are then for a matrix whose largest magnitude is 6 * 448. Others keep the second scale of
  the model that was converted, `weight_scale_2`, which multiplies, or `weight_global_scale`, which divides: one number
  for each matrix, or [..., rows] (quantization/nvfp4.py of mlx-vlm).

`bits`, `group_size` and `mode` are in the config, since several of them fit the same shapes.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelUnreadable, UnknownFormat
from .bits import unpack
from .codec import CONFIG_HINT, Grid, Part, Stored
from .small_floats import E4M3, E8M0, is_one_per_matrix, scale_groups, unpack_e2m1, widen

AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
SCALES: dict[str, Literal["float32", "float16", "bfloat16"]] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LARGEST = np.float32(6 * 448)
SECOND_SCALES = ("global_scale", "weight_scale_2", "weight_global_scale")
PARTS = ("scales", "biases", *SECOND_SCALES)


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored | None:
    """Takes `weight` in uint32 beside `scales`."""
    weight, scales = parts.get("weight"), parts.get("scales")
    if weight is None or scales is None or weight.dtype != "U32" or len(weight.shape) < 2:
        return None
    others = parts.keys() - {"weight", "scales"}
    second = next((name for name in SECOND_SCALES if others == {name}), None)
    if others not in (set(), {"biases"}) and not second:
        return None
    mode, bits, group = _settings(quantization, sorted(parts))
    is_affine = mode == "affine"
    if is_affine != (others == {"biases"}) or (second and mode != "nvfp4"):
        raise UnknownFormat(f"MLX's {', '.join(sorted(parts))}, but config.json says that the mode is {mode}")
    shape = (*weight.shape[:-1], scales.shape[-1] * group if scales.shape else 0)
    if scales.shape[:-1] != shape[:-1] or weight.shape[-1] * 32 != shape[-1] * bits:
        raise ModelUnreadable(
            f"its weight is {list(weight.shape)} and its scales {list(scales.shape)}: not {bits} bits in groups of "
            f"{group}, as config.json says"
        )
    beside = parts.get("biases", scales)
    dtypes = tuple(SCALES) if is_affine else ("U8",)
    if scales.dtype not in dtypes or beside.dtype not in dtypes or beside.shape != scales.shape:
        listing = ", ".join(f"{name} {parts[name].dtype} {list(parts[name].shape)}" for name in sorted(parts))
        raise ModelUnreadable(f"its parts are {listing}: they do not fit MLX's mode {mode}")
    spans: dict[str, int | None] = {"weight": 1, "scales": 1}
    if is_affine:
        decoder = partial(_decode_affine, bits=bits, group=group)
        grid = Grid("int", (1, group), bits, True, SCALES[scales.dtype])
        return Stored(f"mlx-{bits}bit", shape, spans | {"biases": 1}, decoder, grid=grid)
    if second:
        part = parts[second]
        by_row = second != "global_scale" and part.shape in (shape[:-1], (*shape[:-1], 1))
        if part.dtype not in ("F32", "BF16", "F16") or not (by_row or is_one_per_matrix(part.shape, shape[:-2])):
            raise ModelUnreadable(f"its {second} is {part.dtype} {list(part.shape)}: not one number per matrix")
        spans[second] = 1 if by_row else None
    grid = Grid("e4m3" if bits == 8 else "e2m1", (1, group), scale="e4m3" if mode == "nvfp4" else "e8m0")
    return Stored(f"mlx-{mode}", shape, spans, partial(_decode_float, mode=mode, group=group), grid=grid)


def _settings(quantization: Mapping[str, Any], parts: list[str]) -> tuple[str, int, int]:
    """The mode, the bits of an element and the columns of a group, by the config.

    Raises UnknownFormat where they are missing or we can't decode them; `parts` are the names for the message.
    """
    mode = quantization.get("mode", "affine")
    bits, group = quantization.get("bits"), quantization.get("group_size")
    if isinstance(mode, str) and mode in FLOAT_MODES:
        mode_bits, mode_group = FLOAT_MODES[mode]
        bits, group = mode_bits if bits is None else bits, mode_group if group is None else group
        if (bits, group) != FLOAT_MODES[mode]:
            raise UnknownFormat(
                f"MLX's mode {mode} with {bits} bits in groups of {group}, but it has {mode_bits} in {mode_group}"
            )
    elif mode != "affine":
        raise UnknownFormat(f"MLX's quantisation mode {mode!r}, which we can't decode")
    if bits is None or group is None:
        raise UnknownFormat(
            f"MLX's {', '.join(parts)}, but config.json has no quantization with bits and group_size", CONFIG_HINT
        )
    if bits not in AFFINE_BITS or type(bits) is not int or type(group) is not int or group < 1:
        raise UnknownFormat(f"MLX's quantisation to {bits!r} bits in groups of {group!r}, which we can't decode")
    return mode, bits, group


def _decode_affine(
    parts: Mapping[str, NDArray[Any]], start: int, stop: int, *, bits: int, group: int
) -> NDArray[np.float32]:
    """uint32 [rows, words], scales and biases [rows, groups] -> float32."""
    scales, biases = widen(parts["scales"]), widen(parts["biases"])
    rows, groups = scales.shape
    values = unpack(parts["weight"], bits, groups * group).astype(np.float32)
    scale_groups(values, scales, group)
    grouped = values.reshape(rows, groups, group)
    with np.errstate(over="ignore", invalid="ignore"):
        grouped += biases[:, :, None]
    return values


def _decode_float(
    parts: Mapping[str, NDArray[Any]], start: int, stop: int, *, mode: str, group: int
) -> NDArray[np.float32]:
    """uint32 [rows, words] and scales [rows, groups] -> float32."""
    data = np.ascontiguousarray(parts["weight"], "<u4").view(np.uint8)
    values = widen(data, E4M3) if mode == "mxfp8" else unpack_e2m1(data)
    scales = widen(parts["scales"], E4M3 if mode == "nvfp4" else E8M0)
    if "global_scale" in parts:
        scales *= widen(parts["global_scale"]).reshape(-1) / LARGEST
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if "weight_scale_2" in parts:
            scales *= widen(parts["weight_scale_2"]).reshape(-1, 1)
        elif "weight_global_scale" in parts:
            scales /= widen(parts["weight_global_scale"]).reshape(-1, 1)
    scale_groups(values, scales, group)
    return values
