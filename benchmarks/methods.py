"""Exact ways to the energy spectrum of one delta: what they cost, and how far off they are.

    python benchmarks/methods.py [--repeat N] [--small N] [--output FILE]

Deltas of 1024x2048 and 2880x2880, one on each core with a BLAS of one thread; each way in a process of its own. The
error is that of sums of leading energies, which ranks are read off, over the sum of all, against an SVD in float64:
what `spectra.MARGIN` allows for.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import scipy.linalg
from measuring import Figures, apart, benchmark, cores, medians, over, timed
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from chuk_lazarus.introspection.moe.numerics.lapack import symmetric_eigenvalues
from chuk_lazarus.introspection.moe.numerics.spectra import energy_spectrum

SHAPES = {"1024 x 2048": (1024, 2048), "2880 x 2880": (2880, 2880)}
SAMPLE = 4

Array = NDArray[Any]


def _wide_gram(delta: Array) -> Array:
    wide = delta.astype(np.float64)
    return wide @ wide.T


WAYS: dict[str, Callable[[Array], Array]] = {
    "ours: product of rows and LAPACK's ssyevd, values only, float32; a check at 95 %": energy_spectrum,
    "the same by numpy's eigvalsh": lambda delta: np.linalg.eigvalsh(delta @ delta.T)[::-1],
    "the same by scipy's eigvalsh, which holds the GIL": lambda delta: scipy.linalg.eigvalsh(delta @ delta.T)[::-1],
    "the same with a general product": lambda delta: symmetric_eigenvalues(delta @ delta.T.copy())[::-1],
    "the same in float64": lambda delta: np.linalg.eigvalsh(_wide_gram(delta))[::-1],
    "singular values by numpy's gesdd": lambda delta: np.linalg.svd(delta, compute_uv=False) ** 2,
    "full SVD by numpy": lambda delta: np.linalg.svd(delta, full_matrices=False)[1] ** 2,
}


def take(way: str, shape: tuple[int, int]) -> Figures:
    """The spectra of the sample, one a core, and their largest error."""
    rng = np.random.default_rng(0)
    deltas = [rng.standard_normal(shape, dtype=np.float32) for _ in range(SAMPLE)]
    found: list[Array] = []
    WAYS[way](deltas[0][:8, :8])  # loads scipy's BLAS, which is then limited with numpy's
    with threadpool_limits(1), ThreadPoolExecutor(cores()) as pool:
        times = timed(lambda: found.extend(pool.map(WAYS[way], deltas)))
    exact = np.linalg.svd(deltas[0].astype(np.float64), compute_uv=False) ** 2
    error = np.abs(np.cumsum(found[0], dtype=np.float64) - np.cumsum(exact)).max() / exact.sum()
    return {**{clock: seconds / SAMPLE for clock, seconds in times.items()}, "error": float(error)}


if __name__ == "__main__":
    with benchmark(__doc__) as (options, figures):
        figures["shapes"] = {}
        for name, (rows, columns) in SHAPES.items():
            shape = (rows // options.small, columns // options.small)
            rounds = [{way: apart("methods.take", way=way, shape=shape) for way in WAYS} for _ in range(options.repeat)]
            first = next(iter(WAYS))
            figures["shapes"][name] = {
                "seconds": medians(rounds),
                "cpu_seconds": medians(rounds, "cpu_seconds"),
                "over_ours": {way: over(rounds, way, first) for way in WAYS},
                "over_ours_cpu": {way: over(rounds, way, first, "cpu_seconds") for way in WAYS},
                "error": {way: rounds[0][way]["error"] for way in WAYS},
            }
