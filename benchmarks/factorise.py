"""Overlays: factors of a delta, against full and randomised SVDs, and how fast whole layers go through.

    python benchmarks/factorise.py [--repeat N] [--small N] [--output FILE]

Factors are of 1024x2048 deltas, as OLMoE has them, at the rank that holds 95 % of the energy of noise. Everything works
the way that is its best: ours one delta a core, the others on all cores at once. The throughputs are megabytes of
stored experts of an OLMoE-shaped layer (805 MB in bf16) per second, from fresh processes.
"""

from statistics import median

import numpy as np
from layers import OLMOE, write_model
from measuring import apart, benchmark, medians, over

from chuk_lazarus.introspection.moe.numerics.spectra import effective_rank, energy_spectrum

WAYS = {"ours": "factorise", "full SVD": "factorise_by_svd", "randomised SVD": "factorise_at_random"}
SAMPLE = 4
JOBS: dict[str, dict[str, object]] = {
    "analyze": {"experts": 8},
    "analyze all experts": {"experts": None},
    "compute": {"experts": 8},
    "compute all experts": {"experts": None},
    "verify given ranks": {"ranks": {"gate": 64, "up": 64, "down": 64}},
    "compress": {},
    "compress given ranks": {"ranks": {"gate": 64, "up": 64, "down": 64}},
}


if __name__ == "__main__":
    with benchmark(__doc__) as (options, figures):
        layer = OLMOE.smaller(options.small)
        shape = (layer.intermediate, layer.hidden)
        rank = effective_rank(energy_spectrum(np.random.default_rng(0).standard_normal(shape, np.float32)), 0.95)
        rounds = [
            {way: apart(f"jobs.{job}", shape=shape, rank=rank, sample=SAMPLE) for way, job in WAYS.items()}
            for _ in range(options.repeat)
        ]
        figures["factors"] = {
            "shape": shape,
            "rank": rank,
            "seconds_per_delta": {way: seconds / SAMPLE for way, seconds in medians(rounds).items()},
            "cpu_seconds_per_delta": {way: seconds / SAMPLE for way, seconds in medians(rounds, "cpu_seconds").items()},
            "over_ours": {way: over(rounds, way, "ours") for way in WAYS},
            "over_ours_cpu": {way: over(rounds, way, "ours", "cpu_seconds") for way in WAYS},
            "relative_error": {way: rounds[0][way]["relative_error"] for way in WAYS},
        }
        size = write_model(options.folder / "layer", layer)
        figures["expert_bytes"] = size
        figures["throughput"] = {}
        for name, arguments in JOBS.items():
            own = {"name": name.split()[0], "model": str(options.folder / "layer"), **arguments}
            if own["name"] == "compress":
                own |= {"folder": str(options.folder / "overlay"), "force": True}
            runs = [apart("jobs.service", **own) for _ in range(options.repeat)]
            cpu = median(run["cpu_seconds"] for run in runs)
            wall = median(run["seconds"] for run in runs)
            figures["throughput"][name] = {
                "seconds": wall,
                "cpu_seconds": cpu,
                "mb_per_second": size / 1e6 / wall,
                "mb_per_cpu_second": size / 1e6 / cpu,
                "peak_gib": max(run["peak_bytes"] for run in runs) / 2**30,
            }
