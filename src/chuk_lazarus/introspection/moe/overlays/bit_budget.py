"""Which code each projection of each layer gets, for a budget of bits per weight, or for an error.

The law: an expert's delta, whose energy is the share d of the expert's, needs 0.5 log2(1 / d) bits per weight less than
the expert, and the base costs its own bits divided by the number of experts. If that does not pay (`numerics.rates`),
experts are coded without a base. All deltas have the same width, or one of two neighbouring widths. With a bank, the
widths of bank, deltas and unshared neurons are chosen together; with low-rank deltas, the width of the base, the rank
of the factors and the width of the rest.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, inf, log2, prod, sqrt
from typing import NamedTuple, Unpack

import numpy as np

from ..errors import InvalidRequest
from ..text import parse_size
from .allocation import RankOptions, RankRule, rank_rule
from .bank_budget import bank_ladder
from .codes import LayerCodes, MatrixCode, RoleCodes
from .codes.bits import LEVELS, MATRIX, ROW, BitsCode
from .codes.code import Shape, code_bytes
from .codes.low_rank import FactorsCode, SumCode
from .codes.trellis import WIDTHS, TrellisCode, check_encoder
from .factor_budget import FACTOR_BITS, factor_ladder
from .trials import LEAST_ERROR, MISSING, PLAIN_BITS, RoleTrial, group_for

FACTOR_LEVELS = 8  # of the factors, which are kept in 3 bits
FEWER_LEVELS = (4, 2)  # of factors that only use up the rest of the budget
RANK_SHARES = (0.25, 0.5, 0.75)  # bits per weight of the factors that are the ladder's lowest rungs
NO_DELTA = -2.0  # the stage of a unit without deltas; that of deltas of one bit is 0
MOST_BITS = 8.0
LITTLE = 0.004  # the share of a budget that may be left
USUAL_BITS = 4  # of the plain quantisation that codes match by default
MARGIN = 0.97  # the share of an allowed squared error that is used, since it is measured on a part
UNBIASED = 1.15  # factor by which the squared error of unbiased deltas counts in outputs
ROUNDS = 12  # of looking for the bits that fill a folder


class OverlayOptions(RankOptions, total=False):
    """How ranks or codes are chosen, as options of the services: `RankOptions`, or codes.

    `bits` is the budget per weight of the experts, everything counted; `fit` the size of the whole folder in bytes, a
    number or a string such as "24GB". `as_good_as` takes the fewest bytes whose error is at most that of plain
    quantisation at that many bits. `coded` makes `max_error` and `target_ratio` choose codes, and alone means
    `as_good_as` 4. `trellis` uses trellises for codes of one to four bits; their error is smaller, and encoding takes
    longer.
    """

    bits: float | None
    fit: int | str | None
    as_good_as: int | None
    coded: bool
    trellis: bool


def overlay_rule(
    *,
    bits: float | None = None,
    fit: int | str | None = None,
    as_good_as: int | None = None,
    coded: bool = False,
    trellis: bool = False,
    **options: Unpack[RankOptions],
) -> "RankRule | BitRule":
    """The rule that `OverlayOptions` describe; raises InvalidRequest for options that contradict each other."""
    rule = rank_rule(**options)
    if not coded and bits is None and fit is None and as_good_as is None:
        if trellis:
            raise InvalidRequest("trellises need codes", "give bits, a size or coded, too")
        return rule
    if trellis:
        check_encoder()
    if rule.given:
        raise InvalidRequest("both codes and ranks are given", "give one of the two")
    targets = {
        "bits": bits,
        "the size of a folder": fit,
        "a width to be as good as": as_good_as,
        "a maximum error": rule.max_error,
        "a ratio": rule.target_ratio,
    }
    given = [name for name, target in targets.items() if target is not None]
    if len(given) > 1:
        raise InvalidRequest(f"both {given[0]} and {given[1]} are given", "give one of the two")
    if rule.target_ratio is not None:
        if 16 / rule.target_ratio > MOST_BITS:
            raise InvalidRequest(
                f"codes can't have a ratio of {rule.target_ratio:g}", f"give {16 / MOST_BITS:g} or more"
            )
        return BitRule(16 / rule.target_ratio, trellis=trellis)
    size = parse_size(fit, "the size of the folder") if isinstance(fit, str) else fit
    return BitRule(bits, rule.max_error, as_good_as if given else USUAL_BITS, size, trellis)


class _Unit(NamedTuple):
    """One projection of one layer, and its codes from the fewest bytes on, each with the stage at which it is
    replaced."""

    layer: int
    role: str
    trial: RoleTrial
    ladder: tuple[RoleCodes, ...]
    stages: tuple[float, ...]

    def nbytes(self, codes: RoleCodes) -> int:
        return codes.nbytes(self.trial.shape, self.trial.experts)


@dataclass(frozen=True, slots=True)
class BitRule:
    """How codes are chosen: by exactly one of four targets.

    `bits` per weight of the experts, everything counted; `max_error`, the largest relative weight error of the experts
    of each layer; `as_good_as`, the bits of the plain quantisation whose error each layer must not exceed; or `fit`,
    the size of the whole folder in bytes. With `trellis`, deltas and experts without a base are in trellises if these
    have that many bits. Raises InvalidRequest for a number out of range.
    """

    bits: float | None = None
    max_error: float | None = None
    as_good_as: int | None = None
    fit: int | None = None
    trellis: bool = False

    def __post_init__(self) -> None:
        if self.bits is not None and not 0 < self.bits <= MOST_BITS:
            raise InvalidRequest(
                f"there are no codes of {self.bits:g} bits per weight", f"give a number above 0 and up to {MOST_BITS:g}"
            )
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise InvalidRequest(f"the maximum error is {self.max_error:g}", "give a share between 0 and 1")
        if self.as_good_as is not None and self.as_good_as not in PLAIN_BITS:
            known = ", ".join(map(str, PLAIN_BITS[:-1]))
            raise InvalidRequest(
                f"there is no plain quantisation of {self.as_good_as:g} bits", f"give {known} or {PLAIN_BITS[-1]}"
            )
        if self.fit is not None and not 0 < self.fit < inf:
            raise InvalidRequest(f"a folder can't have {self.fit:,} bytes", "give a size such as 20GB")

    def __str__(self) -> str:
        return f"{self._goal}{', trellises' if self.trellis else ''}"

    @property
    def _goal(self) -> str:
        if self.max_error is not None:
            return f"fewest bits with a relative weight error of at most {self.max_error:g}"
        if self.as_good_as is not None:
            return f"fewest bits as good as plain {self.as_good_as}-bit quantisation"
        if self.fit is not None:
            return f"a folder of at most {self.fit:,} bytes"
        return f"{self.bits:g} bits per expert weight, scales included"

    @property
    def options(self) -> str:
        """The rule as options of the command line."""
        trellis = " --trellis" if self.trellis else ""
        if self.max_error is not None:
            return f"--max-error {self.max_error} --coded{trellis}"
        if self.as_good_as is not None:
            return f"--as-good-as {self.as_good_as}{trellis}"
        return f"--bits {self.bits}{trellis}" if self.fit is None else f"--fit {self.fit}{trellis}"

    def choose(self, trials: Mapping[int, Mapping[str, RoleTrial]]) -> dict[int, LayerCodes]:
        """The codes of every layer; raises InvalidRequest if even the smallest take more, or if even the best have a
        larger error.

        `fit` is not chosen for directly: `fit_bits` converts it to bits per weight.
        """
        if self.bits is not None:
            return _within(self.bits, trials, self.trellis)
        chosen: dict[int, LayerCodes] = {}
        for number, roles in trials.items():
            chosen |= self._reach(number, roles)
        return chosen

    def _reach(self, number: int, roles: Mapping[str, RoleTrial]) -> dict[int, LayerCodes]:
        """The fewest bits with which a layer meets the rule.

        To be as good as plain quantisation, deltas of low rank may be in factors, if that takes fewer bytes.
        """
        found = [self._climb(number, roles, with_factors=False)]
        is_low_rank = any(trial.has_base and trial.spectrum and not trial.bank for trial in roles.values())
        if self.as_good_as is not None and is_low_rank:
            with suppress(InvalidRequest):
                found.append(self._climb(number, roles, with_factors=True))
        return _by_layer(*min(found, key=lambda each: _count_bytes(*each)))

    def _climb(
        self, number: int, roles: Mapping[str, RoleTrial], *, with_factors: bool
    ) -> tuple[list[_Unit], list[RoleCodes]]:
        """The units of a layer, and the first codes that meet the rule.

        They climb as in `_within`. Before each step, scales for shorter groups are tried instead. What factors leave is
        in few directions, so at equal errors of weights the outputs have larger errors: codes with factors count by
        their harm.
        """
        units = _open_units({number: roles}, self.trellis, with_factors=with_factors)
        prices = self._prices(roles)

        def loss_of(trial: RoleTrial, codes: RoleCodes) -> float:
            return trial.harm(codes) if isinstance(codes.delta, FactorsCode | SumCode) else trial.error(codes)

        def loss(codes: Sequence[RoleCodes]) -> float:
            return sum(prices[unit.role] * loss_of(unit.trial, each) for unit, each in zip(units, codes, strict=True))

        chosen = [unit.ladder[0] for unit in units]
        steps = _list_steps(units)
        for taken in range(len(steps) + 1):
            finer = list(chosen)
            for place in [None, *(_next_places(steps[taken:]) or range(len(units)))]:
                if place is not None and not _has_few_scales(finer[place].delta):
                    finer[place] = _shorten(finer[place])
                if loss(finer) <= MARGIN:
                    return units, finer
            for place, _, higher in steps[taken : taken + 1]:
                chosen[place] = higher
        goal = (
            f"within a weight error of {self.max_error:g}"
            if self.max_error is not None
            else f"as good as plain quantisation at {self.as_good_as} bits"
        )
        factor = sqrt(loss(finer) / MARGIN)
        raise InvalidRequest(
            f"layer {number}: no codes are {goal}", f"the smallest error is {factor:.3g} times as large"
        )

    def _prices(self, roles: Mapping[str, RoleTrial]) -> dict[str, float]:
        """By role, the cost of the role's squared relative error, as a multiple of the loss that a layer may have.

        A maximum error is that of all weights together. `as_good_as` is measured in units of plain quantisation's
        error, role by role, since the outputs depend on each role's relative error.
        """
        if self.max_error is not None:
            allowed = self.max_error**2 * sum(trial.energy for trial in roles.values())
            return {role: trial.energy / allowed if allowed else 0.0 for role, trial in roles.items()}
        assert self.as_good_as is not None
        return {
            role: (UNBIASED if trial.unbiased else 1)
            / len(roles)
            / max(trial.rounding_errors[self.as_good_as], LEAST_ERROR)
            for role, trial in roles.items()
        }


def _within(bits: float, trials: Mapping[int, Mapping[str, RoleTrial]], trellis: bool) -> dict[int, LayerCodes]:
    """The best codes of at most that many bits per weight; raises InvalidRequest if even the smallest take more.

    All units climb from stage to stage, those with the largest error first. When no whole step fits, the next ones get
    scales for shorter groups and, if much is still left, factors beside their code, and shorter groups in these.
    """
    units = _open_units(trials, trellis)
    weights = _count_weights(units)
    budget = int(bits * weights / 8)
    chosen = [unit.ladder[0] for unit in units]
    free = budget - _count_bytes(units, chosen) - _index_bytes(trials)
    if free < 0:
        least = ceil(800 * (budget - free) / weights) / 100
        raise InvalidRequest(f"{bits:g} bits per weight are out of reach", f"the least is {least:.2f}")
    steps = _list_steps(units)
    taken = 0

    def replace_codes(place: int, codes: RoleCodes) -> bool:
        """Whether the codes fit in the place of the unit's; if so, it has them."""
        nonlocal free
        more = units[place].nbytes(codes) - units[place].nbytes(chosen[place])
        if more > free:
            return False
        chosen[place] = codes
        free -= more
        return True

    while taken < len(steps) and replace_codes(steps[taken][0], steps[taken][2]):
        taken += 1
    next_places = _next_places(steps[taken:])
    for place in next_places:
        replace_codes(place, _shorten(chosen[place]))
    for place in next_places:
        if free > LITTLE * budget:
            replace_codes(place, _fill(units[place], chosen[place], free))
    for place in next_places:
        if free > LITTLE * budget:
            replace_codes(place, _shorten_factors(chosen[place]))
    return _by_layer(units, chosen)


def fit_bits(
    size: int,
    trials: Mapping[int, Mapping[str, RoleTrial]],
    folder_bytes: Callable[[Mapping[int, LayerCodes]], int],
    trellis: bool = False,
) -> float:
    """The bits per weight at which a whole folder takes at most `size` bytes, and nearly as many.

    `trials` are those of all overlaid layers, and `folder_bytes` gives the size of a folder with some codes. Raises
    InvalidRequest if even the smallest codes take more.
    """
    units = _open_units(trials, trellis)
    weights = _count_weights(units)
    least = [unit.ladder[0] for unit in units]
    taken = folder_bytes(_by_layer(units, least))
    if taken > size:
        raise InvalidRequest(f"a folder of {size:,} bytes is out of reach", f"the least takes {taken:,}")
    best = bits = 8 * (_count_bytes(units, least) + _index_bytes(trials) + 0.5) / weights
    most, too_many = taken, inf
    for _ in range(ROUNDS):  # names and texts of other codes take other bytes, so that one step is not enough
        bits = min(MOST_BITS, bits + 8 * (size - taken) / weights)
        if not best < bits < too_many:
            bits = (best + min(MOST_BITS, too_many)) / 2
        taken = folder_bytes(_within(bits, trials, trellis))
        if taken > size:
            too_many = min(too_many, bits)
        elif taken > most:
            best, most = bits, taken
        if best == MOST_BITS or 0 <= size - most < LITTLE * size:
            break
    return best


def _count_weights(units: Sequence[_Unit]) -> int:
    return sum(unit.trial.experts * prod(unit.trial.shape) for unit in units)


def _count_bytes(units: Sequence[_Unit], codes: Sequence[RoleCodes]) -> int:
    return sum(unit.nbytes(each) for unit, each in zip(units, codes, strict=True))


def _by_layer(units: Sequence[_Unit], codes: Sequence[RoleCodes]) -> dict[int, LayerCodes]:
    result: dict[int, dict[str, RoleCodes]] = {}
    for unit, each in zip(units, codes, strict=True):
        result.setdefault(unit.layer, {})[unit.role] = each
    return {**result}


def _open_units(
    trials: Mapping[int, Mapping[str, RoleTrial]], trellis: bool, *, with_factors: bool = True
) -> list[_Unit]:
    """The units of all layers.

    Those without a base are ahead of the others by the bits that a delta saves, so that errors are similar.
    """
    all_trials = [trial for roles in trials.values() for trial in roles.values()]
    saved = [0.5 * log2(1 / t.delta_share) for t in all_trials if t.has_base and not t.bank and t.delta_share]
    ahead = round(float(np.mean(saved))) if saved else 0
    units = []
    for number, roles in trials.items():
        for role, trial in roles.items():
            bits = _bit_rungs(trial, trellis)
            if trial.has_base and trial.bank:
                of_bank = group_for(trial.bank.cut(trial.shape)[0][1])
                ladder = bank_ladder(trial.bank, trial.shape, trial.experts, of_bank, bits, trial.harm)
                ladder = [replace(codes, unbiased=trial.unbiased) for codes in ladder]
                stages = [_plain_stage(trial, trial.harm(codes)) - ahead for codes in ladder]
            elif trial.has_base and trial.spectrum and with_factors:
                usual = trial.usual_base
                bases = [BitsCode(levels, usual.group) for levels in LEVELS if levels >= usual.levels]
                ladder = factor_ladder(
                    trial.shape,
                    trial.experts,
                    bases,
                    bits,
                    trial.delta_energies,
                    trial.left_by,
                    MISSING,
                    trial.unbiased,
                )
                stages = _delta_stages(trial, bits, ladder)
            elif trial.has_base:
                factors = _factor_rungs(trial.shape, bits[0]) if with_factors else []
                ladder = [RoleCodes(trial.usual_base, code, unbiased=trial.unbiased) for code in (*factors, *bits)]
                stages = [float(rung - len(factors)) for rung in range(len(ladder))]
            else:
                ladder = [RoleCodes(None, code) for code in bits]
                stages = [float(rung - ahead) for rung in range(len(ladder))]
            units.append(_Unit(number, role, trial, tuple(ladder), tuple(stages)))
    return units


def _bit_rungs(trial: RoleTrial, trellis: bool) -> tuple[BitsCode | TrellisCode, ...]:
    """The codes of ascending bits, trellises if these have that many."""
    trellises = [TrellisCode(width) for width in WIDTHS] if trellis else []
    above = 1 << WIDTHS[-1] if trellis else 0
    return (*trellises, *(trial.rung(levels) for levels in LEVELS if levels > above))


def _index_bytes(trials: Mapping[int, Mapping[str, RoleTrial]]) -> int:
    """Bytes of the indices of all banks."""
    of_layers = [[t for t in roles.values() if t.bank and t.has_base] for roles in trials.values()]
    return sum(found[0].bank.index(found[0].experts).nbytes for found in of_layers if found and found[0].bank)


def _plain_stage(trial: RoleTrial, error: float) -> float:
    """The stage of a plain code with the same error, or between those of two codes."""
    errors = [log2(trial.plain_error(trial.rung(levels)) or LEAST_ERROR) for levels in LEVELS]
    return float(np.interp(-log2(error or LEAST_ERROR), [-each for each in errors], range(len(errors))))


def _delta_stages(trial: RoleTrial, rungs: Sequence[MatrixCode], ladder: Sequence[RoleCodes]) -> list[float]:
    """The stages of the codes of a delta, `rungs`, with the same harm, or between those of two."""
    codes = [RoleCodes(trial.usual_base, code) for code in (FactorsCode(0, FACTOR_BITS[0]), *rungs)]
    marks, wanted = ([-log2(max(trial.harm(each), LEAST_ERROR)) for each in side] for side in (codes, ladder))
    return [float(stage) for stage in np.interp(wanted, marks, [NO_DELTA, *range(len(rungs))])]


def _factor_rungs(shape: Shape, above: MatrixCode) -> list[MatrixCode]:
    """Factors that take fewer bytes than the lowest rung of bits, of ascending rank."""
    numbers, weights = sum(shape), prod(shape)
    ranks = sorted({round(share * weights / (3 * numbers)) for share in RANK_SHARES})
    codes = [FactorsCode(rank, BitsCode(FACTOR_LEVELS)) for rank in ranks if 0 < rank <= min(shape)]
    return [code for code in codes if code_bytes(code, shape) < code_bytes(above, shape)]


def _list_steps(units: Sequence[_Unit]) -> list[tuple[int, RoleCodes, RoleCodes]]:
    """All steps from a unit's code to its next, as (place, from, to), in the order in which they are taken."""
    steps = []
    for place, unit in enumerate(units):
        for rung, (lower, higher) in enumerate(pairwise(unit.ladder)):
            steps.append((unit.stages[rung], -unit.trial.error(lower), place, rung, lower, higher))
    steps.sort(key=lambda step: step[:4])
    return [(place, lower, higher) for _, _, place, _, lower, higher in steps]


def _next_places(steps: Sequence[tuple[int, RoleCodes, RoleCodes]]) -> list[int]:
    """The places of the units that these steps take further, each once, in order."""
    return list(dict.fromkeys(place for place, _, _ in steps))


def _has_few_scales(code: MatrixCode) -> bool:
    """Whether a code has one scale for a row or for the matrix: more of them would lessen its error little."""
    return isinstance(code, BitsCode) and code.group in (ROW, MATRIX)


def _shorten(codes: RoleCodes) -> RoleCodes:
    """The codes with a scale for each 64 weights of the deltas, where they can have that."""
    delta = codes.delta
    return replace(codes, delta=BitsCode(delta.levels, 64)) if isinstance(delta, BitsCode) else codes


def _shorten_factors(codes: RoleCodes) -> RoleCodes:
    """The codes with a scale for each 64 numbers of the deltas' factors, where they have some."""
    delta = codes.delta
    if isinstance(delta, FactorsCode):
        return replace(codes, delta=replace(delta, bits=BitsCode(delta.bits.levels, 64)))
    if isinstance(delta, SumCode):
        factors = replace(delta.factors, bits=BitsCode(delta.factors.bits.levels, 64))
        return replace(codes, delta=replace(delta, factors=factors))
    return codes


def _fill(unit: _Unit, codes: RoleCodes, free: int) -> RoleCodes:
    """The unit's codes with factors of the deltas, of the greatest rank that takes at most `free` bytes more.

    They have FACTOR_LEVELS, or fewer if little is free; if the spectrum is known, the code with the least harm.
    """
    delta, room = codes.delta, free + unit.nbytes(codes)
    if isinstance(delta, FactorsCode | SumCode):
        raised = _raise_rank(unit, codes, delta, room)
        if unit.trial.spectrum is None:
            return raised
        others = [_raise_rank(unit, codes, each, room) for each in _recode_factors(delta)]
        return min([raised, *(each for each in others if unit.nbytes(each) <= room)], key=unit.trial.harm)
    if isinstance(delta, BitsCode | TrellisCode):
        for levels in (FACTOR_LEVELS, *FEWER_LEVELS):
            filled = SumCode(FactorsCode(1, BitsCode(levels)), delta)
            if unit.nbytes(replace(codes, delta=filled)) <= room:
                return _raise_rank(unit, codes, filled, room)
    return codes


def _recode_factors(delta: FactorsCode | SumCode) -> list[FactorsCode | SumCode]:
    """The code of a delta with the lowest rank, in factors of each code."""
    factors = [FactorsCode(1, bits) for bits in FACTOR_BITS]
    return [*factors] if isinstance(delta, FactorsCode) else [replace(delta, factors=each) for each in factors]


def _raise_rank(unit: _Unit, codes: RoleCodes, delta: FactorsCode | SumCode, room: int) -> RoleCodes:
    """The codes with the greatest rank of the delta's factors, from its own on, that takes at most `room` bytes."""
    best = replace(codes, delta=delta)
    factors = delta if isinstance(delta, FactorsCode) else delta.factors
    _, shape = codes.sides(unit.trial.shape)["delta"]
    for rank in range(factors.rank + 1, min(shape) + 1):
        higher = replace(factors, rank=rank)
        raised = replace(codes, delta=higher if isinstance(delta, FactorsCode) else replace(delta, factors=higher))
        if unit.nbytes(raised) > room:
            break
        best = raised
    return best
