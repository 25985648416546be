"""Where a layer's neurons come from: the evidence of neurons matched between experts.

A neuron is a gate row, an up row and a down column. Copies of one neuron stay each other's nearest in all three
vectors, even after long training, shuffling and slicing. Unrelated neurons are each other's nearest in one of the
vectors by chance, but hardly ever in all three. Matching the rows of two networks, and asking whether gate and up agree
about the match, is the test of Zhu et al., Independence Tests for Language Models, ICML 2025 (phi_MATCH); here it is
applied to the experts of one layer, neuron by neuron.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc, ndtr

from ..numerics.neurons import Array, Nearest
from ..numerics.pairs import (
    LEAD,
    PairMatches,
    agreement_chance,
    are_mutual,
    connected_experts,
    match_neurons,
    prepare_neurons,
)

Group = tuple[int, ...]  # experts, in ascending order

CLOSE = 0.5  # the mean cosine over roles above which two neurons count as close
FEW = 0.02  # the share of close neurons above which they show the kind of upcycling
STRONG = 0.8  # the mean cosine that independent experts do not reach, however alike training makes them
SAME = 1e-5  # twins may differ by this share of their energy, from rounding in float32
ALL, EQUAL = 0.95, 0.99  # the share of neurons, and their cosine, that show an expert to be another one, reordered
MOST = 0.8  # two experts with more strong matches than this share of neurons count as one, duplicated
LEAST_INPUTS = 16  # numbers of a neuron's vector below which neurons are alike by chance
PAIR_QUERIES = 1024  # neurons of all experts together that are looked for in all
COMPARISONS = 2**25  # of neurons, beyond which fewer are looked for
LEAST_QUERIES, FEWEST_QUERIES = 8, 4  # neurons of an expert: within COMPARISONS, and the least beyond
QUERIES = 512  # neurons of all chosen experts together that are looked for in the others


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence of the matches of `queries` neurons with the other experts.

    `kept` is the share of neurons for which all roles find the same neuron in some other expert (a neuron of zeros is
    found nowhere), and `close` the share for which the mean cosine over the roles is then at least CLOSE. `chance` is
    the share to expect if the roles' matches were independent, given how often each neuron is found at all (so that
    neurons close to everything prove nothing), and `p_value` the probability of at least as many by chance. `spread` is
    the share of the other experts in which a kept neuron is found, `in_place` the share of these matches at the
    neuron's own position. `pairs` [experts, experts] is the share of one expert's neurons that are found in the other.

    `cosine` is the mean, over roles and other experts, of the cosine with the neuron at the same position,
    `permuted_cosine` its expected value if each expert's neurons were shuffled, and `cosine_p_value` the probability of
    at least as much if they were. `nearest` [queries] is the largest mean over roles of the cosine with the nearest
    neuron in another expert, and `runner_up` that of the second nearest there.
    """

    queries: int
    kept: float
    close: float
    chance: float
    p_value: float
    spread: float
    in_place: float
    pairs: NDArray[np.float64]
    cosine: float
    permuted_cosine: float
    cosine_p_value: float
    nearest: Array
    runner_up: Array


def match_evidence(
    roles: Mapping[str, Nearest], owner: NDArray[np.intp], positions: NDArray[np.intp], neurons: int
) -> Evidence:
    """The evidence of all roles' matches.

    `owner` [queries] is the expert that a query is from, whose matches are left out, `positions` [queries] its place
    there, and `neurons` how many an expert has.
    """
    neurons_found = np.stack([nearest.neuron for nearest in roles.values()])  # [roles, queries, experts]
    queries, experts = neurons_found.shape[1:]
    others = np.arange(experts) != owner[:, None]
    near = np.all([nearest.cosine > 0 for nearest in roles.values()], axis=0)  # zeros are near to nothing
    same = (neurons_found == neurons_found[0]).all(axis=0) & near & others
    kept = same.any(axis=1)
    close = same & (np.mean([nearest.cosine for nearest in roles.values()], axis=0) >= CLOSE)
    chances = np.zeros((experts, experts))
    for expert in range(experts):
        mine = owner == expert
        for partner in range(experts):
            if partner != expert:
                chances[expert, partner] = agreement_chance(
                    neurons_found[:, mine, partner], near[mine, partner], neurons
                )
    # an expert of zeros has no matches by chance either; where no expert has any, nothing is proved
    chance = float(np.mean(1.0 - np.prod(1.0 - chances, axis=1))) if (near & others).any() else 1.0
    pairs = np.stack([same[owner == expert].mean(axis=0) for expert in range(experts)])

    def over_roles(figure: str) -> Array:
        return np.where(others, np.mean([getattr(nearest, figure) for nearest in roles.values()], axis=0), 0.0)

    # If neurons were shuffled, a position's cosine would be a random one of the query's cosines with all neurons. The
    # mean of the roles' deviations is at least the deviation of their mean, and a pair of neurons may be seen from both
    # sides, which doubles the variance: the p-value is too large rather than too small.
    in_place, permuted, deviation = over_roles("in_place"), over_roles("mean"), over_roles("deviation")
    excess = float((in_place - permuted).sum(dtype=np.float64))
    scatter = float(np.sqrt(2 * np.square(deviation, dtype=np.float64).sum()))
    return Evidence(
        queries,
        float(kept.mean()),
        float(close.any(axis=1).mean()),
        chance,
        float(bdtrc(kept.sum() - 1, queries, min(1.0, chance))),
        float(same[kept].sum(axis=1).mean() / (experts - 1)) if kept.any() else 0.0,
        float((same & (neurons_found[0] == positions[:, None])).sum() / same.sum()) if same.any() else 0.0,
        pairs,
        float(in_place[others].mean()),
        float(permuted[others].mean()),
        float(ndtr(-excess / scatter)) if scatter > 0 else 1.0,
        over_roles("cosine").max(axis=1),
        over_roles("runner_up").max(axis=1),
    )


def find_groups(evidence: Evidence, experts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The experts that share more than half of their neurons with each other, in groups of two or more."""
    groups = connected_experts((evidence.pairs > 0.5) | (evidence.pairs.T > 0.5))
    return tuple(tuple(experts[place] for place in group) for group in groups if len(group) > 1)


@dataclass(frozen=True, slots=True)
class PairEvidence:
    """Which experts of a layer share neurons, over all experts that are not identical.

    `shared` is the share of an expert's neurons that are found in its best partner and found back as the same ones,
    averaged over the experts; `strong` that of neurons found so with a mean cosine of at least STRONG. `without_down`
    is the share found so in all roles, or in gate and up alone and close; it equals `shared` if these find hardly any
    more (None unless these are two roles beside down). The partner is chosen by one half of the queries, and the shares
    are measured on the other, so that their meaning does not depend on the number of experts.

    `pairs` [experts, experts] is the share of one expert's queries that are found in another, with or without down,
    `partners` the best partner of each expert, `in_place` the share of all that is found at its own position, and
    `anywhere` the share of queries found in any expert at all. `nearest` and `runner_up` [queries] are each query's
    mean cosine over the roles with the nearest neuron of its expert's partner, and with the second nearest.

    `twins` are groups of experts with the same weights, or of few experts that differ only in the order of neurons:
    only the first of each is among `experts`. `queries` neurons were searched for: none if their vectors are too short
    to distinguish them, and none that has a role of zeros. `roles` were compared, of equal ones only the first.
    """

    experts: tuple[int, ...]
    twins: tuple[tuple[int, ...], ...]
    queries: int
    shared: float
    strong: float
    without_down: float | None
    pairs: NDArray[np.float64]
    partners: tuple[int, ...]
    in_place: float
    anywhere: float
    nearest: Array
    runner_up: Array
    roles: int

    @property
    def count(self) -> int:
        """The number of experts, including all twins."""
        return len(self.experts) + sum(len(group) - 1 for group in self.twins)


def pair_evidence(
    vectors: Mapping[str, Array],
    wanted: int | None,
    run: Callable[[Callable[[int], PairMatches], Iterable[int]], Iterable[PairMatches]] = map,
    seed: int = 0,
    grams: Collection[NDArray[np.float64]] = (),
) -> PairEvidence:
    """The evidence of vectors [experts, neurons, d] by role, from a sample of the neurons, or from all for None as
    `wanted`; `run` maps a function over the experts. `grams` are of the whole matrices, as in `find_twins`."""
    twins = find_twins(vectors, grams)
    evidence, repeats = _compare_pairs(vectors, twins, wanted, run, seed)
    if not repeats:
        return evidence
    return _compare_pairs(vectors, _join_groups(twins, repeats), wanted, run, seed)[0]


def _join_groups(twins: Sequence[Group], repeats: Sequence[Group]) -> tuple[Group, ...]:
    """One set of groups, where `repeats` has only the first of each of the `twins`."""
    of_first = {group[0]: group for group in twins}
    joined = [tuple(sorted(e for first in group for e in of_first.get(first, (first,)))) for group in repeats]
    seen = {expert for group in joined for expert in group}
    return tuple(sorted([*joined, *(group for group in twins if group[0] not in seen)]))


def _compare_pairs(
    vectors: Mapping[str, Array],
    twins: tuple[Group, ...],
    wanted: int | None,
    run: Callable[[Callable[[int], PairMatches], Iterable[int]], Iterable[PairMatches]],
    seed: int,
) -> tuple[PairEvidence, tuple[Group, ...]]:
    """The evidence of the first of each group of twins and all others, and which few of them are the same after all,
    but for the order of their neurons, signs and lengths."""
    repeated = {expert for group in twins for expert in group[1:]}
    experts = tuple(e for e in range(len(next(iter(vectors.values())))) if e not in repeated)
    count, neurons = len(experts), next(iter(vectors.values())).shape[1]
    if count < 2 or min(matrix.shape[2] for matrix in vectors.values()) < LEAST_INPUTS:
        nothing, none = np.zeros((count, count)), np.empty(0, np.float32)
        return PairEvidence(experts, twins, 0, 0.0, 0.0, None, nothing, experts, 0.0, 0.0, none, none, len(vectors)), ()
    roles = prepare_neurons({role: matrix[list(experts)] if repeated else matrix for role, matrix in vectors.items()})
    rng = np.random.default_rng(seed)
    total = min(PAIR_QUERIES, COMPARISONS // (count * neurons))
    least = LEAST_QUERIES if total == PAIR_QUERIES else FEWEST_QUERIES
    sampled = neurons if wanted is None else min(neurons, max(least, total // count))
    positions = np.stack([rng.permutation(neurons)[:sampled] for _ in range(count)])
    matches = match_neurons(roles, positions, run)
    others = ~np.eye(count, dtype=bool)[:, None, :]
    shape = (count, sampled, count)
    cosine = matches.cosine.reshape(shape)
    neuron = np.where((matches.lead >= LEAD).reshape(shape) & others, matches.neuron.reshape(shape), -1)
    mutual, partner_cosine = _find_mutual(roles, positions, neuron, cosine)
    either = np.where(others & (neuron < 0), matches.without_down.reshape(shape), neuron)
    without_down = None
    if len(roles) == 3:
        of_two = {role: roles[role] for role in ("gate", "up")}
        finds_more = np.count_nonzero(either >= 0) > 1.02 * np.count_nonzero(neuron >= 0)
        without_down = float((_find_mutual(of_two, positions, either, cosine)[0] if finds_more else mutual).mean())
    is_found = either >= 0
    pairs = is_found.mean(axis=1)
    partners = best_partners(pairs)
    has_all_roles = np.all([_take_any(matrix, positions) for matrix in roles.values()], axis=0)
    nearest, lead = (
        np.take_along_axis(array.reshape(shape), partners[:, None, None], axis=2)[..., 0][has_all_roles]
        for array in (matches.cosine, matches.lead)
    )
    is_same = ((neuron >= 0) & (cosine >= EQUAL)).mean(axis=1) >= ALL
    is_near = ((neuron >= 0) & (cosine >= STRONG)).mean(axis=1) >= MOST
    few = _few_groups(is_same & is_same.T) or [pair for pair in _few_groups(is_near & is_near.T) if len(pair) == 2]
    evidence = PairEvidence(
        experts,
        twins,
        len(nearest),
        float(mutual.mean()),
        float((mutual & (partner_cosine >= STRONG)).mean()),
        without_down,
        pairs,
        tuple(experts[int(partner)] for partner in partners),
        float((either == positions[:, :, None])[is_found].mean()) if is_found.any() else 0.0,
        float(is_found.any(axis=2).mean()),
        nearest,
        nearest - lead,
        len(roles),
    )
    return evidence, tuple(tuple(experts[place] for place in group) for group in few)


def _few_groups(alike: NDArray[np.bool_]) -> list[Group]:
    """Groups of similar experts, if at most half of all are in one; if there are more, they are copies."""
    groups = [group for group in connected_experts(alike) if len(group) > 1]
    return groups if 2 * sum(map(len, groups)) <= len(alike) else []


def _find_mutual(
    roles: Mapping[str, Array], positions: NDArray[np.intp], neuron: NDArray[np.int32], cosine: Array
) -> tuple[NDArray[np.bool_], Array]:
    """Which queries are found in their expert's best partner, and there in turn as the same, and with what cosine;
    both [experts, queries].

    `neuron` and `cosine` are [experts, queries, experts]. Each half of the queries chooses the partners of the other.
    """
    sampled = positions.shape[1]
    mutual, partner_cosine = np.zeros(positions.shape, bool), np.zeros(positions.shape, np.float32)
    halves = (np.s_[0::2], np.s_[1::2]) if sampled > 1 else (np.s_[:], np.s_[:])
    for chosen, asked in (halves, halves[::-1]):
        partners = best_partners((neuron[:, chosen] >= 0).mean(axis=1))
        in_partner = partners[:, None, None]
        there = np.take_along_axis(neuron[:, asked], in_partner, axis=2)[..., 0]
        mutual[:, asked] = are_mutual(roles, positions[:, asked], partners, there)
        partner_cosine[:, asked] = np.take_along_axis(cosine[:, asked], in_partner, axis=2)[..., 0]
    return mutual, partner_cosine


def _take_any(vectors: Array, positions: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Which of the neurons at `positions` [experts, n] are not all zeros."""
    return np.take_along_axis(vectors.any(axis=2), positions, axis=1)


def best_partners(pairs: NDArray[np.float64]) -> NDArray[np.intp]:
    """For each expert the other one that has most of its neurons; the next expert where none has any."""
    others = np.where(np.eye(len(pairs), dtype=bool), -1.0, pairs)
    following = (np.arange(len(pairs)) + 1) % len(pairs)
    return np.where(others.max(axis=1) > 0, others.argmax(axis=1), following)


def find_twins(
    vectors: Mapping[str, Array], grams: Collection[NDArray[np.float64]] = ()
) -> tuple[tuple[int, ...], ...]:
    """Groups of experts whose vectors are the same to the last bit, and not all zeros.

    The vectors may be a part of the matrices: by `grams` [experts, experts], the scalar products of the whole ones,
    they must not differ by more than rounding.
    """
    groups: dict[bytes, list[list[int]]] = {}
    for expert in range(len(next(iter(vectors.values())))):
        digest = hashlib.sha256()
        for matrix in vectors.values():
            digest.update(matrix[expert].tobytes())
        if any(matrix[expert].any() for matrix in vectors.values()):
            alike = groups.setdefault(digest.digest(), [])
            for group in alike:
                if all(_is_same(gram, group[0], expert) for gram in grams):
                    group.append(expert)
                    break
            else:
                alike.append([expert])
    return tuple(tuple(group) for alike in groups.values() for group in alike if len(group) > 1)


def _is_same(gram: NDArray[np.float64], one: int, other: int) -> bool:
    """Whether the difference of two experts has next to none of their energy."""
    difference = gram[one, one] + gram[other, other] - 2 * gram[one, other]
    return bool(abs(difference) <= SAME * gram[one, one])
