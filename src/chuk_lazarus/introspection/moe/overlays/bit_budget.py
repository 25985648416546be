"""Which code each projection of each layer gets, for a budget of bits a weight, or for an error.

The law: an expert's delta, whose energy is the share d of the expert's, needs 0.5 log2(1 / d) bits a weight less than
the expert, and the base costs its own bits over the number of experts. Where that does not pay (`numerics.rates`),
experts are coded without a base. All deltas have the same width, or one of two that are neighbours. Where neurons refer
to a bank, its width, that of the deltas and that of the strangers are chosen together; where deltas are of low rank,
the width of the base, the rank of their factors and the width of the rest.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import pairwise
from math import ceil, inf, log2, prod, sqrt
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
from ..text import parse_size
from ..weights.expert_layer import ExpertLayer, ExpertTensor
from .allocation import RankOptions, RankRule, rank_rule
from .bank_budget import bank_delta_share, bank_ladder, sharing_experts
from .codes import BankShape, LayerCodes, MatrixCode, RoleCodes
from .codes.bits import LEVELS, MATRIX, ROW, BitsCode
from .codes.code import Shape, as_shape, code_bytes
from .codes.low_rank import FactorsCode, SumCode
from .codes.trellis import WIDTHS, TrellisCode, check_encoder
from .factor_budget import FACTOR_BITS, DeltaSpectrum, as_noise, factor_ladder, measure_tails, participation
from .quantisation import round_to_bits

FACTOR_LEVELS = 8  # of the factors, which are kept in 3 bits
FEWER_LEVELS = (4, 2)  # of factors that only fill what is left
RANK_SHARES = (0.25, 0.5, 0.75)  # bits a weight of the factors that are the ladder's lowest rungs
MISSING = 8.0  # times as much as noise of its energy, what is missing of a delta harms: training has put it there
NO_DELTA = -2.0  # the stage of a unit without deltas; that of deltas of one bit is 0
MOST_BITS = 8.0
MEAN_OF = 8  # experts, from whose mean a delta's spectrum is taken
MOST_SIDE = 4096  # the shorter side of matrices whose spectra are taken
FEW_LEVELS = 4  # up to which scales for more weights pay
TRAINED = 0.97  # of the directions of noise, below which deltas are taken for what training has made
LOOKS_FLAT = 0.85  # of the directions of noise, from which on deltas are taken for noise
ROWS = 128  # of each matrix that are coded to measure an error
LITTLE = 0.004  # the share of a budget that may be left
TRIED = (2, 3, 4, 8, 16, 64, 256)  # levels whose errors are measured
PLAIN_BITS = (2, 3, 4, 5, 6, 8)  # of the plain quantisation that codes can be as good as
USUAL_BITS = 4  # of the plain quantisation that codes are as good as where nothing else is said
MARGIN = 0.97  # the share of an allowed squared error that is used, since it is measured on a part
UNBIASED = 1.15  # times as much squared error as of the least, that of unbiased deltas counts in outputs
TRELLIS_ERRORS = {1: 0.74, 2: 0.60, 3: 0.50, 4: 0.47}  # of trellises, by bits, over those of as many levels
LEAST_ERROR = 1e-30  # squared; what is less is taken for this
ROUNDS = 12  # of looking for the bits that fill a folder


@dataclass(frozen=True, slots=True)
class RoleTrial:
    """What some rows of some experts show of one projection of one layer.

    `delta_share` is d, the share of the experts' energy that their deltas from the coded base have. The errors are of
    deltas and of whole experts, by levels, and of plain quantisation, by bits: squared, relative to the experts'
    `energy`. With a `bank`, d is that of the matched neurons' deltas from the exact means, and no errors of deltas are
    measured. `spectrum` is that of the deltas from the exact mean, where they look as if they were of low rank, and
    `participation` says how many directions they have, over what noise has. A scale of codes of few levels serves
    `few_group` weights, or all of a row or of the matrix.
    """

    shape: Shape
    experts: int
    delta_share: float
    delta_errors: dict[int, float]
    plain_errors: dict[int, float]
    rounding_errors: dict[int, float] = field(default_factory=dict)
    energy: float = 1.0
    bank: BankShape | None = None
    spectrum: DeltaSpectrum | None = None
    participation: float = 1.0
    few_group: int = 128

    @property
    def has_base(self) -> bool:
        """Whether a base pays, by the law."""
        if self.bank:
            neurons = self.shape[self.bank.axis]
            saved = bank_bits(self.delta_share, self.experts, neurons, self.bank.matched, self.bank.size)
            return saved >= PAYS
        return net_bits(self.delta_share, self.experts) >= PAYS

    @property
    def unbiased(self) -> bool:
        """Whether deltas are made unbiased: those that training has made, of which what is missing harms most.

        Deltas that are noise are coded for the least error.
        """
        return self.has_base and (self.bank is not None or self.participation < TRAINED)

    def rung(self, levels: int) -> BitsCode:
        """The code of so many levels."""
        return BitsCode(levels, self.few_group if levels <= FEW_LEVELS else group_for(self.shape[1]))

    def error(self, codes: RoleCodes) -> float:
        """The error of codes, by the bits that they take."""
        if codes.bank:
            return self._bank_error(codes, missing=1.0)
        if self.has_base and self.spectrum:
            return float(np.dot(self.delta_energies(codes.base), self._lost_by(codes.delta)))
        if self.has_base:
            return self.delta_share * self._lost_by(codes.delta)[0]
        return self._between(self.plain_errors, 1.0, codes.delta)

    def harm(self, codes: RoleCodes) -> float:
        """The error of codes with a bank, or of deltas whose spectrum is known, where what is missing of the deltas
        along themselves counts more."""
        if codes.bank:
            return self._bank_error(codes, MISSING)
        (delta, noise), (of_delta, of_noise) = self.delta_energies(codes.base), self._lost_by(codes.delta)
        if not self._is_unbiased(codes.delta):
            of_delta *= 1 - of_delta + MISSING * of_delta
        return delta * of_delta + noise * of_noise

    def _is_unbiased(self, code: MatrixCode) -> bool:
        """Whether a code of the deltas is made unbiased; factors can't be."""
        rest = code.rest if isinstance(code, SumCode) else code
        return isinstance(rest, TrellisCode) or (self.unbiased and isinstance(rest, BitsCode))

    def _lost_by(self, code: MatrixCode) -> tuple[float, float]:
        """As `left_by`, with the noise of a code that is made unbiased."""
        if isinstance(code, SumCode) and self.spectrum:
            (first, of_first), (second, of_second) = self.left_by(code.factors), self._lost_by(code.rest)
            return first * second, of_first * of_second
        left = np.array(self.left_by(code))
        delta, noise = as_noise(left) if self._is_unbiased(code) else left
        return float(delta), float(noise)

    def _bank_error(self, codes: RoleCodes, missing: float) -> float:
        """A code of least squares with the error e keeps 1 - e of a delta along it; the rest of its error is noise."""
        assert codes.bank is not None
        share, left = codes.bank.matched / self.shape[codes.bank.axis], self.plain_error(codes.delta)
        of_deltas = self.delta_share * left * (1 - left + missing * left) + self.plain_error(codes.base) * left
        if self._is_unbiased(codes.delta):
            of_deltas = (self.delta_share + self.plain_error(codes.base)) * float(as_noise(np.array(left)))
        return share * of_deltas + (1 - share) * self.plain_error(codes.rest)

    def delta_energies(self, base: MatrixCode | None) -> tuple[float, float]:
        """Of the deltas from the exact mean, and of what the code of a base loses, which is noise in all deltas."""
        assert self.spectrum is not None
        noise = max(0.0, self.delta_share - self.spectrum.share) / max(self.plain_error(self.usual_base), LEAST_ERROR)
        return self.spectrum.share, noise * self.plain_error(base)

    def left_by(self, code: MatrixCode) -> tuple[float, float]:
        """The shares of these energies that a code of the deltas leaves."""
        if isinstance(code, SumCode) and self.spectrum:
            (first, of_first), (second, of_second) = self.left_by(code.factors), self.left_by(code.rest)
            return first * second, of_first * of_second
        if isinstance(code, FactorsCode) and self.spectrum:
            return self.spectrum.left_by(code, self.shape, self.plain_error(code.bits))
        left = self._between(self.delta_errors, self.delta_share, code) / max(self.delta_share, LEAST_ERROR)
        return left, left

    @property
    def usual_base(self) -> BitsCode:
        """The code of a base that the errors of deltas are measured with."""
        return BitsCode(2 ** base_bits(self.experts), group_for(self.shape[1]))

    def plain_error(self, code: MatrixCode | None) -> float:
        """The squared error of a code of least squares, relative to what it codes.

        One that was made unbiased, as those that are measured, errs by e / (1 - e).
        """
        error = 1.0 if code is None else self._between(self.plain_errors, 1.0, code)
        return error / (1 + error) if isinstance(code, BitsCode) else min(1.0, error)

    def _between(self, errors: Mapping[int, float], most: float, code: MatrixCode) -> float:
        """The error of a code that takes so many bits, where those of some `errors` are measured, by levels.

        Between them errors fall geometrically, as those of all codes do, below the least one linearly from `most`.
        """
        if isinstance(code, SumCode) and isinstance(code.rest, TrellisCode):
            code = code.rest
        if isinstance(code, TrellisCode):
            return TRELLIS_ERRORS[code.bits] * errors[1 << code.bits]
        bits = [code_bits(self.rung(levels), self.shape) for levels in TRIED]
        taken, lost = code_bits(code, self.shape), [errors[levels] for levels in TRIED]
        if taken < bits[0]:
            return float(np.interp(taken, [0.0, bits[0]], [most, lost[0]]))
        return float(np.exp(np.interp(taken, bits, np.log(np.maximum(lost, LEAST_ERROR))))) if lost[0] else 0.0


@cache
def code_bits(code: MatrixCode, shape: Shape) -> float:
    """Bits a weight that a coded matrix of that shape takes."""
    return 8 * code_bytes(code, shape) / prod(shape)


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
        if bank is None:
            with resources.worker_threads(layer, matrices=6) as pool:
                find = partial(_find_spectrum, tensor, alignment)
                based = [role for role in rows if trials[role].has_base]
                spectra = pool.map(find, based, [rows[role] for role in based])
                for role, spectrum in zip(based, spectra, strict=True):
                    trials[role] = replace(trials[role], spectrum=spectrum)
    return {role: trials[role] for role in layer.roles}


def _try_rows(layer: ExpertLayer, role: str, rows: Sequence[NDArray[np.float32]]) -> RoleTrial:
    """The trial of one role, from the same rows of a few experts."""
    count, columns = len(rows), rows[0].shape[1]
    shape = rows[0].shape[0], columns
    group = group_for(columns)
    mean = np.stack(rows).mean(axis=0, dtype=np.float64).astype(np.float32)
    code = BitsCode(2 ** base_bits(layer.count), group)
    lost = mean - code.decode(code.encode(mean), shape)
    deltas = [delta + lost for delta in _list_deltas(rows, layer.count)]
    energy = _energy(rows)
    share = _energy(deltas) / energy if energy else 0.0
    coded = deltas if net_bits(share, layer.count) >= PAYS else rows
    few_group = min(
        (group, ROW, MATRIX), key=lambda each: _price_of_scales(coded, BitsCode(4, each), layer.shape(role))
    )

    def share_of(left: Sequence[NDArray[np.float32]]) -> float:
        return _energy(left) / energy if energy else 0.0

    def errors(matrices: Sequence[NDArray[np.float32]], unbiased: bool) -> dict[int, float]:
        codes = {levels: BitsCode(levels, few_group if levels <= FEW_LEVELS else group) for levels in TRIED}
        return {
            levels: share_of([m - code.decode(code.encode(m, unbiased=unbiased), shape) for m in matrices])
            for levels, code in codes.items()
        }

    return RoleTrial(
        layer.shape(role),
        layer.count,
        share,
        errors(deltas, unbiased=False),
        errors(rows, unbiased=True),  # as `CodedLayer` codes experts without a base
        {bits: share_of([matrix - round_to_bits(matrix, bits) for matrix in rows]) for bits in PLAIN_BITS},
        energy * layer.count / count * layer.shape(role)[0] / shape[0],
        participation=float(np.mean([participation(delta) for delta in _list_deltas(rows, layer.count)])),
        few_group=few_group,
    )


def _price_of_scales(matrices: Sequence[NDArray[np.float32]], code: BitsCode, whole: Shape) -> float:
    """The squared error of a code of parts of matrices, at the bits that it takes of `whole` ones."""
    left = [each - code.decode(code.encode(each), as_shape(each)) for each in matrices]
    return _energy(left) * float(4.0 ** code_bits(code, whole))  # a bit more quarters an error


def _list_deltas(matrices: Sequence[NDArray[np.float32]], experts: int) -> list[NDArray[np.float32]]:
    """The deltas of a few experts from their mean, as large as those from the mean of all."""
    count = len(matrices)
    mean = np.stack(matrices).mean(axis=0, dtype=np.float64).astype(np.float32)
    factor = np.float32(sqrt(count / (count - 1) * (experts - 1) / experts))
    return [factor * (matrix - mean) for matrix in matrices]


def _find_spectrum(
    tensor: ExpertTensor, alignment: Alignment, role: str, rows: Sequence[NDArray[np.float32]]
) -> DeltaSpectrum | None:
    """The spectrum of one whole delta of a role; None where some rows look like noise, or it is too large.

    The deltas from the mean of a few experts have few directions, whatever those from the mean of all have: more
    experts are read than for errors.
    """
    layer = tensor.layer
    deltas, energy = _list_deltas(rows, layer.count), _energy(rows)
    if min(layer.shape(role)) > MOST_SIDE or participation(deltas[0]) >= LOOKS_FLAT or not energy:
        return None
    chosen = evenly_spaced(layer.count, min(layer.count, MEAN_OF))
    first, total = None, np.zeros(layer.shape(role), np.float32)
    for expert in chosen:
        matrix = permute(role, tensor.matrices(expert)[role], alignment.permutations[expert])
        if not np.isfinite(matrix).all():
            refuse_not_finite(layer, expert, role)
        first = matrix if first is None else first
        total += matrix
    assert first is not None
    tails = measure_tails(first - total / np.float32(len(chosen)))
    return DeltaSpectrum(_energy(deltas) / energy, tails) if tails else None


def _energy(matrices: Sequence[NDArray[np.float32]]) -> float:
    return sum(float(np.square(matrix, dtype=np.float64).sum()) for matrix in matrices)


class OverlayOptions(RankOptions, total=False):
    """How ranks or codes are chosen, as options of the services: `RankOptions`, or codes.

    `bits` are the bits for each weight of the experts, everything counted, of an overlay in codes; `fit` the bytes of
    the whole folder, a number or a text such as "24GB"; `as_good_as` the bits of the plain quantisation that codes
    shall err no more than, in the fewest bytes. `coded` makes `max_error` and `target_ratio` mean codes, and is
    `as_good_as` 4 where no other is given. `trellis` keeps what has one to four bits in trellises, which err less and
    take longer to be made.
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
            raise InvalidRequest("trellises are wanted, and no codes", "give bits, a size or coded, too")
        return rule
    if trellis:
        check_encoder()
    if rule.given:
        raise InvalidRequest("codes are wanted together with ranks", "give one of the two")
    targets = {
        "bits": bits,
        "the size of a folder": fit,
        "the bits to be as good as": as_good_as,
        "a greatest error": rule.max_error,
        "a ratio": rule.target_ratio,
    }
    given = [name for name, target in targets.items() if target is not None]
    if len(given) > 1:
        raise InvalidRequest(f"both {given[0]} and {given[1]} are given", "give one of the two")
    if rule.target_ratio is not None:
        if 16 / rule.target_ratio > MOST_BITS:
            raise InvalidRequest(f"a ratio of {rule.target_ratio:g} in codes", f"give {16 / MOST_BITS:g} or more")
        return BitRule(16 / rule.target_ratio, trellis=trellis)
    size = parse_size(fit, "the size of the folder") if isinstance(fit, str) else fit
    return BitRule(bits, rule.max_error, as_good_as if given else USUAL_BITS, size, trellis)


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
    """How codes are chosen: by exactly one of four targets.

    `bits` for each weight of the experts, everything counted; the greatest relative weight error of the experts of each
    layer, `max_error`; the bits of the plain quantisation that each layer shall be `as_good_as`; or the bytes of the
    whole folder, to `fit`. With `trellis`, deltas and experts without a base are in trellises where these have so many
    bits. Raises InvalidRequest for a number out of range.
    """

    bits: float | None = None
    max_error: float | None = None
    as_good_as: int | None = None
    fit: int | None = None
    trellis: bool = False

    def __post_init__(self) -> None:
        if self.bits is not None and not 0 < self.bits <= MOST_BITS:
            raise InvalidRequest(f"{self.bits:g} bits a weight", f"give a number above 0 and up to {MOST_BITS:g}")
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise InvalidRequest(f"the greatest error is {self.max_error:g}", "give a share between 0 and 1")
        if self.as_good_as is not None and self.as_good_as not in PLAIN_BITS:
            known = ", ".join(map(str, PLAIN_BITS[:-1]))
            raise InvalidRequest(
                f"as good as {self.as_good_as:g} bits of plain quantisation", f"give {known} or {PLAIN_BITS[-1]}"
            )
        if self.fit is not None and not 0 < self.fit < inf:
            raise InvalidRequest(f"a folder of {self.fit:,} bytes", "give a size such as 20GB")

    def __str__(self) -> str:
        return f"{self._goal}{', trellises' if self.trellis else ''}"

    @property
    def _goal(self) -> str:
        if self.max_error is not None:
            return f"relative weight error of the experts at most {self.max_error:g}, fewest bits"
        if self.as_good_as is not None:
            return f"as good as plain quantisation at {self.as_good_as} bits, fewest bits"
        if self.fit is not None:
            return f"a folder of at most {self.fit:,} bytes"
        return f"{self.bits:g} bits a weight of the experts, everything counted"

    @property
    def options(self) -> str:
        """The rule as a command has it."""
        trellis = " --trellis" if self.trellis else ""
        if self.max_error is not None:
            return f"--max-error {self.max_error} --coded{trellis}"
        if self.as_good_as is not None:
            return f"--as-good-as {self.as_good_as}{trellis}"
        return f"--bits {self.bits}{trellis}" if self.fit is None else f"--fit {self.fit}{trellis}"

    def choose(self, trials: Mapping[int, Mapping[str, RoleTrial]]) -> dict[int, LayerCodes]:
        """The codes of every layer; raises InvalidRequest where even the least take more, or the finest err more.

        What is to `fit` has no choice of its own: `fit_bits` says which bits a weight that is.
        """
        if self.bits is not None:
            return _within(self.bits, trials, self.trellis)
        chosen: dict[int, LayerCodes] = {}
        for number, roles in trials.items():
            chosen |= self._reach(number, roles)
        return chosen

    def _reach(self, number: int, roles: Mapping[str, RoleTrial]) -> dict[int, LayerCodes]:
        """The fewest bits with which a layer meets the rule.

        Its units climb as in `_within`, but without factors: what these leave is in few directions, and at equal errors
        of weights outputs err more. Before each step scales for shorter groups are tried in its place.
        """
        units = _open_units({number: roles}, self.trellis, with_factors=False)
        prices = self._prices(roles)

        def loss(codes: Sequence[RoleCodes]) -> float:
            return sum(prices[unit.role] * unit.trial.error(each) for unit, each in zip(units, codes, strict=True))

        chosen = [unit.ladder[0] for unit in units]
        steps = _list_steps(units)
        for taken in range(len(steps) + 1):
            finer = list(chosen)
            for place in [None, *(_next_places(steps[taken:]) or range(len(units)))]:
                if place is not None and not _has_few_scales(finer[place].delta):
                    finer[place] = _shorten(finer[place])
                if loss(finer) <= MARGIN:
                    return _by_layer(units, finer)
            for place, _, higher in steps[taken : taken + 1]:
                chosen[place] = higher
        goal = (
            f"within a weight error of {self.max_error:g}"
            if self.max_error is not None
            else f"as good as plain quantisation at {self.as_good_as} bits"
        )
        factor = sqrt(loss(finer) / MARGIN)
        raise InvalidRequest(f"layer {number}: no codes are {goal}", f"the finest err {factor:.3g} times as much")

    def _prices(self, roles: Mapping[str, RoleTrial]) -> dict[str, float]:
        """By role, the share of the loss that a layer may have which a unit of the role's relative error takes.

        A greatest error is that of all weights together. What shall be as good as plain quantisation is measured in
        units of that, role by role, since the outputs depend on each role's relative error.
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
    """The best codes of at most so many bits a weight; raises InvalidRequest where even the least take more.

    All units climb from stage to stage, those of the largest error first. When no whole step fits, those that would
    come next get scales for shorter groups, and as long as much is left even then, factors beside their code, and
    shorter groups in these.
    """
    units = _open_units(trials, trellis)
    weights = _count_weights(units)
    budget = int(bits * weights / 8)
    chosen = [unit.ladder[0] for unit in units]
    free = budget - _count_bytes(units, chosen) - _index_bytes(trials)
    if free < 0:
        least = ceil(800 * (budget - free) / weights) / 100
        raise InvalidRequest(f"{bits:g} bits a weight are out of reach", f"the least is {least:.2f}")
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
    """The bits a weight with which a whole folder takes at most `size` bytes, and nearly as many.

    `trials` are those of all layers that are overlaid, and `folder_bytes` says what a folder with such codes takes.
    Raises InvalidRequest where even the least codes take more.
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


def spread_trials(
    trials: Mapping[int, Mapping[str, RoleTrial]], layers: Iterable[ExpertLayer]
) -> dict[int, Mapping[str, RoleTrial]]:
    """Trials of all these layers: one that was not tried is taken to be as the nearest that was."""
    spread: dict[int, Mapping[str, RoleTrial]] = {}
    for layer in layers:
        nearest = trials[min(trials, key=lambda number: abs(number - layer.number))]
        spread[layer.number] = {
            role: replace(
                nearest[role],
                shape=layer.shape(role),
                experts=layer.count,
                energy=nearest[role].energy * layer.count / nearest[role].experts,
            )
            for role in layer.roles
        }
    return spread


def predict_error(trials: Mapping[str, RoleTrial], codes: LayerCodes) -> float:
    """The relative Frobenius error of a layer's experts in these codes, by its trials."""
    energy = sum(trial.energy for trial in trials.values())
    lost = sum(trial.energy * trial.error(codes[role]) for role, trial in trials.items())
    return sqrt(lost / energy) if energy else 0.0


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

    Those without a base are ahead of the others by the bits that a delta needs less, so that errors are alike.
    """
    all_trials = [trial for roles in trials.values() for trial in roles.values()]
    saved = [0.5 * log2(1 / t.delta_share) for t in all_trials if t.has_base and not t.bank and t.delta_share]
    ahead = round(float(np.mean(saved))) if saved else 0
    units = []
    for number, roles in trials.items():
        for role, trial in roles.items():
            group = group_for(trial.shape[1])
            bits = _bit_rungs(trial, trellis)
            if trial.has_base and trial.bank:
                groups = [group_for(shape[1]) for shape in trial.bank.cut(trial.shape)]
                rungs = _bit_rungs(trial, trellis)
                ladder = bank_ladder(trial.bank, trial.shape, trial.experts, groups[0], (rungs, rungs), trial.harm)
                ladder = [replace(codes, unbiased=trial.unbiased) for codes in ladder]
                stages = [_plain_stage(trial, trial.harm(codes)) - ahead for codes in ladder]
            elif trial.has_base and trial.spectrum and with_factors:
                bases = [BitsCode(levels, group) for levels in LEVELS if levels >= trial.usual_base.levels]
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
                base = BitsCode(2 ** base_bits(trial.experts), group)
                ladder = [RoleCodes(base, code, unbiased=trial.unbiased) for code in (*factors, *bits)]
                stages = [float(rung - len(factors)) for rung in range(len(ladder))]
            else:
                ladder = [RoleCodes(None, code) for code in bits]
                stages = [float(rung - ahead) for rung in range(len(ladder))]
            units.append(_Unit(number, role, trial, tuple(ladder), tuple(stages)))
    return units


def _bit_rungs(trial: RoleTrial, trellis: bool) -> tuple[BitsCode | TrellisCode, ...]:
    """The codes of ascending bits, trellises where these have so many."""
    trellises = [TrellisCode(width) for width in WIDTHS] if trellis else []
    above = 1 << WIDTHS[-1] if trellis else 0
    return (*trellises, *(trial.rung(levels) for levels in LEVELS if levels > above))


def _index_bytes(trials: Mapping[int, Mapping[str, RoleTrial]]) -> int:
    """Bytes of the indices of all banks."""
    of_layers = [[t for t in roles.values() if t.bank and t.has_base] for roles in trials.values()]
    return sum(found[0].bank.index(found[0].experts).nbytes for found in of_layers if found and found[0].bank)


def _plain_stage(trial: RoleTrial, error: float) -> float:
    """The stage of a plain code that errs as much, between those of two codes where there is none."""
    errors = [log2(trial.plain_error(trial.rung(levels)) or 1e-30) for levels in LEVELS]
    return float(np.interp(-log2(error or 1e-30), [-each for each in errors], range(len(errors))))


def _delta_stages(trial: RoleTrial, rungs: Sequence[MatrixCode], ladder: Sequence[RoleCodes]) -> list[float]:
    """The stages of the codes of a delta, `rungs`, that do as much harm, between those of two where there is none."""
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

    They are in FACTOR_LEVELS, or fewer where so little is free; where the spectrum is known, in the code that does the
    least harm.
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
