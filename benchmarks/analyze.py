"""A default analysis of an OLMoE-shaped layer (64 x 3 x 1024x2048, bf16) against its bare floor and against full SVDs.

Run by hand: python benchmarks/analyze.py [--repeat N] [--output FILE]. Everything is timed in one run, so read the
ratios, which are medians over the rounds; the seconds are this machine's. The layer is random: the time does not
depend on the values.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import ml_dtypes
import numpy as np
from threadpoolctl import threadpool_limits

from chuk_lazarus.introspection.moe.lapack import symmetric_eigenvalues

EXPERTS, INTERMEDIATE, HIDDEN, CHOSEN = 64, 1024, 2048, 8
SHAPES = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}


def write_layer(folder: Path) -> int:
    """One MoE layer in OLMoE's names; returns the bytes of its experts."""
    header, offset = {}, 0
    for expert in range(EXPERTS):
        for name, shape in SHAPES.items():
            stop = offset + 2 * shape[0] * shape[1]
            key = f"model.layers.0.mlp.experts.{expert}.{name}.weight"
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, stop]}
            offset = stop
    head = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for _ in range(EXPERTS * len(SHAPES)):
            matrix = 0.02 * rng.standard_normal(INTERMEDIATE * HIDDEN, dtype=np.float32)
            file.write(matrix.astype(ml_dtypes.bfloat16).tobytes())
    config = {"model_type": "olmoe", "num_hidden_layers": 1, "num_experts": EXPERTS}
    (folder / "config.json").write_text(json.dumps(config))
    return offset


def timed(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def floor(folder: Path) -> dict[str, float]:
    """The bare stages that no exact analysis can do without: on warm arrays, experts side by side on all cores."""
    rng = np.random.default_rng(0)
    deltas = [rng.standard_normal((INTERMEDIATE, HIDDEN), dtype=np.float32) for _ in range(len(SHAPES) * CHOSEN)]
    grams = [delta @ delta.T for delta in deltas]
    flat = rng.standard_normal((EXPERTS, INTERMEDIATE * HIDDEN // 16), dtype=np.float32)

    def read() -> None:
        with open(folder / "model.safetensors", "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass

    symmetric_eigenvalues(grams[0])  # loads scipy's BLAS, which is then limited with numpy's
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        return {
            "read": timed(read),
            "expert gram": timed(lambda: list(pool.map(lambda _: flat @ flat.T, range(16 * len(SHAPES))))),
            "delta grams": timed(lambda: list(pool.map(lambda delta: delta @ delta.T, deltas))),
            "eigenvalues": timed(lambda: list(pool.map(symmetric_eigenvalues, grams))),
        }


def help_seconds() -> float:
    """Seconds of `lazarus --help`, a process of its own."""
    return min(
        timed(
            lambda: subprocess.run([sys.executable, "-m", "chuk_lazarus.cli.app", "--help"], stdout=subprocess.DEVNULL)
        )
        for _ in range(5)
    )


def full_svds(sample: int = 4) -> float:
    """Seconds of full SVDs of as many deltas, one after the other, each on all cores; from a sample of them."""
    rng = np.random.default_rng(0)
    deltas = [rng.standard_normal((INTERMEDIATE, HIDDEN), dtype=np.float32) for _ in range(sample)]
    seconds = timed(lambda: [np.linalg.svd(delta, full_matrices=False) for delta in deltas])
    return len(SHAPES) * CHOSEN / sample * seconds


CHILD = """
import json, resource, sys, time
from chuk_lazarus.introspection.moe import MoETypeService
start = time.perf_counter()
report = MoETypeService.analyze(sys.argv[1])
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
if sys.platform == "linux":  # where a child inherits its parent's ru_maxrss
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    peak = 1024 * int(status["VmHWM"].split()[0])
print(json.dumps({"seconds": seconds, "peak_bytes": peak, "bytes_read": report.cost.bytes_read}))
"""


def analysis(folder: Path) -> dict[str, float]:
    """A default analysis, the first thing that a fresh process does."""
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        size = write_layer(Path(name))
        analysis(Path(name))  # warms the page cache, so that both sides read from memory
        rounds = [(floor(Path(name)), analysis(Path(name)), full_svds()) for _ in range(options.repeat)]
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}",
        "expert_bytes": size,
        "rounds": options.repeat,
        "floor_seconds": {stage: median(floors[stage] for floors, _, _ in rounds) for stage in rounds[0][0]},
        "analysis_seconds": median(run["seconds"] for _, run, _ in rounds),
        "full_svds_seconds": median(svds for _, _, svds in rounds),
        "analysis_over_floor": median(run["seconds"] / sum(floors.values()) for floors, run, _ in rounds),
        "full_svds_over_analysis": median(svds / run["seconds"] for _, run, svds in rounds),
        "peak_gib": max(run["peak_bytes"] for _, run, _ in rounds) / 2**30,
        "help_seconds": help_seconds(),
        "bytes_read_over_expert_bytes": rounds[0][1]["bytes_read"] / size,
    }
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
