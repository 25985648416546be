"""The neurons of a layer's experts brought into one order, from a part of the weights; and the mean in that order."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ..jobs.measure import WINDOW, mean_experts, refuse_not_finite
from ..jobs.resources import Resources
from ..numerics.alignment import Alignment, align, keep_order
from ..numerics.neurons import as_neurons
from ..weights.expert_layer import ExpertLayer, ExpertTensor

NUMBERS, LEAST_NUMBERS = 256, 16  # of each neuron's vector in a role, fewer where memory is short
RUN = 32  # neighbouring stored rows that are read together


def align_layer(layer: ExpertLayer, resources: Resources) -> Alignment:
    """The order of each expert's neurons in which the layer's base is formed.

    Neurons are compared by the roles whose stored rows hold a number of every neuron, usually down, since a few rows of
    these tell them apart; only where there is no such role, all weights are read. Raises ModelUnreadable where a number
    is not finite.
    """
    experts, neurons = layer.count, layer.sizes["I"]
    numbers = max(LEAST_NUMBERS, min(NUMBERS, resources.memory // (6 * 4 * experts * neurons)))
    tensors = [tensor for tensor in layer.tensors if not tensor.has_neurons_as_rows]
    vectors: dict[str, NDArray[np.float32]] = {}
    with resources.worker_threads(layer) as pool:
        for tensor in tensors or layer.tensors:
            vectors |= _sample_vectors(tensor, numbers, pool)
        if any(not matrices.any() for matrices in vectors.values()):
            return keep_order(experts, neurons)
        return align(vectors, run=pool.map)


def _sample_vectors(tensor: ExpertTensor, numbers: int, pool: ThreadPoolExecutor) -> dict[str, NDArray[np.float32]]:
    """By role the same numbers of every neuron's vector, [experts, neurons, n]."""
    layer = tensor.layer
    size = layer.sizes["H"]
    if tensor.has_neurons_as_rows:
        taken = np.linspace(0, size - 1, min(size, numbers)).round().astype(np.intp)
        windows = tensor.windows(WINDOW, 1)
    else:
        runs = max(1, min(size, numbers) // RUN)
        starts = np.linspace(0, max(0, size - RUN), runs).round().astype(np.intp).tolist()
        windows = [(start, min(size, start + RUN)) for start in dict.fromkeys(starts)]
        taken = np.unique(np.concatenate([np.arange(*window) for window in windows]))
    shape = layer.count, layer.sizes["I"], len(taken)
    vectors = {role: np.zeros(shape, np.float32) for role in tensor.spec.roles}

    def take(expert: int) -> None:
        for window in windows:
            for piece in tensor.read([expert], *window):
                values = as_neurons(piece.role, piece.values[0])
                neurons, inputs = piece.index[::-1] if piece.role == "down" else piece.index
                first, last, _ = inputs.indices(size)
                places = np.flatnonzero((taken >= first) & (taken < last))
                vectors[piece.role][expert, neurons, places[0] : places[-1] + 1] = values[:, taken[places] - first]
        for role in vectors:
            if not np.isfinite(vectors[role][expert]).all():
                refuse_not_finite(layer, expert, role)

    for _ in pool.map(take, range(layer.count)):
        pass
    return vectors


def mean_aligned(
    tensor: ExpertTensor, alignment: Alignment, pool: ThreadPoolExecutor
) -> dict[str, NDArray[np.float64]]:
    """The mean of all experts by role, [out, in], with their neurons in order; as `mean_experts`."""
    if alignment.is_identity:
        return mean_experts(tensor, pool)
    layer = tensor.layer
    sums = {role: np.zeros(layer.shape(role)) for role in tensor.spec.roles}
    for expert, permutation in enumerate(alignment.permutations):
        places = np.argsort(permutation)  # where each of the expert's neurons belongs

        def add(window: tuple[int, int], expert: int = expert, places: NDArray[np.intp] = places) -> None:
            for piece in tensor.read([expert], *window):
                rows, columns = piece.index
                if piece.role == "down":
                    sums[piece.role][rows, places[columns]] += piece.values[0]
                else:
                    sums[piece.role][places[rows], columns] += piece.values[0]

        for _ in pool.map(add, tensor.windows(WINDOW, 1)):  # windows of one expert hold different neurons
            pass
    for role, total in sums.items():
        total /= layer.count
        if not np.isfinite(total).all():
            refuse_not_finite(layer, 0, role)
    return sums
