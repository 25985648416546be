"""Likeness of projections: what it is blind to, what it is 1 and 0 for, and the assignment of a hidden side."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chuk_lazarus.introspection.moe.numerics.similarity import (
    COLUMNS,
    Assignment,
    even_columns,
    find_assignment,
    kernel,
    row_cosine,
    unbiased_cka,
    unbiased_hsic,
)
from sampling import examples

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.tuples(st.integers(1, 96), st.integers(8, 96))


def draw(seed: int, shape: tuple[int, int]) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def cka(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    return unbiased_cka(kernel(left), kernel(right))


@given(SEEDS, SHAPES)
@settings(max_examples=examples(60))
def test_cka_of_equal_matrices_is_one_whatever_turns_their_rows(seed: int, shape: tuple[int, int]) -> None:
    matrix = draw(seed, shape)
    rotation = np.linalg.qr(draw(seed + 1, (shape[0], shape[0])))[0]
    own = unbiased_hsic(kernel(matrix), kernel(matrix))
    if own <= 0:  # of a handful of columns the estimate may say nothing
        assert cka(matrix, matrix) == 0.0
        return
    assert cka(matrix, matrix) == pytest.approx(1.0)
    assert cka(rotation @ matrix, 3 * matrix) == pytest.approx(1.0, abs=1e-3)
    repeated = np.concatenate([matrix, matrix])  # as where keys of a group of heads were copied to each
    assert cka(repeated, matrix) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("shape", [(8, 16), (4, 64), (64, 64), (512, 64), (16, 512), (700, 300)])
def test_cka_of_unrelated_matrices_is_nothing_in_the_mean(shape: tuple[int, int]) -> None:
    """Also where the rows are few: the biased estimate would be near 1 there for any pair."""
    values = [cka(draw(2 * seed, shape), draw(2 * seed + 1, shape)) for seed in range(40)]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error + 1e-3
    assert np.max(np.abs(values)) < 5 / shape[1] ** 0.5


@given(SEEDS)
@settings(max_examples=examples(20))
def test_likeness_is_blind_to_the_scales_of_columns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = draw(seed, (40, 32))
    scaled = matrix * np.exp(rng.normal(0, 2, 32)).astype(np.float32)
    assert cka(even_columns(scaled), even_columns(matrix)) == pytest.approx(1.0, abs=1e-4)
    assert row_cosine(even_columns(scaled), even_columns(matrix)) == pytest.approx(1.0, abs=1e-4)


def test_the_estimate_is_that_of_the_definition() -> None:
    """Song et al. 2012, equation 5, term by term; the factor n (n - 3) is left out."""
    left, right = kernel(draw(0, (9, 12))), kernel(draw(1, (5, 12)))
    n, one = 12, np.ones(12)
    expected = (
        np.trace(left @ right)
        + (one @ left @ one) * (one @ right @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ left @ right @ one)
    )
    assert unbiased_hsic(left, right) == pytest.approx(expected)


def test_wide_matrices_are_sampled_at_the_same_columns() -> None:
    matrix = draw(0, (24, 3 * COLUMNS))
    assert kernel(matrix).shape == (COLUMNS, COLUMNS)
    assert cka(matrix, matrix) == pytest.approx(1.0)
    assert abs(cka(matrix, draw(1, matrix.shape))) < 0.1


def test_rows_are_compared_in_their_places() -> None:
    matrix = draw(0, (64, 32))
    assert row_cosine(matrix, 2 * matrix) == pytest.approx(1.0)
    assert row_cosine(matrix, -matrix) == pytest.approx(-1.0)
    assert row_cosine(matrix, draw(1, (64, 32))) == pytest.approx(0.0, abs=0.1)
    assert row_cosine(matrix, matrix[:32]) is None
    half = matrix.copy()
    half[:32] = 0
    assert row_cosine(matrix, half) == pytest.approx(1.0)
    assert row_cosine(matrix, 0 * matrix) is None


def test_zeros_are_like_nothing() -> None:
    matrix = draw(0, (16, 8))
    assert cka(matrix, 0 * matrix) == 0.0
    assert cka(matrix[:, :3], matrix[:, :3]) == 0.0
    assert not even_columns(0 * matrix).any()


@given(SEEDS, st.sampled_from([16, 33, 96]), st.floats(0, 1))
@settings(max_examples=examples(30))
def test_a_signed_permutation_is_recovered_under_noise(seed: int, hidden: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    embeddings = rng.standard_normal((512, hidden), np.float32)
    order, signs = rng.permutation(hidden), rng.choice(np.float32([-1, 1]), hidden)
    disguised = (embeddings * signs)[:, order] + np.float32(noise) * rng.standard_normal((512, hidden), np.float32)
    found = find_assignment(disguised, embeddings)
    np.testing.assert_array_equal(order[found.order], np.arange(hidden))
    np.testing.assert_array_equal(found.signs, signs)
    assert found.correlation == pytest.approx(1 / np.sqrt(1 + noise**2), abs=0.05)
    restored = found.apply((draw(seed, (5, hidden)) * signs)[:, order])
    np.testing.assert_array_equal(restored, draw(seed, (5, hidden)))


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_the_order_as_it_is_stays(noise: float) -> None:
    embeddings = draw(0, (512, 48))
    found = find_assignment(embeddings + np.float32(noise) * draw(1, (512, 48)), embeddings)
    assert found.is_identity


def test_unrelated_embeddings_stay_as_they_are() -> None:
    found = find_assignment(draw(0, (512, 64)), draw(1, (512, 64)))
    assert found.is_identity
    assert abs(found.correlation) < 0.05


def test_every_column_is_taken_once() -> None:
    """Also where two columns are so alike that both fit one place best."""
    embeddings = draw(0, (512, 24))
    embeddings[:, 5] = embeddings[:, 9] + 0.3 * embeddings[:, 5]
    order = np.random.default_rng(1).permutation(24)
    found = find_assignment(embeddings[:, order] + 0.4 * draw(2, (512, 24)), embeddings)
    assert sorted(found.order) == list(range(24))
    assert np.mean(order[found.order] == np.arange(24)) > 0.9


def test_a_column_that_does_not_vary_is_like_nothing() -> None:
    embeddings = draw(0, (64, 8))
    embeddings[:, 3] = 1
    found = find_assignment(embeddings, embeddings)
    assert found.is_identity
    assert found.correlation == pytest.approx(7 / 8)


def test_an_assignment_names_the_columns_it_takes() -> None:
    assignment = Assignment(np.array([2, 0, 1]), np.array([1, -1, 1], np.float32), 1.0)
    np.testing.assert_array_equal(assignment.apply(np.array([[5, 6, 7]], np.float32)), [[7, -5, 6]])
    assert not assignment.is_identity
