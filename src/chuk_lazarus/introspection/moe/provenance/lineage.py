"""Where a layer's neurons come from: the evidence of neurons matched between experts, or with a dense parent.

A neuron is a gate row, an up row and a down column. Copies of one neuron stay nearest to each other under long
training, shuffling and slicing, in all three vectors at once; neurons that were never the same are each other's
nearest in one of the vectors by chance, and hardly ever in all three. To match the rows of two networks, and ask
whether gate and up agree about the match, is the test of Zhu et al., Independence Tests for Language Models, ICML
2025 (phi_MATCH); here it is asked of the experts of one layer, neuron by neuron.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc, ndtr

from ..numerics.neurons import Array, Nearest

CLOSE = 0.5  # the mean cosine over roles from which on two neurons are taken for close relatives
FEW = 0.02  # the share of close neurons from which on they tell the kind of upcycling
QUERIES = 512  # neurons of all chosen experts together that are looked for in the others


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the matches of `queries` neurons with the other experts say.

    `kept` is the share of neurons that all roles find again, as one and the same neuron, in some other expert (a neuron
    of zeros is found nowhere), and `close` that for which the mean cosine over the roles is then at least CLOSE;
    `chance` the share to be expected if the roles' matches had nothing to do with each other, given how often each
    neuron is found at all (so that neurons near to everything prove nothing), and `p_value` the probability of as many
    or more by that chance. `spread` is in how large a share of the other experts a kept neuron is found, `in_place` how
    many of these matches have the neuron's own position. `pairs` [experts, experts] is the share of one expert's
    neurons that are found in the other.

    `cosine` is the mean over roles and other experts of the cosine with the neuron at the same position,
    `permuted_cosine` what to expect of it if each expert's neurons were shuffled, and `cosine_p_value` the probability
    of so much or more if they were. `nearest` [queries] is, in the other expert where it is greatest, the mean over
    roles of the cosine with the nearest neuron, and `runner_up` the same of the second nearest.
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
                chances[expert, partner] = _chance(neurons_found[:, mine, partner], near[mine, partner], neurons)
    # an expert of zeros has no matches by chance either; where no expert has any, nothing is proved
    chance = float(np.mean(1.0 - np.prod(1.0 - chances, axis=1))) if (near & others).any() else 1.0
    pairs = np.stack([same[owner == expert].mean(axis=0) for expert in range(experts)])

    def over_roles(figure: str) -> Array:
        return np.where(others, np.mean([getattr(nearest, figure) for nearest in roles.values()], axis=0), 0.0)

    # If neurons were shuffled, a position's cosine would be a random one of the query's cosines with all neurons. The
    # mean of the roles' deviations is at least the deviation of their mean, and a pair of neurons may be seen from both
    # sides, which doubles the variance: the p-value errs upwards.
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


def name_kind(evidence: Evidence, in_place: bool) -> str:
    """In words, what kind of upcycling leaves such matches; `in_place` says whether neurons at the same position are
    alike.

    Slices of one layer share neurons with some experts and none with others, copies with all of them alike; where
    there are too few matches for a pair of experts to tell, both are named.
    """
    if in_place and evidence.close < FEW:
        return "copies, trained far apart"
    shares = evidence.pairs[~np.eye(len(evidence.pairs), dtype=bool)]
    expected = shares.mean() * evidence.queries / len(evidence.pairs)  # matches of a pair of experts
    sliced = float((shares < 0.25 * shares.mean()).mean()) > 0.05
    what = "copies or slices" if expected < 8 else "slices" if sliced else "copies"
    order = "" if evidence.in_place > 0.5 else "shuffled "
    whole = evidence.kept > 0.9 or (evidence.spread < 0.8 * evidence.kept and evidence.kept > 0.6)
    return f"{order}{what}{'' if whole else ', partly re-initialised'}"


def find_groups(evidence: Evidence, experts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The experts that share more than half of their neurons with each other, in groups of two or more."""
    from scipy.sparse.csgraph import connected_components  # here, because it takes long to load

    alike = (evidence.pairs > 0.5) | (evidence.pairs.T > 0.5)
    count, labels = connected_components(alike, directed=False)
    groups = [tuple(experts[int(i)] for i in np.flatnonzero(labels == label)) for label in range(count)]
    return tuple(group for group in groups if len(group) > 1)


@dataclass(frozen=True, slots=True)
class ParentEvidence:
    """What the matches of `queries` neurons with a dense parent's say; `kept`, `chance` and so on as in Evidence.

    `shares` [experts] is the share of each expert's neurons that come from the parent, `ranges` [experts, 2] where in
    the parent they lie (first and last neuron that was found, -1 without one), `cosine` the mean cosine of the found.
    """

    queries: int
    kept: float
    chance: float
    p_value: float
    in_place: float
    cosine: float
    shares: NDArray[np.float64]
    ranges: NDArray[np.int64]


def parent_evidence(
    roles: Mapping[str, Nearest], owner: NDArray[np.intp], positions: NDArray[np.intp], neurons: int
) -> ParentEvidence:
    """The evidence of all roles' matches with one dense feed-forward that has `neurons` neurons."""
    neurons_found = np.stack([nearest.neuron[:, 0] for nearest in roles.values()])
    cosines = np.stack([nearest.cosine[:, 0] for nearest in roles.values()])
    near = np.all([nearest.cosine[:, 0] > 0 for nearest in roles.values()], axis=0)
    same = (neurons_found == neurons_found[0]).all(axis=0) & near
    chance = _chance(neurons_found, near, neurons) if near.any() else 1.0
    experts = range(int(owner.max()) + 1)
    places_by_expert = [neurons_found[0][same & (owner == expert)] for expert in experts]
    return ParentEvidence(
        same.size,
        float(same.mean()),
        chance,
        float(bdtrc(same.sum() - 1, same.size, min(1.0, chance))),
        float((neurons_found[0] == positions)[same].mean()) if same.any() else 0.0,
        float(cosines[:, same].mean()) if same.any() else 0.0,
        np.array([same[owner == expert].mean() for expert in experts]),
        np.array([[places.min(), places.max()] if places.size else [-1, -1] for places in places_by_expert]),
    )


def _chance(neurons_found: NDArray[np.int32], near: NDArray[np.bool_], neurons: int) -> float:
    """The probability that independent roles find the same one of `neurons` neurons, by how often each role finds each;
    0 where nothing is near. `neurons_found` is [roles, queries], `near` [queries]."""
    if not near.any():
        return 0.0
    shares = [np.bincount(role[near], minlength=neurons) / near.sum() for role in neurons_found]
    return float(np.prod(shares, axis=0).sum())
