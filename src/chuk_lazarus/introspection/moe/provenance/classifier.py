"""From evidence to verdict: by matched neurons, and the documented rule beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from scipy.special import bdtrc

from ..terms import Origin


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
    experts of few neurons, `times` as many must be found as chance finds, and above `chance` no verdict is NATIVE.

    Copies that were trained far apart are no longer found, and yet still alike in place: by more than `cosine`, of
    which no native has shown a third.
    """

    upcycled: float = 0.10
    native: float = 0.07
    close_upcycled: float = 0.02
    close_native: float = 0.01
    p_value: float = 1e-6
    times: float = 5.0
    chance: float = 0.05
    cosine: float = 0.02
    cosine_p_value: float = 1e-12


LINEAGE = LineageThresholds()


class Neurons(Protocol):
    """What a layer's neurons say, as in `reports.Lineage`."""

    @property
    def neurons(self) -> int: ...
    @property
    def kept(self) -> float: ...
    @property
    def close(self) -> float: ...
    @property
    def chance(self) -> float: ...
    @property
    def cosine(self) -> float: ...
    @property
    def permuted_cosine(self) -> float: ...
    @property
    def cosine_p_value(self) -> float: ...


# How often such a verdict was right on held-out models of known history: the lower ends of 95 % intervals
# (experiments/02_training_history/results.json, "held_out"). Undetermined has no likelier origin.
RATES: dict[Origin, float] = {"UPCYCLED": 0.97, "NATIVE": 0.93, "UNDETERMINED": 0.5}


def classify_by_neurons(evidence: Sequence[Neurons], thresholds: LineageThresholds = LINEAGE) -> Verdict:
    """The verdict by what one layer or several say of their neurons.

    The confidence is a measured rate: how often such verdicts were right.
    """
    t = thresholds
    looked = sum(layer.neurons for layer in evidence)

    def mean(figure: str) -> float:
        return sum(float(getattr(layer, figure)) * layer.neurons for layer in evidence) / looked

    kept, chance = mean("kept"), mean("chance")
    excess, near = kept - chance, mean("close") - chance
    p_value = float(bdtrc(round(kept * looked) - 1, looked, min(1.0, chance)))
    is_found_again = p_value < t.p_value and (excess >= max(t.upcycled, t.times * chance) or near >= t.close_upcycled)
    origin: Origin = "UNDETERMINED"
    if is_found_again or is_alike_in_place(evidence, t):
        origin = "UPCYCLED"
    elif excess < t.native and near < t.close_native and chance <= t.chance:
        origin = "NATIVE"
    return Verdict(origin, RATES[origin])


def is_alike_in_place(evidence: Sequence[Neurons], thresholds: LineageThresholds = LINEAGE) -> bool:
    """Whether neurons at the same position of two experts are alike, as hardly anything but a common origin makes
    them; of several layers the clearest counts, against as many times the probability."""
    looked = sum(layer.neurons for layer in evidence)
    excess = sum((layer.cosine - layer.permuted_cosine) * layer.neurons for layer in evidence) / looked
    least = min(layer.cosine_p_value for layer in evidence) * len(evidence)
    return excess >= thresholds.cosine and least < thresholds.cosine_p_value


@dataclass(frozen=True, slots=True)
class QuickThresholds:
    """What share of the neurons of a part must be found again, closely, in other experts' parts, as a share of
    `reach`, which is what shuffled copies would show; and what reach, and how many neurons, a NATIVE verdict needs."""

    upcycled: float = 0.02
    least: float = 0.005
    native: float = 0.01
    reach: float = 0.25
    neurons: int = 256


QUICK = QuickThresholds()

# As RATES, of verdicts from a quarter of the gates and ups ("quick" in the same file)
QUICK_RATES: dict[Origin, float] = {"UPCYCLED": 0.97, "NATIVE": 0.93, "UNDETERMINED": 0.5}


def classify_quickly(close: float, reach: float, neurons: int, thresholds: QuickThresholds = QUICK) -> Verdict:
    """The verdict by the share of `neurons` that are found again, closely, in a part of the other experts."""
    t = thresholds
    origin: Origin = "UNDETERMINED"
    if close * neurons >= 4 and close >= max(t.least, t.upcycled * reach):
        origin = "UPCYCLED"
    elif close < t.native * reach and reach >= t.reach and neurons >= t.neurons:
        origin = "NATIVE"
    return Verdict(origin, QUICK_RATES[origin])
