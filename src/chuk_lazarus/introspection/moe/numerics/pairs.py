"""Which neurons of one expert are found in which other expert, for all pairs of experts. Pure arrays.

A neuron is found in another expert if the nearest neighbour of its vector is the same neuron there in all roles (gate
row, up row, down column), and clearly nearer than the second nearest. The comparison ignores what does not change the
function of a layer, or only its scale:

- the order of neurons, and the length of each vector;
- the scale of a column: columns are scaled to equal weight over all neurons;
- a sign that up and down have in common;
- a direction that all neurons share: the mean neuron is subtracted.

If the down projections were mixed, by a rotation of the neurons that a runtime undoes, gate and up still agree. Two
roles prove less than three, so a match in these two alone counts only if the neurons are close.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .neurons import Array, unit_rows

BLOCK = 2**22  # cosines that one thread holds for each role
LEAD = 0.1  # by which the nearest neuron must be nearer than the second nearest, in the mean over roles
NEAR = 0.6  # the mean cosine above which gate and up count even if down disagrees
EQUAL = 0.9  # the cosine above which two roles of a neuron are the same vector, or nearly
SIGNED = ("up", "down")  # roles whose signs may change together, where there is a gate


@dataclass(frozen=True, slots=True)
class PairMatches:
    """Where queries are found, each array [queries, experts].

    `neuron` is the expert's neuron that is nearest in all roles, -1 if the roles disagree. `cosine` is the largest mean
    cosine over the roles with a neuron, and `lead` how much larger it is than the second largest. If the roles
    disagree, `without_down` is the neuron that gate and up alone find, if it is close and clearly nearest; else -1.
    """

    neuron: NDArray[np.int32]
    cosine: Array
    lead: Array
    without_down: NDArray[np.int32]


def prepare_neurons(roles: Mapping[str, Array]) -> dict[str, Array]:
    """Each role's vectors [experts, neurons, inputs] as directions that can be compared; of equal roles only the first.

    Vectors of zeros stay zeros.
    """
    prepared: dict[str, Array] = {}
    for role, vectors in roles.items():
        flat = unit_rows(vectors.reshape(-1, vectors.shape[-1]))  # a copy, which the rest changes in place
        is_zero = ~flat.any(axis=1)
        flat /= _lengths_or_one(flat, "ni,ni->i")
        flat /= _lengths_or_one(flat, "ni,ni->n")[:, None]
        flat -= flat.sum(axis=0) / np.float32(max(1, len(flat) - int(is_zero.sum())))
        flat[is_zero] = 0
        flat /= _lengths_or_one(flat, "ni,ni->n")[:, None]
        vectors = flat.reshape(vectors.shape)
        if not any(_are_equal(vectors, earlier) for earlier in prepared.values()):
            prepared[role] = vectors
    return prepared


def _lengths_or_one(rows: Array, subscripts: str) -> Array:
    """The lengths of rows or columns, 1 for those of zeros."""
    lengths = np.sqrt(np.einsum(subscripts, rows, rows))
    lengths[lengths == 0] = 1
    return np.asarray(lengths)


def _are_equal(vectors: Array, others: Array) -> bool:
    if vectors.shape != others.shape:
        return False
    cosines = np.abs(np.einsum("eni,eni->en", vectors, others))
    return bool(np.median(cosines) > EQUAL)


def match_neurons(
    roles: Mapping[str, Array],
    positions: NDArray[np.intp],
    run: Callable[[Callable[[int], PairMatches], Iterable[int]], Iterable[PairMatches]] = map,
) -> PairMatches:
    """Where the neurons at `positions` [experts, n] of all experts are found; queries are in the order of experts.

    `roles` are from `prepare_neurons`. `run` maps a function over the experts, on several threads if it likes.
    """
    is_gated = "gate" in roles and len(roles) > 1
    queries = {role: _take(vectors, positions) for role, vectors in roles.items()}

    count = len(next(iter(queries.values())))
    block = max(1, BLOCK // next(iter(roles.values())).shape[1])

    def match(expert: int) -> PairMatches:
        blocks = [
            nearest_of_all_roles(
                {role: queries[role][start : start + block] @ vectors[expert].T for role, vectors in roles.items()},
                is_gated,
            )
            for start in range(0, count, block)
        ]
        return _join(blocks, np.concatenate)

    return _join(list(run(match, range(len(positions)))), partial(np.stack, axis=1))


def _join(matches: Sequence[PairMatches], join: Callable[[Sequence[Any]], Any]) -> PairMatches:
    return PairMatches(*(join([getattr(one, name) for one in matches]) for name in PairMatches.__slots__))


def nearest_of_all_roles(cosines: Mapping[str, Array], is_gated: bool) -> PairMatches:
    """For cosines [queries, neurons] by role, the neuron that is nearest in all roles; arrays are [queries].

    Where `is_gated`, up and down may both have the other sign.
    """
    signed = [cosines[role] for role in SIGNED if is_gated and role in cosines]
    plain = [matrix for role, matrix in cosines.items() if not (is_gated and role in SIGNED)]
    if len(signed) == 1:  # of a tied pair one role is left: its sign is free, too
        plain, signed = [*plain, np.abs(signed[0])], []
    mean = sum(plain, np.float32(0)) + (np.abs(signed[0] + signed[1]) if signed else np.float32(0))
    mean = np.asarray(mean / len(cosines), np.float32)
    rows = np.arange(len(mean))
    best = mean.argmax(axis=1)
    cosine = mean[rows, best].copy()
    mean[rows, best] = -np.inf
    lead = cosine - mean.max(axis=1, initial=-1.0)
    agrees = np.ones(len(mean), bool)
    for matrix in plain:
        nearest = matrix.argmax(axis=1)
        agrees &= (nearest == best) & (matrix[rows, best] > 0)
    without_down = np.full(len(mean), -1, np.int32)
    if signed:
        left = np.flatnonzero(agrees) if 2 * agrees.sum() < len(mean) else rows  # of unrelated neurons a few
        place = best[left]
        sign = np.sign(signed[0][left, place] + signed[1][left, place])
        for matrix in signed:
            agrees[left] &= ((matrix if left is rows else matrix[left]) * sign[:, None]).argmax(axis=1) == place
            agrees[left] &= matrix[left, place] * sign > 0
        gate, up = cosines["gate"], cosines["up"]
        is_likely = ~agrees & (gate[rows, nearest] + np.abs(up[rows, nearest]) >= 2 * NEAR)  # `nearest` by gate
        without_down[is_likely] = _match_without_down(gate[is_likely], up[is_likely])
    return PairMatches(np.where(agrees, best, -1).astype(np.int32), cosine, lead.astype(np.float32), without_down)


def _match_without_down(gate: Array, up: Array) -> NDArray[np.int32]:
    """The neurons that gate and up alone find, near and clearly nearest; -1 for none."""
    found = nearest_of_all_roles({"gate": gate, "up": up}, is_gated=True)
    return np.where((found.cosine >= NEAR) & (found.lead >= LEAD), found.neuron, np.int32(-1))


def are_mutual(
    roles: Mapping[str, Array], positions: NDArray[np.intp], partners: NDArray[np.intp], neurons: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Whether the neuron that a query matches in a partner matches the query in turn, [experts, n].

    `partners` [experts] is the partner of each expert, and `neurons` [experts, n] the neurons there that its queries
    match, -1 for none.
    """
    is_gated = "gate" in roles and len(roles) > 1
    mutual = np.zeros(positions.shape, bool)
    for expert, partner in enumerate(partners):
        found = neurons[expert] >= 0
        if found.any():
            cosines = {
                role: vectors[partner][neurons[expert][found]] @ vectors[expert].T for role, vectors in roles.items()
            }
            mutual[expert, found] = nearest_of_all_roles(cosines, is_gated).neuron == positions[expert][found]
    return mutual


def agreement_chance(nearest: NDArray[Any], is_near: NDArray[np.bool_], neurons: int) -> float:
    """The probability that independent roles find the same one of `neurons` neurons, given how often each role finds
    each; 0 if nothing is close. `nearest` is [roles, queries], `is_near` [queries]."""
    if not is_near.any():
        return 0.0
    shares = [np.bincount(role[is_near], minlength=neurons) / is_near.sum() for role in nearest]
    return float(np.prod(shares, axis=0).sum())


def group_partners(pairs: NDArray[np.float64]) -> tuple[tuple[int, ...], ...]:
    """Experts that share at least a third as many neurons with each other as each does with its best partner."""
    both = np.minimum(pairs, pairs.T)
    best = both.max(axis=1)
    return connected_experts(both > np.maximum(np.minimum(best[:, None], best[None, :]) / 3, 0.02))


def connected_experts(alike: NDArray[np.bool_]) -> tuple[tuple[int, ...], ...]:
    """The connected components of a graph, given as [experts, experts]."""
    near = alike | alike.T | np.eye(len(alike), dtype=bool)
    before, labels = None, np.arange(len(alike))  # a component's label becomes its least place
    while before is None or (labels != before).any():
        before, labels = labels, np.where(near, labels, len(alike)).min(axis=1, initial=len(alike))
    return tuple(tuple(int(place) for place in np.flatnonzero(labels == label)) for label in np.unique(labels))


def _take(vectors: Array, positions: NDArray[np.intp]) -> Array:
    """The vectors at `positions` [experts, n] of each expert, [experts * n, inputs]."""
    taken = np.take_along_axis(vectors, positions[:, :, None], axis=1)
    return taken.reshape(-1, vectors.shape[-1])
