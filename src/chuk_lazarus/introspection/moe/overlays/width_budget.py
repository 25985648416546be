"""How many bits each projection of each layer gets in a plainly quantised checkpoint.

Widths and groups are chosen where they buy the most error for a byte, from the fewest bytes on: along the lower convex
hull of what each projection's widths take and err, steepest steps first, which no other mix of their steps beats
(a fractional knapsack). The errors are relative to each projection's own energy, so that none is given up for another.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidRequest, ModelUnreadable
from ..jobs.model import evenly_spaced
from ..jobs.resources import Resources
from ..numerics.hull import lower_hull
from ..progress import Progress
from ..weights.expert_layer import ExpertLayer
from .codes.affine import AFFINE_BITS, AFFINE_GROUPS, AffineCode, parse_affine
from .codes.code import Shape, code_bytes
from .quantisation import round_to_bits

FLOOR = 10**-0.9  # squared error, relative: a signal 9 dB above what is lost, as in MINT (baa.ai)
SAMPLED = 4  # experts of which some rows are coded to measure an error
ROWS = 64  # of each of them
PLAIN_BITS = AFFINE_BITS  # of the plain quantisation that widths can be as good as

Unit = TypeVar("Unit", bound=Hashable)


@dataclass(frozen=True, slots=True)
class WidthTrial:
    """What some rows of some experts show of a projection: the squared error of each width that fits it, by its text,
    relative to the rows' energy, and that of plain quantisation, by bits, in groups of 64.

    Without a width that fits, the projection stays in bf16.
    """

    shape: Shape
    experts: int
    errors: dict[str, float]
    plain_errors: dict[int, float]

    @property
    def weights(self) -> int:
        return self.experts * prod(self.shape)

    def nbytes(self, code: AffineCode | None) -> int:
        """Bytes of the projection of all experts; without a code, in bf16."""
        return self.experts * (2 * prod(self.shape) if code is None else code_bytes(code, self.shape))

    @property
    def codes(self) -> list[AffineCode]:
        """All widths that fit."""
        return [parse_affine(text) for text in self.errors]

    @property
    def ladder(self) -> list[AffineCode]:
        """The widths that are worth their bytes, from the fewest on."""
        codes = self.codes
        return [codes[place] for place in lower_hull([self.nbytes(code) for code in codes], list(self.errors.values()))]

    def error(self, code: AffineCode | None) -> float:
        """The squared error of a width; without one, in bf16, it is nothing beside those of all widths."""
        return 0.0 if code is None else self.errors[str(code)]


Trials = Mapping[Unit, WidthTrial]
Widths = dict[Unit, AffineCode | None]
"""The width of each unit, None for bf16."""


def try_widths(layer: ExpertLayer, resources: Resources, progress: Progress) -> dict[str, WidthTrial]:
    """The trials of a layer by role, from parts of a few experts; raises ModelUnreadable where these are not finite."""
    trials = {}
    chosen = evenly_spaced(layer.count, SAMPLED)
    sampled: dict[str, list[NDArray[np.float32]]] = {role: [] for role in layer.roles}
    with resources.worker_threads(layer, matrices=len(layer.roles) + 2) as pool:
        for matrices in pool.map(layer.matrices, chosen):
            for role, matrix in matrices.items():
                sampled[role].append(matrix[list(evenly_spaced(len(matrix), ROWS))])
        roles = list(layer.roles)
        for role, trial in zip(roles, pool.map(lambda role: _try_rows(layer, role, sampled[role]), roles), strict=True):
            trials[role] = trial
    return trials


def _try_rows(layer: ExpertLayer, role: str, sampled: list[NDArray[np.float32]]) -> WidthTrial:
    rows = np.concatenate(sampled)
    if not np.isfinite(rows).all():
        raise ModelUnreadable(f"layer {layer.number}: a weight of {role} is not finite", "the checkpoint is broken")
    energy = _energy(rows)
    groups = [group for group in AFFINE_GROUPS if rows.shape[1] % group == 0]
    codes = [AffineCode(bits, group) for group in groups for bits in AFFINE_BITS]
    return WidthTrial(
        layer.shape(role),
        layer.count,
        {str(code): _share(rows - code.decode(code.encode(rows), rows.shape), energy) for code in codes},
        {bits: _share(rows - round_to_bits(rows, bits), energy) for bits in PLAIN_BITS},
    )


def _energy(rows: NDArray[np.float32]) -> float:
    return float(np.square(rows, dtype=np.float64).sum())


def _share(rows: NDArray[np.float32], energy: float) -> float:
    return _energy(rows) / energy if energy else 0.0


def widths_within(trials: Trials[Unit], budget: int) -> Widths[Unit]:
    """The widths that err least of those that take at most `budget` bytes; raises InvalidRequest where none do.

    No projection errs by more than the FLOOR where the budget allows it. What the steps along the hulls leave is spent
    on the widths between them, the greatest falls of the error first.
    """
    widths = _above_floor(trials)
    if count_bytes(trials, widths) > budget:
        widths = _least(trials)
    free = budget - count_bytes(trials, widths)
    if free < 0:
        weights = sum(trial.weights for trial in trials.values())
        bits, least = (8 * each / weights for each in (budget, budget - free))
        raise InvalidRequest(f"{bits:.2f} bits a weight of the experts are out of reach", f"the least is {least:.2f}")

    def price(unit: Unit, code: AffineCode) -> int:
        return trials[unit].nbytes(code) - trials[unit].nbytes(widths[unit])

    for unit, code in _steps(trials):
        if 0 < price(unit, code) <= free:
            free -= price(unit, code)
            widths[unit] = code
    while True:
        finer = [
            (trials[unit].error(code) - trials[unit].error(widths[unit]), unit, code)
            for unit, trial in trials.items()
            for code in trial.codes
            if 0 < price(unit, code) <= free
        ]
        if not finer or (best := min(finer, key=lambda each: each[0]))[0] >= 0:
            return widths
        _, unit, code = best
        free -= price(unit, code)
        widths[unit] = code


def widths_reaching(trials: Trials[Unit], reached: Callable[[Widths[Unit]], bool]) -> Widths[Unit]:
    """The first widths, from the fewest bytes on, of which `reached` is true; else the widest."""
    widths = _least(trials)
    for unit, code in _steps(trials):
        if reached(widths):
            break
        widths[unit] = code
    return widths


def _above_floor(trials: Trials[Unit]) -> Widths[Unit]:
    """The fewest bytes of each unit with which it errs no more than the FLOOR; what errs least where none does."""

    def cheapest(trial: WidthTrial) -> AffineCode | None:
        fine = [code for code in trial.codes if trial.error(code) <= FLOOR]
        return min(fine, key=trial.nbytes) if fine else next(reversed(trial.ladder), None)

    return {unit: cheapest(trial) for unit, trial in trials.items()}


def _least(trials: Trials[Unit]) -> Widths[Unit]:
    return {unit: next(iter(trial.ladder), None) for unit, trial in trials.items()}


def _steps(trials: Trials[Unit]) -> list[tuple[Unit, AffineCode]]:
    """The rungs of all ladders but the first, those first by which the error falls most for a byte."""
    steps = [
        ((trial.error(high) - trial.error(low)) / (trial.nbytes(high) - trial.nbytes(low)), unit, high)
        for unit, trial in trials.items()
        for low, high in pairwise(trial.ladder)
    ]
    return [(unit, code) for _, unit, code in sorted(steps, key=lambda step: step[0])]


def count_bytes(trials: Trials[Unit], widths: Widths[Unit]) -> int:
    """Bytes of all units with these widths."""
    return sum(trials[unit].nbytes(code) for unit, code in widths.items())
