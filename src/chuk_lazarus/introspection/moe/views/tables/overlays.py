"""Overlays, as tables."""

from typing import TYPE_CHECKING, Any

from ...reports import (
    MoEOverlay,
    MoEOverlayCompression,
    MoEOverlayEstimate,
    MoEOverlayEvaluation,
    MoEOverlayExport,
    MoEOverlayVerification,
)
from ...text import format_bytes, percent
from .grid import fact_grid, heading_blocks, number_table

if TYPE_CHECKING:
    from rich.console import RenderableType


def _roles(ranks: dict[str, int]) -> list[str]:
    return [role for role in ("gate", "up", "down") if role in ranks]


def render_overlay(overlay: MoEOverlay) -> "RenderableType":
    """Ranks, energy, error and bytes, a row per layer."""
    from rich.console import Group

    roles = _roles(overlay.layers[0].ranks)
    rows = [
        [
            str(layer.layer),
            *(f"{layer.ranks[role]}/{layer.max_ranks[role]} ({layer.energy_kept[role]:.1%})" for role in roles),
            percent(layer.weight_error),
            f"{layer.ratio:.1f}x",
        ]
        for layer in overlay.layers
    ]
    headings = ["Layer", *(f"{role} rank (kept)" for role in roles), "Error", "Ratio"]
    blocks = heading_blocks("MOE OVERLAY", overlay, ("Ranks", overlay.rule))
    return Group(
        *blocks, number_table(headings, rows), fact_grid([*_byte_rows(overlay), *(("Note", n) for n in overlay.notes)])
    )


def _byte_rows(report: "MoEOverlay | MoEOverlayEstimate") -> list[tuple[str, Any]]:
    stored, original = format_bytes(report.stored_bytes), format_bytes(report.original_bytes)
    return [
        ("Experts", f"{stored} as stored, {original} at two bytes a weight"),
        (
            "Overlay",
            f"{format_bytes(report.overlay_bytes)}: {report.ratio:.1f}x against two bytes a weight, "
            f"{report.ratio_vs_stored:.1f}x against the file",
        ),
    ]


def render_verification(report: MoEOverlayVerification) -> "RenderableType":
    """Pass or fail, and the errors, a row per layer."""
    from rich.console import Group
    from rich.text import Text

    verdict = Text("PASSED", style="bold green") if report.passed else Text("FAILED", style="bold red")
    verdict.append(f" (worst expert's output error, tolerance {percent(report.tolerance)})", style="default")
    roles = _roles(report.layers[0].ranks)
    rows = [
        [
            str(layer.layer),
            *(f"{layer.ranks[role]} ({layer.weight_error[role].mean:.1%})" for role in roles),
            percent(layer.output_error.mean),
            percent(layer.output_error.max),
            f"#{layer.worst_expert}",
            "?" if layer.mixed_output_error is None else percent(layer.mixed_output_error),
        ]
        for layer in report.layers
    ]
    headings = ["Layer", *(f"{role} (error)" for role in roles), "Output", "Worst", "Expert", "Mixed"]
    blocks = heading_blocks("MOE OVERLAY VERIFICATION", report, ("Ranks", report.rule), ("Result", verdict))
    rounding = (
        f"{percent(sum(layer.rounding_error[bits] for layer in report.layers) / len(report.layers))} at {bits} bits"
        for bits in report.layers[0].rounding_error
    )
    notes = [
        ("Inputs", f"{report.inputs} seeded vectors (seed {report.seed}), activation {report.activation}"),
        ("Rounding", f"the mean output error of plain quantisation is {', '.join(rounding)}"),
    ]
    return Group(*blocks, number_table(headings, rows), fact_grid([*notes, *(("Note", note) for note in report.notes)]))


def render_estimate(report: MoEOverlayEstimate) -> "RenderableType":
    """The whole model's bytes, its layers, and what else the same bytes would buy."""
    from rich.console import Group

    roles = _roles(report.layers[0].ranks)
    rows = [
        [
            str(layer.layer),
            *(f"{layer.ranks[role]}" for role in roles),
            percent(layer.weight_error),
            f"{layer.original_bytes / layer.overlay_bytes:.1f}x",
            "measured" if layer.measured else "interpolated",
        ]
        for layer in report.layers
    ]
    same = [
        [
            f"{row.bits} bit",
            format_bytes(row.bytes),
            percent(row.quantisation),
            "does not fit" if row.overlay is None else percent(row.overlay),
            percent(row.svd),
        ]
        for row in report.same_bytes
    ]
    blocks = heading_blocks("MOE OVERLAY ESTIMATE", report, ("Ranks", report.rule))
    return Group(
        *blocks,
        number_table(["Layer", *(f"{role} rank" for role in roles), "Error", "Ratio", "How"], rows),
        fact_grid(
            [
                *_byte_rows(report),
                ("Error", f"{percent(report.weight_error)} of the weights"),
                (
                    "Same bytes",
                    f"weight errors and bytes of layers {', '.join(map(str, report.layers_measured))}",
                ),
            ]
        ),
        number_table(["As", "Bytes", "Quantised", "Overlay", "Plain SVD"], same),
        fact_grid([("Advice", report.advice), *(("Note", note) for note in report.notes)]),
    )


def render_compression(report: MoEOverlayCompression) -> "RenderableType":
    """Where it is, what it takes, and the errors of the layers that were verified."""
    from rich.console import Group

    size = f"{format_bytes(report.bytes_before)} before, {format_bytes(report.bytes_after)} after ({report.ratio:.2f}x)"
    rows = [
        [str(one.layer), *map(str, one.ranks.values()), percent(one.output_error.mean), percent(one.output_error.max)]
        for one in report.verification
    ]
    roles = _roles(next(iter(report.ranks.values())))
    headings = ["Layer", *(f"{role} rank" for role in roles), "Output error", "Worst expert"]
    blocks = heading_blocks("MOE OVERLAY WRITTEN", report, ("Ranks", report.rule), ("Folder", report.folder))
    rest = [("Model", size), *(("Note", note) for note in report.notes)]
    return Group(*blocks, number_table(headings, rows), fact_grid(rest))


def render_export(report: MoEOverlayExport) -> "RenderableType":
    """Where it is and what it takes."""
    from rich.console import Group
    from rich.text import Text

    rows = [
        ("Overlay", report.overlay),
        ("Folder", report.folder),
        ("Family", report.family),
        ("Bytes", format_bytes(report.bytes)),
    ]
    return Group(Text("MOE OVERLAY EXPORTED", style="bold"), fact_grid(rows))


def render_evaluation(report: MoEOverlayEvaluation) -> "RenderableType":
    """Original and overlay side by side."""
    from rich.console import Group
    from rich.text import Text

    results = (report.original_result, report.overlay_result)
    rows = [
        ["Loss", *(f"{one.loss:.4f}" for one in results), f"{report.loss_difference:+.4f}"],
        ["Perplexity", *(f"{one.perplexity:.3f}" for one in results), f"{report.perplexity_ratio:.3f}x"],
        ["Tokens per second", *(f"{one.tokens_per_second:,.0f}" for one in results), ""],
        ["Weights in memory", *(format_bytes(one.parameter_bytes) for one in results), ""],
    ]
    heading = [("Model", report.model), ("Overlay", report.overlay), ("Text", report.text)]
    heading += [("Tokens", f"{results[0].tokens:,} by {report.tokens_from}, in windows of {results[0].context}")]
    table = number_table(["", "Original", "Overlay", "Difference"], rows)
    return Group(Text("MOE OVERLAY EVALUATION", style="bold"), fact_grid(heading), table)
