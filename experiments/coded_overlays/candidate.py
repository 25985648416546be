"""What a method offers: settings, with the bits they take, and experts rebuilt from what would be stored."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from models import Array, Layers
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rebuilt:
    """The experts as a reader gets them. `kept` says of each layer which experts the router may still choose."""

    layers: Layers
    kept: list[NDArray[np.bool_]] | None = None


@dataclass(frozen=True)
class Candidate:
    """One setting of a method. `bits` is bits a weight of all experts, everything counted; `variant` names settings
    that form one curve."""

    variant: str
    setting: str
    bits: float
    rebuild: Callable[[], Rebuilt]


Method = Callable[[Any], Iterator[Candidate]]
"""models.Bench -> candidates."""


def by_role(layers: Layers, change: Callable[[str, Array], Array]) -> Layers:
    """Experts of which each role is changed by itself."""
    return [{role: change(role, matrices) for role, matrices in layer.items()} for layer in layers]


def mean_bits(layers: Layers, bits: Callable[[str, tuple[int, ...]], float]) -> float:
    """Bits a weight over all roles and layers."""
    total = weights = 0.0
    for layer in layers:
        for role, matrices in layer.items():
            total += matrices.size * bits(role, matrices.shape)
            weights += matrices.size
    return total / weights


def hidden_last(role: str, matrices: Array) -> Array:
    """[..., intermediate, hidden] for every role."""
    return np.swapaxes(matrices, -1, -2) if role == "down" else matrices


def nearest(candidates: Iterable[Candidate], budgets: Iterable[float], within: float = 0.08) -> list[list[Candidate]]:
    """For each budget the nearest candidate of every variant that is within a share of it; else the nearest of all."""
    candidates, chosen = list(candidates), []
    for budget in budgets:
        variants: dict[str, Candidate] = {}
        for candidate in candidates:
            best = variants.get(candidate.variant)
            if best is None or abs(candidate.bits - budget) < abs(best.bits - budget):
                variants[candidate.variant] = candidate
        near = [one for one in variants.values() if abs(one.bits / budget - 1) <= within]
        chosen.append(near or [min(variants.values(), key=lambda one: abs(one.bits - budget))])
    return chosen
