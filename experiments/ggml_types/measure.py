"""How much squared error do llama.cpp's types leave, and how much our affine code that stands in for them?

    python experiments/ggml_types/measure.py libggml-base.so     # -> results.json

The library is ggml's own, of any build of llama.cpp (`cmake --build build --target ggml-base`). It quantises without an
importance matrix, the gguf package decodes.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, quants
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray

from chuk_lazarus.introspection.moe.overlays.codes.affine import AffineCode
from chuk_lazarus.introspection.moe.overlays.ggml import STAND_IN_GROUP, STAND_INS
from chuk_lazarus.introspection.moe.weights.experts import Experts

HERE = Path(__file__).parent
SHAPE = (512, 512)


def draw_matrices() -> dict[str, NDArray[np.float32]]:
    """Gaussian and heavier tails, and the experts of a trained model, whose rows are laid end to end."""
    rng = np.random.default_rng(1)
    layer = Experts.open("demo:native").layer(0)
    rows = [matrix.ravel() for expert in range(layer.count) for matrix in layer.matrices(expert).values()]
    trained = np.concatenate(rows)[: SHAPE[0] * SHAPE[1] // 2].reshape(-1, SHAPE[1])
    drawn = {
        "gaussian": rng.standard_normal(SHAPE),
        "student t, 5": rng.standard_t(5, SHAPE),
        "laplace": rng.laplace(size=SHAPE),
        "demo:native": trained,
    }
    return {name: matrix.astype(np.float32) for name, matrix in drawn.items()}


def quantise(library: ctypes.CDLL, matrix: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """The matrix as ggml keeps it."""
    weights, size = GGML_QUANT_SIZES[kind]
    rows, columns = matrix.shape
    coded = np.zeros((rows, columns // weights * size), np.uint8)
    source = np.ascontiguousarray(matrix)
    library.ggml_quantize_chunk(kind.value, source.ctypes.data, coded.ctypes.data, 0, rows, columns, None)
    return quants.dequantize(coded, kind)


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    results = []
    for source, matrix in draw_matrices().items():
        energy = float(np.square(matrix).sum())
        for name, (bits, factor) in STAND_INS.items():
            lost = np.square(quantise(library, matrix, GGMLQuantizationType[name]) - matrix).sum() / energy
            stand_in = AffineCode(bits, STAND_IN_GROUP).lost(matrix) / energy
            row = {"weights": source, "type": name, "lost": float(lost), "stand_in": stand_in, "factor": factor}
            results.append({**row, "estimated": factor * stand_in / float(lost)})
    (HERE / "results.json").write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")
    for name in STAND_INS:
        ratios = [f"{row['estimated']:.3f}" for row in results if row["type"] == name]
        print(f"{name:8} estimated / measured: {' '.join(ratios)}")


if __name__ == "__main__":
    main()
