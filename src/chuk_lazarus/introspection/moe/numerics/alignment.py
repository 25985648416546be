"""Experts brought into one order of neurons, so that matched neurons share a place. Pure arrays.

To permute an expert's neurons, gate rows, up rows and down columns together, leaves its function as it is. Copies that
were shuffled become copies in place again, and one base holds what they share. Neurons are compared by all roles at
once; the comparison is blind to lengths and to the scales of columns, and signs are left as they are.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .neurons import Array, unit_rows
from .pairs import BLOCK, LEAD, PairMatches, group_partners, match_neurons, prepare_neurons

Group = tuple[int, ...]  # experts, in ascending order
Run = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]

SAMPLE = 64  # neurons of an expert that show whether it has to be aligned
PAIRS, LEAST_PAIRS = 512, 8  # neurons of all experts together by which groups are found, and the fewest of an expert
LEAST_INPUTS = 8  # numbers of a neuron's vector below which neurons are alike by chance
FOUND = 0.1  # the share of an expert's neurons that must be found, for the matches to say anything
NEARLY_ALL = 0.98  # the share of neurons above which an expert is not compared with the mean as well
CLOSE = 0.5  # the cosine above which two neurons belong together, even if another is nearly as close
ASSIGNED = 1024  # neurons that are assigned to places at once


@dataclass(frozen=True, slots=True)
class Bank:
    """Shared neurons, `size` of them, and which of these the first neurons of each expert are close to.

    `index` [experts, matched] has their numbers, from 0, ascending for each expert and without duplicates. The other
    neurons of an expert are not shared.
    """

    size: int
    index: NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Alignment:
    """Each expert's neurons in the order of the base of its group, or of a bank.

    `permutations` [experts, neurons] has for each place the expert's own neuron that belongs there. `groups` are the
    experts that share a base; each expert is in one of them. With a bank (`numerics.bank`), it defines which neurons
    belong together, and places have no meaning.
    """

    permutations: NDArray[np.intp]
    groups: tuple[Group, ...]
    bank: Bank | None = None

    @property
    def is_identity(self) -> bool:
        """Whether all experts stay as they are."""
        return bool((self.permutations == np.arange(self.permutations.shape[1])).all())


def keep_order(experts: int, neurons: int, groups: Sequence[Group] = ()) -> Alignment:
    """The alignment that leaves all neurons where they are; without `groups`, all experts are one group."""
    return Alignment(np.tile(np.arange(neurons), (experts, 1)), _complete(groups, experts))


def align(vectors: Mapping[str, Array], groups: Sequence[Group] | None = None, run: Run = map) -> Alignment:
    """The order of each expert's neurons that fits the base of its group, for vectors [experts, neurons, d] by role.

    `groups` are experts that share neurons, by default found from the vectors. Experts outside these keep their order.
    So do experts of which nine of ten neurons are found in place, or none at all, and all experts if the vectors are
    too short to distinguish neurons. `run` maps a function over numbers, possibly on several threads.
    """
    experts, neurons = next(iter(vectors.values())).shape[:2]
    if min(matrix.shape[2] for matrix in vectors.values()) < LEAST_INPUTS:
        return keep_order(experts, neurons, groups or ())
    prepared = prepare_neurons(vectors)
    found = _find_groups(prepared, run) if groups is None else groups
    result = keep_order(experts, neurons, found)
    roles = tuple(prepared.values())
    for group in found:
        _align_group(roles, group, result.permutations, run)
    return result


def permute(role: str, matrix: NDArray[Any], permutation: NDArray[np.intp]) -> NDArray[Any]:
    """A role's matrix [out, in] with its neurons in another order: rows of gate and up, columns of down.

    Of the biases, those of gate and up are permuted as well, those of down are not.
    """
    if role == "down":
        return matrix[..., permutation] if matrix.ndim > 1 else matrix
    return matrix[permutation]


def permute_vectors(vectors: Array, alignment: Alignment) -> Array:
    """Vectors [experts, neurons, d] with each expert's neurons in the order of its base."""
    return np.take_along_axis(vectors, alignment.permutations[:, :, None], axis=1)


def _complete(groups: Sequence[Group], experts: int) -> tuple[Group, ...]:
    """The groups, and each other expert as its own group; all experts as one group if there are none."""
    if not groups:
        return (tuple(range(experts)),)
    grouped = {expert for group in groups for expert in group}
    return tuple(sorted([*map(tuple, groups), *((e,) for e in range(experts) if e not in grouped)]))


def sample_matches(prepared: Mapping[str, Array], run: Run) -> PairMatches:
    """Where a sample of neurons is found in the other experts, [experts * n, experts], in the order of the experts."""
    experts, neurons = next(iter(prepared.values())).shape[:2]
    sampled = min(neurons, max(LEAST_PAIRS, PAIRS // experts))
    rng = np.random.default_rng(0)
    positions = np.stack([rng.permutation(neurons)[:sampled] for _ in range(experts)])
    return match_neurons(prepared, positions, run)


def is_found(matches: PairMatches) -> NDArray[np.bool_]:
    """Whether neurons of a sample are found in other experts; none is in its own."""
    found = (matches.neuron >= 0) & (matches.lead >= LEAD)
    experts = found.shape[1]
    found.reshape(experts, -1, experts)[np.arange(experts), :, np.arange(experts)] = False
    return np.asarray(found)


def _find_groups(prepared: Mapping[str, Array], run: Run) -> tuple[Group, ...]:
    """Experts that share neurons, in groups of two or more, by a sample of their neurons."""
    experts = len(next(iter(prepared.values())))
    pairs = is_found(sample_matches(prepared, run)).reshape(experts, -1, experts).mean(axis=1)
    if pairs.max(axis=1).mean() < FOUND:
        return ()
    return tuple(group for group in group_partners(pairs) if len(group) > 1)


def _align_group(roles: Sequence[Array], group: Group, permutations: NDArray[np.intp], run: Run) -> None:
    """Set the permutations of a group's experts: to one of them, then to the mean of all that fit."""

    def neurons_of(expert: int) -> Array:
        """All roles side by side, so that products are mean cosines."""
        joined = np.concatenate([role[expert] for role in roles], axis=1)
        return np.asarray(joined / np.sqrt(np.float32(len(roles))))

    def fit(base: Array, experts: Sequence[int]) -> list[int]:
        """Set the permutations of these experts; returns those of which neurons are still to be found."""
        left = []
        for expert, found in zip(experts, run(lambda expert: _order(neurons_of(expert), base), experts), strict=True):
            permutations[expert], share = found
            left += [expert] if share < NEARLY_ALL else []
        return left

    for first in dict.fromkeys((group[0], group[len(group) // 2])):
        base = neurons_of(first)
        looks = np.array(list(run(lambda expert: _look(base, neurons_of(expert)), group)))  # noqa: B023  used at once
        is_known, is_moved = looks.T
        if is_known.mean() > 0.5:
            break
    if is_moved.any():
        experts = np.array(group)
        left = fit(base, experts[is_moved].tolist()) + experts[~is_known].tolist()
        if left:
            known = experts[is_known].tolist()
            mean = sum((neurons_of(expert)[permutations[expert]] for expert in known), np.float32(0)) / len(known)
            fit(unit_rows(np.asarray(mean, np.float32)), left)


def _look(base: Array, expert: Array) -> tuple[bool, bool]:
    """By a sample of the base's neurons: whether they are found in an expert, and whether at other places."""
    asked = np.linspace(0, len(base) - 1, min(SAMPLE, len(base))).round().astype(np.intp)
    there = nearest_neurons(base[asked], expert)
    is_found = there.is_mutual & (there.lead >= LEAD)
    moved = is_found & (there.neuron != asked)
    is_known = bool(is_found.mean() >= FOUND)
    return is_known, is_known and bool(moved.sum() > FOUND * is_found.sum())  # a few by chance


@dataclass(frozen=True, slots=True)
class _Nearest:
    """For each query the nearest neuron by the mean cosine of all roles, the cosine, and its lead over the second.

    `query` [neurons] is the nearest query of each neuron in turn.
    """

    neuron: NDArray[np.intp]
    cosine: Array
    lead: Array
    query: NDArray[np.intp]

    @property
    def is_mutual(self) -> NDArray[np.bool_]:
        """Which queries are the nearest of their nearest."""
        return np.asarray(self.query[self.neuron] == np.arange(len(self.neuron)))


def nearest_neurons(queries: Array, neurons: Array) -> _Nearest:
    """The nearest of `neurons` for each of the queries, both unit rows of all roles side by side."""
    step = max(1, BLOCK // len(neurons))
    blocks = []
    query, highest = np.zeros(len(neurons), np.intp), np.full(len(neurons), -np.inf, np.float32)
    for start in range(0, len(queries), step):
        cosines = queries[start : start + step] @ neurons.T
        column_best = cosines.max(axis=0)
        is_higher = column_best > highest
        query[is_higher] = start + cosines.argmax(axis=0)[is_higher]
        np.maximum(highest, column_best, out=highest)
        rows, best = np.arange(len(cosines)), cosines.argmax(axis=1)
        cosine = cosines[rows, best].copy()
        cosines[rows, best] = -np.inf
        blocks.append((best, cosine, cosine - cosines.max(axis=1, initial=-1.0)))
    best, cosine, lead = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return _Nearest(best, cosine, lead, query)


def _order(expert: Array, base: Array) -> tuple[NDArray[np.intp], float]:
    """Which of the expert's neurons belongs to each place of the base, both [neurons, d], and which share was found.

    Neurons that are each other's nearest go first, the rest where the cosines are greatest in sum.
    """
    neurons = len(base)
    there = nearest_neurons(base, expert)
    is_found = there.is_mutual & ((there.lead >= LEAD) | (there.cosine >= CLOSE))
    permutation = np.arange(neurons)
    if is_found.mean() < FOUND:
        return permutation, 0.0
    permutation[is_found] = there.neuron[is_found]
    places = np.flatnonzero(~is_found)
    rest = np.setdiff1d(np.arange(neurons), permutation[is_found], assume_unique=True)
    for start in range(0, len(places), ASSIGNED):
        asked, pool = places[start : start + ASSIGNED], rest[start : start + ASSIGNED]
        permutation[asked] = pool[assign_neurons(base[asked] @ expert[pool].T)]
    return permutation, float(is_found.mean())


def assign_neurons(cosines: Array) -> NDArray[np.intp]:
    """Which column each row is given, so that the cosines are greatest in sum."""
    from scipy.optimize import linear_sum_assignment  # here, because it takes long to load

    return np.asarray(linear_sum_assignment(cosines, maximize=True)[1], np.intp)
