"""Overlays, as tables."""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from ...reports import (
    LadderRow,
    LayerVerification,
    MoEOverlay,
    MoEOverlayCompression,
    MoEOverlayEstimate,
    MoEOverlayEvaluation,
    MoEOverlayExport,
    MoEOverlayVerification,
    ProjectionCodes,
)
from ...terms import ROLES
from ...text import format_bytes, format_ranges, percent
from ..words import compare_size, explain_saving, format_bits, format_ratio, name_layers
from .grid import LEFT, WORDS, Fact, Grid, draw_commands, draw_facts, draw_table, identity_facts, paint, stack
from .layout import list_fit

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text


def _roles(by_role: Mapping[str, object]) -> list[str]:
    return [role for role in ROLES if role in by_role]


def _chosen(layers: Sequence[LayerVerification]) -> str:
    return "Codes" if any(layer.codes for layer in layers) else "Ranks"


def _how(codes: Mapping[str, ProjectionCodes], role: str) -> str:
    """For instance "2bit on 4bit", without the groups of the scales; "2bit on 4bit, 5bit" with strangers."""
    each = codes[role]
    text = f"{each.delta} on {each.base}" if each.base else each.delta
    text += f", {each.rest}" if each.rest else ""
    text = re.sub(r":(64|128|row|matrix)\b", "", text)
    return text.replace("+", " + ").replace(":", " ")  # long ones wrap between words


def _draw_layers(headings: Sequence[str], rows: Sequence[Sequence[str]], leave: Sequence[str] = ()) -> Grid:
    """A row for each layer; codes are in words."""
    columns = {heading: WORDS for heading in headings if heading.split()[-1] in ("code", "base", "How")}
    columns |= {heading: WORDS for place, heading in enumerate(headings) if any(" on " in row[place] for row in rows)}
    return draw_table(headings, rows, columns, leave=leave)


def _parts(report: MoEOverlay | MoEOverlayCompression) -> Fact:
    sizes = report.bytes_by_part
    bases = f"bases {format_bytes(sizes.bases)}, deltas" if sizes.bases else "codes"
    listing = f"{bases} {format_bytes(sizes.deltas)}"
    scales = f", scales {format_bytes(sizes.scales)}" if sizes.scales else ""
    return "Bits", f"{report.bits_per_weight:.2f} per expert weight ({listing}{scales})"


def _render_coded_overlay(overlay: MoEOverlay) -> "RenderableType":
    """Codes, error and bits, a row for each layer."""
    roles = [role for role in ROLES if role in overlay.layers[0].codes]
    rows = [
        [
            str(layer.layer),
            *(_how(layer.codes, role) for role in roles),
            percent(layer.weight_error),
            f"{layer.bits_per_weight:.2f}",
        ]
        for layer in overlay.layers
    ]
    return stack(
        "MOE OVERLAY",
        draw_facts([*identity_facts(overlay), ("Codes", overlay.rule)]),
        _draw_layers(["Layer", *(f"{role} delta on base" for role in roles), "Error", "Bits"], rows),
        draw_facts([*_byte_facts(overlay), _parts(overlay)], overlay.notes),
    )


def render_overlay(overlay: MoEOverlay) -> "RenderableType":
    """Ranks, energy, error and bytes, a row for each layer."""
    if overlay.layers[0].codes:
        return _render_coded_overlay(overlay)
    roles = _roles(overlay.layers[0].ranks)
    rows = [
        [
            str(layer.layer),
            *(f"{layer.ranks[role]}/{layer.max_ranks[role]} ({layer.energy_kept[role]:.1%})" for role in roles),
            percent(layer.weight_error),
            format_ratio(layer.ratio),
        ]
        for layer in overlay.layers
    ]
    headings = ["Layer", *(f"{role} rank (kept)" for role in roles), "Error", "Ratio"]
    return stack(
        "MOE OVERLAY",
        draw_facts([*identity_facts(overlay), ("Ranks", overlay.rule)]),
        draw_table(headings, rows),
        draw_facts(_byte_facts(overlay), overlay.notes),
    )


def _byte_facts(report: MoEOverlay | MoEOverlayEstimate) -> list[Fact]:
    stored, original = format_bytes(report.stored_bytes), format_bytes(report.original_bytes)
    return [
        ("Experts", f"{stored} as stored, {original} in bfloat16"),
        (
            "Overlay",
            f"{format_bytes(report.overlay_bytes)}: {compare_size(report.ratio_vs_stored, 'the file')}, "
            f"{compare_size(report.ratio, 'bfloat16')}",
        ),
    ]


def render_verification(report: MoEOverlayVerification) -> "RenderableType":
    """Passed or failed, and the errors, a row for each layer."""
    verdict = paint("PASSED", "bold green") if report.passed else paint("FAILED", "bold red")
    verdict.append(f" (largest output error of an expert; {percent(report.tolerance)} is allowed)", style="default")
    roles = _roles(report.layers[0].weight_error)
    rows = [
        [
            str(layer.layer),
            *(
                f"{_how(layer.codes, role) if layer.codes else layer.ranks[role]} ({layer.weight_error[role].mean:.1%})"
                for role in roles
            ),
            percent(layer.output_error.mean),
            percent(layer.output_error.max),
            f"#{layer.worst_expert}",
            "?" if layer.mixed_output_error is None else percent(layer.mixed_output_error),
        ]
        for layer in report.layers
    ]
    headings = ["Layer", *(f"{role} (error)" for role in roles), "Output", "Worst", "Expert", "Mixed"]
    rounding = (
        f"{percent(fmean(layer.rounding_error[bits] for layer in report.layers))} at {bits} bits"
        for bits in report.layers[0].rounding_error
    )
    method: list[Fact] = [
        ("Inputs", f"{report.inputs} random vectors (seed {report.seed}), activation {report.activation}"),
        ("Compare", f"the mean output error of plain quantisation is {', '.join(rounding)}"),
    ]
    return stack(
        "MOE OVERLAY VERIFICATION",
        draw_facts([*identity_facts(report), (_chosen(report.layers), report.rule), ("Result", verdict)]),
        _draw_layers(headings, rows, leave=("Mixed", "Expert", "Worst")),
        draw_facts(method, report.notes),
    )


def render_estimate(report: MoEOverlayEstimate) -> "RenderableType":
    """The whole model's bytes, its layers, and what the same bytes would buy otherwise."""
    is_coded = bool(report.layers[0].codes)
    chosen, size = ("code", "Bits") if is_coded else ("rank", "Ratio")
    roles = _roles(report.layers[0].codes or report.layers[0].ranks)
    rows = [
        [
            str(layer.layer),
            *(_how(layer.codes, role) if is_coded else str(layer.ranks[role]) for role in roles),
            percent(layer.weight_error),
            f"{16 * layer.overlay_bytes / layer.original_bytes:.2f}"
            if is_coded
            else format_ratio(layer.original_bytes / layer.overlay_bytes),
            "" if layer.bits_saved is None else format_bits(layer.bits_saved),
            "measured" if layer.measured else "from nearest" if is_coded else "interpolated",
        ]
        for layer in report.layers
    ]
    same_bytes = [
        [
            f"{row.bits} bit",
            format_bytes(row.bytes),
            percent(row.quantisation),
            "does not fit" if row.overlay is None else percent(row.overlay),
            percent(row.svd),
        ]
        for row in report.same_bytes
    ]
    saving = explain_saving(report)
    sharing: list[Fact] = [("Smaller?", saving)] if saving else []
    errors: list[Fact] = [
        ("Error", f"{percent(report.weight_error)}, relative, of the weights"),
        ("Same bytes", f"the weight error of each method in as many bytes, {name_layers(report.layers_measured)}"),
    ]
    return stack(
        "MOE OVERLAY ESTIMATE",
        draw_facts(
            [
                *identity_facts(report),
                ("Codes" if is_coded else "Ranks", report.rule),
                *(
                    [("Format", "MLX, plain quantisation, because the experts share nothing")]
                    if report.format == "mlx"
                    else []
                ),
                *(list_fit(report.fit) if report.fit else []),
            ]
        ),
        _draw_layers(
            ["Layer", *(f"{role} {chosen}" for role in roles), "Error", size, "Bits saved", "How"],
            rows,
            leave=("Bits saved",),
        ),
        *_draw_sharing(report),
        draw_facts([*sharing, *_byte_facts(report), *errors]),
        draw_table(["As", "Bytes", "Quantised", "Overlay", "Plain SVD"], same_bytes),
        *_draw_ladder(report),
        draw_facts([("Advice", report.advice)], report.notes),
    )


def _draw_ladder(report: MoEOverlayEstimate) -> "list[RenderableType]":
    """A row for each size: the errors of each way to spend it."""

    def show(row: LadderRow, method: str) -> "str | Text":
        error = getattr(row, method)
        text = "" if error is None else percent(error)
        if method == "rounding" and row.rounding_bits:
            text += f" ({row.rounding_bits})"
        return paint(f"{text} *", "bold") if method == row.best else text

    rows = [
        [
            f"{row.bits:g}",
            format_bytes(row.bytes),
            *(show(row, method) for method in ("rounding", "plain", "coded", "low_rank", "svd")),
            percent(row.bound),
        ]
        for row in report.ladder
    ]
    headings = ["Bits", "Bytes", "Quantised", "Codes", "On a base", "Low rank", "SVD", "Bound"]
    about = (
        f"the weight error of each method by bits per weight (scales included), {name_layers(report.layers_measured)}; "
        "Bytes: the experts of all layers; in brackets: the bits of quantised weights without scales; Bound: the best "
        "possible for Gaussian weights, which low-rank deltas can beat; *: the smallest error at this size"
    )
    return [draw_facts([("Ladder", about)]), draw_table(headings, rows, leave=("SVD", "Bytes"))] if rows else []


def _draw_sharing(report: MoEOverlayEstimate) -> "list[RenderableType]":
    """A row for each projection of each measured layer: what its experts share, and what that saves."""
    rows = [
        [
            str(layer.layer),
            role,
            percent(rate.aligned_delta_energy),
            format_bits(rate.bits_saved),
            format_bits(rate.bound),
        ]
        for layer in report.layers
        for role, rate in (layer.sharing or {}).items()
    ]
    headings = ["Layer", "Projection", "Aligned delta", "Bits saved", "Bound"]
    return [draw_table(headings, rows, {"Projection": LEFT})] if rows else []


def render_compression(report: MoEOverlayCompression) -> "RenderableType":
    """Where it is, what it takes, and the errors of the layers that were verified."""
    size = f"{format_bytes(report.bytes_before)} before, {format_bytes(report.bytes_after)} after ({report.ratio:.2f}x)"
    roles = _roles(next(iter((report.ranks or report.codes).values())))
    what = "code" if report.codes else "rank"
    headings = ["Layer", *(f"{role} {what}" for role in roles), "Output error", "Worst expert"]
    rows = [
        [
            str(layer.layer),
            *(_how(layer.codes, role) if layer.codes else str(layer.ranks[role]) for role in roles),
            percent(error.mean),
            percent(error.max),
        ]
        for layer in report.verification
        for error in (layer.output_error,)
    ]
    return stack(
        "MOE QUANTISED FOR MLX" if report.format == "mlx" else "MOE OVERLAY WRITTEN",
        draw_facts(
            [*identity_facts(report), ("Codes" if report.codes else "Ranks", report.rule), ("Folder", report.folder)]
        ),
        _draw_layers(headings, rows),
        draw_facts([("Model", size), *([_parts(report)] if report.codes else [])], report.notes),
    )


def render_export(report: MoEOverlayExport) -> "RenderableType":
    """Where it is and what it takes; its widths, the errors of the layers that were verified, and what to run next."""
    is_recipe = report.format == "gguf-recipe"
    facts = [
        ("Model" if report.widths else "Overlay", report.overlay),
        ("Recipe" if is_recipe else "Folder", report.folder),
        ("Family", report.family),
        *([("Format", report.format), ("Widths", report.rule)] if report.rule else []),
    ]
    layers: dict[tuple[str, ...], list[int]] = {}
    for number, widths in report.widths.items():
        layers.setdefault(tuple(widths.values()), []).append(number)
    roles = tuple(next(iter(report.widths.values()), ()))
    rows = [[format_ranges(numbers), *widths] for widths, numbers in layers.items()]
    size = f"about {format_bytes(report.bytes)}" if is_recipe else format_bytes(report.bytes)
    errors = [
        [str(layer.layer), percent(layer.output_error.mean), percent(layer.output_error.max)]
        for layer in report.verification
    ]
    expected = (
        []
        if report.weight_error is None
        else [("Error", f"about {percent(report.weight_error)}, relative, of the weights")]
    )
    return stack(
        "MOE EXPORT",
        draw_facts(facts),
        *([draw_table(["Layers", *roles], rows, dict.fromkeys(["Layers", *roles], WORDS))] if rows else []),
        *([draw_table(["Layer", "Output error", "Worst expert"], errors)] if errors else []),
        draw_facts([("Bytes", size), *expected], report.notes),
        *([draw_commands(report.commands)] if report.commands else []),
    )


def render_evaluation(report: MoEOverlayEvaluation) -> "RenderableType":
    """Original and overlay, or another checkpoint, side by side."""
    results = (report.original_result, report.overlay_result)
    first, name = results[0], "Overlay" if report.is_overlay else "Other"
    facts = [
        ("Model", report.model),
        (name, report.overlay),
        ("Text", report.text),
        ("Tokens", f"{first.tokens:,} by {report.tokens_from}, in windows of {first.context}"),
    ]
    loss = f"{report.loss_difference:+.4f}{_spread(report.loss_difference_stderr, 4)}"
    bits = ["?" if result.bits_per_weight is None else f"{result.bits_per_weight:.2f}" for result in results]
    rows = [
        ["Loss", *(f"{result.loss:.4f}" for result in results), loss],
        ["Perplexity", *(f"{result.perplexity:.3f}" for result in results), f"{report.perplexity_ratio:.3f}x"],
        ["KL from the original", "", "", f"{report.kl.mean:.5f}{_spread(report.kl.stderr, 5)}"],
        ["Tokens per second", *(f"{result.tokens_per_second:,.0f}" for result in results), ""],
        ["Weights in memory", *(format_bytes(result.parameter_bytes) for result in results), ""],
        ["Bits per expert weight", *bits, ""],
    ]
    table = draw_table(["", "Original", name, "Difference"], rows, {"": LEFT})
    return stack("MOE OVERLAY EVALUATION", draw_facts(facts), table)


def _spread(stderr: float | None, digits: int) -> str:
    """The standard error behind a number: " ± 0.0004"."""
    return "" if stderr is None else f" ± {stderr:.{digits}f}"
