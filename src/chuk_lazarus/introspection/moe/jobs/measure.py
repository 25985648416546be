"""Measuring one MoE layer: the mean of its experts, how alike they are, and the spectra of their deltas.

Two passes, neither of which holds more than a few experts. The first reads all experts in windows of rows and forms the
base and the experts' Gram matrix. The second takes the spectra of the chosen experts' deltas; their matrices are kept
from the first pass where they fit, and read again where they don't.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelUnreadable
from ..numerics.copies import all_same, meet, refine
from ..numerics.gram import gram_matrix, total_energy
from ..numerics.neurons import Nearest, as_neurons, draw_neurons, find_nearest, join
from ..numerics.spectra import ROUNDING, energy_spectrum
from ..progress import Counter, Progress
from ..weights.expert_layer import ExpertLayer, ExpertTensor, Piece
from .resources import Resources

DEFAULT_EXPERTS = 8  # of a layer, whose spectra an analysis takes
WINDOW = 1_000_000  # weights of one expert decoded at a time in each thread while a mean is formed
GROUP = 16  # experts that are summed in float32
ALL_INPUTS = 256  # up to this length pairs of experts are compared by all numbers of their neurons' vectors
INPUTS, LEAST_INPUTS = 128, 16  # for longer ones, this many; fewer if memory is short
RUN = 16  # neighbouring numbers that are kept together: to copy them is much faster than to pick single ones


@dataclass(frozen=True, slots=True)
class RoleMeasure:
    """The figures of one role in one layer.

    `gram` is [experts, experts], of all experts' flattened matrices. `first` [experts] has for each expert the first
    one with exactly the same matrix. `spectra` are the energy spectra of the deltas (expert minus mean of all experts)
    of the experts in `chosen`, all zero if a delta is only rounding. `delta_energy` is the delta's share of a chosen
    expert's energy, on average.

    If neurons were matched, `base_spectrum` is the energy spectrum of the mean. `nearest` says where the neurons at
    `positions` [chosen, n] of the chosen experts are found in the chosen experts, and `elsewhere` where in the given
    matrices of other layers or models. `vectors` [experts, neurons, d] has the same d numbers of every neuron of every
    expert, and `queries` [chosen, n, inputs] the whole vectors of those at `positions`.
    """

    shape: tuple[int, int]
    gram: NDArray[np.float64]
    first: NDArray[np.intp]
    chosen: tuple[int, ...]
    spectra: tuple[NDArray[np.float64], ...]
    delta_energy: float
    base_spectrum: NDArray[np.float64] | None
    positions: NDArray[np.intp]
    nearest: Nearest | None
    elsewhere: tuple[Nearest, ...]
    vectors: NDArray[np.float32] | None
    queries: NDArray[np.float32] | None = None


def measure_layer(
    layer: ExpertLayer,
    chosen: Sequence[int],
    resources: Resources,
    progress: Progress,
    queries: int | None = 0,
    others: Sequence[tuple[ExpertLayer, int]] = (),
    keep_vectors: bool = False,
) -> dict[str, RoleMeasure]:
    """The figures of every role of a layer; raises ModelUnreadable if a weight is not finite.

    `queries` neurons of all chosen experts together (None: all) are searched for in the chosen experts and in `others`,
    experts of other layers or models. Without queries, `vectors` are set only if `keep_vectors`.
    """
    result: dict[str, RoleMeasure] = {}
    layer.prefetch(progress)
    positions = draw_neurons(len(chosen), layer.sizes["I"], queries)
    inputs = draw_inputs(layer, resources) if positions.size or keep_vectors else np.empty(0, np.intp)
    done = expert_counter(progress, f"layer {layer.number}", layer, layer.count + len(chosen))
    with resources.worker_threads(layer) as pool:
        for tensor in layer.tensors:
            first = _FirstPass(tensor, chosen, positions, inputs, resources)
            first.take_all(pool, done)
            deltas, columns = [], []
            for spectra_and_shares, nearest in pool.map(first.deltas, chosen):
                deltas.append(spectra_and_shares)
                columns.append(nearest)
                done.add(sum(prod(layer.shape(role)) for role in tensor.spec.roles))
            for role in tensor.spec.roles:
                spectra, shares = zip(*(delta[role] for delta in deltas), strict=True)
                result[role] = RoleMeasure(
                    layer.shape(role),
                    first.gram[role],
                    first.same[role],
                    tuple(chosen),
                    spectra,
                    float(np.mean(shares)),
                    energy_spectrum(first.base[role]) if positions.size else None,
                    positions,
                    join([nearest[role] for nearest in columns]) if positions.size else None,
                    tuple(
                        first.find_queries(role, _matrix(other_layer, role, expert)) for other_layer, expert in others
                    ),
                    first.vectors.get(role),
                    first.queries[role] if positions.size else None,
                )
    return {role: result[role] for role in layer.roles}


def draw_inputs(layer: ExpertLayer, resources: Resources) -> NDArray[np.intp]:
    """Which numbers of the neurons' vectors are kept for all experts, in runs; they take at most a sixth of the
    memory."""
    size, neurons = layer.sizes["H"], layer.count * layer.sizes["I"] * len(layer.roles)
    wanted = size if size <= ALL_INPUTS else INPUTS
    count = min(wanted, max(LEAST_INPUTS, resources.memory // (6 * 4 * neurons)))
    if count == size:
        return np.arange(size)
    starts = np.sort(np.random.default_rng(0).choice(size // RUN, count // RUN, replace=False))
    return (RUN * starts[:, None] + np.arange(RUN)).reshape(-1)


def bytes_to_measure(layer: ExpertLayer, chosen: Sequence[int], resources: Resources) -> int:
    """How many bytes of the files `measure_layer` reads: every expert once, and the chosen ones twice if they are too
    large to be kept in memory."""
    return sum(
        info.nbytes
        if _are_kept(tensor, len(chosen), resources)
        else info.nbytes * (layer.count + len(chosen)) // layer.count
        for tensor in layer.tensors
        for info in tensor.infos()
    )


def _are_kept(tensor: ExpertTensor, experts: int, resources: Resources) -> bool:
    """Whether the matrices of this many experts fit in memory between the passes."""
    return experts * sum(prod(tensor.layer.shape(role)) for role in tensor.spec.roles) <= resources.kept_weights


def mean_experts(tensor: ExpertTensor, pool: ThreadPoolExecutor) -> dict[str, NDArray[np.float64]]:
    """The mean of all experts by role, [out, in]; raises ModelUnreadable if it is not finite.

    Experts are always summed in the same order, so the result does not depend on the threads.
    """
    layer = tensor.layer
    sums = {role: np.zeros(layer.shape(role)) for role in tensor.spec.roles}

    def add(window: tuple[int, int]) -> None:
        for expert in range(layer.count):
            for piece in tensor.read([expert], *window):
                sums[piece.role][piece.index] += piece.values[0]

    for _ in pool.map(add, tensor.windows(WINDOW, 1)):
        pass
    for role, total in sums.items():
        total /= layer.count
        if not np.isfinite(total).all():
            raise ModelUnreadable(
                f"layer {layer.number}: a {role} projection holds NaN, infinity or numbers too large for bf16",
                "the checkpoint is broken",
            )
    return sums


def subtract_base(layer: int, role: str, matrix: NDArray[np.float32], base: NDArray[np.float32]) -> None:
    """Make an expert's matrix its delta, in place; raises ModelUnreadable where float32 can't hold it."""
    with np.errstate(over="ignore"):
        matrix -= base
    if not np.isfinite(matrix).all():
        raise ModelUnreadable(
            f"layer {layer}: a {role} projection holds numbers too large for float32", "the checkpoint is broken"
        )


class _FirstPass:
    """Base and Gram matrix of the roles in one stored tensor, gathered window by window."""

    def __init__(
        self,
        tensor: ExpertTensor,
        chosen: Sequence[int],
        positions: NDArray[np.intp],
        inputs: NDArray[np.intp],
        resources: Resources,
    ) -> None:
        self.tensor = tensor
        self.inputs = inputs
        self.runs = _runs(inputs)
        self.resources = resources
        self.chosen = chosen
        self.positions = positions
        self.layer = tensor.layer
        shapes = {role: self.layer.shape(role) for role in tensor.spec.roles}
        self.base = {role: np.empty(shape, np.float32) for role, shape in shapes.items()}
        self.gram = {role: np.zeros((self.layer.count, self.layer.count)) for role in shapes}
        self.same = {role: all_same(self.layer.count) for role in shapes}
        self.queries = {
            role: np.empty((*positions.shape, shape[0 if role == "down" else 1]), np.float32)
            for role, shape in shapes.items()
        }
        neurons = (self.layer.count, self.layer.sizes["I"], len(inputs))
        self.vectors = {role: np.empty(neurons, np.float32) for role in shapes if len(inputs)}
        self._kept: dict[int, dict[str, NDArray[np.float32]]] = {}
        if _are_kept(tensor, len(chosen), resources):
            self._kept = {e: {role: np.empty_like(base) for role, base in self.base.items()} for e in chosen}

    def take_all(self, pool: ThreadPoolExecutor, done: Counter) -> None:
        """Read all windows, side by side."""
        windows = self.tensor.windows(self.resources.window_weights // self.resources.worker_count(self.layer))
        for taken in pool.map(self.take, windows):
            # in the order of the windows, so that sums do not depend on the threads
            for role, gram, same, weights in taken:
                self.gram[role] += gram
                self.same[role] = meet(self.same[role], same)
                done.add(weights)

    def take(self, window: tuple[int, int]) -> list[tuple[str, NDArray[Any], NDArray[np.intp], int]]:
        """Read one window of stored rows of all experts; returns roles with Gram matrices, experts that are the same so
        far, and numbers of weights."""
        grams = []
        for piece in self.tensor.read(range(self.layer.count), *window):
            gram = gram_matrix(piece.values.reshape(self.layer.count, -1))
            if not np.isfinite(gram).all():
                refuse_not_finite(self.layer, int(np.argmin(np.isfinite(piece.values).all(axis=(1, 2)))), piece.role)
            grams.append((piece.role, gram, refine(self.same[piece.role], piece.values), piece.values.size))
            self.base[piece.role][piece.index] = mean_expert(piece.values)
            for expert, matrices in self._kept.items():
                matrices[piece.role][piece.index] = piece.values[expert]
            if len(self.inputs):
                self._note_queries(piece)
        return grams

    def deltas(self, expert: int) -> tuple[dict[str, tuple[NDArray[np.float64], float]], dict[str, Nearest]]:
        """By role: the energy spectrum of an expert's delta, and the delta's share of the expert's energy; and where
        the queries are found in the expert."""
        matrices = self._kept.pop(expert, None) or self.tensor.matrices(expert)
        nearest = (
            {role: self.find_queries(role, matrix) for role, matrix in matrices.items()} if self.positions.size else {}
        )
        spectra = {role: _delta_spectrum(matrices.pop(role), base) for role, base in self.base.items()}
        for role, (_, share) in spectra.items():
            if not np.isfinite(share):
                refuse_not_finite(self.layer, expert, role)
        return spectra, nearest

    def find_queries(self, role: str, matrix: NDArray[np.float32]) -> Nearest:
        """Where the queries are found in a matrix of the role."""
        queries = self.queries[role].reshape(-1, self.queries[role].shape[-1])
        return find_nearest(queries, self.positions.reshape(-1), as_neurons(role, matrix))

    def _note_queries(self, piece: Piece) -> None:
        """Copy what a window holds of the neurons to search for, and the kept numbers of all neurons."""
        shape = self.layer.shape(piece.role)
        rows, columns = (range(size)[part] for part, size in zip(piece.index, shape, strict=True))
        neurons, inputs = (columns, rows) if piece.role == "down" else (rows, columns)
        values = piece.values.transpose(0, 2, 1) if piece.role == "down" else piece.values
        vectors = self.vectors[piece.role][:, neurons.start : neurons.stop]
        for start, stop in self.runs:
            low, high = max(self.inputs[start], inputs.start), min(self.inputs[stop - 1] + 1, inputs.stop)
            if low < high:
                first = start + low - self.inputs[start]
                vectors[..., first : first + high - low] = values[..., low - inputs.start : high - inputs.start]
        for place, (expert, wanted) in enumerate(zip(self.chosen, self.positions, strict=True)):
            held = (wanted >= neurons.start) & (wanted < neurons.stop)
            values = as_neurons(piece.role, piece.values[expert])
            self.queries[piece.role][place, held, inputs.start : inputs.stop] = values[wanted[held] - neurons.start]


def _runs(numbers: NDArray[np.intp]) -> list[tuple[int, int]]:
    """Where neighbours in `numbers`, which ascend, follow each other without a gap: first and last place, exclusive."""
    cuts = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    return list(pairwise(cuts)) if len(numbers) else []


def mean_expert(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The mean of experts: float32 [experts, rows, columns] -> float64 [rows, columns].

    GROUP experts at a time are summed in float32, and these sums in float64, which takes four times as long. So the
    mean of any number of identical experts differs from them by less than the tolerance ROUNDING.
    """
    total = np.zeros(values.shape[1:])
    with np.errstate(over="ignore"):
        for start in range(0, len(values), GROUP):
            total += values[start : start + GROUP].sum(axis=0)
    if not np.isfinite(total).all():
        total = values.sum(axis=0, dtype=np.float64)
    return total / len(values)


def _matrix(layer: ExpertLayer, role: str, expert: int) -> NDArray[np.float32]:
    tensor = next(tensor for tensor in layer.tensors if role in tensor.spec.roles)
    matrix = tensor.matrices(expert)[role]
    if not np.isfinite(matrix).all():
        refuse_not_finite(layer, expert, role)
    return matrix


def refuse_not_finite(layer: ExpertLayer, expert: int, role: str) -> NoReturn:
    """Raise ModelUnreadable for a matrix that is not finite."""
    raise ModelUnreadable(
        f"layer {layer.number}, expert {expert}: the {role} projection holds NaN, infinity or numbers too large for "
        "float32",
        "the checkpoint is broken",
    )


def _delta_spectrum(matrix: NDArray[np.float32], base: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
    """The energy spectrum of `matrix - base` and its share of the matrix's energy; overwrites the matrix."""
    energy = total_energy(matrix)
    with np.errstate(over="ignore"):  # for the caller to refuse
        matrix -= base
    share = total_energy(matrix) / energy if energy > 0 else 0.0
    if share < ROUNDING:
        return np.zeros(min(matrix.shape)), 0.0
    if share == np.inf:
        return np.zeros(min(matrix.shape)), share
    return energy_spectrum(matrix), share


def expert_counter(progress: Progress, what: str, layer: ExpertLayer, experts: int) -> Counter:
    """A counter of decoded weights that reports stored bytes; the job will read this many experts of a layer."""
    return Counter(progress, what, layer.stored_bytes * experts // layer.count, layer.stored_bytes / layer.parameters)
