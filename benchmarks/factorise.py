"""Factorising deltas of an OLMoE-shaped layer at default ranks, against full SVDs and scikit-learn's randomized_svd.

Run by hand: python benchmarks/factorise.py [--repeat N] [--sample N] [--output FILE]; needs scikit-learn. Ratios are
medians over the rounds. A sample of a layer's deltas is factorised: each takes the same time. All three work the
way that is their best: ours in a thread per core, the others on all cores at once.
"""

import argparse
import json
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

from chuk_lazarus.introspection.moe.overlay import factorise, relative_error
from chuk_lazarus.introspection.moe.spectra import effective_rank, energy_spectrum

SHAPE = (1024, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--sample", type=int, default=4)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    deltas = [rng.standard_normal(SHAPE, dtype=np.float32) for _ in range(options.sample)]
    rank = effective_rank(energy_spectrum(deltas[0]), 0.95)

    def ours() -> list[np.ndarray]:
        with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(lambda delta: factorise(delta, rank), deltas))
        return [factors.left @ factors.right for factors in found]

    def full() -> list[np.ndarray]:
        found = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
        return [(left[:, :rank] * values[:rank]) @ right[:rank] for left, values, right in found]

    def randomised() -> list[np.ndarray]:
        found = [randomized_svd(delta, rank, n_iter=2, random_state=0) for delta in deltas]
        return [(left * values) @ right for left, values, right in found]

    seconds: dict[str, list[float]] = {"ours": [], "full": [], "randomised": []}
    errors: dict[str, float] = {}
    for _ in range(options.repeat):
        for name, method in (("ours", ours), ("full", full), ("randomised", randomised)):
            started = time.perf_counter()
            rebuilt = method()
            seconds[name].append(time.perf_counter() - started)
            errors[name] = max(relative_error(got, delta) for got, delta in zip(rebuilt, deltas, strict=True))
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}",
        "shape": SHAPE,
        "rank": rank,
        "seconds_per_delta": {name: median(found) / len(deltas) for name, found in seconds.items()},
        "relative_error": errors,
        "full_svd_over_ours": median(a / b for a, b in zip(seconds["full"], seconds["ours"], strict=True)),
        "randomised_over_ours": median(a / b for a, b in zip(seconds["randomised"], seconds["ours"], strict=True)),
    }
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
