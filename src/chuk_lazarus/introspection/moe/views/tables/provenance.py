"""Verdicts and their evidence, as tables."""

from typing import TYPE_CHECKING

from ...reports import MoEQuickAnalysis, MoETypeAnalysis, MoETypeComparison
from ...text import format_bytes, percent
from .. import facts
from ..words import (
    MOST_GROUPS,
    RATED,
    caution,
    describe_groups,
    describe_sample,
    explain,
    explain_full_analysis,
    explain_further,
    explain_parent,
    explain_quick,
    explain_rule,
    explain_saving,
    format_cosine,
    format_low_rank,
    list_numbers,
)
from .grid import (
    LEFT,
    ORIGIN_STYLES,
    WORDS,
    Fact,
    draw_facts,
    draw_note,
    draw_table,
    identity_facts,
    paint,
    paint_verdict,
    stack,
)

if TYPE_CHECKING:
    from rich.console import RenderableType


def render_analysis(analysis: MoETypeAnalysis) -> "RenderableType":
    """The analysis as a person reads it: verdict, evidence per layer, overlay."""
    many = len(analysis.layers) > 1
    verdict: list[Fact] = [
        *identity_facts(analysis),
        ("Layers" if many else "Layer", list_numbers([layer.layer for layer in analysis.layers])),
        ("Sample", describe_sample(analysis)),
        ("Type", paint_verdict(analysis)),
        ("Why", explain(analysis)),
        *([("Further", explain_further(analysis))] if analysis.further_layers else []),
        *([("Parent", explain_parent(analysis))] if analysis.parent else []),
        *([("Groups", groups)] if (groups := describe_groups(analysis, MOST_GROUPS)) else []),
        *([("Caveat", caveat)] if (caveat := caution(analysis)) else []),
    ]
    stored, overlay = format_bytes(analysis.stored_bytes), format_bytes(analysis.overlay_bytes)
    saving = explain_saving(analysis)
    overlay_facts: list[Fact] = [
        *([("Smaller?", saving)] if saving else []),
        ("Low rank", f"{format_low_rank(analysis)}: {overlay} for {stored} as stored, at 95 % of the delta energy"),
    ]
    if many:
        layers = facts.list_layers_briefly(analysis)
        table = draw_table(
            layers.headings,
            layers.rows,
            {"Type": LEFT},
            layers.footers,
            leave=("Ratio", "Delta", "Noise", "up", "Cosine", "down"),
            caption=layers.caption,
        )
    else:
        ranks = facts.list_ranks_briefly(analysis.layers[0])
        table = draw_table(
            ranks.headings, ranks.rows, {"Role": LEFT}, leave=("Bound", "aligned", "vs noise"), caption=ranks.caption
        )
        cosine = analysis.layers[0].cosine
        by_role = (("gate", cosine.gate), ("up", cosine.up))
        others = ", ".join(f"{role} {value:.3f}" for role, value in by_role if value is not None)
        overlay_facts.insert(0, ("Cosine", f"{format_cosine(cosine)} (down), {others}"))
    parts = [draw_facts(verdict), *([_draw_parents(analysis)] if analysis.parent else []), table]
    return stack("MOE TYPE ANALYSIS", *parts, draw_facts(overlay_facts, analysis.notes))


def _draw_parents(analysis: MoETypeAnalysis) -> "RenderableType":
    """A row for each layer: where in the parent it comes from."""
    parents = facts.list_parents(analysis)
    return draw_table(
        parents.headings,
        parents.rows,
        {"From": {"wraps": True}},
        leave=("Searched", "Place", "Like"),
        caption=parents.caption,
    )


def render_quick(report: MoEQuickAnalysis) -> "RenderableType":
    """Verdict, what was read for it, and a row for each layer."""
    verdict = [*identity_facts(report), ("Type", paint_verdict(report)), ("Why", explain_quick(report))]
    rows = [
        [
            str(layer.layer),
            f"{len(layer.experts)} of {report.experts}",
            f"{layer.neurons:,}",
            percent(layer.part),
            percent(layer.reach),
            percent(layer.shared),
            percent(layer.strong),
            percent(layer.in_place),
        ]
        for layer in report.layers
    ]
    headings = ["Layer", "Experts", "Neurons", "Part", "Reach", "Shared", "Strongly", "In place"]
    caption = (
        "Part: the share of an expert's gate and up that was read; Reach: the share of neurons that shuffled copies "
        "could match in it; Shared: those with a close match in another expert; Strongly: with a cosine of 0.8 or "
        "more; In place: matched at the same position"
    )
    table = draw_table(headings, rows, leave=("In place", "Part", "Neurons"), caption=caption)
    read = f"{format_bytes(report.weight_bytes)} of the experts' {format_bytes(report.stored_bytes)}"
    cost = [("Read", f"{read}, {100 * report.share:.2g} %"), ("Full", explain_full_analysis(report))]
    return stack("MOE TYPE, QUICKLY", draw_facts(verdict), table, draw_facts(cost, report.notes))


def render_details(analysis: MoETypeAnalysis, title: str = "MORE") -> "RenderableType":
    """What an older rule says, all groups, and the 95 % ranks of the sampled experts, a row a projection of a layer."""
    ranks = facts.list_expert_ranks_briefly(analysis)
    columns = {"Projection": LEFT, "Experts": WORDS}
    groups = describe_groups(analysis)
    more: list[Fact] = [("By rank", explain_rule(analysis)), *([("Groups", groups)] if groups else [])]
    table = draw_table(ranks.headings, ranks.rows, columns, leave=("Deviation", "Least", "Most"), title=ranks.caption)
    return stack(f"\n{title}", draw_facts(more), table)


def render_comparison_details(comparison: MoETypeComparison) -> "RenderableType":
    """The details of each model, one below the other."""
    from rich.console import Group

    return Group(*(render_details(model, f"MORE: {model.model}") for model in comparison.models))


def render_comparison(comparison: MoETypeComparison) -> "RenderableType":
    """A row for each figure, a column for each model."""
    evidence = facts.compare_briefly(comparison.models)
    _, *rows = evidence.rows
    columns = {**dict.fromkeys(evidence.headings, WORDS), evidence.headings[0]: LEFT}
    types = [paint(model.type, ORIGIN_STYLES[model.type]) for model in comparison.models]
    table = draw_table(evidence.headings, [["Type", *types], *rows], columns)
    notes = [f"{model.model}: {note}" for model in comparison.models for note in model.notes]
    below = [draw_facts([], notes)] if notes else []
    return stack("MOE TYPE COMPARISON", table, draw_note(f"*: {RATED}."), *below)
