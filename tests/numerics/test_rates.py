"""What sharing saves, against closed forms and Gaussian copies of a known share."""

from math import log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chuk_lazarus.introspection.moe.numerics.alignment import align, keep_order
from chuk_lazarus.introspection.moe.numerics.gram import gram_matrix
from chuk_lazarus.introspection.moe.numerics.rates import (
    QUALITY,
    mean_saved,
    net_bits,
    saving_bound,
    sharing_rate,
    sharing_rates,
)
from made_layers import copies, native, shuffle


@pytest.mark.parametrize(
    ("cosine", "experts", "bits", "places"),
    [(0.97, 8, 2.03, 2), (0.97, 64, 2.44, 2), (0.9, 8, 1.27, 2), (0.3, 8, 0.12, 2), (0.017, 32, 0.002, 3)],
)
def test_the_bound_by_its_formula(cosine: float, experts: int, bits: float, places: int) -> None:
    assert round(saving_bound(cosine, experts), places) == bits


@given(st.floats(-1, 1), st.integers(2, 300), st.floats(0.5, 8))
def test_the_bound_by_filling_water(cosine: float, experts: int, bits: float) -> None:
    """The water level by bisection, over all eigenvalues one by one."""
    cosine = max(0.0, cosine)
    eigenvalues = np.array([1 + (experts - 1) * cosine] + [1 - cosine] * (experts - 1))
    low, high = 0.0, eigenvalues.max()
    for _ in range(200):
        level = (low + high) / 2
        if np.minimum(level, eigenvalues).mean() < 4.0**-bits:
            low = level
        else:
            high = level
    rate = 0.5 * np.log2(np.maximum(1.0, eigenvalues / high)).mean()
    assert saving_bound(cosine, experts, bits) == pytest.approx(bits - rate, abs=1e-6)


def test_net_bits_by_their_formula() -> None:
    assert net_bits(0.02, 8) == 0.5 * log2(1 / 0.02) - 4 / 8
    assert net_bits(0.02, 64) == 0.5 * log2(1 / 0.02) - 5 / 64
    assert net_bits(7 / 8, 8) == pytest.approx(-0.4, abs=0.01)
    assert net_bits(0.0, 8) == net_bits(1e-30, 8) == QUALITY - 0.5  # the base alone


@pytest.mark.parametrize("experts", [8, 40])
@pytest.mark.parametrize("sigma", [0.1, 0.35, 1.0])
def test_gaussian_copies_of_a_known_share(experts: int, sigma: float) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1, 20_000), np.float32) + sigma * rng.standard_normal((experts, 20_000), np.float32)
    rate = sharing_rate(gram_matrix(rows.astype(np.float32)), [range(experts)])
    share = sigma**2 * (1 - 1 / experts) / (1 + sigma**2)
    assert rate.delta_energy == pytest.approx(share, rel=0.03)
    bound = saving_bound(1 / (1 + sigma**2), experts)
    assert rate.bound == pytest.approx(bound, abs=0.03)
    assert rate.bits_saved == pytest.approx(min(bound, net_bits(share, experts)), abs=0.03)


def test_groups_have_a_base_each() -> None:
    """0.5 log2(1/d) - b0 groups/E; an expert that is alone saves nothing, and is its own delta."""
    rng = np.random.default_rng(1)
    bases, noise = (rng.standard_normal((n, 20_000)).astype(np.float32) for n in (2, 8))
    rows = np.tile(bases, (4, 1)) + 0.5 * noise
    rate = sharing_rate(gram_matrix(rows), [(0, 2, 4, 6), (1, 3, 5, 7)])
    share = 0.25 * 0.75 / 1.25
    assert rate.delta_energy == pytest.approx(share, rel=0.03)
    assert rate.bits_saved == pytest.approx(0.5 * log2(1 / share) - 4 * 2 / 8, abs=0.03)
    assert sharing_rate(gram_matrix(rows), [range(8)]).bits_saved < 0 < rate.bits_saved
    apart = sharing_rate(gram_matrix(rows), [(0, 2, 4, 6), (1,), (3,), (5,), (7,)])
    assert apart.bits_saved == pytest.approx(rate.bits_saved / 2, abs=0.03)
    assert apart.delta_energy == pytest.approx((1 + share) / 2, abs=0.03)
    alone = sharing_rate(gram_matrix(rows), [(e,) for e in range(8)])
    assert (alone.delta_energy, alone.bits_saved, alone.bound) == (1.0, 0.0, 0.0)


def test_experts_of_zeros_and_one_and_the_same() -> None:
    zeros = sharing_rate(np.zeros((4, 4)), [range(4)])
    assert (zeros.delta_energy, zeros.bits_saved, zeros.bound) == (0.0, -1.0, 0.0)
    same = sharing_rate(np.ones((4, 4)), [range(4)])
    assert (same.delta_energy, same.bits_saved) == (0.0, QUALITY - 1.0)
    assert same.bound == pytest.approx(QUALITY - 1.0)


def test_aligned_copies_save_what_unshuffled_ones_do() -> None:
    rng = np.random.default_rng(2)
    copied = copies(rng)
    shuffled = shuffle(rng, copied)
    grams = {role: gram_matrix(matrix.reshape(8, -1)) for role, matrix in shuffled.items()}
    in_place = {role: gram_matrix(matrix.reshape(8, -1)) for role, matrix in copied.items()}
    found = sharing_rates(grams, shuffled, align(shuffled))
    for role, rate in sharing_rates(in_place, copied, keep_order(8, 128)).items():
        assert found[role].delta_energy == pytest.approx(rate.delta_energy, rel=1e-5)
        assert found[role].bits_saved > 1.0
        assert sharing_rate(grams[role], [range(8)]).bits_saved < -0.3


def test_natives_save_nothing() -> None:
    found = native(np.random.default_rng(3))
    grams = {role: gram_matrix(matrix.reshape(8, -1)) for role, matrix in found.items()}
    for rate in sharing_rates(grams, found, align(found)).values():
        assert rate.bits_saved == pytest.approx(-0.4, abs=0.02)
        assert rate.bound < 0.01


def test_what_does_not_pay_is_coded_plainly() -> None:
    assert mean_saved([(2.0, 100), (-0.4, 200), (0.09, 100)]) == 0.5
