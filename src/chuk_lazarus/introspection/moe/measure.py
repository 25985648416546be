"""Measuring one MoE layer: the mean of its experts, how alike they are, and the spectra of their deltas.

Two passes, neither of which holds more than a few experts. The first reads all experts in windows of rows and forms the
base and the experts' Gram matrix. The second takes the spectra of the chosen experts' deltas; their matrices are kept
from the first pass where they fit, and read again where they don't.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from .errors import ModelUnreadable
from .spectra import ROUNDING, energy_spectrum, gram_matrix, total_energy
from .weights.experts import ExpertLayer, ExpertTensor, Piece
from .weights.source import Progress

WINDOW = 4_000_000  # weights decoded at a time in each thread
KEPT = 128_000_000  # weights of chosen experts kept between the passes


@dataclass(frozen=True, slots=True)
class RoleMeasure:
    """One role's figures in one layer.

    `gram` is [experts, experts], of all experts' flattened matrices; `spectra` are the energy spectra of the deltas
    (expert minus mean of all experts) of the experts in `chosen`, all zero where a delta is no more than rounding;
    `delta_energy` is the mean share of a chosen expert's energy that its delta has.
    """

    shape: tuple[int, int]
    gram: NDArray[np.float64]
    chosen: tuple[int, ...]
    spectra: tuple[NDArray[np.float64], ...]
    delta_energy: float


def choose_experts(count: int, wanted: int | None) -> tuple[int, ...]:
    """`wanted` evenly spaced experts out of `count`, all of them for None."""
    if wanted is None or wanted >= count:
        return tuple(range(count))
    return tuple(int(i) for i in np.linspace(0, count - 1, wanted).round())


def measure_layer(layer: ExpertLayer, chosen: Sequence[int], progress: Progress) -> dict[str, RoleMeasure]:
    """The figures of every role of a layer; raises ModelUnreadable where a weight is not finite."""
    result: dict[str, RoleMeasure] = {}
    layer.prefetch(progress)
    done = _Counter(progress, f"layer {layer.number}", layer.parameters + layer.parameters * len(chosen) // layer.count)
    with _worker_threads() as pool:
        for tensor in layer.tensors:
            first = _FirstPass(tensor, chosen)
            for weights in pool.map(first.take, tensor.windows(WINDOW)):
                done.add(weights)
            deltas = []
            for found in pool.map(first.deltas, chosen):
                deltas.append(found)
                done.add(sum(prod(layer.shape(role)) for role in tensor.spec.roles))
            for role in tensor.spec.roles:
                spectra, shares = zip(*(found[role] for found in deltas), strict=True)
                result[role] = RoleMeasure(
                    layer.shape(role), first.gram(role), tuple(chosen), spectra, float(np.mean(shares))
                )
    return {role: result[role] for role in layer.roles}


class _FirstPass:
    """Base and Gram matrix of the roles in one stored tensor, gathered window by window."""

    def __init__(self, tensor: ExpertTensor, chosen: Sequence[int]) -> None:
        self.tensor = tensor
        self.layer = tensor.layer
        shapes = {role: self.layer.shape(role) for role in tensor.spec.roles}
        self._base = {role: np.empty(shape, np.float32) for role, shape in shapes.items()}
        self._grams: dict[str, dict[int, NDArray[np.float64]]] = {role: {} for role in shapes}
        self._kept: dict[int, dict[str, NDArray[np.float32]]] = {}
        if len(chosen) * sum(prod(shape) for shape in shapes.values()) <= KEPT:
            self._kept = {e: {role: np.empty_like(base) for role, base in self._base.items()} for e in chosen}

    def take(self, window: tuple[int, int]) -> int:
        """Read one window of stored rows of all experts; returns how many weights that were."""
        pieces = self.tensor.read(range(self.layer.count), *window)
        for piece in pieces:
            gram = gram_matrix(piece.values.reshape(self.layer.count, -1))
            if not np.isfinite(gram).all():
                self._refuse(piece)
            self._grams[piece.role][window[0]] = gram.astype(np.float64)
            # in float64: a float32 mean of identical experts can differ from them in the last bit
            self._base[piece.role][piece.index] = piece.values.mean(axis=0, dtype=np.float64)
            for expert, matrices in self._kept.items():
                matrices[piece.role][piece.index] = piece.values[expert]
        return sum(piece.values.size for piece in pieces)

    def gram(self, role: str) -> NDArray[np.float64]:
        """Summed in the order of the windows, so that the result does not depend on the threads."""
        total = np.zeros((self.layer.count, self.layer.count))
        for _, gram in sorted(self._grams[role].items(), key=lambda item: item[0]):
            total += gram
        return total

    def deltas(self, expert: int) -> dict[str, tuple[NDArray[np.float64], float]]:
        """By role: the energy spectrum of an expert's delta, and the delta's share of the expert's energy."""
        matrices = self._kept.pop(expert, None) or self.tensor.matrices(expert)
        return {role: _delta_spectrum(matrices.pop(role), base) for role, base in self._base.items()}

    def _refuse(self, piece: Piece) -> None:
        expert = int(np.argmin(np.isfinite(piece.values).all(axis=(1, 2))))
        raise ModelUnreadable(
            f"layer {self.layer.number}, expert {expert}: the {piece.role} projection holds NaN, infinity or numbers "
            "too large for float32",
            "the checkpoint is broken",
        )


def _delta_spectrum(matrix: NDArray[np.float32], base: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
    """The energy spectrum of `matrix - base` and its share of the matrix's energy; overwrites the matrix."""
    energy = total_energy(matrix)
    matrix -= base
    share = total_energy(matrix) / energy if energy > 0 else 0.0
    if share < ROUNDING:
        return np.zeros(min(matrix.shape)), 0.0
    return energy_spectrum(matrix), share


class _Counter:
    """Adds up weights done, from several threads."""

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress, self._what, self._total, self._done, self._lock = progress, what, total, 0, Lock()

    def add(self, weights: int) -> None:
        with self._lock:
            self._done += weights
            self._progress(self._what, self._done, self._total)


@contextmanager
def _worker_threads() -> Iterator[ThreadPoolExecutor]:
    """A thread per core, each with a BLAS of one thread.

    Experts side by side beat one BLAS call on all cores as soon as another program wants a core.
    """
    from threadpoolctl import threadpool_limits

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with threadpool_limits(1, user_api="blas"):
        pool = ThreadPoolExecutor(cores)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
