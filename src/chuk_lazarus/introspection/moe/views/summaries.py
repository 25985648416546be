"""Reports in a few lines of plain text: what `print` shows."""

from collections.abc import Sequence

from ..reports import (
    MoELayout,
    MoEOverlay,
    MoEOverlayCompression,
    MoEOverlayEstimate,
    MoEOverlayEvaluation,
    MoEOverlayExport,
    MoEOverlayVerification,
    MoEQuickAnalysis,
    MoESurveyPlan,
    MoETypeAnalysis,
    MoETypeComparison,
    MoETypeSurvey,
    MoEWeightsVerification,
)
from ..text import format_bytes, format_count, percent
from . import verdicts
from .words import (
    caution,
    count_noun,
    describe_family,
    explain,
    explain_quick,
    explain_saving,
    format_confidence,
    format_low_rank,
    format_ratio,
    identify,
    name_layers,
)

MOST_ROWS = 10  # models that a survey names


def _join(*lines: str) -> str:
    return "\n".join(line for line in lines if line)


def _headline(report: MoETypeAnalysis | MoEQuickAnalysis) -> str:
    kind = f": {report.kind}" if report.kind else ""
    return f"{identify(report)}: {report.type}{format_confidence(report)}{kind}"


def _shorten(lines: Sequence[str]) -> list[str]:
    more = [f"... and {len(lines) - MOST_ROWS} more"] if len(lines) > MOST_ROWS else []
    return [*lines[:MOST_ROWS], *more]


def summarise_analysis(report: MoETypeAnalysis) -> str:
    """Verdict, why, what to mind, and whether an overlay pays."""
    layers = name_layers([layer.layer for layer in report.layers])
    return _join(
        _headline(report),
        f"{layers} of {count_noun(len(report.moe_layers), 'MoE layer')}, {describe_family(report)}",
        explain(report),
        caution(report),
        f"Smaller? {saving}" if (saving := explain_saving(report)) else "",
        f"low-rank overlay: {format_low_rank(report)}",
    )


def summarise_quick(report: MoEQuickAnalysis) -> str:
    """Verdict and why."""
    read = f"read {format_bytes(report.weight_bytes)} of the experts' {format_bytes(report.stored_bytes)}"
    return _join(_headline(report), explain_quick(report), read)


def summarise_comparison(report: MoETypeComparison) -> str:
    """A line for each model."""
    return _join(*map(_headline, report.models))


def summarise_survey(report: MoETypeSurvey) -> str:
    """How many models, and a line for each of the first."""
    failed = sum(row.error is not None for row in report.rows)
    lines = [
        f"{row.request.model}: {row.answer.type}{format_confidence(row.answer)}"
        if row.answer
        else f"failed: {row.describe()}"
        for row in report.rows
    ]
    return _join(f"{count_noun(len(report.rows), 'model')}, {failed} failed", *_shorten(lines))


def summarise_plan(report: MoESurveyPlan) -> str:
    """How many models, and the bytes of their experts."""
    layer, stored = format_bytes(report.layer_bytes), format_bytes(report.stored_bytes)
    return f"{count_noun(len(report.models), 'model')}: {layer} in one layer of each, {stored} in all"


def summarise_layout(report: MoELayout) -> str:
    """What experts there are, and what reading them costs."""
    size = f"{format_count(report.parameters)} weights in {format_bytes(report.stored_bytes)}"
    reads = f"an analysis reads {format_bytes(report.analysis_bytes)}, a quick one {format_bytes(report.quick_bytes)}"
    return _join(
        f"{identify(report)}: {describe_family(report)}",
        f"{count_noun(len(report.moe_layers), 'MoE layer')}, {size}; {reads}",
    )


def summarise_overlay(report: MoEOverlay) -> str:
    """The rule, and the bytes that it leads to."""
    sizes = f"{format_bytes(report.overlay_bytes)} for {format_bytes(report.stored_bytes)} as stored"
    layers = name_layers([layer.layer for layer in report.layers])
    return _join(
        f"{identify(report)}: an overlay of {layers}, {report.rule}",
        f"{sizes}, {report.bits_per_weight:.2f} bits per weight ({format_ratio(report.ratio)} smaller than bfloat16)",
        f"largest weight error of a layer: {percent(max(layer.weight_error for layer in report.layers))}",
    )


def summarise_verification(report: MoEOverlayVerification) -> str:
    """Whether it passed, and the worst error."""
    worst = max((layer.output_error.max for layer in report.layers), default=0.0)
    outcome = "PASSED" if report.passed else "FAILED"
    return _join(
        f"{identify(report)}: {outcome}, {report.rule}",
        f"the largest output error of an expert is {percent(worst)}; {percent(report.tolerance)} is allowed",
    )


def summarise_weights(report: MoEWeightsVerification) -> str:
    """Whether it is still the same model, and what is wrong."""
    return _join(
        f"{identify(report)}: {'PASSED' if report.passed else 'FAILED'}, against {verdicts.identify_original(report)}",
        f"{verdicts.summarise(report)}; compared: {verdicts.describe_compared(report)}",
    )


def summarise_estimate(report: MoEOverlayEstimate) -> str:
    """The whole model's bytes, and what pays."""
    sizes = f"{format_bytes(report.overlay_bytes)} for {format_bytes(report.stored_bytes)} as stored"
    return _join(f"{identify(report)}: {sizes}, {report.rule}", explain_saving(report), f"advice: {report.advice}")


def summarise_compression(report: MoEOverlayCompression) -> str:
    """Where it was written, and the bytes before and after."""
    sizes = f"{format_bytes(report.bytes_after)} from {format_bytes(report.bytes_before)}"
    return f"{report.folder}: {sizes}, made of {identify(report)} with {report.rule}"


def summarise_export(report: MoEOverlayExport) -> str:
    """Where it was written."""
    return f"{report.folder}: {format_bytes(report.bytes)}, rebuilt from {report.overlay}"


def summarise_evaluation(report: MoEOverlayEvaluation) -> str:
    """The loss of both, and how far apart they are."""
    original, overlay = report.original_result, report.overlay_result
    return _join(
        f"{report.overlay} beside {report.model}, on {original.tokens:,} tokens",
        f"loss {overlay.loss:.4f} and {original.loss:.4f} nats per token, KL divergence {report.kl.mean:.4f}",
    )
