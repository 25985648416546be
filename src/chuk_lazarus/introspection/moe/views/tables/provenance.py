"""Verdicts and their evidence, as tables."""

from collections.abc import Callable, Sequence
from statistics import mean, pstdev
from typing import TYPE_CHECKING, Any

from ...reports import LayerAnalysis, MoEQuickAnalysis, MoETypeAnalysis, MoETypeComparison
from ...text import format_bytes, percent, whole_percent
from ..words import (
    explain,
    explain_parent,
    explain_quick,
    explain_rule,
    explain_surer,
    format_compressible,
    format_cosine,
    format_rank,
)
from .grid import VERDICT_STYLES, fact_grid, heading_blocks, number_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def render_analysis(analysis: MoETypeAnalysis) -> "RenderableType":
    """The analysis as a person reads it: verdict, evidence per layer, overlay."""
    from rich.console import Group
    from rich.text import Text

    confidence = "" if analysis.type == "UNDETERMINED" else f" ({analysis.confidence:.0%} confidence)"
    verdict = Text.assemble((analysis.type, VERDICT_STYLES[analysis.type]), confidence)
    name = analysis.model + (f" @ {analysis.revision[:12]}" if analysis.revision else "")
    kind = f"{analysis.model_type or 'unknown type'}, {analysis.experts} experts, {analysis.storage}"
    many = len(analysis.layers) > 1
    blocks: list[Any] = [Text("MOE TYPE ANALYSIS", style="bold")]
    blocks.append(
        fact_grid(
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
    blocks.append(fact_grid(rows))
    return Group(*blocks)


def render_quick(report: MoEQuickAnalysis) -> "RenderableType":
    """Verdict, what was read for it, and a row per layer."""
    from rich.console import Group
    from rich.text import Text

    confidence = "" if report.type == "UNDETERMINED" else f" ({report.confidence:.0%} confidence)"
    verdict = Text.assemble((report.type, VERDICT_STYLES[report.type]), confidence)
    blocks = heading_blocks("MOE TYPE, QUICKLY", report, ("Type", verdict), ("Why", explain_quick(report)))
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
    table = number_table(["Layer", "Neurons", "Part", "Reach", "Found closely", "In place"], rows)
    rest = [
        (
            "Read",
            f"{format_bytes(report.weight_bytes)} of the experts' {format_bytes(report.stored_bytes)}, "
            f"{100 * report.share:.2g} %",
        ),
        ("Surer", explain_surer(report)),
        *(("Note", note) for note in report.notes),
    ]
    return Group(*blocks, table, fact_grid(rest))


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
    row("Type", [Text(model.type, style=VERDICT_STYLES[model.type]) for model in models])
    row("Confidence", [f"{model.confidence:.0%}" for model in models])
    row("Kind", [model.kind or "" for model in models])
    row("Neurons found", [percent(model.mean_over_layers("kept")) for model in models])
    row("  closely", [percent(model.mean_over_layers("close")) for model in models])
    row("  by chance", [percent(model.mean_over_layers("chance")) for model in models])
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
