"""Which order of the quantiles is the best codebook of a trellis, and what its error is on Gaussian numbers.

    python experiments/trellis/codebook.py          # writes codebook.json beside this file

Values are the 4096 quantiles of a Gaussian, in some order of the states. Orders are compared that are random, that take
each state times an odd number, and that mix the state before: each at its best of some multipliers. These are chosen on
one sample of Gaussian numbers, and the errors are of another; so are those of the codebooks in use ("chosen").
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chuk_lazarus.introspection.moe.overlays.codes.trellis import STATES, WIDTHS, codebook
from chuk_lazarus.introspection.moe.overlays.codes.viterbi import best_states

HERE = Path(__file__).resolve().parent
Order = Callable[[int], NDArray[Any]]
ORDERS: dict[str, Order] = {
    "m s": lambda m: m * np.arange(STATES) % STATES,
    "m (s xor s >> 6)": lambda m: m * (np.arange(STATES) ^ np.arange(STATES) >> 6) % STATES,
    "random": lambda m: np.random.default_rng(m).permutation(STATES),
}
TRIED, CHOOSE, CONFIRM, BEST = 64, 1 << 12, 1 << 14, 6


def gaussian(count: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(count, dtype=np.float32)


def error(numbers: NDArray[np.float32], values: NDArray[np.float32], bits: int) -> float:
    """The squared error over the energy, with the best scale."""
    coded = values[best_states(numbers, values, bits)]
    product, square, energy = (float(np.vdot(*pair)) for pair in ((numbers, coded), (coded, coded), (numbers, numbers)))
    return 1 - product**2 / square / energy


def main() -> None:
    quantiles = np.sort(codebook(2))
    few, more, fresh = gaussian(CHOOSE, 1), gaussian(CONFIRM, 2), gaussian(1 << 17, 3)
    results: dict[str, Any] = {}
    for bits in WIDTHS:
        found: dict[str, Any] = {"bound": 0.25**bits, "chosen": error(fresh, codebook(bits), bits)}
        for name, order in ORDERS.items():
            candidates = [int(m) | 1 for m in np.random.default_rng(0).choice(STATES, TRIED, replace=False)]
            tried = sorted((error(few, quantiles[order(m)], bits), m) for m in candidates)
            best = sorted((error(more, quantiles[order(m)], bits), m) for _, m in tried[:BEST])[0][1]
            found[name] = {
                "multiplier": best,
                "median": tried[len(tried) // 2][0],
                "error": error(fresh, quantiles[order(best)], bits),
            }
        results[f"{bits} bits"] = found
        print(bits, json.dumps(found), flush=True)
    (HERE / "codebook.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
