"""The order of gate and up rows in one stored tensor, inferred from the weights.

Training keeps the norms of a neuron's up row and down column similar: the loss depends only on a product of the two, so
both get the same gradients in proportion. Rows that are paired with the wrong neuron's column show no such relation.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .layouts import Order

SAMPLE = 4  # the number of experts to look at
CLEAR = 4.0  # of standard deviations: by chance one in 30,000 untrained layers goes so far
MARGIN = 2.0  # how many times the other order's deviations these must be


@dataclass(frozen=True, slots=True)
class OrderEvidence:
    """How strongly the norms of up rows and down columns correlate in each order, in standard deviations.

    The mean over experts of Fisher's z of Spearman's rank correlation, each times the square root of the number of
    neurons less 3 (Fieller, Hartley and Pearson, Biometrika 44, 1957). `first` is the same for the rows that are read
    as gates, in the order with more evidence.
    """

    halves: float
    turns: float
    first: float

    @property
    def order(self) -> Order | None:
        """The order that the norms show; None if they show neither, or up before gate."""
        low, high = sorted((self.halves, self.turns))
        if not high >= max(CLEAR, MARGIN * abs(low), self.first - CLEAR):  # also if one is NaN
            return None
        return "halves" if self.halves > self.turns else "turns"

    def describe(self) -> str:
        """For instance "norms of ups and downs agree by 12.5 standard deviations in turns, and by 0.3 in halves"."""
        high, low = ("halves", self.halves), ("turns", self.turns)
        if low[1] > high[1]:
            high, low = low, high
        return (
            f"norms of ups and downs agree by {high[1]:.1f} standard deviations in {high[0]}, and by {low[1]:.1f} in "
            f"{low[0]}"
        )


def weigh_orders(experts: Iterable[Mapping[str, NDArray[np.float32]]], stored: Order) -> OrderEvidence:
    """The evidence of some experts' gate, up and down matrices that were read in the order `stored`."""
    scores = []
    for matrices in experts:
        down = np.linalg.norm(matrices["down"], axis=0)
        pair = [np.linalg.norm(matrices[role], axis=1) for role in ("gate", "up")]
        rows = np.concatenate(pair) if stored == "halves" else np.stack(pair, axis=1).ravel()
        halves, turns = rows.reshape(2, -1), rows.reshape(-1, 2).T
        scores.append([[_relate(down, part) for part in parts] for parts in (halves, turns)])
    (halves_first, halves_up), (turns_first, turns_up) = np.mean(scores, axis=0)
    first = halves_first if halves_up > turns_up else turns_first
    return OrderEvidence(float(halves_up), float(turns_up), float(first))


def _relate(these: NDArray[np.float32], those: NDArray[np.float32]) -> float:
    """Fisher's z of the rank correlation of two vectors, in standard deviations; 0 for fewer than 8 numbers."""
    if len(these) < 8 or not (np.isfinite(these).all() and np.isfinite(those).all()):
        return 0.0
    ranks = np.argsort(np.argsort(np.stack([these, those]))) - (len(these) - 1) / 2
    correlation = float(ranks[0] @ ranks[1] / (ranks[0] @ ranks[0]))
    return float(np.arctanh(np.clip(correlation, -1 + 1e-9, 1 - 1e-9)) * np.sqrt(len(these) - 3))
