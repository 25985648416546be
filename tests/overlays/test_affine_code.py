"""MLX's affine quantisation as we write it, read by MLX and by our own decoder of checkpoints."""

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chuk_lazarus.introspection.moe.overlays.codes.affine import (
    AFFINE_BITS,
    AFFINE_GROUPS,
    AffineCode,
    parse_affine,
)
from chuk_lazarus.introspection.moe.overlays.codes.code import code_bytes
from chuk_lazarus.introspection.moe.weights.codecs import Part, recognise
from sampling import examples

CODES = [AffineCode(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUPS]
DTYPES = {"uint32": "U32", "bfloat16": "BF16"}


def in_mlx(array: NDArray[Any]) -> mx.array:
    """bfloat16 as MLX's, everything else as it is."""
    return mx.array(array.view(np.uint16)).view(mx.bfloat16) if array.dtype.name == "bfloat16" else mx.array(array)


def dequantise(code: AffineCode, parts: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    """By MLX, in float32."""
    scales, biases = (in_mlx(parts[name]).astype(mx.float32) for name in ("scales", "biases"))
    return np.array(mx.dequantize(mx.array(parts["weight"]), scales, biases, code.group, code.bits))


def share_lost(exact: NDArray[np.float32], decoded: NDArray[np.float32]) -> float:
    return float(np.square(decoded - exact).sum() / np.square(exact).sum())


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "off zero"])
def test_mlx_reads_it_and_errs_more(code: AffineCode, kind: str) -> None:
    rng = np.random.default_rng(3)
    matrix = {
        "gaussian": partial(rng.normal, size=(96, 256)),
        "heavy tails": partial(rng.standard_t, 4, size=(96, 256)),
        "off zero": partial(rng.normal, 0.7, 1, size=(96, 256)),
    }[kind]().astype(np.float32)
    parts = code.encode(matrix)
    decoded = dequantise(code, parts)
    np.testing.assert_allclose(code.decode(parts, matrix.shape), decoded, rtol=1e-5, atol=1e-6)
    theirs = mx.dequantize(
        *mx.quantize(mx.array(matrix).astype(mx.bfloat16), code.group, code.bits), code.group, code.bits
    )
    assert share_lost(matrix, decoded) < share_lost(matrix, np.array(theirs.astype(mx.float32)))


@pytest.mark.parametrize("code", CODES, ids=str)
def test_our_reader_of_checkpoints_reads_it(code: AffineCode) -> None:
    matrix = np.random.default_rng(4).normal(size=(8, 256)).astype(np.float32)
    parts = code.encode(matrix)
    described = {name: Part(DTYPES[part.dtype.name], part.shape) for name, part in parts.items()}
    stored = recognise(described, {"bits": code.bits, "group_size": code.group})
    assert (stored.codec, stored.shape) == (f"mlx-{code.bits}bit", (8, 256))
    np.testing.assert_allclose(stored.decode(parts, 0, 8), code.decode(parts, (8, 256)), rtol=1e-6, atol=1e-6)
    layout = code.layout((8, 256))
    assert {name: (DTYPES[part.dtype.name], part.shape) for name, part in parts.items()} == {
        name: (part.dtype, part.shape) for name, part in layout.items()
    }
    assert code_bytes(code, (8, 256)) == sum(part.nbytes for part in parts.values())


@given(
    st.sampled_from(CODES),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=examples(60), deadline=None)
def test_any_finite_matrix_has_finite_parts(code: AffineCode, rows: int, groups: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = (rng.normal(size=(rows, groups * code.group)) * scale).astype(np.float32)
    matrix[0] = matrix[0, 0]  # equal numbers have no spread
    decoded = code.decode(code.encode(matrix), (rows, groups * code.group))
    assert np.isfinite(decoded).all()
    assert np.abs(decoded[0] - matrix[0]).max() <= 2**-8 * abs(matrix[0, 0])


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_numbers_on_a_line_are_kept(bits: int) -> None:
    """What a quantised checkpoint holds on lines of as many levels loses no more than bfloat16's rounding."""
    code = AffineCode(bits, 64)
    rng = np.random.default_rng(5)
    levels = rng.integers(0, 1 << bits, size=(32, 256))
    levels[:, ::64], levels[:, 1::64] = 0, (1 << bits) - 1
    matrix = (0.25 * levels - 0.5).astype(np.float32)
    if bits in (2, 3, 4):
        assert share_lost(matrix, code.decode(code.encode(matrix), (32, 256))) < 0.05 * 4.0**-bits
    else:
        np.testing.assert_allclose(code.decode(code.encode(matrix), (32, 256)), matrix, atol=0.26)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        AffineCode(4, 64).encode(np.full((2, 64), value, np.float32))


def test_rows_without_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="divide into groups of 64"):
        AffineCode(4, 64).layout((2, 96))


@pytest.mark.parametrize("code", CODES, ids=str)
def test_texts(code: AffineCode) -> None:
    assert parse_affine(str(code)) == code


@pytest.mark.parametrize("text", ["", "4bit", "4bit:", "7bit:64", "4bit:16", "bf16", "4bit:row", "-4bit:64"])
def test_texts_of_no_width(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_affine(text)
