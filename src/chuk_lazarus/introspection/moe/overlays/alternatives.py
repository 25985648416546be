"""What else the same bytes buy: plain quantisation, and plain SVDs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod, sqrt

import numpy as np
from numpy.typing import NDArray

from ..jobs.measure import RoleMeasure, count_experts
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
    """The relative weight errors of three ways to spend `bytes`: plain quantisation, an overlay, a plain SVD per
    expert.

    An error is None where not even the smallest such thing fits.
    """

    bits: int
    bytes: int
    quantisation: float
    overlay: float | None
    svd: float


def compare_alternatives(
    layer: ExpertLayer, measures: Mapping[str, RoleMeasure], resources: Resources, progress: Progress
) -> tuple[Alternative, ...]:
    """Weight errors of plain quantisation, overlay and SVD at the bytes that 8, 4 and 3 bits take; from the sampled
    experts."""
    chosen = next(iter(measures.values())).chosen
    done = count_experts(progress, f"alternatives for layer {layer.number}", layer, len(chosen))

    def probe(expert: int) -> tuple[dict[str, NDArray[np.float64]], dict[int, float], float]:
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
    energy = sum(found for _, _, found in probes) or 1.0  # of all zeros nothing is lost
    scale = layer.count / len(chosen)
    overlays = rate_curves(measures, layer.count)
    svds = {
        role: RateCurve(np.sum([spectra[role] for spectra, _, _ in probes], axis=0) * scale, overlays[role].cost)
        for role in layer.roles
    }
    base = BYTES_PER_NUMBER * sum(prod(measure.shape) for measure in measures.values())
    result = []
    for bits in BITS:
        budget = layer.count * sum(quantised_bytes(layer.shape(role), bits) for role in layer.roles)
        error = {
            name: None
            if room < 0
            else float(np.sqrt(energy_left(choices, allocate(choices, budget=room)) / energy / scale))
            for name, choices, room in (("overlay", overlays, budget - base), ("svd", svds, budget))
        }
        quantisation = float(np.sqrt(sum(lost[bits] for _, lost, _ in probes) / energy))
        assert error["svd"] is not None
        result.append(Alternative(bits, budget, quantisation, error["overlay"], error["svd"]))
    return tuple(result)


def sum_alternatives(layers: Sequence[Sequence[Alternative]]) -> tuple[SameBytes, ...]:
    """Over the measured layers: bytes in all, errors as root mean squares."""

    def mean(errors: Sequence[float | None]) -> float | None:
        found = [error for error in errors if error is not None]
        return sqrt(sum(error**2 for error in found) / len(found)) if len(found) == len(errors) else None

    rows = []
    for same in zip(*layers, strict=True):
        quantisation, svd = mean([one.quantisation for one in same]), mean([one.svd for one in same])
        assert quantisation is not None
        assert svd is not None
        rows.append(
            SameBytes(
                bits=same[0].bits,
                bytes=sum(one.bytes for one in same),
                quantisation=quantisation,
                overlay=mean([one.overlay for one in same]),
                svd=svd,
            )
        )
    return tuple(rows)


def advise(same: Sequence[SameBytes], stored_share: float) -> str:
    """What pays, by the measured errors: the overlay, quantisation, or neither.

    Only sizes below that of the file count, and only errors that are not much above those of plain 4-bit rounding.
    """
    usable = 1.2 * next(row.quantisation for row in same if row.bits == 4)
    for row in same:
        if (row.bits + 0.5) / 16 >= stored_share:
            continue
        overlay = inf if row.overlay is None else row.overlay
        if min(overlay, row.quantisation) > usable:
            break
        other = "does not even fit its base" if row.overlay is None else f"errs by {100 * overlay:.1f} %"
        if overlay < row.quantisation:
            return (
                f"the overlay: at {row.bits}-bit size its weight error is {100 * overlay:.1f} %, "
                f"and plain quantisation errs by {100 * row.quantisation:.1f} %"
            )
        return (
            f"quantisation: at {row.bits}-bit size its weight error is {100 * row.quantisation:.1f} %, "
            f"and an overlay {other}"
        )
    return "nothing: at fewer bytes than the file's, overlay and quantisation both err by more than 4-bit rounding does"
