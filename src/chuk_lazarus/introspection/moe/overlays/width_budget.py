"""How many bits each projection of each layer gets in a plain quantised checkpoint.

Starting from the fewest bytes, bytes go to the widths and groups that lower the error most per byte. The steps are
along the lower convex hull of each projection's widths (bytes and error), steepest first; no other mix of these steps
is better (a fractional knapsack). Errors are relative to each projection's own energy, so that none is sacrificed for
another.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf, prod, sqrt
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidRequest, ModelUnreadable
from ..jobs.model import evenly_spaced
from ..jobs.resources import Resources
from ..numerics.gram import total_energy
from ..numerics.hull import lower_hull
from ..weights.expert_layer import ExpertLayer
from .bit_budget import BitRule
from .codes.affine import AFFINE_BITS
from .codes.code import Shape
from .quantisation import round_to_bits

FLOOR = 10**-0.9  # squared error, relative: a signal-to-noise ratio of 9 dB, as in MINT (baa.ai)
SAMPLED = 4  # experts of which some rows are coded to measure an error
ROWS = 64  # of each of them
PLAIN_BITS = AFFINE_BITS  # of the plain quantisation that widths can match
FIT_ROUNDS = 8  # of searching for widths that fit a folder, whose texts depend on them

Unit = TypeVar("Unit", bound=Hashable)


class Width(Protocol):
    """A way to store a matrix in few bits, identified by its text."""

    def nbytes(self, shape: Shape) -> int:
        """Bytes of a matrix of that shape; raises ValueError where it does not fit the rows."""

    def lost(self, rows: NDArray[np.float32]) -> float:
        """The squared error of coded rows [rows, columns]."""


@dataclass(frozen=True, slots=True)
class WidthTrial:
    """What some rows of some experts show of a projection, or of several that get one width.

    `sizes` are the bytes of all its experts by the text of each width that fits it, `errors` the squared error relative
    to the rows' energy, and `plain_errors` that of plain quantisation, by bits, in groups of 64; errors are summed over
    the `projections`. If no width fits, these stay in bf16.
    """

    weights: int
    sizes: dict[str, int]
    errors: dict[str, float]
    plain_errors: dict[int, float]
    projections: int = 1

    def nbytes(self, width: str | None) -> int:
        """Bytes of all experts; without a width, in bf16."""
        return 2 * self.weights if width is None else self.sizes[width]

    def only(self, widths: Collection[str]) -> "WidthTrial":
        """The trial with a single width."""
        return replace(
            self,
            sizes={width: size for width, size in self.sizes.items() if width in widths},
            errors={width: error for width, error in self.errors.items() if width in widths},
        )

    @property
    def ladder(self) -> list[str]:
        """The widths that are worth their bytes, from the fewest on."""
        widths = list(self.sizes)
        places = lower_hull([self.sizes[width] for width in widths], [self.errors[width] for width in widths])
        return [widths[place] for place in places]

    def error(self, width: str | None) -> float:
        """The squared error of a width; in bf16, without one, it is taken as zero."""
        return 0.0 if width is None else self.errors[width]


Trials = Mapping[Unit, WidthTrial]
Widths = dict[Unit, str | None]
"""The width of each unit, None for bf16."""


def try_widths(
    layer: ExpertLayer, widths: Callable[[Shape], Sequence[Width]], resources: Resources
) -> dict[str, WidthTrial]:
    """The trials of a layer by role, from parts of a few experts; `widths` are those of a matrix of some shape.

    Raises ModelUnreadable where a weight is not finite.
    """
    chosen = evenly_spaced(layer.count, SAMPLED)
    sampled: dict[str, list[NDArray[np.float32]]] = {role: [] for role in layer.roles}
    with resources.worker_threads(layer, matrices=len(layer.roles) + 2) as pool:
        for matrices in pool.map(layer.matrices, chosen):
            for role, matrix in matrices.items():
                sampled[role].append(matrix[list(evenly_spaced(len(matrix), ROWS))])

        def try_role(role: str) -> WidthTrial:
            rows, shape = np.concatenate(sampled[role]), layer.shape(role)
            if not np.isfinite(rows).all():
                problem = f"layer {layer.number}: a weight of {role} is not finite"
                raise ModelUnreadable(problem, "the checkpoint is broken")
            return try_rows(rows, shape, layer.count, widths(shape))

        return dict(zip(layer.roles, pool.map(try_role, layer.roles), strict=True))


def try_rows(rows: NDArray[np.float32], shape: Shape, experts: int, widths: Sequence[Width]) -> WidthTrial:
    """The trial of a projection of that many experts, from rows [rows, columns] of some of them."""
    energy = total_energy(rows) or 1.0  # zeros have no error
    return WidthTrial(
        experts * prod(shape),
        {str(width): experts * width.nbytes(shape) for width in widths},
        {str(width): width.lost(rows) / energy for width in widths},
        {bits: total_energy(rows - round_to_bits(rows, bits)) / energy for bits in PLAIN_BITS},
    )


def resize_trial(trial: WidthTrial, shape: Shape, experts: int, widths: Sequence[Width]) -> WidthTrial:
    """The trial of a similar projection, with another shape and number of experts, that these widths fit."""
    sizes = {str(width): experts * width.nbytes(shape) for width in widths if str(width) in trial.errors}
    return replace(trial.only(sizes), weights=experts * prod(shape), sizes=sizes)


def join_trials(trials: Sequence[WidthTrial]) -> WidthTrial:
    """The trial of projections that get one width, which must fit them all."""
    widths = [width for width in trials[0].sizes if all(width in trial.sizes for trial in trials)]
    return WidthTrial(
        sum(trial.weights for trial in trials),
        {width: sum(trial.sizes[width] for trial in trials) for width in widths},
        {width: sum(trial.errors[width] for trial in trials) for width in widths},
        {bits: sum(trial.plain_errors[bits] for trial in trials) for bits in trials[0].plain_errors},
        sum(trial.projections for trial in trials),
    )


def choose_widths(rule: BitRule, trials: Trials[Unit], total_bytes: Callable[[Widths[Unit]], int]) -> Widths[Unit]:
    """The widths that the rule chooses; `total_bytes` gives the size of everything written with some widths.

    Raises InvalidRequest if none meet the rule.
    """
    if rule.bits is not None:
        return widths_within(trials, int(rule.bits / 8 * sum(trial.weights for trial in trials.values())))
    if rule.fit is not None:
        return _fit(rule.fit, trials, total_bytes)
    if rule.max_error is not None:
        goal, allowed = f"within a weight error of {rule.max_error:g}", rule.max_error**2
    else:
        assert rule.as_good_as is not None
        goal = f"as good as plain quantisation at {rule.as_good_as} bits"
        plain = sum(trial.plain_errors[rule.as_good_as] for trial in trials.values())
        allowed = plain / sum(trial.projections for trial in trials.values())
    widths = widths_reaching(trials, lambda widths: mean_error(trials, widths) <= allowed)
    if (error := mean_error(trials, widths)) > allowed:
        factor = sqrt(error / allowed) if allowed else inf
        raise InvalidRequest(f"no widths are {goal}", f"the smallest error is {factor:.3g} times as large")
    return widths


def _fit(size: int, trials: Trials[Unit], total_bytes: Callable[[Widths[Unit]], int]) -> Widths[Unit]:
    """The widths with which everything that is written takes at most `size` bytes."""
    least = _least(trials)
    taken = total_bytes(least)
    if taken > size:
        raise InvalidRequest(
            f"a folder of {size:,} bytes is out of reach", f"the least takes {taken:,}; give fewer bits to the rest"
        )
    others = taken - count_bytes(trials, least)
    for _ in range(FIT_ROUNDS):
        widths = widths_within(trials, size - others)
        taken = total_bytes(widths)
        if taken <= size:
            return widths
        others = max(others, taken - count_bytes(trials, widths))  # the texts depend on the widths
    return least


def mean_error(trials: Trials[Unit], widths: Widths[Unit]) -> float:
    """The mean squared error over all projections, each relative to its energy."""
    errors = sum(trials[unit].error(width) for unit, width in widths.items())
    return errors / sum(trial.projections for trial in trials.values())


def widths_within(trials: Trials[Unit], budget: int) -> Widths[Unit]:
    """The widths with the smallest error that take at most `budget` bytes; raises InvalidRequest if there are none.

    No projection has an error above the FLOOR if the budget allows that. What the steps along the hulls leave is spent
    on the widths between them, the largest gain first.
    """
    widths = _above_floor(trials)
    if count_bytes(trials, widths) > budget:
        widths = _least(trials)
    free = budget - count_bytes(trials, widths)
    if free < 0:
        weights = sum(trial.weights for trial in trials.values())
        bits, least = (8 * each / weights for each in (budget, budget - free))
        raise InvalidRequest(f"{bits:.2f} bits per expert weight are out of reach", f"the least is {least:.2f}")

    def price(unit: Unit, width: str) -> int:
        return trials[unit].nbytes(width) - trials[unit].nbytes(widths[unit])

    for unit, width in _steps(trials):
        if 0 < price(unit, width) <= free:
            free -= price(unit, width)
            widths[unit] = width
    while True:
        finer = [
            (trials[unit].error(width) - trials[unit].error(widths[unit]), unit, width)
            for unit, trial in trials.items()
            for width in trial.sizes
            if 0 < price(unit, width) <= free
        ]
        if not finer or (best := min(finer, key=lambda each: each[0]))[0] >= 0:
            return widths
        _, unit, width = best
        free -= price(unit, width)
        widths[unit] = width


def widths_reaching(trials: Trials[Unit], reached: Callable[[Widths[Unit]], bool]) -> Widths[Unit]:
    """The first widths, from the fewest bytes on, for which `reached` is true; else the widest."""
    widths = _least(trials)
    for unit, width in _steps(trials):
        if reached(widths):
            break
        widths[unit] = width
    return widths


def _above_floor(trials: Trials[Unit]) -> Widths[Unit]:
    """The fewest bytes of each unit with an error of at most the FLOOR; if there are none, those with the smallest
    error."""

    def cheapest(trial: WidthTrial) -> str | None:
        fine = [width for width in trial.sizes if trial.error(width) <= FLOOR * trial.projections]
        return min(fine, key=trial.nbytes) if fine else next(reversed(trial.ladder), None)

    return {unit: cheapest(trial) for unit, trial in trials.items()}


def _least(trials: Trials[Unit]) -> Widths[Unit]:
    return {unit: next(iter(trial.ladder), None) for unit, trial in trials.items()}


def _steps(trials: Trials[Unit]) -> list[tuple[Unit, str]]:
    """The rungs of all ladders but the first, ordered by how much the error falls per byte."""
    steps = [
        ((trial.error(high) - trial.error(low)) / (trial.nbytes(high) - trial.nbytes(low)), unit, high)
        for unit, trial in trials.items()
        for low, high in pairwise(trial.ladder)
    ]
    return [(unit, width) for _, unit, width in sorted(steps, key=lambda step: step[0])]


def count_bytes(trials: Trials[Unit], widths: Widths[Unit]) -> int:
    """Bytes of all units with these widths."""
    return sum(trials[unit].nbytes(width) for unit, width in widths.items())
