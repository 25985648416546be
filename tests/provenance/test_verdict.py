"""The documented verdict and the overlay's bytes: every published figure must come out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chuk_lazarus.introspection.moe.numerics.low_rank import original_bytes, overlay_bytes
from chuk_lazarus.introspection.moe.provenance.classifier import Thresholds, classify

GPT_OSS = dict.fromkeys(("gate", "up", "down"), (2880, 2880))
OLMOE = {"gate": (1024, 2048), "up": (1024, 2048), "down": (2048, 1024)}


@pytest.mark.parametrize(
    ("rank_ratio", "cosine", "origin", "confidence"),
    [
        (0.489, 0.017, "NATIVE", 0.73),
        (0.740, 0.000, "NATIVE", 1.00),
        (0.000, 0.418, "UPCYCLED", 1.00),
        (0.554, 0.981, "UNDETERMINED", 0.50),
        (0.300, 0.100, "UNDETERMINED", 0.00),
        (0.480, 0.050, "UNDETERMINED", 0.55),
        (0.450, 0.025, "NATIVE", 0.625),
        (0.175, 0.205, "UPCYCLED", 0.60),
        (0.100, 0.160, "UPCYCLED", 0.60),
        (0.050, 0.175, "UPCYCLED", 0.75),
        (0.900, -0.500, "NATIVE", 1.00),
    ],
)
def test_documented_verdicts(rank_ratio: float, cosine: float, origin: str, confidence: float) -> None:
    verdict = classify(rank_ratio, cosine)
    assert verdict.origin == origin
    assert verdict.confidence == pytest.approx(confidence, abs=0.005)


@pytest.mark.parametrize(
    ("shapes", "experts", "ranks", "ratio"),
    [
        (GPT_OSS, 32, (133, 133, 133), 8.1),
        (GPT_OSS, 32, (1.0, 53.4, 528.6), 6.0),
        (GPT_OSS, 32, (1, 337, 206), 6.4),
        (OLMOE, 64, (755, 772, 785), 0.9),
    ],
)
def test_published_overlay_ratios(
    shapes: dict[str, tuple[int, int]], experts: int, ranks: tuple[float, ...], ratio: float
) -> None:
    overlay = overlay_bytes(shapes, dict(zip(shapes, ranks, strict=True)), experts)
    assert original_bytes(shapes, experts) / overlay == pytest.approx(ratio, abs=0.05)


def test_the_published_ratio_without_its_base() -> None:
    base = overlay_bytes(GPT_OSS, dict.fromkeys(GPT_OSS, 0), 32)
    overlay = overlay_bytes(GPT_OSS, {"gate": 1, "up": 337, "down": 206}, 32)
    assert original_bytes(GPT_OSS, 32) / (overlay - base) == pytest.approx(7.9, abs=0.05)


def test_four_olmoe_layers_are_3072_mebibytes() -> None:
    assert 4 * original_bytes(OLMOE, 64) == 3072 * 2**20


@pytest.mark.parametrize(("decided", "origin"), [(0.75, "NATIVE"), (0.7500001, "UNDETERMINED")])
def test_a_confidence_of_just_enough_decides(decided: float, origin: str) -> None:
    """With thresholds that float arithmetic meets exactly."""
    thresholds = Thresholds(rank_ratio_between=0.25, rank_ratio_span=0.5, decided=decided)
    verdict = classify(0.5, 0.0, thresholds)
    assert (verdict.origin, verdict.confidence) == (origin, 0.75)


@given(st.floats(0, 1), st.floats(-1, 1))
def test_a_verdict_is_consistent(rank_ratio: float, cosine: float) -> None:
    verdict = classify(rank_ratio, cosine)
    assert 0 <= verdict.confidence <= 1
    assert (verdict.origin == "UNDETERMINED") == (verdict.confidence < 0.6)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(-1, 1), st.floats(-1, 1))
def test_more_alike_is_never_more_native(rank_a: float, rank_b: float, cosine_a: float, cosine_b: float) -> None:
    """Lower rank and higher cosine can't turn UPCYCLED into NATIVE."""
    low_rank, high_rank = sorted((rank_a, rank_b))
    low_cosine, high_cosine = sorted((cosine_a, cosine_b))
    if classify(high_rank, low_cosine).origin == "UPCYCLED":
        assert classify(low_rank, high_cosine).origin == "UPCYCLED"
