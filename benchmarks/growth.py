"""How an analysis grows with the number of experts, the size of their matrices and the number of layers.

    python benchmarks/growth.py [--repeat N] [--small N] [--output FILE]

Every point is an analysis in a process of its own, rounds go through all points, and the slopes are those of straight
lines through the medians, both axes logarithmic: 1 is time that grows as the weights do. A slope of CPU seconds does
not suffer from other programs, one of wall seconds does.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from layers import OLMOE, Shape, write_model
from measuring import CLOCKS, Figures, apart, benchmark

BASE = replace(OLMOE, experts=32, intermediate=512, hidden=1024)
SERIES: dict[str, tuple[dict[int, tuple[Shape, int]], dict[str, object]]] = {
    "experts, all of them exactly": (
        {count: (replace(BASE, experts=count), 1) for count in (16, 32, 64, 128, 256)},
        {"experts": None},
    ),
    "experts, 8 of them sampled": ({count: (replace(BASE, experts=count), 1) for count in (16, 32, 64, 128, 256)}, {}),
    "side of the matrices, 8 of 16 experts": (
        {side: (Shape("bf16", 16, side, 2 * side), 1) for side in (256, 512, 1024, 2048)},
        {},
    ),
    "layers": ({count: (BASE, count) for count in (1, 2, 4, 8)}, {"layers": "all"}),
}
"""What grows, the model at each point with the number of its layers, and the options of the analysis."""


def measure_series(
    folder: Path, repeat: int, points: Mapping[int, tuple[Shape, int]], options: Mapping[str, object]
) -> Figures:
    sizes = {point: write_model(folder / str(point), *model) for point, model in points.items()}
    rounds = [
        {
            point: apart("jobs.service", name="analyze", model=str(folder / str(point)), memory="2GB", **options)
            for point in points
        }
        for _ in range(repeat + 1)
    ][1:]  # the first warms the page cache
    found = {clock: [median(one[point][clock] for one in rounds) for point in points] for clock in CLOCKS}
    peaks = [max(one[point]["peak_bytes"] for one in rounds) for point in points]
    return {
        "points": list(points),
        "expert_bytes": list(sizes.values()),
        **found,
        "peak_bytes": peaks,
        "slope": {clock: _slope(list(points), found[clock]) for clock in CLOCKS},
        "slope_of_peak": _slope(list(points), peaks),
    }


def _slope(points: list[int], values: list[float]) -> float:
    return float(np.polyfit(np.log(points), np.log(values), 1)[0])


if __name__ == "__main__":
    with benchmark(__doc__) as (options, figures):
        figures["series"] = {}
        for number, (name, (points, wanted)) in enumerate(SERIES.items()):
            smaller = {point: (shape.smaller(options.small), layers) for point, (shape, layers) in points.items()}
            folder = options.folder / str(number)
            figures["series"][name] = measure_series(folder, options.repeat, smaller, wanted)
