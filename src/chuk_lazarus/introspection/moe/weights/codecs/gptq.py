"""GPTQ: unsigned integers in groups of inputs, each group with a scale and a zero point for every output.

The stored matrix is [in, out]. `qweight` is I32 [in * bits / 32, out]; each column is a dense stream from the lowest
bit on, also with 3 bits. `qzeros` is I32 [groups, out * bits / 32], with rows packed in the same way, and `scales`
[groups, out]. `g_idx` I32 [in] is the group of each input, which with act-order may be any. A weight is
(integer - zero point) * scale (nn_modules/qlinear/__init__.py of GPTQModel 7.7, `pack_original` and
`dequantize_weight`).

Format "gptq" stores each zero point less 1, "gptq_v2" the zero point itself. GPTQModel subtracts 1 from the packed
words, so that a zero point of 0 borrows from its neighbour, and adds it to the words again
(`convert_gptq_v1_to_v2_format_module` in utils/model.py). Where no zero point was 0, adding 1 to each of them is the
same. AutoRound's "auto_gptq" is the first of these formats, its "gptqmodel" the second (GPTQ_FORMAT and
GPTQ_FORMAT_NO_ZP in inference/backend.py of auto-round 0.16).
"""

from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelUnreadable, UnknownFormat
from .bits import unpack, unpack_rows
from .codec import CONFIG_HINT, Grid, Part, Stored

WIDTHS = (2, 3, 4, 8)
FORMATS = {"gptq": 1, "gptq_v2": 0}
"""The formats of a checkpoint, each with the number that is missing from its zero points."""

AUTO_ROUND_FORMATS = {
    "auto_round:auto_gptq": 1,
    "auto_round:gptq": 1,
    "auto_round": 0,
    "auto_round:gptqmodel": 0,
}
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored | None:
    """Takes `qweight`, `qzeros` and `scales`, with or without `g_idx`, unless config or shapes show that it is AWQ."""
    if parts.keys() - {"g_idx"} != {"qweight", "qzeros", "scales"}:
        return None
    qweight, qzeros, scales, order = parts["qweight"], parts["qzeros"], parts["scales"], parts.get("g_idx")
    types = {part.dtype for part in (qweight, qzeros)} | ({order.dtype} if order else set())
    if types != {"I32"} or scales.dtype not in ("F16", "BF16", "F32") or len(qweight.shape) < 2:
        return None
    *leading, words, outputs = qweight.shape
    is_awq_shape = order is None and scales.shape[-1:] == (outputs * 8,)
    offset = _zero_offset(quantization, is_awq_shape)
    if offset is None:
        return None
    groups = scales.shape[-2] if len(scales.shape) > 1 else 0
    inputs = order.shape[-1] if order and order.shape else None
    listing = ", ".join(f"{name} {list(part.shape)}" for name, part in parts.items())
    if (
        not groups
        or scales.shape != (*leading, groups, outputs)
        or qzeros.shape[:-1] != (*leading, groups)
        or (order and order.shape != (*leading, inputs))
        or not words * outputs
    ):
        raise ModelUnreadable(f"not the shapes of GPTQ: {listing}")
    bits = _find_bits(words, outputs, qzeros.shape[-1], inputs, listing, quantization)
    if inputs is None:
        inputs, rest = divmod(words * 32, bits)
        if rest:
            raise ModelUnreadable(f"not the shapes of GPTQ in {bits} bits: {listing}")
    size = _group_size(inputs, groups, order is not None, quantization)
    if order and size is not None:
        # With act-order, an input may be in any group. We look at the first expert, and decode checks the others.
        in_sequence = np.broadcast_to(np.arange(inputs) // size, order.shape)
        if quantization.get("desc_act") is True or not np.array_equal(order.load(), in_sequence):
            size = None
    spans: dict[str, int | Fraction | None] = {"qweight": Fraction(32, bits), "qzeros": size, "scales": size}
    spans |= {"g_idx": 1} if order else {}
    decoder = partial(decode, bits=bits, offset=offset, groups=groups, size=size)
    grid = Grid("int", (size or -(-inputs // groups), 1), bits, has_zero=True)
    return Stored("gptq", (*leading, inputs, outputs), spans, decoder, True, grid)


def decode(
    parts: Mapping[str, NDArray[Any]],
    start: int,
    stop: int,
    *,
    bits: int,
    offset: int,
    groups: int,
    size: int | None,
) -> NDArray[np.float32]:
    """Inputs [start, stop) of all outputs, float32 [rows, outputs].

    `size` is the number of inputs in a group where the groups are consecutive inputs; then `parts` has only the groups
    of these inputs. With None it has all groups.
    """
    zeros = _zero_points(parts["qzeros"], bits, offset, parts["scales"].shape[1])
    scales = parts["scales"].astype(np.float32)
    codes = unpack_rows(parts["qweight"].view(np.uint32), bits, start * bits % 32, stop - start)
    first = start // size if size else 0
    if "g_idx" in parts:
        index = parts["g_idx"].astype(np.int64)
        if index.size and not 0 <= index.min() <= index.max() < groups:
            raise ModelUnreadable(f"its g_idx names groups from {index.min()} to {index.max()}, but there are {groups}")
        index -= first
        if index.size and not 0 <= index.min() <= index.max() < len(scales):
            raise UnknownFormat(
                "its g_idx has a different order from the first expert's, but config.json does not say desc_act"
            )
    else:
        index = np.arange(start, stop) // (size or 1) - first
    return scale_rows(codes, zeros, scales, index)


def scale_rows(
    codes: NDArray[Any], zeros: NDArray[np.float32], scales: NDArray[np.float32], index: NDArray[np.integer[Any]]
) -> NDArray[np.float32]:
    """(codes - zeros[index]) * scales[index] for codes [rows, columns], zeros and scales [groups, columns]."""
    values = np.empty(codes.shape, np.float32)
    # a run of rows of the same group at a time, or, where most runs are short, 16 rows with a group for each
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    in_runs = len(starts) * 4 <= len(index)
    edges = {*range(0, len(index), 16), *(starts.tolist() if in_runs else ()), len(index)}
    with np.errstate(over="ignore", invalid="ignore"):
        for low, high in pairwise(sorted(edges)):
            group = index[low] if in_runs else index[low:high]
            window = values[low:high]
            np.subtract(codes[low:high], zeros[group], out=window, dtype=np.float32)
            window *= scales[group]
    return values


def _zero_points(packed: NDArray[Any], bits: int, offset: int, outputs: int) -> NDArray[np.float32]:
    """I32 [groups, words] -> float32 [groups, outputs]; adds the `offset` that the file's format subtracts."""
    words = packed.view(np.uint32)
    if offset and 32 % bits == 0:
        words = words + np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    zeros = unpack(words, bits, outputs)
    if offset and 32 % bits:
        zeros = (zeros + np.uint8(1)) & np.uint8((1 << bits) - 1)
    return zeros.astype(np.float32)


def _zero_offset(quantization: Mapping[str, Any], is_awq_shape: bool) -> int | None:
    """The number to add to stored zero points, by the config; None where the tensors are not GPTQ's.

    Raises UnknownFormat for a format that we can't decode, or where the config names none.
    """
    method = quantization.get("quant_method")
    if method in ("auto-round", "auto_round"):
        packing = str(quantization.get("packing_format"))
        if "awq" in packing:
            return None
        if packing not in AUTO_ROUND_FORMATS:
            raise UnknownFormat(f"AutoRound's packing_format {packing}, which we can't decode")
        return AUTO_ROUND_FORMATS[packing]
    named = quantization.get("checkpoint_format", quantization.get("format"))
    if method is None and named is None:
        if is_awq_shape:
            return None
        raise UnknownFormat("GPTQ, but config.json has no quantization_config that says which kind", CONFIG_HINT)
    if method not in ("gptq", None):
        return None
    named = "gptq" if named is None else str(named)
    if quantization.get("is_marlin_format") is True:
        named = "marlin"
    if named not in FORMATS:
        raise UnknownFormat(f"GPTQ's checkpoint_format {named}, which we can't decode")
    return FORMATS[named]


def _find_bits(
    words: int, outputs: int, zero_words: int, inputs: int | None, listing: str, quantization: Mapping[str, Any]
) -> int:
    """The bits of an integer: the config's, if they fit the shapes, or else those that the shapes give.

    The shapes decide where the config has no bits, or has other settings for some modules. Raises ModelUnreadable where
    no number of bits fits the shapes, UnknownFormat where several do or the one that does is not in the config.
    """
    fitting = {
        bits
        for bits in range(1, 9)
        if zero_words == -(-outputs * bits // 32) and (inputs is None or words == -(-inputs * bits // 32))
    }
    if not fitting:
        raise ModelUnreadable(f"not the shapes of GPTQ: {listing}")
    stated = quantization.get("bits")
    if isinstance(stated, int | float) and stated in fitting:
        bits = int(stated)
    elif may_differ(stated, quantization) and len(fitting) == 1:
        bits = fitting.pop()
    else:
        if stated is None:
            raise UnknownFormat(
                "stored as gptq, but neither its shapes nor config.json say in how many bits", CONFIG_HINT
            )
        widths = " or ".join(str(bits) for bits in sorted(fitting))
        raise UnknownFormat(
            f"stored as gptq in {widths} bits by its shapes, but config.json says {stated}", CONFIG_HINT
        )
    if bits not in WIDTHS:
        raise UnknownFormat(f"GPTQ in {bits} bits, which we can't decode")
    return bits


def _group_size(inputs: int, groups: int, has_order: bool, quantization: Mapping[str, Any]) -> int | None:
    """The number of inputs in a group where groups are consecutive inputs; None where only g_idx gives the groups."""
    stated = quantization.get("group_size")
    size = inputs if stated == -1 else stated
    if type(size) is int and size > 0 and -(-inputs // size) == groups:
        return size
    if (has_order or may_differ(stated, quantization)) and inputs % groups == 0:
        return inputs // groups
    if has_order:
        return None
    raise UnknownFormat(f"{groups} groups of {inputs} inputs, but config.json says group_size {stated}", CONFIG_HINT)


def may_differ(stated: object, quantization: Mapping[str, Any]) -> bool:
    """Whether a module may have another value than `stated`, the config's: it has none, or settings for modules."""
    return stated is None or bool(quantization.get("dynamic") or quantization.get("extra_config"))
