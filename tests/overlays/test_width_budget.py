"""Widths within a budget, against the best of all mixes."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chuk_lazarus.introspection.moe.errors import InvalidRequest
from chuk_lazarus.introspection.moe.overlays.codes.affine import AffineCode
from chuk_lazarus.introspection.moe.overlays.width_budget import (
    FLOOR,
    WidthTrial,
    count_bytes,
    widths_reaching,
    widths_within,
)
from sampling import examples

WIDTHS = [AffineCode(bits, group) for bits in (2, 3, 4, 6) for group in (64, 128)]


def trial(rng: np.random.Generator, rows: int) -> WidthTrial:
    """A projection whose errors fall with its widths, roughly as they do."""
    errors = {str(code): 4.0**-code.bits * (1 + code.group / 128) * rng.uniform(0.5, 2) for code in WIDTHS}
    sizes = {str(code): 2 * code.nbytes((rows, 256)) for code in WIDTHS}
    return WidthTrial(2 * rows * 256, sizes, errors, {4: 0.01})


def total(trials: dict[int, WidthTrial], widths: dict[int, str | None]) -> float:
    return sum(trials[unit].error(code) for unit, code in widths.items())


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 1.0))
@settings(max_examples=examples(40), deadline=None)
def test_no_mix_is_much_better(seed: int, part: float) -> None:
    """The best mix within the budget without one unit's largest step errs at least as much as ours."""
    rng = np.random.default_rng(seed)
    trials = {unit: trial(rng, rows) for unit, rows in enumerate((16, 32, 64))}
    least = count_bytes(trials, {unit: t.ladder[0] for unit, t in trials.items()})
    most = count_bytes(trials, {unit: t.ladder[-1] for unit, t in trials.items()})
    budget = least + int(part * (most - least))
    widths = widths_within(trials, budget)
    assert count_bytes(trials, widths) <= budget
    step = max(t.nbytes(b) - t.nbytes(a) for t in trials.values() for a, b in zip(t.ladder, t.ladder[1:], strict=False))
    mixes = (dict(enumerate(mix)) for mix in product(map(str, WIDTHS), repeat=3))
    best = min(total(trials, mix) for mix in mixes if count_bytes(trials, mix) <= max(least, budget - step))
    assert total(trials, widths) <= best * (1 + 1e-9)


def test_equal_projections_get_equal_widths() -> None:
    one = trial(np.random.default_rng(0), 64)
    trials = dict.fromkeys(range(8), one)
    widths = widths_within(trials, 8 * one.nbytes(one.ladder[2]))
    assert set(widths.values()) == {one.ladder[2]}


def test_none_is_below_the_floor_where_the_bytes_allow_it() -> None:
    """A steep projection would take all bytes from a flat one that loses a fifth of its energy."""
    sizes = {str(code): 2 * code.nbytes((64, 256)) for code in WIDTHS}
    flat = WidthTrial(2 * 64 * 256, sizes, {str(code): 0.19 - 0.02 * code.bits for code in WIDTHS}, {})
    steep = WidthTrial(2 * 64 * 256, sizes, {str(code): 0.12 * 4.0 ** (2 - code.bits) for code in WIDTHS}, {})
    least: dict[int, str | None] = {0: "2bit:128", 1: "2bit:128"}
    step = flat.nbytes("4bit:128") - flat.nbytes("2bit:128")
    trials = {0: flat, 1: steep}
    widths = widths_within(trials, count_bytes(trials, least) + step)
    assert flat.error(widths[0]) <= FLOOR < flat.error("2bit:64")
    assert widths_within(trials, count_bytes(trials, least)) == least


def test_too_few_bytes_are_refused_with_the_least() -> None:
    one = trial(np.random.default_rng(0), 64)
    least = 8 * one.nbytes(one.ladder[0]) / one.weights
    with pytest.raises(InvalidRequest, match="out of reach") as refused:
        widths_within({0: one}, one.nbytes(one.ladder[0]) - 1)
    assert f"{least:.2f}" in str(refused.value.hint)


def test_the_first_widths_that_do_are_taken() -> None:
    one = trial(np.random.default_rng(0), 64)
    goal = one.errors[one.ladder[1]]
    assert widths_reaching({0: one}, lambda widths: one.error(widths[0]) <= goal) == {0: one.ladder[1]}
    assert widths_reaching({0: one}, lambda widths: False) == {0: one.ladder[-1]}


def test_without_a_width_that_fits_a_projection_stays() -> None:
    odd = WidthTrial(2 * 8 * 24, {}, {}, {})
    assert widths_within({0: odd}, odd.nbytes(None)) == {0: None}
