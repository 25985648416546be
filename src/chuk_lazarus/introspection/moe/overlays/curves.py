"""Rate curves: the energy that each further rank adds, and the bytes that it costs."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import PlainSerializer, PlainValidator, TypeAdapter

from ..jobs.measure import RoleMeasure
from ..numerics.low_rank import BYTES_PER_NUMBER, overlay_bytes
from ..numerics.spectra import mean_rank

_list_of_floats = TypeAdapter(list[float])


def _as_spectrum(value: Any) -> NDArray[np.float64]:
    return np.array(_list_of_floats.validate_python(value), np.float64)


Spectrum = Annotated[NDArray[np.float64], PlainValidator(_as_spectrum), PlainSerializer(lambda array: array.tolist())]
"""An energy spectrum; in JSON it is a list of numbers, which are read back exactly."""


@dataclass(frozen=True, slots=True)
class RateCurve:
    """The rate curve of one projection of one layer.

    `spectrum` is the energy that each further rank adds, largest first, summed over all experts; `cost` is the bytes
    that one rank of all experts takes.
    """

    spectrum: Spectrum
    cost: int


@dataclass(frozen=True, slots=True)
class LayerCurves:
    """The rate curves of one layer by role, with all else that the choice of its ranks needs.

    `natural_ranks` are the mean ranks at the share of the deltas' energy that was asked for; `energy` is that of all
    experts' matrices. Energies are estimated from `sampled` of the `experts`.
    """

    shapes: dict[str, tuple[int, int]]
    natural_ranks: dict[str, int]
    curves: dict[str, RateCurve]
    energy: float
    experts: int
    sampled: int

    def bytes_at(self, ranks: Mapping[str, float]) -> int:
        """Bytes of the layer's overlay at these ranks."""
        return overlay_bytes(self.shapes, ranks, self.experts)

    def error_at(self, ranks: Mapping[str, int]) -> float:
        """The relative Frobenius error of the experts at these ranks, by the spectra."""
        return sqrt(max(0.0, energy_left(self.curves, ranks)) / self.energy) if self.energy else 0.0


def layer_curves(measures: Mapping[str, RoleMeasure], experts: int, energy: float) -> LayerCurves:
    """The curves of a layer, from its measures by role; `energy` is the share that its natural ranks keep."""
    return LayerCurves(
        shapes={role: measure.shape for role, measure in measures.items()},
        natural_ranks={role: round(mean_rank(measure.spectra, energy)) for role, measure in measures.items()},
        curves=rate_curves(measures, experts),
        energy=sum(float(np.trace(measure.gram)) for measure in measures.values()),
        experts=experts,
        sampled=len(next(iter(measures.values())).chosen),
    )


def rate_curves(measures: Mapping[str, RoleMeasure], experts: int) -> dict[str, RateCurve]:
    """The rate curve of each projection of a layer, scaled from the sampled experts to all `experts`."""
    return {
        role: RateCurve(
            np.sum(measure.spectra, axis=0) * (experts / len(measure.chosen)),
            BYTES_PER_NUMBER * experts * sum(measure.shape),
        )
        for role, measure in measures.items()
    }


def energy_left(curves: Mapping[str, RateCurve], ranks: Mapping[str, int]) -> float:
    """The energy that these ranks leave out."""
    return sum(float(curve.spectrum[ranks[role] :].sum()) for role, curve in curves.items())
