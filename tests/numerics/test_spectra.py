"""Energy spectra and ranks against full SVDs, planted ranks, and the Marchenko-Pastur law against sampled matrices."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import sqrt
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.optimize import brentq

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import MoETypeService
from chuk_lazarus.introspection.moe.numerics import device
from chuk_lazarus.introspection.moe.numerics.device import gram_by_mlx
from chuk_lazarus.introspection.moe.numerics.gram import pairwise_cosines, total_energy
from chuk_lazarus.introspection.moe.numerics.lapack import symmetric_eigenvalues, symmetric_eigenvectors
from chuk_lazarus.introspection.moe.numerics.spectra import (
    effective_rank,
    energy_spectrum,
    is_close_call,
    mean_rank,
    noise_decay,
    noise_rank,
    sample_decay,
)
from chuk_lazarus.introspection.moe.weights.codecs import mxfp4, mxfp8
from places import FIXTURES
from sampling import examples

SHAPES = [(48, 96), (96, 48), (64, 64), (1, 40), (40, 1), (1, 1)]


def gaussian(shape: tuple[int, int], seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def energies_by_svd(matrix: NDArray[np.float32]) -> NDArray[np.float64]:
    energies: NDArray[np.float64] = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    return energies


def rank_by_definition(energies: NDArray[np.float64], fraction: float) -> int:
    """The least r whose leading r squared singular values sum to `fraction` of all."""
    return next(r for r in range(1, len(energies) + 1) if energies[:r].sum() >= fraction * energies.sum() * (1 - 1e-12))


@pytest.mark.parametrize("shape", SHAPES)
def test_spectrum_equals_a_full_svd(shape: tuple[int, int]) -> None:
    matrix = gaussian(shape)
    expected = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    found = energy_spectrum(matrix)
    assert found.shape == (min(shape),)
    np.testing.assert_allclose(found, expected, atol=2e-6 * expected.sum())


@cache
def decaying(decay: float) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """A matrix whose singular values fall by a power of their number, and its energies."""
    rng = np.random.default_rng(3)
    left, _ = np.linalg.qr(rng.standard_normal((256, 256)))
    right, _ = np.linalg.qr(rng.standard_normal((512, 256)))
    matrix = ((left * np.arange(1, 257) ** -decay) @ right.T).astype(np.float32)
    return matrix, energies_by_svd(matrix)


@pytest.mark.parametrize("fraction", [0.90, 0.95, 0.99])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.5])
def test_rank_equals_that_of_a_full_svd(fraction: float, decay: float) -> None:
    matrix, energies = decaying(decay)
    assert effective_rank(energy_spectrum(matrix), fraction) == rank_by_definition(energies, fraction)


@pytest.mark.parametrize("rank", [1, 2, 7, 30])
def test_planted_rank_is_found(rank: int) -> None:
    rng = np.random.default_rng(rank)
    left, _ = np.linalg.qr(rng.standard_normal((80, rank)))
    right, _ = np.linalg.qr(rng.standard_normal((120, rank)))
    assert effective_rank(energy_spectrum((left @ right.T).astype(np.float32)), 0.999) == rank


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-14, 1e-10, 1e10, 1e20, 1e30])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (1, 5)])
def test_energies_beyond_float32(shape: tuple[int, int], scale: float) -> None:
    """Their squares, or the sums of these, vanish or overflow in float32."""
    matrix = gaussian(shape) * np.float32(scale)
    expected = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    found = energy_spectrum(matrix)
    np.testing.assert_allclose(found, expected, atol=2e-6 * expected.sum(), rtol=0)
    assert effective_rank(found, 0.95) == effective_rank(expected, 0.95)
    assert total_energy(matrix) == pytest.approx(expected.sum(), rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_no_energy_is_negative(seed: int) -> None:
    """Of a matrix of low rank, where rounding takes eigenvalues to both sides of zero."""
    left, right = gaussian((40, 2), seed), gaussian((2, 60), seed + 1)
    for scale in (1e-20, 1.0):  # by either solver
        found = energy_spectrum((left @ right) * np.float32(scale))
        assert found.min() >= 0
        assert (np.diff(found) <= 0).all()


@pytest.mark.parametrize(
    ("spectrum", "fraction", "rank"),
    [
        ([6.0, 3.0, 1.0], 0.6, 1),
        ([6.0, 3.0, 1.0], 0.61, 2),
        ([6.0, 3.0, 1.0], 0.9, 2),
        ([6.0, 3.0, 1.0], 0.91, 3),
        ([6.0, 3.0, 1.0], 1.0, 3),
        ([0.6, 0.3, 0.1], 1.0, 3),
        ([6e-9, 3e-9, 1e-9], 0.9, 2),
        ([6.0, 3.0, 1.0, 0.0, 0.0], 1.0, 3),
    ],
)
def test_rank_by_hand(spectrum: list[float], fraction: float, rank: int) -> None:
    assert effective_rank(np.array(spectrum), fraction) == rank


def test_mean_rank_by_hand() -> None:
    assert mean_rank([np.array([6.0, 3.0, 1.0]), np.array([10.0, 0.0, 0.0])], 0.9) == 1.5


def test_no_energy_has_rank_zero() -> None:
    assert effective_rank(energy_spectrum(np.zeros((5, 9), np.float32)), 0.95) == 0


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(2, 24), st.integers(2, 24), st.floats(0.01, 100.0), st.integers(0, 2**32 - 1))
def test_rank_is_invariant(rows: int, columns: int, scale: float, seed: int) -> None:
    """Scaling, rotating and transposing a matrix changes no effective rank."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, columns)).astype(np.float32)
    rotation, _ = np.linalg.qr(rng.standard_normal((rows, rows)))
    for other in (matrix * np.float32(scale), (rotation @ matrix).astype(np.float32), matrix.T):
        np.testing.assert_allclose(
            energy_spectrum(other) / energy_spectrum(other).sum(),
            energy_spectrum(matrix) / energy_spectrum(matrix).sum(),
            atol=1e-5,
        )


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_rank_grows_with_the_fraction(energies: list[float], one: float, other: float) -> None:
    spectrum = np.sort(np.array(energies))[::-1]
    low, high = sorted((one, other))
    assert 0 <= effective_rank(spectrum, low) <= effective_rank(spectrum, high) <= len(energies)


@pytest.mark.parametrize(
    ("shape", "published"), [((1024, 2048), 0.777), ((2880, 2880), 0.610), ((2048, 7168), 0.849), ((1408, 2048), 0.712)]
)
def test_noise_rank_is_the_published_one(shape: tuple[int, int], published: float) -> None:
    assert noise_rank(shape, 0.95) / min(shape) == pytest.approx(published, abs=0.002)


@cache
def sampled_energies(shape: tuple[int, int]) -> list[NDArray[np.float64]]:
    """Of five Gaussian matrices."""
    return [energies_by_svd(gaussian(shape, seed)) for seed in range(5)]


@pytest.mark.parametrize("fraction", [0.90, 0.95, 0.99])
@pytest.mark.parametrize("shape", [(128, 256), (256, 128), (200, 200), (64, 1000)])
def test_noise_rank_is_that_of_a_sampled_matrix(shape: tuple[int, int], fraction: float) -> None:
    sampled = np.mean([rank_by_definition(energies, fraction) for energies in sampled_energies(shape)])
    assert noise_rank(shape, fraction) == pytest.approx(sampled, abs=0.01 * min(shape) + 0.5)


@pytest.mark.parametrize(
    "shape", [(1, 1), (64, 64), (63, 64), (1024, 2048), (7168, 2048), (3, 5000), (2, 900_000)], ids=str
)
@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.8, 0.9, 0.95, 0.99, 0.9999])
def test_noise_rank_is_the_integral_of_the_law(shape: tuple[int, int], fraction: float) -> None:
    ratio = min(shape) / max(shape)
    angle = brentq(lambda t: (t - np.sin(t) * np.cos(t)) / np.pi - fraction, 0.0, np.pi, xtol=1e-15)
    share, _ = quad(
        lambda t: 2 * np.sin(t) ** 2 / (np.pi * (1 + ratio + 2 * ratio**0.5 * np.cos(t))), 0.0, angle, epsabs=1e-13
    )
    assert noise_rank(shape, fraction) == pytest.approx(max(1.0, share * min(shape)), rel=1e-9)


def test_noise_rank_of_a_vector_is_one() -> None:
    assert noise_rank((1, 500), 0.95) == 1.0
    assert noise_rank((0, 500), 0.95) == 0.0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_cosines_equal_the_definition(scale: float) -> None:
    vectors = gaussian((6, 50)) * scale
    expected = [
        vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j])
        for i in range(6)
        for j in range(i + 1, 6)
    ]
    np.testing.assert_allclose(pairwise_cosines(vectors.astype(np.float64) @ vectors.T), expected, atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_no_cosine_is_beyond_one(sign: int) -> None:
    """Rounding takes those of parallel vectors a little further."""
    for one in gaussian((50, 7)).astype(np.float64):
        vectors = np.stack([one, sign * one * 3.3])
        found = pairwise_cosines(vectors @ vectors.T)
        assert found == pytest.approx(sign)
        assert abs(found[0]) <= 1


def test_a_zero_vector_has_cosine_zero() -> None:
    vectors = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    np.testing.assert_allclose(pairwise_cosines(vectors @ vectors.T), [0.0, 0.0, 1.0])


@pytest.mark.parametrize("order", [1, 2, 3, 65, 300])
def test_eigenvalues_equal_numpys(order: int) -> None:
    matrix = gaussian((order, order + 7))
    gram = matrix @ matrix.T
    np.testing.assert_allclose(symmetric_eigenvalues(gram), np.linalg.eigvalsh(gram.astype(float)), atol=1e-4 * order)


@pytest.mark.parametrize("order", [1, 2, 3, 65, 300])
def test_eigenvectors_diagonalise(order: int) -> None:
    matrix = gaussian((order, order + 7))
    gram = matrix @ matrix.T
    values, vectors = symmetric_eigenvectors(gram)
    np.testing.assert_allclose(values, symmetric_eigenvalues(gram), atol=1e-4 * order)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(order), atol=1e-4)
    np.testing.assert_allclose((vectors * values) @ vectors.T, gram, atol=1e-4 * order)


def test_eigenvalues_of_many_threads_at_once_are_the_same() -> None:
    grams = [matrix @ matrix.T for matrix in (gaussian((90, 130), seed) for seed in range(24))]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(symmetric_eigenvalues, grams))
    for gram, values in zip(grams, found, strict=True):
        np.testing.assert_array_equal(values, symmetric_eigenvalues(gram))


@pytest.mark.parametrize("shape", [(200, 400), (300, 300), (400, 120)])
def test_the_decay_of_noise_is_that_of_a_gaussian_matrix(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    drawn = [sample_decay(energy_spectrum(rng.standard_normal(shape).astype(np.float32))) for _ in range(5)]
    assert np.mean(drawn, axis=0) == pytest.approx(np.array(noise_decay(shape)), abs=0.03)


@pytest.mark.parametrize(("shape", "points"), [((200, 400), 65), ((300, 300), 65), ((120, 400), 7), ((5, 9), 65)])
def test_the_decay_of_noise_is_that_of_the_marchenko_pastur_law(shape: tuple[int, int], points: int) -> None:
    """By the density of the law, in place of the angles in which the code has it."""
    small, large = shape
    ratio = small / large
    low, high = (1 - sqrt(ratio)) ** 2, (1 + sqrt(ratio)) ** 2

    def share_above(value: float) -> float:
        def density(x: float) -> float:
            return sqrt(max(0.0, (high - x) * (x - low))) / (2 * np.pi * ratio * x)

        return float(quad(density, value, high, limit=200)[0])

    found = noise_decay(shape, points)
    ranks = np.linspace(0, small - 1, min(points, small)).round()
    assert len(found) == len(ranks)
    for rank, value in list(zip(ranks, found, strict=True))[:: max(1, len(ranks) // 6)]:
        share = (rank + 0.5) / small  # the middle of a step
        exact = brentq(lambda x, share=share: share_above(x) - share, max(low, 1e-9), high)
        assert value == pytest.approx(sqrt(exact), abs=1e-3)


def test_decays_have_as_many_points_as_asked_for_or_as_there_are_ranks() -> None:
    spectrum = np.linspace(9.0, 1.0, 200)
    assert len(sample_decay(spectrum)) == len(noise_decay((200, 300))) == 65
    np.testing.assert_allclose(sample_decay(spectrum, 3), np.sqrt(spectrum[[0, 100, 199]] / spectrum.mean()))
    assert len(sample_decay(spectrum[:5])) == len(noise_decay((5, 300))) == 5


@pytest.mark.parametrize("scale", [1e-60, 1e-9, 1e60, 1e307])
def test_the_decay_has_no_scale(scale: float) -> None:
    spectrum = np.linspace(9.0, 1.0, 200)
    np.testing.assert_allclose(sample_decay(spectrum * scale), sample_decay(spectrum), rtol=1e-9)


def test_the_decay_goes_from_the_largest_to_the_smallest_singular_value() -> None:
    values = np.linspace(9.0, 1.0, 200)
    found = sample_decay(values**2)
    assert found[0] == pytest.approx(9 / np.sqrt(np.mean(values**2)))
    assert found[-1] == pytest.approx(1 / np.sqrt(np.mean(values**2)))
    assert not sample_decay(np.zeros(10)).any()


@pytest.mark.parametrize("shape", [*SHAPES, (200, 300)])
def test_products_by_mlx_are_those_by_blas(shape: tuple[int, int]) -> None:
    """On MLX's CPU device; a GPU goes the same way."""
    mx = pytest.importorskip("mlx.core")
    rows = gaussian(shape)
    np.testing.assert_allclose(gram_by_mlx(rows, mx.Device(mx.cpu, 0)), rows @ rows.T, rtol=1e-5, atol=1e-4)


def test_spectra_through_mlx_have_the_same_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    mx = pytest.importorskip("mlx.core")
    matrices = [gaussian((96, 160), seed) * np.linspace(1, 9, 160, dtype=np.float32) for seed in range(4)]
    plain = [energy_spectrum(matrix) for matrix in matrices]
    asked = []
    monkeypatch.setattr(device, "gpu", lambda: asked.append(1) or mx.Device(mx.cpu, 0))
    with ThreadPoolExecutor(4) as pool:
        through = list(pool.map(energy_spectrum, matrices))
    assert len(asked) >= 4
    for one, other in zip(plain, through, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * one[0])
        assert effective_rank(one, 0.95) == effective_rank(other, 0.95)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("shape", [(0,), (7,), (3, 5), (2, 3, 40_000)])
def test_look_ups_by_mlx_are_those_by_numpy(width: int, shape: tuple[int, ...]) -> None:
    """On MLX's CPU device, to the last bit, and as plain indexing has it."""
    mx = pytest.importorskip("mlx.core")
    rng = np.random.default_rng(1)
    table = rng.standard_normal((256, width), dtype=np.float32)
    codes = rng.integers(0, 256, shape, np.uint8)
    wanted = table[codes].reshape(*shape[:-1], -1)
    np.testing.assert_array_equal(device.look_up_by_numpy(table, codes), wanted)
    np.testing.assert_array_equal(device.look_up_by_mlx(table, codes, mx.Device(mx.cpu, 0)), wanted)


def test_codecs_decode_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    mx = pytest.importorskip("mlx.core")
    rng = np.random.default_rng(2)
    parts = {
        "blocks": rng.integers(0, 256, (6, 3, 16), np.uint8),
        "scales": rng.integers(120, 130, (6, 3), np.uint8),
        "weight": rng.integers(0, 120, (6, 96), np.uint8).view(ml_dtypes.float8_e4m3fn),
    }
    decode = {
        "mxfp4": lambda: mxfp4.decode(parts, 0, 6, elements="blocks", scale="scales"),
        "mxfp8": lambda: mxfp8.decode(parts, 0, 6, scale="scales"),
    }
    plain = {name: function() for name, function in decode.items()}
    asked = []
    monkeypatch.setattr(device, "gpu", lambda: asked.append(1) or mx.Device(mx.cpu, 0))
    for name, function in decode.items():
        np.testing.assert_array_equal(function(), plain[name])
    assert len(asked) == 4


@pytest.mark.parametrize("model", ["demo:upcycled", "demo:native", str(FIXTURES / "gpt_oss_mxfp4")])
def test_a_whole_analysis_through_mlx_is_that_of_numpy(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts and ranks to the last digit, other figures to 10^-4, to which some are rounded."""
    mx = pytest.importorskip("mlx.core")
    plain = MoETypeService.analyze(model, layers="all", experts=None).model_dump(exclude={"cost"})
    asked = []
    monkeypatch.setattr(device, "gpu", lambda: asked.append(1) or mx.Device(mx.cpu, 0))
    through = MoETypeService.analyze(model, layers="all", experts=None).model_dump(exclude={"cost"})
    assert asked
    differences = list(leaves(plain, through))
    assert [pair for pair in differences if not isinstance(pair[0], float)] == []
    assert max([abs(one - other) for one, other in differences], default=0.0) < 1.5e-4


def leaves(one: Any, other: Any) -> Iterator[tuple[Any, Any]]:
    """The pairs of values that differ."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list | tuple):
        for pair in zip(one, other, strict=True):
            yield from leaves(*pair)
    elif one != other:
        yield one, other


@pytest.mark.parametrize("wanted", ["gpu", "cuda"])
def test_a_device_that_is_not_there_is_refused(
    wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if wanted == "gpu" and (mx := sys.modules.get("mlx.core")) and mx.is_available(mx.gpu):
        return
    monkeypatch.setenv("LAZARUS_DEVICE", wanted)
    device.gpu.cache_clear()
    assert run(["introspect", "moe-expert", "moe-type-analyze", "-m", "demo:native", "-q"]) == 2
    device.gpu.cache_clear()
    assert capsys.readouterr().err.count("LAZARUS_DEVICE") == 1


def test_no_gpu_is_asked_for_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZARUS_DEVICE", "cpu")
    device.gpu.cache_clear()
    assert device.gpu() is None
    device.gpu.cache_clear()


@pytest.mark.parametrize("share", [0.90, 0.95, 0.99])
@pytest.mark.parametrize("offset", [0.0, 1e-7, -1e-7, 3e-7, -3e-7])
def test_close_calls_are_decided_in_float64(offset: float, share: float) -> None:
    """Energies planted so that the leading ten are such a share of all, but for less than float32 can tell."""
    rng = np.random.default_rng(5)
    energies = np.concatenate([np.full(10, (share + offset) / 10), np.full(30, (1 - share - offset) / 30)])
    left, right = (np.linalg.qr(rng.standard_normal((n, 40)))[0] for n in (40, 80))
    matrix = (left * np.sqrt(energies)) @ right.T
    single = matrix.astype(np.float32)
    exact = np.linalg.svd(single.astype(np.float64), compute_uv=False) ** 2
    assert is_close_call(exact, share)
    assert effective_rank(energy_spectrum(single), share) == effective_rank(exact, share)
    np.testing.assert_allclose(energy_spectrum(single), exact, rtol=1e-10)
    assert not is_close_call(exact, share - 0.03)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize(
    ("spectrum", "close"),
    [
        ([95.0, 5.0], True),
        ([50.0, 45.0, 5.0], True),
        ([95.0, 3.0, 2.0], True),
        ([95.00005, 4.99995], True),
        ([95.0002, 4.9998], False),
        ([50.0, 44.0, 6.0], False),
        ([100.0], False),
        ([0.0, 0.0], False),
    ],
)
def test_which_calls_are_close(spectrum: list[float], close: bool, scale: float) -> None:
    """Within a millionth of the whole, at whatever rank and scale."""
    assert is_close_call(np.array(spectrum) * scale, 0.95) == close
