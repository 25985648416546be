"""Results in words: the names of models and layers, figures with their units, verdicts in a sentence."""

from collections.abc import Sequence
from math import ceil
from statistics import fmean

from ..provenance.classifier import LINEAGE, QUICK, is_alike_in_place
from ..reports import Cosine, Identity, MoEQuickAnalysis, MoETypeAnalysis, Projection
from ..text import format_bytes, format_ranges, percent


def identify(report: Identity) -> str:
    """For instance "org/name @ 0123456789ab"."""
    return report.model + (f" @ {report.revision[:12]}" if report.revision else "")


def describe_family(report: Identity) -> str:
    """For instance "mixtral (mixtral, 8 experts, bf16)": the layout's name, and what the experts are."""
    return f"{report.family} ({report.model_type or 'unknown type'}, {report.experts} experts, {report.storage})"


def name_layers(numbers: Sequence[int]) -> str:
    """For instance "layer 3" or "layers 0-2, 5"."""
    return f"layer{'' if len(numbers) == 1 else 's'} {format_ranges(numbers)}"


def count_noun(number: int, noun: str) -> str:
    """For instance "1 layer" or "3 layers"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def format_confidence(report: MoETypeAnalysis | MoEQuickAnalysis) -> str:
    """What follows a verdict, for instance " (93% confidence)"; nothing where there is none."""
    return "" if report.type == "UNDETERMINED" else f" ({report.confidence:.0%} confidence)"


def format_rank(projection: Projection) -> str:
    """For instance "1408 / 2880 (48.9 %)"."""
    return f"{projection.rank['0.95']:.0f} / {projection.max_rank} ({percent(projection.rank_ratio)})"


def format_cosine(cosine: Cosine) -> str:
    """For instance "0.418 ± 0.163"."""
    return format_spread(cosine.mean, cosine.std)


def format_spread(mean: float, deviation: float) -> str:
    """For instance "0.418 ± 0.163"."""
    return f"{mean:.3f} ± {deviation:.3f}"


def format_ratio(ratio: float) -> str:
    """For instance "7.9x"."""
    return f"{ratio:.1f}x"


def format_compressible(analysis: MoETypeAnalysis) -> str:
    """For instance "yes (overlay 7.9x)"."""
    return f"{'yes' if analysis.compressible else 'no'} (overlay {format_ratio(analysis.overlay_ratio)})"


def explain(analysis: MoETypeAnalysis) -> str:
    """One sentence on why the verdict is what it is."""
    neurons = sum(layer.lineage.neurons for layer in analysis.layers)
    kept, close, chance = (analysis.mean_over_layers(figure) for figure in ("kept", "close", "chance"))
    evidence = (
        f"{percent(kept)} of {neurons:,} neurons are found again in another expert ({percent(close)} closely), "
        f"{percent(chance)} by chance"
    )
    match analysis.type:
        case "UPCYCLED":
            cosine, permuted = (analysis.mean_over_layers(figure) for figure in ("cosine", "permuted_cosine"))
            if close < LINEAGE.close_upcycled and is_alike_in_place([layer.lineage for layer in analysis.layers]):
                evidence += f"; neurons at the same position have a cosine of {cosine:.3f}, {permuted:.3f} by chance"
            return f"{evidence}: {analysis.kind}."
        case "NATIVE":
            return f"{evidence}: each expert has neurons of its own, or all of them were drawn anew."
    if chance > LINEAGE.chance:
        return f"{evidence}: the experts have too few neurons to judge by."
    return f"{evidence}: too many for independent experts, and too few for copies."


def explain_quick(report: MoEQuickAnalysis) -> str:
    """One sentence on why the quick verdict is what it is."""
    neurons = sum(layer.neurons for layer in report.layers)
    evidence = (
        f"{percent(report.close)} of {neurons:,} neurons are found again, closely, in the parts that were read; of "
        f"shuffled copies {percent(report.reach)} would be"
    )
    match report.type:
        case "UPCYCLED":
            return f"{evidence}: {report.kind}."
        case "NATIVE":
            return f"{evidence}: each expert has neurons of its own, or all of them were drawn anew."
    if report.reach < QUICK.reach and report.close < QUICK.least:
        return f"{evidence}: too few to call that NATIVE; {_suggest_budget(report)}."
    return f"{evidence}: too few to tell."


def _suggest_budget(report: MoEQuickAnalysis) -> str:
    """The budget whose reach a NATIVE verdict needs: n of N neurons of E experts reach 1 - (1 - n / N)^(E - 1)."""
    others = min(len(layer.experts) for layer in report.layers) - 1
    part = min(layer.part for layer in report.layers)
    wanted = report.weight_bytes * (1 - (1 - QUICK.reach) ** (1 / others)) / part
    return f"--budget {ceil(1.05 * wanted / 1e6)}MB would do"


def explain_full_analysis(report: MoEQuickAnalysis) -> str:
    """What a full analysis of one layer would cost, and how much surer it would be."""
    gain = f"{report.full_confidence:.0%} confidence"
    if report.full_confidence == report.confidence:
        gain = "no surer by the rates measured, but with ranks and an overlay"
    return f"without --quick, one layer: {format_bytes(report.full_bytes)}, {gain}"


def explain_rule(analysis: MoETypeAnalysis) -> str:
    """What the documented rule says, with the reason where it differs from the verdict."""
    rule = analysis.documented_rule
    figures = f"{analysis.rank_projection} rank {percent(analysis.rank_ratio)}, cosine {analysis.cosine:.3f}"
    text = f"the documented rule says {rule.type} ({rule.confidence:.0%}; {figures})"
    return f"{text}: {rule.why}" if rule.why else text


def explain_parent(analysis: MoETypeAnalysis) -> str:
    """How much of the experts comes from the dense parent."""
    matches = [layer.lineage.parent for layer in analysis.layers if layer.lineage.parent]
    kept, chance, cosine, in_place = (
        fmean(getattr(match, figure) for match in matches) for figure in ("kept", "chance", "cosine", "in_place")
    )
    text = f"{percent(kept)} of the neurons are found in {analysis.parent}, {percent(chance)} by chance"
    if kept - chance < LINEAGE.native:
        return text
    return f"{text}; cosine {cosine:.2f}, {percent(in_place)} of them at their own position"
