"""The neurons of a layer's experts brought into one order, from a part of the weights; and the mean in that order."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ..jobs.measure import WINDOW, mean_experts, refuse_not_finite
from ..jobs.resources import Resources
from ..numerics.alignment import Alignment, align, keep_order
from ..numerics.bank import may_share, share_neurons
from ..numerics.neurons import as_neurons
from ..weights.expert_layer import ExpertLayer, ExpertTensor

NUMBERS, LEAST_NUMBERS = 256, 16  # of each neuron's vector in a role, fewer where memory is short
RUN = 32  # neighbouring stored rows that are read together


def align_layer(layer: ExpertLayer, resources: Resources, *, with_bank: bool = False) -> Alignment:
    """The order of each expert's neurons in which the layer's base is formed.

    With `with_bank`, the order of a bank if only some neurons are shared. Neurons are compared in the roles whose
    stored rows hold a number of every neuron, usually down, since a few rows of these are enough. All weights are read
    only if there is no such role, or if its vectors are short and a bank may be made. Raises ModelUnreadable if a
    number is not finite.
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
        alignment = align(vectors, run=pool.map)
        if not with_bank or not may_share(vectors, run=pool.map):
            return alignment
        if layer.sizes["H"] < NUMBERS:
            for tensor in layer.tensors:
                if not vectors.keys() & set(tensor.spec.roles):
                    vectors |= _sample_vectors(tensor, numbers, pool)
        return share_neurons(vectors, alignment)


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
    """The mean of all experts by role, [out, in], with their neurons in order; as `mean_experts`.

    Of a bank, each of its neurons is the mean of those that refer to it.
    """
    if alignment.is_identity and alignment.bank is None:
        return mean_experts(tensor, pool)
    layer = tensor.layer
    size = alignment.bank.size if alignment.bank else layer.sizes["I"]
    shapes = {role: (layer.sizes["H"], size) if role == "down" else (size, layer.sizes["H"]) for role in layer.roles}
    sums = {role: np.zeros(shapes[role]) for role in tensor.spec.roles}
    users = np.zeros(size, np.intp)
    for expert, places in enumerate(find_places(alignment)):
        users[places[places >= 0]] += 1

        def add(window: tuple[int, int], expert: int = expert, places: NDArray[np.intp] = places) -> None:
            for piece in tensor.read([expert], *window):
                rows, columns = piece.index
                total, values = sums[piece.role], piece.values[0]
                of_piece = places[columns if piece.role == "down" else rows]
                is_shared = of_piece >= 0
                if piece.role == "down":
                    total[rows, of_piece[is_shared]] += values[:, is_shared]
                else:
                    total[of_piece[is_shared], columns] += values[is_shared]

        for _ in pool.map(add, tensor.windows(WINDOW, 1)):  # windows of one expert hold different neurons
            pass
    for role, total in sums.items():
        total /= users if role == "down" else users[:, None]
        if not np.isfinite(total).all():
            refuse_not_finite(layer, 0, role)
    return sums


def find_places(alignment: Alignment) -> NDArray[np.intp]:
    """Where each of the experts' neurons belongs, in the base or in the bank, [experts, neurons]; -1 for unshared
    neurons."""
    if alignment.bank is None:
        return np.argsort(alignment.permutations, axis=1)
    places = np.full(alignment.permutations.shape, -1)
    matched = alignment.bank.index.shape[1]
    np.put_along_axis(places, alignment.permutations[:, :matched], alignment.bank.index, axis=1)
    return places
