"""The types of llama.cpp in which `llama-quantize` stores matrices: their bytes and errors.

The gguf package itself rounds to the types with blocks of 32, but not to those with blocks of 256 (K-quants and
i-quants) or to IQ4_NL. The errors of these are estimated: those of our affine code with as many bits in groups of 32,
times a factor that was measured with ggml's own quantiser (experiments/ggml_types); the estimates are within a few per
cent.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..numerics.gram import total_energy
from .codes.affine import AffineCode
from .codes.code import Shape

STAND_IN_GROUP = 32
# type -> the bits of the affine code that stands in for it, and the type's squared error relative to that code's
STAND_INS = {
    "Q2_K": (2, 0.94),
    "Q3_K": (3, 0.97),
    "IQ4_XS": (4, 1.06),
    "IQ4_NL": (4, 1.07),
    "Q4_K": (4, 0.94),
    "Q5_K": (5, 1.02),
    "Q6_K": (6, 1.0),
}
# those that llama-quantize makes without an importance matrix; legacy types only where blocks of 256 do not fit
LARGE_BLOCKS = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
SMALL_BLOCKS = ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A type, by the name that the gguf package has for it: "Q4_K"."""

    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def block(self) -> tuple[int, int]:
        """The weights in a block, and its bytes."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        return GGML_QUANT_SIZES[GGMLQuantizationType[self.name]]

    def nbytes(self, shape: Shape) -> int:
        """Bytes of a matrix [out, in] of that shape; raises ValueError where a row does not have whole blocks."""
        (rows, columns), (weights, size) = shape, self.block
        if columns % weights:
            raise ValueError(f"rows of {columns} numbers do not divide into blocks of {weights}")
        return rows * columns // weights * size

    def lost(self, rows: NDArray[np.float32]) -> float:
        """The squared error of rows [rows, columns], estimated for the types in STAND_INS."""
        if self.name in STAND_INS:
            bits, factor = STAND_INS[self.name]
            return factor * AffineCode(bits, STAND_IN_GROUP).lost(rows)
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType[self.name]
        return total_energy(rows - quants.dequantize(quants.quantize(rows, kind), kind))


def ggml_types(shape: Shape) -> list[GgmlType]:
    """The types that fit a matrix of that shape."""
    for names in (LARGE_BLOCKS, SMALL_BLOCKS):
        types = [GgmlType(name) for name in names]
        if all(shape[1] % each.block[0] == 0 for each in types):
            return types
    return []


def expert_pattern(layers: Sequence[int], roles: Collection[str]) -> str:
    """A regular expression that is found in the names of the experts' tensors in these layers, and in no others.

    Gates and ups may also lie in one tensor.
    """
    from gguf.constants import MODEL_TENSOR, TENSOR_NAMES

    tensors = {
        ("gate",): MODEL_TENSOR.FFN_GATE_EXP,
        ("up",): MODEL_TENSOR.FFN_UP_EXP,
        ("down",): MODEL_TENSOR.FFN_DOWN_EXP,
        ("gate", "up"): MODEL_TENSOR.FFN_GATE_UP_EXP,
    }
    names = [TENSOR_NAMES[tensor] for own, tensor in tensors.items() if set(own) <= set(roles)]
    leaves = _choice([name.removeprefix("blk.{bid}.") for name in names])
    return rf"^blk\.{_choice(list(map(str, layers)))}\.{leaves}\.weight$"


def _choice(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"({'|'.join(texts)})"
