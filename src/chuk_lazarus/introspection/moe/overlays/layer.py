"""The results of one layer, in the form that reports have."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod, sqrt
from typing import Any

import numpy as np

from ..numerics.low_rank import original_bytes, overlay_bytes
from ..numerics.rates import Rate, mean_saved
from ..reports import (
    ErrorSpread,
    LayerEstimate,
    LayerOverlay,
    LayerVerification,
    OverlayBytes,
    ProjectionCodes,
    SharingRate,
)
from ..text import format_ranges
from ..weights.expert_layer import ExpertLayer
from .checkpoint.format import Ranks
from .codes import BankShape, LayerCodes, index_layout
from .curves import LayerCurves
from .fidelity import LayerFidelity

LONGEST_ERROR = 99.999  # relative; no error of an expert's outputs takes more digits


def total_bytes(layers: Sequence[LayerOverlay] | Sequence[LayerEstimate]) -> tuple[int, int, int]:
    """Bytes of the experts of all these layers: at two bytes per weight, as stored, and as an overlay."""
    return (
        sum(layer.original_bytes for layer in layers),
        sum(layer.stored_bytes for layer in layers),
        sum(layer.overlay_bytes for layer in layers),
    )


def layer_overlay(layer: ExpertLayer, curves: LayerCurves, ranks: Ranks) -> LayerOverlay:
    """The energy that these ranks keep of a layer's deltas, the error that follows, and the bytes that they take."""
    totals = {role: float(curve.spectrum.sum()) for role, curve in curves.curves.items()}
    kept = {role: float(curve.spectrum[: ranks[role]].sum()) for role, curve in curves.curves.items()}
    original, overlay = original_bytes(curves.shapes, layer.count), curves.bytes_at(ranks)
    return LayerOverlay(
        layer=layer.number,
        ranks=ranks,
        max_ranks={role: min(shape) for role, shape in curves.shapes.items()},
        energy_kept={role: kept[role] / total if total else 1.0 for role, total in totals.items()},
        weight_error=curves.error_at(ranks),
        original_bytes=original,
        stored_bytes=layer.stored_bytes,
        overlay_bytes=overlay,
        ratio=original / overlay,
        bits_per_weight=8 * overlay / layer.parameters,
    )


def coded_layer_overlay(layer: ExpertLayer, codes: LayerCodes, weight_error: float) -> LayerOverlay:
    """What these codes of a layer take, and their measured error."""
    shapes = {role: layer.shape(role) for role in layer.roles}
    original, overlay = original_bytes(shapes, layer.count), coded_bytes([layer], [codes])
    return LayerOverlay(
        layer=layer.number,
        ranks={},
        max_ranks={role: min(shape) for role, shape in shapes.items()},
        energy_kept={},
        weight_error=weight_error,
        original_bytes=original,
        stored_bytes=layer.stored_bytes,
        overlay_bytes=sum_parts(overlay),
        ratio=original / sum_parts(overlay),
        codes=projection_codes(codes),
        bits_per_weight=8 * sum_parts(overlay) / layer.parameters,
    )


def projection_codes(codes: LayerCodes) -> dict[str, ProjectionCodes]:
    """The texts of a layer's codes, by role."""
    return {
        role: ProjectionCodes(
            base=str(each.base) if each.base else None,
            delta=str(each.delta),
            rest=str(each.rest) if each.rest else None,
            bank=each.bank.size if each.bank else None,
            matched=each.bank.matched if each.bank else None,
        )
        for role, each in codes.items()
    }


def bank_notes(codes: Mapping[int, LayerCodes]) -> list[str]:
    """Which layers have a bank, by its sizes."""
    layers: dict[tuple[BankShape, bool], list[int]] = {}
    for number, of_layer in codes.items():
        if bank := next((each.bank for each in of_layer.values() if each.bank), None):
            has_rest = any(each.rest for each in of_layer.values())
            layers.setdefault((replace(bank, axis=0), has_rest), []).append(number)
    return [
        f"in layer{'s' if len(numbers) > 1 else ''} {format_ranges(numbers)} {'' if has_rest else 'all '}"
        f"{bank.matched} neurons of each expert are deltas from a bank of {bank.size} shared neurons"
        f"{', the others are coded by themselves' if has_rest else ''}"
        for (bank, has_rest), numbers in layers.items()
    ]


def ranked_bytes(layers: Iterable[ExpertLayer], ranks: Iterable[Ranks]) -> OverlayBytes:
    """Bytes of the bf16 bases and factors of these layers."""
    bases = deltas = 0
    for layer, of_layer in zip(layers, ranks, strict=True):
        shapes = {role: layer.shape(role) for role in layer.roles}
        base = overlay_bytes(shapes, dict.fromkeys(shapes, 0), layer.count)
        bases += base
        deltas += overlay_bytes(shapes, of_layer, layer.count) - base
    return OverlayBytes(bases=bases, deltas=deltas, scales=0)


def coded_bytes(layers: Iterable[ExpertLayer], codes: Iterable[LayerCodes]) -> OverlayBytes:
    """Bytes of the codes of these layers, by what they hold."""
    sums = {"base": 0, "delta": 0, "rest": 0, "scales": 0}
    for layer, of_layer in zip(layers, codes, strict=True):
        for role, each in of_layer.items():
            for name, part in each.layout(layer.shape(role), layer.count).items():
                is_scale = name.rpartition(".")[2] in ("scales", "unit")
                sums["scales" if is_scale else name.partition(".")[0]] += part.nbytes
        if index := index_layout(of_layer, layer.count):
            sums["base"] += index.nbytes
    return OverlayBytes(bases=sums["base"], deltas=sums["delta"] + sums["rest"], scales=sums["scales"])


def sum_parts(parts: OverlayBytes) -> int:
    """All bytes of an overlay."""
    return parts.bases + parts.deltas + parts.scales


def layer_verification(
    number: int, ranks: Ranks, fidelity: LayerFidelity, codes: Mapping[str, ProjectionCodes] | None = None
) -> LayerVerification:
    """The errors of a layer's experts, each as mean and maximum."""

    def spread(errors: Sequence[float]) -> ErrorSpread:
        return ErrorSpread(mean=float(np.mean(errors)), max=max(errors))

    return LayerVerification(
        layer=number,
        ranks=ranks,
        weight_error={role: spread(errors) for role, errors in fidelity.weight_errors.items()},
        output_error=spread(fidelity.output_errors),
        worst_expert=fidelity.experts[int(np.argmax(fidelity.output_errors))],
        mixed_output_error=fidelity.mixed_error,
        rounding_error={str(bits): error for bits, error in fidelity.rounding_errors.items()},
        codes=dict(codes or {}),
    )


def longest_verification(number: int, codes: LayerCodes) -> LayerVerification:
    """A verification whose text is as long as that of a coded layer can be, before it is verified."""
    return layer_verification(number, {}, LayerFidelity((0,), {}, (LONGEST_ERROR,), None, {}), projection_codes(codes))


def layer_estimate(
    layer: ExpertLayer,
    measured: Mapping[int, LayerCurves],
    chosen: Mapping[int, Ranks],
    rates: Mapping[int, Mapping[str, Rate]],
) -> LayerEstimate:
    """The estimate of one layer, measured or not.

    For a layer that was not measured, ranks and squared error are interpolated linearly between the measured layers.
    """
    numbers = sorted(measured)
    shapes = {role: layer.shape(role) for role in layer.roles}

    def interpolate(values: Sequence[float]) -> float:
        return float(np.interp(layer.number, numbers, values))

    ranks = {
        role: min(min(shape), round(interpolate([chosen[number][role] for number in numbers])))
        for role, shape in shapes.items()
    }
    return LayerEstimate(
        layer=layer.number,
        measured=layer.number in measured,
        ranks=ranks,
        weight_error=sqrt(interpolate([measured[number].error_at(chosen[number]) ** 2 for number in numbers])),
        original_bytes=original_bytes(shapes, layer.count),
        stored_bytes=layer.stored_bytes,
        overlay_bytes=overlay_bytes(shapes, ranks, layer.count),
        **_describe_sharing(layer, rates),
    )


def coded_layer_estimate(
    layer: ExpertLayer, codes: LayerCodes, weight_error: float, rates: Mapping[int, Mapping[str, Rate]]
) -> LayerEstimate:
    """The estimate of one layer in codes; it was measured where `rates` has it."""
    size = sum_parts(coded_bytes([layer], [codes]))
    return plain_layer_estimate(layer, projection_codes(codes), size, weight_error, rates)


def plain_layer_estimate(
    layer: ExpertLayer,
    codes: dict[str, ProjectionCodes],
    size: int,
    weight_error: float,
    rates: Mapping[int, Mapping[str, Rate]],
) -> LayerEstimate:
    """As `coded_layer_estimate`, for codes by their texts that take `size` bytes."""
    return LayerEstimate(
        layer=layer.number,
        measured=layer.number in rates,
        ranks={},
        weight_error=weight_error,
        original_bytes=original_bytes({role: layer.shape(role) for role in layer.roles}, layer.count),
        stored_bytes=layer.stored_bytes,
        overlay_bytes=size,
        codes=codes,
        **_describe_sharing(layer, rates),
    )


def _describe_sharing(layer: ExpertLayer, rates: Mapping[int, Mapping[str, Rate]]) -> dict[str, Any]:
    """What the experts of a measured layer share, and what that saves."""
    if layer.number not in rates:
        return {}
    of_layer = rates[layer.number]
    saved = mean_saved((of_layer[role].bits_saved, prod(layer.shape(role))) for role in layer.roles)
    return {"sharing": _describe_rates(of_layer), "bits_saved": saved}


def _describe_rates(rates: Mapping[str, Rate]) -> dict[str, SharingRate]:
    return {
        role: SharingRate(aligned_delta_energy=rate.delta_energy, bits_saved=rate.bits_saved, bound=rate.bound)
        for role, rate in rates.items()
    }


def interpolate_saved(layers: Sequence[LayerEstimate]) -> float:
    """The bits per weight that bases save over all layers; layers that were not measured are interpolated."""
    known = {layer.layer: layer.bits_saved for layer in layers if layer.bits_saved is not None}
    saved = np.interp([layer.layer for layer in layers], list(known), list(known.values()))
    return float(np.average(saved, weights=[layer.original_bytes for layer in layers]))
