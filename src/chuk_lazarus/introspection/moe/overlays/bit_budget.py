"""Which code each projection of each layer gets, for a budget of bits a weight.

The law: an expert's delta, whose energy is the share d of the expert's, needs 0.5 log2(1 / d) bits a weight less than
the expert, and the base costs its own bits over the number of experts. Where that does not pay (`numerics.rates`),
experts are coded without a base. All deltas have the same width, or one of two that are neighbours. Where neurons refer
to a bank, its width, that of the deltas and that of the strangers are chosen together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, log2, prod
from typing import NamedTuple, Unpack

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidRequest
from ..jobs.measure import refuse_not_finite
from ..jobs.model import evenly_spaced
from ..jobs.resources import Resources
from ..numerics.alignment import Alignment, permute
from ..numerics.neurons import as_neurons
from ..numerics.rates import PAYS, bank_bits, base_bits, net_bits
from ..weights.expert_layer import ExpertLayer
from .allocation import RankOptions, RankRule, rank_rule
from .bank_budget import bank_delta_share, bank_ladder, sharing_experts
from .codes import BankShape, LayerCodes, MatrixCode, RoleCodes
from .codes.bits import LEVELS, BitsCode
from .codes.code import Shape, code_bytes
from .codes.low_rank import FactorsCode, SumCode

FACTOR_LEVELS = 8  # of the factors, which are kept in 3 bits
RANK_SHARES = (0.25, 0.5, 0.75)  # bits a weight of the factors that are the ladder's lowest rungs
MISSING = 8.0  # times as much as noise of its energy, what is missing of a delta harms: training has put it there
MOST_BITS = 8.0
ROWS = 128  # of each matrix that are coded to measure an error
LITTLE = 0.004  # the share of a budget that may be left
TRIED = (2, 3, 4, 8, 16)  # levels whose errors are measured


@dataclass(frozen=True, slots=True)
class RoleTrial:
    """What some rows of some experts show of one projection of one layer.

    `delta_share` is d, the share of the experts' energy that their deltas from the coded base have. The errors are of
    deltas and of whole experts, by levels: squared, relative to the experts' energy. With a `bank`, d is that of the
    matched neurons' deltas from the exact means, and no errors of deltas are measured.
    """

    shape: Shape
    experts: int
    delta_share: float
    delta_errors: dict[int, float]
    plain_errors: dict[int, float]
    bank: BankShape | None = None

    @property
    def has_base(self) -> bool:
        """Whether a base pays, by the law."""
        if self.bank:
            neurons = self.shape[self.bank.axis]
            saved = bank_bits(self.delta_share, self.experts, neurons, self.bank.matched, self.bank.size)
            return saved >= PAYS
        return net_bits(self.delta_share, self.experts) >= PAYS

    def error(self, codes: RoleCodes) -> float:
        """The measured error of codes, or that of the nearest ones that were measured."""
        if codes.bank:
            return self._bank_error(codes, missing=1.0)
        errors = self.delta_errors if self.has_base else self.plain_errors
        levels = codes.delta.levels if isinstance(codes.delta, BitsCode) else TRIED[0]
        return errors[min(TRIED, key=lambda tried: abs(tried - levels))]

    def harm(self, codes: RoleCodes) -> float:
        """The error of codes with a bank, where what is missing of the deltas along themselves counts more."""
        return self._bank_error(codes, MISSING)

    def _bank_error(self, codes: RoleCodes, missing: float) -> float:
        """A code of least squares with the error e keeps 1 - e of a delta along it; the rest of its error is noise."""
        assert codes.bank is not None
        share, left = codes.bank.matched / self.shape[codes.bank.axis], self.plain_error(codes.delta)
        of_deltas = self.delta_share * left * (1 - left + missing * left) + self.plain_error(codes.base) * left
        return share * of_deltas + (1 - share) * self.plain_error(codes.rest)

    def plain_error(self, code: MatrixCode | None) -> float:
        """The error of a code relative to what it codes: a code of more levels errs less as their square."""
        if not isinstance(code, BitsCode):
            return 1.0
        if code.levels <= TRIED[-1]:
            return self.plain_errors[code.levels]
        return self.plain_errors[TRIED[-1]] * (TRIED[-1] / code.levels) ** 2


def group_for(columns: int) -> int:
    """How many weights of a row share a scale: whole groups where that is possible."""
    return 64 if columns % 128 and columns % 64 == 0 else 128


def try_layer(layer: ExpertLayer, alignment: Alignment, resources: Resources) -> dict[str, RoleTrial]:
    """The trials of a layer by role, from a few experts.

    The deltas of a few experts from their own mean are less than those from the mean of all, and made up for it. Where
    there is a bank, the experts are some that share many of its neurons. Raises ModelUnreadable where a weight is not
    finite.
    """
    count = min(4, max(2, layer.count // 8))
    bank = alignment.bank
    chosen = evenly_spaced(layer.count, count) if bank is None else sharing_experts(bank.index, count)
    trials: dict[str, RoleTrial] = {}
    for tensor in layer.tensors:
        rows: dict[str, list[NDArray[np.float32]]] = {role: [] for role in tensor.spec.roles}
        matched: dict[str, list[NDArray[np.float32]]] = {role: [] for role in tensor.spec.roles}

        def try_role(
            role: str,
            rows: dict[str, list[NDArray[np.float32]]] = rows,
            matched: dict[str, list[NDArray[np.float32]]] = matched,
        ) -> RoleTrial:
            trial = _try_rows(layer, role, rows[role])
            if bank is None:
                return trial
            share = bank_delta_share(matched[role], bank, chosen)
            shape = BankShape(bank.size, bank.index.shape[1], int(role == "down"))
            return replace(trial, delta_share=share, delta_errors={}, bank=shape)

        for expert in chosen:
            for role, matrix in tensor.matrices(expert).items():
                ordered = permute(role, matrix, alignment.permutations[expert])
                taken = ordered[list(evenly_spaced(len(ordered), ROWS))]
                if not np.isfinite(taken).all():
                    refuse_not_finite(layer, expert, role)
                rows[role].append(np.ascontiguousarray(taken))
                if bank is not None:
                    matched[role].append(as_neurons(role, ordered)[: bank.index.shape[1]])
        with resources.worker_threads(layer) as pool:
            trials |= zip(rows, pool.map(try_role, rows), strict=True)
    return {role: trials[role] for role in layer.roles}


def _try_rows(layer: ExpertLayer, role: str, rows: Sequence[NDArray[np.float32]]) -> RoleTrial:
    """The trial of one role, from the same rows of a few experts."""
    count, columns = len(rows), rows[0].shape[1]
    shape = rows[0].shape[0], columns
    group = group_for(columns)
    mean = np.stack(rows).mean(axis=0, dtype=np.float64).astype(np.float32)
    code = BitsCode(2 ** base_bits(layer.count), group)
    lost = mean - code.decode(code.encode(mean), shape)
    factor = np.float32(np.sqrt(count / (count - 1) * (layer.count - 1) / layer.count))
    deltas = [factor * (matrix - mean) + lost for matrix in rows]
    energy = _energy(rows)

    def errors(matrices: Sequence[NDArray[np.float32]]) -> dict[int, float]:
        result = {}
        for levels in TRIED:
            tried = BitsCode(levels, group)
            left = _energy([matrix - tried.decode(tried.encode(matrix), shape) for matrix in matrices])
            result[levels] = left / energy if energy else 0.0
        return result

    share = _energy(deltas) / energy if energy else 0.0
    return RoleTrial(layer.shape(role), layer.count, share, errors(deltas), errors(rows))


def _energy(matrices: Sequence[NDArray[np.float32]]) -> float:
    return sum(float(np.square(matrix, dtype=np.float64).sum()) for matrix in matrices)


class OverlayOptions(RankOptions, total=False):
    """How ranks or codes are chosen, as options of the services: `RankOptions`, or codes.

    `bits` are the bits for each weight of the experts, everything counted, of an overlay in codes. `coded` makes
    `target_ratio` mean such an overlay, of 16 / ratio bits.
    """

    bits: float | None
    coded: bool


def overlay_rule(
    *, bits: float | None = None, coded: bool = False, **options: Unpack[RankOptions]
) -> "RankRule | BitRule":
    """The rule that `OverlayOptions` describe; raises InvalidRequest for options that contradict each other."""
    rule = rank_rule(**options)
    if bits is None and not coded:
        return rule
    if rule.given or rule.max_error is not None or (bits is not None and rule.target_ratio is not None):
        raise InvalidRequest("codes are wanted together with ranks, an error or a second size", "give bits alone")
    if bits is None:
        if rule.target_ratio is None:
            raise InvalidRequest("codes are wanted, and no size", "give bits, or a ratio")
        bits = 16 / rule.target_ratio
    return BitRule(bits)


class _Unit(NamedTuple):
    """One projection of one layer, and its codes from the fewest bytes on, each with the stage at which it is left."""

    layer: int
    role: str
    trial: RoleTrial
    ladder: tuple[RoleCodes, ...]
    stages: tuple[float, ...]

    def nbytes(self, codes: RoleCodes) -> int:
        return codes.nbytes(self.trial.shape, self.trial.experts)


@dataclass(frozen=True, slots=True)
class BitRule:
    """Codes within `bits` bits for each weight of the experts, everything counted.

    Raises InvalidRequest for a number that is not above 0 and at most MOST_BITS.
    """

    bits: float

    def __post_init__(self) -> None:
        if not 0 < self.bits <= MOST_BITS:
            raise InvalidRequest(f"{self.bits:g} bits a weight", f"give a number above 0 and up to {MOST_BITS:g}")

    def __str__(self) -> str:
        return f"{self.bits:g} bits a weight of the experts, everything counted"

    def choose(self, trials: Mapping[int, Mapping[str, RoleTrial]]) -> dict[int, LayerCodes]:
        """The codes of every layer; raises InvalidRequest where even the least take more.

        All units climb from stage to stage, those of the largest error first. When no whole step fits, those that would
        come next get scales for shorter groups, and where much is left even then, one gets factors beside its code.
        """
        units = _open_units(trials)
        weights = sum(unit.trial.experts * prod(unit.trial.shape) for unit in units)
        budget = int(self.bits * weights / 8)
        chosen = [unit.ladder[0] for unit in units]
        total = sum(unit.nbytes(codes) for unit, codes in zip(units, chosen, strict=True)) + _index_bytes(trials)
        if total > budget:
            least = ceil(800 * total / weights) / 100
            raise InvalidRequest(f"{self.bits:g} bits a weight are out of reach", f"the least is {least:.2f}")
        steps = _list_steps(units)
        taken = 0
        for place, lower, higher in steps:
            step = units[place].nbytes(higher) - units[place].nbytes(lower)
            if step > budget - total:
                break
            chosen[place] = higher
            total += step
            taken += 1
        next_units = list(dict.fromkeys(place for place, _, _ in steps[taken:]))
        for place in next_units:
            codes = chosen[place]
            delta = codes.delta
            finer = replace(codes, delta=BitsCode(delta.levels, 64)) if isinstance(delta, BitsCode) else codes
            step = units[place].nbytes(finer) - units[place].nbytes(codes)
            if step <= budget - total:
                chosen[place] = finer
                total += step
        if next_units and budget - total > LITTLE * budget:
            chosen[next_units[0]] = _fill(units[next_units[0]], chosen[next_units[0]], budget - total)
        result: dict[int, dict[str, RoleCodes]] = {}
        for unit, codes in zip(units, chosen, strict=True):
            result.setdefault(unit.layer, {})[unit.role] = codes
        return {**result}


def _open_units(trials: Mapping[int, Mapping[str, RoleTrial]]) -> list[_Unit]:
    """The units of all layers.

    Those without a base are ahead of the others by the bits that a delta needs less, so that errors are alike.
    """
    all_trials = [trial for roles in trials.values() for trial in roles.values()]
    saved = [0.5 * log2(1 / t.delta_share) for t in all_trials if t.has_base and not t.bank and t.delta_share]
    ahead = round(float(np.mean(saved))) if saved else 0
    units = []
    for number, roles in trials.items():
        for role, trial in roles.items():
            group = group_for(trial.shape[1])
            bits = tuple(BitsCode(levels, group) for levels in LEVELS)
            if trial.has_base and trial.bank:
                groups = [group_for(shape[1]) for shape in trial.bank.cut(trial.shape)]
                ladder = bank_ladder(trial.bank, trial.shape, trial.experts, groups, trial.harm)
                stages = [_plain_stage(trial, trial.harm(codes)) - ahead for codes in ladder]
            elif trial.has_base:
                factors = _factor_rungs(trial.shape, bits[0])
                base = BitsCode(2 ** base_bits(trial.experts), group)
                ladder = [RoleCodes(base, code) for code in (*factors, *bits)]
                stages = [float(rung - len(factors)) for rung in range(len(ladder))]
            else:
                ladder = [RoleCodes(None, code) for code in bits]
                stages = [float(rung - ahead) for rung in range(len(ladder))]
            units.append(_Unit(number, role, trial, tuple(ladder), tuple(stages)))
    return units


def _index_bytes(trials: Mapping[int, Mapping[str, RoleTrial]]) -> int:
    """Bytes of the indices of all banks."""
    of_layers = [[t for t in roles.values() if t.bank and t.has_base] for roles in trials.values()]
    return sum(found[0].bank.index(found[0].experts).nbytes for found in of_layers if found and found[0].bank)


def _plain_stage(trial: RoleTrial, error: float) -> float:
    """The stage of a plain code that errs as much, between those of two codes where there is none."""
    errors = [log2(trial.plain_error(BitsCode(levels)) or 1e-30) for levels in LEVELS]
    return float(np.interp(-log2(error or 1e-30), [-each for each in errors], range(len(errors))))


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


def _fill(unit: _Unit, codes: RoleCodes, free: int) -> RoleCodes:
    """The unit's codes with factors of the greatest rank that takes at most `free` bytes more."""
    delta, bits = codes.delta, BitsCode(FACTOR_LEVELS)
    _, shape = codes.sides(unit.trial.shape)["delta"]
    room = free + unit.nbytes(codes)
    least = delta.rank if isinstance(delta, FactorsCode) else 0
    best = codes
    for rank in range(least + 1, min(shape) + 1):
        factors = FactorsCode(rank, bits)
        filled = replace(codes, delta=SumCode(factors, delta) if isinstance(delta, BitsCode) else factors)
        if unit.nbytes(filled) > room:
            break
        best = filled
    return best
