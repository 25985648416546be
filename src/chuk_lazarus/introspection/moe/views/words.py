"""Results in words: the names of models and layers, figures with their units, verdicts in a sentence."""

import math
from collections.abc import Sequence
from statistics import fmean

from ..numerics.rates import PAYS, QUALITY
from ..provenance.classifier import (
    LINEAGE,
    QUICK,
    classify_by_neurons,
    describe_components,
    has_adapter,
    has_its_attention,
    has_shared,
    has_strong,
    is_alike_in_place,
    is_from_parent,
    looks_untrained,
)
from ..reports import (
    Cosine,
    Identity,
    MoEOverlayEstimate,
    MoEQuickAnalysis,
    MoETypeAnalysis,
    ParentMatch,
    Projection,
    QuickLayer,
    SurveyAnswer,
)
from ..terms import Origin
from ..text import format_bytes, format_groups, format_ranges, percent, whole_percent

MOST_LISTED = 8  # numbers that are listed one by one
MOST_MOVED = 8  # layers that a sentence names
MOST_GROUPS = 8  # groups of experts that it names
LOW_RANK = 0.5  # the rank vs noise below which a sentence says that deltas have a low rank
ALIKE = 0.5  # the cosine from which on a picture shows experts as alike


def identify(report: Identity) -> str:
    """For instance "org/name @ 0123456789ab"."""
    return report.model + (f" @ {report.revision[:12]}" if report.revision else "")


def describe_family(report: Identity) -> str:
    """For instance "mixtral (mixtral, 8 experts, bf16)": the layout's name, and what the experts are."""
    count = " to ".join(map(str, report.experts_range or [report.experts]))
    return f"{report.family} ({report.model_type or 'unknown type'}, {count} experts, {report.storage})"


def name_layers(numbers: Sequence[int]) -> str:
    """For instance "layer 3" or "layers 0-2, 5"."""
    return f"layer{'' if len(numbers) == 1 else 's'} {format_ranges(numbers)}"


def list_numbers(numbers: Sequence[int]) -> str:
    """For instance "0, 5", or, of many, "0-47"."""
    return ", ".join(map(str, numbers)) if len(numbers) <= MOST_LISTED else format_ranges(numbers)


def count_noun(number: int, noun: str) -> str:
    """For instance "1 layer" or "3 layers"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


OUTCOMES = ("UPCYCLED", "NATIVE", "UNDETERMINED", "failed")


def count_outcomes(outcomes: Sequence[str]) -> str:
    """For instance "5 models: 3 UPCYCLED, 1 NATIVE, 1 failed"."""
    counts = (f"{outcomes.count(outcome)} {outcome}" for outcome in OUTCOMES if outcome in outcomes)
    return f"{count_noun(len(outcomes), 'model')}: {', '.join(counts)}"


NOTHING_PAYS = "Not by a shared base: the experts have too little in common. Use plain quantisation."
RATED = "as measured on tiny models"
"""What stands beside every confidence: on which models it was right so often."""


def format_confidence(report: MoETypeAnalysis | MoEQuickAnalysis | SurveyAnswer) -> str:
    """What follows a verdict, for instance " (93% confidence, as measured on tiny models)"; nothing where there is
    none."""
    return "" if report.type == "UNDETERMINED" else f" ({report.confidence:.0%} confidence, {RATED})"


def format_rank(projection: Projection) -> str:
    """For instance "1408 / 2880 (48.9 %)"."""
    return f"{projection.rank['0.95']:.0f} / {projection.max_rank} ({percent(projection.rank_ratio)})"


def format_cosine(cosine: Cosine) -> str:
    """For instance "0.418 ± 0.163"."""
    return format_spread(cosine.mean, cosine.std)


def format_spread(mean: float, deviation: float) -> str:
    """For instance "0.418 ± 0.163"."""
    return f"{mean:.3f} ± {deviation:.3f}"


def format_likeness(likeness: float) -> str:
    """For instance "0.98"; about 0 is "0.00" from both sides."""
    return f"{round(likeness, 2) + 0.0:.2f}"


def format_ratio(ratio: float) -> str:
    """For instance "7.9x"."""
    return f"{ratio:.1f}x"


def compare_size(ratio: float, other: str) -> str:
    """For instance "7.9x smaller than the file", or "no smaller than the file"."""
    return f"{format_ratio(ratio)} smaller than {other}" if ratio >= 1.05 else f"no smaller than {other}"


def format_low_rank(analysis: MoETypeAnalysis) -> str:
    """What a low-rank overlay saves, for instance "7.9x smaller"."""
    return f"{format_ratio(analysis.overlay_ratio)} smaller" if analysis.compressible else "saves nothing"


def format_bits(bits: float | None) -> str:
    """For instance "2.1"; nothing is saved by less than nothing, and what is not known is a dash."""
    return "–" if bits is None or math.isnan(bits) else f"{round(bits, 1) + 0.0:.1f}"


def explain_saving(report: MoETypeAnalysis | MoEOverlayEstimate) -> str:
    """Whether a shared base makes the experts of all MoE layers smaller, in a sentence; "" if it was not measured.

    The bytes of layers that were not analysed are taken from those that were.
    """
    if report.bits_saved is None:
        return ""
    if report.bits_saved < PAYS:
        return NOTHING_PAYS
    weights = report.original_bytes / 2
    if isinstance(report, MoETypeAnalysis):
        weights *= len(report.moe_layers) / len(report.layers)
    layers = f"all {len(report.moe_layers)} layers take" if len(report.moe_layers) > 1 else "the layer takes"
    said = _say_saving(report.bits_saved, weights, layers)
    return f"{said} Because the deltas have a low rank, more can be saved." if _is_low_rank(report) else said


def _is_low_rank(report: MoETypeAnalysis | MoEOverlayEstimate) -> bool:
    """Whether low-rank deltas save more than the law for Gaussian ones says."""
    if isinstance(report, MoETypeAnalysis):
        return fmean(one.noise_rank_ratio for layer in report.layers for one in layer.projections.values()) < LOW_RANK
    return any(row.coded is not None and row.coded < row.bound for row in report.ladder)


def _say_saving(saved: float, weights: float, experts_take: str) -> str:
    """The bytes of so many weights with a shared base and without, at equal error."""
    bits = QUALITY - saved
    needed, plain = (format_bytes(weights * each / 8) for each in (bits, QUALITY))
    return (
        f"Yes: a shared base saves about {saved:.1f} bits per weight at the same error. At {bits:.1f} bits instead of "
        f"{QUALITY}, {experts_take} {needed} instead of {plain}."
    )


def explain_saving_of(answer: SurveyAnswer) -> str:
    """The same of a survey's answer, which a quick analysis leaves open."""
    if answer.bits_saved is None or answer.parameters is None:
        return "Not measured; an analysis without --quick tells."
    return (
        NOTHING_PAYS
        if answer.bits_saved < PAYS
        else _say_saving(answer.bits_saved, answer.parameters, "all experts take")
    )


def explain(analysis: MoETypeAnalysis) -> str:
    """One sentence on why the verdict is what it is."""
    lineages = [layer.lineage for layer in analysis.layers]
    sharing = [lineage.sharing for lineage in lineages]
    shared, strong = fmean(layer.shared for layer in sharing), fmean(layer.strong for layer in sharing)
    neurons = sum(layer.neurons for layer in sharing)
    alike_in_place, twins = is_alike_in_place(lineages), [layer.twins for layer in sharing if layer.twins]
    without_down = fmean(layer.without_down or 0.0 for layer in sharing)
    evidence = _describe_sharing(shared, strong, neurons)
    if shared < LINEAGE.upcycled <= without_down:
        evidence += f"; by gate and up alone, {percent(without_down)}"
    if analysis.kind and analysis.kind.startswith("identical copies"):
        return f"The experts have the same weights: {analysis.kind}."
    if alike_in_place and shared < LINEAGE.upcycled:
        cosine, permuted = (analysis.mean_over_layers(figure) for figure in ("cosine", "permuted_cosine"))
        evidence += f"; neurons at the same position have a cosine of {cosine:.3f}, {permuted:.3f} by chance"
    projections = [layer.projections for layer in analysis.layers]
    from_parent, _, how = (analysis.kind or "").partition("from this parent, ")
    if how and not from_parent:
        return f"It was made from {analysis.parent}: {how}. Without this parent, the evidence is: {evidence}."
    alone = classify_by_neurons(lineages, projections)
    if analysis.further_layers and analysis.type != alone.origin:
        where = name_layers([layer.layer for layer in analysis.layers])
        return f"The further layers below decide. {where.capitalize()} alone would be {alone.origin}: {evidence}."
    match analysis.type:
        case "UPCYCLED":
            return f"{evidence}. The experts are {analysis.kind or 'copies'}."
        case "NATIVE":
            if alike_in_place and not twins:
                return f"{evidence}. {_describe_common(analysis)}; beyond that, each expert has its own neurons."
            return f"{evidence}. Each expert has its own neurons."
    return f"{evidence}{_explain_doubt(analysis)}"


LOOK_ALIKES: dict[Origin, str] = {
    "NATIVE": "Experts that were all re-initialised look the same, and so do slices of a dense layer. With --parent, "
    "these can be told apart.",
    "UPCYCLED": "A native model that was grown by duplicating its experts looks the same.",
}
"""What else looks like each verdict, unless a parent is named."""


def explain_answer(answer: SurveyAnswer) -> str:
    """One sentence on why a survey's verdict is what it is, by what its row has."""
    if answer.shared is None or answer.strong is None:
        return f"{answer.kind}." if answer.kind else ""
    text = _describe_shares(answer.shared, answer.strong)
    if answer.reach is not None:
        text = f"{_in_parts(text)}. Of shuffled copies, up to {percent(answer.reach)} would"
    return f"{text}. The experts are {answer.kind}." if answer.kind else f"{text}."


def caution(analysis: MoETypeAnalysis) -> str:
    """What else looks like this, and what in the evidence seems to contradict the verdict; "" where nothing does."""
    layers = analysis.layers
    said = []
    noise = [looks_untrained(layer.projections, layer.lineage.sharing, analysis.experts) for layer in layers]
    if analysis.type != "UPCYCLED" and all(noise):
        said.append("The experts look like random numbers: the model may be untrained.")
    if not analysis.parent and analysis.type in LOOK_ALIKES:
        said.append(LOOK_ALIKES[analysis.type])
    if others := [layer for layer in layers if layer.type != analysis.type]:
        named = "; ".join(
            f"{name_layers([layer.layer for layer in others if layer.type == origin])} {origin}"
            for origin in dict.fromkeys(layer.type for layer in others)
        )
        said.append(f"Not every layer alone has this verdict: {named}.")
    if analysis.type == "NATIVE":
        said += _explain_blocks(analysis)
    return " ".join(said)


def _explain_blocks(analysis: MoETypeAnalysis) -> list[str]:
    """What a picture of native experts may show bright: pairs that are alike."""
    twins = {layer.layer: layer.lineage.sharing.twins for layer in analysis.layers if layer.lineage.sharing.twins}
    if twins:
        named = "; ".join(f"layer {number}: {_list_groups(groups)}" for number, groups in twins.items())
        return [f"Some experts are copies of each other: {named}."]
    pairs = [(i, j) for i in range(analysis.experts) for j in range(i)]
    shared = [row for layer in analysis.layers for row in layer.lineage.sharing.pairs]
    most = max((share for row in shared for share in row), default=0.0)
    cosines = [layer.similarity.cosine for layer in analysis.layers]
    nearest = max((rows[i][j] for rows in cosines for i, j in pairs if i < len(rows)), default=0.0)
    said = []
    if most >= LINEAGE.upcycled:
        said.append(
            f"Some pairs of experts share more neurons than independent experts do (up to {whole_percent(most)}), "
            "but there are too few of them to change the verdict."
        )
    if nearest >= ALIKE:
        said.append(f"Some experts have similar weights (a cosine of up to {nearest:.2f}), but share no neurons.")
    return said


def describe_groups(analysis: MoETypeAnalysis, most: int | None = None) -> str:
    """Which experts share neurons only among themselves, layer by layer; "" where all experts are one group, or none.

    Up to `most` groups of a layer are named.
    """
    said = []
    for layer in analysis.layers:
        groups = layer.lineage.sharing.groups
        if not groups or (len(groups) == 1 and len(groups[0]) == analysis.experts):
            continue
        shown = groups[:most]
        more = f" and {count_noun(len(groups) - len(shown), 'more group')}" if len(groups) > len(shown) else ""
        said.append(f"layer {layer.layer}, {count_noun(len(groups), 'group')}: {_list_groups(shown)}{more}")
    return "; ".join(said)


def _list_groups(groups: Sequence[Sequence[int]]) -> str:
    """For instance "experts 0-3 | 4-7"."""
    return f"experts {' | '.join(map(format_ranges, groups))}"


def describe_sample(analysis: MoETypeAnalysis) -> str:
    """How many of the experts were looked at, and for what."""
    lineage = analysis.layers[0].lineage
    of = "" if len(lineage.experts) == analysis.experts else f" of {analysis.experts}"
    neurons = f"{lineage.sharing.neurons:,} neurons from all {count_noun(analysis.experts, 'expert')}"
    each = " in each layer" if len(analysis.layers) > 1 else ""
    return f"{neurons}; spectra of {'all ' if not of else ''}{len(lineage.experts)}{of}{each}"


def _explain_doubt(analysis: MoETypeAnalysis) -> str:
    """Why a verdict is open, as the end of a sentence."""
    lineages = [layer.lineage for layer in analysis.layers]
    sharing = [lineage.sharing for lineage in lineages]
    neurons, twins = sum(layer.neurons for layer in sharing), [layer.twins for layer in sharing if layer.twins]
    shared = fmean(max(layer.shared, layer.without_down or 0.0) for layer in sharing)
    strong = fmean(layer.strong for layer in sharing)
    if has_shared(shared, neurons) or has_strong(strong, neurons):
        if min(layer.roles for layer in sharing) < LINEAGE.roles:
            return ". But gate, up and down are nearly equal, so they are one piece of evidence, not three."
        if has_adapter(describe_components([layer.projections for layer in analysis.layers])[0], strong):
            return f". {_describe_common(analysis)}, as if one adapter had been added to all of them."
        return ". The experts are one base plus low-rank deltas, as an overlay stores them."
    if twins:
        return f". Experts {format_groups(twins[0])} are identical, or nearly: they were merged or duplicated."
    if is_alike_in_place(lineages):
        return ". The experts have something in common, as copies do that were trained far apart."
    if shared < LINEAGE.native:
        return ". Too few neurons were searched to decide."
    return ". Independent experts share fewer neurons, and copies share more."


def _describe_sharing(shared: float, strong: float, neurons: int) -> str:
    """The figures that a verdict rests on, as the beginning of a sentence."""
    return _describe_shares(shared, strong, f"; {neurons:,} neurons searched")


def _describe_shares(shared: float, strong: float, searched: str = "") -> str:
    return (
        f"{percent(shared)} of an expert's neurons have a close match in another expert ({percent(strong)} with a "
        f"cosine of 0.8 or more{searched})"
    )


def _in_parts(evidence: str) -> str:
    """The same, of what a quick analysis read."""
    return f"In the parts that were read, {evidence}"


def _describe_common(analysis: MoETypeAnalysis) -> str:
    """What experts have in common beside neurons."""
    energy = max(0.0, fmean(layer.cosine.mean for layer in analysis.layers))
    if has_adapter(describe_components([layer.projections for layer in analysis.layers])[0]):
        return f"The experts share a low-rank component with {percent(energy)} of their energy"
    return f"The experts are a base with {percent(energy)} of their energy plus low-rank deltas"


def explain_further(analysis: MoETypeAnalysis) -> str:
    """What parts of further layers say, and, where layers differ, why that may be."""

    def describe(part: QuickLayer) -> str:
        is_one = part.twins == (part.experts,)
        return f"layer {part.layer} {part.type} ({'identical experts' if is_one else f'{percent(part.shared)} shared'})"

    said = ", ".join(map(describe, analysis.further_layers))
    types = {layer.type for layer in analysis.layers} | {part.type for part in analysis.further_layers}
    if len(types) == 1:
        return f"{said}; read in part"
    width = min(part.inputs for part in analysis.further_layers)
    if width < QUICK.width:
        why = f"{width} numbers of each neuron's vectors are too few to tell ({QUICK.width} are needed)"
    elif {"UPCYCLED", "NATIVE"} <= types:
        why = "training moved the copies of some layers further apart, or only some layers were copied"
    elif "UPCYCLED" in types:
        why = "in some layers the copies are too far apart to tell, or the part read is too small"
    else:
        why = "the experts of some layers have more in common, or the part read is too small"
    return f"{said}; read in part. Possible reasons why they differ: {why}"


def explain_quick(report: MoEQuickAnalysis) -> str:
    """One sentence on why the quick verdict is what it is."""
    neurons = sum(layer.neurons for layer in report.layers)
    evidence = (
        f"{_in_parts(_describe_sharing(report.shared, report.strong, neurons))}. "
        f"Of shuffled copies, up to {percent(report.reach)} would"
    )
    match report.type:
        case "UPCYCLED":
            return f"{evidence}. The experts are {report.kind or 'copies or slices'}."
        case "NATIVE":
            return f"{evidence}. Each expert has its own neurons, or all of them were re-initialised."
    if (width := min(layer.inputs for layer in report.layers)) < QUICK.width:
        return (
            f"{evidence}. But {width} numbers of each neuron's vectors are too few to tell ({QUICK.width} are needed)."
        )
    if any(layer.twins for layer in report.layers):
        return f"{evidence}. Some experts are identical: they were merged or duplicated."
    if report.shared >= QUICK.upcycled or report.strong >= QUICK.strong:
        return f"{evidence}. The experts may be one base plus low-rank deltas, as an overlay stores them."
    if report.shared < QUICK.native and QUICK.copies * report.reach * neurons < QUICK.expected:
        return f"{evidence}. That is not enough for the verdict NATIVE: {_suggest_budget(report)}."
    return f"{evidence}. That is not enough to decide."


def _suggest_budget(report: MoEQuickAnalysis) -> str:
    """The budget whose parts are long enough for a NATIVE verdict: reach grows with them."""
    neurons = sum(layer.neurons for layer in report.layers)
    growth = QUICK.expected / (QUICK.copies * report.reach * neurons) if neurons else math.inf
    if growth > 1 / min(layer.part for layer in report.layers):
        return "the experts are too small for --quick"
    return f"--budget {math.ceil(1.05 * report.weight_bytes * growth / 1e6)}MB would be enough"


def explain_full_analysis(report: MoEQuickAnalysis) -> str:
    """How many bytes a full analysis reads, and what it adds."""
    gain = f"for a confidence of about {report.full_confidence:.0%}"
    if report.type == "UNDETERMINED":
        gain = "and compares all roles of all experts"
    elif report.full_confidence <= report.confidence:
        gain = "and adds ranks and savings; the confidence stays about the same"
    return f"an analysis without --quick reads {format_bytes(report.full_bytes)}, {gain}"


def explain_rule(analysis: MoETypeAnalysis) -> str:
    """What the documented rule says, with the reason where it differs from the verdict."""
    rule = analysis.documented_rule
    figures = f"{analysis.rank_projection} rank {percent(analysis.rank_ratio)}, cosine {analysis.cosine:.3f}"
    text = f"an older rule, by rank and cosine, says {rule.type} ({rule.confidence:.0%}; {figures})"
    return f"{text}: {rule.why}" if rule.why else text


def explain_parent(analysis: MoETypeAnalysis) -> str:
    """How much of the experts, and of what lies beside them, comes from the dense parent."""
    matches = [layer.lineage.parent for layer in analysis.layers if layer.lineage.parent]
    kept, chance, cosine, in_place, flipped = (
        fmean(getattr(match, figure) for match in matches)
        for figure in ("kept", "chance", "cosine", "in_place", "flipped")
    )
    text = f"{percent(kept)} of the neurons have a match in {analysis.parent} ({percent(chance)} expected by chance)"
    if kept - chance >= LINEAGE.native:
        signs = f", {percent(flipped)} with flipped signs in up and down" if flipped >= LINEAGE.native else ""
        text += f"; cosine {cosine:.2f}, {percent(in_place)} of them in the same position{signs}"
        text += _describe_order(analysis)
    attention = [match.attention for match in matches if match.attention]
    embeddings = analysis.parent_embeddings
    if attention:
        likeness = f"CKA {format_likeness(fmean(layer.cka for layer in attention))}"
        if embeddings:
            likeness += f", of the embeddings {format_likeness(embeddings.cka)}"
        if not has_its_attention(matches):
            it_is = "" if is_from_parent(matches) else ", so nothing says that it is the parent"
            return f"{text}; the attention is not similar ({likeness}){it_is}"
        text += f"; the attention comes from it ({likeness})"
        if not is_from_parent(matches):
            text += ", so the experts were re-initialised, or trained until nothing of the parent was left"
    if embeddings and embeddings.assigned:
        text += "; the hidden dimensions are in another order or have other signs"
    return text


def _describe_order(analysis: MoETypeAnalysis) -> str:
    """Which layers the analysed ones come from, where they are others than those of the same number."""
    sources = [name_sources(layer.lineage.parent) for layer in analysis.layers if layer.lineage.parent]
    numbers = [str(layer.layer) for layer in analysis.layers]
    if sources == numbers:
        return ""
    moved = [(number, source) for number, source in zip(numbers, sources, strict=True) if number != source]
    absent = [number for number, source in moved if source == "none"]
    moved = [(number, source) for number, source in moved if source != "none"]
    listing = ", ".join(f"{number} from {source}" for number, source in moved[:MOST_MOVED])
    more = f" and {len(moved) - MOST_MOVED} more" if len(moved) > MOST_MOVED else ""
    text = f"; layers moved: {listing}{more}" if moved else ""
    return text + (f"; nothing was found of {name_layers([int(number) for number in absent])}" if absent else "")


def name_sources(match: ParentMatch) -> str:
    """The parent's layers that have a good part of the neurons, for instance "3" or "1, 4"; "none" without one."""
    return format_ranges([number for number, share in match.layers.items() if share >= LINEAGE.native]) or "none"
