"""A model opened for a job: its experts, the layers that are worked on, and what the job may take."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import NotMoE, printable
from ..reports import Cost
from ..weights.expert_layer import ExpertLayer
from ..weights.experts import Experts
from .resources import Resources


def evenly_spaced(count: int, wanted: int | None) -> tuple[int, ...]:
    """`wanted` evenly spaced numbers out of range(count), all of them for None."""
    if wanted is None or wanted >= count:
        return tuple(range(count))
    return tuple(int(i) for i in np.linspace(0, count - 1, wanted).round())


class OpenedModel:
    """A model that a job works on.

    `layers` are the chosen ones (see `Experts.choose_layers`) or, if none are chosen, `samples` evenly spaced ones.
    `experts` are passed if they are open already. `purpose` ends the message of the NotMoE that is raised for a layer
    with a single expert. Limits of memory and threads are read here, once for the whole job.
    """

    def __init__(
        self,
        name: str,
        layer: int | None,
        layers: Sequence[int] | str | None,
        *,
        purpose: str,
        samples: int | None = None,
        experts: Experts | None = None,
    ) -> None:
        self._started = time.perf_counter()
        self.name = name
        self.resources = Resources.current()
        self.experts = Experts.open(name) if experts is None else experts
        if samples is not None and layer is None and layers is None:
            layers = [self.experts.layers[place] for place in evenly_spaced(len(self.experts.layers), samples)]
        self.layers: tuple[ExpertLayer, ...] = tuple(
            self.experts.layer(number) for number in self.experts.choose_layers(layer, layers)
        )
        for chosen in self.layers:
            if chosen.count < 2:
                raise NotMoE(f"layer {chosen.number} has a single expert: there is nothing to {purpose}")

    def identity(self) -> dict[str, Any]:
        """The fields of `reports.Identity`."""
        counts = {layer.count for layer in self.layers}
        return {
            "model": printable(self.name),
            "revision": self.experts.checkpoint.repository.revision,
            "family": self.experts.family,
            "model_type": self.experts.model_type,
            "storage": ", ".join(dict.fromkeys(layer.storage for layer in self.layers)),
            "experts": self.layers[0].count,
            "experts_range": (min(counts), max(counts)) if len(counts) > 1 else None,
        }

    @property
    def parameters(self) -> int:
        """Weights of all routed experts, where layers that are not chosen are like the chosen ones."""
        return sum(layer.parameters for layer in self.layers) * len(self.experts.layers) // len(self.layers)

    def cost(self) -> Cost:
        """What the job has taken so far."""
        checkpoint = self.experts.checkpoint
        return Cost(
            bytes_read=checkpoint.bytes_read,
            bytes_fetched=checkpoint.repository.bytes_fetched,
            seconds=time.perf_counter() - self._started,
        )
