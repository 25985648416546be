"""Which code each projection of each layer gets, for a budget of bits a weight.

The law: an expert's delta, whose energy is the share d of the expert's, needs 0.5 log2(1 / d) bits a weight less than
the expert, and the base costs its own bits over the number of experts. Where that does not pay (`numerics.rates`),
experts are coded without a base. All deltas have the same width, or one of two that are neighbours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from ..numerics.rates import PAYS, base_bits, net_bits
from ..weights.expert_layer import ExpertLayer
from .allocation import RankOptions, RankRule, rank_rule
from .codes import LayerCodes, MatrixCode, RoleCodes
from .codes.bits import LEVELS, BitsCode
from .codes.code import Shape, code_bytes
from .codes.low_rank import FactorsCode, SumCode
from .codes.trellis import WIDTHS, TrellisCode, check_encoder

FACTOR_LEVELS = 8  # of the factors, which are kept in 3 bits
RANK_SHARES = (0.25, 0.5, 0.75)  # bits a weight of the factors that are the ladder's lowest rungs
MOST_BITS = 8.0
ROWS = 128  # of each matrix that are coded to measure an error
LITTLE = 0.004  # the share of a budget that may be left
TRIED = (2, 3, 4, 8, 16)  # levels whose errors are measured
TRELLIS_ERRORS = {1: 0.74, 2: 0.60, 3: 0.50, 4: 0.47}  # of trellises, by bits, over those of as many levels


@dataclass(frozen=True, slots=True)
class RoleTrial:
    """What some rows of some experts show of one projection of one layer.

    `delta_share` is d, the share of the experts' energy that their deltas from the coded base have. The errors are of
    deltas and of whole experts, by levels: squared, relative to the experts' energy.
    """

    shape: Shape
    experts: int
    delta_share: float
    delta_errors: dict[int, float]
    plain_errors: dict[int, float]

    @property
    def has_base(self) -> bool:
        """Whether a base pays, by the law."""
        return net_bits(self.delta_share, self.experts) >= PAYS

    def error(self, code: MatrixCode) -> float:
        """The measured error of a code, or that of the nearest one that was measured."""
        errors = self.delta_errors if self.has_base else self.plain_errors
        if isinstance(code, TrellisCode):
            return TRELLIS_ERRORS[code.bits] * errors[1 << code.bits]
        levels = code.levels if isinstance(code, BitsCode) else TRIED[0]
        return errors[min(TRIED, key=lambda tried: abs(tried - levels))]


def group_for(columns: int) -> int:
    """How many weights of a row share a scale: whole groups where that is possible."""
    return 64 if columns % 128 and columns % 64 == 0 else 128


def try_layer(layer: ExpertLayer, alignment: Alignment, resources: Resources) -> dict[str, RoleTrial]:
    """The trials of a layer by role, from a few experts.

    The deltas of a few experts from their own mean are less than those from the mean of all, and made up for it. Raises
    ModelUnreadable where a weight is not finite.
    """
    chosen = evenly_spaced(layer.count, min(4, max(2, layer.count // 8)))
    trials: dict[str, RoleTrial] = {}
    for tensor in layer.tensors:
        rows: dict[str, list[NDArray[np.float32]]] = {role: [] for role in tensor.spec.roles}

        def try_role(role: str, rows: dict[str, list[NDArray[np.float32]]] = rows) -> RoleTrial:
            return _try_rows(layer, role, rows[role])

        for expert in chosen:
            for role, matrix in tensor.matrices(expert).items():
                ordered = permute(role, matrix, alignment.permutations[expert])
                taken = ordered[list(evenly_spaced(len(ordered), ROWS))]
                if not np.isfinite(taken).all():
                    refuse_not_finite(layer, expert, role)
                rows[role].append(np.ascontiguousarray(taken))
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
    `target_ratio` mean such an overlay, of 16 / ratio bits. `trellis` keeps what has one to four bits in trellises,
    which err less and take longer to be made.
    """

    bits: float | None
    coded: bool
    trellis: bool


def overlay_rule(
    *, bits: float | None = None, coded: bool = False, trellis: bool = False, **options: Unpack[RankOptions]
) -> "RankRule | BitRule":
    """The rule that `OverlayOptions` describe; raises InvalidRequest for options that contradict each other."""
    rule = rank_rule(**options)
    if bits is None and not coded:
        if trellis:
            raise InvalidRequest("trellises are wanted, and no size", "give bits, or a ratio of coded experts")
        return rule
    if trellis:
        check_encoder()
    if rule.given or rule.max_error is not None or (bits is not None and rule.target_ratio is not None):
        raise InvalidRequest("codes are wanted together with ranks, an error or a second size", "give bits alone")
    if bits is None:
        if rule.target_ratio is None:
            raise InvalidRequest("codes are wanted, and no size", "give bits, or a ratio")
        bits = 16 / rule.target_ratio
    return BitRule(bits, trellis)


class _Unit(NamedTuple):
    """One projection of one layer, and its codes from the fewest bytes on; `first` is the stage of the first one."""

    layer: int
    role: str
    trial: RoleTrial
    base: BitsCode | None
    ladder: tuple[MatrixCode, ...]
    first: int

    def nbytes(self, code: MatrixCode) -> int:
        return RoleCodes(self.base, code).nbytes(self.trial.shape, self.trial.experts)


@dataclass(frozen=True, slots=True)
class BitRule:
    """Codes within `bits` bits for each weight of the experts, everything counted; with `trellis`, deltas and experts
    without a base are in trellises where these have so many bits.

    Raises InvalidRequest for a number that is not above 0 and at most MOST_BITS.
    """

    bits: float
    trellis: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.bits <= MOST_BITS:
            raise InvalidRequest(f"{self.bits:g} bits a weight", f"give a number above 0 and up to {MOST_BITS:g}")

    def __str__(self) -> str:
        return f"{self.bits:g} bits a weight of the experts, everything counted{', trellis' if self.trellis else ''}"

    def choose(self, trials: Mapping[int, Mapping[str, RoleTrial]]) -> dict[int, LayerCodes]:
        """The codes of every layer; raises InvalidRequest where even the least take more.

        All units climb from stage to stage, those of the largest error first. When no whole step fits, those that would
        come next get scales for shorter groups, and where much is left even then, one gets factors beside its code.
        """
        units = _open_units(trials, self.trellis)
        weights = sum(unit.trial.experts * prod(unit.trial.shape) for unit in units)
        budget = int(self.bits * weights / 8)
        chosen = [unit.ladder[0] for unit in units]
        total = sum(unit.nbytes(code) for unit, code in zip(units, chosen, strict=True))
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
            code = chosen[place]
            finer = BitsCode(code.levels, 64) if isinstance(code, BitsCode) else code
            step = units[place].nbytes(finer) - units[place].nbytes(code)
            if step <= budget - total:
                chosen[place] = finer
                total += step
        if next_units and budget - total > LITTLE * budget:
            chosen[next_units[0]] = _fill(units[next_units[0]], chosen[next_units[0]], budget - total)
        result: dict[int, dict[str, RoleCodes]] = {}
        for unit, code in zip(units, chosen, strict=True):
            result.setdefault(unit.layer, {})[unit.role] = RoleCodes(unit.base, code)
        return {**result}


def _open_units(trials: Mapping[int, Mapping[str, RoleTrial]], trellis: bool) -> list[_Unit]:
    """The units of all layers.

    Those without a base are ahead of the others by the bits that a delta needs less, so that errors are alike.
    """
    shares = [trial.delta_share for roles in trials.values() for trial in roles.values() if trial.has_base]
    saved = [0.5 * log2(1 / share) for share in shares if share]
    ahead = round(float(np.mean(saved))) if saved else 0
    units = []
    for number, roles in trials.items():
        for role, trial in roles.items():
            group = group_for(trial.shape[1])
            bits = _bit_rungs(group, trellis)
            if trial.has_base:
                factors = _factor_rungs(trial.shape, bits[0])
                base = BitsCode(2 ** base_bits(trial.experts), group)
                units.append(_Unit(number, role, trial, base, (*factors, *bits), -len(factors)))
            else:
                units.append(_Unit(number, role, trial, None, bits, -ahead))
    return units


def _bit_rungs(group: int, trellis: bool) -> tuple[MatrixCode, ...]:
    """The codes of ascending bits, trellises where these have so many."""
    trellises = [TrellisCode(width) for width in WIDTHS] if trellis else []
    above = 1 << WIDTHS[-1] if trellis else 0
    return (*trellises, *(BitsCode(levels, group) for levels in LEVELS if levels > above))


def _factor_rungs(shape: Shape, above: MatrixCode) -> list[MatrixCode]:
    """Factors that take fewer bytes than the lowest rung of bits, of ascending rank."""
    numbers, weights = sum(shape), prod(shape)
    ranks = sorted({round(share * weights / (3 * numbers)) for share in RANK_SHARES})
    codes = [FactorsCode(rank, BitsCode(FACTOR_LEVELS)) for rank in ranks if 0 < rank <= min(shape)]
    return [code for code in codes if code_bytes(code, shape) < code_bytes(above, shape)]


def _list_steps(units: Sequence[_Unit]) -> list[tuple[int, MatrixCode, MatrixCode]]:
    """All steps from a unit's code to its next, as (place, from, to), in the order in which they are taken."""
    steps = []
    for place, unit in enumerate(units):
        for rung, (lower, higher) in enumerate(pairwise(unit.ladder)):
            steps.append((unit.first + rung, -unit.trial.error(lower), place, lower, higher))
    steps.sort(key=lambda step: step[:3])
    return [(place, lower, higher) for _, _, place, lower, higher in steps]


def _fill(unit: _Unit, code: MatrixCode, free: int) -> MatrixCode:
    """The unit's code with factors of the greatest rank that takes at most `free` bytes more."""
    shape, bits = unit.trial.shape, BitsCode(FACTOR_LEVELS)
    room = free + unit.nbytes(code)
    least = code.rank if isinstance(code, FactorsCode) else 0
    best = code
    for rank in range(least + 1, min(shape) + 1):
        factors = FactorsCode(rank, bits)
        filled = SumCode(factors, code) if isinstance(code, BitsCode | TrellisCode) else factors
        if unit.nbytes(filled) > room:
            break
        best = filled
    return best
