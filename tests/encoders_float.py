"""Encoders of small floats and of MLX's formats, written from the specifications: nothing here uses the codecs.

Each takes a float32 matrix [out, in] and a random generator, which chooses what the format leaves open.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from encoded import Encoded

Matrix = NDArray[np.float32]
Encoder = Callable[[Matrix, np.random.Generator], Encoded]

FLOATS: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
BLOCK = (16, 24)


def pick(rng: np.random.Generator, *choices: str) -> str:
    return choices[int(rng.integers(len(choices)))]


def largest_of_blocks(matrix: Matrix, block: tuple[int, int]) -> Matrix:
    """The largest magnitude in each block, the ragged ones included; never 0."""
    rows, columns = range(0, matrix.shape[0], block[0]), range(0, matrix.shape[1], block[1])
    found = [[np.abs(matrix[r : r + block[0], c : c + block[1]]).max() for c in columns] for r in rows]
    return np.maximum(np.array(found, np.float32).reshape(len(rows), len(columns)), np.float32(1e-6))


def spread(scales: Matrix, block: tuple[int, int], shape: tuple[int, ...]) -> Matrix:
    """The scale of every element."""
    return np.kron(scales, np.ones(block, np.float32))[: shape[0], : shape[1]].astype(np.float32)


def exponents(scales: Matrix) -> NDArray[np.uint8]:
    """The E8M0 codes of the powers of two that are not below these scales."""
    return (np.clip(np.ceil(np.log2(scales)), -127, 127) + 127).astype(np.uint8)


def powers(codes: NDArray[np.uint8]) -> Matrix:
    return np.ldexp(np.float32(1), codes.astype(np.int32) - 127)


def round_fp8(scaled: Matrix, dtype: str) -> NDArray[Any]:
    return np.clip(scaled, -LARGEST[dtype], LARGEST[dtype]).astype(FLOATS[dtype])


def round_e2m1(scaled: Matrix) -> tuple[NDArray[np.uint8], Matrix]:
    """Bytes with two codes each, the even element in the low nibble, and the codes' values."""
    rounded = np.clip(scaled, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    codes = rounded.view(np.uint8) & 15
    return codes[:, 0::2] | codes[:, 1::2] << 4, rounded.astype(np.float32)


def compressed_tensors(form: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy, **more}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": form}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": []}


# ---------------------------------------------------------------------------------------------------------------------
# Plain numbers and FP8


def plain(matrix: Matrix, rng: np.random.Generator, dtype: str) -> Encoded:
    stored = matrix.astype(FLOATS[dtype])
    return Encoded({"weight": (dtype, stored)}, stored.astype(np.float32), {})


def fp8(
    matrix: Matrix,
    dtype: str,
    block: tuple[int, int],
    part: str,
    scale_dtype: str,
    quantization: dict[str, Any],
    shape: tuple[int, ...] | None = None,
) -> Encoded:
    """FP8 with a scale for each block; `shape` is what the scales' becomes."""
    wanted = largest_of_blocks(matrix, block) / np.float32(LARGEST[dtype])
    if scale_dtype in ("U8", "F8_E8M0"):
        codes = exponents(wanted)
        scales = powers(codes)
        stored: NDArray[Any] = codes if scale_dtype == "U8" else codes.view(ml_dtypes.float8_e8m0fnu)
    else:
        stored = wanted.astype(FLOATS[scale_dtype])
        scales = stored.astype(np.float32)
    each = spread(scales, block, matrix.shape)
    weight = round_fp8(matrix / np.where(each == 0, np.float32(1), each), dtype)
    values = weight.astype(np.float32) * each
    stored = stored if shape is None else stored.reshape(shape)
    return Encoded({"weight": (dtype, weight), part: (scale_dtype, stored)}, values, quantization)


def fp8_block(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    """DeepSeek-V3 and whoever follows it."""
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
    return fp8(matrix, "F8_E4M3", BLOCK, "weight_scale_inv", pick(rng, "F32", "BF16"), config)


def fp8_block_ue8m0(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    """DeepSeek-V4, and the same with bytes."""
    config = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": list(BLOCK)}
    part, dtype = (("scale", "F8_E8M0"), ("weight_scale_inv", "U8"))[int(rng.integers(2))]
    return fp8(matrix, "F8_E4M3", BLOCK, part, dtype, config)


def fp8_block_compressed(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    config = compressed_tensors("float-quantized", 8, "block", block_structure=list(BLOCK))
    return fp8(matrix, "F8_E4M3", BLOCK, "weight_scale", pick(rng, "F32", "BF16"), config)


def fp8_block_modelopt(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    rows, columns = -(-matrix.shape[0] // 128), -(-matrix.shape[1] // 128)
    config = {"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"}
    return fp8(matrix, "F8_E4M3", (128, 128), "weight_scale", "F32", config, (rows, 1, columns, 1))


def fp8_group(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    config = compressed_tensors("float-quantized", 8, "group", group_size=16)
    return fp8(matrix, "F8_E4M3", (1, 16), "weight_scale", pick(rng, "F32", "BF16"), config)


def fp8_channel(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    config = compressed_tensors("float-quantized", 8, "channel")
    return fp8(matrix, "F8_E4M3", (1, matrix.shape[1]), "weight_scale", pick(rng, "F32", "BF16", "F16"), config)


def fp8_tensor(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    config = {"quant_method": "modelopt", "quant_algo": "FP8"}
    return fp8(matrix, "F8_E4M3", matrix.shape[:2], "weight_scale", "F32", config, ((), (1,), (1, 1))[rng.integers(3)])


def fp8_e5m2_tensor(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    config = {"quant_method": "fp8", "fmt": "e5m2", "activation_scheme": "static", "weight_block_size": None}
    return fp8(matrix, "F8_E5M2", matrix.shape[:2], "weight_scale_inv", "F32", config, (1,))


# ---------------------------------------------------------------------------------------------------------------------
# Microscaling formats and NVFP4


def mxfp8(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    """compressed-tensors and ModelOpt (weight_scale), MiniMax-M3 (weight_scale_inv)."""
    block: dict[str, Any]
    if rng.integers(2):
        block = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
        return fp8(matrix, "F8_E4M3", (1, 32), "weight_scale_inv", "U8", block)
    config = compressed_tensors("mxfp8-quantized", 8, "group", group_size=32, scale_dtype="torch.uint8")
    return fp8(matrix, "F8_E4M3", (1, 32), "weight_scale", pick(rng, "U8", "F8_E8M0"), config)


def mxfp4(matrix: Matrix) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Matrix]:
    codes = exponents(largest_of_blocks(matrix, (1, 32)) / np.float32(6))
    each = spread(powers(codes), (1, 32), matrix.shape)
    packed, elements = round_e2m1(matrix / each)
    return packed, codes, elements * each


def mxfp4_blocks(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    packed, codes, values = mxfp4(matrix)
    parts: dict[str, tuple[str, NDArray[Any]]] = {
        "blocks": ("U8", packed.reshape(len(matrix), -1, 16)),
        "scales": ("U8", codes),
    }
    return Encoded(parts, values, {"quant_method": "mxfp4"})


def mxfp4_packed(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    packed, codes, values = mxfp4(matrix)
    config = compressed_tensors("mxfp4-pack-quantized", 4, "group", group_size=32, scale_dtype="torch.uint8")
    return Encoded({"weight_packed": ("U8", packed), "weight_scale": ("U8", codes)}, values, config)


def deepseek_fp4(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    """The experts of DeepSeek-V4, whose config tells of the other weights' blocks."""
    packed, codes, values = mxfp4(matrix)
    dtype = pick(rng, "I8", "U8")
    parts: dict[str, tuple[str, NDArray[Any]]] = {
        "weight": (dtype, packed.view(np.int8) if dtype == "I8" else packed),
        "scale": ("F8_E8M0", codes.view(ml_dtypes.float8_e8m0fnu)),
    }
    return Encoded(parts, values, {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]})


def mxfp4_f4(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    packed, codes, values = mxfp4(matrix)
    parts: dict[str, tuple[str, NDArray[Any]]] = {
        "weight": ("F4", packed),
        "weight_scale_inv": ("F8_E8M0", codes.view(ml_dtypes.float8_e8m0fnu)),
    }
    return Encoded(parts, values, {"quant_method": "fp8"})


def nvfp4(matrix: Matrix, whole: Matrix) -> tuple[NDArray[np.uint8], NDArray[Any], Matrix]:
    """`whole` is what multiplies: one number, or one for each row."""
    scales = round_fp8(largest_of_blocks(matrix, (1, 16)) / np.float32(6) / whole, "F8_E4M3")
    each = spread(scales.astype(np.float32) * whole, (1, 16), matrix.shape)
    packed, elements = round_e2m1(matrix / np.where(each == 0, np.float32(1), each))
    return packed, scales, elements * each


def nvfp4_modelopt(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    whole = np.abs(matrix).max(initial=1e-6).astype(np.float32) / np.float32(6 * 448)
    packed, scales, values = nvfp4(matrix, whole)
    parts: dict[str, tuple[str, NDArray[Any]]] = {
        "weight": (pick(rng, "U8", "F4"), packed),
        "weight_scale": ("F8_E4M3", scales),
        "weight_scale_2": ("F32", np.full(((), (1,))[rng.integers(2)], whole, np.float32)),
    }
    return Encoded(parts, values, {"quant_method": "modelopt", "quant_algo": "NVFP4"})


def nvfp4_halves(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    """A gate and its up in one matrix, each with its own second scale."""
    half = len(matrix) // 2
    pair = np.array([np.abs(each).max(initial=1e-6) for each in (matrix[:half], matrix[half:])], np.float32) / 2688
    packed, scales, values = nvfp4(matrix, np.repeat(pair, half)[:, None])
    parts: dict[str, tuple[str, NDArray[Any]]] = {
        "weight": ("U8", packed),
        "weight_scale": ("F8_E4M3", scales),
        "weight_scale_2": ("F32", pair),
    }
    return Encoded(parts, values, {"quant_method": "modelopt", "quant_algo": "NVFP4"})


def nvfp4_compressed(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    whole = (np.float32(6 * 448) / np.abs(matrix).max(initial=1e-6)).astype(np.float32)
    scales = round_fp8(largest_of_blocks(matrix, (1, 16)) / np.float32(6) * whole, "F8_E4M3")
    each = spread(scales.astype(np.float32) / whole, (1, 16), matrix.shape)
    packed, elements = round_e2m1(matrix / np.where(each == 0, np.float32(1), each))
    parts: dict[str, tuple[str, NDArray[Any]]] = {
        "weight_packed": ("U8", packed),
        "weight_scale": ("F8_E4M3", scales),
        "weight_global_scale": ("F32", whole.reshape(1)),
    }
    config = compressed_tensors("nvfp4-pack-quantized", 4, "tensor_group", group_size=16)
    return Encoded(parts, elements * each, config)


def nvfp4_scale2(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    """Inkling."""
    encoded = nvfp4_modelopt(matrix, rng)
    names = {"weight": "weight", "weight_scale": "scale", "weight_scale_2": "scale2"}
    parts = {names[name]: part for name, part in encoded.parts.items()}
    return Encoded(parts, encoded.values, {})


def nvfp4_amax(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    """Inkling-2-Mini: the second scale is a quotient."""
    amax, denominator = np.abs(matrix).max(initial=1e-6).astype(np.float32), np.float32(rng.choice([2688.0, 1000.0]))
    packed, scales, values = nvfp4(matrix, amax / denominator)
    parts: dict[str, tuple[str, NDArray[Any]]] = {
        "weight": ("U8", packed),
        "weight_scale": ("F8_E4M3", scales),
        "weight_amax": ("F32", amax.reshape(())),
        "weight_outer_scale_denominator": ("F32", denominator.reshape(())),
    }
    return Encoded(parts, values, {})


def mxfp6(matrix: Matrix, kind: Any, largest: float) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Matrix]:
    """Four codes in 24 bits, the first in the lowest six."""
    codes = exponents(largest_of_blocks(matrix, (1, 32)) / np.float32(largest))
    each = spread(powers(codes), (1, 32), matrix.shape)
    rounded = np.clip(matrix / each, -largest, largest).astype(kind)
    bits = rounded.view(np.uint8).reshape(len(matrix), -1, 4).astype(np.uint32) & 0x3F
    words = (bits << np.array([0, 6, 12, 18], np.uint32)).sum(-1, dtype=np.uint32)
    packed = np.stack([words & 0xFF, words >> 8 & 0xFF, words >> 16], -1).astype(np.uint8).reshape(len(matrix), -1)
    return packed, codes, rounded.astype(np.float32) * each


def mxfp6_packed(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    packed, codes, values = mxfp6(matrix, ml_dtypes.float6_e2m3fn, 7.5)
    config = compressed_tensors("mxfp6-pack-quantized", 6, "group", group_size=32, scale_dtype="torch.uint8")
    return Encoded({"weight_packed": ("U8", packed), "weight_scale": ("U8", codes)}, values, config)


def quark(dtype: str, qscheme: str, **more: Any) -> dict[str, Any]:
    weight = {"dtype": dtype, "qscheme": qscheme, "ch_axis": -1 if qscheme == "per_group" else 0, "is_dynamic": False}
    settings = {"weight": weight | more, "input_tensors": None, "output_tensors": None, "bias": None}
    export = {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"}
    return {"quant_method": "quark", "global_quant_config": settings, "exclude": ["lm_head"], "export": export}


def mxfp6_quark(matrix: Matrix, rng: np.random.Generator, name: str) -> Encoded:
    kind, largest = {"e2m3": (ml_dtypes.float6_e2m3fn, 7.5), "e3m2": (ml_dtypes.float6_e3m2fn, 28.0)}[name]
    packed, codes, values = mxfp6(matrix, kind, largest)
    config = quark(f"fp6_{name}", "per_group", group_size=32, scale_format="e8m0")
    return Encoded({"weight": ("U8", packed), "weight_scale": ("U8", codes)}, values, config)


def mxfp4_quark(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    packed, codes, values = mxfp4(matrix)
    config = quark("fp4", "per_group", group_size=32, scale_format="e8m0")
    return Encoded({"weight": ("U8", packed), "weight_scale": ("U8", codes)}, values, config)


# ---------------------------------------------------------------------------------------------------------------------
# Integers of four and eight bits that are not packed into words


def int8_block(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    """SGLang's blockwise_int8, and compressed-tensors."""
    scales = (largest_of_blocks(matrix, BLOCK) / np.float32(127)).astype(np.float32)
    each = spread(scales, BLOCK, matrix.shape)
    codes = np.rint(matrix / each).clip(-127, 127).astype(np.int8)
    if rng.integers(2):
        name, config = "weight_scale_inv", {"quant_method": "blockwise_int8", "weight_block_size": list(BLOCK)}
    else:
        name, config = "weight_scale", compressed_tensors("int-quantized", 8, "block", block_structure=list(BLOCK))
        config["config_groups"]["group_0"]["weights"]["type"] = "int"
    return Encoded({"weight": ("I8", codes), name: ("F32", scales)}, codes.astype(np.float32) * each, config)


def w4afp8(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    scales = (largest_of_blocks(matrix, (1, 128)) / np.float32(7)).astype(FLOATS["BF16"])
    each = spread(scales.astype(np.float32), (1, 128), matrix.shape)
    codes = np.rint(matrix / each).clip(-8, 7).astype(np.int8)
    packed = (codes[:, 0::2] & 15 | codes[:, 1::2] << 4).astype(np.int8)
    parts: dict[str, tuple[str, NDArray[Any]]] = {
        "weight": ("I8", packed),
        "weight_scale_inv": ("BF16", scales),
        "input_scale": ("F32", np.ones((), np.float32)),
    }
    config = {"quant_method": "w4afp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return Encoded(parts, codes.astype(np.float32) * each, config)


# ---------------------------------------------------------------------------------------------------------------------
# MLX's formats, by MLX


def from_mlx(array: Any) -> NDArray[Any]:
    import mlx.core as mx

    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


def mlx_affine(matrix: Matrix, rng: np.random.Generator, bits: int) -> Encoded:
    import mlx.core as mx

    name = pick(rng, "BF16", "F16", "F32")
    group = int(rng.choice([size for size in (32, 64, 128) if matrix.shape[1] % size == 0]))
    given = mx.array(matrix).astype({"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}[name])
    words, scales, biases = mx.quantize(given, group_size=group, bits=bits, stream=mx.cpu)
    wide = (scales.astype(mx.float32), biases.astype(mx.float32))
    values = mx.dequantize(words, *wide, group_size=group, bits=bits, stream=mx.cpu)
    parts = {
        "weight": ("U32", from_mlx(words)),
        "scales": (name, from_mlx(scales)),
        "biases": (name, from_mlx(biases)),
    }
    mode = {"mode": "affine"} if rng.integers(2) else {}
    return Encoded(parts, np.array(values), {"group_size": group, "bits": bits, **mode})


def mlx_float(matrix: Matrix, rng: np.random.Generator, mode: str, *, whole: bool = False) -> Encoded:
    import mlx.core as mx

    bits, group = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}[mode]
    given = mx.array(matrix)
    of_matrix = {"global_scale": mx.maximum(mx.abs(given).max(), 1e-6)} if whole else {}
    words, scales = mx.quantize(given, group_size=group, bits=bits, mode=mode, stream=mx.cpu, **of_matrix)
    values = mx.dequantize(
        words, scales, group_size=group, bits=bits, mode=mode, dtype=mx.float32, stream=mx.cpu, **of_matrix
    )
    parts = {"weight": ("U32", from_mlx(words)), "scales": ("U8", from_mlx(scales))}
    parts |= {name: ("F32", from_mlx(scale)) for name, scale in of_matrix.items()}
    return Encoded(parts, np.array(values), {"group_size": group, "bits": bits, "mode": mode})


def mlx_scaled(matrix: Matrix, rng: np.random.Generator, part: str, *, by_row: bool = False) -> Encoded:
    """mlx-vlm's NVFP4 with the second scale of the model that was converted."""
    shape = (len(matrix),) if by_row else ()
    second = np.exp2(rng.integers(-6, 7, shape)).astype(np.float32)
    multiplier = second if part == "weight_scale_2" else 1 / second
    encoded = mlx_float(matrix / multiplier.reshape(-1, 1), rng, "nvfp4")
    values = encoded.values * multiplier.reshape(-1, 1)  # powers of two: nothing is rounded
    return Encoded(encoded.parts | {part: ("F32", second)}, values, encoded.quantization)


# what the format is called here -> the encoder, and of what the numbers of outputs and of inputs must be multiples
ENCODERS: dict[str, tuple[Encoder, tuple[int, int]]] = {
    "bf16": (partial(plain, dtype="BF16"), (1, 1)),
    "f16": (partial(plain, dtype="F16"), (1, 1)),
    "f32": (partial(plain, dtype="F32"), (1, 1)),
    "fp8_unscaled": (partial(plain, dtype="F8_E4M3"), (1, 1)),
    "fp8_block": (fp8_block, (1, 1)),
    "fp8_block_ue8m0": (fp8_block_ue8m0, (1, 1)),
    "fp8_block_compressed": (fp8_block_compressed, (1, 1)),
    "fp8_block_modelopt": (fp8_block_modelopt, (1, 1)),
    "fp8_group": (fp8_group, (1, 16)),
    "fp8_channel": (fp8_channel, (1, 1)),
    "fp8_tensor": (fp8_tensor, (1, 1)),
    "fp8_e5m2_tensor": (fp8_e5m2_tensor, (1, 1)),
    "mxfp8": (mxfp8, (1, 32)),
    "mxfp4_blocks": (mxfp4_blocks, (1, 32)),
    "mxfp4_packed": (mxfp4_packed, (1, 32)),
    "mxfp4_f4": (mxfp4_f4, (1, 32)),
    "deepseek_fp4": (deepseek_fp4, (1, 32)),
    "nvfp4_modelopt": (nvfp4_modelopt, (1, 16)),
    "nvfp4_halves": (nvfp4_halves, (2, 16)),
    "nvfp4_compressed": (nvfp4_compressed, (1, 16)),
    "nvfp4_scale2": (nvfp4_scale2, (1, 16)),
    "nvfp4_amax": (nvfp4_amax, (1, 16)),
    "mxfp4_quark": (mxfp4_quark, (1, 32)),
    "mxfp6_packed": (mxfp6_packed, (1, 32)),
    "mxfp6_e2m3_quark": (partial(mxfp6_quark, name="e2m3"), (1, 32)),
    "mxfp6_e3m2_quark": (partial(mxfp6_quark, name="e3m2"), (1, 32)),
    "int8_block": (int8_block, (1, 1)),
    "w4afp8": (w4afp8, (1, 128)),
    **{f"mlx_affine_{bits}": (partial(mlx_affine, bits=bits), (1, 32)) for bits in (1, 2, 3, 4, 5, 6, 8)},
    "mlx_mxfp4": (partial(mlx_float, mode="mxfp4"), (1, 32)),
    "mlx_mxfp8": (partial(mlx_float, mode="mxfp8"), (1, 32)),
    "mlx_nvfp4": (partial(mlx_float, mode="nvfp4"), (2, 16)),  # MLX's quantize wants 32 elements
    "mlx_nvfp4_global": (partial(mlx_float, mode="nvfp4", whole=True), (2, 16)),
    "mlx_nvfp4_scale_2": (partial(mlx_scaled, part="weight_scale_2"), (2, 16)),
    "mlx_nvfp4_scale_2_rows": (partial(mlx_scaled, part="weight_scale_2", by_row=True), (2, 16)),
    "mlx_nvfp4_global_scale": (partial(mlx_scaled, part="weight_global_scale"), (2, 16)),
}
