"""Reference encoders of the formats of packed integers: a matrix -> the tensors that hold it, and what they mean.

Nothing here comes from the package under test. What the tensors mean is worked out element by element from the integers
that were stored, not by decoding them.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from encoded import Encoded

Matrix = NDArray[np.float32]
Codes = NDArray[np.int64]

BFLOAT16: Any = ml_dtypes.bfloat16


Encoder = Callable[[Matrix, np.random.Generator], Encoded]


def pack_stream(codes: Codes, bits: int) -> NDArray[np.int32]:
    """[rows, n] -> I32 [rows, words]: one long integer for each row, cut into words from its low end on."""
    rows, count = codes.shape
    words = -(-count * bits // 32)
    packed = np.zeros((rows, words), np.uint32)
    for row in range(rows):
        stream = 0
        for place, code in enumerate(codes[row].tolist()):
            assert 0 <= code < 1 << bits
            stream |= code << (place * bits)
        for word in range(words):
            packed[row, word] = (stream >> (32 * word)) & 0xFFFFFFFF
    return packed.view(np.int32)


def unpack_stream(packed: NDArray[np.int32], bits: int, count: int) -> Codes:
    """I32 [rows, words] -> [rows, count]: the inverse of `pack_stream`."""
    codes = np.zeros((len(packed), count), np.int64)
    for row, words in enumerate(packed.view(np.uint32).tolist()):
        stream = sum(word << (32 * place) for place, word in enumerate(words))
        for place in range(count):
            codes[row, place] = stream >> (place * bits) & ((1 << bits) - 1)
    return codes


def means(codes: Codes, zeros: Codes, scales: Matrix, group_of: Codes) -> Matrix:
    """[out, in] from codes [out, in], zeros and scales [out, groups] and the group of each input, one by one."""
    values = np.empty(codes.shape, np.float32)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            group = group_of[column]
            difference = float(codes[row, column] - zeros[row, group])
            values[row, column] = np.float32(difference) * scales[row, group]
    return values


def quantise(
    matrix: Matrix, bits: int, group_of: Codes, dtype: Any, *, symmetric: bool, least_zero: int = 0
) -> tuple[Codes, Codes, NDArray[Any]]:
    """Codes [out, in], zeros [out, groups], unsigned, and scales of the dtype, for each row and group of inputs."""
    rows, groups = len(matrix), int(group_of.max()) + 1
    top = (1 << bits) - 1
    codes, zeros = np.zeros(matrix.shape, np.int64), np.full((rows, groups), 1 << (bits - 1), np.int64)
    scales = np.ones((rows, groups), dtype)
    for group in range(groups):
        members = np.flatnonzero(group_of == group)
        if not len(members):
            continue
        for row in range(rows):
            own = matrix[row, members].astype(float)
            low, high = min(0.0, own.min()), max(0.0, own.max())
            width = 2 * max(-low, high) if symmetric else high - low
            scales[row, group] = max(width / top, 1e-4)
            scale = float(scales[row, group])
            if not symmetric:
                zeros[row, group] = min(max(round(-low / scale), least_zero), top)
            codes[row, members] = np.clip(np.rint(own / scale) + zeros[row, group], 0, top)
    return codes, zeros, scales


def compressed_tensors(bits: int, strategy: str, group: int | None, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group, "symmetric": True} | more
    kind = "int-quantized" if more.get("plain") else "pack-quantized"
    weights.pop("plain", None)
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def pack_int(
    matrix: Matrix,
    rng: np.random.Generator,
    *,
    bits: int,
    group: int | None = 32,
    symmetric: bool = True,
    ordered: bool = False,
    dtype: Any = BFLOAT16,
) -> Encoded:
    """compressed-tensors, pack-quantized; without a group the scale is one for each output."""
    rows, columns = matrix.shape
    size = group or columns
    group_of = np.arange(columns) // size
    if ordered:
        group_of = rng.permutation(group_of)
    codes, zeros, scales = quantise(matrix, bits, group_of, dtype, symmetric=symmetric)
    parts = {
        "weight_packed": ("I32", pack_stream(codes, bits)),
        "weight_scale": ("BF16" if dtype is BFLOAT16 else "F32", scales),
        "weight_shape": ("I64", np.array([rows, columns], np.int64)),
    }
    if not symmetric:
        parts["weight_zero_point"] = ("I32", np.ascontiguousarray(pack_stream(zeros.T, bits).T))
    if ordered:
        parts["weight_g_idx"] = ("I32", group_of.astype(np.int32))
    said = compressed_tensors(
        bits, "group" if group else "channel", group, symmetric=symmetric, actorder="group" if ordered else None
    )
    return Encoded(parts, means(codes, zeros, scales.astype(np.float32), group_of), said)


def plain_int8(matrix: Matrix, rng: np.random.Generator, *, how: str, symmetric: bool = True) -> Encoded:
    """compressed-tensors, int-quantized; `how` is channel, tensor or group (of 16)."""
    rows, columns = matrix.shape
    size = 16 if how == "group" else columns
    group_of = np.arange(columns) // size
    whole = matrix.reshape(1, -1) if how == "tensor" else matrix
    spread = np.zeros(whole.shape[1], np.int64) if how == "tensor" else group_of
    codes, zeros, scales = quantise(whole, 8, spread, np.float32, symmetric=symmetric)
    values = means(codes, zeros, scales, spread).reshape(rows, columns)
    parts = {
        "weight": ("I8", (codes - 128).astype(np.int8).reshape(rows, columns)),
        "weight_scale": ("F32", scales.reshape(1) if how == "tensor" else scales),
    }
    if not symmetric:
        parts["weight_zero_point"] = ("I8", (zeros - 128).astype(np.int8))
    said = compressed_tensors(8, how, 16 if how == "group" else None, symmetric=symmetric, plain=True)
    return Encoded(parts, values, said)


def modelopt_int4(matrix: Matrix, rng: np.random.Generator, *, second: bool = False) -> Encoded:
    """ModelOpt's AWQ: groups of 16 inputs, two outputs a byte; with a second scale for inputs in FP8."""
    group_of = np.arange(matrix.shape[1]) // 16
    codes, zeros, scales = quantise(matrix, 4, group_of, BFLOAT16, symmetric=True)
    signed = (codes - 8) & 15
    parts: dict[str, tuple[str, NDArray[Any]]] = {
        "weight": ("U8", (signed[0::2] | signed[1::2] << 4).astype(np.uint8)),
        "weight_scale": ("BF16", scales),
    }
    if second:
        parts["weight_scale_2"] = ("F32", np.array(rng.random(), np.float32))
    said = {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ" if second else "W4A16_AWQ"}
    return Encoded(parts, means(codes, zeros, scales.astype(np.float32), group_of), said)


def modelslim_int8(matrix: Matrix, rng: np.random.Generator, *, group: int | None = None) -> Encoded:
    """ModelSlim: a scale and an offset for each output, or each group of its inputs."""
    group_of = np.arange(matrix.shape[1]) // (group or matrix.shape[1])
    codes, zeros, scales = quantise(matrix, 8, group_of, np.float32, symmetric=False)
    parts = {
        "weight": ("I8", (codes - 128).astype(np.int8)),
        "weight_scale": ("F32", scales),
        "weight_offset": ("F32", (zeros - 128).astype(np.float32)),
    }
    return Encoded(parts, means(codes, zeros, scales, group_of), {})


def quark(
    matrix: Matrix,
    rng: np.random.Generator,
    *,
    dtype: str,
    qscheme: str,
    symmetric: bool = False,
    group: int = 32,
    reorder: bool = True,
) -> Encoded:
    """AMD's Quark: what has groups is turned."""
    bits, rows, columns = int(dtype.lstrip("uint")), *matrix.shape
    offset = 0 if dtype.startswith("u") else 1 << (bits - 1)
    size = group if qscheme == "per_group" else columns
    whole = matrix.reshape(1, -1) if qscheme == "per_tensor" else matrix
    group_of = np.zeros(whole.shape[1], np.int64) if qscheme != "per_group" else np.arange(columns) // size
    codes, zeros, scales = quantise(whole, bits, group_of, BFLOAT16, symmetric=symmetric)
    values = means(codes, zeros, scales.astype(np.float32), group_of).reshape(rows, columns)
    codes = codes.reshape(rows, columns)

    def pack(numbers: Codes) -> tuple[str, NDArray[Any]]:
        """Of [a, b]: bytes, or words of eight numbers."""
        signed = numbers - offset
        if bits == 8:
            return ("I8", signed.astype(np.int8)) if offset else ("U8", signed.astype(np.uint8))
        order = (0, 2, 4, 6, 1, 3, 5, 7) if reorder else range(8)
        padded = np.pad(signed, ((0, 0), (0, -signed.shape[1] % 8)))
        words = np.zeros((len(padded), padded.shape[1] // 8), np.uint32)
        for place, column in enumerate(order):
            words |= (padded[:, column::8] & 15).astype(np.uint32) << np.uint32(4 * place)
        return "I32", words.view(np.int32)

    is_turned = qscheme == "per_group"
    parts: dict[str, tuple[str, NDArray[Any]]] = {"weight": pack(codes.T if is_turned else codes)}
    if is_turned:
        parts["weight_scale"] = ("BF16", np.ascontiguousarray(scales.T))
        zero = pack(zeros.T)
    else:
        parts["weight_scale"] = ("BF16", scales.reshape(() if qscheme == "per_tensor" else -1))
        kind, packed = pack(zeros.reshape(1, -1))
        zero = (kind, packed.reshape(() if qscheme == "per_tensor" and bits == 8 else -1))
    if not symmetric or dtype.startswith("u"):
        parts["weight_zero_point"] = zero
    weight = {"dtype": dtype, "qscheme": qscheme, "symmetric": symmetric, "group_size": group if is_turned else None}
    said = {
        "quant_method": "quark",
        "global_quant_config": {"weight": weight},
        "export": {"pack_method": "reorder" if reorder else "order"},
    }
    return Encoded(parts, values, said)


def gptq(
    matrix: Matrix,
    rng: np.random.Generator,
    *,
    bits: int,
    version: int = 1,
    order: str = "in turn",
    symmetric: bool = False,
    group: int = 32,
) -> Encoded:
    """GPTQ; `order` is "in turn", "any" (act-order) or "none" (no g_idx)."""
    columns = matrix.shape[1]
    group_of = np.arange(columns) // group
    if order == "any":
        group_of = rng.permutation(group_of)
    codes, zeros, scales = quantise(
        matrix, bits, group_of, np.float16, symmetric=symmetric, least_zero=1 if version == 1 else 0
    )
    parts = {
        "qweight": ("I32", np.ascontiguousarray(pack_stream(codes, bits).T)),
        "qzeros": ("I32", pack_stream(zeros.T - (1 if version == 1 else 0), bits)),
        "scales": ("F16", np.ascontiguousarray(scales.T)),
    }
    if order != "none":
        parts["g_idx"] = ("I32", group_of.astype(np.int32))
    said = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": order == "any",
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return Encoded(parts, means(codes, zeros, scales.astype(np.float32), group_of), said)


def auto_round(matrix: Matrix, rng: np.random.Generator, *, packing: str) -> Encoded:
    """What AutoRound writes: GPTQ without g_idx, of either kind."""
    encoded = gptq(matrix, rng, bits=4, version=1 if packing == "auto_round:auto_gptq" else 2, order="none")
    said = {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 32, "sym": False}
    return Encoded(encoded.parts, encoded.values, said)


def awq(matrix: Matrix, rng: np.random.Generator, *, group: int = 32) -> Encoded:
    """AutoAWQ, version GEMM."""
    group_of = np.arange(matrix.shape[1]) // group
    codes, zeros, scales = quantise(matrix, 4, group_of, np.float16, symmetric=False)

    def pack(rows: Codes) -> NDArray[np.int32]:
        packed = np.zeros((rows.shape[0], rows.shape[1] // 8), np.uint32)
        for word in range(packed.shape[1]):
            for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                packed[:, word] |= rows[:, 8 * word + column].astype(np.uint32) << np.uint32(4 * place)
        return packed.view(np.int32)

    parts = {
        "qweight": ("I32", pack(codes.T)),
        "qzeros": ("I32", pack(zeros.T)),
        "scales": ("F16", np.ascontiguousarray(scales.T)),
    }
    said = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group, "zero_point": True}
    return Encoded(parts, means(codes, zeros, scales.astype(np.float32), group_of), said)


# Dettmers et al., QLoRA (2023), appendix E; and E2M1 / 12 in bitsandbytes' own order
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))


def bnb_4bit(
    matrix: Matrix,
    rng: np.random.Generator,
    *,
    kind: str = "nf4",
    nested: bool = False,
    block: int = 64,
    storage: str = "U8",
) -> Encoded:
    """bitsandbytes, a block running over the rows of the flattened matrix."""
    book = np.array(NF4 if kind == "nf4" else FP4, np.float32)
    flat = matrix.reshape(-1)
    count = len(flat)
    largest = np.array([np.abs(flat[at : at + block]).max() for at in range(0, count, block)], np.float32)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(matrix.shape)}
    parts: dict[str, tuple[str, NDArray[Any]]] = {}
    if nested:
        nested_block = 4  # the library's is 256: smaller so that small matrices have several
        offset = float(largest.mean(dtype=np.float32))
        nested_map = np.linspace(-1, 1, 256, dtype=np.float32)
        spread = np.array(
            [np.abs(largest[at : at + nested_block] - offset).max() for at in range(0, len(largest), nested_block)],
            np.float32,
        )
        absmax = np.empty(len(largest), np.uint8)
        for at, value in enumerate(largest):
            near = (value - offset) / max(spread[at // nested_block], 1e-30)
            absmax[at] = np.abs(nested_map - near).argmin()
            largest[at] = nested_map[absmax[at]] * spread[at // nested_block] + np.float32(offset)
        state |= {"nested_blocksize": nested_block, "nested_dtype": "float32", "nested_offset": offset}
        parts["weight.absmax"] = ("U8", absmax)
        parts["weight.nested_absmax"] = ("F32", spread)
        parts["weight.nested_quant_map"] = ("F32", nested_map)
    else:
        parts["weight.absmax"] = ("F32", largest.copy())
    item = {"U8": 1, "BF16": 2, "F32": 4}[storage]
    data = np.zeros(-(-count // (2 * item)) * item, np.uint8)
    values = np.empty(count, np.float32)
    for at in range(count):
        scale = largest[at // block]
        code = int(np.abs(book - flat[at] / (scale or 1)).argmin())
        data[at // 2] |= code << (0 if at % 2 else 4)
        values[at] = book[code] * scale
    kinds: dict[str, Any] = {"U8": np.uint8, "BF16": BFLOAT16, "F32": np.float32}
    parts["weight"] = (storage, data.view(kinds[storage])[:, None])
    parts["weight.quant_map"] = ("F32", book)
    text = json.dumps(state).encode()
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = ("U8", np.frombuffer(text, np.uint8).copy())
    said = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
    }
    return Encoded(parts, values.reshape(matrix.shape), said)


def bnb_int8(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    """LLM.int8()."""
    largest = np.abs(matrix).max(1).astype(np.float32)
    codes = np.rint(matrix / np.where(largest, largest, 1)[:, None] * 127).astype(np.int8)
    values = np.array(
        [[float(code) * float(top) / 127 for code in row] for row, top in zip(codes, largest, strict=True)], np.float32
    ).reshape(matrix.shape)
    parts: dict[str, tuple[str, NDArray[Any]]] = {
        "weight": ("I8", codes),
        "SCB": ("F32", largest),
        "weight_format": ("U8", np.array(0, np.uint8)),
    }
    return Encoded(parts, values, {"quant_method": "bitsandbytes", "load_in_8bit": True})


ENCODERS: dict[str, tuple[Encoder, tuple[int, int]]] = {
    "pack_int4_sym": (partial(pack_int, bits=4), (1, 32)),
    "pack_int4_asym": (partial(pack_int, bits=4, symmetric=False), (1, 32)),
    "pack_int4_channel": (partial(pack_int, bits=4, group=None), (1, 1)),
    "pack_int4_channel_asym": (partial(pack_int, bits=4, group=None, symmetric=False), (1, 1)),
    "pack_int4_actorder": (partial(pack_int, bits=4, ordered=True), (1, 32)),
    "pack_int4_asym_actorder": (partial(pack_int, bits=4, symmetric=False, ordered=True), (1, 32)),
    "pack_int4_ragged": (partial(pack_int, bits=4, group=12, symmetric=False, dtype=np.float32), (1, 1)),
    "pack_int8": (partial(pack_int, bits=8), (1, 32)),
    "pack_int8_asym": (partial(pack_int, bits=8, symmetric=False, dtype=np.float32), (1, 32)),
    "pack_int2": (partial(pack_int, bits=2, symmetric=False), (1, 32)),
    "pack_int1": (partial(pack_int, bits=1, group=64, symmetric=False), (1, 64)),
    "pack_int3": (partial(pack_int, bits=3), (1, 32)),
    "pack_int3_asym": (partial(pack_int, bits=3, symmetric=False), (1, 32)),
    "pack_int5": (partial(pack_int, bits=5), (1, 32)),
    "pack_int6_asym": (partial(pack_int, bits=6, symmetric=False), (1, 32)),
    "pack_int7": (partial(pack_int, bits=7), (1, 32)),
    "modelslim_int8": (modelslim_int8, (1, 1)),
    "modelslim_int8_group": (partial(modelslim_int8, group=16), (1, 16)),
    "quark_int8_channel": (partial(quark, dtype="int8", qscheme="per_channel"), (1, 1)),
    "quark_uint8_tensor": (partial(quark, dtype="uint8", qscheme="per_tensor"), (1, 1)),
    "quark_int4_channel": (partial(quark, dtype="int4", qscheme="per_channel"), (8, 8)),
    "quark_int8_group": (partial(quark, dtype="int8", qscheme="per_group", symmetric=True), (1, 32)),
    "quark_int4_group": (partial(quark, dtype="int4", qscheme="per_group"), (8, 32)),
    "quark_uint4_group": (partial(quark, dtype="uint4", qscheme="per_group", reorder=False), (8, 32)),
    "int8_channel": (partial(plain_int8, how="channel"), (1, 1)),
    "int8_channel_asym": (partial(plain_int8, how="channel", symmetric=False), (1, 1)),
    "int8_tensor": (partial(plain_int8, how="tensor"), (1, 1)),
    "int8_group": (partial(plain_int8, how="group"), (1, 16)),
    "int8_group_asym": (partial(plain_int8, how="group", symmetric=False), (1, 16)),
    "gptq_4": (partial(gptq, bits=4), (8, 1)),
    "gptq_4_sym": (partial(gptq, bits=4, symmetric=True), (8, 1)),
    "gptq_4_v2": (partial(gptq, bits=4, version=2), (8, 1)),
    "gptq_4_act_order": (partial(gptq, bits=4, order="any"), (8, 1)),
    "gptq_4_no_g_idx": (partial(gptq, bits=4, order="none"), (8, 8)),
    "modelopt_int4": (modelopt_int4, (2, 16)),
    "modelopt_w4a8": (partial(modelopt_int4, second=True), (2, 16)),
    "gptq_2": (partial(gptq, bits=2), (16, 1)),
    "gptq_3": (partial(gptq, bits=3), (32, 32)),
    "gptq_3_v2": (partial(gptq, bits=3, version=2), (32, 32)),
    "gptq_3_act_order": (partial(gptq, bits=3, order="any"), (32, 32)),
    "gptq_8": (partial(gptq, bits=8), (4, 1)),
    "gptq_8_act_order": (partial(gptq, bits=8, order="any", version=2), (4, 1)),
    "auto_round_gptq": (partial(auto_round, packing="auto_round:auto_gptq"), (8, 32)),
    "auto_round_gptqmodel": (partial(auto_round, packing="auto_round:gptqmodel"), (8, 32)),
    "awq_4": (awq, (8, 1)),
    "bnb_nf4": (bnb_4bit, (1, 1)),
    "bnb_fp4": (partial(bnb_4bit, kind="fp4"), (1, 1)),
    "bnb_nf4_nested": (partial(bnb_4bit, nested=True), (1, 1)),
    "bnb_fp4_nested": (partial(bnb_4bit, kind="fp4", nested=True), (1, 1)),
    "bnb_nf4_bf16_storage": (partial(bnb_4bit, storage="BF16", block=32), (1, 1)),
    "bnb_int8": (bnb_int8, (1, 1)),
}
"""Name -> encoder, and what the matrix's outputs and inputs must be multiples of."""
