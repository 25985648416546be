"""The packed integers of compressed-tensors, for checkpoints that transformers and vLLM load: a scale for each group.

A weight is scale * integer, of 2 to 8 bits (format `pack-quantized`, symmetric, as `weights/codecs/pack_quantized.py`
reads it). llm-compressor takes the greatest magnitude of a group for that of its integers. Here integers and scale are
fitted to each other in turns, each by least squares (Lloyd, 1982): of Gaussian weights 4 bits in groups of 32 leave
0.0080 of the energy, where the greatest magnitude leaves 0.0090.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ...numerics.gram import total_energy
from .code import PartLayout, Parts, Shape, as_shape, check_finite, code_bytes
from .packing import pack_levels, unpack_levels

PACKED_BITS = (2, 3, 4, 5, 6, 8)
PACKED_GROUPS = (32, 64, 128)
BLOCK = 1 << 16  # weights that are coded at a time: what a core's cache holds
SPANS = {2: 0.85, 3: 0.95}  # the share of a group's greatest magnitude that its integers begin with, by bits
ROUNDS = 3  # how often integers and scale are fitted
BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, slots=True)
class PackedCode:
    """Integers with a scale for each group: parts `weight_packed` int32 [out, words], a dense stream of the integers
    plus 2^(bits - 1), bfloat16 `weight_scale` [out, groups], and int64 `weight_shape`, [out, in].

    Raises ValueError for bits or a group that is none of those above.
    """

    bits: int
    group: int

    def __post_init__(self) -> None:
        if self.bits not in PACKED_BITS or self.group not in PACKED_GROUPS:
            raise ValueError(f"there is no code of {self.bits} bits in groups of {self.group}")

    def __str__(self) -> str:
        return f"int{self.bits}:{self.group}"

    def layout(self, shape: Shape) -> dict[str, PartLayout]:
        """The parts of a matrix of that shape; raises ValueError where a row does not have whole groups."""
        rows, columns = shape
        if columns % self.group:
            raise ValueError(f"rows of {columns} numbers do not divide into groups of {self.group}")
        return {
            "weight_packed": PartLayout("I32", (rows, columns * self.bits // 32)),
            "weight_scale": PartLayout("BF16", (rows, columns // self.group)),
            "weight_shape": PartLayout("I64", (2,)),
        }

    def nbytes(self, shape: Shape) -> int:
        """Bytes of a matrix of that shape, scales counted; raises as `layout`."""
        return code_bytes(self, shape)

    def encode(self, matrix: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """The parts of a matrix [out, in]; raises ValueError where it is not finite."""
        check_finite(matrix)
        scales = np.empty(self.layout(as_shape(matrix))["weight_scale"].shape, BF16)
        levels = np.empty(matrix.shape, np.uint8)
        grouped, coded, flat = matrix.reshape(-1, self.group), levels.reshape(-1, self.group), scales.reshape(-1)
        step = BLOCK // self.group
        for start in range(0, len(grouped), step):
            block = slice(start, start + step)
            flat[block] = self._fit(grouped[block])
            integers = self._round(grouped[block], flat[block].astype(np.float32))
            coded[block] = integers + np.float32(self._half)
        packed = np.ascontiguousarray(pack_levels(levels, 1 << self.bits)).view("<i4")
        return {"weight_packed": packed, "weight_scale": scales, "weight_shape": np.array(matrix.shape, "<i8")}

    def decode(self, parts: Parts, shape: Shape) -> NDArray[np.float32]:
        """The matrix [out, in] that the parts stand for."""
        data = np.ascontiguousarray(parts["weight_packed"]).view(np.uint8)
        values = unpack_levels(data, 1 << self.bits, shape[1]).astype(np.float32).reshape(-1, self.group)
        values -= np.float32(self._half)
        values *= parts["weight_scale"].astype(np.float32).reshape(-1, 1)
        return values.reshape(shape)

    def lost(self, rows: NDArray[np.float32]) -> float:
        """The squared error of rows [rows, columns]."""
        return total_energy(rows - self.decode(self.encode(rows), as_shape(rows)))

    @property
    def _half(self) -> int:
        return 1 << (self.bits - 1)

    def _fit(self, block: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scale of each row of the block."""
        peaks = np.maximum(block.max(axis=1), -block.min(axis=1))
        scale: NDArray[np.float32] = peaks * np.float32(SPANS.get(self.bits, 1.0) / self._half)
        for _ in range(ROUNDS):
            integers = self._round(block, scale)
            energy = np.vecdot(integers, integers)
            # a group of zeros keeps the scale that it has
            scale = np.where(energy > 0, np.vecdot(block, integers) / np.where(energy > 0, energy, 1), scale)
        return scale

    def _round(self, block: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """The nearest integers of each row."""
        is_scale = scale >= np.finfo(np.float32).tiny  # the inverse of a smaller one is infinite
        inverse = np.where(is_scale, 1 / np.where(is_scale, scale, 1), 0)
        integers: NDArray[np.float32] = block * inverse[:, None]
        np.rint(integers, out=integers)
        np.clip(integers, -self._half, self._half - 1, out=integers)
        return integers


def packed_widths(shape: Shape, bits: tuple[int, ...] = PACKED_BITS) -> list[PackedCode]:
    """The codes that fit a matrix of that shape."""
    groups = [group for group in PACKED_GROUPS if shape[1] % group == 0]
    return [PackedCode(each, group) for group in groups for each in bits]


def parse_packed(text: str) -> PackedCode:
    """The code of that text, such as "int4:64"; raises ValueError for any other text."""
    bits, separator, group = text.removeprefix("int").partition(":")
    if not (text.startswith("int") and separator and bits.isdecimal() and group.isdecimal()):
        raise ValueError(f"not a width: {text}")
    return PackedCode(int(bits), int(group))
