"""Codes of one matrix: against closed forms, and against decoders that share no code with them."""

from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chuk_lazarus.introspection.moe.overlays.codes import MatrixCode, parse_code
from chuk_lazarus.introspection.moe.overlays.codes.bf16 import Bf16Code
from chuk_lazarus.introspection.moe.overlays.codes.bits import GROUPS, LEVELS, MATRIX, ROW, BitsCode
from chuk_lazarus.introspection.moe.overlays.codes.code import code_bytes
from chuk_lazarus.introspection.moe.overlays.codes.low_rank import FactorsCode, SumCode
from sampling import examples

Array = NDArray[np.float32]

BITS = [BitsCode(levels, group) for levels in LEVELS for group in GROUPS]
OTHERS: list[MatrixCode] = [
    Bf16Code(),
    FactorsCode(4, BitsCode(8)),
    FactorsCode(0, BitsCode(8)),
    SumCode(FactorsCode(3, BitsCode(16, 64)), BitsCode(3)),
]
MANY = 32  # columns: as many numbers as it takes for their luck to average out
WHOLE = [levels for levels in LEVELS if levels != 3]  # zero, which three levels have, helps where few numbers count
every_bits = pytest.mark.parametrize("code", BITS, ids=str)
every_code = pytest.mark.parametrize("code", [*BITS, *OTHERS], ids=str)
shapes = st.tuples(st.integers(4, 9), st.one_of(st.integers(4, 40), st.sampled_from([64, 127, 128, 130, 192, 300])))


def gaussian(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def coded(code: MatrixCode, matrix: Array, unbiased: bool = False) -> Array:
    shape = matrix.shape[0], matrix.shape[1]
    return code.decode(code.encode(matrix, unbiased=unbiased), shape)


def lost(code: MatrixCode, matrix: Array) -> float:
    exact = matrix.astype(np.float64)
    return float(((coded(code, matrix) - exact) ** 2).sum() / (exact**2).sum())


# ---------------------------------------------------------------------------------------------------------------------
# Another decoder, number by number, from what docs/overlay-format.md says


def span_of(code: BitsCode, columns: int) -> int:
    """How many weights of a row share a scale, at most."""
    return columns if code.group in (ROW, MATRIX) else code.group


def decode_slowly(code: BitsCode, parts: dict[str, NDArray[Any]], rows: int, columns: int) -> Array:
    levels = code.levels
    bits = {2: 1, 4: 2, 8: 3, 16: 4, 32: 5, 64: 6, 128: 7, 256: 8}.get(levels, 0)
    result = np.empty((rows, columns))
    for row in range(rows):
        packed = [int(byte) for byte in parts["levels"][row]]
        stream = sum(byte << (8 * place) for place, byte in enumerate(packed))
        for column in range(columns):
            if levels == 3:
                level = packed[column // 5] // 3 ** (column % 5) % 3
            else:
                level = (stream >> (column * bits)) % 2**bits
            k = int(parts["scales"][0 if code.group == MATRIX else row, column // span_of(code, columns)])
            scale = float(parts["unit"]) * 2 ** ((k - 255) / 16) if k else 0.0
            result[row, column] = scale * (level - (levels - 1) / 2)
    return result.astype(np.float32)


@every_bits
@pytest.mark.parametrize("shape", [(3, 300), (5, 128), (2, 7), (1, 1), (4, 65)])
def test_random_bytes_decode_as_the_format_says(code: BitsCode, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    parts: dict[str, NDArray[Any]] = {
        name: random.integers(0, 256, part.shape, np.uint8)
        for name, part in code.layout(shape).items()
        if part.dtype == "U8"
    }
    parts["unit"] = np.float32(0.37)
    expected = decode_slowly(code, parts, *shape)
    np.testing.assert_allclose(code.decode(parts, shape), expected, rtol=3e-7)


@every_bits
@pytest.mark.parametrize("columns", [32, 96, 128, 320, 100, 8])
def test_the_affine_form_is_the_same_matrix_to_mlx(code: BitsCode, columns: int) -> None:
    mx = pytest.importorskip("mlx.core")
    shape = (6, columns)
    stacked = [code.encode(gaussian(*shape, seed=seed)) for seed in range(3)]
    parts = {name: np.stack([each[name] for each in stacked]) for name in stacked[0]}
    affine = code.as_affine(parts, shape)
    found = np.array(
        mx.dequantize(*map(mx.array, (affine.weight, affine.scales, affine.biases)), affine.group_size, affine.bits)
    )
    assert found.shape == (3, 6, affine.columns)
    for expert, each in enumerate(stacked):
        expected = code.decode(each, shape)
        np.testing.assert_allclose(found[expert, :, :columns], expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@every_bits
def test_mlx_multiplies_by_the_affine_form(code: BitsCode) -> None:
    mx = pytest.importorskip("mlx.core")
    shape = (64, 256)
    parts, x = code.encode(gaussian(*shape)), gaussian(5, 256, seed=1)
    affine = code.as_affine(parts, shape)
    arrays = map(mx.array, (affine.weight, affine.scales, affine.biases))
    found = np.array(mx.quantized_matmul(mx.array(x), *arrays, True, affine.group_size, affine.bits))
    np.testing.assert_allclose(found, x @ code.decode(parts, shape).T, rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Errors in closed form: Max (1960) for the best quantisers of a Gaussian, and the rate that a quarter of an error takes

LLOYD_MAX = {2: 0.3634, 3: 0.1902, 4: 0.1175, 8: 0.03454, 16: 0.009497, 32: 0.002499}


@pytest.mark.parametrize("levels", LLOYD_MAX)
@pytest.mark.parametrize("group", GROUPS)
def test_gaussian_numbers_lose_what_lloyd_and_max_say(levels: int, group: int) -> None:
    """Levels are evenly spaced, and scales follow their groups: the one costs and the other gains a few per cent."""
    if group in (ROW, MATRIX) and levels > 8:
        pytest.skip("one scale for many is for few levels")
    code = BitsCode(levels, group)
    error = lost(code, gaussian(256, 1024))
    assert 0.88 * LLOYD_MAX[levels] < error < 1.2 * LLOYD_MAX[levels]
    # the bytes of the scales are worth what they cost: never more than this many bits over the ideal quantiser
    assert np.log2(error / LLOYD_MAX[levels]) / 2 + code.layout((256, 1024))["scales"].nbytes / 2**15 < 0.13


@pytest.mark.parametrize("group", GROUPS)
def test_more_bits_err_less(group: int) -> None:
    for matrix in (gaussian(64, 512), gaussian(64, 512, seed=1) ** 3, np.cumsum(gaussian(64, 512), axis=1)):
        errors = [lost(BitsCode(levels, group), matrix) for levels in WHOLE]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < (2e-2 if group == MATRIX else 2e-3)


@given(shapes, st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 5]))
@settings(max_examples=examples(40), deadline=None)
def test_more_bits_err_less_on_any_matrix(shape: tuple[int, int], seed: int, power: int) -> None:
    """A weight errs by half a step at most, of steps that reach the peak of its group; a scale's byte costs some more.

    The bound falls fourfold a bit. Errors themselves need not: four numbers can happen to lie on the coarser levels.
    """
    matrix = gaussian(*shape, seed=seed) ** power
    groups = np.split(matrix.astype(np.float64), range(128, shape[1], 128), axis=1)
    peaks = sum(group.shape[1] * float((np.abs(group).max(axis=1) ** 2).sum()) for group in groups)
    bound = peaks / float((matrix.astype(np.float64) ** 2).sum())
    errors = {levels: lost(BitsCode(levels), matrix) for levels in LEVELS}
    assert all(error < 1.1 * bound / (levels - 1) ** 2 for levels, error in errors.items())
    assert errors[2] < 1
    if shape[1] >= MANY:
        assert all(errors[more] <= 1.05 * errors[fewer] + 1e-9 for fewer, more in pairwise(WHOLE))


@every_bits
def test_unbiased_undoes_the_shrinkage(code: BitsCode) -> None:
    matrix = gaussian(64, 256)
    shrunk, unbiased = coded(code, matrix), coded(code, matrix, unbiased=True)
    assert np.vdot(matrix, unbiased) == pytest.approx(np.vdot(matrix, matrix), rel=1e-5)
    assert np.vdot(matrix, shrunk) == pytest.approx((1 - lost(code, matrix)) * np.vdot(matrix, matrix), rel=0.012)


# ---------------------------------------------------------------------------------------------------------------------
# What any code keeps


@every_bits
@given(shapes, st.integers(0, 2**32 - 1))
@settings(max_examples=examples(15), deadline=None)
def test_what_can_be_represented_is_kept(code: BitsCode, shape: tuple[int, int], seed: int) -> None:
    random = np.random.default_rng(seed)
    half = (code.levels - 1) / 2
    steps = random.integers(0, code.levels, shape) - half
    span = span_of(code, shape[1])
    steps[:, ::span] = half  # the first of each group is of the highest level
    scales = 2.0 ** random.integers(-5, 3, (1 if code.group == MATRIX else shape[0], -(-shape[1] // span)))
    matrix = (steps * np.repeat(scales, span, axis=1)[:, : shape[1]]).astype(np.float32)
    np.testing.assert_allclose(coded(code, matrix), matrix, rtol=1e-5)


@every_code
@given(shapes)
@settings(max_examples=examples(10), deadline=None)
def test_bytes_are_those_of_the_parts(code: MatrixCode, shape: tuple[int, int]) -> None:
    parts, layout = code.encode(gaussian(*shape)), code.layout(shape)
    assert code_bytes(code, shape) == sum(part.nbytes for part in parts.values())
    assert {name: part.shape for name, part in parts.items()} == {name: part.shape for name, part in layout.items()}
    names = {"U8": np.uint8, "F32": np.float32, "BF16": ml_dtypes.bfloat16}
    assert all(parts[name].dtype == names[part.dtype] for name, part in layout.items())


@every_code
def test_a_matrix_is_not_changed(code: MatrixCode) -> None:
    matrix = gaussian(6, 200)
    code.encode(matrix, unbiased=True)
    assert (matrix == gaussian(6, 200)).all()


@every_code
def test_zeros_stay_zeros(code: MatrixCode) -> None:
    for unbiased in (False, True):
        assert not coded(code, np.zeros((5, 200), np.float32), unbiased).any()


@every_bits
def test_a_group_of_zeros_among_others_stays_zero(code: BitsCode) -> None:
    matrix = gaussian(4, 512)
    matrix[1] = 0
    matrix[2, 128:256] = 0
    found = coded(code, matrix)
    assert not found[1].any() or code.group == MATRIX
    assert not found[2, 128:256].any() or code.group in (ROW, MATRIX)


@every_bits
def test_constant_rows_are_kept(code: BitsCode) -> None:
    matrix = np.repeat(np.array([[3.0], [-0.25], [1e-3]], np.float32), 300, axis=1)
    if code.group == MATRIX:
        matrix[:] = 3.0
    np.testing.assert_allclose(coded(code, matrix), matrix, rtol=0.03)


@every_code
@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e36])
def test_scale_does_not_matter(code: MatrixCode, scale: float) -> None:
    matrix = gaussian(8, 200)
    exponent = round(np.log2(scale))
    scaled = np.ldexp(matrix, exponent)
    for unbiased in (False, True):
        expected = coded(code, matrix, unbiased)
        assert np.isfinite(coded(code, scaled, unbiased)).all()
        np.testing.assert_allclose(
            np.ldexp(coded(code, scaled, unbiased), -exponent), expected, rtol=1e-3, atol=2e-3 * np.abs(expected).max()
        )


@every_bits
def test_the_largest_and_the_least_numbers_stay_finite(code: BitsCode) -> None:
    info = np.finfo(np.float32)
    for peak in (info.max, info.tiny, info.smallest_subnormal):
        matrix = np.sign(gaussian(4, 130)) * peak
        with np.errstate(all="raise", under="ignore"):
            assert np.isfinite(coded(code, matrix, unbiased=True)).all()


@every_bits
def test_rows_of_very_different_scales_are_all_kept(code: BitsCode) -> None:
    if code.group == MATRIX:
        pytest.skip("one scale serves all rows")
    matrix = gaussian(8, 256) * np.float32(10.0) ** -np.arange(8, dtype=np.float32)[:, None] / 2
    found = coded(code, matrix)
    for row in range(4):  # the bytes of the scales reach down to 1 / 60,000 of the greatest
        assert ((found[row] - matrix[row]) ** 2).sum() < (1.2 if code.group == MATRIX else 0.45) * (
            matrix[row] ** 2
        ).sum()
    assert (np.abs(found - matrix) <= np.abs(matrix).max(axis=1, keepdims=True)).all()


@every_code
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(code: MatrixCode, bad: float) -> None:
    matrix = gaussian(5, 130)
    matrix[3, 128] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        code.encode(matrix)


# ---------------------------------------------------------------------------------------------------------------------
# Factors


def test_factors_are_near_to_the_best_of_their_rank() -> None:
    matrix = gaussian(96, 6) @ gaussian(6, 160, seed=1) + 0.3 * gaussian(96, 160, seed=2)
    left_out = (np.linalg.svd(matrix)[1][6:] ** 2).sum() / (matrix**2).sum()
    assert left_out < lost(FactorsCode(6, BitsCode(256)), matrix) < 1.01 * left_out
    assert lost(FactorsCode(6, BitsCode(16)), matrix) < left_out + 0.03


def test_factors_and_bits_are_better_than_either() -> None:
    matrix = gaussian(96, 4) @ gaussian(4, 160, seed=1) + 0.5 * gaussian(96, 160, seed=2)
    factors, rest = FactorsCode(4, BitsCode(16)), BitsCode(4)
    assert lost(SumCode(factors, rest), matrix) < 0.5 * min(lost(factors, matrix), lost(rest, matrix))


def test_a_rank_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 7"):
        FactorsCode(7, BitsCode(8)).encode(gaussian(6, 12))


# ---------------------------------------------------------------------------------------------------------------------
# Names


@every_code
def test_a_code_is_read_from_its_text(code: MatrixCode) -> None:
    assert parse_code(str(code)) == code


def test_texts_of_codes() -> None:
    assert str(BitsCode(3)) == "1.6bit:128"
    assert str(SumCode(FactorsCode(8, BitsCode(8)), BitsCode(4, 64))) == "rank8:3bit:128+2bit:64"


@pytest.mark.parametrize(
    "text",
    ["", "9bit:128", "2bit:32", "2bit", "rank8", "rank-1:3bit:128", "bf16+2bit:64", "rank1:bf16", "2bit:64+2bit:64"],
)
def test_other_texts_are_no_codes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a code"):
        parse_code(text)


@pytest.mark.parametrize(("levels", "group"), [(5, 128), (4, 32), (1, 64)])
def test_other_levels_and_groups_are_no_codes(levels: int, group: int) -> None:
    with pytest.raises(ValueError, match="levels in groups"):
        BitsCode(levels, group)
