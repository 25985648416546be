"""The overlay: every expert as one base, shared by all, plus a low-rank delta of its own.

`expert ≈ base + left @ right`. The base is the mean of all experts; the factors of each delta are the best of their
rank (Eckart and Young, 1936).
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .numerics.low_rank import BYTES_PER_NUMBER

Key = TypeVar("Key")


def as_stored(array: NDArray[Any]) -> NDArray[np.float32]:
    """The numbers as a bfloat16 file would give them back."""
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Choice:
    """What rank buys in one projection of one layer.

    `spectrum` is the energy that each further rank adds, largest first, over all experts; `cost` the bytes that one
    rank takes.
    """

    spectrum: NDArray[np.float64]
    cost: int


def spread_rank(choices: Mapping[Key, Choice], *, budget: float = np.inf, energy_left: float = 0.0) -> dict[Key, int]:
    """Ranks that leave the least energy out within `budget` bytes, or that leave at most `energy_left` for the fewest
    bytes.

    Rank goes where it buys the most energy per byte. As a spectrum only falls, that is the optimum wherever all costs
    are equal, as they are for gate, up and down of equal layers.
    """
    ranks = dict.fromkeys(choices, 0)
    left = sum(float(choice.spectrum.sum()) for choice in choices.values())
    order = list(choices)
    queue = [(-choices[key].spectrum[0] / choices[key].cost, place) for place, key in enumerate(order)]
    heapq.heapify(queue)
    while queue and left > energy_left:
        _, place = heapq.heappop(queue)
        key = order[place]
        choice, rank = choices[key], ranks[key]
        if choice.cost > budget or choice.spectrum[rank] <= 0:
            continue  # what costs less may still fit
        budget -= choice.cost
        left -= float(choice.spectrum[rank])
        ranks[key] = rank + 1
        if rank + 1 < len(choice.spectrum):
            heapq.heappush(queue, (-choice.spectrum[rank + 1] / choice.cost, place))
    return ranks


def round_to_bits(matrix: NDArray[np.float32], bits: int, group: int = 64) -> NDArray[np.float32]:
    """The matrix after plain affine quantisation: `bits` per weight, a scale and a least value per group of a row.

    Scale and least value are rounded to bfloat16, as they are stored. A last, shorter group is a group too.
    """
    result = np.empty_like(matrix)
    for start in range(0, matrix.shape[1], group):
        part = matrix[:, start : start + group]
        low = as_stored(part.min(axis=1, keepdims=True))
        step = as_stored((part.max(axis=1, keepdims=True) - low) / (2**bits - 1))
        levels = np.divide(part - low, step, out=np.zeros_like(part), where=step > 0)
        result[:, start : start + group] = low + step * np.clip(np.rint(levels), 0, 2**bits - 1)
    return result


def quantised_bytes(shape: Sequence[int], bits: int, group: int = 64) -> int:
    """Bytes of a matrix at `bits` per weight, with two numbers of two bytes per group of a row."""
    rows, columns = shape
    return rows * (-(-columns * bits // 8) + 2 * BYTES_PER_NUMBER * -(-columns // group))
