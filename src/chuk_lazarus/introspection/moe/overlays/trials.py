"""Estimates, from a few rows of a few experts, the error of codes of any width, with a base and without."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from math import prod, sqrt

import numpy as np
from numpy.typing import NDArray

from ..jobs.measure import refuse_not_finite
from ..jobs.model import evenly_spaced
from ..jobs.resources import Resources
from ..numerics.alignment import Alignment, permute
from ..numerics.neurons import as_neurons
from ..numerics.rates import PAYS, bank_bits, base_bits, net_bits
from ..weights.expert_layer import ExpertLayer, ExpertTensor
from .bank_budget import bank_delta_share, sharing_experts
from .codes import BankShape, LayerCodes, MatrixCode, RoleCodes
from .codes.bits import MATRIX, ROW, BitsCode
from .codes.code import Shape, as_shape, code_bytes
from .codes.low_rank import FactorsCode, SumCode
from .codes.trellis import TrellisCode
from .factor_budget import DeltaSpectrum, as_harm, as_noise, measure_tails, participation
from .quantisation import round_to_bits

MISSING = 8.0  # what is missing of a delta harms this many times as much as noise: it came from training
MEAN_OF = 8  # experts, from whose mean a delta's spectrum is taken
MOST_SIDE = 4096  # the shorter side of matrices whose spectra are taken
FEW_LEVELS = 4  # up to which scales for more weights pay
TRAINED = 0.97  # of the directions of noise; deltas with fewer come from training
LOOKS_FLAT = 0.85  # of the directions of noise; deltas with more are noise
ROWS = 128  # of each matrix that are coded to measure an error
TRIED = (2, 3, 4, 8, 16, 64, 256)  # levels whose errors are measured
PLAIN_BITS = (2, 3, 4, 5, 6, 8)  # of the plain quantisation that codes can match
TRELLIS_ERRORS = {1: 0.74, 2: 0.60, 3: 0.50, 4: 0.47}  # of trellises, by bits, over those of as many levels
LEAST_ERROR = 1e-30  # squared; smaller ones count as this


@dataclass(frozen=True, slots=True)
class RoleTrial:
    """What some rows of some experts show of one projection of one layer.

    `delta_share` is d, the deltas' share of the experts' energy, from the coded base. The errors are of deltas and of
    whole experts, by levels, and of plain quantisation, by bits: squared, relative to the experts' `energy`. With a
    `bank`, d is that of the matched neurons' deltas from the exact means, and no errors of deltas are measured.
    `spectrum` is that of the deltas from the exact mean, if they seem to be of low rank, and `participation` their
    number of directions relative to noise. In codes of few levels, `few_group` weights share a scale, or all of a row
    or of the matrix.
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
        """Whether deltas are coded without bias: those that come from training, where what is missing harms most.

        Deltas that are noise are coded for the smallest error.
        """
        return self.has_base and (self.bank is not None or self.participation < TRAINED)

    def rung(self, levels: int) -> BitsCode:
        """The code with that many levels."""
        return _rung(levels, self.shape, self.few_group)

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
        """The error of codes with a bank, or of deltas with a known spectrum, where what is missing along the deltas
        counts more."""
        if codes.bank:
            return self._bank_error(codes, MISSING)
        (delta, noise), (of_delta, of_noise) = self.delta_energies(codes.base), self._lost_by(codes.delta)
        if not self._is_unbiased(codes.delta):
            of_delta = as_harm(of_delta, MISSING)
        return delta * of_delta + noise * of_noise

    def _is_unbiased(self, code: MatrixCode) -> bool:
        """Whether a code of the deltas is unbiased; factors can't be."""
        rest = code.rest if isinstance(code, SumCode) else code
        return isinstance(rest, TrellisCode) or (self.unbiased and isinstance(rest, BitsCode))

    def _lost_by(self, code: MatrixCode) -> tuple[float, float]:
        """Like `left_by`, with the noise of an unbiased code."""
        if isinstance(code, SumCode) and self.spectrum:
            (first, of_first), (second, of_second) = self.left_by(code.factors), self._lost_by(code.rest)
            return first * second, of_first * of_second
        left = np.array(self.left_by(code))
        delta, noise = as_noise(left) if self._is_unbiased(code) else left
        return float(delta), float(noise)

    def _bank_error(self, codes: RoleCodes, missing: float) -> float:
        """A least-squares code with the error e keeps 1 - e of a delta along it; the rest of its error is noise."""
        assert codes.bank is not None
        share, left = codes.bank.matched / self.shape[codes.bank.axis], self.plain_error(codes.delta)
        of_deltas = self.delta_share * as_harm(left, missing) + self.plain_error(codes.base) * left
        if self._is_unbiased(codes.delta):
            of_deltas = (self.delta_share + self.plain_error(codes.base)) * float(as_noise(np.array(left)))
        return share * of_deltas + (1 - share) * self.plain_error(codes.rest)

    def delta_energies(self, base: MatrixCode | None) -> tuple[float, float]:
        """The energies of the deltas from the exact mean, and of the error of the base's code, which is noise in all
        deltas."""
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
        """The squared error of a least-squares code, relative to what it codes.

        Made unbiased, such a code has the error e / (1 - e).
        """
        error = 1.0 if code is None else self._between(self.plain_errors, 1.0, code)
        return error / (1 + error) if isinstance(code, BitsCode) else min(1.0, error)

    def _between(self, errors: Mapping[int, float], most: float, code: MatrixCode) -> float:
        """The error of a code of any number of bits, from `errors` that are measured at some levels.

        Between them errors fall geometrically, as those of all codes do; below the lowest one linearly from `most`.
        """
        if isinstance(code, SumCode) and isinstance(code.rest, TrellisCode):
            code = code.rest
        if isinstance(code, TrellisCode):
            return TRELLIS_ERRORS[code.bits] * errors[1 << code.bits]
        bits = _tried_bits(self.shape, self.few_group)
        taken, lost = code_bits(code, self.shape), [errors[levels] for levels in TRIED]
        if taken < bits[0]:
            return float(np.interp(taken, [0.0, bits[0]], [most, lost[0]]))
        return float(np.exp(np.interp(taken, bits, np.log(np.maximum(lost, LEAST_ERROR))))) if lost[0] else 0.0


def _rung(levels: int, shape: Shape, few_group: int) -> BitsCode:
    return BitsCode(levels, few_group if levels <= FEW_LEVELS else group_for(shape[1]))


@cache
def _tried_bits(shape: Shape, few_group: int) -> NDArray[np.float64]:
    """Bits a weight of the codes whose errors are measured."""
    return np.array([code_bits(_rung(levels, shape, few_group), shape) for levels in TRIED])


@cache
def code_bits(code: MatrixCode, shape: Shape) -> float:
    """Bits per weight of a coded matrix of that shape."""
    return 8 * code_bytes(code, shape) / prod(shape)


def group_for(columns: int) -> int:
    """How many weights of a row share a scale: whole groups where that is possible."""
    return 64 if columns % 128 and columns % 64 == 0 else 128


def try_layer(layer: ExpertLayer, alignment: Alignment, resources: Resources) -> dict[str, RoleTrial]:
    """The trials of a layer by role, from a few experts.

    The deltas of a few experts from their own mean are smaller than those from the mean of all; this is corrected for.
    With a bank, the experts are some that share many of its neurons. Raises ModelUnreadable if a weight is not finite.
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
    exact = _list_deltas(rows, layer.count)
    deltas = [delta + lost for delta in exact]
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
        participation=float(np.mean([participation(delta) for delta in exact])),
        few_group=few_group,
    )


def _price_of_scales(matrices: Sequence[NDArray[np.float32]], code: BitsCode, whole: Shape) -> float:
    """The squared error of a code of parts of matrices, at the bits that it takes of `whole` ones."""
    left = [each - code.decode(code.encode(each), as_shape(each)) for each in matrices]
    return _energy(left) * float(4.0 ** code_bits(code, whole))  # a bit more quarters an error


def _list_deltas(matrices: Sequence[NDArray[np.float32]], experts: int) -> list[NDArray[np.float32]]:
    """The deltas of a few experts from their mean, scaled to the size of those from the mean of all."""
    count = len(matrices)
    mean = np.stack(matrices).mean(axis=0, dtype=np.float64).astype(np.float32)
    factor = np.float32(sqrt(count / (count - 1) * (experts - 1) / experts))
    return [factor * (matrix - mean) for matrix in matrices]


def _find_spectrum(
    tensor: ExpertTensor, alignment: Alignment, role: str, rows: Sequence[NDArray[np.float32]]
) -> DeltaSpectrum | None:
    """The spectrum of one whole delta of a role; None if some rows look like noise, or it is too large.

    The deltas from the mean of a few experts always have few directions, so more experts are read than for errors.
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


def spread_trials(
    trials: Mapping[int, Mapping[str, RoleTrial]], layers: Iterable[ExpertLayer]
) -> dict[int, Mapping[str, RoleTrial]]:
    """Trials of all these layers; one that was not tried is assumed to be like the nearest that was."""
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
