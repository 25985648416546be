"""What sharing saves in bits: how many bits per weight one base for many experts saves. Pure arrays.

A Gaussian number of variance v takes 0.5 log2(v / D) bits at the squared error D. So a delta with the share d of its
expert's energy takes 0.5 log2(1 / d) bits per weight less than the expert. The base costs its own bits, divided by the
experts that share it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log2

import numpy as np
from numpy.typing import NDArray

from .alignment import Alignment, permute_vectors
from .gram import gram_matrix, pairwise_cosines
from .neurons import Array

QUALITY = 4  # bits of a plain code, whose error the others are to reach
PAYS = 0.1  # bits per weight below which a base is not worth it
MANY = 32  # with at least this many experts a base is kept in BASE_BITS[1] bits, else in BASE_BITS[0]
BASE_BITS = (4, 5)


@dataclass(frozen=True, slots=True)
class Rate:
    """What the experts share in one projection.

    `delta_energy` is the share of their energy that is in the deltas from the mean of their group, 0 to 1. `bits_saved`
    is what a base for each group saves, in bits per weight, negative if the base costs more. `bound` is the most that
    any code can save at the error of QUALITY bits, from the mean cosine of the experts.
    """

    delta_energy: float
    bits_saved: float
    bound: float


def sharing_rate(products: NDArray[np.floating], groups: Sequence[Sequence[int]]) -> Rate:
    """What sharing saves for experts with these scalar products [experts, experts], if each group has a base.

    An expert that is alone in its group is its own delta, and saves nothing.
    """
    gram: NDArray[np.float64] = np.asarray(products, np.float64)
    total = float(np.trace(gram))
    deltas = saved = bound = 0.0
    for group in groups:
        count = len(group)
        own = gram[np.ix_(group, group)]
        energy = float(np.trace(own))
        left = max(0.0, energy - float(own.sum()) / count) if count > 1 else energy
        deltas += left
        if count > 1:
            share = count / len(gram)
            most = saving_bound(float(pairwise_cosines(own).mean()), count)
            saved += share * min(most, net_bits(left / energy if energy > 0 else 1.0, count))
            bound += share * most
    return Rate(deltas / total if total > 0 else 0.0, saved, bound)


def sharing_rates(
    grams: Mapping[str, NDArray[np.floating]], vectors: Mapping[str, Array], alignment: Alignment
) -> dict[str, Rate]:
    """The rate of each role.

    If all experts keep their order, it comes from `grams` [experts, experts] of the whole matrices; else from the
    `vectors` [experts, neurons, d] of the neurons.
    """
    aligned = align_grams(grams, vectors, alignment)
    return {role: sharing_rate(gram, alignment.groups) for role, gram in aligned.items()}


def align_grams(
    grams: Mapping[str, NDArray[np.floating]], vectors: Mapping[str, Array], alignment: Alignment
) -> Mapping[str, NDArray[np.floating]]:
    """The scalar products of the aligned experts, by role, as `sharing_rates` takes them."""
    if alignment.is_identity:
        return grams
    return {role: _gram(permute_vectors(vectors[role], alignment)) for role in grams}


def _gram(vectors: Array) -> NDArray[np.floating]:
    return gram_matrix(vectors.reshape(len(vectors), -1))


def base_bits(experts: int) -> int:
    """The bits per weight of a base for that many experts."""
    return BASE_BITS[experts >= MANY]


def net_bits(delta_energy: float, experts: int) -> float:
    """0.5 log2(1 / d) - b0 / E; the first term is at most QUALITY, since deltas can't take less than no bits."""
    gain = min(float(QUALITY), -0.5 * log2(delta_energy)) if delta_energy > 0 else float(QUALITY)
    return gain - base_bits(experts) / experts


def bank_bits(delta_energy: float, experts: int, neurons: int, matched: int, size: int) -> float:
    """Like `net_bits`, if `matched` of an expert's `neurons` are deltas from neurons of a bank of `size`."""
    bits = base_bits(round(experts * matched / size))
    gain = net_bits(delta_energy + 4.0**-bits, experts) + base_bits(experts) / experts
    return matched / neurons * gain - bits * size / (experts * neurons)


def saving_bound(cosine: float, experts: int, bits: float = QUALITY) -> float:
    """The most that sharing can save for E Gaussian experts with this mean cosine c, in bits per weight.

    -0.5 [log2(1 + (E - 1) c) / E + (E - 1) / E log2(1 - c)], as long as 1 - c is at least the squared error of `bits`
    bits; for closer experts the deltas take no bits at all, and the error is left for the mean (reverse water-filling).
    A negative cosine counts as 0.
    """
    cosine = min(1.0, max(0.0, cosine))
    error, common, own = 4.0**-bits, 1.0 + (experts - 1) * cosine, 1.0 - cosine
    if own >= error:
        return -0.5 * (log2(common) + (experts - 1) * log2(own)) / experts
    return bits - 0.5 * log2(common / (experts * error - (experts - 1) * own)) / experts


def least_error(variances: NDArray[np.float64], counts: NDArray[np.float64], bits: float) -> float:
    """The smallest mean squared error of independent Gaussian numbers at `bits` bits each, on average.

    There are `counts` numbers of each of the `variances`. All have the same error, or their own variance if that is
    smaller (reverse water-filling; Cover and Thomas, Elements of Information Theory, 10.3.3).
    """
    order = np.argsort(-variances)
    order = order[variances[order] > 0]
    if not len(order):
        return 0.0
    logs, numbers = np.log2(variances[order]), counts[order]
    levels = (np.cumsum(numbers * logs) - 2 * bits * counts.sum()) / np.cumsum(numbers)  # of the first 1, 2, ...
    is_filled = levels <= logs
    is_filled[0] = True  # but for rounding
    level = levels[np.flatnonzero(is_filled)[-1]]
    return float(numbers @ np.exp2(np.minimum(logs, level)))


def mean_saved(rates: Iterable[tuple[float, int]]) -> float:
    """The bits per weight that bases save over several projections, each given by its saving and its number of weights.

    If sharing does not pay, a projection is coded without a base, and saves nothing.
    """
    known = list(rates)
    return sum(saved * weights for saved, weights in known if saved >= PAYS) / sum(weights for _, weights in known)
