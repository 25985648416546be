"""Layers far larger than memory: a DeepSeek-V3-shaped one (256 experts of 3 x 2048x7168, FP8 in blocks of 128x128).

    python benchmarks/large.py [--small N] [--folder DIR] [--output FILE]

The layer takes 11.3 GB on the disk. An analysis and `moe-overlay-compute` of 8 sampled experts go over it, and
`moe-overlay-compress` over 16 experts of the same shape, under `--memory 2GB` and 1GB, each in a process of its own,
once. Peaks are of resident memory; how often each byte is read is counted from the offsets of all calls of `pread`.
"""

import shutil
from dataclasses import replace
from pathlib import Path

from layers import DEEPSEEK_V3, Shape, write_model
from measuring import Figures, apart, benchmark

FEW = 16  # experts of the layer that is compressed
GIVEN = {"gate": 64, "up": 64, "down": 64}


def report(job: Figures, size: int) -> Figures:
    times = {int(n): count for n, count in job["bytes_by_times_read"].items()}
    return {
        "seconds": job["seconds"],
        "cpu_seconds": job["cpu_seconds"],
        "mb_per_cpu_second": size / 1e6 / job["cpu_seconds"],
        "peak_gib": job["peak_bytes"] / 2**30,
        "bytes_read_over_expert_bytes": job["bytes_read"] / size,
        "bytes_by_times_read": times,
        "share_read_more_than_twice": sum(count for n, count in times.items() if n > 2) / sum(times.values()),
    }


def measure_layer(folder: Path, shape: Shape, jobs: dict[str, dict[str, object]]) -> Figures:
    size = write_model(folder, shape)
    found: Figures = {"experts": shape.experts, "expert_bytes": size, "jobs": {}}
    for memory in ("2GB", "1GB"):
        for name, arguments in jobs.items():
            own = {**arguments, "name": name.split()[0], "model": str(folder), "memory": memory, "traced": True}
            if own["name"] == "compress":
                own |= {"folder": str(folder.with_name("overlay")), "force": True}
            found["jobs"][f"{name}, {memory}"] = report(apart("jobs.service", **own), size)
    shutil.rmtree(folder)
    shutil.rmtree(folder.with_name("overlay"), ignore_errors=True)
    return found


if __name__ == "__main__":
    with benchmark(__doc__) as (options, figures):
        shape = DEEPSEEK_V3.smaller(options.small)
        figures["rounds"] = 1
        figures["analysis"] = measure_layer(
            options.folder / "whole", shape, {"analyze": {"experts": 8}, "compute": {"experts": 8}}
        )
        figures["compression"] = measure_layer(
            options.folder / "few",
            replace(shape, experts=FEW),
            {"compress": {}, "compress with given ranks": {"ranks": GIVEN}},
        )
