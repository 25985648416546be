"""What a low-rank overlay competes with at the same bytes: plain quantisation, and a plain SVD per expert."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import overload

import numpy as np
from numpy.typing import NDArray

from ..jobs.measure import RoleMeasure, expert_counter
from ..jobs.resources import Resources
from ..numerics.gram import total_energy
from ..numerics.low_rank import BYTES_PER_NUMBER
from ..numerics.spectra import energy_spectrum
from ..progress import Progress
from ..reports import SameBytes
from ..weights.expert_layer import ExpertLayer
from .allocation import allocate
from .curves import RateCurve, energy_left, rate_curves
from .quantisation import quantised_bytes, round_to_bits

BITS = (8, 4, 3)
LADDER = (1.5, 2.0, 2.5, 3.0, 4.0, 8.0)  # bits for each weight of the experts, everything counted


@dataclass(frozen=True, slots=True)
class Alternative:
    """Relative weight errors of one layer's experts at `bytes`: under plain quantisation to `bits`, as an overlay, as
    SVDs.

    The overlay's error is None if even its base does not fit.
    """

    bits: int
    bytes: int
    quantisation: float
    overlay: float | None
    svd: float


@dataclass(frozen=True, slots=True)
class Factored:
    """Relative weight errors of one layer's experts at `bits` bits per weight: as an overlay (None if even its base
    does not fit) and as SVDs, both in bf16."""

    bits: float
    overlay: float | None
    svd: float


def compare_alternatives(
    layer: ExpertLayer, measures: Mapping[str, RoleMeasure], resources: Resources, progress: Progress
) -> tuple[tuple[Alternative, ...], tuple[Factored, ...]]:
    """The weight errors of plain quantisation, overlay and SVD at the bytes that 8, 4 and 3 bits per weight take with
    their scales; and those of overlay and SVD at each size of the LADDER.

    They are estimated from the experts that `measures` sampled, whose matrices are read again.
    """
    chosen = next(iter(measures.values())).chosen
    done = expert_counter(progress, f"alternatives for layer {layer.number}", layer, len(chosen))

    def probe(expert: int) -> tuple[dict[str, NDArray[np.float64]], dict[int, float], float]:
        """The expert's spectra by role, the energy that quantisation loses by bits, and its whole energy."""
        matrices = layer.matrices(expert)
        lost = {
            bits: sum(total_energy(round_to_bits(matrix, bits) - matrix) for matrix in matrices.values())
            for bits in BITS
        }
        spectra = {role: energy_spectrum(matrix) for role, matrix in matrices.items()}
        done.add(layer.parameters // layer.count)
        return spectra, lost, sum(total_energy(matrix) for matrix in matrices.values())

    with resources.worker_threads(layer, matrices=8) as pool:
        probes = list(pool.map(probe, chosen))
    energy = sum(expert_energy for _, _, expert_energy in probes) or 1.0  # where all is zero, the errors are 0
    scale = layer.count / len(chosen)
    overlays = rate_curves(measures, layer.count)
    svds = {
        role: RateCurve(np.sum([spectra[role] for spectra, _, _ in probes], axis=0) * scale, overlays[role].cost)
        for role in layer.roles
    }
    base = BYTES_PER_NUMBER * sum(prod(measure.shape) for measure in measures.values())

    def error_within(budget: float, curves: Mapping[str, RateCurve]) -> float:
        return float(np.sqrt(energy_left(curves, allocate(curves, budget=budget)) / energy / scale))

    def overlay_within(budget: float) -> float | None:
        return None if budget < base else error_within(budget - base, overlays)

    result = []
    for bits in BITS:
        budget = layer.count * sum(quantised_bytes(layer.shape(role), bits) for role in layer.roles)
        quantisation = float(np.sqrt(sum(lost[bits] for _, lost, _ in probes) / energy))
        result.append(Alternative(bits, budget, quantisation, overlay_within(budget), error_within(budget, svds)))
    budgets = {size: size / 8 * layer.parameters for size in LADDER}
    factored = (Factored(size, overlay_within(free), error_within(free, svds)) for size, free in budgets.items())
    return tuple(result), tuple(factored)


def sum_alternatives(layers: Sequence[Sequence[Alternative]]) -> tuple[SameBytes, ...]:
    """The alternatives over all measured layers: bytes are summed, errors are root mean squares.

    The overlay's error is None where it is in any layer.
    """

    rows = []
    for by_layer in zip(*layers, strict=True):
        rows.append(
            SameBytes(
                bits=by_layer[0].bits,
                bytes=sum(layer.bytes for layer in by_layer),
                quantisation=mean_error([layer.quantisation for layer in by_layer]),
                overlay=mean_error([layer.overlay for layer in by_layer]),
                svd=mean_error([layer.svd for layer in by_layer]),
            )
        )
    return tuple(rows)


@overload
def mean_error(errors: Sequence[float]) -> float: ...
@overload
def mean_error(errors: Sequence[float | None]) -> float | None: ...
def mean_error(errors: Sequence[float | None]) -> float | None:
    """The root mean square of the layers' errors; None where it is None in any layer."""
    known = [error for error in errors if error is not None]
    return sqrt(sum(error**2 for error in known) / len(known)) if len(known) == len(errors) else None
