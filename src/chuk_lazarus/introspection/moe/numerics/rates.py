"""What sharing is worth in bits: how many bits a weight one base for many experts saves. Pure arrays.

A Gaussian number of variance v takes 0.5 log2(v / D) bits at the squared error D, so a delta that has the share d of
its expert's energy takes 0.5 log2(1 / d) bits a weight less than the expert; the base costs its own bits, divided by
the experts that share it.
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
PAYS = 0.1  # bits a weight below which a base is not worth it
MANY = 32  # experts from which on a base is kept in BASE_BITS[1] bits, of fewer in BASE_BITS[0]
BASE_BITS = (4, 5)


@dataclass(frozen=True, slots=True)
class Rate:
    """What one projection's experts share.

    `delta_energy` is the share of their energy that is in the deltas from the mean of their group, 0 to 1;
    `bits_saved` what a base for each group saves, in bits a weight, less than 0 where the base costs more; `bound` the
    most that any code can save at the error of QUALITY bits, by the mean cosine of the experts.
    """

    delta_energy: float
    bits_saved: float
    bound: float


def sharing_rate(products: NDArray[np.floating], groups: Sequence[Sequence[int]]) -> Rate:
    """What sharing saves of experts with these scalar products [experts, experts], where each group has a base.

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

    Where all experts keep their order it is by `grams` [experts, experts] of the whole matrices; else by the `vectors`
    [experts, neurons, d] that are known of the neurons.
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
    """The bits a weight in which a base for so many experts is kept."""
    return BASE_BITS[experts >= MANY]


def net_bits(delta_energy: float, experts: int) -> float:
    """0.5 log2(1 / d) - b0 / E, at most what leaves nothing but the base at the error of QUALITY bits."""
    gain = min(float(QUALITY), -0.5 * log2(delta_energy)) if delta_energy > 0 else float(QUALITY)
    return gain - base_bits(experts) / experts


def bank_bits(delta_energy: float, experts: int, neurons: int, matched: int, size: int) -> float:
    """As `net_bits`, where `matched` of an expert's `neurons` are deltas from neurons of a bank of `size`."""
    bits = base_bits(round(experts * matched / size))
    gain = net_bits(delta_energy + 4.0**-bits, experts) + base_bits(experts) / experts
    return matched / neurons * gain - bits * size / (experts * neurons)


def saving_bound(cosine: float, experts: int, bits: float = QUALITY) -> float:
    """The most that sharing can save of E Gaussian experts of this mean cosine c, in bits a weight.

    -0.5 [log2(1 + (E - 1) c) / E + (E - 1) / E log2(1 - c)], as long as 1 - c is no less than the squared error of
    `bits` bits; of nearer experts the deltas take no bits at all, and the error is left for the mean (reverse
    water-filling). A cosine below 0 counts as 0.
    """
    cosine = min(1.0, max(0.0, cosine))
    error, common, own = 4.0**-bits, 1.0 + (experts - 1) * cosine, 1.0 - cosine
    if own >= error:
        return -0.5 * (log2(common) + (experts - 1) * log2(own)) / experts
    return bits - 0.5 * log2(common / (experts * error - (experts - 1) * own)) / experts


def least_error(variances: NDArray[np.float64], counts: NDArray[np.float64], bits: float) -> float:
    """The least summed squared error of independent Gaussian numbers at `bits` bits for each, on average.

    There are `counts` numbers of each of the `variances`; all keep the error of one level, or their own variance where
    that is less (reverse water-filling; Cover and Thomas, Elements of Information Theory, 10.3.3).
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
    """The bits a weight that bases save over several projections, each given by what it saves and its weights.

    Where sharing does not pay a projection is coded plainly, and saves nothing.
    """
    known = list(rates)
    return sum(saved * weights for saved, weights in known if saved >= PAYS) / sum(weights for _, weights in known)
