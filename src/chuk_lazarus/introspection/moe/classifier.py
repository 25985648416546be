"""From evidence to verdict: by matched neurons, and the documented rule beside it."""

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


@dataclass(frozen=True, slots=True)
class LineageThresholds:
    """What shares of neurons, beyond chance, must be found again in another expert, and be close relatives.

    Layers of one trained model have up to 6 % of neurons in common in this sense, with no common origin but their
    task (experiments/02_training_history/real_size.json); hardly any of these are close. Where chance finds many, as in
    experts of few neurons, so many `times` that must be found, and more `chance` than that is too much to judge by.
    """

    upcycled: float = 0.10
    native: float = 0.07
    close_upcycled: float = 0.02
    close_native: float = 0.01
    p_value: float = 1e-6
    times: float = 5.0
    chance: float = 0.05


LINEAGE = LineageThresholds()

# How often such a verdict was right on held-out models of known history: the lower ends of 95 % intervals
# (experiments/02_training_history/results.json, "held_out"). Undetermined has no likelier origin.
MEASURED: dict[Origin, float] = {"UPCYCLED": 0.97, "NATIVE": 0.87, "UNDETERMINED": 0.5}


def judge(kept: float, close: float, chance: float, p_value: float, thresholds: LineageThresholds = LINEAGE) -> Verdict:
    """The verdict by the shares of neurons that are found again in another expert, and of those that are close there.

    `chance` is the share to be expected of unrelated experts, `p_value` the probability of `kept` or more by that
    chance. The confidence is a measured rate: how often such verdicts were right.
    """
    t, excess, near = thresholds, kept - chance, close - chance
    origin: Origin = "UNDETERMINED"
    if p_value < t.p_value and (excess >= max(t.upcycled, t.times * chance) or near >= t.close_upcycled):
        origin = "UPCYCLED"
    elif excess < t.native and near < t.close_native and chance <= t.chance:
        origin = "NATIVE"
    return Verdict(origin, MEASURED[origin])
