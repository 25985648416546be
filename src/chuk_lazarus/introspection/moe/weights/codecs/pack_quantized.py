"""The integers of compressed-tensors, `pack-quantized` and `int-quantized`, and those of ModelSlim.

Packed: `weight_packed` is I32 [out, ceil(in * bits / 32)]; each row is a dense stream, from the lowest bit on, of the
integers plus 2^(bits - 1). `weight_shape` is [out, in]. Not packed: `weight` is I8 [out, in].

In both, `weight_scale` is [out, in / group], [out, 1] or a single number, and `weight_zero_point` has the same shape.
Beside packed weights it is packed along the outputs: I32 [ceil(out * bits / 32), in / group]. A weight is
(integer - zero point) * scale. `weight_g_idx` [in] is the group of each input; if it contains -1 it was never filled,
and the groups are consecutive inputs (compressors/pack_quantized/helpers.py, compressors/naive_quantized/base.py and
quantization/lifecycle/forward.py of compressed-tensors; for g_idx the latter in version 0.12).

Integers of 3, 5, 6 and 7 bits are packed densely by newer versions; older versions packed as many as fit into a word.
The number of words tells which, except in very short rows.

ModelSlim's `weight` I8 has a `weight_offset` of floats [out, 1] or [out, groups]: a weight is
(integer - offset) * scale (msmodelslim's description of its format, W8A8 and W8A16).
"""

from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelUnreadable, UnknownFormat
from .bits import unpack, unpack_rows
from .codec import CONFIG_HINT, Grid, Part, Stored

FLOATS = ("BF16", "F16", "F32")
METHODS = (None, "compressed-tensors", "modelopt", "modelslim", "ascend", "w8a8_int8")
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_offset")


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored | None:
    """Takes `weight_packed` I32 beside `weight_shape`, or `weight` I8, with a `weight_scale` of floats."""
    integers = parts.keys() - {"weight_scale", "weight_zero_point", "weight_g_idx", "weight_offset"}
    if "weight_offset" in parts and (integers != {"weight"} or "weight_zero_point" in parts):
        return None
    if "weight_scale" not in parts or parts["weight_scale"].dtype not in FLOATS:
        return None
    if integers == {"weight_packed", "weight_shape"} and parts["weight_packed"].dtype == "I32":
        packed = parts["weight_packed"]
        if len(packed.shape) < 2 or not prod(packed.shape):
            raise ModelUnreadable(f"its weight_packed is {list(packed.shape)}, which is not a matrix")
        *leading, rows, words = packed.shape
        columns = _count_columns(parts["weight_shape"], packed)
        bits = _find_bits(words, columns, quantization)
        spans: dict[str, int | Fraction | None] = {"weight_packed": 1}
        codec = f"int{bits}"
    elif integers == {"weight"} and parts["weight"].dtype == "I8" and len(parts["weight"].shape) > 1:
        if quantization.get("quant_method") not in METHODS:
            return None
        *leading, rows, columns = parts["weight"].shape
        bits = 8
        spans = {"weight": 1}
        codec = "int8"
    else:
        return None
    shape = (*leading, rows, columns)
    if not prod(shape):
        raise ModelUnreadable(f"it is empty: {list(shape)}")
    spans["weight_scale"], groups = _find_span("weight_scale", parts["weight_scale"], shape, quantization)
    if zero := parts.get("weight_zero_point"):
        per_row = spans["weight_scale"] is not None
        packed_shape = (*leading, -(-rows * bits // 32), groups)
        if zero.dtype == "I32" and "weight" not in parts and per_row and zero.shape == packed_shape:
            spans["weight_zero_point"] = Fraction(32, bits)
        elif zero.dtype == "I8":
            spans["weight_zero_point"], count = _find_span("weight_zero_point", zero, shape, quantization)
            if count != groups:
                raise ModelUnreadable(f"its weight_zero_point has {count} groups, but its weight_scale has {groups}")
        else:
            raise ModelUnreadable(
                f"its weight_zero_point is {zero.dtype} {list(zero.shape)}, expected I32 {list(packed_shape)} or I8"
            )
    elif (schemes := _int_weights(quantization)) and all(scheme.get("symmetric") is False for scheme in schemes):
        raise ModelUnreadable("config.json says that it is not symmetric, but there is no weight_zero_point")
    if offset := parts.get("weight_offset"):
        if offset.dtype not in FLOATS or offset.shape != parts["weight_scale"].shape:
            raise ModelUnreadable(f"its weight_offset is {offset.dtype} {list(offset.shape)}, unlike its weight_scale")
        spans["weight_offset"] = spans["weight_scale"]
    if order := parts.get("weight_g_idx"):
        if order.dtype not in ("I32", "I64") or order.shape != (*leading, columns):
            raise ModelUnreadable(f"its weight_g_idx is {order.dtype} {list(order.shape)} for {columns} inputs")
        spans["weight_g_idx"] = None
    group = _group_size(columns, groups, quantization)
    height = 1 if spans["weight_scale"] else None
    grid = Grid("int", (height, group), bits, has_zero="weight_zero_point" in parts or "weight_offset" in parts)
    return Stored(codec, shape, spans, partial(decode, bits=bits, columns=columns, group=group), grid=grid)


def decode(
    parts: Mapping[str, NDArray[Any]], start: int, stop: int, *, bits: int, columns: int, group: int
) -> NDArray[np.float32]:
    """(Integers [rows, columns] - their zero points) * the scales of their groups of `group` columns."""
    if "weight" in parts:
        values = parts["weight"].astype(np.float32)
    else:
        values = _signed(unpack(parts["weight_packed"].view(np.uint32), bits, columns), bits).astype(np.float32)
    order = parts.get("weight_g_idx")
    if order is not None and (order.size == 0 or order.min() < 0):
        order = None
    with np.errstate(over="ignore", invalid="ignore"):
        if (zero := parts.get("weight_zero_point")) is not None:
            if zero.dtype.itemsize == 4:
                first = start * bits % 32
                zero = _signed(unpack_rows(zero.view(np.uint32), bits, first, stop - start), bits)
            _apply(np.subtract, values, zero.astype(np.float32), group, order)
        if (offset := parts.get("weight_offset")) is not None:
            _apply(np.subtract, values, offset.astype(np.float32), group, order)
        _apply(np.multiply, values, parts["weight_scale"].astype(np.float32), group, order)
    return values


def _signed(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """The codes - 2^(bits - 1)."""
    if bits == 8:
        return (codes ^ np.uint8(0x80)).view(np.int8)
    return codes.view(np.int8) - np.int8(1 << (bits - 1))


def _apply(
    operation: np.ufunc,
    values: NDArray[np.float32],
    factors: NDArray[np.float32],
    group: int,
    order: NDArray[np.integer[Any]] | None,
) -> None:
    """Apply an operation with the operands of each group, [rows or 1, groups], to values [rows, columns] in place.

    `order` is the group of each column, None where groups are `group` consecutive columns. Raises ModelUnreadable for
    a group that does not exist.
    """
    rows, columns = values.shape
    factors = factors.reshape(rows if factors.ndim and len(factors) == rows else 1, -1)
    groups = factors.shape[1]
    if groups == 1:
        operation(values, factors, out=values)
    elif order is not None:
        if order.max() >= groups:
            raise ModelUnreadable(f"its weight_g_idx names group {int(order.max())} of {groups}")
        operation(values, np.take(factors, order, axis=1), out=values)
    elif groups * group == columns:
        grouped = values.reshape(rows, groups, group)
        operation(grouped, factors[:, :, None], out=grouped)
    else:
        operation(values, np.repeat(factors, group, axis=1)[:, :columns], out=values)


def _count_columns(described: Part, packed: Part) -> int:
    """The number of inputs by `weight_shape`; raises ModelUnreadable where it does not fit the packed weights."""
    if described.dtype not in ("I64", "I32") or not 1 < prod(described.shape) <= 2 * prod(packed.shape[:-2]) + 1:
        raise ModelUnreadable(f"its weight_shape is {described.dtype} {list(described.shape)}")
    sizes = [int(size) for size in described.load().reshape(-1)]
    expected = list(packed.shape[:-1])
    if sizes[:-1] == expected or sizes[:-1] == expected[-1:]:
        columns = sizes[-1]
    elif sizes == sizes[:2] * prod(expected[:-1]) and sizes[0] == expected[-1]:
        columns = sizes[1]  # the part has [out, in] for each expert
    else:
        raise ModelUnreadable(f"its weight_shape says {sizes}, but its weight_packed is {list(packed.shape)}")
    if columns < 1:
        raise ModelUnreadable(f"its weight_shape says {sizes}")
    return columns


def _int_weights(quantization: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The schemes for weights of integers in the config's groups."""
    groups = quantization.get("config_groups")
    settings = groups.values() if isinstance(groups, dict) else ()
    schemes = [group.get("weights") for group in settings if isinstance(group, dict)]
    return [scheme for scheme in schemes if isinstance(scheme, dict) and scheme.get("type", "int") == "int"]


def _find_bits(words: int, columns: int, quantization: Mapping[str, Any]) -> int:
    """The bits of an integer that fit the shapes, and the config where it has them.

    Raises ModelUnreadable where none fit the shapes, UnknownFormat where several or none fit both, or where we can't
    tell how these bits are packed.
    """
    fitting = {bits for bits in range(1, 9) if words in (-(-columns * bits // 32), -(-columns // (32 // bits)))}
    stated = {scheme["num_bits"] for scheme in _int_weights(quantization) if type(scheme.get("num_bits")) is int}
    candidates = fitting & stated if stated else fitting
    if not fitting:
        raise ModelUnreadable(f"its weight_packed has {words} words per row for {columns} integers of at most 8 bits")
    listing = " or ".join(str(bits) for bits in sorted(stated or fitting))
    if not candidates:
        raise UnknownFormat(f"{words} words per row hold {columns} integers, but config.json says {listing} bits")
    if len(candidates) > 1:
        raise UnknownFormat(f"packed integers of {listing} bits: the shapes do not show which", CONFIG_HINT)
    bits = candidates.pop()
    if words != -(-columns * bits // 32):
        raise UnknownFormat(
            f"packed integers of {bits} bits in the padded words of old versions, which we can't decode"
        )
    if 32 % bits and words == -(-columns // (32 // bits)):
        raise UnknownFormat(
            f"packed integers of {bits} bits in {words} words per row, which could be packed in two ways"
        )
    return bits


def _find_span(
    name: str, part: Part, shape: tuple[int, ...], quantization: Mapping[str, Any]
) -> tuple[int | None, int]:
    """The number of decoded rows that a row of scales or zero points covers, None for all, and its number of groups.

    Raises ModelUnreadable for a shape that does not fit the matrix, UnknownFormat for blocks of rows and columns.
    """
    *leading, rows, columns = shape
    tail = part.shape[len(leading) :] if part.shape[: len(leading)] == tuple(leading) else part.shape
    if prod(tail) == 1 and (rows > 1 or len(tail) < 2):
        return None, 1
    if (*leading, *tail) == part.shape:
        if tail == (rows,):
            return 1, 1
        if len(tail) == 2 and tail[0] == rows and 0 < tail[1] <= columns:
            return 1, tail[1]
    if any(scheme.get("strategy") == "block" for scheme in _int_weights(quantization)):
        raise UnknownFormat("integers with one scale per block of rows and columns, which we can't decode")
    raise ModelUnreadable(f"its {name} is {list(part.shape)} for a matrix {list(shape)}")


def _group_size(columns: int, groups: int, quantization: Mapping[str, Any]) -> int:
    """The number of columns in a group; the last group may have fewer.

    Raises UnknownFormat where the config does not give a size that fits the number of groups.
    """
    schemes = _int_weights(quantization)
    if not schemes and columns % groups == 0:
        return columns // groups
    stated = [scheme.get("group_size") for scheme in schemes]
    sizes = {size if type(size) is int and size > 0 else columns for size in stated}
    fitting = [size for size in sizes if -(-columns // size) == groups]
    if len(fitting) == 1 or (fitting and groups == 1):
        return fitting[0]
    listing = " or ".join(sorted({*map(str, stated)}))
    raise UnknownFormat(
        f"{groups} scales for {columns} columns, but config.json says group_size {listing}",
        CONFIG_HINT,
    )
