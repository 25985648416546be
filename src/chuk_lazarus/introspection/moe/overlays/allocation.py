"""Which rank each projection of each layer gets."""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import TypedDict, TypeVar

import numpy as np

from ..errors import InvalidRequest
from ..numerics.low_rank import original_bytes
from .checkpoint.format import Ranks
from .curves import LayerCurves, RateCurve

Key = TypeVar("Key")


def allocate(curves: Mapping[Key, RateCurve], *, budget: float = np.inf, energy_left: float = 0.0) -> dict[Key, int]:
    """The ranks that leave out the least energy within `budget` bytes, or that leave out `energy_left` in the fewest
    bytes.

    Each further rank goes to the curve where it adds the most energy per byte. As spectra only fall, this is optimal if
    all costs are equal, as they are for gate, up and down of layers of the same size.
    """
    ranks = dict.fromkeys(curves, 0)
    left_out = sum(float(curve.spectrum.sum()) for curve in curves.values())
    order = list(curves)  # ties go to the first curve
    queue = [(-curves[key].spectrum[0] / curves[key].cost, place) for place, key in enumerate(order)]
    heapq.heapify(queue)
    while queue and left_out > energy_left:
        _, place = heapq.heappop(queue)
        key = order[place]
        curve, rank = curves[key], ranks[key]
        if curve.cost > budget or curve.spectrum[rank] <= 0:
            continue  # a rank of another curve may cost less, and still fit
        budget -= curve.cost
        left_out -= float(curve.spectrum[rank])
        ranks[key] = rank + 1
        if rank + 1 < len(curve.spectrum):
            heapq.heappush(queue, (-curve.spectrum[rank + 1] / curve.cost, place))
    return ranks


class RankOptions(TypedDict, total=False):
    """How the ranks of an overlay are chosen, as options of the services.

    `ranks` gives them by role. Otherwise they are allocated over projections and layers to meet `max_error` (relative
    Frobenius error of the experts) or `target_ratio` (bytes before over bytes after). Without either, each is the mean
    rank at the share `energy` (0.95) of the deltas' energy.
    """

    ranks: Mapping[str, int] | None
    energy: float
    max_error: float | None
    target_ratio: float | None


USUAL_ENERGY = 0.95  # of the deltas, that ranks keep by default


@dataclass(frozen=True, slots=True)
class RankRule:
    """How ranks are chosen: by `max_error`, by `target_ratio`, or as the mean rank at a share of the deltas' energy.

    That share is `energy`, and chooses the ranks of the roles that are not `given`. Raises InvalidRequest for numbers
    out of range, and where more than one of `max_error`, `target_ratio` and `given` is there.
    """

    given: Mapping[str, int]
    energy: float = USUAL_ENERGY
    max_error: float | None = None
    target_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.max_error is not None and self.target_ratio is not None:
            raise InvalidRequest("both a maximum error and a ratio are given", "give one of the two")
        if self.given and (self.max_error is not None or self.target_ratio is not None):
            raise InvalidRequest("ranks are given together with a maximum error or a ratio", "give one of the two")
        if not 0 < self.energy <= 1:
            raise InvalidRequest(f"the energy to keep is {self.energy:g}", "give a share above 0 and at most 1")
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise InvalidRequest(f"the maximum error is {self.max_error:g}", "give a share between 0 and 1")
        if self.target_ratio is not None and not 0 < self.target_ratio < inf:
            raise InvalidRequest(f"the ratio is {self.target_ratio:g}", "give a number above 0, such as 4")

    @property
    def is_usual(self) -> bool:
        """Whether everything is the default: no ranks, error, size or share of the energy was given."""
        return self == RankRule({})

    def __str__(self) -> str:
        if self.max_error is not None:
            return f"fewest bytes with a relative weight error of at most {self.max_error:g}"
        if self.target_ratio is not None:
            return f"smallest weight error at a ratio of {self.target_ratio:g}"
        given = ", ".join(f"{role} {rank}" for role, rank in self.given.items())
        rest = "" if len(self.given) == 3 else f"mean rank at {100 * self.energy:g} % of the delta energy"
        return " else ".join(part for part in (f"given: {given}" if given else "", rest) if part)

    def choose(self, layers: Mapping[int, LayerCurves]) -> dict[int, Ranks]:
        """The ranks of every layer.

        Raises InvalidRequest where a given rank is greater than a matrix can have, or the ratio is out of reach.
        """
        if self.max_error is not None or self.target_ratio is not None:
            return self._allocate(layers)
        chosen = {}
        for number, layer in layers.items():
            chosen[number] = {role: self.given.get(role, natural) for role, natural in layer.natural_ranks.items()}
            check_ranks(number, chosen[number], layer.shapes)
        return chosen

    def _allocate(self, layers: Mapping[int, LayerCurves]) -> dict[int, Ranks]:
        """Ranks allocated over all layers and projections, to meet the error or the ratio."""
        curves = {(number, role): curve for number, layer in layers.items() for role, curve in layer.curves.items()}
        if self.max_error is not None:
            energy = sum(layer.energy for layer in layers.values())
            ranks = allocate(curves, energy_left=self.max_error**2 * energy)
        else:
            assert self.target_ratio is not None
            original = sum(original_bytes(layer.shapes, layer.experts) for layer in layers.values())
            base = sum(layer.bytes_at(dict.fromkeys(layer.shapes, 0)) for layer in layers.values())
            budget = original / self.target_ratio - base
            if budget < 0:
                raise InvalidRequest(
                    f"a ratio of {self.target_ratio:g} is out of reach", f"the base alone gives {original / base:.1f}"
                )
            ranks = allocate(curves, budget=budget)
        return {number: {role: ranks[number, role] for role in layer.shapes} for number, layer in layers.items()}


def rank_rule(
    *,
    ranks: Mapping[str, int] | None = None,
    energy: float = 0.95,
    max_error: float | None = None,
    target_ratio: float | None = None,
) -> RankRule:
    """The rule that `RankOptions` describe; raises InvalidRequest for options that contradict each other."""
    return RankRule(ranks or {}, energy, max_error, target_ratio)


def check_ranks(number: int, ranks: Ranks, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise InvalidRequest for a rank that the matrices of layer `number`, of these shapes, can't have."""
    for role, rank in ranks.items():
        greatest = min(shapes[role])
        if not 0 <= rank <= greatest:
            raise InvalidRequest(f"layer {number}: {role} can't have rank {rank}", f"give 0 to {greatest}")
