"""Error by size: from few bits per weight to many, the errors of codes, of low rank, and of the best possible code."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from math import prod, sqrt

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidRequest
from ..numerics.rates import least_error
from ..reports import LadderRow
from .alternatives import Factored, mean_error
from .bit_budget import USUAL_BITS, BitRule
from .fit import SCALE_BITS
from .quantisation import quantised_bytes
from .trials import PLAIN_BITS, RoleTrial, predict_error

Trials = Mapping[int, Mapping[str, RoleTrial]]
Variances = Sequence[tuple[float, float]]

WAYS = {
    "rounding": "plain quantisation",
    "plain": "plain codes",
    "coded": "codes on a base",
    "low_rank": "a low-rank overlay",
    "svd": "plain SVDs",
}
USABLE = 1.2  # times the error of 4-bit quantisation: a larger error is not usable


def list_variances(gram: NDArray[np.floating]) -> tuple[tuple[float, float], ...]:
    """The eigenvalues of the experts' scalar products [experts, experts], largest first: each as a share of their sum,
    and the share of the weights that has it."""
    values: NDArray[np.float64] = np.maximum(np.linalg.eigvalsh(np.asarray(gram, np.float64)), 0.0)[::-1]
    return tuple((float(value), 1 / len(values)) for value in values / (values.sum() or 1.0))


def draw_ladder(
    trials: Trials,
    factored: Sequence[Sequence[Factored]],
    variances: Mapping[int, Mapping[str, Variances]],
    weights: int,
) -> tuple[LadderRow, ...]:
    """A row for each size in `factored`, which is of the layers in `trials`; `weights` are those of all MoE layers.

    `variances` are those of `list_variances`, or of `bank_variances`, by layer and role.
    """
    without_bases = {
        number: {role: replace(trial, delta_share=1.0) for role, trial in roles.items()}
        for number, roles in trials.items()
    }
    rows = []
    for by_layer in zip(*factored, strict=True):
        bits = by_layer[0].bits
        rounding_bits = _widest(bits, trials)
        rows.append(
            LadderRow(
                bits=bits,
                bytes=int(bits / 8 * weights),
                rounding=_rounding_error(rounding_bits, trials) if rounding_bits else None,
                rounding_bits=rounding_bits,
                plain=_coded_error(bits, without_bases),
                coded=_coded_error(bits, trials),
                low_rank=mean_error([layer.overlay for layer in by_layer]),
                svd=mean_error([layer.svd for layer in by_layer]),
                bound=_bound(bits, trials, variances),
            )
        )
    return tuple(rows)


def bits_as_good(trials: Trials) -> float | None:
    """The bits per weight of codes whose error is at most that of plain 4-bit quantisation; None if there are none."""
    try:
        codes = BitRule(as_good_as=USUAL_BITS).choose(trials)
    except InvalidRequest:
        return None
    size = sum(codes[number][role].nbytes(trial.shape, trial.experts) for number, role, trial in _each(trials))
    return 8 * size / _count_weights(trials)


def advise(rows: Sequence[LadderRow], usual_error: float, stored_bits: float, as_good: float | None) -> str:
    """Which method has the smallest error at which size, and what is as good as plain 4-bit quantisation
    (`usual_error`).

    Only sizes below `stored_bits`, the bits per weight of the file, count. Nothing is worthwhile if all errors are much
    larger than the usual one. `as_good` is from `bits_as_good`.
    """
    best = {row.bits: row.best for row in rows if row.bits < stored_bits}
    if not any(getattr(row, best[row.bits]) <= USABLE * usual_error for row in rows if row.bits in best):
        return f"nothing: everything smaller than the file has a larger error than {USUAL_BITS}-bit quantisation"
    runs = [(WAYS[way], [*run]) for way, run in groupby(best, key=best.__getitem__)]
    ways = ", ".join(f"{way} at {_span(sizes)} bits per weight" for way, sizes in runs)
    advice = f"smallest error: {ways}"
    if as_good is None or as_good >= stored_bits:
        return advice
    return (
        f"{advice}. Codes of {as_good:.2f} bits are as good as {USUAL_BITS}-bit quantisation, which takes "
        f"{USUAL_BITS + SCALE_BITS:g} bits with its scales ({BitRule(as_good_as=USUAL_BITS).options})"
    )


def _span(sizes: Sequence[float]) -> str:
    return f"{sizes[0]:g}" if len(sizes) == 1 else f"{sizes[0]:g} to {sizes[-1]:g}"


def _each(trials: Trials) -> Iterable[tuple[int, str, RoleTrial]]:
    return ((number, role, trial) for number, roles in trials.items() for role, trial in roles.items())


def _count_weights(trials: Trials) -> int:
    return sum(trial.experts * prod(trial.shape) for _, _, trial in _each(trials))


def _widest(bits: float, trials: Trials) -> int | None:
    """The most bits of plain quantisation that take at most `bits` per weight with their scales, None for none."""
    room = bits / 8 * _count_weights(trials)
    sizes = {
        width: sum(trial.experts * quantised_bytes(trial.shape, width) for _, _, trial in _each(trials))
        for width in PLAIN_BITS
    }
    return max((width for width, size in sizes.items() if size <= room), default=None)


def _rounding_error(bits: int, trials: Trials) -> float:
    errors = []
    for roles in trials.values():
        energy = sum(trial.energy for trial in roles.values())
        lost = sum(trial.energy * trial.rounding_errors[bits] for trial in roles.values())
        errors.append(sqrt(lost / energy) if energy else 0.0)
    return mean_error(errors)


def _coded_error(bits: float, trials: Trials) -> float | None:
    """The error of the best codes of that many bits, None if even the smallest take more."""
    try:
        codes = BitRule(bits).choose(trials)
    except InvalidRequest:
        return None
    return mean_error([predict_error(roles, codes[number]) for number, roles in trials.items()])


def _bound(bits: float, trials: Trials, variances: Mapping[int, Mapping[str, Variances]]) -> float:
    """The smallest possible error of any code, as the root mean square over the layers, if the weights are Gaussian."""
    values, counts = [], []
    for number, roles in trials.items():
        energy = sum(trial.energy for trial in roles.values()) or 1.0
        for role, trial in roles.items():
            for share, weights in variances[number][role]:
                count = weights * trial.experts * prod(trial.shape)
                values.append(trial.energy / energy * share / count)
                counts.append(count)
    return sqrt(least_error(np.array(values), np.array(counts, float), bits) / len(trials))
