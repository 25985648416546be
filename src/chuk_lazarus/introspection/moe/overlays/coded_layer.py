"""The experts of one layer in codes: a coded base, and for each expert the code of its delta from the stored base.

If only some neurons are shared, the base is a bank of neurons. The neurons of an expert that refer to it are deltas;
the others are coded directly.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidRequest
from ..jobs.measure import refuse_not_finite, subtract_base
from ..jobs.resources import Resources
from ..numerics.alignment import Alignment, keep_order, permute
from ..weights.expert_layer import ExpertLayer
from .alignment import align_layer, mean_aligned
from .codes import LayerCodes, RoleCodes
from .codes.bf16 import Bf16Code
from .codes.code import Parts, as_shape
from .codes.low_rank import FactorsCode
from .moments import ExpertMoments, permute_moments

SQUARES = 8  # moments [in, in] that rounding by them takes, their factors in float64 counted twice


class CodedLayer:
    """Codes the experts of a layer whose neurons are in the order that `alignment` says.

    `code_bases` comes first. Then `code` may be called from several threads. Experts without a base are coded without
    bias, and so are deltas where the codes say it. With `moments` errors are measured by those of the experts' inputs;
    the bases are coded without, since deltas make up for their errors.
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
        """How many of the layer's matrices a thread holds while it codes one; with moments, these and their factors."""
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
                    parts[role] = code.encode(mean.astype(np.float32), unbiased=_stands_alone(self.codes[role]))
                    self._bases[role] = code.decode(parts[role], as_shape(mean))
        return parts

    def code(self, expert: int, role: str, matrix: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """The parts of one expert, "delta.*" and "rest.*"; `matrix` is its own, in canonical form, and stays as it is.

        Raises ModelUnreadable where it is not finite, or float32 can't hold the delta.
        """
        codes, permutation = self.codes[role], self.alignment.permutations[expert]
        is_moved, has_base = not self.alignment.is_identity, role in self._bases
        delta = np.ascontiguousarray(permute(role, matrix, permutation)) if is_moved else matrix
        rest = delta[:0]
        if codes.bank:
            delta, rest = codes.bank.split(delta)
        if has_base:
            delta = delta.copy() if np.may_share_memory(delta, matrix) else delta
            subtract_base(self.layer.number, role, delta, self._base_of(expert, role))
        of_delta = of_rest = None
        if self._moments and not isinstance(codes.delta, Bf16Code):
            of_delta = of_rest = permute_moments(role, self._moments.of(role, expert), permutation)
            if codes.bank and codes.bank.axis:
                of_delta, of_rest = (np.ascontiguousarray(each) for each in codes.bank.split_moments(of_delta))
        try:
            coded = codes.delta.encode(delta, unbiased=codes.unbiased or not has_base, moments=of_delta)
            parts = {f"delta.{name}": part for name, part in coded.items()}
            if codes.rest:
                coded = codes.rest.encode(rest, unbiased=True, moments=of_rest)
                parts |= {f"rest.{name}": part for name, part in coded.items()}
        except ValueError:
            refuse_not_finite(self.layer, expert, role)
        return parts

    def decode(self, expert: int, role: str, parts: Parts) -> NDArray[np.float32]:
        """The expert's matrix that the parts stand for, in the expert's own order of neurons."""
        rebuilt = self.codes[role].join(
            parts, self.layer.shape(role), self._base_of(expert, role) if role in self._bases else None
        )
        if self.alignment.is_identity:
            return rebuilt
        return permute(role, rebuilt, np.argsort(self.alignment.permutations[expert]))

    def _base_of(self, expert: int, role: str) -> NDArray[np.float32]:
        """The stored base of an expert's deltas."""
        base, bank = self._bases[role], self.codes[role].bank
        if bank is None or self.alignment.bank is None:
            return base
        return np.asarray(base.take(self.alignment.bank.index[expert], axis=bank.axis))


def _stands_alone(codes: RoleCodes) -> bool:
    """Whether the neurons of a bank are those of the experts, or nearly: there are no deltas, or only factors."""
    return codes.bank is not None and isinstance(codes.delta, FactorsCode)


def find_alignment(layer: ExpertLayer, codes: LayerCodes, resources: Resources) -> Alignment:
    """The order of the neurons in which the layer is coded; without any base, experts stay as they are.

    Raises InvalidRequest where the codes are for another bank than the one that is found.
    """
    if not any(role.base for role in codes.values()):
        return keep_order(layer.count, layer.sizes["I"])
    banks = {(role.bank.size, role.bank.matched) for role in codes.values() if role.bank}
    alignment = align_layer(layer, resources, with_bank=bool(banks))
    found = {(alignment.bank.size, alignment.bank.index.shape[1])} if alignment.bank else set()
    if banks != found:
        raise InvalidRequest(
            f"layer {layer.number}: the codes do not fit the bank of its neurons", "choose the codes again"
        )
    return alignment
