"""What scales for fewer weights gain and cost: the squared error of codes at equal bits, on Gaussian numbers.

    python experiments/coded_overlays/scales.py

A number is the squared error, relative to the matrix, times 4 to the power of the bits a weight that the code takes
with its scales: a bit more quarters an error.
"""

import numpy as np

from chuk_lazarus.introspection.moe.overlays.codes.bits import GROUPS, BitsCode
from chuk_lazarus.introspection.moe.overlays.codes.code import code_bytes


def main() -> None:
    for shape in ((128, 64), (512, 1024)):
        matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        print(f"{shape[0]} x {shape[1]}: a scale for {', '.join(GROUPS.values())}")
        for levels in (2, 3, 4, 8, 16):
            prices = []
            for group in GROUPS:
                code = BitsCode(levels, group)
                lost = np.square(code.decode(code.encode(matrix), shape) - matrix).sum() / np.square(matrix).sum()
                prices.append(lost * 4.0 ** (8 * code_bytes(code, shape) / matrix.size))
            print(f"  {levels:2d} levels  " + "  ".join(f"{price:.3f}" for price in prices))


if __name__ == "__main__":
    main()
