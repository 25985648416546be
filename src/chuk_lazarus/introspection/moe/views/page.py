"""An analysis, a comparison or a verified conversion as HTML: a page that can be sent, and the part of it that a
notebook shows."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from shlex import quote
from typing import TYPE_CHECKING, Any, NamedTuple

from chuk_lazarus import __version__

from ..errors import printable
from ..provenance.classifier import LINEAGE
from ..reports import (
    LayerAnalysis,
    MoEOverlayEstimate,
    MoETypeAnalysis,
    MoETypeComparison,
    MoEWeightsVerification,
    SurveyAnswer,
    SurveyRow,
    as_html,
)
from ..text import format_bytes, format_count, format_ranges, percent
from . import facts, verdicts
from .figures import (
    draw_decays,
    draw_decays_of_models,
    draw_depth,
    draw_layer,
    draw_measures,
    draw_parents,
    draw_verification,
    plot_estimate,
    to_svg,
)
from .figures.style import DARK, LIGHT, theme
from .templates import load_template
from .words import (
    LOOK_ALIKES,
    MOST_GROUPS,
    RATED,
    caution,
    count_outcomes,
    describe_family,
    describe_groups,
    describe_sample,
    explain,
    explain_answer,
    explain_further,
    explain_parent,
    explain_saving,
    explain_saving_of,
    format_low_rank,
    format_ratio,
    name_sources,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMMAND = "lazarus introspect moe-expert"
MOST_DESCRIBED = 12  # layers whose parents a caption names
NEXT_LAYERS = 4  # the number of layers that the page proposes to analyse next

VERDICTS = {
    "UPCYCLED": "It was upcycled: its experts began as copies of the same neurons.",
    "NATIVE": "It was trained natively, as a mixture of experts.",
    "UNDETERMINED": "The evidence does not show how it was trained.",
}

MEANINGS = (
    (
        "Confidence",
        "The probability that the verdict is right. It was calibrated on hundreds of tiny models of known history, of "
        "up to 128 dimensions, and has not been measured on large models. For NATIVE it never comes near 100 %, "
        "because a model whose experts were all re-initialised looks the same.",
    ),
    (
        "Neurons shared",
        "The share of an expert's neurons that have a close match in one other expert, the one with the most matches; "
        "the mean over all experts. A neuron is a gate row, an up row and a down column. Two neurons match if in all "
        "three roles each is the other's nearest neuron, clearly nearer than the second nearest.",
    ),
    ("Strongly", "The share of neurons whose match has a mean cosine of at least 0.8: they are nearly the same."),
    (
        "Rank",
        "How many singular directions hold 95 % of the energy of a delta; the mean over the sampled experts. A delta "
        "is an expert minus the mean of all experts.",
    ),
    ("Vs noise", "That rank as a share of the rank of a random matrix of the same shape."),
    (
        "Delta energy",
        "The share of an expert's energy (its squared norm) that is in its delta: near 1 for independent experts, 0 "
        "for exact copies.",
    ),
    (
        "Cosine",
        "The cosine between the flattened down projections of two experts; mean and standard deviation over all pairs. "
        "It compares neurons by their position, so shuffled copies have a cosine near 0.",
    ),
    (
        "Bits saved",
        "How many bits per weight a shared base saves, at equal error, once the neurons are in the same order. It is "
        "0.5 log2(1/d), where d is the share of the energy in the deltas, minus the bits of the base divided by the "
        "number of experts. The bound is what the best possible code would save.",
    ),
    (
        "Overlay",
        "How many times smaller a low-rank overlay is than the experts in bfloat16. An overlay has one base, and a "
        "delta of that rank for each expert.",
    ),
    (
        "Parent",
        "The share of the sampled neurons that have a match in a layer of the dense model, and how similar the "
        "attention is (CKA: near 1 if it was copied, near 0 if it was trained independently).",
    ),
    (
        "Limitations",
        "A model looks native if all experts were re-initialised, or if a dense layer was cut into experts without "
        "duplicating a neuron. Naming the parent reveals both. If every expert is there twice, they may have been "
        "merged or duplicated, and what they were before is unknown.",
    ),
)


class Picture(NamedTuple):
    """Panels as inline SVG, which belong together, and in words what they show and their main numbers."""

    title: str
    panels: list[str]
    numbers: str


class Step(NamedTuple):
    """Something to do next: why, and the command."""

    why: str
    command: str


Shown = MoETypeAnalysis | MoETypeComparison | MoEWeightsVerification


def to_page(report: Shown, command: str | None = None, survey: str | None = None) -> str:
    """The report as one self-contained HTML page without scripts, its JSON inside.

    `command` is what made it, `survey` the address of the survey that it is part of.
    """
    return _render(report, command and printable(command), whole=True, survey=survey)


def to_answer_page(row: SurveyRow, answer: SurveyAnswer, survey: str) -> str:
    """What a survey's row says of a model, as a page: for one whose full analysis is not there."""
    return _fill(
        "answer.html",
        row,
        survey=survey,
        row=row,
        answer=answer,
        name=row.request.model,
        rated=RATED,
        verdict=_verdict(answer),
        why=explain_answer(answer),
        saved=explain_saving_of(answer),
        caveat="" if row.request.parent else LOOK_ALIKES.get(answer.type, ""),
        facts=_list_answer(row, answer),
        step=f"{COMMAND} moe-type-analyze -m {quote(row.request.model)}",
    )


def _list_answer(row: SurveyRow, answer: SurveyAnswer) -> list[tuple[str, str]]:
    figures = (
        ("Revision", answer.revision),
        ("Family", describe_family(answer)),
        ("Layers", format_ranges(answer.layers)),
        ("Stated", row.stated),
        ("Weights", answer.parameters and f"{format_count(answer.parameters)}, of all routed experts"),
        ("Parent", row.request.parent),
        *(
            (name, None if share is None else percent(share))
            for name, share in (("Parent's", answer.parent_kept), ("Rank", answer.rank_ratio))
        ),
        ("Cosine", None if answer.cosine is None else f"{answer.cosine:.3f}"),
        ("Overlay", None if answer.overlay_ratio is None else format_ratio(answer.overlay_ratio)),
    )
    return [*((name, value) for name, value in figures if value), *(("Note", note) for note in answer.notes)]


def to_fragment(report: Shown) -> str:
    """The report's verdict, figures and tables as HTML for a notebook: the page without its frame."""
    return _render(report, None, whole=False)


def show_estimate(report: MoEOverlayEstimate) -> str:
    """An estimate as HTML for a notebook: as in a terminal, and its figure where matplotlib is installed."""
    text = as_html.dispatch(object)(report)
    try:
        return text + to_svg(plot_estimate(report)) if report.ladder else text
    except ImportError:
        return text


def _render(report: Shown, command: str | None, whole: bool, survey: str | None = None) -> str:
    if isinstance(report, MoEWeightsVerification):
        template, shown = "verification.html", _show_conversion(report, whole)
    else:
        template, shown = "page.html", _show_analyses(report, whole)
    return _fill(template, report, command=command, whole=whole, survey=survey, **shown)


def _fill(
    template: str,
    report: Shown | SurveyRow,
    /,  # a page may show a `report`, too
    *,
    command: str | None = None,
    whole: bool = True,
    survey: str | None = None,
    **shown: Any,
) -> str:
    """A template with what its frame needs, and what else it shows."""
    return load_template(template).render(
        whole=whole,
        survey=survey,
        command=command,
        data=report.model_dump(mode="json"),
        version=__version__,
        light=theme(LIGHT),
        dark=theme(DARK),
        **shown,
    )


def _show_conversion(report: MoEWeightsVerification, whole: bool) -> dict[str, Any]:
    """What the page of a verified conversion shows, as a whole or in a notebook."""
    facts_of = [
        ("Original", verdicts.identify_original(report)),
        ("Family", describe_family(report)),
        ("Compared", verdicts.describe_compared(report)),
        *([("Bits", bits)] if (bits := verdicts.describe_bits(report)) else []),
        *(("Note", note) for note in report.notes),
    ]
    return {
        "report": report,
        "outcome": "PASSED" if report.passed else "FAILED",
        "verdict": "It is still the same model." if report.passed else "It is not the same model any more.",
        "why": f"{verdicts.summarise(report).capitalize()}.",
        "facts": facts_of,
        "faults": verdicts.list_faults(report),
        "errors": verdicts.list_errors(report),
        "pictures": _picture_errors(report, whole),
        "meanings": verdicts.MEANINGS,
    }


def _picture_errors(report: MoEWeightsVerification, themed: bool) -> list[Picture]:
    """The heat map; none where nothing was compared, or matplotlib is not installed."""
    try:
        if not report.layers:
            return []
        return [
            Picture("Errors by expert", [to_svg(draw_verification(report), themed)], verdicts.describe_heat(report))
        ]
    except ImportError:
        return []


def _show_analyses(report: MoETypeAnalysis | MoETypeComparison, whole: bool) -> dict[str, Any]:
    """What the page of one analysis or of several shows, as a whole or in a notebook."""
    models = report.models if isinstance(report, MoETypeComparison) else (report,)
    return {
        "models": models,
        "verdicts": [
            (
                model,
                _verdict(model),
                _describe_shared(model),
                explain(model),
                explain_saving(model),
                caution(model),
                _facts(model),
            )
            for model in models
        ],
        "counts": count_outcomes([model.type for model in models]),
        "rated": RATED,
        "headline": _headline(models[0]) if len(models) == 1 else [],
        "evidence": facts.compare(models),
        "pictures": _pictures(report, whole),
        "tables": [table for model in models for table in _tables(model)],
        "expert_tables": [
            (f"{model.model}, layer {layer.layer}", facts.list_expert_ranks(layer))
            for model in models
            for layer in model.layers
        ],
        "steps": [step for model in models for step in _next_steps(model)],
        "meanings": [
            (term, text) for term, text in MEANINGS if term != "Parent" or any(model.parent for model in models)
        ],
    }


def _verdict(model: MoETypeAnalysis | SurveyAnswer) -> str:
    """The verdict in a sentence."""
    if model.type == "UPCYCLED" and (model.kind or "").startswith("from this parent"):
        return "It was upcycled from the given parent."
    return VERDICTS[model.type]


def _describe_shared(model: MoETypeAnalysis) -> str:
    """For instance "100.0 % of the neurons shared: shuffled copies."."""
    kind = f": {model.kind}" if model.kind else ""
    return f"{percent(facts.mean_over_layers(model, facts.SHARED))} of the neurons shared{kind}."


def _tables(model: MoETypeAnalysis) -> list[facts.Table]:
    parents = [facts.list_parents(model)] if model.parent else []
    return [facts.list_layers(model), *parents, facts.list_ranks(model)]


def _facts(model: MoETypeAnalysis) -> list[tuple[str, str]]:
    layers, groups = format_ranges([layer.layer for layer in model.layers]), describe_groups(model, MOST_GROUPS)
    return [
        *([("Revision", model.revision)] if model.revision else []),
        ("Family", describe_family(model)),
        ("Layers", f"{layers}, of {len(model.moe_layers)} with experts"),
        ("Sample", describe_sample(model)),
        *([("Groups", groups)] if groups else []),
        *([("Further", explain_further(model))] if model.further_layers else []),
        *([("Parent", explain_parent(model))] if model.parent else []),
        *(("Note", note) for note in model.notes),
    ]


def _headline(model: MoETypeAnalysis) -> list[tuple[str, str, str]]:
    """The figures that matter most: name, value, and what to compare it with."""
    role = model.rank_projection
    noise_ratio = facts.of_projection(role, facts.NOISE_RATIO)
    figures = (facts.SHARED, facts.STRONG, noise_ratio, facts.COSINE_SPREAD)
    shared, strong, noise, spread = (facts.mean_over_layers(model, figure) for figure in figures)
    return [
        ("Neurons shared", percent(shared), f"with another expert; {percent(strong)} strongly"),
        ("Cosine (down)", f"{model.cosine:.3f}", f"± {spread:.3f} over pairs of experts"),
        (
            f"{role.capitalize()} rank",
            percent(model.rank_ratio),
            f"of the largest possible; {percent(noise)} of the rank of noise",
        ),
        (
            "Low-rank overlay",
            format_low_rank(model),
            f"{format_bytes(model.overlay_bytes)} for {format_bytes(model.stored_bytes)}",
        ),
    ]


def _pictures(report: MoETypeAnalysis | MoETypeComparison, themed: bool) -> list[Picture]:
    """The figures, that which decides first; none where matplotlib is not installed."""

    def draw(title: str, figures: "Sequence[Figure]", numbers: str) -> Picture:
        return Picture(title, [to_svg(figure, themed) for figure in figures], numbers)

    try:
        if isinstance(report, MoETypeComparison):
            models = report.models
            return [
                draw("Neurons, cosines and ranks", draw_measures(models), _describe_comparison(report)),
                draw("Deltas, first layers", draw_decays_of_models(models), DECAYS),
            ]
        first = report.layers[0]
        pictures = [
            draw(f"Neurons, layer {first.layer}", draw_layer(first), _describe_layer(first)),
            draw(f"Deltas, layer {first.layer}", draw_decays(first), _describe_decay(first)),
        ]
        if len(report.layers) > 1:
            pictures.append(draw("From layer to layer", draw_depth(report), _describe_depth(report)))
        if report.parent:
            pictures.append(draw("The parent's layers", draw_parents(report), _describe_parents(report)))
        return pictures
    except ImportError:
        return []


def _format_range(values: Sequence[float], write: Callable[[float], str]) -> str:
    """For instance "from 0.01 to 0.42", or "0.01 everywhere"."""
    low, high = write(min(values)), write(max(values))
    return f"{low} everywhere" if low == high else f"from {low} to {high}"


def _describe_layer(layer: LayerAnalysis) -> str:
    lineage, matches = layer.lineage, layer.lineage.matches
    cosines = [cosine for i, row in enumerate(layer.similarity.cosine) for cosine in row[:i]]
    pairs = [share for i, row in enumerate(lineage.sharing.pairs) for j, share in enumerate(row) if i != j]
    return (
        f"Left: the share of one expert's neurons that have a match in another, {_format_range(pairs, percent)}. The "
        f"colour changes at 10 %, where the verdict UPCYCLED begins. An expert shares "
        f"{percent(lineage.sharing.shared)} of its neurons with the expert that is most like it. The median cosine of "
        f"{sum(matches.nearest):,} neurons is {_median(matches.nearest):.2f} with the nearest neuron there, and "
        f"{_median(matches.runner_up):.2f} with the second nearest, which is chance. Cosines between the down "
        f"projections of {len(layer.similarity.experts)} experts: {_format_range(cosines, '{:.3f}'.format)}."
    )


def _median(counts: Sequence[int]) -> float:
    """The median of cosines that were counted in equal bins from -1 to 1, down to a bin."""
    cumulated = list(accumulate(counts))
    return 2 * bisect_left(cumulated, cumulated[-1] / 2) / len(counts) - 1


def _describe_decay(layer: LayerAnalysis) -> str:
    ranks = (
        f"{role} {matrix.rank['0.95']:.0f} of {matrix.max_rank} ({percent(matrix.noise_rank_ratio)} vs noise)"
        for role, matrix in layer.projections.items()
    )
    return f"Singular values of the experts' deltas, compared with noise. 95 % ranks: {'; '.join(ranks)}."


def _describe_depth(model: MoETypeAnalysis) -> str:
    role = model.rank_projection
    shared, ranks, cosines = (
        [figure(layer) for layer in model.layers]
        for figure in (facts.SHARED, facts.of_projection(role, facts.RANK_RATIO), facts.COSINE)
    )
    return (
        f"{len(model.layers)} layers: neurons shared, {_format_range(shared, percent)}; "
        f"{role} rank, {_format_range(ranks, percent)}; cosine, {_format_range(cosines, '{:.3f}'.format)}."
    )


def _describe_parents(model: MoETypeAnalysis) -> str:
    """Which layers of the parent have the neurons, for those who do not see the picture."""
    matches = [(layer.layer, layer.lineage.parent) for layer in model.layers if layer.lineage.parent]
    parts = []
    for number, match in matches[:MOST_DESCRIBED]:
        where = f" in layer {name_sources(match)}" if match.kept >= LINEAGE.native else ""
        attention = f", similarity of the attention {match.attention.cka:.2f}" if match.attention else ""
        searched = f"{len(match.layers)} of {match.of_layers} layers of the parent searched"
        parts.append(f"layer {number}: {percent(match.kept)} of the neurons found{where} ({searched}){attention}")
    listing = "; ".join(parts)
    return f"{listing}{'; and so on' if len(matches) > MOST_DESCRIBED else ''}."


DECAYS = (
    "Singular values of the deltas (expert minus mean of all experts), divided by their root mean square. Broad and "
    "pale: noise of the same shape. Colours and marks: the models above."
)


def _describe_comparison(comparison: MoETypeComparison) -> str:
    models = (
        f"{model.model}: {percent(facts.mean_over_layers(model, facts.SHARED))} of the neurons shared, "
        f"{model.rank_projection} rank {percent(model.rank_ratio)}, cosine {model.cosine:.3f}"
        for model in comparison.models
    )
    return f"{'; '.join(models)}."


def _next_steps(model: MoETypeAnalysis) -> Iterator[Step]:
    name, layers = quote(model.model), model.moe_layers
    analyze = f"{COMMAND} moe-type-analyze -m {name}"
    if model.type == "UNDETERMINED":
        yield Step(
            "Match all neurons of all experts, not a sample. This needs more time and memory.",
            f"{analyze} --experts all --thorough",
        )
    if set(layers) - {layer.layer for layer in model.layers}:
        count = min(NEXT_LAYERS, len(layers))
        spread = ",".join(str(layers[place * (len(layers) - 1) // (count - 1)]) for place in range(count))
        yield Step("See whether other layers agree.", f"{analyze} --layers {spread}")
    if not model.parent:
        yield Step(
            "Slices of a dense layer look native, and so do experts that were all re-initialised. If you know a dense "
            "model that it may come from, name it."
            if model.type == "NATIVE"
            else "If you know the dense model that it may come from, name it to see which neurons are from there.",
            f"{analyze} --parent {'demo:parent' if model.model.startswith('demo:') else 'DENSE-MODEL'}",
        )
    yield Step(
        "See how much smaller the whole model can be made, and at what error.",
        f"{COMMAND} moe-overlay-estimate -m {name}",
    )
    if model.compressible:
        yield Step(
            "Rebuild the experts from a low-rank overlay, and compare their outputs with the originals.",
            f"{COMMAND} moe-overlay-verify -m {name}",
        )
