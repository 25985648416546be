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

from .neurons import Array
from .pairs import BLOCK, LEAD, group_partners, match_neurons, prepare_neurons

Group = tuple[int, ...]  # experts, in ascending order
Run = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]

SAMPLE = 64  # neurons of an expert by which it is seen whether it has to be aligned
PAIRS, LEAST_PAIRS = 512, 8  # neurons of all experts together by which groups are found, and the fewest of an expert
FOUND = 0.1  # the share of an expert's neurons that must be found, for the matches to say anything
NEARLY_ALL = 0.98  # the share of neurons from which on an expert is not compared with the mean as well
CLOSE = 0.5  # the cosine from which on two neurons belong together, though another one may be nearly as near
ASSIGNED = 1024  # neurons that are assigned to places at once


@dataclass(frozen=True, slots=True)
class Alignment:
    """Each expert's neurons in the order of the base of its group.

    `permutations` [experts, neurons] has for each place which of the expert's own neurons belongs there. `groups` are
    the experts that share a base; each expert is in one of them.
    """

    permutations: NDArray[np.intp]
    groups: tuple[Group, ...]

    @property
    def is_identity(self) -> bool:
        """Whether all experts stay as they are."""
        return bool((self.permutations == np.arange(self.permutations.shape[1])).all())


def keep_order(experts: int, neurons: int, groups: Sequence[Group] = ()) -> Alignment:
    """The alignment that leaves all neurons where they are; without `groups` all experts are one."""
    return Alignment(np.tile(np.arange(neurons), (experts, 1)), _complete(groups, experts))


def align(vectors: Mapping[str, Array], groups: Sequence[Group] | None = None, run: Run = map) -> Alignment:
    """The order of each expert's neurons that fits the base of its group, for vectors [experts, neurons, d] by role.

    `groups` are experts that share neurons, by default found from the vectors; experts in none of them keep their
    order. So do those whose neurons are found where they are, nine of ten at least, or are not found at all. `run`
    maps a function over numbers, on several threads if it likes.
    """
    experts, neurons = next(iter(vectors.values())).shape[:2]
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
    """The groups, and those alone that are in none; all experts as one where there are no groups."""
    if not groups:
        return (tuple(range(experts)),)
    grouped = {expert for group in groups for expert in group}
    return tuple(sorted([*map(tuple, groups), *((e,) for e in range(experts) if e not in grouped)]))


def _find_groups(prepared: Mapping[str, Array], run: Run) -> tuple[Group, ...]:
    """Experts that share neurons, in groups of two or more, by a sample of their neurons."""
    experts, neurons = next(iter(prepared.values())).shape[:2]
    sampled = min(neurons, max(LEAST_PAIRS, PAIRS // experts))
    rng = np.random.default_rng(0)
    positions = np.stack([rng.permutation(neurons)[:sampled] for _ in range(experts)])
    matches = match_neurons(prepared, positions, run)
    is_found = ((matches.neuron >= 0) & (matches.lead >= LEAD)).reshape(experts, sampled, experts)
    pairs = is_found.mean(axis=1)
    np.fill_diagonal(pairs, 0.0)
    if pairs.max(axis=1).mean() < FOUND:
        return ()
    return tuple(group for group in group_partners(pairs) if len(group) > 1)


def _align_group(roles: Sequence[Array], group: Group, permutations: NDArray[np.intp], run: Run) -> None:
    """Set the permutations of a group's experts: to one of them, then to the mean of all that fit."""
    first, is_known, is_moved = max(
        (_look(roles, group, reference, run) for reference in dict.fromkeys((group[0], group[len(group) // 2]))),
        key=lambda look: int(look[1].sum()),
    )
    if not is_moved.any():
        return

    def fit(base: Sequence[Array], places: Sequence[int]) -> list[int]:
        """Set the permutations of these experts; returns those of which neurons are still to be found."""

        def order(place: int) -> tuple[NDArray[np.intp], float]:
            return _order([role[group[place]] for role in roles], base)

        left = []
        for place, (permutation, share) in zip(places, run(order, places), strict=True):
            permutations[group[place]] = permutation
            left += [place] if share < NEARLY_ALL else []
        return left

    left = fit([role[first] for role in roles], np.flatnonzero(is_moved).tolist())
    left += np.flatnonzero(~is_known).tolist()
    if left:
        known = [expert for expert, knows in zip(group, is_known, strict=True) if knows]
        mean = [sum(role[e][permutations[e]] for e in known) / np.float32(len(known)) for role in roles]
        fit([_directions(role) for role in mean], left)


def _directions(rows: Array) -> Array:
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
    return np.asarray(rows / np.where(lengths > 0, lengths, np.float32(1)))


def _look(
    roles: Sequence[Array], group: Group, reference: int, run: Run
) -> tuple[int, NDArray[np.bool_], NDArray[np.bool_]]:
    """By a sample of neurons: which experts of a group the reference is found in, and in which at other places."""
    neurons = roles[0].shape[1]
    asked = np.linspace(0, neurons - 1, min(SAMPLE, neurons)).round().astype(np.intp)

    def look(place: int) -> tuple[bool, bool]:
        expert = group[place]
        if expert == reference:
            return True, False
        there = _nearest([role[reference][asked] for role in roles], [role[expert] for role in roles])
        is_found = there.is_mutual & (there.lead >= LEAD)
        moved = is_found & (there.neuron != asked)
        return bool(is_found.mean() >= FOUND), bool(moved.sum() > FOUND * is_found.sum())  # a few by chance

    looks = np.array(list(run(look, range(len(group)))))
    return reference, looks[:, 0], looks[:, 0] & looks[:, 1]


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


def _cosines(queries: Sequence[Array], neurons: Sequence[Array]) -> Array:
    """The mean over roles of the cosines, [queries, neurons]."""
    total = sum((asked @ pool.T for asked, pool in zip(queries, neurons, strict=True)), np.float32(0))
    return np.asarray(total / np.float32(len(queries)))


def _nearest(queries: Sequence[Array], neurons: Sequence[Array]) -> _Nearest:
    step = max(1, BLOCK // len(neurons[0]))
    blocks = []
    query, highest = np.zeros(len(neurons[0]), np.intp), np.full(len(neurons[0]), -np.inf, np.float32)
    for start in range(0, len(queries[0]), step):
        cosines = _cosines([role[start : start + step] for role in queries], neurons)
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


def _order(expert: Sequence[Array], base: Sequence[Array]) -> tuple[NDArray[np.intp], float]:
    """Which of the expert's neurons belongs to each place of the base, both [neurons, d] of each role; and how large a
    share was found.

    Neurons that are each other's nearest go first, the rest where the cosines are greatest in sum.
    """
    neurons = len(base[0])
    there = _nearest(base, expert)
    is_found = there.is_mutual & ((there.lead >= LEAD) | (there.cosine >= CLOSE))
    permutation = np.arange(neurons)
    if is_found.mean() < FOUND:
        return permutation, 0.0
    permutation[is_found] = there.neuron[is_found]
    places = np.flatnonzero(~is_found)
    rest = np.setdiff1d(np.arange(neurons), permutation[is_found], assume_unique=True)
    for start in range(0, len(places), ASSIGNED):
        asked, pool = places[start : start + ASSIGNED], rest[start : start + ASSIGNED]
        permutation[asked] = pool[_assign(_cosines([role[asked] for role in base], [role[pool] for role in expert]))]
    return permutation, float(is_found.mean())


def _assign(cosines: Array) -> NDArray[np.intp]:
    """Which column each row is given, so that the cosines are greatest in sum."""
    from scipy.optimize import linear_sum_assignment  # here, because it takes long to load

    return np.asarray(linear_sum_assignment(cosines, maximize=True)[1], np.intp)
