"""The overlay's arithmetic: against full SVDs, planted factors, brute force, and MLX's quantiser."""

import itertools

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chuk_lazarus.introspection.moe.numerics.low_rank import factorise, overlay_bytes, rebuild, relative_error
from chuk_lazarus.introspection.moe.numerics.spectra import energy_spectrum
from chuk_lazarus.introspection.moe.overlays.allocation import allocate
from chuk_lazarus.introspection.moe.overlays.curves import RateCurve
from chuk_lazarus.introspection.moe.overlays.quantisation import as_stored, quantised_bytes, round_to_bits
from sampling import examples


def gaussian(shape: tuple[int, int], seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (24, 24), (1, 9), (9, 1)])
def test_factors_are_as_good_as_a_full_svd(shape: tuple[int, int]) -> None:
    delta = gaussian(shape)
    singular = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    spectrum = energy_spectrum(delta)
    for rank in range(min(shape) + 1):
        factors = factorise(delta, rank)
        assert factors.left.shape == (shape[0], rank)
        assert factors.right.shape == (rank, shape[1])
        left_out = np.linalg.norm(delta - factors.left @ factors.right) ** 2
        assert left_out == pytest.approx((singular[rank:] ** 2).sum(), abs=1e-4 * (singular**2).sum())
        # what the spectrum promised
        assert left_out == pytest.approx(spectrum[rank:].sum(), abs=1e-4 * spectrum.sum())


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_planted_factors_are_recovered(shape: tuple[int, int], rank: int) -> None:
    base, planted = gaussian(shape), gaussian((shape[0], rank), 1) @ gaussian((rank, shape[1]), 2)
    assert relative_error(rebuild(base, factorise(planted, rank)), base + planted) < 1e-5
    assert relative_error(rebuild(base, factorise(planted, rank - 1)), base + planted) > 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_factors_of_deltas_whose_energy_is_beyond_float32(shape: tuple[int, int], scale: float) -> None:
    delta = gaussian(shape) * np.float32(scale)
    singular = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    for rank in (0, 1, 5, 12):
        factors = factorise(delta, rank)
        rest = delta.astype(np.float64) - factors.left.astype(np.float64) @ factors.right
        assert np.linalg.norm(rest) == pytest.approx(np.linalg.norm(singular[rank:]), abs=1e-5 * singular[0])


@pytest.mark.parametrize(("rank", "orthonormal"), [(3, "left"), (5, "left")])
def test_the_factor_on_the_short_side_is_orthonormal(rank: int, orthonormal: str) -> None:
    wide, tall = factorise(gaussian((8, 15)), rank), factorise(gaussian((15, 8)), rank)
    np.testing.assert_allclose(wide.left.T @ wide.left, np.eye(rank), atol=1e-5)
    np.testing.assert_allclose(tall.right @ tall.right.T, np.eye(rank), atol=1e-5)


def test_relative_errors_by_hand() -> None:
    exact, zero = np.array([[3.0, 4.0]]), np.zeros((1, 2))
    assert relative_error(np.array([[3.0, 3.0]]), exact) == pytest.approx(0.2)
    assert relative_error(zero, exact) == 1.0
    assert relative_error(exact / 100, zero) == 1.0
    assert relative_error(zero, zero) == 0.0


@pytest.mark.parametrize("rank", [-1, 6])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank}"):
        factorise(gaussian((5, 9)), rank)


@settings(max_examples=examples(30), deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_error_falls_with_rank(rows: int, columns: int, seed: int) -> None:
    delta = gaussian((rows, columns), seed)
    errors = [
        relative_error(rebuild(np.zeros_like(delta), factorise(delta, r)), delta) for r in range(min(rows, columns) + 1)
    ]
    assert all(after <= before + 1e-5 for before, after in itertools.pairwise(errors))
    assert errors[-1] < 1e-5


spectra = st.lists(st.floats(0, 100), min_size=1, max_size=4).map(lambda x: np.sort(np.array(x))[::-1])


def left_out(choices: dict[int, RateCurve], ranks: dict[int, int]) -> float:
    return sum(float(choice.spectrum[ranks[key] :].sum()) for key, choice in choices.items())


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(spectra, min_size=1, max_size=3), st.integers(0, 14))
def test_spread_rank_is_the_best_of_all_ways_to_spend_the_bytes(found: list[NDArray[np.float64]], budget: int) -> None:
    """Brute force, uniform ranks among the candidates, at equal costs."""
    choices = {key: RateCurve(spectrum, 1) for key, spectrum in enumerate(found)}
    ranks = allocate(choices, budget=budget)
    assert sum(ranks.values()) <= budget
    candidates = itertools.product(*(range(len(spectrum) + 1) for spectrum in found))
    best = min(left_out(choices, dict(enumerate(c))) for c in candidates if sum(c) <= budget)
    assert left_out(choices, ranks) == pytest.approx(best, abs=1e-9)


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.tuples(spectra, st.integers(1, 5)), min_size=1, max_size=3), st.integers(0, 4))
def test_spread_rank_at_unequal_costs_is_at_most_one_rank_from_uniform(
    found: list[tuple[NDArray[np.float64], int]], uniform: int
) -> None:
    choices = {key: RateCurve(spectrum, cost) for key, (spectrum, cost) in enumerate(found)}
    same = {key: min(uniform, len(choice.spectrum)) for key, choice in choices.items()}
    budget = sum(choices[key].cost * rank for key, rank in same.items())
    ranks = allocate(choices, budget=budget)
    assert sum(choices[key].cost * rank for key, rank in ranks.items()) <= budget
    largest = max(float(choice.spectrum[0]) for choice in choices.values())
    assert left_out(choices, ranks) <= left_out(choices, same) + largest + 1e-9


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(spectra, min_size=1, max_size=3), st.floats(0, 200))
def test_spread_rank_stops_as_soon_as_the_error_is_small_enough(
    found: list[NDArray[np.float64]], energy_left: float
) -> None:
    choices = {key: RateCurve(spectrum, 1) for key, spectrum in enumerate(found)}
    ranks = allocate(choices, energy_left=energy_left)
    assert left_out(choices, ranks) <= energy_left + 1e-9
    if sum(ranks.values()):
        fewer = allocate(choices, budget=sum(ranks.values()) - 1)
        assert left_out(choices, fewer) >= energy_left - 1e-9


@pytest.mark.parametrize(
    ("spectra", "costs", "limits", "ranks"),
    [
        # more energy per byte first, whatever the rank brings in all
        ([[10.0], [5.0, 5.0]], [10, 1], {"budget": 10}, [0, 2]),
        ([[10.0, 1.0], [3.0, 3.0]], [2, 1], {"budget": 3}, [1, 1]),
        ([[8.0, 8.0], [3.0]], [1, 1], {"budget": 2}, [2, 0]),
        # what does not fit leaves room for what does, and just fitting is fitting
        ([[20.0], [1.0]], [10, 1], {"budget": 5}, [0, 1]),
        ([[20.0], [1.0]], [10, 1], {"budget": 11}, [1, 1]),
        # rank that brings nothing takes nothing
        ([[2.0, 0.0], [0.0]], [1, 1], {"budget": 9}, [1, 0]),
        ([[0.5, 0.25, 0.0]], [1], {}, [2]),
        ([[0.9, 0.9, 0.9, 0.0]], [1], {}, [3]),  # though rounding leaves something of the sum
        # as soon as what is left is as little as asked for
        ([[2.0, 1.0]], [1], {"energy_left": 1.0}, [1]),
        ([[2.0, 1.0]], [1], {"energy_left": 0.99}, [2]),
        ([[2.0, 1.0]], [1], {"energy_left": 3.0}, [0]),
    ],
)
def test_spread_rank_by_hand(
    spectra: list[list[float]], costs: list[int], limits: dict[str, float], ranks: list[int]
) -> None:
    choices = {n: RateCurve(np.array(one), cost) for n, (one, cost) in enumerate(zip(spectra, costs, strict=True))}
    assert allocate(choices, **limits) == dict(enumerate(ranks))


def test_stored_numbers_are_bfloat16() -> None:
    array = gaussian((7, 9))
    np.testing.assert_array_equal(as_stored(array), array.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantisation_errs_as_mlx_does(bits: int) -> None:
    """MLX places its levels a little otherwise, so the errors agree and not the numbers."""
    matrix = gaussian((64, 256))
    with mx.stream(mx.cpu):
        packed = mx.quantize(mx.array(matrix).astype(mx.bfloat16), group_size=64, bits=bits)
        theirs = np.array(mx.dequantize(*packed, group_size=64, bits=bits).astype(mx.float32))
    ours = relative_error(round_to_bits(matrix, bits), matrix)
    # at 8 bits MLX's rounding of scale and least value to bfloat16 costs as much as the levels themselves
    assert ours == pytest.approx(relative_error(theirs, matrix), rel=0.15 if bits < 8 else 0.5)
    assert quantised_bytes(matrix.shape, bits) == sum(np.asarray(part.nbytes) for part in packed)


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200])
def test_quantisation_takes_ragged_groups(columns: int) -> None:
    matrix = gaussian((5, columns))
    assert np.abs(round_to_bits(matrix, 8) - matrix).max() < 0.05
    np.testing.assert_allclose(round_to_bits(np.full((3, columns), 0.5, np.float32), 3), 0.5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_lies_on_the_levels_is_kept_exactly(bits: int) -> None:
    """All levels of two groups of a row, each with a step and a least value of its own."""
    levels = np.arange(2**bits, dtype=np.float32)
    matrix = np.stack([np.concatenate([levels / 4 - 1, 3 - levels / 2]), np.concatenate([2 - levels, levels])])
    np.testing.assert_array_equal(round_to_bits(matrix, bits, group=2**bits), matrix)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_group_has_more_levels_than_its_bits(bits: int) -> None:
    """Least values that bfloat16 takes up or down put weights outside the levels."""
    matrix = gaussian((40, 128)) + 100
    found = round_to_bits(matrix, bits)
    np.testing.assert_array_equal(found, round_to_bits(matrix, bits, group=64))
    for row in found.reshape(-1, 64):
        assert len(set(row.tolist())) <= 2**bits
    part = matrix.reshape(-1, 64)
    low = as_stored(part.min(axis=1, keepdims=True))
    high = low + (2**bits - 1) * as_stored((part.max(axis=1, keepdims=True) - low) / (2**bits - 1))
    assert (found.reshape(-1, 64) >= low).all()
    assert (found.reshape(-1, 64) <= high * (1 + 1e-6)).all()


@pytest.mark.parametrize(
    ("shape", "bits", "expected"),
    [
        ((3, 5), 3, 3 * (2 + 4)),  # 15 bits, and one group
        ((3, 65), 4, 3 * (33 + 8)),
        ((2, 128), 8, 2 * (128 + 8)),
        ((1, 16), 1, 2 + 4),
    ],
)
def test_quantised_bytes_by_hand(shape: tuple[int, int], bits: int, expected: int) -> None:
    assert quantised_bytes(shape, bits) == expected


def test_rank_zero_costs_the_base_alone() -> None:
    assert overlay_bytes({"up": (4, 6)}, {"up": 0}, 100) == 2 * 4 * 6
