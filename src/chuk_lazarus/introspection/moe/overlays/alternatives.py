"""What an overlay competes with at the same bytes: plain quantisation, and a plain SVD per expert."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod, sqrt

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


@dataclass(frozen=True, slots=True)
class Alternative:
    """Relative weight errors of one layer's experts at `bytes`: plainly quantised to `bits`, as an overlay, as SVDs.

    The overlay's error is None where not even its base fits.
    """

    bits: int
    bytes: int
    quantisation: float
    overlay: float | None
    svd: float


def compare_alternatives(
    layer: ExpertLayer, measures: Mapping[str, RoleMeasure], resources: Resources, progress: Progress
) -> tuple[Alternative, ...]:
    """The weight errors of plain quantisation, overlay and SVD at the bytes that 8, 4 and 3 bits per weight take.

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

    def error_within(budget: int, curves: Mapping[str, RateCurve]) -> float:
        return float(np.sqrt(energy_left(curves, allocate(curves, budget=budget)) / energy / scale))

    result = []
    for bits in BITS:
        budget = layer.count * sum(quantised_bytes(layer.shape(role), bits) for role in layer.roles)
        quantisation = float(np.sqrt(sum(lost[bits] for _, lost, _ in probes) / energy))
        overlay = None if budget < base else error_within(budget - base, overlays)
        result.append(Alternative(bits, budget, quantisation, overlay, error_within(budget, svds)))
    return tuple(result)


def sum_alternatives(layers: Sequence[Sequence[Alternative]]) -> tuple[SameBytes, ...]:
    """The alternatives over all measured layers: bytes are summed, errors are root mean squares.

    The overlay's error is None where it is in any layer.
    """

    def mean(errors: Sequence[float]) -> float:
        return sqrt(sum(error**2 for error in errors) / len(errors))

    rows = []
    for by_layer in zip(*layers, strict=True):
        overlays = [layer.overlay for layer in by_layer if layer.overlay is not None]
        rows.append(
            SameBytes(
                bits=by_layer[0].bits,
                bytes=sum(layer.bytes for layer in by_layer),
                quantisation=mean([layer.quantisation for layer in by_layer]),
                overlay=mean(overlays) if len(overlays) == len(by_layer) else None,
                svd=mean([layer.svd for layer in by_layer]),
            )
        )
    return tuple(rows)


def advise(rows: Sequence[SameBytes], stored_share: float) -> str:
    """Whether the overlay, quantisation or neither is worthwhile, by the measured errors.

    `stored_share` is the file's size over that at two bytes a weight. Only sizes below the file's count, and only
    errors that are not much above that of plain 4-bit rounding.
    """
    usable = 1.2 * next(row.quantisation for row in rows if row.bits == 4)
    for row in rows:
        if (row.bits + 0.5) / 16 >= stored_share:
            continue
        overlay = inf if row.overlay is None else row.overlay
        if min(overlay, row.quantisation) > usable:
            break
        overlay_result = "does not even fit its base" if row.overlay is None else f"errs by {100 * overlay:.1f} %"
        if overlay < row.quantisation:
            return (
                f"the overlay: at {row.bits}-bit size its weight error is {100 * overlay:.1f} %, "
                f"and plain quantisation errs by {100 * row.quantisation:.1f} %"
            )
        return (
            f"quantisation: at {row.bits}-bit size its weight error is {100 * row.quantisation:.1f} %, "
            f"and an overlay {overlay_result}"
        )
    return "nothing: at fewer bytes than the file's, overlay and quantisation both err by more than 4-bit rounding does"
