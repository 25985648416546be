"""From evidence to verdict: by matched neurons, and by the documented rule beside it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from scipy.special import bdtrc

from ..terms import ROLES, Origin


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where each half of a confidence starts to count, and where it is full.

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
    """`confidence` is that of the more probable origin, even if it is too low to decide."""

    origin: Origin
    confidence: float


UNDECIDED = Verdict("UNDETERMINED", 0.5)


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
    """How many of its neurons an expert must share with its best partner, as in `reports.Sharing`.

    With few neurons the share must be so large that natives, sharing as much as the limit allows, reach it with a
    probability of at most `p_value`; strong matches must number at least `matches`. Independent experts that are
    trained on the same data share some neurons, but few, and none as close as `strong` ones. The remains of mostly
    re-initialised copies are also few, but close: from `strong_native` on, it is enough that there are more of them
    than natives have. Natives have at most the share `strong_chance` of these, and `strong_p_value` is the limit for
    the probability of as many by chance.

    Gate and up alone prove less: `without_down` and `native_without_down` are the limits for these. `twins` is the
    share of experts with a twin above which experts were made by copying. If nearly all experts have twins, or all are
    identical, `copies` of each are too many to come from merging pairs.

    Experts whose cosine in place is more than `cosine`, but which share no neurons, have a common component. Either one
    was added to all of them: then it or the deltas have few directions, less than `broad` of what noise has (`full` if
    not even strong matches suggest copies). Or they may be copies that were trained far apart.

    Layers of one real model find up to 4 % of their neurons in each other, none of them strongly, and their attention
    has a CKA of up to 0.4 (experiments/05_parents): `parent`, `parent_strong` and `attention_cka` are above that. Rows
    at the same position have nothing in common unless one comes from the other, or all have a common mean:
    `attention_cosine`, with a CKA of `attention_least`.
    """

    upcycled: float = 0.10
    native: float = 0.05
    p_value: float = 1e-3
    strong: float = 0.01
    matches: int = 4
    strong_native: float = 0.005
    strong_chance: float = 0.0005
    strong_p_value: float = 1e-6
    without_down: float = 0.20
    native_without_down: float = 0.10
    twins: float = 0.9
    copies: float = 2.5
    cosine: float = 0.02
    cosine_p_value: float = 1e-12
    broad: float = 0.5
    full: float = 0.80
    small: float = 0.05
    parent: float = 0.10
    parent_strong: float = 0.01
    roles: int = 2
    parent_p_value: float = 1e-9
    attention_cka: float = 0.5
    attention_cosine: float = 0.2
    attention_least: float = 0.1


LINEAGE = LineageThresholds()


class Breadth(Protocol):
    """How many directions a projection has, as in `reports.Projection`."""

    @property
    def breadth(self) -> Mapping[str, float]: ...
    @property
    def delta_energy(self) -> float: ...


class Sharing(Protocol):
    """Which experts share neurons, as in `reports.Sharing`."""

    @property
    def twins(self) -> Sequence[Sequence[int]]: ...
    @property
    def partners(self) -> Mapping[int, int]: ...

    @property
    def neurons(self) -> int: ...
    @property
    def shared(self) -> float: ...
    @property
    def strong(self) -> float: ...
    @property
    def roles(self) -> int: ...
    @property
    def without_down(self) -> float | None: ...


class Neurons(Protocol):
    """The evidence of a layer's neurons, as in `reports.Lineage`."""

    @property
    def neurons(self) -> int: ...
    @property
    def cosine(self) -> float: ...
    @property
    def permuted_cosine(self) -> float: ...
    @property
    def cosine_p_value(self) -> float: ...
    @property
    def sharing(self) -> Sharing: ...


@dataclass(frozen=True, slots=True)
class Calibration:
    """The probability of UPCYCLED by the weight of the evidence, as `weigh` gives it.

    It goes from `floor` without evidence to `ceiling` with plenty, and is half-way between at a weight of `middle`;
    `slope` is the steepness in the logarithm of the weight. Fitted to models of known history, some of which leave no
    evidence (experiments/04_unseen_histories/calibrate.py).
    """

    floor: float
    ceiling: float
    middle: float
    slope: float

    def probability(self, weight: float) -> float:
        """The probability of UPCYCLED."""
        rise = 1 / (1 + math.exp(-self.slope * math.log(weight / self.middle)))
        return self.floor + (self.ceiling - self.floor) * rise

    def decide(self, origin: Origin, weight: float) -> Verdict:
        """The verdict with the confidence that the evidence gives it; UNDETERMINED if that is at most 0.5."""
        upcycled = self.probability(weight)
        confidence = {"UPCYCLED": upcycled, "NATIVE": 1 - upcycled, "UNDETERMINED": 0.5}[origin]
        return Verdict(origin, confidence) if confidence > 0.5 else UNDECIDED


CALIBRATION = Calibration(floor=0.081, ceiling=0.975, middle=0.296, slope=2.51)
PLENTY = 100.0  # more evidence than this adds nothing


def weigh(figures: Iterable[tuple[float, float]], neurons: int) -> float:
    """The weight of evidence: the largest ratio of a figure to its limit; UPCYCLED begins at 1.

    Figures are shares of `neurons`, each with its limit. Half a neuron is added to each, so that finding none says less
    if few neurons were searched for.
    """
    return max((share * neurons + 0.5) / (neurons + 1) / limit for share, limit in figures)


def weigh_neurons(evidence: Sequence[Neurons], thresholds: LineageThresholds = LINEAGE) -> float:
    """The weight of the evidence of the neurons in layers that were read completely."""
    t, neurons = thresholds, sum(layer.sharing.neurons for layer in evidence)
    limits = {"shared": t.upcycled, "strong": t.strong, "without_down": t.without_down}
    return weigh(
        ((fmean(getattr(layer.sharing, name) or 0.0 for layer in evidence), limit) for name, limit in limits.items()),
        neurons,
    )


def classify_by_neurons(
    evidence: Sequence[Neurons],
    projections: Sequence[Mapping[str, Breadth]],
    thresholds: LineageThresholds = LINEAGE,
) -> Verdict:
    """The verdict from the neurons of one or several layers; `projections` are those of each layer, by role.

    The confidence depends on the weight of the evidence, and on how often such evidence was right.
    """
    t = thresholds
    shared, strong = (fmean(getattr(layer.sharing, figure) for layer in evidence) for figure in ("shared", "strong"))
    without_down = fmean(layer.sharing.without_down or 0.0 for layer in evidence)
    neurons = sum(layer.sharing.neurons for layer in evidence)
    twins = [group for layer in evidence for group in layer.sharing.twins]
    in_place = not twins and is_alike_in_place(evidence, t)
    base_breadth, breadth, delta_energy = describe_components(projections)
    origin: Origin = "UNDETERMINED"
    weight = weigh_neurons(evidence, t)
    roles = min(layer.sharing.roles for layer in evidence)
    if all(len(layer.sharing.partners) == 1 for layer in evidence):  # all experts are identical
        origin, weight = "UPCYCLED" if fmean(map(len, twins)) >= t.copies else "UNDETERMINED", PLENTY
    elif has_shared(shared, neurons, t) or has_strong(strong, neurons, t):
        is_built = is_rebuilt(breadth, delta_energy, strong, t) or has_adapter(base_breadth, strong, t)
        origin = "UNDETERMINED" if is_built or roles < t.roles else "UPCYCLED"
    elif without_down >= t.without_down and _is_more(without_down, neurons, t.native_without_down, t.p_value):
        base_breadth, breadth, delta_energy = describe_components(projections, ("gate", "up"))
        is_built = is_rebuilt(breadth, delta_energy, 0.0, t) or has_adapter(base_breadth, thresholds=t)
        origin = "UNDETERMINED" if is_built else "UPCYCLED"
    elif fmean(map(share_of_twins, evidence)) >= t.twins:
        origin, weight = "UPCYCLED" if fmean(map(len, twins)) >= t.copies else "UNDETERMINED", PLENTY
    elif shared < t.native and strong < t.strong_native and without_down < t.native_without_down:
        base_breadth, breadth, delta_energy = describe_components(projections, over_roles=fmean)
        is_explained = (
            not in_place or is_rebuilt(breadth, delta_energy, thresholds=t) or has_adapter(base_breadth, thresholds=t)
        )
        origin = "NATIVE" if is_explained else "UNDETERMINED"
    return CALIBRATION.decide(origin, weight)


def is_between(evidence: Sequence[Neurons], thresholds: LineageThresholds = LINEAGE) -> bool:
    """Whether more neurons are shared than natives share, but fewer than copies share, and nothing else is similar."""
    has_twins = any(layer.sharing.twins for layer in evidence)
    return weigh_neurons(evidence, thresholds) < 1 and not has_twins and not is_alike_in_place(evidence, thresholds)


def combine(whole: Verdict, parts: Verdict | None, may_be_native: bool) -> Verdict:
    """One verdict from layers that were read completely and further ones that were read in part.

    What copied layers have in common survives in some longer than in others, so the experts are UPCYCLED if either says
    so. Otherwise the complete layers decide. If they can't, the parts do, if `may_be_native` allows it: parts don't
    show similarity in place.
    """
    if parts and parts.origin == "UPCYCLED" != whole.origin:
        return parts
    return parts if parts and whole.origin == "UNDETERMINED" and may_be_native else whole


class ParentNeurons(Protocol):
    """The neurons that were found in a dense parent, as in `reports.ParentMatch`."""

    @property
    def kept(self) -> float: ...
    @property
    def strong(self) -> float: ...
    @property
    def chance(self) -> float: ...
    @property
    def p_value(self) -> float: ...


class ParentAttention(Protocol):
    """How similar the attention is to a dense parent's, as in `reports.AttentionMatch`."""

    @property
    def cka(self) -> float: ...
    @property
    def cosine(self) -> float | None: ...


class ParentEvidence(ParentNeurons, Protocol):
    """All that is compared with a dense parent, as in `reports.ParentMatch`."""

    @property
    def attention(self) -> ParentAttention | None: ...


def has_its_attention(matches: Sequence[ParentEvidence], thresholds: LineageThresholds = LINEAGE) -> bool:
    """Whether the attention, averaged over the layers, is so similar to the parent's that it comes from it."""
    attention = [match.attention for match in matches if match.attention]
    if not attention:
        return False
    t, cka = thresholds, fmean(layer.cka for layer in attention)
    cosines = [layer.cosine for layer in attention if layer.cosine is not None]
    has_its_rows = len(cosines) == len(attention) and fmean(cosines) >= t.attention_cosine
    return cka >= t.attention_cka or (has_its_rows and cka >= t.attention_least)


def is_from_parent(matches: Sequence[ParentNeurons], thresholds: LineageThresholds = LINEAGE) -> bool:
    """Whether so many of the neurons are found in the parent, or so many nearly identical ones, that they come from
    it."""
    if not matches or min(match.p_value for match in matches) >= thresholds.parent_p_value:
        return False
    excess = fmean(match.kept - match.chance for match in matches)
    return excess >= thresholds.parent or fmean(match.strong for match in matches) >= thresholds.parent_strong


def has_strong(strong: float, neurons: int, thresholds: LineageThresholds = LINEAGE) -> bool:
    """Whether a larger share `strong` of the `neurons` is shared strongly than natives have."""
    t = thresholds
    if strong >= t.strong:
        return strong * neurons >= t.matches
    return strong >= t.strong_native and _is_more(strong, neurons, t.strong_chance, t.strong_p_value)


def has_shared(shared: float, neurons: int, thresholds: LineageThresholds = LINEAGE) -> bool:
    """Whether a larger share of the `neurons` is shared than natives have; with few neurons it must be even larger."""
    t = thresholds
    return shared >= t.upcycled and _is_more(shared, neurons, t.native, t.p_value)


def _is_more(share: float, neurons: int, chance: float, p_value: float) -> bool:
    """Whether a share at least this large has a probability below `p_value`, if each neuron has the probability
    `chance`."""
    return bool(bdtrc(round(share * neurons) - 1, neurons, chance) < p_value)


def share_of_twins(layer: Neurons) -> float:
    """The share of the experts that have a twin."""
    repeated = sum(len(group) - 1 for group in layer.sharing.twins)
    return sum(map(len, layer.sharing.twins)) / (len(layer.sharing.partners) + repeated)


def is_rebuilt(
    breadth: float, delta_energy: float, strong: float = 1.0, thresholds: LineageThresholds = LINEAGE
) -> bool:
    """Whether the experts are one base plus low-rank deltas that are not small, as an overlay rebuilds them.

    `breadth` and `delta_energy` are of the deltas, as in `reports.Projection`, `strong` as in `reports.Sharing`.
    """
    t = thresholds
    return delta_energy > t.small and breadth < (t.broad if strong >= t.strong else t.full)


def describe_components(
    projections: Sequence[Mapping[str, Breadth]],
    roles: Sequence[str] = ROLES,
    over_roles: Callable[[Iterable[float]], float] = max,
) -> tuple[float, float, float]:
    """Breadth of bases, breadth of deltas and energy of deltas, means over layers.

    Breadths are those of the role where they are largest, or what `over_roles` takes instead. What was built of few
    directions has few in every role, while scaled columns or neurons leave at least one role as it was. The energy is
    the mean over roles.
    """
    layers = [[by_role[role] for role in by_role if role in roles] for by_role in projections]
    return (
        fmean(over_roles(projection.breadth["base"] for projection in layer) for layer in layers),
        fmean(over_roles(projection.breadth["deltas"] for projection in layer) for layer in layers),
        fmean(projection.delta_energy for layer in layers for projection in layer),
    )


def has_adapter(base_breadth: float, strong: float = 1.0, thresholds: LineageThresholds = LINEAGE) -> bool:
    """Whether what all experts have in common has few directions, like an adapter that was added to all of them.

    `base_breadth` is of the base, as in `reports.Projection`, `strong` as in `reports.Sharing`.
    """
    return base_breadth < (thresholds.broad if strong >= thresholds.strong else thresholds.full)


def is_alike_in_place(evidence: Sequence[Neurons], thresholds: LineageThresholds = LINEAGE) -> bool:
    """Whether neurons at the same position of two experts are similar; of several layers the clearest counts, with its
    p-value multiplied by their number."""
    looked = sum(layer.neurons for layer in evidence)
    excess = sum((layer.cosine - layer.permuted_cosine) * layer.neurons for layer in evidence) / looked
    least = min(layer.cosine_p_value for layer in evidence) * len(evidence)
    return excess >= thresholds.cosine and least < thresholds.cosine_p_value


class Spectrum(Breadth, Protocol):
    """How a projection's spectrum compares with that of noise, as in `reports.Projection`."""

    @property
    def noise_rank_ratio(self) -> float: ...


NOISE = 0.985  # the share of the breadth of noise above which spectra are those of noise
INDEPENDENT = 0.95  # the share of the energy of independent experts' deltas above which experts may be independent
UNTRAINED = "the experts look like random numbers, as before any training"


def looks_untrained(projections: Mapping[str, Spectrum], sharing: Sharing, experts: int) -> bool:
    """Whether a layer's experts can't be distinguished from independent matrices of random numbers.

    Their deltas and their mean have the ranks of noise in every role, and the deltas have all the energy but that of
    the mean, 1 - 1 / experts. This does not affect the verdict: natives begin so.
    """
    breadths = [
        min(projection.noise_rank_ratio, projection.breadth["base"], projection.breadth["deltas"])
        for projection in projections.values()
    ]
    energy = min(projection.delta_energy for projection in projections.values())
    return _is_noise(sharing.shared, breadths, energy / (1 - 1 / experts))


def _is_noise(shared: float, breadths: Iterable[float], energy: float) -> bool:
    """Whether experts share no neurons, all breadths are those of noise, and deltas have the `energy` of independent
    ones, whose is 1."""
    return shared < LINEAGE.native and min(breadths) >= NOISE and energy >= INDEPENDENT


@dataclass(frozen=True, slots=True)
class QuickThresholds:
    """Like LineageThresholds, for the part of a layer that was read.

    Of shuffled copies, the part of another expert holds only the share `reach` of the neurons; `native` is relative to
    it. For a NATIVE verdict, copies would have to show at least `expected` neurons, counting a share `copies` of those
    in reach. Neurons that are shared, but not strongly, count as a sign of copies above `upcycled` and a reach of
    `long`, if two roles agree about them: deltas of few directions look broad in a short part. Of strong ones,
    `matches` are enough. Of 100 million unrelated pairs of neurons with `width` inputs, one is close; with half as many
    inputs, one of 30,000.
    """

    upcycled: float = 0.15
    long: float = 0.5
    roles: int = 2
    strong: float = 0.01
    matches: int = 4
    native: float = 0.10
    strong_native: float = 0.005
    copies: float = 0.20
    expected: int = 16
    width: int = 64


QUICK = QuickThresholds()

QUICK_CALIBRATION = Calibration(floor=0.11, ceiling=0.983, middle=1.097, slope=1.886)


class Part(Protocol):
    """The evidence of a part of a layer, as in `reports.QuickLayer`."""

    @property
    def experts(self) -> Sequence[int]: ...
    @property
    def twins(self) -> Sequence[Sequence[int]]: ...
    @property
    def neurons(self) -> int: ...
    @property
    def inputs(self) -> int: ...
    @property
    def roles(self) -> int: ...
    @property
    def chance(self) -> float: ...
    @property
    def reach(self) -> float: ...
    @property
    def shared(self) -> float: ...
    @property
    def strong(self) -> float: ...
    @property
    def breadth(self) -> float: ...
    @property
    def base_breadth(self) -> float: ...
    @property
    def delta_energy(self) -> float: ...


def classify_quickly(layers: Sequence[Part], thresholds: QuickThresholds = QUICK) -> Verdict:
    """The verdict by the parts of several layers."""
    t = thresholds
    if all(len(group) == len(layer.experts) for layer in layers for group in layer.twins or [()]):
        is_copied = len(layers[0].experts) >= LINEAGE.copies  # and not one of two, duplicated
        return QUICK_CALIBRATION.decide("UPCYCLED", PLENTY) if is_copied else UNDECIDED
    neurons = sum(layer.neurons for layer in layers)
    is_narrow = min(layer.inputs for layer in layers) < t.width
    if not neurons or is_narrow or all(layer.chance == 1.0 for layer in layers):
        return UNDECIDED
    reach, shared, strong, breadth, base_breadth, delta_energy = (
        _mean_over_parts(layers, figure)
        for figure in ("reach", "shared", "strong", "breadth", "base_breadth", "delta_energy")
    )
    has_roles = all(layer.roles >= t.roles for layer in layers)
    is_weak = shared >= t.upcycled and reach >= t.long
    origin: Origin = "UNDETERMINED"
    if is_weak or (strong >= t.strong and strong * neurons >= t.matches):
        if has_roles and not is_rebuilt(breadth, delta_energy, strong) and not has_adapter(base_breadth):
            origin = "UPCYCLED"
    elif fmean(sum(map(len, layer.twins)) / len(layer.experts) for layer in layers) >= LINEAGE.twins:
        pass  # merged or duplicated: what they were before can't be seen in a few experts
    elif shared < t.native * reach and strong < t.strong_native and t.copies * reach * neurons >= t.expected:
        origin = "NATIVE"
    return QUICK_CALIBRATION.decide(origin, weigh_parts(layers, t))


def part_looks_untrained(part: Part) -> bool:
    """As `looks_untrained`, of a part of a layer."""
    return _is_noise(part.shared, (part.breadth, part.base_breadth), part.delta_energy)


def weigh_parts(layers: Sequence[Part], thresholds: QuickThresholds = QUICK) -> float:
    """The weight of the evidence of the neurons in parts of layers."""
    t, neurons = thresholds, sum(layer.neurons for layer in layers)
    limits = {"shared": t.upcycled, "strong": t.strong}
    return weigh(
        ((_mean_over_parts(layers, name), limit) for name, limit in limits.items()),
        neurons,
    )


def _mean_over_parts(layers: Sequence[Part], figure: str) -> float:
    """The mean of a figure over parts, by their neurons; 0 where there are none."""
    neurons = sum(layer.neurons for layer in layers)
    return sum(float(getattr(layer, figure)) * layer.neurons for layer in layers) / neurons if neurons else 0.0
