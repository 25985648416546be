"""Small floats and MLX's formats against encoders of their own, the libraries' own decoders and literal loops."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chuk_lazarus.introspection.moe.errors import ModelUnreadable, MoEError, UnknownFormat
from chuk_lazarus.introspection.moe.weights.checkpoint import DTYPES, Checkpoint
from chuk_lazarus.introspection.moe.weights.codecs import NOT_DECODED, SAME_PART, OtherInputs, Part, Stored, recognise
from chuk_lazarus.introspection.moe.weights.repositories.find import find_repository
from chuk_lazarus.introspection.moe.weights.stored import open_stored, read_rows
from decoding import FP8, decode, random_bytes
from encoded import Encoded
from encoders_float import ENCODERS, nvfp4
from places import FIXTURES
from sampling import examples

Array = NDArray[Any]
Parts = Mapping[str, tuple[str, Array]]


def header_shape(dtype: str, array: Array) -> tuple[int, ...]:
    return (*array.shape[:-1], array.shape[-1] * 2) if dtype == "F4" else array.shape


def open_parts(parts: Parts, quantization: Mapping[str, Any]) -> tuple[Stored, dict[str, Array]]:
    """How they are stored, and the arrays by their parts' usual names."""
    kept = {SAME_PART.get(name, name): each for name, each in parts.items() if name not in NOT_DECODED}
    described = {name: Part(dtype, header_shape(dtype, array)) for name, (dtype, array) in kept.items()}
    return recognise(described, quantization), {name: array for name, (_, array) in kept.items()}


def write(folder: Path, parts: Parts, quantization: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint with the tensors x.<part>."""
    header, data = {}, b""
    for name, (dtype, array) in parts.items():
        raw = array.tobytes()
        shape = header_shape(dtype, array)
        header[f"x.{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return Checkpoint(find_repository(str(folder)))


def random_matrix(rows: int, columns: int, rng: np.random.Generator) -> NDArray[np.float32]:
    sizes = np.exp2(rng.integers(-8, 5, (rows, 1))) * np.exp2(rng.integers(-3, 3, (1, columns)))
    return (rng.standard_normal((rows, columns)) * sizes).astype(np.float32)


def encode(name: str, rows: int, columns: int, seed: int) -> Encoded:
    """About that size; the granule's multiples decide."""
    if name.startswith("mlx"):
        pytest.importorskip("mlx.core")
    encoder, (tall, wide) = ENCODERS[name]
    rng = np.random.default_rng(seed)
    return encoder(random_matrix(-(-rows // tall) * tall, -(-columns // wide) * wide, rng), rng)


# ---------------------------------------------------------------------------------------------------------------------
# Every format, of any size and in any window


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=examples(25), deadline=None)
@given(data=st.data())
def test_any_window_has_the_values_that_were_encoded(name: str, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 200))
    encoded = encode(name, rows, columns, data.draw(st.integers(0, 2**32 - 1)))
    stored, parts = open_parts(encoded.parts, encoded.quantization)
    assert stored.shape == encoded.values.shape
    assert not stored.transposed
    start = data.draw(st.integers(0, len(encoded.values) - 1))
    stop = data.draw(st.integers(start + 1, len(encoded.values)))
    for low, high in ((start, stop), (0, len(encoded.values))):
        decoded = decode(stored, parts, low, high)
        assert decoded.dtype == np.float32
        assert decoded.flags.c_contiguous
        np.testing.assert_array_equal(decoded, encoded.values[low:high])


@pytest.mark.parametrize("name", ENCODERS)
def test_a_stack_is_read_expert_by_expert_from_a_file(name: str, tmp_path: Path) -> None:
    experts = [encode(name, 37, 96, seed) for seed in (1, 2, 3)]
    shapes = [{part: (dtype, array.shape) for part, (dtype, array) in each.parts.items()} for each in experts]
    experts = [each for each, shape in zip(experts, shapes, strict=True) if shape == shapes[0]]
    stack = {
        part: (dtype, np.stack([each.parts[part][1] for each in experts]))
        for part, (dtype, _) in experts[0].parts.items()
    }
    checkpoint = write(tmp_path, stack, experts[0].quantization)
    infos, stored = open_stored(checkpoint, {part: f"x.{part}" for part in stack}, experts[0].quantization)
    assert stored.shape == (len(experts), *experts[0].values.shape)
    rows = stored.shape[1]
    for index, each in enumerate(experts):
        for start, stop in ((0, rows), (0, 1), (rows - 1, rows), (17, 30), (rows // 2 - 1, rows // 2 + 1)):
            window = read_rows(checkpoint, infos, stored, rows, start, stop, index)
            np.testing.assert_array_equal(window, each.values[start:stop])


@pytest.mark.parametrize("name", ENCODERS)
def test_the_encoders_keep_what_their_format_can(name: str) -> None:
    """Else the other tests would compare nonsense with nonsense."""
    encoder, (tall, _) = ENCODERS[name]
    if name.startswith("mlx"):
        pytest.importorskip("mlx.core")
    rng = np.random.default_rng(5)
    matrix = rng.standard_normal((tall * 4, 256), np.float32)
    error = np.linalg.norm(encoder(matrix, rng).values - matrix) / np.linalg.norm(matrix)
    coarse = {"mlx_affine_1": 1.6, "mlx_affine_2": 0.6, "mlx_affine_3": 0.25}
    assert error < coarse.get(name, 0.2 if "4" in name or "affine" in name else 0.06)


# ---------------------------------------------------------------------------------------------------------------------
# What the libraries stored, and what they decode it to

# the fixture -> the codec, and how far the library's own rounding may put it off, in units of the value
LIBRARIES = {
    "ct_channel": ("fp8", 0),
    "ct_channel_bf16": ("fp8", 2**-8),
    "ct_tensor": ("fp8", 0),
    "ct_block": ("fp8", 0),
    "ct_group": ("fp8", 0),
    "ct_mxfp8": ("mxfp8", 0),
    "ct_mxfp4": ("mxfp4", 0),
    "ct_mxfp6": ("mxfp6", 2**-8),  # the product is rounded to bfloat16
    "ct_nvfp4": ("nvfp4", 2**-7),  # the scale is rounded to bfloat16, and then the product
    "modelopt_nvfp4": ("nvfp4", 2**-7),
    "modelopt_awq_fp8": ("fp8", 3e-7),  # the inputs are multiplied before the scales
    "modelopt_awq_nvfp4": ("nvfp4", 3e-7),
    "hf_fp8": ("fp8", 0),
    "hf_fp8_e8m0": ("fp8", 0),
    "hf_mxfp8": ("mxfp8", 0),
    "hf_fp4": ("mxfp4", 0),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_a_library_stored_has_the_values_that_it_decodes(name: str) -> None:
    codec, rounding = LIBRARIES[name]
    folder = FIXTURES / "formats" / f"float_{name}"
    checkpoint = Checkpoint(find_repository(str(folder)))
    parts = {tensor.removeprefix("x."): tensor for tensor in checkpoint.names}
    infos, stored = open_stored(checkpoint, parts, checkpoint.config["quantization_config"])
    with np.load(folder / "oracle.npz") as oracle:
        expected = oracle["x"]
    assert (stored.codec, stored.shape) == (codec, expected.shape)
    decoded = read_rows(checkpoint, infos, stored, len(expected), 0, len(expected))
    np.testing.assert_allclose(decoded, expected, rtol=rounding, atol=0)
    if rounding > 1e-6:
        assert (decoded.astype(ml_dtypes.bfloat16).astype(np.float32) == expected).mean() > 0.7


# ---------------------------------------------------------------------------------------------------------------------
# FP8: what the scale's shape means

WEIGHT = random_bytes((6, 4, 8), 7).view(DTYPES["F8_E4M3"])[:3]
ROW, COLUMN = np.arange(1, 5, dtype=np.float32), np.arange(1, 9, dtype=np.float32)
EACH = np.array([0.5, 2, 8], np.float32)


@pytest.mark.parametrize(
    ("scale", "factors"),
    [
        (np.float32(3), np.float32([3, 3, 3])),
        (np.float32([3]), np.float32([3, 3, 3])),
        (np.float32([[3]]), np.float32([3, 3, 3])),
        (EACH, EACH),
        (EACH[:, None], EACH),
        (EACH[:, None, None], EACH),
        (np.multiply.outer(EACH, ROW), np.multiply.outer(EACH, ROW)[..., None]),
        (np.multiply.outer(EACH, ROW)[..., None], np.multiply.outer(EACH, ROW)[..., None]),
        (np.multiply.outer(EACH, COLUMN), np.multiply.outer(EACH, COLUMN)[:, None]),
        (np.multiply.outer(EACH, COLUMN)[:, None], np.multiply.outer(EACH, COLUMN)[:, None]),
    ],
    ids=lambda value: "x".join(map(str, value.shape)) or "scalar",
)
@pytest.mark.parametrize("part", ["weight_scale", "weight_scale_inv", "scale", "scale_inv", "qscale_weight"])
def test_fp8_stacks_with_any_shape_of_scale(scale: Array, factors: Array, part: str, tmp_path: Path) -> None:
    scale = np.asarray(scale)
    parts = {"weight": ("F8_E4M3", WEIGHT), part: ("F32", scale)}
    checkpoint = write(tmp_path, parts, {})
    infos, stored = open_stored(checkpoint, {name: f"x.{name}" for name in parts}, {})
    assert (stored.codec, stored.shape) == ("fp8", (3, 4, 8))
    for index in range(3):
        expected = WEIGHT[index].astype(np.float32) * factors[index]
        for start, stop in ((0, 4), (1, 2), (2, 4)):
            decoded = read_rows(checkpoint, infos, stored, 4, start, stop, index)
            np.testing.assert_array_equal(decoded, expected[start:stop])


@pytest.mark.parametrize(
    ("scale", "factors"),
    [
        (ROW, ROW[:, None]),
        (ROW[:, None], ROW[:, None]),
        (COLUMN, COLUMN),
        (COLUMN[None], COLUMN),
        (np.float32(7), np.float32(7)),
        (np.float32([7]), np.float32(7)),
        (np.float32([[7]]), np.float32(7)),
    ],
    ids=lambda value: "x".join(map(str, value.shape)) or "scalar",
)
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F8_E8M0"])
def test_fp8_matrices_with_any_shape_of_scale(scale: Array, factors: Array, dtype: str) -> None:
    narrow = np.asarray(scale).astype(DTYPES[dtype])
    factors = np.asarray(factors).astype(DTYPES[dtype]).astype(np.float32)
    stored, parts = open_parts({"weight": ("F8_E4M3", WEIGHT[0]), "weight_scale": (dtype, narrow)}, {})
    for start, stop in ((0, 4), (1, 2), (2, 4)):
        expected = (WEIGHT[0].astype(np.float32) * factors)[start:stop]
        np.testing.assert_array_equal(decode(stored, parts, start, stop), expected)


def test_a_square_matrix_with_a_flat_scale_needs_the_config() -> None:
    square = random_bytes((4, 4), 8).view(DTYPES["F8_E4M3"])
    parts = {"weight": ("F8_E4M3", square), "weight_scale": ("F32", ROW)}
    with pytest.raises(UnknownFormat, match=r"1 x 4 or 4 x 1"):
        open_parts(parts, {"quant_method": "quark"})
    for config in ({"config_groups": {"a": {"weights": {"strategy": "channel"}}}}, {"quant_method": "fbgemm_fp8"}):
        stored, arrays = open_parts(parts, config)
        np.testing.assert_array_equal(decode(stored, arrays), square.astype(np.float32) * ROW[:, None])
    for scale in (ROW[:, None], ROW[None]):
        stored, arrays = open_parts(parts | {"weight_scale": ("F32", scale)}, {})
        np.testing.assert_array_equal(decode(stored, arrays), square.astype(np.float32) * scale)


def test_a_stack_of_square_matrices_with_flat_scales_is_refused() -> None:
    """It may be transposed: ModelOpt refuses to write it for the same reason."""
    parts = {"weight": Part("F8_E4M3", (3, 4, 4)), "weight_scale": Part("F32", (3, 4))}
    with pytest.raises(UnknownFormat, match="does not say which"):
        recognise(parts, {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"})


def test_one_byte_of_every_exponent() -> None:
    """Each E8M0 code, as a byte and as such: 2^(code - 127), and 255 is NaN."""
    codes = np.arange(256, dtype=np.uint8)
    one = np.ones((256, 32), DTYPES["F8_E4M3"])
    expected = np.float32([*(2.0 ** (code - 127) for code in range(255)), np.nan])
    for dtype, scale in (("U8", codes), ("F8_E8M0", codes.view(DTYPES["F8_E8M0"]))):
        stored, parts = open_parts({"weight": ("F8_E4M3", one), "weight_scale": (dtype, scale[:, None])}, {})
        assert stored.codec == "mxfp8"
        np.testing.assert_array_equal(decode(stored, parts), np.repeat(expected[:, None], 32, axis=1))


@pytest.mark.parametrize("dtype", FP8)
def test_mxfp8_has_every_code(dtype: str) -> None:
    codes, scale = np.arange(256, dtype=np.uint8).reshape(2, 128), np.full((2, 4), 130, np.uint8)
    stored, parts = open_parts({"weight": (dtype, codes.view(DTYPES[dtype])), "weight_scale": ("U8", scale)}, {})
    np.testing.assert_array_equal(decode(stored, parts).ravel(), np.float32(FP8[dtype]) * 8)


def test_the_configs_blocks_go_before_mxfp8() -> None:
    """One row of 64 with two scales: groups of 32, or blocks of 40 and the rest."""
    weight, scale = np.ones((1, 64), DTYPES["F8_E4M3"]), np.array([[127, 128]], np.uint8)
    parts = {"weight": ("F8_E4M3", weight), "weight_scale": ("F8_E8M0", scale.view(DTYPES["F8_E8M0"]))}
    for block, codec, ones in (([128, 40], "fp8", 40), ([1, 32], "mxfp8", 32), ([128, 128], "mxfp8", 32)):
        stored, arrays = open_parts(parts, {"weight_block_size": block})
        assert stored.codec == codec
        assert (decode(stored, arrays) == 1).sum() == ones


def test_several_groups_of_a_config_are_told_apart_by_the_shape() -> None:
    groups = {
        "attention": {"weights": {"num_bits": 8, "strategy": "channel"}},
        "experts": {"weights": {"num_bits": 8, "strategy": "block", "block_structure": "8x16"}},
        "others": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}},
    }
    weight = Part("F8_E4M3", (20, 40))
    for shape, span in (((3, 3), 8), ((20, 1), 1)):
        stored = recognise({"weight": weight, "weight_scale": Part("F32", shape)}, {"config_groups": groups})
        assert stored.rows_per_row["weight_scale"] == span
    with pytest.raises(UnknownFormat, match="one scale per channel"):
        recognise({"weight": weight, "weight_scale": Part("F32", ())}, {"config_groups": {"a": groups["attention"]}})


# ---------------------------------------------------------------------------------------------------------------------
# FP4

LOOP = [*(values := (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)), *(-value for value in values)]


def pairs_loop(data: Array) -> NDArray[np.float32]:
    """Two E2M1 elements a byte, the even one in the low nibble."""
    return np.array([[LOOP[(byte >> shift) & 15] for byte in row for shift in (0, 4)] for row in data], np.float32)


@pytest.mark.parametrize("dtype", ["U8", "I8", "F4"])
def test_every_byte_is_two_elements(dtype: str) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(4, 64)
    weight = codes.view(np.int8) if dtype == "I8" else codes
    scale = np.repeat(np.arange(125, 129, dtype=np.uint8)[:, None], 4, axis=1)
    stored, parts = open_parts(
        {"weight": (dtype, weight), "scale": ("F8_E8M0", scale.view(DTYPES["F8_E8M0"]))}, {"quant_method": "fp8"}
    )
    expected = pairs_loop(codes.tolist()) * np.float32([[0.25], [0.5], [1], [2]])
    decoded = decode(stored, parts)
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_array_equal(np.signbit(decoded), np.signbit(expected))


def nvfp4_parts(second: Array, *, divides: bool = False, experts: int = 0) -> dict[str, tuple[str, Array]]:
    leading = (experts,) if experts else ()
    return {
        "weight_packed" if divides else "weight": ("U8", random_bytes((*leading, 6, 16), 9)),
        "weight_scale": ("F8_E4M3", (random_bytes((*leading, 6, 2), 10) & 0x7B).view(DTYPES["F8_E4M3"])),
        "weight_global_scale" if divides else "weight_scale_2": ("F32", np.asarray(second, np.float32)),
    }


@pytest.mark.parametrize("divides", [False, True])
def test_nvfp4_equals_a_loop(divides: bool) -> None:
    parts = nvfp4_parts(np.float32(0.3), divides=divides)
    stored, arrays = open_parts(parts, {})
    (_, packed), (_, scales), (_, second) = parts.values()
    wide = scales.astype(np.float32)
    factors = wide / second if divides else wide * second
    expected = pairs_loop(packed.tolist()) * np.repeat(factors, 16, axis=1)
    np.testing.assert_array_equal(decode(stored, arrays), expected)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 1), (3, 1, 1), (3, 2), (3, 2, 1)])
def test_nvfp4_stacks_with_any_shape_of_second_scale(shape: tuple[int, ...], tmp_path: Path) -> None:
    second = np.random.default_rng(11).uniform(0.5, 2, shape).astype(np.float32)
    parts = nvfp4_parts(second, experts=3)
    checkpoint = write(tmp_path, parts, {})
    infos, stored = open_stored(checkpoint, {name: f"x.{name}" for name in parts}, {})
    both = np.broadcast_to(second.reshape(3, -1) if second.size >= 3 else second.reshape(1, 1), (3, 2))
    for index in range(3):
        scales = parts["weight_scale"][1][index].astype(np.float32) * np.repeat(both[index], 3)[:, None]
        expected = pairs_loop(parts["weight"][1][index].tolist()) * np.repeat(scales, 16, axis=1)
        for start in range(6):
            for stop in range(start + 1, 7):
                window = read_rows(checkpoint, infos, stored, 6, start, stop, index)
                np.testing.assert_array_equal(window, expected[start:stop])


def test_two_second_scales_of_two_experts_are_theirs() -> None:
    stored, _ = open_parts(nvfp4_parts(np.float32([1, 2]), experts=2), {})
    weight = {"weight": np.full((6, 16), 0x22, np.uint8), "weight_scale": np.ones((6, 2), ml_dtypes.float8_e4m3fn)}
    assert (decode(stored, weight | {"weight_scale_2": np.float32(2).reshape(())}) == 2).all()


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(1, 4), st.integers(1, 20), st.data())
def test_turned_nvfp4_equals_the_transpose(groups: int, outputs: int, data: st.DataObject) -> None:
    """ModelOpt packs the transpose of a stack [E, in, out] and turns everything back."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    made = [nvfp4(random_matrix(outputs, groups * 16, rng), np.float32(0.01)) for _ in range(2)]
    parts = {
        "weight": ("U8", np.stack([packed.T for packed, _, _ in made])),
        "weight_scale": ("F8_E4M3", np.stack([scales.T for _, scales, _ in made])),
        "weight_scale_2": ("F32", np.float32(0.01).reshape(())),
    }
    stored, arrays = open_parts(parts, {})
    assert (stored.shape, stored.transposed) == ((2, groups * 16, outputs), False)
    start = data.draw(st.integers(0, groups * 16 - 1))
    stop = data.draw(st.integers(start + 1, groups * 16))
    for index, (_, _, values) in enumerate(made):
        own = {name: array[index] if array.ndim else array for name, array in arrays.items()}
        np.testing.assert_array_equal(decode(stored, own, start, stop), values.T[start:stop])


# ---------------------------------------------------------------------------------------------------------------------
# MLX


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_mlx_affine_has_every_value_at_every_place(bits: int) -> None:
    """Random words, so that every width meets every border of a word; against MLX."""
    mx = pytest.importorskip("mlx.core")
    words = np.random.default_rng(12).integers(0, 2**32, (5, 3 * bits), np.uint32)
    scales = np.random.default_rng(13).standard_normal((5, 3)).astype(np.float32)
    parts = {"weight": ("U32", words), "scales": ("F32", scales), "biases": ("F32", scales[::-1])}
    stored, arrays = open_parts(parts, {"bits": bits, "group_size": 32})
    given_all = [mx.array(array) for array in (words, scales, scales[::-1].copy())]
    expected = mx.dequantize(*given_all, group_size=32, bits=bits, stream=mx.cpu)
    assert (stored.codec, stored.shape) == (f"mlx-{bits}bit", (5, 96))
    np.testing.assert_array_equal(decode(stored, arrays), np.array(expected))


def test_mlx_takes_a_module_of_its_own_bits_from_the_config(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    encoded = encode("mlx_affine_3", 8, 64, 1)
    assert encoded.quantization["bits"] == 3
    config = {"bits": 4, "group_size": 128, "x": encoded.quantization}
    checkpoint = write(tmp_path, encoded.parts, config)
    quantization = checkpoint.model_config.quantization("x")
    infos, stored = open_stored(checkpoint, {part: f"x.{part}" for part in encoded.parts}, quantization)
    np.testing.assert_array_equal(read_rows(checkpoint, infos, stored, 8, 0, 8), encoded.values)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

FP8_WEIGHT = Part("F8_E4M3", (64, 96))
GROUPS = {"config_groups": {"group_0": {"weights": {"num_bits": 8, "strategy": "tensor"}}}}
MLX_PARTS = {"weight": Part("U32", (8, 12)), "scales": Part("BF16", (8, 3)), "biases": Part("BF16", (8, 3))}
MLX_FLOAT = {"weight": Part("U32", (8, 12)), "scales": Part("U8", (8, 3))}
STACK = {"weight": Part("BF16", (3, 8, 8))}
NVFP4 = {
    "weight": Part("U8", (8, 16)),
    "weight_scale": Part("F8_E4M3", (8, 2)),
    "weight_scale_2": Part("F32", ()),
}


@pytest.mark.parametrize(
    ("parts", "quantization", "error", "said"),
    [
        # FP8
        ({"weight": FP8_WEIGHT}, {"quant_algo": "FP8"}, UnknownFormat, "without its scale"),
        ({"weight": FP8_WEIGHT, "weight_scale": Part("F32", (63, 1))}, {}, UnknownFormat, "weight_block_size"),
        ({"weight": FP8_WEIGHT, "weight_scale": Part("F32", (5,))}, {}, ModelUnreadable, "[5]"),
        ({"weight": FP8_WEIGHT, "weight_scale": Part("F32", (2, 1, 3, 1))}, {}, ModelUnreadable, "[2, 1, 3, 1]"),
        ({"weight": FP8_WEIGHT, "weight_scale": Part("F32", (64, 1))}, GROUPS, UnknownFormat, "per tensor"),
        ({"weight": FP8_WEIGHT, "weight_scale": Part("U8", (4, 6))}, {}, UnknownFormat, "ue8m0"),
        ({"weight": FP8_WEIGHT, "weight_scale": Part("U8", ())}, {}, UnknownFormat, "ue8m0"),
        ({"weight": FP8_WEIGHT, "weight_scale": Part("I32", ())}, {}, UnknownFormat, "I32"),
        ({"weight": FP8_WEIGHT, "weight_scale": Part("F8_E4M3", ())}, {}, UnknownFormat, "format"),
        (
            {"weight": FP8_WEIGHT, "weight_scale": Part("F32", (4, 6))},
            {"weight_block_size": [128, 128]},
            ModelUnreadable,
            "expected [1, 1]",
        ),
        ({"weight": FP8_WEIGHT, "weight_scale": Part("F32", (3, 64, 1))}, {}, ModelUnreadable, "fit together"),
        (
            {"weight": FP8_WEIGHT, "weight_scale": Part("F32", ()), "weight_scale_inv": Part("F32", ())},
            {},
            UnknownFormat,
            "weight_scale_inv",
        ),
        (
            {"weight": FP8_WEIGHT, "weight_scale": Part("F32", (2, 3))},
            {
                "config_groups": {
                    name: {"weights": {"strategy": "block", "block_structure": size}}
                    for name, size in (("a", [32, 32]), ("b", [33, 40]))
                }
            },
            UnknownFormat,
            "32 x 32 or 33 x 40",
        ),
        # FP4
        (
            {"weight_packed": Part("U8", (8, 16)), "weight_scale": Part("U8", (8, 2))},
            {},
            ModelUnreadable,
            "not MXFP4",
        ),
        (
            {"weight": Part("U8", (8, 48)), "weight_scale": Part("U8", (8, 2))},
            {"quant_method": "quark"},
            UnknownFormat,
            "whether its elements are E2M3 or E3M2",
        ),
        ({"weight": Part("F4", (8, 33)), "scale": Part("U8", (8, 1))}, {}, UnknownFormat, "F4"),
        ({"weight": Part("F4", (8, 33)), "weight_scale": Part("U8", (8, 1))}, {}, ModelUnreadable, "not MXFP4"),
        ({"weight": Part("I8", (8, 16)), "weight_scale": Part("F8_E8M0", (7, 1))}, {}, ModelUnreadable, "[7, 1]"),
        ({"weight": Part("U8", (16,)), "weight_scale": Part("F8_E8M0", (1,))}, {}, UnknownFormat, "U8"),
        (NVFP4 | {"weight_scale": Part("F8_E4M3", (8, 1))}, {}, ModelUnreadable, "not NVFP4"),
        (NVFP4 | {"weight_scale_2": Part("F32", (3,))}, {}, ModelUnreadable, "weight_scale_2"),
        (NVFP4 | {"weight_scale_2": Part("F32", (8, 1))}, {}, ModelUnreadable, "weight_scale_2"),
        (NVFP4 | {"weight_scale_2": Part("I32", ())}, {}, UnknownFormat, "weight_scale_2 (I32)"),
        (NVFP4 | {"weight_scale": Part("U8", (8, 2))}, {}, UnknownFormat, "weight_scale (U8)"),
        (NVFP4 | {"pre_quant_scale": Part("I32", (32,))}, {}, UnknownFormat, "pre_quant_scale is I32"),
        (NVFP4 | {"pre_quant_scale": Part("BF16", (8,))}, {}, OtherInputs, "factor per input, of which there are 32"),
        (NVFP4 | {"pre_quant_scale": Part("BF16", (2, 32))}, {}, OtherInputs, "pre_quant_scale is [2, 32]"),
        (NVFP4 | {"pre_quant_scale": Part("BF16", ())}, {}, OtherInputs, "pre_quant_scale is []"),
        (NVFP4 | {"svdquant_lora_a": Part("BF16", (4, 32))}, {}, UnknownFormat, "svdquant_lora_a"),
        (STACK | {"pre_quant_scale": Part("BF16", (3, 8))}, {}, UnknownFormat, "no layout says which axis"),
        (
            {"weight": Part("BF16", (8,)), "pre_quant_scale": Part("BF16", (8,))},
            {},
            UnknownFormat,
            "[8] is not a matrix",
        ),
        ({name: part for name, part in NVFP4.items() if name != "weight_scale_2"}, {}, UnknownFormat, "F8_E4M3"),
        (
            {
                "weight": Part("U8", (7, 16)),
                "weight_scale": Part("F8_E4M3", (7, 2)),
                "weight_scale_2": Part("F32", (2,)),
            },
            {},
            ModelUnreadable,
            "nor two",
        ),
        # MLX
        (MLX_PARTS, {}, UnknownFormat, "config.json has no quantization"),
        (MLX_PARTS, {"bits": 4}, UnknownFormat, "group_size"),
        (MLX_PARTS, {"bits": 7, "group_size": 32}, UnknownFormat, "7 bits"),
        (MLX_PARTS, {"bits": "4", "group_size": 32}, UnknownFormat, "'4' bits"),
        (MLX_PARTS, {"bits": True, "group_size": 32}, UnknownFormat, "True bits"),
        (MLX_PARTS, {"bits": 4, "group_size": 0}, UnknownFormat, "groups of 0"),
        (MLX_PARTS, {"bits": 4, "group_size": 64}, ModelUnreadable, "groups of 64"),
        (MLX_PARTS, {"bits": 8, "group_size": 32}, ModelUnreadable, "8 bits"),
        (MLX_PARTS, {"bits": 4, "group_size": 32, "mode": "mxfp4"}, UnknownFormat, "mode is mxfp4"),
        (MLX_PARTS, {"bits": 4, "group_size": 32, "mode": "fancy"}, UnknownFormat, "'fancy'"),
        (MLX_PARTS | {"scales": Part("BF16", (7, 3))}, {"bits": 4, "group_size": 32}, ModelUnreadable, "[7, 3]"),
        (MLX_PARTS | {"biases": Part("BF16", (8, 2))}, {"bits": 4, "group_size": 32}, ModelUnreadable, "[8, 2]"),
        (MLX_PARTS | {"scales": Part("U8", (8, 3))}, {"bits": 4, "group_size": 32}, ModelUnreadable, "scales U8"),
        (MLX_PARTS | {"scales": Part("BF16", ())}, {"bits": 4, "group_size": 32}, ModelUnreadable, "[]"),
        (MLX_FLOAT, {"bits": 4, "group_size": 32}, UnknownFormat, "mode is affine"),
        (MLX_FLOAT, {"bits": 8, "group_size": 32, "mode": "mxfp4"}, UnknownFormat, "8 bits"),
        (MLX_FLOAT, {"bits": 4, "group_size": 16, "mode": "nvfp4"}, ModelUnreadable, "groups of 16"),
        (MLX_FLOAT | {"scales": Part("BF16", (8, 3))}, {"mode": "mxfp4"}, ModelUnreadable, "mode mxfp4"),
        (MLX_FLOAT | {"global_scale": Part("F32", ())}, {"mode": "mxfp4"}, UnknownFormat, "global_scale"),
        (
            {"weight": Part("U32", (8, 4)), "scales": Part("U8", (8, 2)), "global_scale": Part("F32", (8,))},
            {"mode": "nvfp4"},
            ModelUnreadable,
            "[8]",
        ),
        # methods that no codec knows
        (
            {"weight.Wq": Part("U8", (8, 4)), "weight_packed": Part("I16", (8, 4))},
            {"quant_method": "aqlm"},
            UnknownFormat,
            "stored as AQLM",
        ),
    ],
)
def test_what_can_not_be_decoded_is_refused(
    parts: dict[str, Part], quantization: dict[str, Any], error: type[MoEError], said: str
) -> None:
    with pytest.raises(error) as caught:
        recognise(parts, quantization)
    assert said in str(caught.value)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# What stacks and rows of groups share


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4_packed", "mxfp4_quark", "mxfp6_packed", "nvfp4_modelopt"])
def test_the_scales_of_a_stack_may_lie_below_each_other(name: str, tmp_path: Path) -> None:
    """As Quark stores them: [experts * rows, groups]."""
    experts = [encode(name, 21, 96, seed) for seed in (1, 2, 3)]
    part = next(part for part in experts[0].parts if part in ("weight_scale", "weight_scale_inv"))
    experts = [each for each in experts if {p: a[0] for p, a in each.parts.items()} == {
        p: a[0] for p, a in experts[0].parts.items()
    }]  # fmt: skip
    stack = {
        each: (dtype, np.stack([expert.parts[each][1] for expert in experts]))
        for each, (dtype, _) in experts[0].parts.items()
    }
    if "weight_scale_2" in stack:
        stack["weight_scale_2"] = ("F32", stack["weight_scale_2"][1].reshape(-1))
    stack[part] = (stack[part][0], stack[part][1].reshape(-1, stack[part][1].shape[-1]))
    checkpoint = write(tmp_path, stack, experts[0].quantization)
    infos, stored = open_stored(checkpoint, {each: f"x.{each}" for each in stack}, experts[0].quantization)
    assert stored.shape == (len(experts), *experts[0].values.shape)
    for index, expert in enumerate(experts):
        for start, stop in ((0, 21), (3, 4), (20, 21)):
            window = read_rows(checkpoint, infos, stored, 21, start, stop, index)
            np.testing.assert_array_equal(window, expert.values[start:stop])


@pytest.mark.parametrize("tail", [(), (1,)])
@pytest.mark.parametrize("columns", [64, 72])
def test_autoround_has_the_scales_of_groups_as_one_vector(columns: int, tail: tuple[int, ...], tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((9, columns)).astype(ml_dtypes.float8_e4m3fn)
    groups = -(-columns // 16)
    scales = np.exp2(rng.integers(-4, 5, 9 * groups)).astype(ml_dtypes.bfloat16)
    said = {"quant_method": "auto-round", "packing_format": "auto_round:fp8", "bits": 8, "group_size": 16}
    parts: Parts = {"weight": ("F8_E4M3", weight), "weight_scale": ("BF16", scales.reshape(-1, *tail))}
    checkpoint = write(tmp_path, parts, said)
    infos, stored = open_stored(checkpoint, {"weight": "x.weight", "weight_scale": "x.weight_scale"}, said)
    each = np.repeat(scales.astype(np.float32).reshape(9, groups), 16, axis=1)[:, :columns]
    for start, stop in ((0, 9), (4, 7)):
        window = read_rows(checkpoint, infos, stored, 9, start, stop)
        np.testing.assert_array_equal(window, (weight.astype(np.float32) * each)[start:stop])


@pytest.mark.parametrize("size", [-1, 32, 64])
@pytest.mark.parametrize("tail", [(), (1,)])
def test_autoround_s_one_scale_of_a_row_is_that_of_a_row_in_square_matrices(size: int, tail: tuple[int, ...]) -> None:
    said = {"quant_method": "auto-round", "packing_format": "auto_round:fp8", "bits": 8, "group_size": size}
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((32, 32)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.5, 2, (32, *tail)).astype(np.float32)
    parts: Parts = {"weight": ("F8_E4M3", weight), "weight_scale": ("F32", scales)}
    expected = weight.astype(np.float32) * scales.reshape(-1, 1)
    np.testing.assert_array_equal(decode(*open_parts(parts, said)), expected)


def test_fp8_of_modelslim_has_an_offset_for_each_row() -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((9, 12)).astype(ml_dtypes.float8_e4m3fn)
    scales, offsets = (rng.uniform(0.5, 2, (9, 1)).astype(np.float32) for _ in range(2))
    parts: Parts = {
        "weight": ("F8_E4M3", weight),
        "weight_scale": ("F32", scales),
        "weight_offset": ("F32", offsets),
    }
    stored, arrays = open_parts(parts, {"quant_method": "modelslim"})
    expected = (weight.astype(np.float32) - offsets) * scales
    np.testing.assert_array_equal(decode(stored, arrays), expected)
    np.testing.assert_array_equal(decode(stored, arrays, 3, 7), expected[3:7])
    for wrong in (offsets[:8], offsets[:, 0]):
        with pytest.raises(ModelUnreadable, match="not one per row"):
            open_parts(parts | {"weight_offset": ("F32", wrong)}, {})


def test_autoround_has_blocks_by_its_group_size() -> None:
    said = {"quant_method": "auto-round", "packing_format": "auto_round:fp8", "group_size": [16, 32]}
    parts = {"weight": Part("F8_E4M3", (32, 64)), "weight_scale_inv": Part("BF16", (2, 2))}
    assert recognise(parts, said).rows_per_row == {"weight": 1, "weight_scale_inv": 16}


def test_an_original_shape_must_be_the_decoded_one() -> None:
    parts = {name: part for name, part in NVFP4.items() if name != "input_scale"}
    shape = np.array([8, 30], np.int64)
    with pytest.raises(ModelUnreadable, match="original_shape says"):
        recognise(parts | {"original_shape": Part("I64", (2,), lambda: shape)}, {})


@pytest.mark.parametrize(
    ("parts", "method", "name"),
    [
        ({"weight_qdata": ("U8", (8, 4)), "weight_scale": ("BF16", (8, 1))}, "torchao", "torchao"),
        ({"weight:qdata": ("U8", (8, 4)), "weight:scale": ("BF16", (8, 1))}, None, "torchao"),
        ({"weight": ("U8", (8, 4)), "weight_scale": ("BF16", (8, 1))}, "torchao", "torchao"),
        ({"W_q": ("U8", (8, 4)), "scale": ("F16", (1, 8)), "zero": ("F16", (1, 8))}, None, "HQQ"),
        ({"q_weight": ("I32", (4, 8)), "q_scale": ("I32", (1, 1)), "q_scale_max": ("F16", (1,))}, None, "EXL2"),
        ({"trellis": ("I16", (2, 2, 48)), "suh": ("F16", (32,)), "svh": ("F16", (32,))}, None, "EXL3"),
        ({"codes": ("I8", (8, 4, 1)), "codebooks": ("F16", (1, 256, 1, 8)), "scales": ("F16", (8,))}, None, "AQLM"),
        ({"Qidxs": ("I64", (8, 4)), "SU": ("F16", (8,)), "SV": ("F16", (8,))}, "quip", "QuIP#"),
        ({"centroids": ("F16", (1, 8)), "indices": ("I32", (1, 8))}, "vptq", "VPTQ"),
        ({"weight": ("I8", (8, 4)), "weight_scales": ("F16", (8,))}, "eetq", "EETQ"),
        ({"weight": ("I8", (4, 8)), "weight_scale": ("F32", (8, 1)), "scale_bias": ("F32", (8, 1))}, None, "ModelSlim"),
    ],
)
def test_known_formats_are_refused_by_name(
    parts: dict[str, tuple[str, tuple[int, ...]]], method: str | None, name: str
) -> None:
    described = {part: Part(dtype, shape) for part, (dtype, shape) in parts.items()}
    with pytest.raises(UnknownFormat, match=rf"stored as {name}('s W4A8)?, which we don't decode"):
        recognise(described, {"quant_method": method} if method else {})


def test_plain_numbers_under_a_refused_method_are_read() -> None:
    """What the quantiser left as it was."""
    assert recognise({"weight": Part("BF16", (8, 4))}, {"quant_method": "torchao"}).codec == "bf16"
