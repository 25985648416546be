"""What all benchmarks share: clocks, processes of their own, and results with the machine that they came from.

Every result has two clocks. Wall seconds are what a user waits, and suffer where other programs want the cores; CPU
seconds, of all threads together, hardly do. Ratios are taken within a round and are medians over the rounds.
"""

import argparse
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy  # noqa: F401  loads its BLAS, which is asked below
from threadpoolctl import threadpool_info

HERE = Path(__file__).parent
PACKAGES = ("numpy", "scipy", "ml_dtypes", "torch", "weightwatcher", "scikit-learn")

CLOCKS = ("seconds", "cpu_seconds")

Figures = dict[str, Any]


def timed(function: Callable[[], Any]) -> dict[str, float]:
    """Wall and CPU seconds of a call, the latter of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def apart(function: str, **arguments: Any) -> Figures:
    """What `module.function(**arguments)`, of a module in this folder, returns in a fresh process, with that process's
    peak resident memory as `peak_bytes`.

    Modules are compiled once for all processes of a benchmark, as they are for a user after the first call.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment.setdefault("PYTHONPYCACHEPREFIX", os.path.join(tempfile.gettempdir(), "lazarus-bench-pycache"))
    done = subprocess.run(
        [sys.executable, __file__, function, json.dumps(arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_bytes() -> int:
    """The most resident memory that this process has had; on Linux its ru_maxrss would begin with its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def over(rounds: Sequence[Mapping[str, Figures]], one: str, other: str, clock: str = "seconds") -> float:
    """The median over rounds of one thing's time over another's."""
    return float(median(found[one][clock] / found[other][clock] for found in rounds))


def medians(rounds: Sequence[Mapping[str, Figures]], clock: str = "seconds") -> dict[str, float]:
    """The median over rounds of each thing's time."""
    return {name: median(found[name][clock] for found in rounds) for name in rounds[0]}


@contextmanager
def benchmark(description: str | None, options: argparse.ArgumentParser | None = None) -> Iterator[tuple[Any, Figures]]:
    """The command line of a benchmark and the figures to fill in, which are printed at the end, and written to
    `--output`.

    `--repeat` is the number of rounds, `--small` divides the sides of all matrices, to try a script out; `--folder` is
    where layers are written, and removed.
    """
    parser = options or argparse.ArgumentParser()
    parser.description = description
    parser.add_argument("--repeat", type=int, default=5, help="rounds (default 5)")
    parser.add_argument(
        "--small", type=int, default=1, metavar="N", help="divide the sides of matrices by N, for a try"
    )
    parser.add_argument("--folder", type=Path, help="where to write layers; the system's folder for temporary files")
    parser.add_argument("--output", type=Path, help="write the results to this file, too")
    chosen = parser.parse_args()
    figures: Figures = {"machine": _machine(), "rounds": chosen.repeat, "load": {"before": os.getloadavg()}}
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        chosen.folder = Path(folder)
        yield chosen, figures
    figures["load"]["after"] = os.getloadavg()
    text = json.dumps(figures, indent=2)
    print(text)
    if chosen.output:
        chosen.output.write_text(text + "\n")


def _machine() -> Figures:
    """Processor, cores and versions."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": f"{platform.machine()}, {_processor()}",
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.system(),
        "blas": _blas(),
        "python": platform.python_version(),
        **found,
    }


def _blas() -> str:
    """Library, version and kernels of numpy's BLAS, such as "openblas 0.3.30, SkylakeX"."""
    found = next((one for one in threadpool_info() if one["user_api"] == "blas"), {})
    return ", ".join(filter(None, [f"{found.get('internal_api')} {found.get('version')}", found.get("architecture")]))


def _processor() -> str:
    try:
        listing = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return listing.partition("model name")[2].partition("\n")[0].lstrip("\t :") or platform.processor()


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(".")
    result = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    print(json.dumps({**result, "peak_bytes": peak_bytes()}))
