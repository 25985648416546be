"""Results in words: figures with their units, verdicts in a sentence."""

from math import ceil

from ..provenance.classifier import LINEAGE, QUICK, is_alike_in_place
from ..reports import Cosine, MoEQuickAnalysis, MoETypeAnalysis, Projection
from ..text import format_bytes, percent


def format_rank(projection: Projection) -> str:
    """For instance "1408 / 2880 (48.9 %)"."""
    return f"{projection.rank['0.95']:.0f} / {projection.max_rank} ({percent(projection.rank_ratio)})"


def format_cosine(cosine: Cosine) -> str:
    """For instance "0.418 ± 0.163"."""
    return f"{cosine.mean:.3f} ± {cosine.std:.3f}"


def format_compressible(analysis: MoETypeAnalysis) -> str:
    """For instance "yes (overlay 7.9x)"."""
    return f"{'yes' if analysis.compressible else 'no'} (overlay {analysis.overlay_ratio:.1f}x)"


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
        return f"{evidence}: too few to call that NATIVE; {_enough(report)}."
    return f"{evidence}: too few to tell."


def _enough(report: MoEQuickAnalysis) -> str:
    """The budget whose reach a NATIVE verdict needs: n out of N neurons of E experts reach 1 - (1 - n / N)^(E - 1)."""
    others = min(len(layer.experts) for layer in report.layers) - 1
    part = min(layer.part for layer in report.layers)
    wanted = report.weight_bytes * (1 - (1 - QUICK.reach) ** (1 / others)) / part
    return f"--budget {ceil(1.05 * wanted / 1e6)}MB would do"


def explain_surer(report: MoEQuickAnalysis) -> str:
    """What a full analysis of one layer would cost, and how much surer it would be."""
    full, same = f"{report.full_confidence:.0%} confidence", report.full_confidence == report.confidence
    what = "no surer by the rates measured, but with ranks and an overlay" if same else full
    return f"without --quick, one layer: {format_bytes(report.full_bytes)}, {what}"


def explain_rule(analysis: MoETypeAnalysis) -> str:
    """What the documented rule says, and why it may say something else."""
    rule = analysis.documented_rule
    figures = f"{analysis.rank_projection} rank {percent(analysis.rank_ratio)}, cosine {analysis.cosine:.3f}"
    said = f"the documented rule says {rule.type} ({rule.confidence:.0%}; {figures})"
    return f"{said}: {rule.why}" if rule.why else said


def explain_parent(analysis: MoETypeAnalysis) -> str:
    """How much of the experts comes from the dense parent."""
    found = [layer.lineage.parent for layer in analysis.layers if layer.lineage.parent]
    kept, chance, cosine, place = (
        sum(getattr(one, figure) for one in found) / len(found) for figure in ("kept", "chance", "cosine", "in_place")
    )
    share = f"{percent(kept)} of the neurons are found in {analysis.parent}, {percent(chance)} by chance"
    if kept - chance < LINEAGE.native:
        return share
    return f"{share}; cosine {cosine:.2f}, {percent(place)} of them at their own position"
