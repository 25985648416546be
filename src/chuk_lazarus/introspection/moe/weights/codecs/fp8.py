"""FP8 with a scale per block, row, column or matrix, or without scales; and eight-bit integers in blocks.

`weight` [M, N] is E4M3 or E5M2 beside `weight_scale` or `weight_scale_inv`, which is *multiplied* despite its name
(README_WEIGHTS.md of deepseek-ai/DeepSeek-V3). The shapes of the scales, for matrices that may be stacked [E, ...]:

- one per block: [ceil(M / b0), ceil(N / b1)], where blocks at the right and lower edge may be smaller (DeepSeek-V3;
  compressed-tensors, strategies `block` and `group`), or [M / b0, 1, N / b1, 1] (`fp8_pb_wo` of ModelOpt);
- one per row: [M, 1] or [M] (compressed-tensors, strategy `channel`);
- one per column: [1, N] or [N] (stacks of transposed matrices, as in Llama 4; `to_quantized_weight` in
  modelopt/torch/export/quant_utils.py distinguishes these from rows by the shapes, and refuses square matrices);
- one per matrix: [], [1], [1, 1], or for a stack [E], [E, 1], [E, 1, 1].

A block's size is in the config, since several sizes fit the same shapes. Where a shape has two meanings, the config
decides. Scales are floats or E8M0 exponents. Exponents have their own dtype, or are bytes where the config's
`scale_fmt` is ue8m0. Integers, I8, are read here where they have a scale per block, under the same names
(`blockwise_int8` of SGLang; compressed-tensors, strategy `block`).

AutoRound stores the scales of groups of a row, of the config's `group_size`, as one vector: [rows * groups], or
[rows * groups, 1] (export/export_to_autoround/export_to_fp8.py). ModelSlim (WFP8AFP8) has a `weight_offset` of the
same shape as the scale of each row: a weight is (element - offset) * scale.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelUnreadable, UnknownFormat
from .codec import CONFIG_HINT, Element, Grid, Part, Stored
from .quark import weight_scheme
from .small_floats import E8M0, is_one_per_matrix, scale_groups, widen

ELEMENTS: dict[str, Element] = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
WEIGHTS = tuple(ELEMENTS)
SCALES = ("F64", "F32", "BF16", "F16", "F8_E8M0", "U8")
SCALE_NAMES = ("weight_scale", "weight_scale_inv")

OFFSET = "weight_offset"
UNSCALED = "fp8-unscaled"  # the format of FP8 without scales
AUTO_ROUND = ("auto-round", "auto_round")
Block = tuple[int, int]
PARTS = (*SCALE_NAMES, OFFSET)


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored | None:
    """Takes `weight` in FP8, alone or beside one part of scales."""
    weight = parts.get("weight")
    if weight is None or weight.dtype not in (*WEIGHTS, "I8") or len(weight.shape) < 2:
        return None
    if weight.dtype == "I8" and not _is_in_blocks(weight, parts, quantization):
        return None
    if len(parts) == 1:
        return _recognise_unscaled(weight, quantization)
    offset, parts = parts.get(OFFSET), {name: part for name, part in parts.items() if name != OFFSET}
    scale = next((name for name in SCALE_NAMES if parts.keys() == {"weight", name}), None)
    if scale is None or parts[scale].dtype not in SCALES:
        return None
    is_exponent = parts[scale].dtype == "U8"
    if is_exponent and quantization.get("scale_fmt") != "ue8m0":
        raise UnknownFormat(
            f"FP8 whose {scale} is bytes, but config.json does not say that scale_fmt is ue8m0", CONFIG_HINT
        )
    block, span = _find_groups(weight.shape, parts[scale].shape, quantization) or _find_block(
        weight.shape, scale, parts[scale].shape, quantization
    )
    decoder = partial(decode, scale=scale, block=block, kind=E8M0 if is_exponent else None)
    spans = {"weight": 1, scale: span}
    if offset:
        if span != 1 or block[1] != weight.shape[-1] or offset.shape != parts[scale].shape or is_exponent:
            raise ModelUnreadable(f"its {OFFSET} is {offset.dtype} {list(offset.shape)}: not one per row")
        spans[OFFSET] = 1
    grid = Grid("int", block, 8) if weight.dtype == "I8" else Grid(ELEMENTS[weight.dtype], block)
    codec = "int8" if weight.dtype == "I8" else "fp8"
    return Stored(codec, weight.shape, spans, decoder, grid=grid)


def _is_in_blocks(weight: Part, parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> bool:
    """Whether integers have the float scales of blocks that the config declares."""
    scale = next((parts[name] for name in SCALE_NAMES if parts.keys() == {"weight", name}), None)
    if scale is None or scale.dtype not in ("F32", "BF16", "F16"):
        return False
    kinds, declared = find_blocks(quantization)
    return kinds == {"block"} and any(block[0] > 1 and scale.shape == grid(weight.shape, block) for block in declared)


def decode(
    parts: Mapping[str, NDArray[Any]], start: int, stop: int, *, scale: str, block: Block, kind: type | None
) -> NDArray[np.float32]:
    """FP8 [rows, columns] times the scales of its blocks; `block` is their height and width.

    `scale` is the name of the part with the scales, and `kind` their type where their dtype is bytes.
    """
    values, scales = widen(parts["weight"]), widen(parts[scale], kind)
    if OFFSET in parts:
        values -= widen(parts[OFFSET]).reshape(-1, 1)
    height, width = block
    scales = scales.reshape(-1, -(-values.shape[1] // width))
    if height == 1:
        scale_groups(values, scales, width)
        return values
    skipped = start % height
    for number, row in enumerate(scales):
        low, high = max(0, number * height - skipped), (number + 1) * height - skipped
        scale_groups(values[low:high], np.broadcast_to(row, (len(values[low:high]), len(row))), width)
    return values


def find_blocks(quantization: Mapping[str, Any]) -> tuple[set[str], list[Block]]:
    """The kinds of ranges that a scale spans by the config (channel, tensor, block, unknown), and the blocks' sizes."""
    kinds: set[str] = set()
    blocks = []
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or weights.get("num_bits", 8) != 8:
            continue
        strategy, structure = weights.get("strategy"), weights.get("block_structure")
        if strategy == "group":
            structure = [1, weights.get("group_size")]
        elif strategy != "block":
            kinds.add(strategy if strategy in ("channel", "tensor") else "unknown")
            continue
        if isinstance(structure, str):
            structure = [int(size) for size in structure.split("x") if re.fullmatch(r"\d{1,9}", size)]
        blocks.append(structure)
    algorithm = str(quantization.get("quant_algo")).lower()
    if algorithm.startswith("fp8_pb"):
        blocks.append([128, 128])  # the only size in ModelOpt's recipes, which do not write it to the config
    elif algorithm == "fp8_per_channel_per_token" or quantization.get("quant_method") == "fbgemm_fp8":
        kinds.add("channel")
    blocks.append(quantization.get("weight_block_size"))
    if quantization.get("quant_method") in AUTO_ROUND:
        blocks.append(quantization.get("group_size"))
    if str((scheme := weight_scheme(quantization)).get("dtype")).startswith("fp8"):
        span = {"per_channel": "channel", "per_tensor": "tensor"}.get(str(scheme.get("qscheme")))
        kinds |= {span} if span else set()
        blocks.append(scheme.get("block_size"))
        if scheme.get("qscheme") == "per_group":
            blocks.append([1, scheme.get("group_size")])
    usable = [(block[0], block[1]) for block in blocks if isinstance(block, list) and _is_block(block)]
    return kinds | ({"block"} if usable else set()), usable


def _is_block(block: list[object]) -> bool:
    return len(block) == 2 and all(type(size) is int and size > 0 for size in block)


def grid(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """The leading axes of a weight of this shape, then the numbers of blocks along its rows and columns."""
    *leading, rows, columns = shape
    return (*leading, -(-rows // block[0]), -(-columns // block[1]))


def _recognise_unscaled(weight: Part, quantization: Mapping[str, Any]) -> Stored:
    if method := quantization.get("quant_method") or quantization.get("quant_algo"):
        raise UnknownFormat(f"FP8 without its scale, although config.json says that it is quantised ({method})")
    grid = Grid(ELEMENTS[weight.dtype], scale="none")
    return Stored(UNSCALED, weight.shape, {"weight": 1}, _decode_unscaled, grid=grid)


def _decode_unscaled(parts: Mapping[str, NDArray[Any]], start: int, stop: int) -> NDArray[np.float32]:
    return widen(parts["weight"])


def _find_groups(
    shape: tuple[int, ...], scale: tuple[int, ...], quantization: Mapping[str, Any]
) -> tuple[Block, Fraction] | None:
    """AutoRound's groups of a row, whose scales are one vector: the block, and the rows that one scale covers."""
    size = quantization.get("group_size")
    if quantization.get("quant_method") not in AUTO_ROUND or type(size) is not int or len(shape) != 2:
        return None
    rows, columns = shape
    size = columns if size == -1 else size
    if size < 1:
        return None
    groups = -(-columns // size)
    if scale not in ((rows * groups,), (rows * groups, 1)):
        return None
    return (1, size), Fraction(1, groups)


def _find_block(
    shape: tuple[int, ...], name: str, scale: tuple[int, ...], quantization: Mapping[str, Any]
) -> tuple[Block, int | None]:
    """The size of the block that a scale spans, and the number of rows that a row of scales spans, None for all rows.

    Raises UnknownFormat where the shapes and the config leave several sizes or none, ModelUnreadable where the shapes
    contradict the config.
    """
    *stack, rows, columns = shape
    leading = tuple(stack)
    kinds, declared = find_blocks(quantization)
    matrix, row, column = (rows, columns), (1, columns), (rows, 1)
    # the readings of the shape: the block, the kind, whether all rows share the scales, and whether the shape fits
    readings = [
        (matrix, "tensor", True, is_one_per_matrix(scale, leading)),
        (row, "channel", False, scale in ((*leading, rows, 1), (*leading, rows))),
        (column, "channel", True, scale in ((*leading, 1, columns), (*leading, columns))),
    ]
    for block in declared:
        *_, down, across = expected = grid(shape, block)
        is_fitting = scale in (expected, (*leading, down, 1, across, 1))
        readings.append(((min(block[0], rows), min(block[1], columns)), "block", False, is_fitting))
    fitting: dict[Block, bool] = {}
    for (height, width), kind, whole, is_fitting in readings:
        if is_fitting and (not kinds or kind in kinds or "unknown" in kinds):
            fitting.setdefault((max(1, height), max(1, width)), whole)
    if len(fitting) > 1 and scale == (rows,) and kinds == {"channel"}:
        fitting = {(1, columns): False}  # a weight that is not stacked is [out, in], and a channel is an output
    if len(fitting) == 1:
        block, whole = fitting.popitem()
        return block, None if whole else block[0]
    if fitting:
        meanings = " or ".join(f"{height} x {width}" for height, width in sorted(fitting))
        raise UnknownFormat(
            f"FP8 whose {name} {list(scale)} could mean blocks of {meanings} of {list(shape)}, and config.json "
            "does not say which"
        )
    if declared:
        expected_shapes = " or ".join(str(list(grid(shape, block))) for block in declared)
        raise ModelUnreadable(f"its {name} is {list(scale)}, expected {expected_shapes}")
    if any(is_fitting for *_, is_fitting in readings):
        raise UnknownFormat(
            f"FP8 whose {name} is {list(scale)}, but config.json says one scale per {' or '.join(sorted(kinds))}"
        )
    if len(scale) == len(shape):
        raise UnknownFormat(
            "FP8 with block scales, but config.json has no quantization_config.weight_block_size", CONFIG_HINT
        )
    raise ModelUnreadable(f"its weight is {list(shape)} and its {name} {list(scale)}: they do not fit together")
