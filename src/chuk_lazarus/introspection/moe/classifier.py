"""From evidence to verdict: the documented rule."""

from dataclasses import dataclass
from typing import Literal

Origin = Literal["UPCYCLED", "NATIVE", "UNDETERMINED"]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where each half of a confidence starts to count and where it is full.

    Documented: upcycled has a gate rank ratio below 5 % and a cosine above 0.25, native above 50 % and below 0.10.
    """

    upcycled_rank_ratio: float = 0.05
    upcycled_cosine: float = 0.25
    native_cosine: float = 0.10
    rank_ratio_between: float = 0.30
    rank_ratio_span: float = 0.30
    decided: float = 0.6


THRESHOLDS = Thresholds()


@dataclass(frozen=True, slots=True)
class Verdict:
    """`confidence` is that of the likelier origin, also where it is too low to decide."""

    origin: Origin
    confidence: float


def clip(value: float) -> float:
    """`value`, or the nearer end of [0, 1]."""
    return min(1.0, max(0.0, value))


def classify(rank_ratio: float, cosine: float, thresholds: Thresholds = THRESHOLDS) -> Verdict:
    """The documented verdict.

    `rank_ratio` is the mean over experts of the gate delta's 95 %-energy rank over the greatest rank it can have,
    `cosine` the mean pairwise cosine of the flattened down projections. Each origin's confidence is half from the one
    and half from the other.
    """
    t = thresholds
    native = 0.5 * clip((t.native_cosine - cosine) / t.native_cosine) + 0.5 * clip(
        (rank_ratio - t.rank_ratio_between) / t.rank_ratio_span
    )
    upcycled = 0.5 * clip((cosine - t.native_cosine) / (t.upcycled_cosine - t.native_cosine)) + 0.5 * clip(
        (t.rank_ratio_between - rank_ratio) / (t.rank_ratio_between - t.upcycled_rank_ratio)
    )
    confidence = max(native, upcycled)
    if confidence < t.decided:
        return Verdict("UNDETERMINED", confidence)
    return Verdict("NATIVE" if native > upcycled else "UPCYCLED", confidence)
