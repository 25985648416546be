"""The interface of a code of one matrix: parts to store, made from a matrix and decoded into one."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = TypeVar("Array")

Shape = tuple[int, int]
"""(out, in) of a matrix."""

Parts = Mapping[str, NDArray[Any]]
"""The stored arrays of one coded matrix, by local name."""


@dataclass(frozen=True, slots=True)
class PartLayout:
    """The dtype of a part, as safetensors names it ("U8"), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return WIDTHS[self.dtype] * prod(self.shape)


WIDTHS = {"U8": 1, "U16": 2, "U32": 4, "I32": 4, "I64": 8, "BF16": 2, "F32": 4}  # bytes of a number


class HasLayout(Protocol):
    """What says which parts a matrix has."""

    def layout(self, shape: Shape) -> dict[str, PartLayout]:
        """The parts of a matrix of that shape."""


class Code(HasLayout, Protocol):
    """A way to store a matrix. Its text is what `parse_code` reads: "3bit:128"."""

    def encode(
        self, matrix: NDArray[np.float32], *, unbiased: bool = False, moments: NDArray[np.float32] | None = None
    ) -> dict[str, NDArray[Any]]:
        """The parts of a matrix [out, in], which is not changed; raises ValueError where it is not finite.

        Least squares shrinks what it codes. `unbiased` undoes that: the decoded matrix then has the product with the
        original that the original has with itself. `moments` [in, in], positive definite, are the second moments
        of the inputs, by which errors and products are measured; without them all columns count alike.
        """

    def decode(self, parts: Parts, shape: Shape) -> NDArray[np.float32]:
        """The matrix [out, in] that the parts stand for."""


def code_bytes(code: HasLayout, shape: Shape) -> int:
    """Bytes of a coded matrix of that shape, scales and all else counted."""
    return sum(part.nbytes for part in code.layout(shape).values())


def check_finite(matrix: NDArray[np.float32]) -> float:
    """The greatest magnitude in a matrix, 0 for an empty one; raises ValueError where a number is not finite."""
    if not matrix.size:
        return 0.0
    peak = float(np.maximum(matrix.max(), -matrix.min()))
    if not np.isfinite(peak):
        raise ValueError("the matrix holds NaN or infinity")
    return peak


def inner(parts: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """The parts whose names begin with `prefix` and a dot, without these."""
    return {name.removeprefix(f"{prefix}."): part for name, part in parts.items() if name.startswith(f"{prefix}.")}


def as_shape(matrix: NDArray[Any]) -> Shape:
    """The shape of a matrix."""
    out, inputs = matrix.shape
    return out, inputs
