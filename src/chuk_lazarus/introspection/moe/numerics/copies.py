"""Experts that are the same to the last bit. Pure arrays.

Which experts are the same is an array [experts]: for each expert the number of the first one that is the same as it.
It is refined with each part of the matrices that is read, so that experts that differ somewhere are never compared
again.
"""

import hashlib
from collections.abc import Hashable, Iterable

import numpy as np
from numpy.typing import NDArray


def all_same(experts: int) -> NDArray[np.intp]:
    """What is known before anything was read."""
    return np.zeros(experts, np.intp)


def refine(first: NDArray[np.intp], values: NDArray[np.float32]) -> NDArray[np.intp]:
    """Of the experts that are the same so far, those whose `values` [experts, ...] are the same as well."""
    is_repeated = np.bincount(first, minlength=len(first)) > 1
    digests = [
        hashlib.sha256(np.ascontiguousarray(own).data).digest() if is_repeated[number] else b""
        for number, own in zip(first, values, strict=True)
    ]
    return _number(zip(first.tolist(), digests, strict=True))


def meet(*parts: NDArray[np.intp]) -> NDArray[np.intp]:
    """The experts that are the same in each of the parts."""
    return _number(zip(*(part.tolist() for part in parts), strict=True))


def group_copies(first: NDArray[np.intp]) -> tuple[tuple[int, ...], ...]:
    """The groups of two or more experts that are the same."""
    groups: dict[int, list[int]] = {}
    for expert, number in enumerate(first.tolist()):
        groups.setdefault(number, []).append(expert)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _number(keys: Iterable[Hashable]) -> NDArray[np.intp]:
    """For each expert the first one that has the same key."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(key, expert) for expert, key in enumerate(keys)], np.intp)
