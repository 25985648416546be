"""Numbers kept as bfloat16, two bytes each."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .code import PartLayout, Parts, Shape, check_finite


@dataclass(frozen=True, slots=True)
class Bf16Code:
    """A matrix as it is, rounded to bfloat16: one part, `values` [out, in]."""

    def __str__(self) -> str:
        return "bf16"

    def layout(self, shape: Shape) -> dict[str, PartLayout]:
        return {"values": PartLayout("BF16", shape)}

    def encode(
        self, matrix: NDArray[np.float32], *, unbiased: bool = False, moments: NDArray[np.float32] | None = None
    ) -> dict[str, NDArray[Any]]:
        check_finite(matrix)
        return {"values": matrix.astype(ml_dtypes.bfloat16)}

    def decode(self, parts: Parts, shape: Shape) -> NDArray[np.float32]:
        return parts["values"].astype(np.float32)
