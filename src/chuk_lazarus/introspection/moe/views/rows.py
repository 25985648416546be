"""Reports as rows of plain values, for a data frame or a file: what a row is, and its columns in their order."""

from typing import Any

from ..reports import (
    LayerAnalysis,
    MoELayout,
    MoEOverlay,
    MoEOverlayEstimate,
    MoEOverlayEvaluation,
    MoEOverlayVerification,
    MoEQuickAnalysis,
    MoESurveyPlan,
    MoETypeAnalysis,
    MoETypeComparison,
    MoETypeSurvey,
    MoEWeightsVerification,
    Row,
)
from . import facts

ANSWER = (
    "type",
    "confidence",
    "kind",
    "revision",
    "family",
    "model_type",
    "storage",
    "experts",
    "parameters",
    "shared",
    "strong",
    "reach",
    "parent_kept",
    "rank_ratio",
    "cosine",
    "bits_saved",
    "overlay_ratio",
    "compressible",
)
PLANNED = ("stated", "source", "layer_bytes", "stored_bytes", "analysis_bytes", "seconds")
QUICK = ("layer", "type", "confidence", "kind", "shared", "strong", "reach", "neurons", "part", "in_place")
LAYOUT = ("layer", "storage", "experts", "parameters", "stored_bytes")
OVERLAY = ("layer", "weight_error", "ratio", "bits_per_weight", "original_bytes", "stored_bytes", "overlay_bytes")
WEIGHTS = ("format", "original_format", "bits_per_weight", "expected_error", "mean", "max", "ratio")
EVALUATION = ("loss", "perplexity", "tokens", "tokens_per_second", "parameter_bytes", "bits_per_weight")


def _take(report: Any, names: tuple[str, ...]) -> Row:
    return {name: getattr(report, name) for name in names}


def list_analysis(report: MoETypeAnalysis) -> list[Row]:
    """A row for each layer that was analysed."""
    return [{"model": report.model, **_describe_layer(layer)} for layer in report.layers]


def _describe_layer(layer: LayerAnalysis) -> Row:
    sharing, saved = layer.lineage.sharing, facts.bits_saved(layer)
    row: Row = {
        **_take(layer, ("layer", "type", "confidence", "kind")),
        "shared": sharing.shared,
        "strong": sharing.strong,
        "neurons": sharing.neurons,
        "parent_kept": layer.lineage.parent.kept if layer.lineage.parent else None,
        "cosine": layer.cosine.mean,
        "cosine_std": layer.cosine.std,
        "bits_saved": None if saved != saved else saved,
        "overlay_ratio": layer.overlay_ratio,
    }
    for role, projection in layer.projections.items():
        row |= {
            f"{role}_rank": projection.rank["0.95"],
            f"{role}_rank_ratio": projection.rank_ratio,
            f"{role}_noise_rank_ratio": projection.noise_rank_ratio,
            f"{role}_delta_energy": projection.delta_energy,
        }
    return row


def list_quick(report: MoEQuickAnalysis) -> list[Row]:
    """A row for each layer of which a part was read."""
    return [{"model": report.model, **_take(layer, QUICK)} for layer in report.layers]


def list_comparison(report: MoETypeComparison) -> list[Row]:
    """A row for each layer of each model."""
    return [row for model in report.models for row in list_analysis(model)]


def list_survey(report: MoETypeSurvey) -> list[Row]:
    """A row for each model, with what went wrong where there is no answer."""
    return [
        {
            "model": row.request.model,
            "stated": row.stated,
            **(_take(row.answer, ANSWER) if row.answer else dict.fromkeys(ANSWER)),
            "bytes_read": row.answer.cost.bytes_read if row.answer else None,
            "seconds": row.answer.cost.seconds if row.answer else None,
            "error": row.error.message if row.error else None,
        }
        for row in report.rows
    ]


def list_plan(report: MoESurveyPlan) -> list[Row]:
    """A row for each model, with the bytes that are known of it, or why none are."""
    return [
        {
            "model": model.request.model,
            **_take(model, PLANNED),
            "error": model.error.message if model.error else None,
        }
        for model in report.models
    ]


def list_layout(report: MoELayout) -> list[Row]:
    """A row for each layer that is described."""
    return [{"model": report.model, **_take(layer, LAYOUT)} for layer in report.layers]


def list_overlay(report: MoEOverlay) -> list[Row]:
    """A row for each layer, with its ranks where it has any."""
    return [
        {
            "model": report.model,
            **_take(layer, OVERLAY),
            **{f"{role}_rank": rank for role, rank in layer.ranks.items()},
        }
        for layer in report.layers
    ]


def list_verification(report: MoEOverlayVerification) -> list[Row]:
    """A row for each layer, with the errors of its outputs."""
    return [
        {
            "model": report.model,
            "layer": layer.layer,
            "output_error": layer.output_error.mean,
            "worst_output_error": layer.output_error.max,
            "worst_expert": layer.worst_expert,
            "mixed_output_error": layer.mixed_output_error,
        }
        for layer in report.layers
    ]


def list_weights(report: MoEWeightsVerification) -> list[Row]:
    """A row for each compared projection of each layer."""
    return [
        {"model": report.model, "layer": layer.layer, "role": role, **_take(projection, WEIGHTS)}
        for layer in report.layers
        for role, projection in layer.projections.items()
    ]


def list_estimate(report: MoEOverlayEstimate) -> list[Row]:
    """A row for each size of the ladder, with the errors of each way to spend it."""
    return [{"model": report.model, **row.model_dump()} for row in report.ladder]


def list_evaluation(report: MoEOverlayEvaluation) -> list[Row]:
    """A row for the original, and one for its overlay."""
    pairs = ((report.model, report.original_result), (report.overlay, report.overlay_result))
    return [{"model": name, **_take(result, EVALUATION)} for name, result in pairs]
