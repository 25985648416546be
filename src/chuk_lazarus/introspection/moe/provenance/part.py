"""The evidence of a part of a layer: contiguous rows of some experts' gates and ups.

Neurons are matched as in a full analysis. A part of an expert's neurons shows nearly as much as all of them, as long as
it has enough pairs: of experts with the same order of neurons the same part is read, and of n out of N shuffled
neurons, n / N are found in another expert's part.
"""

from functools import partial
from math import ceil, prod

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidRequest
from ..jobs.measure import refuse_not_finite
from ..jobs.model import evenly_spaced
from ..jobs.parts import EXPERTS, bytes_per_neuron, part_ranges, read_part, roles_to_read
from ..jobs.resources import Resources
from ..numerics.copies import all_same, group_copies, meet, refine
from ..numerics.neurons import draw_neurons, find_nearest, join
from ..numerics.spectra import effective_rank, energy_spectrum, noise_rank
from ..progress import Progress
from ..reports import QuickLayer
from ..weights.expert_layer import ExpertLayer
from .classifier import QUICK, classify_quickly
from .lineage import Evidence, match_evidence, pair_evidence

QUERIES = 1024  # neurons of a layer that are looked for
LEAST_EXPERTS = 4  # below which there is too little to compare
COPIES = 2  # in float32, of what is read, that matching holds
MOST_ROWS = 256  # of an expert by which the directions of its deltas are counted
LEAST = 16  # neurons of an expert below which there is no evidence


def analyze_part(layer: ExpertLayer, budget: int, layers: int, resources: Resources, progress: Progress) -> QuickLayer:
    """The evidence of a part of one of `layers` layers, which share the `budget` of bytes, and its own verdict.

    Raises InvalidRequest if the budget is too small for any evidence.
    """
    roles, tensors = roles_to_read(layer)
    neuron_bytes = bytes_per_neuron(layer)
    turned = [tensor.rows for tensor in tensors if not tensor.has_neurons_as_rows]
    wanted = EXPERTS
    while True:
        chosen = spaced_pairs(layer.count, wanted)
        in_memory = 4 * len(chosen) * len(roles) * layer.sizes["H"]
        count = min(
            layer.sizes["I"],
            int(budget / layers / len(chosen) / neuron_bytes),
            resources.matrix_memory // (COPIES * in_memory),
        )
        # of columns some inputs are read: of fewer experts, where that makes them enough
        inputs = min([layer.sizes["H"], *(rows * count // layer.sizes["I"] for rows in turned)])
        if not turned or inputs >= QUICK.width or len(chosen) <= LEAST_EXPERTS:
            break
        wanted = len(chosen) // 2
    if count < min(LEAST, layer.sizes["I"]):
        least = ceil(LEAST * len(chosen) * neuron_bytes * layers / 1e6)
        raise InvalidRequest(f"the budget is too small for {len(chosen)} experts", f"allow {least} MB, or more")
    layer.prefetch(progress, [byte_range for tensor in tensors for byte_range in part_ranges(tensor, chosen, count)])
    with resources.worker_threads() as pool:
        parts = list(pool.map(lambda expert: read_part(tensors, roles, expert, count), chosen))
        for expert, part in zip(chosen, parts, strict=True):
            for role, values in part.items():
                if not np.isfinite(values).all():
                    refuse_not_finite(layer, expert, role)
        inputs = min(matrix.shape[1] for matrix in parts[0].values())
        numbers = sum(matrix.size for matrix in parts[0].values())
        count = min(len(matrix) for matrix in parts[0].values())
        vectors = {role: np.stack([part[role][:count] for part in parts]) for role in roles}
        del parts
        positions = draw_neurons(len(chosen), count, QUERIES)
        owner, all_places = np.repeat(np.arange(len(chosen)), positions.shape[1]), positions.reshape(-1)
        nearest = {}
        for role, neurons in vectors.items():
            queries = np.concatenate([part[places] for part, places in zip(neurons, positions, strict=True)])
            nearest[role] = join(list(pool.map(partial(find_nearest, queries, all_places), neurons)))
        sharing = pair_evidence(vectors, QUERIES, pool.map)
        same = meet(*(refine(all_same(len(chosen)), matrices) for matrices in vectors.values()))
        deltas = [_describe_deltas(matrices) for matrices in vectors.values()]
        base_breadth = max(map(_base_breadth, vectors.values()))
    evidence = match_evidence(nearest, owner, all_places, count)
    result = QuickLayer(
        layer=layer.number,
        experts=chosen,
        neurons=evidence.queries,
        part=numbers / sum(prod(layer.shape(role)) for role in roles),
        inputs=inputs,
        reach=count / layer.sizes["I"],
        shared=sharing.shared,
        strong=sharing.strong,
        roles=sharing.roles,
        twins=tuple(tuple(chosen[place] for place in group) for group in sharing.twins),
        identical=tuple(tuple(chosen[place] for place in group) for group in group_copies(same)),
        breadth=float(np.mean([breadth for breadth, _ in deltas])),
        base_breadth=base_breadth,
        delta_energy=float(np.mean([energy for _, energy in deltas])),
        kept=evidence.kept,
        close=evidence.close,
        chance=evidence.chance,
        in_place=evidence.in_place,
        kind=_name_kind(evidence),
    )
    verdict = classify_quickly([result])
    return result.model_copy(update={"type": verdict.origin, "confidence": verdict.confidence})


def _even_columns(matrices: NDArray[np.float32]) -> NDArray[np.float32]:
    """Some rows of experts [experts, neurons, inputs], with columns scaled to equal weight: a few large columns would
    look like few directions."""
    rows = matrices[:, :MOST_ROWS] / (np.abs(matrices[:, :MOST_ROWS]).max() or np.float32(1))
    columns = np.sqrt(np.einsum("eni,eni->i", rows, rows))
    return np.asarray(rows / np.where(columns > 0, columns, np.float32(1)))


def _base_breadth(matrices: NDArray[np.float32]) -> float:
    """The number of directions of the mean of experts [experts, neurons, inputs], relative to noise."""
    base = _even_columns(matrices).mean(axis=0)
    return effective_rank(energy_spectrum(base), 0.80) / noise_rank(base.shape, 0.80) if base.any() else 1.0


def _describe_deltas(matrices: NDArray[np.float32]) -> tuple[float, float]:
    """The number of directions in which neighbouring experts [experts, neurons, inputs] differ, relative to noise, and
    the share of an expert's energy that deltas from a common base would have."""
    breadths, energies, rows = [], [], _even_columns(matrices)
    for expert, next_expert in zip(rows[::2], rows[1::2], strict=False):
        difference = next_expert - expert
        energy = float(np.square(expert).sum() + np.square(next_expert).sum())
        if difference.any():
            rank = effective_rank(energy_spectrum(difference), 0.99)
            breadths.append(rank / noise_rank(difference.shape, 0.99))
        energies.append(float(np.square(difference).sum()) / energy if energy else 0.0)
    return float(np.mean(breadths)) if breadths else 0.0, float(np.mean(energies)) if energies else 0.0


def spaced_pairs(count: int, wanted: int) -> tuple[int, ...]:
    """`wanted` numbers out of range(count), as evenly spaced pairs of neighbours: experts that share the slice of a
    dense layer are neighbours, or as far from each other as there are slices."""
    if wanted >= count or wanted < 4:
        return evenly_spaced(count, wanted)
    firsts = count * np.arange(wanted // 2) // (wanted // 2)  # a multiple of the slices apart, where these take turns
    return tuple(sorted({int(expert) for first in firsts for expert in (first, first + 1)}))


def _name_kind(evidence: Evidence) -> str | None:
    """The kind of upcycling in words; a part can't tell copies from slices."""
    if not evidence.close:
        return None
    return "copies or slices" if evidence.in_place > 0.5 else "shuffled copies or slices"
