"""Which expert of the original a converted expert is. Pure arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..numerics.neurons import Array

Corners = Mapping[int, Array]  # expert -> some of the numbers of one of its matrices, of one shape
SLACK = 1.5  # the error of a part of a matrix may be this much larger than that of the whole
NEARER = 0.9  # an expert is found if its distance is below this share of the right expert's
ROUNDING = 1e-6  # a distance below which experts are the same
ALIKE = 0.5  # two experts are identical if their distance is below this share of that of the originals


@dataclass(frozen=True, slots=True)
class Sources:
    """The real sources of experts with large errors: `of` has the other expert of the original that each is, if found,
    and `same` another converted expert that is identical, though their originals are not."""

    of: Mapping[int, int]
    same: Mapping[int, int]


def find_sources(original: Corners, converted: Corners, experts: Sequence[int], allowed: float) -> Sources:
    """Where `experts` are found among all of the original.

    `original` has the corners of all experts, `converted` those of `experts` and of some others; `allowed` is the
    relative error that a converted expert may have.
    """
    numbers = sorted(original)
    pool = _flatten([original[number] for number in numbers])
    own = {expert: _flatten([corner]) for expert, corner in converted.items()}
    of: dict[int, int] = {}
    same: dict[int, int] = {}
    for expert in experts:
        far = _distances(own[expert], pool)[0]
        nearest = int(far.argmin())
        is_nearer = far[nearest] <= SLACK * allowed and far[nearest] < NEARER * far[numbers.index(expert)]
        if is_nearer and numbers[nearest] != expert:
            of[expert] = numbers[nearest]
        for other in sorted(own.keys() - {expert}) if own[expert].std() else ():
            there = _distances(pool[[numbers.index(expert)]], pool[[numbers.index(other)]])[0, 0]
            if _distances(own[expert], own[other])[0, 0] < min(SLACK * allowed, ALIKE * there):
                same[expert] = other
                break
    return Sources(of, same)


def find_strays(original: Corners, converted: Corners) -> set[int]:
    """The experts that are nearer to another expert of the original than to their own, or identical to another one
    though their originals are not; both models have the same experts."""
    numbers = sorted(original)
    here, there = (_flatten([corners[number] for number in numbers]) for corners in (converted, original))
    far = _distances(here, there)
    own = far.diagonal().copy()
    np.fill_diagonal(far, np.inf)
    apart = _distances(here, here)
    were_apart = _distances(there, there)
    np.fill_diagonal(apart, np.inf)
    same = (apart < ALIKE * were_apart) & (were_apart > ROUNDING) & (here.std(axis=1, keepdims=True) > 0)
    return {
        number
        for place, number in enumerate(numbers)
        if (far[place].min() < NEARER * own[place] and own[place] > ROUNDING) or same[place].any()
    }


def find_order(original: Corners, converted: Corners) -> tuple[int, ...]:
    """For each converted expert, which expert of the original is nearest."""
    pool = _flatten([original[number] for number in sorted(original)])
    nearest = _distances(_flatten([converted[number] for number in sorted(converted)]), pool).argmin(axis=1)
    return tuple(int(number) for number in nearest)


def keeps_groups(order: Sequence[int], groups: int) -> bool:
    """Whether experts stay together in that many equal groups of consecutive experts, as group-limited routing
    needs."""
    if groups < 2 or len(order) % groups:
        return True
    return all(
        len({source // (len(order) // groups) for source in part}) == 1 for part in np.split(np.array(order), groups)
    )


def common_corner(corners: Sequence[Corners]) -> list[Corners]:
    """The part that all corners have."""
    shapes = [corner.shape for some in corners for corner in some.values()]
    rows, columns = min(shape[0] for shape in shapes), min(shape[1] for shape in shapes)
    return [{number: corner[:rows, :columns] for number, corner in some.items()} for some in corners]


def name_order(order: Sequence[int]) -> str:
    """For instance "expert 0 is 3 of the original, 1 is 0, ...\""""
    moved = [(here, there) for here, there in enumerate(order) if here != there]
    names = [f"{here} is {there}{' of the original' if not place else ''}" for place, (here, there) in enumerate(moved)]
    return "expert " + ", ".join(names if len(names) < 5 else [*names[:3], "..."])


def _flatten(corners: Sequence[Array]) -> NDArray[np.float64]:
    return np.stack([np.nan_to_num(corner.reshape(-1).astype(np.float64)) for corner in corners])


def _distances(values: NDArray[np.float64], pool: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distance of rows of numbers from each row of a pool, [rows, pool], relative to the latter's length."""
    lengths = np.einsum("ij,ij->i", pool, pool)
    squares = np.einsum("ij,ij->i", values, values)[:, None] + lengths - 2 * values @ pool.T
    lost = np.sqrt(np.maximum(squares, 0.0))
    return np.asarray(np.divide(lost, np.sqrt(lengths), out=np.where(lost > 0, np.inf, 0.0), where=lengths > 0))
