"""NVFP4: E2M1 elements in groups of 16 inputs with an E4M3 scale each, and a second scale for the whole matrix.

A byte holds two elements, the even one in the low nibble; `weight_scale` is E4M3 [..., rows, columns / 16]. Publishers
store the rest as

- `weight_packed` uint8 [..., rows, columns / 2] and `weight_global_scale`, which *divides*: compressed-tensors,
  `nvfp4-pack-quantized` (compressors/nvfp4 and quantization/lifecycle/forward_helpers.py);
- `weight` uint8 [..., rows, columns / 2], or of the safetensors dtype F4, and `weight_scale_2`, which multiplies:
  ModelOpt (modelopt/torch/quantization/qtensor/nvfp4_tensor.py); Quark and Inkling, where it is `scale2`, and
  `original_shape` repeats the shape;
- the same `weight`, and `weight_amax` over `weight_outer_scale_denominator` for the second scale: Inkling-2-Mini
  (Inkling2LoopDequantizeExperts in transformers/core_model_loading.py).

The second scale is one number, or one for each matrix of a stack ([E], [E, 1] or [E, 1, 1]). Where gates and ups lie in
one matrix, it may be two numbers, [2] or [E, 2], of which the first is for the first half of the rows. ModelOpt stores
the stacked, transposed matrices of Llama 4 and GPT-OSS with turned parts, as [E, columns / 2, rows] and
[E, columns / 16, rows] (`maybe_transpose_expert_weight_dimensions` in modelopt/torch/export/quant_utils.py).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelUnreadable
from .codec import Grid, Part, Stored
from .mxfp4 import find_pairs, pairs_shape
from .small_floats import is_grid, is_one_per_matrix, scale_groups, unpack_e2m1, widen

GROUP = 16
GRID = Grid("e2m1", (1, GROUP), scale="e4m3")
SECOND_SCALES = {"weight_packed": "weight_global_scale", "weight": "weight_scale_2"}
AMAX, DENOMINATOR = "weight_amax", "weight_outer_scale_denominator"
PARTS = ("weight_packed", "weight_scale", *SECOND_SCALES.values(), AMAX, DENOMINATOR, "original_shape")


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored | None:
    """Takes pairs of E2M1 elements beside E4M3 scales and a second scale."""
    packed = find_pairs(parts)
    scale = parts.get("weight_scale")
    if packed is None or scale is None or scale.dtype != "F8_E4M3":
        return None
    second = AMAX if AMAX in parts else SECOND_SCALES[packed]
    expected = {packed, "weight_scale", second} | ({DENOMINATOR} if second == AMAX else set())
    if parts.keys() - {"original_shape"} != expected:
        return None
    if any(parts[name].dtype not in ("F32", "F16", "BF16", "F64") for name in expected - {packed, "weight_scale"}):
        return None
    *leading, rows, columns = shape = pairs_shape(parts[packed])
    if stated := parts.get("original_shape"):
        _check_shape(stated, shape)
    if second == AMAX and not is_one_per_matrix(parts[DENOMINATOR].shape, tuple(leading)):
        raise ModelUnreadable(f"its {DENOMINATOR} is {list(parts[DENOMINATOR].shape)}, not one number per matrix")
    halves = False
    if not is_one_per_matrix(parts[second].shape, tuple(leading)):
        halves = parts[second].shape in ((*leading, 2), (*leading, 2, 1)) and rows % 2 == 0
        if not halves:
            raise ModelUnreadable(
                f"its {second} is {list(parts[second].shape)} and its {packed} {list(parts[packed].shape)}: "
                "neither one number per matrix nor two"
            )
    decoder = partial(decode, packed=packed, second=second, half=rows // 2 if halves else None)
    whole = dict.fromkeys(sorted(expected - {packed, "weight_scale"}, key=list(PARTS).index))
    if columns % GROUP == 0 and is_grid(scale.shape, (*leading, rows, columns // GROUP)):
        return Stored("nvfp4", shape, {packed: 1, "weight_scale": 1, **whole}, decoder, grid=GRID)
    width, inputs = parts[packed].shape[-1], 2 * rows
    is_turned = parts[packed].dtype == "U8" and scale.shape == (*leading, inputs // GROUP, width)
    if is_turned and not inputs % GROUP and not halves and leading:
        turned = partial(_decode_turned, packed=packed, second=second)
        spans = {packed: 2, "weight_scale": GROUP, **whole}
        return Stored("nvfp4", (*leading, inputs, width), spans, turned, grid=Grid("e2m1", (GROUP, 1), scale="e4m3"))
    raise ModelUnreadable(
        f"its {packed} is {list(parts[packed].shape)} and its weight_scale {list(scale.shape)}: not NVFP4"
    )


def decode(
    parts: Mapping[str, NDArray[Any]], start: int, stop: int, *, packed: str, second: str, half: int | None
) -> NDArray[np.float32]:
    """Bytes [rows, columns / 2] and their scales -> float32 [rows, columns].

    `packed` and `second` are names of parts. Where there are two second scales, the latter is for row `half` and later
    rows.
    """
    values = unpack_e2m1(parts[packed])
    scales = widen(parts["weight_scale"])
    second_scale = widen(parts[second]).reshape(-1)
    if half is not None:
        second_scale = second_scale[(np.arange(start, stop) >= half).astype(np.intp)][:, None]
    _apply_second(scales, second_scale, second, parts)
    scale_groups(values, scales, GROUP)
    return values


def _decode_turned(
    parts: Mapping[str, NDArray[Any]], start: int, stop: int, *, packed: str, second: str
) -> NDArray[np.float32]:
    """Bytes [rows / 2, columns] and scales [rows / 16, columns] -> float32 [rows, columns]."""
    count, columns = parts[packed].shape
    values = unpack_e2m1(parts[packed]).reshape(count, columns, 2).swapaxes(1, 2).reshape(2 * count, columns)
    values = values[start % 2 :][: stop - start]
    scales = widen(parts["weight_scale"])
    _apply_second(scales, widen(parts[second]).reshape(-1), second, parts)
    with np.errstate(over="ignore", invalid="ignore"):
        values *= np.repeat(scales, GROUP, axis=0)[start % GROUP :][: stop - start]
    return values


def _check_shape(part: Part, shape: tuple[int, ...]) -> None:
    """Raise ModelUnreadable where `original_shape` is another than the decoded one: then it would be padded."""
    if part.dtype not in ("I64", "I32") or part.shape != (len(shape),):
        raise ModelUnreadable(f"its original_shape is {part.dtype} {list(part.shape)}")
    if (original := tuple(int(size) for size in part.load())) != shape:
        raise ModelUnreadable(f"its original_shape says {list(original)}, but it holds {list(shape)}")


def _apply_second(
    scales: NDArray[np.float32], second: NDArray[np.float32], name: str, parts: Mapping[str, NDArray[Any]]
) -> None:
    """Apply the second scale, which is the part `name`, to the scales of the groups, in place."""
    with np.errstate(all="ignore"):
        if name == AMAX:
            scales *= second / widen(parts[DENOMINATOR]).reshape(-1)
        elif name == "weight_global_scale":
            scales /= second
        else:
            scales *= second
