"""The experts of one layer in codes: a coded base, and for each expert the code of its delta from the stored base."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..jobs.measure import refuse_not_finite, subtract_base
from ..numerics.alignment import Alignment, permute
from ..weights.expert_layer import ExpertLayer
from .alignment import mean_aligned
from .codes import MatrixCode
from .codes.code import Parts, code_bytes


@dataclass(frozen=True, slots=True)
class RoleCodes:
    """How a projection of a layer is kept: the code of its base, and that of each expert's delta.

    Without a base, `delta` is the code of the experts themselves.
    """

    base: MatrixCode | None
    delta: MatrixCode

    def base_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the base, 0 where there is none."""
        return code_bytes(self.base, shape) if self.base else 0

    def nbytes(self, shape: tuple[int, int], experts: int) -> int:
        """Bytes of base and deltas of a projection whose matrices have that shape (out, in)."""
        return self.base_bytes(shape) + experts * code_bytes(self.delta, shape)


LayerCodes = Mapping[str, RoleCodes]
"""Role -> codes, for one layer."""


class CodedLayer:
    """Codes the experts of a layer whose neurons are in the order that `alignment` says.

    `code_bases` comes first. Then `code` may be called from several threads. Deltas, and experts without a base, are
    coded without bias.
    """

    def __init__(self, layer: ExpertLayer, codes: LayerCodes, alignment: Alignment) -> None:
        self.layer = layer
        self.codes = codes
        self.alignment = alignment
        self._bases: dict[str, NDArray[np.float32]] = {}

    def code_bases(self, pool: ThreadPoolExecutor) -> dict[str, dict[str, NDArray[Any]]]:
        """The parts of the bases, by role; reads all experts of the roles that have one."""
        parts: dict[str, dict[str, NDArray[Any]]] = {}
        for tensor in self.layer.tensors:
            if not any(self.codes[role].base for role in tensor.spec.roles):
                continue
            for role, mean in mean_aligned(tensor, self.alignment, pool).items():
                if code := self.codes[role].base:
                    parts[role] = code.encode(mean.astype(np.float32))
                    self._bases[role] = code.decode(parts[role], self.layer.shape(role))
        return parts

    def code(
        self, expert: int, matrices: Mapping[str, NDArray[np.float32]]
    ) -> dict[str, tuple[dict[str, NDArray[Any]], NDArray[np.float32]]]:
        """By role the parts of one expert's delta, and the expert that they stand for, in the order of its neurons.

        `matrices` are the expert's own, in canonical form. Raises ModelUnreadable where they are not finite, or float32
        can't hold a delta.
        """
        permutation = self.alignment.permutations[expert]
        back = np.argsort(permutation)
        result = {}
        for role, matrix in matrices.items():
            code, shape = self.codes[role].delta, self.layer.shape(role)
            if self.alignment.is_identity:
                delta = matrix.copy() if role in self._bases else matrix
            else:
                delta = np.ascontiguousarray(permute(role, matrix, permutation))
            if role in self._bases:
                subtract_base(self.layer.number, role, delta, self._bases[role])
            try:
                parts = code.encode(delta, unbiased=True)
            except ValueError:
                refuse_not_finite(self.layer, expert, role)
            rebuilt = self._rebuild(role, parts, shape)
            result[role] = parts, rebuilt if self.alignment.is_identity else permute(role, rebuilt, back)
        return result

    def _rebuild(self, role: str, parts: Parts, shape: tuple[int, int]) -> NDArray[np.float32]:
        rebuilt = self.codes[role].delta.decode(parts, shape)
        if role in self._bases:
            rebuilt += self._bases[role]
        return rebuilt
