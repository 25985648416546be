"""The size of a bank of neurons: how large its deltas are, and the widths of bank, deltas and unshared neurons."""

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ..numerics.alignment import Bank
from ..numerics.hull import lower_hull
from .codes import BankShape, MatrixCode, RoleCodes
from .codes.bits import LEVELS, BitsCode
from .codes.code import Shape
from .codes.low_rank import FactorsCode

NOTHING = FactorsCode(0, BitsCode(8))  # no delta: neurons are those of the bank
MOST_LEVELS = 64  # of a bank; more do not lower the error


def sharing_experts(index: NDArray[np.intp], count: int) -> list[int]:
    """Experts that share many neurons of a bank: one, then repeatedly the one that shares the most with those chosen so
    far."""
    chosen = [0]
    while len(chosen) < count:
        known = np.unique(index[chosen])
        shared = [-1 if e in chosen else int(np.isin(own, known).sum()) for e, own in enumerate(index)]
        chosen.append(int(np.argmax(shared)))
    return chosen


def bank_delta_share(matched: Sequence[NDArray[np.float32]], bank: Bank, chosen: Sequence[int]) -> float:
    """The energy share d of the deltas of the experts' matched neurons [matched, inputs], from bank neurons that
    several share.

    A neuron's users differ less from their own mean than from the mean of all users; this is corrected for. 1 if none
    is shared.
    """
    users = np.bincount(bank.index.ravel(), minlength=bank.size)
    places = np.concatenate([bank.index[expert] for expert in chosen])
    vectors = np.concatenate(matched)
    order = np.argsort(places, kind="stable")
    names, starts, counts = np.unique(places[order], return_index=True, return_counts=True)
    sums = np.add.reduceat(vectors[order].astype(np.float64), starts, axis=0)
    energies = np.add.reduceat(np.square(vectors[order], dtype=np.float64).sum(axis=1), starts)
    several = counts > 1
    left = (energies - np.square(sums).sum(axis=1) / counts)[several] / (counts[several] - 1)
    left *= (counts * (1 - 1 / users[names]))[several]
    energy = float(energies[several].sum())
    return min(1.0, max(0.0, float(left.sum()) / energy)) if energy else 1.0


def bank_ladder(
    bank: BankShape,
    shape: Shape,
    experts: int,
    group: int,
    rungs: Sequence[MatrixCode],
    error: Callable[[RoleCodes], float],
) -> list[RoleCodes]:
    """The codes of bank, deltas and unshared neurons with the smallest error for their bytes, from the fewest bytes on.

    These are on the lower convex hull of all combinations. There are no deltas as long as those from a wider bank would
    take more than they save. `group` weights of the bank share a scale; `rungs` are the codes of both deltas and
    unshared neurons, of ascending bits.
    """
    rests: Sequence[MatrixCode | None] = rungs if bank.matched < shape[bank.axis] else [None]
    deltas: list[MatrixCode] = [NOTHING, *rungs]
    bases = [BitsCode(levels, group) for levels in LEVELS if levels <= MOST_LEVELS]
    every = [RoleCodes(*sides, bank) for sides in product(bases, deltas, rests)]
    hull = lower_hull([each.nbytes(shape, experts) for each in every], [error(each) for each in every])
    return [every[place] for place in hull]
