"""Packed integers as we write them, against what compressed-tensors decoded of them and against plain integers."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

from chuk_lazarus.introspection.moe.overlays.codes.packed import (
    PACKED_BITS,
    PACKED_GROUPS,
    PackedCode,
    packed_widths,
    parse_packed,
)
from chuk_lazarus.introspection.moe.weights.codecs import Part, recognise
from encoders_packed import unpack_stream
from places import FIXTURES
from sampling import examples

CODES = [PackedCode(bits, group) for bits in PACKED_BITS for group in PACKED_GROUPS]
BY_THE_LIBRARY = sorted((FIXTURES / "formats").glob("packed_ours_*"))
DTYPES = {"int32": "I32", "int64": "I64", "bfloat16": "BF16"}


def share_lost(exact: NDArray[np.float32], decoded: NDArray[np.float32]) -> float:
    return float(np.square(decoded - exact).sum() / np.square(exact).sum())


@pytest.mark.parametrize("folder", BY_THE_LIBRARY, ids=lambda folder: folder.name)
def test_the_library_decodes_what_we_write(folder: Any) -> None:
    """The fixtures are of this encoder (make_packed_fixtures.py), and what the library made of them."""
    tensors = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    weights = settings["config_groups"]["group_0"]["weights"]
    code = PackedCode(weights["num_bits"], weights["group_size"])
    matrix = np.random.default_rng(code.bits).standard_normal((7, 128)).astype(np.float32)
    parts = code.encode(matrix)
    for name, part in parts.items():
        np.testing.assert_array_equal(part.view(np.uint8), tensors[f"x.{name}"].view(np.uint8))
    oracle = np.load(folder / "oracle.npz")["x"]
    np.testing.assert_allclose(code.decode(parts, (7, 128)), oracle, rtol=1e-6)
    assert share_lost(matrix, oracle) < 3 * 4.0**-code.bits


def test_there_are_all_bits() -> None:
    assert {int(folder.name.split("int")[1].split("_")[0]) for folder in BY_THE_LIBRARY} == set(PACKED_BITS)


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "heavy tails"])
def test_it_errs_less_than_by_the_greatest_magnitude(code: PackedCode, kind: str) -> None:
    rng = np.random.default_rng(3)
    matrix = (rng.standard_t(4, (64, 256)) if kind == "heavy tails" else rng.normal(size=(64, 256))).astype(np.float32)
    groups = matrix.reshape(64, -1, code.group)
    half = 1 << (code.bits - 1)
    scale = np.abs(groups).max(axis=2, keepdims=True) / (half - 0.5)
    theirs = scale * np.clip(np.rint(groups / scale), -half, half - 1)
    assert share_lost(matrix, code.decode(code.encode(matrix), (64, 256))) < share_lost(groups, theirs)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_our_reader_and_long_integers_say_the_same(code: PackedCode) -> None:
    matrix = np.random.default_rng(4).normal(size=(5, 256)).astype(np.float32)
    parts = code.encode(matrix)
    decoded = code.decode(parts, (5, 256))
    integers = unpack_stream(parts["weight_packed"], code.bits, 256) - (1 << (code.bits - 1))
    scales = np.repeat(parts["weight_scale"].astype(np.float32), code.group, axis=1)
    np.testing.assert_array_equal(decoded, integers.astype(np.float32) * scales)
    described = {
        name: Part(DTYPES[part.dtype.name], part.shape, lambda part=part: part) for name, part in parts.items()
    }
    settings = {"config_groups": {"group_0": {"weights": {"num_bits": code.bits, "group_size": code.group}}}}
    stored = recognise(described, settings)
    assert (stored.codec, stored.plain_shape) == (f"int{code.bits}", (5, 256))
    np.testing.assert_array_equal(stored.decode({**parts}, 0, 5), decoded)
    layout = code.layout((5, 256))
    assert {name: (part.dtype, part.shape) for name, part in described.items()} == {
        name: (part.dtype, part.shape) for name, part in layout.items()
    }
    assert code.nbytes((5, 256)) == sum(part.nbytes for part in parts.values())
    assert code.lost(matrix) == pytest.approx(np.square(decoded - matrix).sum(), rel=1e-4)


@given(
    st.sampled_from(CODES),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([0.0, 1e-42, 1e-30, 1e-3, 1.0, 1e30]),
    st.integers(0, 2**32 - 1),
)
@limits(max_examples=examples(60), deadline=None)
def test_any_finite_matrix_has_finite_parts(code: PackedCode, rows: int, groups: int, scale: float, seed: int) -> None:
    matrix = (np.random.default_rng(seed).normal(size=(rows, groups * code.group)) * scale).astype(np.float32)
    decoded = code.decode(code.encode(matrix), (rows, groups * code.group))
    assert np.isfinite(decoded).all()
    assert np.abs(decoded - matrix).max() <= max(2.0 ** (2 - code.bits) * np.abs(matrix).max(), 1e-37)


def test_what_is_none() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        PackedCode(4, 64).encode(np.full((2, 64), np.nan, np.float32))
    with pytest.raises(ValueError, match="divide into groups of 64"):
        PackedCode(4, 64).layout((2, 96))
    assert [str(code) for code in packed_widths((8, 96))] == [f"int{bits}:32" for bits in PACKED_BITS]
    assert packed_widths((8, 40)) == []


@pytest.mark.parametrize("code", CODES, ids=str)
def test_texts(code: PackedCode) -> None:
    assert parse_packed(str(code)) == code


@pytest.mark.parametrize("text", ["", "int4", "int4:", "int7:64", "int4:16", "bf16", "4:64", "4bit:64"])
def test_texts_of_no_width(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_packed(text)
