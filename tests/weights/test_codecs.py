"""Storage formats against independent decoders: literal loops, ml_dtypes, and MLX where it is installed."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chuk_lazarus.introspection.moe.errors import ModelUnreadable, MoEError, UnknownFormat
from chuk_lazarus.introspection.moe.weights.checkpoint import DTYPES
from chuk_lazarus.introspection.moe.weights.codecs import Part, Stored, recognise
from decoding import FP8, decode, float_of, random_bytes
from sampling import examples

Array = NDArray[Any]

# OCP Microscaling Formats v1.0, table 5 (E2M1): the magnitudes of the eight codes without the sign bit
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def describe(parts: Mapping[str, Array], dtypes: Mapping[str, str]) -> dict[str, Part]:
    return {name: Part(dtypes[name], array.shape) for name, array in parts.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Plain floating point numbers


def plain(dtype: str, array: Array) -> NDArray[np.float32]:
    stored = recognise({"weight": Part(dtype, array.shape)}, {})
    assert (stored.codec, stored.shape, stored.rows_per_row) == (dtype.lower(), array.shape, {"weight": 1})
    decoded = decode(stored, {"weight": array})
    assert decoded.dtype == np.float32
    return decoded


def test_every_bf16_is_the_upper_half_of_a_float32() -> None:
    codes = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = (codes.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(plain("BF16", codes.view(DTYPES["BF16"])), expected)


def test_paddle_has_the_bits_of_bf16_as_u16() -> None:
    codes = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    stored = recognise({"weight": Part("U16", codes.shape)}, {})
    assert (stored.codec, stored.shape) == ("bf16", codes.shape)
    np.testing.assert_array_equal(decode(stored, {"weight": codes}), plain("BF16", codes.view(DTYPES["BF16"])))


def test_every_f16_has_the_value_of_its_bits() -> None:
    codes = np.arange(65536, dtype="<u2").reshape(256, 256)
    expected = [[float_of(int(code), 5, 10, has_infinity=True) for code in row] for row in codes]
    np.testing.assert_array_equal(plain("F16", codes.view(DTYPES["F16"])), np.array(expected, np.float32))


def test_f32_is_unchanged_bit_for_bit() -> None:
    raw = random_bytes((64, 128)).view("<f4")
    np.testing.assert_array_equal(plain("F32", raw).view(np.uint32), raw.view(np.uint32))


@given(st.lists(st.floats(width=64, min_value=-3e38, max_value=3e38), min_size=1))
def test_f64_is_rounded_to_the_nearest_float32(values: list[float]) -> None:
    decoded = plain("F64", np.array([values], "<f8"))[0]
    for value, found in zip(values, decoded, strict=True):
        below, above = (float(np.nextafter(found, np.float32(to))) for to in (-np.inf, np.inf))
        assert abs(float(found) - value) <= min(abs(below - value), abs(above - value))


# ---------------------------------------------------------------------------------------------------------------------
# FP8 in blocks


def fp8(dtype: str, weight: Array, scale: Array, block: tuple[int, int]) -> Stored:
    parts = describe({"weight": weight, "weight_scale_inv": scale}, {"weight": dtype, "weight_scale_inv": "F32"})
    stored = recognise(parts, {"quant_method": "fp8", "weight_block_size": list(block)})
    assert (stored.codec, stored.shape) == ("fp8", weight.shape)
    return stored


def fp8_loop(dtype: str, codes: Array, scale: Array, block: tuple[int, int], first: int = 0) -> NDArray[np.float32]:
    """Element by element; `first` is the number of the first row."""
    result = np.empty(codes.shape, np.float32)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            value = np.float32(FP8[dtype][codes[row, column]])
            result[row, column] = value * scale[(first + row) // block[0], column // block[1]]
    return result


def random_scales(rows: int, columns: int, block: tuple[int, int], seed: int = 1) -> NDArray[np.float32]:
    shape = (-(-rows // block[0]), -(-columns // block[1]))
    return np.random.default_rng(seed).uniform(0.001, 3, shape).astype(np.float32)


BLOCKS = pytest.mark.parametrize(
    ("rows", "columns", "block"),
    [
        (128, 128, (128, 128)),
        (200, 300, (128, 128)),
        (1, 1, (128, 128)),
        (129, 127, (128, 128)),
        (64, 96, (32, 32)),
        (70, 33, (32, 32)),
        (5, 260, (1, 128)),
        (260, 5, (128, 1)),
        (7, 9, (2, 3)),
    ],
)


@pytest.mark.parametrize("dtype", FP8)
@BLOCKS
def test_fp8_equals_a_loop_over_the_elements(dtype: str, rows: int, columns: int, block: tuple[int, int]) -> None:
    codes, scale = random_bytes((rows, columns)), random_scales(rows, columns, block)
    stored = fp8(dtype, codes, scale, block)
    decoded = decode(stored, {"weight": codes.view(DTYPES[dtype]), "weight_scale_inv": scale})
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, fp8_loop(dtype, codes, scale, block))


@pytest.mark.parametrize("dtype", FP8)
@BLOCKS
def test_fp8_windows_from_any_block_on_equal_the_whole(
    dtype: str, rows: int, columns: int, block: tuple[int, int]
) -> None:
    codes, scale = random_bytes((rows, columns), 2), random_scales(rows, columns, block)
    stored = fp8(dtype, codes, scale, block)
    parts = {"weight": codes.view(DTYPES[dtype]), "weight_scale_inv": scale}
    for start in range(0, rows, max(1, rows // 7)):
        for stop in {min(start + 1, rows), min(start + block[0], rows), rows}:
            expected = fp8_loop(dtype, codes[start:stop], scale, block, start)
            np.testing.assert_array_equal(decode(stored, parts, start, stop), expected)


@pytest.mark.parametrize("dtype", FP8)
def test_fp8_codes_have_the_values_of_their_bits(dtype: str) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    stored = fp8(dtype, codes, np.ones((1, 1), np.float32), (128, 128))
    decoded = decode(stored, {"weight": codes.view(DTYPES[dtype]), "weight_scale_inv": np.ones((1, 1), np.float32)})
    np.testing.assert_array_equal(decoded.ravel(), np.array(FP8[dtype], np.float32))
    nans = {"F8_E4M3": [0x7F, 0xFF], "F8_E5M2": [0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]}[dtype]
    assert np.flatnonzero(np.isnan(decoded)).tolist() == nans
    assert np.nanmax(decoded) == {"F8_E4M3": 448.0, "F8_E5M2": np.inf}[dtype]


def test_fp8_e4m3_equals_mlx() -> None:
    mx = pytest.importorskip("mlx.core")
    codes, scale = random_bytes((200, 300), 3), random_scales(200, 300, (128, 128))
    codes[(codes & 0x7F) == 0x7F] = 0  # MLX may give a NaN code a value
    stored = fp8("F8_E4M3", codes, scale, (128, 128))
    decoded = decode(stored, {"weight": codes.view(DTYPES["F8_E4M3"]), "weight_scale_inv": scale})
    padded = mx.pad(mx.from_fp8(mx.array(codes), dtype=mx.float32), ((0, 56), (0, 84)))
    scaled = padded.reshape(2, 128, 3, 128) * mx.array(scale)[:, None, :, None]
    np.testing.assert_array_equal(decoded, np.array(scaled.reshape(256, 384)[:200, :300]))


def test_stacked_fp8_is_decoded_expert_by_expert() -> None:
    codes = random_bytes((3, 70, 33), 4)
    scale = np.random.default_rng(5).uniform(0.1, 2, (3, 3, 2)).astype(np.float32)
    stored = fp8("F8_E4M3", codes, scale, (32, 32))
    assert stored.shape == (3, 70, 33)
    for expert in range(3):
        decoded = decode(stored, {"weight": codes[expert].view(DTYPES["F8_E4M3"]), "weight_scale_inv": scale[expert]})
        np.testing.assert_array_equal(decoded, fp8_loop("F8_E4M3", codes[expert], scale[expert], (32, 32)))


@pytest.mark.parametrize(("dtype", "make"), [("BF16", ml_dtypes.bfloat16), ("F8_E8M0", ml_dtypes.float8_e8m0fnu)])
def test_fp8_scales_of_narrower_floats(dtype: str, make: type) -> None:
    codes, scale = random_bytes((4, 4), 6), np.array([[0.25, 2], [1, 8]]).astype(make)
    stored = recognise(
        {"weight": Part("F8_E4M3", (4, 4)), "weight_scale_inv": Part(dtype, (2, 2))}, {"weight_block_size": [2, 2]}
    )
    decoded = decode(stored, {"weight": codes.view(DTYPES["F8_E4M3"]), "weight_scale_inv": scale})
    np.testing.assert_array_equal(decoded, fp8_loop("F8_E4M3", codes, scale.astype(np.float32), (2, 2)))


@pytest.mark.parametrize("dtype", ["U8", "I8", "I32"])
def test_fp8_scales_that_are_no_floats_are_not_taken_for_numbers(dtype: str) -> None:
    """Some checkpoints keep E8M0 exponents as bytes under the same name: their value is 2^(byte - 127)."""
    parts = {"weight": Part("F8_E4M3", (4, 64)), "weight_scale_inv": Part(dtype, (2, 2))}
    with pytest.raises(MoEError):
        recognise(parts, {"quant_method": "fp8", "weight_block_size": [2, 32]})


# ---------------------------------------------------------------------------------------------------------------------
# MXFP4


def mxfp4(blocks: Array, scales: Array) -> NDArray[np.float32]:
    stored = recognise(describe({"blocks": blocks, "scales": scales}, {"blocks": "U8", "scales": "U8"}), {})
    assert stored.codec == "mxfp4"
    assert stored.shape == (*blocks.shape[:-2], blocks.shape[-2] * 32)
    assert stored.rows_per_row == {"blocks": 1, "scales": 1}
    with np.errstate(over="ignore"):  # a large scale may overflow float32
        decoded = decode(stored, {"blocks": blocks, "scales": scales})
    assert decoded.dtype == np.float32
    return decoded


def test_mxfp4_block_worked_by_hand() -> None:
    """Low nibble first; nibble = sign, two bits of exponent (bias 1), one of mantissa; scale 2^(byte - 127)."""
    blocks = np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE, 0x0F, 0xF0, 0x77, 0, 0, 0, 0, 0x21], np.uint8)
    ones = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6, -6, 0, 0, -6, 6, 6, *[0] * 8, 0.5, 1]
    both = np.stack([blocks, blocks])[None]
    decoded = mxfp4(both, np.array([[127, 130]], np.uint8))
    expected = np.array([ones + [8 * value for value in ones]], np.float32)
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_array_equal(np.signbit(decoded), np.signbit(expected))


@pytest.mark.parametrize(("scale", "factor"), [(0, 2.0**-127), (1, 2.0**-126), (127, 1.0), (253, 2.0**126)])
def test_mxfp4_extreme_scales(scale: int, factor: float) -> None:
    codes = np.array([[[low | (low << 4) for low in range(16)]]], np.uint8)
    decoded = mxfp4(codes, np.array([[scale]], np.uint8))
    values = np.repeat([*E2M1, *(-value for value in E2M1)], 2) * factor
    with np.errstate(over="ignore"):
        expected = values.astype(np.float32)
    np.testing.assert_array_equal(decoded[0], expected)


def test_mxfp4_scale_254_reaches_the_largest_power_and_255_is_nan() -> None:
    blocks = np.full((1, 2, 16), 0x22, np.uint8)  # all ones
    decoded = mxfp4(blocks, np.array([[254, 255]], np.uint8))
    assert (decoded[0, :32] == np.float32(2.0**127)).all()
    assert np.isnan(decoded[0, 32:]).all()


@settings(max_examples=examples(30), deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_mxfp4_equals_mlx_bit_for_bit(rows: int, groups: int, seed: int) -> None:
    mx = pytest.importorskip("mlx.core")
    blocks = random_bytes((rows, groups, 16), seed)
    scales = np.random.default_rng(seed).integers(0, 255, (rows, groups), np.uint8)  # 255 is NaN
    words = mx.array(blocks.reshape(rows, -1).view(np.uint32))
    theirs = mx.dequantize(words, mx.array(scales), group_size=32, bits=4, mode="mxfp4", dtype=mx.float32)
    np.testing.assert_array_equal(mxfp4(blocks, scales).view(np.uint32), np.array(theirs).view(np.uint32))


@pytest.mark.parametrize("scale", [0, 1, 2, 127, 252, 253, 254])
def test_mxfp4_equals_mlx_for_all_bytes(scale: int) -> None:
    mx = pytest.importorskip("mlx.core")
    blocks, scales = np.arange(256, dtype=np.uint8).reshape(4, 4, 16), np.full((4, 4), scale, np.uint8)
    words = mx.array(blocks.reshape(4, -1).view(np.uint32))
    theirs = mx.dequantize(words, mx.array(scales), group_size=32, bits=4, mode="mxfp4", dtype=mx.float32)
    np.testing.assert_array_equal(mxfp4(blocks, scales).view(np.uint32), np.array(theirs).view(np.uint32))


def test_stacked_mxfp4_keeps_the_experts_axis() -> None:
    parts = {"blocks": Part("U8", (3, 192, 2, 16)), "scales": Part("U8", (3, 192, 2))}
    assert recognise(parts, {"quant_method": "mxfp4"}).shape == (3, 192, 64)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

FP8_PARTS = {"weight": Part("F8_E4M3", (200, 300)), "weight_scale_inv": Part("F32", (2, 3))}


@pytest.mark.parametrize(
    ("parts", "quantization", "error", "said"),
    [
        ({}, {}, UnknownFormat, "format"),
        ({"weight": Part("I8", (4, 4))}, {}, UnknownFormat, "I8"),
        ({"weight": Part("U32", (4, 4))}, {}, UnknownFormat, "U32"),
        ({"weight": Part("F8_E4M3", (4, 4))}, {"quant_method": "fp8"}, UnknownFormat, "without its scale"),
        ({"weight": Part("BF16", (4, 4)), "g_idx": Part("I32", (4,))}, {}, UnknownFormat, "g_idx"),
        ({"weight": Part("BF16", (4, 4)), "weight_scale_inv": Part("F32", (1, 1))}, {}, UnknownFormat, "scale_inv"),
        (
            {"qweight": Part("I32", (4, 4)), "qzeros": Part("I32", (1, 1)), "scales": Part("F16", (1, 4))},
            {"quant_method": "gptq"},
            UnknownFormat,
            "gptq",
        ),
        (
            {"weight": Part("U32", (4, 4)), "scales": Part("BF16", (4, 1)), "biases": Part("BF16", (4, 1))},
            {},
            UnknownFormat,
            "biases",
        ),
        (
            {"weight": Part("F8_E4M3", (4, 4)), "weight_scale": Part("F32", (4,))},
            {"quant_method": "compressed-tensors"},
            UnknownFormat,
            "weight_scale",
        ),
        (FP8_PARTS, {}, UnknownFormat, "weight_block_size"),
        (FP8_PARTS, {"weight_block_size": None}, UnknownFormat, "weight_block_size"),
        (FP8_PARTS, {"weight_block_size": 128}, UnknownFormat, "weight_block_size"),
        (FP8_PARTS, {"weight_block_size": [128]}, UnknownFormat, "weight_block_size"),
        (FP8_PARTS, {"weight_block_size": [128, 0]}, UnknownFormat, "weight_block_size"),
        (FP8_PARTS, {"weight_block_size": [128, "128"]}, UnknownFormat, "weight_block_size"),
        (FP8_PARTS, {"weight_block_size": [True, True]}, UnknownFormat, "weight_block_size"),
        (FP8_PARTS, {"weight_block_size": [64, 128]}, ModelUnreadable, "[4, 3]"),
        (
            FP8_PARTS | {"weight": Part("F8_E4M3", (3, 200, 300))},
            {"weight_block_size": [128, 128]},
            ModelUnreadable,
            "",
        ),
        (
            {"blocks": Part("U8", (4, 2, 8)), "scales": Part("U8", (4, 2))},
            {"quant_method": "mxfp4"},
            ModelUnreadable,
            "MXFP4",
        ),
        ({"blocks": Part("U8", (4, 2, 16)), "scales": Part("U8", (4, 3))}, {}, ModelUnreadable, "[4, 3]"),
        ({"blocks": Part("U8", (32, 16)), "scales": Part("U8", (32,))}, {}, ModelUnreadable, "MXFP4"),
        ({"blocks": Part("I8", (4, 2, 16)), "scales": Part("U8", (4, 2))}, {}, UnknownFormat, "I8"),
        ({"blocks": Part("U8", (4, 2, 16))}, {}, UnknownFormat, "blocks"),
    ],
)
def test_recognise_refuses_what_it_can_not_decode(
    parts: dict[str, Part], quantization: dict[str, Any], error: type[MoEError], said: str
) -> None:
    with pytest.raises(error) as caught:
        recognise(parts, quantization)
    assert said in str(caught.value)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_fp8_without_two_axes_is_refused(shape: tuple[int, ...]) -> None:
    parts = {"weight": Part("F8_E4M3", shape), "weight_scale_inv": Part("F32", shape)}
    with pytest.raises(MoEError):
        recognise(parts, {"weight_block_size": [128, 128]})
