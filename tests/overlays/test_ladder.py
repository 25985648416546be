"""What bits buy: the ladder of an estimate, its bound, and the advice from it."""

from functools import cache
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chuk_lazarus.introspection.moe import MoECompressionService
from chuk_lazarus.introspection.moe.numerics.rates import least_error, saving_bound
from chuk_lazarus.introspection.moe.overlays.ladder import advise, list_variances
from chuk_lazarus.introspection.moe.overlays.quantisation import round_to_bits
from chuk_lazarus.introspection.moe.reports import LadderRow, MoEOverlayEstimate
from chuk_lazarus.introspection.moe.weights.experts import Experts
from sampling import examples, keep

DEMOS = ("upcycled", "native", "permuted", "lora")


@cache
def estimate(demo: str) -> MoEOverlayEstimate:
    return MoECompressionService.estimate(f"demo:{demo}")


# ---------------------------------------------------------------------------------------------------------------------
# The bound


@given(
    st.lists(st.tuples(st.floats(1e-6, 1e3), st.integers(1, 50)), min_size=1, max_size=8),
    st.floats(0.0, 8.0),
)
@settings(max_examples=examples(100), deadline=None)
def test_water_is_filled_to_one_level(components: list[tuple[float, int]], bits: float) -> None:
    """Against a level that is looked for by halves."""
    variances, counts = np.array(components).T
    low, high = variances.min() * 2.0**-60, variances.max()
    for _ in range(200):
        level = sqrt(low * high)
        spent = counts @ np.maximum(0.0, 0.5 * np.log2(variances / level)) / counts.sum()
        low, high = (level, high) if spent > bits else (low, level)
    expected = counts @ np.minimum(variances, high)
    assert least_error(variances, counts, bits) == pytest.approx(expected, rel=1e-6)


def test_of_equal_variances_each_bit_takes_three_quarters() -> None:
    for bits in (0.0, 1.0, 2.5):
        assert least_error(np.full(3, 2.0), np.full(3, 5.0), bits) == pytest.approx(30 * 4.0**-bits)
    assert least_error(np.zeros(3), np.ones(3), 1.0) == 0.0
    assert least_error(np.array([93.0]), np.array([11]), 0.0) == pytest.approx(93.0 * 11)  # 11 log(93) / 11 is rounded
    assert least_error(np.array([4.0, 0.0]), np.array([1.0, 1.0]), 1.0) == pytest.approx(4 * 4.0**-2)


@given(st.floats(0.0, 0.99), st.integers(2, 64))
@settings(max_examples=examples(60), deadline=None)
def test_the_bound_of_sharing_is_the_same_law(cosine: float, experts: int) -> None:
    """Experts of one cosine need `saving_bound` bits less than 4 for the error of 4 bits."""
    gram = np.full((experts, experts), cosine) + (1 - cosine) * np.eye(experts)
    variances = experts * np.array([share for share, _ in list_variances(gram)])
    saved = saving_bound(cosine, experts)
    assert least_error(variances, np.ones(experts), 4 - saved) == pytest.approx(experts * 4.0**-4, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The ladder of the demos


@pytest.mark.parametrize("demo", DEMOS)
def test_the_ladder_falls_and_stays_above_the_bound(demo: str) -> None:
    report = estimate(demo)
    assert [row.bits for row in report.ladder] == [1.5, 2, 2.5, 3, 4, 8]
    assert [row.bytes for row in report.ladder] == [row.bits / 16 * report.original_bytes for row in report.ladder]
    for name in ("rounding", "plain", "coded", "low_rank", "svd", "bound"):
        errors = [getattr(row, name) for row in report.ladder]
        known = [error for error in errors if error is not None]
        assert errors == [None] * (len(errors) - len(known)) + known
        assert known == sorted(known, reverse=True)
        if demo != "lora" or name in ("rounding", "plain", "svd"):  # the bound knows nothing of low-rank deltas
            above = [error >= row.bound for error, row in zip(errors, report.ladder, strict=True) if error is not None]
            assert all(above)


def test_copies_gain_and_natives_lose_nothing_by_codes() -> None:
    for demo in ("upcycled", "permuted", "lora"):
        for row in estimate(demo).ladder:
            assert row.coded is not None
            assert row.plain is not None
            assert row.coded < 0.4 * row.plain
    assert all(row.coded == row.plain for row in estimate("native").ladder)


@pytest.mark.parametrize("demo", keep(DEMOS, "upcycled"))
def test_errors_of_the_ladder_are_those_of_whole_layers(demo: str) -> None:
    report = estimate(demo)
    experts = Experts.open(f"demo:{demo}")
    for row in report.ladder[1:]:
        computed = MoECompressionService.compute(f"demo:{demo}", layers="all", bits=row.bits).layers
        assert row.coded == pytest.approx(sqrt(np.mean([layer.weight_error**2 for layer in computed])), rel=0.1)
    assert [row.rounding_bits for row in report.ladder] == [None, None, 2, 2, 3, 6]
    for row in report.ladder[2:]:
        lost = []
        for number in experts.layers:
            layer = experts.layer(number)
            matrices = [matrix for expert in range(layer.count) for matrix in layer.matrices(expert).values()]
            assert row.rounding_bits
            left = sum(((round_to_bits(matrix, row.rounding_bits) - matrix) ** 2).sum() for matrix in matrices)
            lost.append(left / sum((matrix**2).sum() for matrix in matrices))
        assert row.rounding == pytest.approx(sqrt(np.mean(lost)), rel=0.05)


def test_low_rank_in_the_ladder_is_that_of_the_ratio() -> None:
    report = MoECompressionService.estimate("demo:upcycled", layers=[0], experts=None)
    for row in report.ladder[1:]:
        ranked = MoECompressionService.compute("demo:upcycled", layers=[0], target_ratio=16 / row.bits).layers[0]
        assert row.low_rank == pytest.approx(ranked.weight_error, rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# The advice


def row(bits: float, **errors: float | None) -> LadderRow:
    usual = {"rounding": None, "plain": 0.9, "coded": 0.9, "low_rank": None, "svd": 0.95, "bound": 0.001}
    return LadderRow(bits=bits, bytes=1, rounding_bits=None, **(usual | errors))


def test_advice_names_the_best_at_each_size() -> None:
    rows = [row(2, coded=0.1), row(3, coded=0.05, plain=0.08), row(4, plain=0.02, coded=0.02), row(8, low_rank=0.0)]
    assert advise(rows, 0.09, 16, 2.25) == (
        "smallest error: codes on a base at 2 to 3 bits per weight, plain codes at 4 bits per weight, "
        "a low-rank overlay at 8 bits per weight. "
        "Codes of 2.25 bits are as good as 4-bit quantisation, which takes 4.5 bits with its scales (--as-good-as 4)"
    )
    assert advise(rows, 0.09, 16, None).endswith("at 8 bits per weight")


def test_advice_counts_only_what_makes_the_file_smaller() -> None:
    rows = [row(2, coded=0.1), row(4, plain=0.02, coded=0.02)]
    assert advise(rows, 0.09, 4, 4.4) == "smallest error: codes on a base at 2 bits per weight"
    assert advise(rows, 0.09, 2, 1.9).startswith("nothing")
    assert advise(rows, 0.01, 16, None).startswith("nothing")


def test_a_tie_goes_to_the_simpler_way() -> None:
    assert advise([row(4, rounding=0.1, plain=0.099, coded=0.099)], 0.1, 16, None).startswith(
        "smallest error: plain quantisation"
    )
    assert advise([row(4, rounding=0.1, plain=0.09, coded=0.09)], 0.1, 16, None).startswith(
        "smallest error: plain codes"
    )


def test_advice_of_the_demos() -> None:
    assert estimate("upcycled").advice == estimate("permuted").advice
    assert estimate("upcycled").advice.startswith(
        "smallest error: codes on a base at 1.5 to 8 bits per weight. Codes of 2."
    )
    assert estimate("native").advice.startswith("smallest error: plain codes at 1.5 to 8 bits per weight. Codes of 4.")
