"""MLX's affine quantisation, for checkpoints that mlx-lm itself loads: a scale and a bias for each group of a row.

A weight is scale * level + bias, of 2 to 8 bits (`mlx.core.quantize`). MLX takes the span of a group for that of its
levels. Here the span is narrowed, and levels and the line through them are fitted to each other in turns, each by least
squares (Lloyd, 1982): of Gaussian weights 2 bits in groups of 64 leave 0.107 of the energy, where MLX leaves 0.156.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ...numerics.gram import total_energy
from .code import PartLayout, Parts, Shape, as_shape, check_finite, code_bytes
from .packing import pack_levels, unpack_levels

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
BLOCK = 1 << 16  # weights that are coded at a time: what a core's cache holds
# the share of a group's span that its levels begin with, and how often these and their line are fitted, by bits
SPANS = {2: 0.75, 3: 0.85, 4: 0.95}
ROUNDS = {2: 3, 3: 2, 4: 2, 5: 2}
BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, slots=True)
class AffineCode:
    """Levels with a line for each group: parts `weight` uint32 [out, words], a dense stream of `bits`, and bfloat16
    `scales` and `biases` [out, groups].

    Raises ValueError for bits or a group that MLX has not.
    """

    bits: int
    group: int

    def __post_init__(self) -> None:
        if self.bits not in AFFINE_BITS or self.group not in AFFINE_GROUPS:
            raise ValueError(f"there is no code of {self.bits} bits in groups of {self.group}")

    def __str__(self) -> str:
        return f"{self.bits}bit:{self.group}"

    def layout(self, shape: Shape) -> dict[str, PartLayout]:
        """The parts of a matrix of that shape; raises ValueError where a row does not have whole groups."""
        rows, columns = shape
        if columns % self.group:
            raise ValueError(f"rows of {columns} numbers do not divide into groups of {self.group}")
        groups = PartLayout("BF16", (rows, columns // self.group))
        return {"weight": PartLayout("U32", (rows, columns * self.bits // 32)), "scales": groups, "biases": groups}

    def encode(self, matrix: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """The parts of a matrix [out, in]; raises ValueError where it is not finite."""
        check_finite(matrix)
        layout = self.layout((len(matrix), matrix.shape[1]))
        lines = [np.empty(layout["scales"].shape, BF16) for _ in range(2)]
        levels = np.empty(matrix.shape, np.uint8)
        grouped, coded = matrix.reshape(-1, self.group), levels.reshape(-1, self.group)
        scales, biases = (line.reshape(-1) for line in lines)
        for rows in _blocks(len(grouped), self.group):
            block = grouped[rows]
            scale, bias = self._fit(block)
            scales[rows], biases[rows] = scale, bias
            coded[rows] = self._round(block, scales[rows].astype(np.float32), biases[rows].astype(np.float32))
        packed = np.ascontiguousarray(pack_levels(levels, 1 << self.bits)).view("<u4")
        return {"weight": packed, "scales": lines[0], "biases": lines[1]}

    def decode(self, parts: Parts, shape: Shape) -> NDArray[np.float32]:
        """The matrix [out, in] that the parts stand for."""
        data = np.ascontiguousarray(parts["weight"]).view(np.uint8)
        values = unpack_levels(data, 1 << self.bits, shape[1]).astype(np.float32).reshape(-1, self.group)
        values *= parts["scales"].astype(np.float32).reshape(-1, 1)
        values += parts["biases"].astype(np.float32).reshape(-1, 1)
        return values.reshape(shape)

    def nbytes(self, shape: Shape) -> int:
        """Bytes of a matrix of that shape, scales and biases counted; raises as `layout`."""
        return code_bytes(self, shape)

    def lost(self, rows: NDArray[np.float32]) -> float:
        """The squared error of rows [rows, columns]."""
        return total_energy(rows - self.decode(self.encode(rows), as_shape(rows)))

    def _fit(self, block: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The scale and the bias of each row of the block."""
        count, top = np.float32(self.group), np.float32((1 << self.bits) - 1)
        low, high, total = block.min(axis=1), block.max(axis=1), block.sum(axis=1)
        scale = (high - low) * (np.float32(SPANS.get(self.bits, 1.0)) / top)
        bias = (high + low) / 2 - scale * (top / 2)
        for _ in range(ROUNDS.get(self.bits, 1)):
            levels = self._round(block, scale, bias)
            sums = levels.sum(axis=1)
            spread = np.vecdot(levels, levels) - sums * sums / count
            together = np.vecdot(block, levels) - total * sums / count
            # a group of equal numbers has no line: it keeps the scale that it has
            scale = np.where(spread > 0, together / np.where(spread > 0, spread, 1), scale)
            bias = (total - scale * sums) / count
        return scale, bias

    def _round(
        self, block: NDArray[np.float32], scale: NDArray[np.float32], bias: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """The nearest levels of each row."""
        inverse = np.where(scale != 0, 1 / np.where(scale != 0, scale, 1), 0)
        levels: NDArray[np.float32] = block - bias[:, None]
        levels *= inverse[:, None]
        np.rint(levels, out=levels)
        np.clip(levels, 0, (1 << self.bits) - 1, out=levels)
        return levels


def affine_widths(shape: Shape) -> list[AffineCode]:
    """The codes that fit a matrix of that shape."""
    groups = [group for group in AFFINE_GROUPS if shape[1] % group == 0]
    return [AffineCode(bits, group) for group in groups for bits in AFFINE_BITS]


def parse_affine(text: str) -> AffineCode:
    """The code of that text, such as "4bit:64"; raises ValueError for any other text."""
    bits, separator, group = text.partition("bit:")
    if not (separator and bits.isdecimal() and group.isdecimal()):
        raise ValueError(f"not a width: {text}")
    return AffineCode(int(bits), int(group))


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, BLOCK // columns)
    for start in range(0, rows, step):
        yield slice(start, start + step)
