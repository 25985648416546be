"""The experts of one layer in codes: a coded base, and for each expert the code of its delta from the stored base."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..jobs.measure import refuse_not_finite, subtract_base
from ..jobs.resources import Resources
from ..numerics.alignment import Alignment, keep_order, permute
from ..weights.expert_layer import ExpertLayer
from .alignment import align_layer, mean_aligned
from .codes import LayerCodes
from .codes.bf16 import Bf16Code
from .codes.code import Parts
from .moments import ExpertMoments, permute_moments

SQUARES = 8  # moments [in, in] that rounding by them takes, their factors in float64 counted twice


class CodedLayer:
    """Codes the experts of a layer whose neurons are in the order that `alignment` says.

    `code_bases` comes first. Then `code` may be called from several threads. Experts without a base are coded without
    bias, deltas for the least error: what shrinks a small delta hardly shrinks the expert. With `moments` errors are
    measured by those of the experts' inputs; the bases are coded without, since deltas make up for their errors.
    """

    def __init__(
        self, layer: ExpertLayer, codes: LayerCodes, alignment: Alignment, moments: ExpertMoments | None = None
    ) -> None:
        self.layer = layer
        self.codes = codes
        self.alignment = alignment
        self._moments = moments
        self._bases: dict[str, NDArray[np.float32]] = {}

    @property
    def matrices_held(self) -> int:
        """How many of the layer's matrices a thread holds while it codes one; with moments, those and their factors."""
        hidden, intermediate = self.layer.sizes["H"], self.layer.sizes["I"]
        sides = max(hidden, intermediate), min(hidden, intermediate)
        return 2 + (-(-SQUARES * sides[0] // sides[1]) if self._moments else 0)

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

    def code(self, expert: int, role: str, matrix: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """The parts of one expert's delta; `matrix` is the expert's own, in canonical form, and stays as it is.

        Raises ModelUnreadable where it is not finite, or float32 can't hold the delta.
        """
        permutation = self.alignment.permutations[expert]
        is_moved, has_base = not self.alignment.is_identity, role in self._bases
        delta = np.ascontiguousarray(permute(role, matrix, permutation)) if is_moved else matrix
        if has_base:
            delta = delta if is_moved else delta.copy()
            subtract_base(self.layer.number, role, delta, self._bases[role])
        moments = None
        if self._moments and not isinstance(self.codes[role].delta, Bf16Code):
            moments = permute_moments(role, self._moments.of(role, expert), permutation)
        try:
            return self.codes[role].delta.encode(delta, unbiased=not has_base, moments=moments)
        except ValueError:
            refuse_not_finite(self.layer, expert, role)

    def decode(self, expert: int, role: str, parts: Parts) -> NDArray[np.float32]:
        """The expert's matrix that the parts stand for, in the expert's own order of neurons."""
        rebuilt = self.codes[role].delta.decode(parts, self.layer.shape(role))
        if role in self._bases:
            rebuilt += self._bases[role]
        if self.alignment.is_identity:
            return rebuilt
        return permute(role, rebuilt, np.argsort(self.alignment.permutations[expert]))


def find_alignment(layer: ExpertLayer, codes: LayerCodes, resources: Resources) -> Alignment:
    """The order of the neurons in which the layer is coded; without any base, experts stay as they are."""
    if any(role.base for role in codes.values()):
        return align_layer(layer, resources)
    return keep_order(layer.count, layer.sizes["I"])
