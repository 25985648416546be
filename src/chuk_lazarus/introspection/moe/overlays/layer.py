"""The results of one layer, in the form that reports have."""

from collections.abc import Mapping, Sequence
from math import prod, sqrt

import numpy as np

from ..numerics.low_rank import original_bytes, overlay_bytes
from ..numerics.rates import Rate, mean_saved
from ..reports import ErrorSpread, LayerEstimate, LayerOverlay, LayerVerification, SharingRate
from ..weights.expert_layer import ExpertLayer
from .checkpoint.format import Ranks
from .curves import LayerCurves
from .fidelity import LayerFidelity


def total_bytes(layers: Sequence[LayerOverlay] | Sequence[LayerEstimate]) -> tuple[int, int, int]:
    """Bytes of the experts of all these layers: at two bytes a weight, as stored, and as an overlay."""
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
    )


def layer_verification(number: int, ranks: Ranks, fidelity: LayerFidelity) -> LayerVerification:
    """The errors of a layer's experts, each as mean and maximum."""

    def spread(errors: Sequence[float]) -> ErrorSpread:
        return ErrorSpread(mean=float(np.mean(errors)), max=max(errors))

    return LayerVerification(
        layer=number,
        ranks=ranks,
        weight_error={role: spread(errors) for role, errors in fidelity.weight_errors.items()},
        output_error=spread(fidelity.output_errors),
        worst_expert=int(np.argmax(fidelity.output_errors)),
        mixed_output_error=fidelity.mixed_error,
        rounding_error={str(bits): error for bits, error in fidelity.rounding_errors.items()},
    )


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
        sharing=_describe_rates(rates[layer.number]) if layer.number in rates else None,
        bits_saved=mean_saved((rates[layer.number][role].bits_saved, prod(shapes[role])) for role in shapes)
        if layer.number in rates
        else None,
    )


def _describe_rates(rates: Mapping[str, Rate]) -> dict[str, SharingRate]:
    return {
        role: SharingRate(aligned_delta_energy=rate.delta_energy, bits_saved=rate.bits_saved, bound=rate.bound)
        for role, rate in rates.items()
    }


def interpolate_saved(layers: Sequence[LayerEstimate]) -> float:
    """The bits a weight that bases save over all layers; of a layer that was not measured, between its neighbours'."""
    known = {layer.layer: layer.bits_saved for layer in layers if layer.bits_saved is not None}
    saved = np.interp([layer.layer for layer in layers], list(known), list(known.values()))
    return float(np.average(saved, weights=[layer.original_bytes for layer in layers]))
