"""Neurons that only some experts share, as a bank: shared neurons, and which of them each expert's neurons are close
to.

One base fits experts that match as a whole. Shuffled slices of one feed-forward, experts with several bases, and partly
re-initialised copies match only neuron by neuron. Here neurons are clustered over experts, with at most one neuron of
each expert per cluster. Each cluster of two or more becomes a neuron of the bank; the others are unshared.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .alignment import (
    CLOSE,
    FOUND,
    LEAST_INPUTS,
    Alignment,
    Bank,
    Run,
    assign_neurons,
    is_found,
    nearest_neurons,
    permute_vectors,
    sample_matches,
)
from .neurons import Array, unit_rows
from .pairs import prepare_neurons
from .rates import PAYS, Rate, bank_bits, net_bits, saving_bound, sharing_rates

CHANCE = 5.0  # standard deviations of unrelated cosines above which a cosine is not chance


def may_share(vectors: Mapping[str, Array], run: Run = map) -> bool:
    """Whether a sample shows that neurons [experts, neurons, d], by role, are shared, at least by some experts."""
    if min(matrix.shape[2] for matrix in vectors.values()) < LEAST_INPUTS:
        return False
    prepared = prepare_neurons(vectors)
    matches = sample_matches(prepared, run)
    size = sum(matrix.shape[2] for matrix in prepared.values())
    return bool((is_found(matches) & (matches.cosine >= _close(size))).any(axis=1).mean() >= FOUND)


def share_neurons(vectors: Mapping[str, Array], alignment: Alignment) -> Alignment:
    """The experts' neurons as a bank, if that saves more than one base for all experts in the order of `alignment`;
    else `alignment`.

    `vectors` [experts, neurons, d] are by role.
    """
    joined = np.concatenate(list(vectors.values()), axis=2)
    prepared = prepare_neurons(vectors)
    directions = np.concatenate(list(prepared.values()), axis=2) / np.sqrt(np.float32(len(prepared)))
    clusters, cosines = cluster_neurons(directions)
    found = [(bank_saving(joined, bank), bank) for bank in _arrangements(directions, clusters, cosines)]
    saved, best = max(found, key=lambda one: one[0], default=(0.0, alignment))
    return best if saved >= max(0.0, _base_saving(joined, alignment)) + PAYS else alignment


def _close(size: int) -> float:
    """The cosine above which neurons of that many numbers belong together; unrelated ones hardly ever reach it."""
    return max(CLOSE, min(0.9, CHANCE / float(np.sqrt(size))))


def cluster_neurons(directions: Array) -> tuple[NDArray[np.intp], Array]:
    """The cluster of each neuron [experts, neurons], and its cosine with the cluster's center when it joined.

    Neurons `directions` [experts, neurons, d] have length 1. Expert by expert, a neuron joins a cluster if the two are
    each other's nearest and their cosine says that they belong together; otherwise it starts a new cluster.
    """
    experts, neurons, size = directions.shape
    close = np.float32(_close(size))
    sums = np.zeros((experts * neurons, size), np.float32)
    clusters, cosines = np.zeros((experts, neurons), np.intp), np.ones((experts, neurons), np.float32)
    count = 0
    for expert, own in enumerate(directions):
        is_near = np.zeros(neurons, bool)
        if count:
            there = nearest_neurons(own, unit_rows(sums[:count]))
            is_near = there.is_mutual & (there.cosine >= close)
            clusters[expert, is_near], cosines[expert, is_near] = there.neuron[is_near], there.cosine[is_near]
        opened = int(neurons - is_near.sum())
        clusters[expert, ~is_near] = np.arange(count, count + opened)
        count += opened
        sums[clusters[expert]] += own
    return clusters, cosines


def arrange(directions: Array, clusters: NDArray[np.intp], cosines: Array, matched: int) -> Alignment | None:
    """The bank if `matched` neurons of each expert refer to it: those in the clusters with the most users.

    An expert with fewer of them fills up with unshared neurons, each referring to the nearest of the bank. None if the
    bank has too few neurons.
    """
    experts, neurons = clusters.shape
    users = np.bincount(clusters.ravel())[clusters]
    chosen = []
    for expert in range(experts):
        order = np.lexsort((np.arange(neurons), -cosines[expert], -users[expert]))[:matched]
        chosen.append(order[users[expert, order] > 1])
    names, inverse = np.unique(np.concatenate([clusters[e, own] for e, own in enumerate(chosen)]), return_inverse=True)
    if len(names) < matched:
        return None
    sums = np.zeros((len(names), directions.shape[2]), np.float32)
    places = np.split(inverse, np.cumsum([len(own) for own in chosen])[:-1])
    for expert, (own, place) in enumerate(zip(chosen, places, strict=True)):
        sums[place] += directions[expert, own]
    permutations = np.empty((experts, neurons), np.intp)
    index = np.empty((experts, matched), np.intp)
    for expert, (own, place) in enumerate(zip(chosen, places, strict=True)):
        if missing := matched - len(own):
            rest, free = np.setdiff1d(np.arange(neurons), own), np.setdiff1d(np.arange(len(names)), place)
            free = free[:: max(1, len(free) // missing)][:missing]
            taken = rest[assign_neurons(unit_rows(sums[free]) @ directions[expert, rest].T)]
            own, place = np.concatenate([own, taken]), np.concatenate([place, free])
        order = np.argsort(place)
        index[expert] = place[order]
        permutations[expert] = np.concatenate([own[order], np.setdiff1d(np.arange(neurons), own)])
    return Alignment(permutations, (tuple(range(experts)),), Bank(len(names), index))


def _arrangements(directions: Array, clusters: NDArray[np.intp], cosines: Array) -> list[Alignment]:
    """The banks worth trying, with different numbers of shared neurons per expert."""
    neurons = clusters.shape[1]
    shared = (np.bincount(clusters.ravel())[clusters] > 1).sum(axis=1)
    counts = {int(shared.min()), int(np.median(shared)), int(shared.max())}
    if shared.min() >= 0.9 * neurons:
        counts.add(neurons)
    banks = (arrange(directions, clusters, cosines, matched) for matched in sorted(counts - {0}))
    return [bank for bank in banks if bank is not None]


def rate_sharing(
    grams: Mapping[str, NDArray[np.floating]], vectors: Mapping[str, Array], alignment: Alignment, shared: Alignment
) -> dict[str, Rate]:
    """Like `sharing_rates`, but of each role what the bank of `shared`, if it has one, saves, if that is more."""
    rates = sharing_rates(grams, vectors, alignment)
    if shared.bank is None:
        return rates
    by_bank = {role: _bank_rate(vectors[role], shared) for role in rates}
    saved, saved_by_bank = (sum(max(0.0, rate.bits_saved) for rate in each.values()) for each in (rates, by_bank))
    return by_bank if saved_by_bank >= saved + PAYS * len(rates) else rates


def _bank_rate(vectors: Array, alignment: Alignment) -> Rate:
    """The rate of one role's vectors [experts, neurons, d]; unshared neurons are their own deltas, and save nothing."""
    assert alignment.bank is not None
    (experts, neurons, _), matched = vectors.shape, alignment.bank.index.shape[1]
    energies = np.square(permute_vectors(vectors, alignment), dtype=np.float64).sum(axis=(0, 2))
    own, users = bank_delta_energy(vectors, alignment), experts * matched / alignment.bank.size
    common = max(0.0, 1 - own * users / (users - 1)) if users > 1 else 0.0
    bound = matched / neurons * saving_bound(common, round(users))
    total, of_matched = float(energies.sum()), float(energies[:matched].sum())
    return Rate(
        (total - (1 - own) * of_matched) / total if total else 0.0,
        min(bound, bank_saving(vectors, alignment)),
        bound,
    )


def bank_variances(vectors: Array, alignment: Alignment) -> tuple[tuple[float, float], ...]:
    """The variances of one role's neurons: of the part that a neuron of the bank and its users have in common, of the
    users' own parts, and of unshared neurons; each as a share of the energy, with the share of the weights that has
    it."""
    assert alignment.bank is not None
    (experts, neurons, _), matched = vectors.shape, alignment.bank.index.shape[1]
    energies = np.square(permute_vectors(vectors, alignment), dtype=np.float64).sum(axis=(0, 2))
    of_matched = float(energies[:matched].sum()) / (float(energies.sum()) or 1.0)
    own, of_bank = bank_delta_energy(vectors, alignment), alignment.bank.size / (experts * neurons)
    found = (
        (of_matched * (1 - own), of_bank),
        (of_matched * own, matched / neurons - of_bank),
        (1 - of_matched, 1 - matched / neurons),
    )
    return tuple((max(0.0, share), weights) for share, weights in found if weights > 0)


def bank_saving(vectors: Array, alignment: Alignment) -> float:
    """The bits per weight that a bank of vectors [experts, neurons, d] saves, by the law."""
    bank = alignment.bank
    assert bank is not None
    experts, neurons, _ = vectors.shape
    matched = bank.index.shape[1]
    return bank_bits(bank_delta_energy(vectors, alignment), experts, neurons, matched, bank.size)


def bank_delta_energy(vectors: Array, alignment: Alignment) -> float:
    """The share of the matched neurons' energy that is in their deltas from the means of their clusters."""
    bank = alignment.bank
    assert bank is not None
    matched = bank.index.shape[1]
    sums, users, energy = np.zeros((bank.size, vectors.shape[2])), np.zeros(bank.size), 0.0
    for own, places, neurons in zip(vectors, bank.index, alignment.permutations[:, :matched], strict=True):
        sums[places] += own[neurons]
        users[places] += 1
        energy += float(np.square(own[neurons], dtype=np.float64).sum())
    common = float((np.square(sums).sum(axis=1) / np.maximum(users, 1)).sum())
    return max(0.0, 1 - common / energy) if energy else 1.0


def _base_saving(vectors: Array, alignment: Alignment) -> float:
    """The bits per weight that one base for all experts saves."""
    ordered = permute_vectors(vectors, replace(alignment, bank=None))
    energy = float(np.square(ordered, dtype=np.float64).sum())
    common = len(vectors) * float(np.square(ordered.mean(axis=0, dtype=np.float64)).sum())
    return net_bits(max(0.0, 1 - common / energy) if energy else 1.0, len(vectors))
