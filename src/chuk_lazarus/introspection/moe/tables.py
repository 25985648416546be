"""Results as rich tables: what a terminal and a notebook show."""

from collections.abc import Callable, Iterable, Sequence
from statistics import mean, pstdev
from typing import TYPE_CHECKING, Any

from .reports import (
    Identity,
    LayerAnalysis,
    LayerLayout,
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
    SurveyAnswer,
    SurveyRow,
)
from .text import format_bytes, format_count, format_ranges, percent, whole_percent
from .wording import (
    explain,
    explain_parent,
    explain_quick,
    explain_rule,
    explain_surer,
    format_compressible,
    format_cosine,
    format_rank,
    mean_over_layers,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text


def _grid(rows: Sequence[tuple[str, Any]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in rows:
        grid.add_row(Text(key, style="dim"), value if isinstance(value, Text) else Text(str(value)))
    return grid


_STYLES = {"UPCYCLED": "bold cyan", "NATIVE": "bold green", "UNDETERMINED": "bold yellow"}


def render_analysis(analysis: MoETypeAnalysis) -> "RenderableType":
    """The analysis as a person reads it: verdict, evidence per layer, overlay."""
    from rich.console import Group
    from rich.text import Text

    confidence = "" if analysis.type == "UNDETERMINED" else f" ({analysis.confidence:.0%} confidence)"
    verdict = Text.assemble((analysis.type, _STYLES[analysis.type]), confidence)
    name = analysis.model + (f" @ {analysis.revision[:12]}" if analysis.revision else "")
    kind = f"{analysis.model_type or 'unknown type'}, {analysis.experts} experts, {analysis.storage}"
    many = len(analysis.layers) > 1
    blocks: list[Any] = [Text("MOE TYPE ANALYSIS", style="bold")]
    blocks.append(
        _grid(
            [
                ("Model", name),
                ("Family", f"{analysis.family} ({kind})"),
                ("Layers" if many else "Layer", ", ".join(str(layer.layer) for layer in analysis.layers)),
                ("Type", verdict),
                ("Why", explain(analysis)),
                *([("Parent", explain_parent(analysis))] if analysis.parent else []),
                ("By rank", explain_rule(analysis)),
            ]
        )
    )
    blocks.append(_layer_table(analysis) if many else _projection_table(analysis.layers[0]))
    rows: list[tuple[str, Any]] = []
    if not many:
        cosine = analysis.layers[0].cosine
        others = ", ".join(
            f"{role} {value:.3f}" for role in ("gate", "up") if (value := getattr(cosine, role)) is not None
        )
        rows.append(("Cosine", f"{format_cosine(cosine)} (down), {others}"))
    rows += [
        ("Compressible", format_compressible(analysis)),
        (
            "Bytes",
            f"{format_bytes(analysis.stored_bytes)} stored, {format_bytes(analysis.overlay_bytes)} as overlay "
            f"at 95 % of the delta energy",
        ),
    ]
    rows += [("Note", note) for note in analysis.notes]
    blocks.append(_grid(rows))
    return Group(*blocks)


def render_quick(report: MoEQuickAnalysis) -> "RenderableType":
    """Verdict, what was read for it, and a row per layer."""
    from rich.console import Group
    from rich.text import Text

    confidence = "" if report.type == "UNDETERMINED" else f" ({report.confidence:.0%} confidence)"
    verdict = Text.assemble((report.type, _STYLES[report.type]), confidence)
    blocks = _heading("MOE TYPE, QUICKLY", report, ("Type", verdict), ("Why", explain_quick(report)))
    rows = [
        [
            str(layer.layer),
            f"{layer.neurons:,} of {len(layer.experts)} experts",
            percent(layer.part),
            percent(layer.reach),
            percent(layer.close),
            percent(layer.in_place),
        ]
        for layer in report.layers
    ]
    table = _table(["Layer", "Neurons", "Part", "Reach", "Found closely", "In place"], rows)
    rest = [
        (
            "Read",
            f"{format_bytes(report.weight_bytes)} of the experts' {format_bytes(report.stored_bytes)}, "
            f"{100 * report.share:.2g} %",
        ),
        ("Surer", explain_surer(report)),
        *(("Note", note) for note in report.notes),
    ]
    return Group(*blocks, table, _grid(rest))


def render_layout(layout: MoELayout) -> "RenderableType":
    """What is in the checkpoint, and a table of layers where they differ."""
    from rich.console import Group
    from rich.text import Text

    first = layout.layers[0]
    many = len({(_storage(layer), layer.experts, layer.stored_bytes) for layer in layout.layers}) > 1
    counts = sorted({layer.experts for layer in layout.layers})
    experts = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    formats = dict.fromkeys(name for layer in layout.layers for name in layer.formats.values())
    bits = 8 * first.stored_bytes / first.parameters
    read = "" if layout.exact else f" (by the headers of {_layers(layout.layers)})"

    def shapes(found: dict[str, tuple[int, int]]) -> str:
        return ", ".join(f"{role} {out} x {inner}" for role, (out, inner) in found.items())

    rows: list[tuple[str, Any]] = [
        ("Model", layout.model + (f" @ {layout.revision[:12]}" if layout.revision else "")),
        ("Family", f"{layout.family} ({layout.model_type or 'unknown type'})"),
        (
            "Storage",
            f"{', '.join(formats)}, by layer below" if len(set(map(_storage, layout.layers))) > 1 else _storage(first),
        ),
        ("MoE layers", f"{len(layout.moe_layers)} ({format_ranges(layout.moe_layers)})"),
    ]
    for where, numbers in (
        ("", set(layout.dense_layers).difference(layout.moe_layers)),
        (", beside the experts", set(layout.dense_layers).intersection(layout.moe_layers)),
    ):
        if numbers:
            rows.append(("Dense layers", f"{len(numbers)} ({format_ranges(sorted(numbers))}){where}"))
    if layout.mtp_layers:
        rows.append(("MTP layers", f"{len(layout.mtp_layers)} ({format_ranges(layout.mtp_layers)}), not in the sums"))
    rows += [
        ("Experts", f"{experts}, {layout.top_k} for each token, {layout.activation}"),
        ("Shapes", f"{shapes(first.shapes)} (out x in)"),
        ("Tensors", _tensor_names(layout.tensors)),
    ]
    if shared := layout.shared:
        where = f"in {_count(len(shared.layers), 'layer')} of {format_bytes(shared.stored_bytes)}"
        rows.append(("Shared", f"{shapes(shared.shapes)}, {shared.storage}, {where}"))
    rows += [
        (
            f"Layer {first.layer}" if many else "A layer",
            f"{format_bytes(first.stored_bytes)}, {format_count(first.parameters)} weights of {bits:.3g} bits",
        ),
        (
            "All layers",
            f"{'' if layout.exact else 'about '}{format_bytes(layout.stored_bytes)}, "
            f"{format_count(layout.parameters)} weights{read}",
        ),
        (
            "An analysis",
            f"reads {format_bytes(layout.analysis_bytes)} (moe-type-analyze), {format_bytes(layout.quick_bytes)} "
            f"(--quick), or {format_bytes(layout.analysis_bytes * layout.stored_bytes / first.stored_bytes)} "
            "(--layers all)",
        ),
        *(("Note", note) for note in layout.notes),
    ]
    blocks: list[Any] = [Text("MOE LAYOUT", style="bold"), _grid(rows)]
    if many:
        blocks.append(_storage_table(layout))
    return Group(*blocks)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _layers(layers: Sequence[LayerLayout]) -> str:
    return f"layer{'' if len(layers) == 1 else 's'} {format_ranges([layer.layer for layer in layers])}"


def _storage(layer: LayerLayout) -> str:
    """For instance "bf16", or "mlx-4bit (gate, up), mlx-6bit (down)"."""
    roles: dict[str, list[str]] = {}
    for role, name in layer.formats.items():
        roles.setdefault(name, []).append(role)
    return ", ".join(f"{name} ({', '.join(of)})" if len(roles) > 1 else name for name, of in roles.items())


def _tensor_names(tensors: dict[str, tuple[str, ...]]) -> str:
    """What the names begin with, and below it how they go on, a line for what a tensor holds."""
    everything = [name for names in tensors.values() for name in names]
    low, high = min(everything), max(everything)
    same = next((i for i, (one, other) in enumerate(zip(low, high, strict=False)) if one != other), len(low))
    start = low[: low.rfind(".", 0, same) + 1]
    width = max(map(len, tensors))
    lines = (f"{role:{width}}  {', '.join(n.removeprefix(start) for n in names)}" for role, names in tensors.items())
    return "\n".join([start, *lines])


def _storage_table(layout: MoELayout) -> "Table":
    """The layers of each kind, where they are not all stored alike."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("Layers", "Experts", "Storage", "Bytes a layer"):
        table.add_column(heading, overflow="fold")
    alike: dict[tuple[str, int, int], list[int]] = {}
    for layer in layout.layers:
        alike.setdefault((_storage(layer), layer.experts, layer.stored_bytes), []).append(layer.layer)
    for (storage, experts, nbytes), numbers in alike.items():
        table.add_row(format_ranges(numbers), str(experts), storage, format_bytes(nbytes))
    return table


def _projection_table(layer: LayerAnalysis) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Projection")
    for heading in ("Rank (95 %)", "of noise", "Delta energy"):
        table.add_column(heading, justify="right", overflow="fold")
    for role, projection in layer.projections.items():
        table.add_row(
            role, format_rank(projection), percent(projection.noise_rank_ratio), percent(projection.delta_energy)
        )
    return table


def _layer_table(analysis: MoETypeAnalysis) -> "Table":
    from rich import box
    from rich.table import Table

    layers, roles = analysis.layers, list(analysis.layers[0].projections)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True, show_footer=True)

    def column(heading: str, cell: Callable[[LayerAnalysis], float], form: Callable[[float], str]) -> list[str]:
        values = [cell(layer) for layer in layers]
        table.add_column(heading, footer=form(sum(values) / len(values)), justify="right", overflow="fold")
        return [form(value) for value in values]

    def over_roles(layer: LayerAnalysis, figure: str) -> float:
        found = layer.projections.values()
        return sum(float(getattr(projection, figure)) for projection in found) / len(found)

    def rank_ratio(role: str) -> Callable[[LayerAnalysis], float]:
        return lambda layer: layer.projections[role].rank_ratio

    table.caption, table.caption_justify = (
        "gate, up, down: 95 % rank of the deltas over the greatest possible; Noise: over that of noise",
        "left",
    )
    table.add_column("Layer", footer="mean", justify="right", overflow="fold")
    columns = [
        *(column(role, rank_ratio(role), whole_percent) for role in roles),
        column("Noise", lambda layer: over_roles(layer, "noise_rank_ratio"), whole_percent),
        column("Cosine", lambda layer: layer.cosine.mean, "{:.3f}".format),
        column("Delta", lambda layer: over_roles(layer, "delta_energy"), whole_percent),
        column("Found", lambda layer: layer.lineage.kept, whole_percent),
        column("Ratio", lambda layer: layer.overlay_ratio, "{:.1f}x".format),
    ]
    table.add_column("Type", overflow="fold")
    for place, layer in enumerate(layers):
        table.add_row(str(layer.layer), *(cells[place] for cells in columns), layer.type)
    return table


def render_expert_ranks(analysis: MoETypeAnalysis) -> "RenderableType":
    """The 95 % ranks of every sampled expert, a block a layer: mean and deviation, and the first and last experts."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title="Ranks of the experts' deltas (95 %)", title_justify="left"
    )
    for heading in ("Layer", "Projection", "Mean", "Deviation", "Least", "Most", "Experts"):
        table.add_column(heading, justify="left" if heading in ("Projection", "Experts") else "right", overflow="fold")
    for layer in analysis.layers:
        for role, projection in layer.projections.items():
            ranks = projection.expert_ranks["0.95"]
            named = [f"#{expert} {rank}" for expert, rank in zip(projection.experts, ranks, strict=True)]
            shown = named if len(named) <= 8 else [*named[:4], "...", *named[-4:]]
            table.add_row(
                str(layer.layer),
                role,
                f"{mean(ranks):.1f}",
                f"{pstdev(ranks):.1f}",
                str(min(ranks)),
                str(max(ranks)),
                ", ".join(shown),
            )
    return table


def render_comparison(comparison: MoETypeComparison) -> "RenderableType":
    """One row per figure, one column per model; means over the layers where there are several."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Metric", no_wrap=True)
    for model in comparison.models:
        table.add_column(Text(model.model), overflow="fold")

    def mean(model: MoETypeAnalysis, role: str, figure: str) -> str:
        found = [layer.projections[role] for layer in model.layers if role in layer.projections]
        if not found:
            return "none"
        if figure == "rank":
            return f"{sum(p.rank['0.95'] for p in found) / len(found):.0f} / {found[0].max_rank}"
        return percent(sum(getattr(p, figure) for p in found) / len(found))

    def row(metric: str, cells: Sequence[Any]) -> None:
        table.add_row(metric, *(cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells))

    models = comparison.models
    row("Type", [Text(model.type, style=_STYLES[model.type]) for model in models])
    row("Confidence", [f"{model.confidence:.0%}" for model in models])
    row("Kind", [model.kind or "" for model in models])
    row("Neurons found", [percent(mean_over_layers(model, "kept")) for model in models])
    row("  closely", [percent(mean_over_layers(model, "close")) for model in models])
    row("  by chance", [percent(mean_over_layers(model, "chance")) for model in models])
    row("By rank", [f"{model.documented_rule.type} ({model.documented_rule.confidence:.0%})" for model in models])
    row("Layers", [", ".join(str(layer.layer) for layer in model.layers) for model in models])
    row("Experts", [f"{model.experts} ({model.storage})" for model in models])
    for role in ("gate", "up", "down"):
        row(f"{role.capitalize()} rank", [mean(model, role, "rank") for model in models])
        row(f"{role.capitalize()} rank %", [mean(model, role, "rank_ratio") for model in models])
        row("  of noise", [mean(model, role, "noise_rank_ratio") for model in models])
    row(
        "Cosine (down)",
        [f"{model.cosine:.3f} ± {sum(x.cosine.std for x in model.layers) / len(model.layers):.3f}" for model in models],
    )
    row("Compressible", [format_compressible(model) for model in models])
    return Group(Text("MOE TYPE COMPARISON", style="bold"), table)


def _heading(title: str, report: Identity, *rows: tuple[str, Any]) -> list[Any]:
    from rich.text import Text

    name = report.model + (f" @ {report.revision[:12]}" if report.revision else "")
    kind = f"{report.family} ({report.model_type or 'unknown type'}, {report.experts} experts, {report.storage})"
    return [Text(title, style="bold"), _grid([("Model", name), ("Family", kind), *rows])]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


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
    blocks = _heading("MOE OVERLAY", overlay, ("Ranks", overlay.rule))
    return Group(*blocks, _table(headings, rows), _grid([*_byte_rows(overlay), *(("Note", n) for n in overlay.notes)]))


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
    blocks = _heading("MOE OVERLAY VERIFICATION", report, ("Ranks", report.rule), ("Result", verdict))
    rounding = (
        f"{percent(sum(layer.rounding_error[bits] for layer in report.layers) / len(report.layers))} at {bits} bits"
        for bits in report.layers[0].rounding_error
    )
    notes = [
        ("Inputs", f"{report.inputs} seeded vectors (seed {report.seed}), activation {report.activation}"),
        ("Rounding", f"the mean output error of plain quantisation is {', '.join(rounding)}"),
    ]
    return Group(*blocks, _table(headings, rows), _grid([*notes, *(("Note", note) for note in report.notes)]))


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
    blocks = _heading("MOE OVERLAY ESTIMATE", report, ("Ranks", report.rule))
    return Group(
        *blocks,
        _table(["Layer", *(f"{role} rank" for role in roles), "Error", "Ratio", "How"], rows),
        _grid(
            [
                *_byte_rows(report),
                ("Error", f"{percent(report.weight_error)} of the weights"),
                (
                    "Same bytes",
                    f"weight errors and bytes of layers {', '.join(map(str, report.layers_measured))}",
                ),
            ]
        ),
        _table(["As", "Bytes", "Quantised", "Overlay", "Plain SVD"], same),
        _grid([("Advice", report.advice), *(("Note", note) for note in report.notes)]),
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
    blocks = _heading("MOE OVERLAY WRITTEN", report, ("Ranks", report.rule), ("Folder", report.folder))
    rest = [("Model", size), *(("Note", note) for note in report.notes)]
    return Group(*blocks, _table(headings, rows), _grid(rest))


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
    return Group(Text("MOE OVERLAY EXPORTED", style="bold"), _grid(rows))


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
    table = _table(["", "Original", "Overlay", "Difference"], rows)
    return Group(Text("MOE OVERLAY EVALUATION", style="bold"), _grid(heading), table)


def to_html(renderable: Any) -> str:
    """A report as the HTML that a notebook shows."""
    from io import StringIO

    from rich.console import Console

    console = Console(record=True, width=100, file=StringIO(), force_jupyter=False)
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format='<pre style="line-height:1.3">{code}</pre>')


ONE_LINE = 160  # columns from which a survey shows a model on a line


def render_survey(survey: MoETypeSurvey, width: int) -> "RenderableType":
    """A row a model, with more of it below its name where a line has no room; then those that failed."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    is_wide = width >= ONE_LINE
    answers = [row.answer for row in survey.rows if row.answer]
    is_full = any(answer.rank_ratio is not None for answer in answers)
    columns = ["Model", "Type", *(["Rank", "Cosine"] if is_full else []), "Found"]
    columns += ["Parent"] if any(answer.parent_kept is not None for answer in answers) else []
    if is_wide:
        stated = ["Stated"] if any(row.stated for row in survey.rows) else []
        columns[1:2] = ["Family", "Experts", "Storage", *stated, "Type", "Conf.", "Kind"]
        columns += [*(["Overlay", "Pays"] if is_full else []), "Read", "Time"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for heading in columns:
        is_text = heading in ("Model", "Family", "Storage", "Stated", "Type", "Kind")
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold", no_wrap=heading == "Type")
    for row in survey.rows:
        if row.answer:
            cells = _survey_cells(row, row.answer)
            if not is_wide:
                cells["Model"].append(_describe(row, row.answer), style="dim")
                cells["Type"].append(f"\n{cells['Conf.']}", style="default")
            table.add_row(*(cells[heading] for heading in columns))
    legend = "Rank: of the gate deltas (up without a gate), over the greatest possible. " if is_full else ""
    legend += "Found: neurons in another expert"
    legend += ", closely if the analysis was quick" if any(answer.reach is not None for answer in answers) else ""
    legend += ", Parent: in the dense model." if "Parent" in columns else "."
    blocks: list[Any] = [Text("MOE TYPE SURVEY", style="bold"), Text(_count_types(survey))]
    if answers:
        blocks += [table, Text(legend, style="dim")]
    if failed := [row.error for row in survey.rows if row.error]:
        errors = Table.grid(padding=(0, 2))
        errors.add_column(justify="right", no_wrap=True)
        errors.add_column(overflow="fold")
        for error in failed:
            said = f"{error.message} ({error.hint})" if error.hint else error.message
            errors.add_row(Text(str(error.code), style="bold red"), Text(said))
        blocks += [Text("\nFailed, with their exit codes", style="bold"), errors]
    return Group(*blocks)


def _survey_cells(row: SurveyRow, answer: SurveyAnswer) -> dict[str, "Text"]:
    from rich.text import Text

    cells = {
        "Model": answer.model + (f" @ {answer.revision[:12]}" if answer.revision else ""),
        "Family": answer.family,
        "Experts": str(answer.experts),
        "Storage": answer.storage,
        "Stated": row.stated or "",
        "Type": answer.type,
        "Conf.": "" if answer.type == "UNDETERMINED" else f"{answer.confidence:.0%}",
        "Kind": answer.kind or "",
        "Rank": "" if answer.rank_ratio is None else whole_percent(answer.rank_ratio),
        "Cosine": "" if answer.cosine is None else f"{answer.cosine:.3f}",
        "Found": whole_percent(_found(answer)),
        "Parent": "" if answer.parent_kept is None else whole_percent(answer.parent_kept),
        "Overlay": "" if answer.overlay_ratio is None else f"{answer.overlay_ratio:.1f}x",
        "Pays": {None: "", True: "yes", False: "no"}[answer.compressible],
        "Read": format_bytes(answer.cost.bytes_read),
        "Time": f"{answer.cost.seconds:.1f} s",
    }
    return {key: Text(text, style=_STYLES[answer.type] if key == "Type" else "") for key, text in cells.items()}


def _found(answer: SurveyAnswer) -> float:
    """The share of the neurons that are found again; closely, where only a part of them was looked at."""
    return answer.kept if answer.reach is None else answer.close


def _describe(row: SurveyRow, answer: SurveyAnswer) -> str:
    """What 80 columns have no room for, in lines below the model's name."""
    lines = [f"{answer.family}, {answer.experts} experts, {answer.storage}"]
    lines += [f"stated {row.stated}"] if row.stated else []
    lines += [answer.kind] if answer.kind else []
    overlay = ""
    if answer.overlay_ratio is not None:
        overlay = f"overlay {answer.overlay_ratio:.1f}x{' pays' if answer.compressible else ''}; "
    lines += [f"{overlay}{format_bytes(answer.cost.bytes_read)} in {answer.cost.seconds:.1f} s"]
    return "".join(f"\n{line}" for line in lines)


def _count_types(survey: MoETypeSurvey) -> str:
    """For instance "5 models: 3 UPCYCLED, 1 NATIVE, 1 failed"."""
    found = [row.answer.type if row.answer else "failed" for row in survey.rows]
    counts = (f"{found.count(what)} {what}" for what in [*_STYLES, "failed"] if what in found)
    return f"{_count(len(found), 'model')}: {', '.join(counts)}"


def render_survey_summary(survey: MoETypeSurvey) -> "RenderableType":
    """A row a type: how many models, and from where to where their figures go."""
    from rich.console import Group
    from rich.text import Text

    def span(figures: Iterable[float | None], form: str, unit: str = "", scale: int = 1) -> str:
        values = [scale * figure for figure in figures if figure is not None]
        if not values:
            return ""
        low, high = (form.format(round(value, 2) + 0.0) for value in (min(values), max(values)))  # no -0.00
        return (low if low == high else f"{low} to {high}") + unit

    rows = []
    for origin in _STYLES:
        if found := [row.answer for row in survey.rows if row.answer and row.answer.type == origin]:
            rows.append(
                [
                    origin,
                    str(len(found)),
                    span([answer.rank_ratio for answer in found], "{:.0f}", " %", 100),
                    span([answer.cosine for answer in found], "{:.2f}"),
                    span([_found(answer) for answer in found], "{:.0f}", " %", 100),
                    span([answer.overlay_ratio for answer in found], "{:.1f}", "x"),
                ]
            )
    headings = ["Type", "Models", "Rank", "Cosine", "Found", "Overlay"]
    used = [place for place in range(len(headings)) if any(row[place] for row in rows)]
    table = _table([headings[place] for place in used], [[row[place] for place in used] for row in rows])
    return Group(Text("\nBy type", style="bold"), table)


def render_survey_plan(plan: MoESurveyPlan) -> "RenderableType":
    """A row a model: what is stated of it, and the bytes of its experts."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("Model", footer=f"{_count(len(plan.models), 'model')}", overflow="fold")
    table.add_column("Stated")
    table.add_column("One layer", footer=format_bytes(plan.layer_bytes), justify="right", no_wrap=True)
    table.add_column("All layers", footer=format_bytes(plan.stored_bytes), justify="right", no_wrap=True)
    for one in plan.models:
        costs = (one.layer_bytes, one.stored_bytes)
        figures = ("?" if cost is None else format_bytes(cost) for cost in costs)
        table.add_row(Text(one.request.model), Text(one.stated or ""), *figures)
    unknown = sum(one.layer_bytes is None for one in plan.models)
    note = (
        [Text(f"?: the list gives no shape for {_count(unknown, 'model')}; the sums are without.")] if unknown else []
    )
    return Group(Text("MOE SURVEY PLAN", style="bold"), Text("Bytes of the experts as stored"), table, *note)
