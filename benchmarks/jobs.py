"""What runs in a process of its own: the services, whole and stage by stage, and the bare work that they stand on.

`measuring.apart` calls these by name. Imports and the writing of layers are not timed.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from layers import GROUP, Shape
from measuring import Figures, cores, timed
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from chuk_lazarus.introspection.moe import (
    Experts,
    MoECompressionService,
    MoELayoutService,
    MoETypeService,
    memory_limit,
)
from chuk_lazarus.introspection.moe.jobs import measure
from chuk_lazarus.introspection.moe.jobs.model import evenly_spaced
from chuk_lazarus.introspection.moe.jobs.resources import Resources
from chuk_lazarus.introspection.moe.numerics import low_rank, spectra
from chuk_lazarus.introspection.moe.numerics.lapack import symmetric_eigenvalues
from chuk_lazarus.introspection.moe.provenance import lineage
from chuk_lazarus.introspection.moe.weights.codecs import fp8, mxfp4, plain

Array = NDArray[Any]

SERVICES: dict[str, Callable[..., Any]] = {
    "layout": MoELayoutService.describe,
    "analyze": MoETypeService.analyze,
    "quick": MoETypeService.quick,
    "compute": MoECompressionService.compute,
    "verify": MoECompressionService.verify,
    "compress": MoECompressionService.compress,
}


def service(name: str, memory: str | None = None, traced: bool = False, **arguments: Any) -> Figures:
    """One call of a service, the first thing that a process does.

    `bytes_read` is what it says it has read; `traced` counts the bytes of each call of `pread` besides.
    """
    reads: list[tuple[int, int, int]] = []
    found: list[Any] = []
    with memory_limit(memory), _recorded(reads if traced else None):
        times = timed(lambda: found.append(SERVICES[name](**arguments)))
    result: Figures = {**times, "bytes_read": found[0].cost.bytes_read, "bytes_fetched": found[0].cost.bytes_fetched}
    if name == "analyze":
        result["ranks"] = {
            role: projection.expert_ranks["0.95"] for role, projection in found[0].layers[0].projections.items()
        }
    return {**result, **(_coverage(reads) if traced else {})}


@contextmanager
def _recorded(reads: list[tuple[int, int, int]] | None) -> Iterator[None]:
    """Note file and offsets of every `pread`, which is how files are read."""
    if reads is None:
        yield
        return
    original = os.pread

    def pread(descriptor: int, count: int, offset: int) -> bytes:
        data = original(descriptor, count, offset)
        reads.append((os.fstat(descriptor).st_ino, offset, offset + len(data)))
        return data

    os.pread = pread
    try:
        yield
    finally:
        os.pread = original


def _coverage(reads: list[tuple[int, int, int]]) -> Figures:
    """How often the bytes of the largest file were read: the bytes of the file that were read n times, by n."""
    sizes: dict[int, int] = {}
    for file, _, stop in reads:
        sizes[file] = max(sizes.get(file, 0), stop)
    largest = max(sizes, key=lambda file: sizes[file])
    ranges = np.array([(start, stop) for file, start, stop in reads if file == largest], np.int64)
    places = np.concatenate([ranges[:, 0], ranges[:, 1]])
    order = np.argsort(places, kind="stable")
    depth = np.cumsum(np.repeat([1, -1], len(ranges))[order])[:-1]
    length = np.diff(places[order])
    times = {int(n): int(length[depth == n].sum()) for n in np.unique(depth) if length[depth == n].any()}
    return {"bytes_by_times_read": {str(n): count for n, count in times.items() if n}}


# ---------------------------------------------------------------------------------------------------------------------
# The stages of an analysis


def stages(model: str, experts: int | None) -> Figures:
    """CPU seconds of an analysis by stage, all threads together.

    Stages are told apart by the functions that do them: what is left over is everything else.
    """
    spent: dict[str, float] = {}
    lock = threading.Lock()

    def watch(owner: Any, name: str, stage: str) -> None:
        function = getattr(owner, name)

        @wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                with lock:
                    spent[stage] = spent.get(stage, 0.0) + time.thread_time() - started

        setattr(owner, name, watched)

    watch(os, "pread", "read")
    for codec in (plain, fp8, mxfp4):
        watch(codec, "decode", "decode")
    watch(measure, "gram_matrix", "expert products")
    watch(spectra, "gram_matrix", "delta products")
    watch(spectra, "symmetric_eigenvalues", "eigenvalues")
    watch(np.linalg, "eigvalsh", "close calls again, in float64")
    watch(measure, "find_nearest", "matching")
    times = timed(lambda: MoETypeService.analyze(model, experts=experts))
    return {"stages": {**spent, "everything else": times["cpu_seconds"] - sum(spent.values())}, **times}


def floor(model: str, shape: dict[str, Any], chosen: int) -> Figures:
    """The bare work behind each stage: on warm arrays in float32, side by side on all cores, and nothing kept.

    Decoding, the mean and matching are not what an analysis of spectra can't do without, and so have lines of their
    own.
    """
    own = Shape(**shape)
    rng = np.random.default_rng(0)
    side = (own.intermediate, own.hidden)
    deltas = [rng.standard_normal(side, dtype=np.float32) for _ in range(4)]
    grams = [delta @ delta.T for delta in deltas]
    many = 3 * chosen
    resources = Resources.current()
    per_thread = resources.window_weights // resources.threads // own.experts
    windows = max(1, round(own.weights / own.experts / per_thread))
    window = rng.standard_normal((own.experts, own.weights // own.experts // windows), dtype=np.float32)
    queries = min(own.intermediate, -(-lineage.QUERIES // chosen)) * chosen
    asked = rng.standard_normal((queries, own.hidden), dtype=np.float32)
    symmetric_eigenvalues(grams[0])  # loads scipy's BLAS, which is then limited with numpy's
    with threadpool_limits(1), ThreadPoolExecutor(cores()) as pool:

        def each(function: Callable[[Any], Any], items: Any) -> dict[str, float]:
            def run(item: Any) -> None:
                function(item)

            return timed(lambda: [None for _ in pool.map(run, items)])

        return {
            "stages": {
                "read": _read_all(Path(model) / "model.safetensors", each),
                "decode": _decode_all(own, each),
                "expert products": each(lambda _: window @ window.T, range(windows)),
                "mean of experts": each(lambda _: window.mean(axis=0), range(windows)),
                "delta products": each(lambda delta: delta @ delta.T, islice(cycle(deltas), many)),
                "eigenvalues": each(symmetric_eigenvalues, islice(cycle(grams), many)),
                "matching": each(lambda delta: asked @ delta.T, islice(cycle(deltas), many)),
            }
        }


Each = Callable[[Callable[[Any], Any], Any], dict[str, float]]


def _read_all(file: Path, each: Each, step: int = 1 << 18) -> dict[str, float]:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return each(lambda start: os.pread(descriptor, step, start), range(0, os.fstat(descriptor).st_size, step))
    finally:
        os.close(descriptor)


def _decode_all(shape: Shape, each: Each, step: int = 1 << 16) -> dict[str, float]:
    """bf16 by a cast, FP8 by looking up its bytes, MXFP4 by looking up pairs; FP4 and FP8 are then scaled."""
    rng = np.random.default_rng(0)
    pieces = range(max(1, shape.weights // step))
    if shape.storage == "bf16":
        numbers = rng.standard_normal(step, dtype=np.float32).astype(ml_dtypes.bfloat16)
        return each(lambda _: numbers.astype(np.float32), pieces)
    if shape.storage == "fp8":
        codes, table = rng.integers(0, 256, step, np.uint8), rng.standard_normal(256, dtype=np.float32)
        scale = np.ones((step // 128, 1), np.float32)
        return each(lambda _: table.take(codes).reshape(-1, 128) * scale, pieces)
    codes, pairs = rng.integers(0, 256, step // 2, np.uint8), rng.standard_normal((256, 2)).astype(np.float32)
    items, scale = pairs.view(np.uint64).ravel(), np.ones((step // GROUP, 1), np.float32)
    return each(lambda _: items.take(codes).view(np.float32).reshape(-1, GROUP) * scale, pieces)


# ---------------------------------------------------------------------------------------------------------------------
# What else is used for such spectra. Each takes as many of the layer's deltas as it is told to.


def _deltas(model: str, chosen: int, sample: int) -> list[Array]:
    """Deltas of the first of the `chosen` experts, their roles in turn."""
    layer = Experts.open(model).layer(0)
    with Resources.current().worker_threads(layer) as pool:
        bases = {role: base for tensor in layer.tensors for role, base in measure.mean_experts(tensor, pool).items()}
    found: list[Array] = []
    for expert in evenly_spaced(layer.count, chosen)[: -(-sample // 3)]:
        found += [matrix - bases[role].astype(np.float32) for role, matrix in layer.matrices(expert).items()]
    return found[:sample]


def _scaled(times: Figures, chosen: int, sample: int, values: Sequence[Array] = ()) -> Figures:
    """The times of a sample of the deltas as if it were all, and the sample's 95 % ranks by these singular values."""
    squares = [np.square(one, dtype=np.float64) for one in values]
    ranks = [spectra.effective_rank(one, 0.95) for one in squares]
    return {**{clock: 3 * chosen / sample * times[clock] for clock in times}, "ranks": ranks}


def _singular_values(delta: Array) -> Array:
    return np.linalg.svd(delta, full_matrices=False)[1]


def numpy_svd(model: str, chosen: int, sample: int) -> Figures:
    """Full SVDs by numpy, one after the other, each on all cores."""
    deltas = _deltas(model, chosen, sample)
    values: list[Array] = []
    return _scaled(timed(lambda: values.extend(map(_singular_values, deltas))), chosen, sample, values)


def numpy_svd_side_by_side(model: str, chosen: int, sample: int) -> Figures:
    """The same, one a core."""
    deltas = _deltas(model, chosen, sample)
    values: list[Array] = []
    with threadpool_limits(1), ThreadPoolExecutor(cores()) as pool:
        times = timed(lambda: values.extend(pool.map(_singular_values, deltas)))
    return _scaled(times, chosen, sample, values)


def torch_svdvals(model: str, chosen: int, sample: int) -> Figures:
    """Singular values alone, by torch."""
    import torch

    deltas = [torch.from_numpy(delta) for delta in _deltas(model, chosen, sample)]
    values: list[Array] = []
    torch.linalg.svdvals(torch.ones(8, 8))
    times = timed(lambda: values.extend(torch.linalg.svdvals(delta).numpy() for delta in deltas))
    return _scaled(times, chosen, sample, values)


def weightwatcher_analyze(model: str, chosen: int, sample: int) -> Figures:
    """`WeightWatcher.analyze` with its defaults, on linear layers that hold the deltas."""
    import torch
    import weightwatcher

    net = torch.nn.ModuleList()
    for delta in _deltas(model, chosen, sample):
        linear = torch.nn.Linear(delta.shape[1], delta.shape[0], bias=False)
        linear.weight = torch.nn.Parameter(torch.from_numpy(delta))
        net.append(linear)
    return _scaled(timed(weightwatcher.WeightWatcher(model=net).analyze), chosen, sample)


def lazarus_0_4_1(model: str, chosen: int, sample: int) -> Figures:
    """The algorithm of chuk-lazarus 0.4.1, on one layer: all experts in float32 and stacked, their mean, full SVDs of
    the chosen experts' deltas, and the cosines of the down projections.

    It works in MLX, and moves to numpy for SVDs and cosines; here it is numpy all along. So many SVDs are timed and
    scaled; the rest is timed whole.
    """
    layer = Experts.open(model).layer(0)
    stacks: dict[str, Array] = {}
    bases: dict[str, Array] = {}

    def prepare() -> None:
        experts = [layer.matrices(expert) for expert in range(layer.count)]
        stacks.update({role: np.stack([one[role] for one in experts]) for role in layer.roles})
        bases.update({role: stack.mean(axis=0) for role, stack in stacks.items()})
        flat = stacks["down"].reshape(layer.count, -1)
        unit = flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-10)
        unit @ unit.T

    once = timed(prepare)
    wanted = [(role, e) for e in range(0, layer.count, layer.count // chosen) for role in layer.roles][:sample]
    times = timed(lambda: [_singular_values(stacks[role][expert] - bases[role]) for role, expert in wanted])
    solving = _scaled(times, chosen, sample)
    return {clock: once[clock] + solving[clock] for clock in once}


# ---------------------------------------------------------------------------------------------------------------------
# Factors of a delta


def factorise(shape: tuple[int, int], rank: int, sample: int) -> Figures:
    """Ours, one a core."""
    deltas = _gaussians(shape, sample)
    found: list[Any] = []
    with threadpool_limits(1), ThreadPoolExecutor(cores()) as pool:
        low_rank.factorise(deltas[0][:8, :8], 2)
        times = timed(lambda: found.extend(pool.map(lambda delta: low_rank.factorise(delta, rank), deltas)))
    return {**times, "relative_error": _error(deltas, [factors.left @ factors.right for factors in found])}


def factorise_by_svd(shape: tuple[int, int], rank: int, sample: int) -> Figures:
    """By numpy's full SVD, on all cores."""
    deltas = _gaussians(shape, sample)
    found: list[Any] = []
    times = timed(lambda: found.extend(np.linalg.svd(delta, full_matrices=False) for delta in deltas))
    rebuilt = [(left[:, :rank] * values[:rank]) @ right[:rank] for left, values, right in found]
    return {**times, "relative_error": _error(deltas, rebuilt)}


def factorise_at_random(shape: tuple[int, int], rank: int, sample: int) -> Figures:
    """By scikit-learn's randomised SVD, on all cores."""
    from sklearn.utils.extmath import randomized_svd

    deltas = _gaussians(shape, sample)
    found: list[Any] = []
    times = timed(lambda: found.extend(randomized_svd(delta, rank, n_iter=2, random_state=0) for delta in deltas))
    return {**times, "relative_error": _error(deltas, [(left * values) @ right for left, values, right in found])}


def _gaussians(shape: tuple[int, int], sample: int) -> list[Array]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for _ in range(sample)]


def _error(deltas: list[Array], rebuilt: list[Array]) -> float:
    return max(low_rank.relative_error(got, delta) for got, delta in zip(rebuilt, deltas, strict=True))
