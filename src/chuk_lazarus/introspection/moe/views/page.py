"""An analysis or a comparison as HTML: a page that can be sent, and the part of it that a notebook shows."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from itertools import accumulate
from shlex import quote
from statistics import mean, pstdev
from typing import TYPE_CHECKING, NamedTuple

from chuk_lazarus import __version__

from ..errors import printable
from ..reports import LayerAnalysis, MoETypeAnalysis, MoETypeComparison
from ..text import format_bytes, format_ranges, percent, whole_percent
from .figures import plot_comparison, plot_decay, plot_depth, plot_matches, plot_similarity, to_svg
from .words import explain, explain_parent, explain_rule, format_compressible, format_cosine, format_rank

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure

COMMAND = "lazarus introspect moe-expert"
NEXT_LAYERS = 4  # of how many layers the page proposes an analysis

VERDICTS = {
    "UPCYCLED": "It was upcycled: its experts grew out of the same neurons.",
    "NATIVE": "It was trained natively, as a mixture of experts.",
    "UNDETERMINED": "Its neurons do not tell how it was trained.",
}

MEANINGS = (
    (
        "Confidence",
        "How often such a verdict was right on held-out models of known history: the lower end of the 95 % interval.",
    ),
    (
        "Neurons found again",
        "The share of the sampled neurons (a gate row, an up row and a down column) for which all these vectors have "
        "one and the same neuron of another expert for their nearest.",
    ),
    ("Closely", "The share of the sampled neurons that are found again with a mean cosine of at least 0.5."),
    (
        "By chance",
        "The share that would be found again in unrelated experts, by how often each neuron is anybody's nearest.",
    ),
    (
        "Rank",
        "The least number of singular directions that hold 95 % of the energy of a delta, an expert minus the mean of "
        "all experts; the mean over the sampled experts.",
    ),
    ("Of noise", "That rank as a share of the rank that random numbers in a matrix of the same shape have."),
    (
        "Delta energy",
        "The share of an expert's energy that is in its delta: near 1 for independent experts, 0 for exact copies.",
    ),
    (
        "Cosine",
        "The mean over all pairs of experts of the cosine between their flattened down projections, ± its standard "
        "deviation; it compares neurons by their position.",
    ),
    (
        "By rank",
        "The rule of the first measurements: upcycled below 5 % gate rank and above a cosine of 0.25, native above "
        "50 % and below 0.10; its percentage is a score, not a rate.",
    ),
    (
        "Overlay",
        "The bytes of the experts at two bytes a weight over those of one base and a delta of that rank for each "
        "expert; compressible if it takes less than that and less than the file does.",
    ),
    (
        "Parent",
        "The share of the sampled neurons for which all their vectors have one and the same neuron of the dense "
        "model's feed-forward for their nearest.",
    ),
    (
        "Limits",
        "A model whose every weight was drawn anew looks native, and so does a dense layer that was cut into experts "
        "without a duplicate, unless its parent is given; one that was grown by duplicating experts looks upcycled.",
    ),
)


class Table(NamedTuple):
    """A table of numbers; the first cell of each row names it."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    """A figure as inline SVG, and its main numbers in words."""

    title: str
    svg: str
    numbers: str


class Step(NamedTuple):
    """Something to do next: why, and the command."""

    why: str
    command: str


def to_page(report: MoETypeAnalysis | MoETypeComparison, command: str | None = None) -> str:
    """The report as one self-contained HTML page without scripts, its JSON inside; `command` is what made it."""
    return _render(report, command and printable(command), whole=True)


def to_fragment(report: MoETypeAnalysis | MoETypeComparison) -> str:
    """The report's verdict, figures and tables as HTML for a notebook: the page without its frame."""
    return _render(report, None, whole=False)


def _render(report: MoETypeAnalysis | MoETypeComparison, command: str | None, whole: bool) -> str:
    models = report.models if isinstance(report, MoETypeComparison) else (report,)
    return _template().render(
        whole=whole,
        models=models,
        command=command,
        verdicts=[(model, VERDICTS[model.type], explain(model), _facts(model)) for model in models],
        headline=_headline(models[0]) if len(models) == 1 else [],
        evidence=_evidence(models),
        pictures=_pictures(report),
        tables=[(_layer_table(model), _rank_table(model)) for model in models],
        expert_tables=[(f"{x.model}, layer {layer.layer}", _expert_table(layer)) for x in models for layer in x.layers],
        steps=[step for model in models for step in _next_steps(model)],
        meanings=[one for one in MEANINGS if one[0] != "Parent" or any(model.parent for model in models)],
        data=report.model_dump(mode="json"),
        version=__version__,
    )


@cache
def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # with the keys in the contract's order
    return environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))


def _facts(model: MoETypeAnalysis) -> list[tuple[str, str]]:
    lineage = model.layers[0].lineage
    kind = f"{model.model_type or 'unknown type'}, {model.experts} experts, {model.storage}"
    return [
        *([("Revision", model.revision)] if model.revision else []),
        ("Family", f"{model.family} ({kind})"),
        ("Layers", f"{format_ranges([x.layer for x in model.layers])}, of {len(model.moe_layers)} with experts"),
        ("Sampled", f"{lineage.neurons:,} neurons of {len(lineage.experts)} experts in each layer"),
        *([("Parent", explain_parent(model))] if model.parent else []),
        ("By rank", explain_rule(model)),
        *(("Note", note) for note in model.notes),
    ]


def _over_roles(layer: LayerAnalysis, figure: str) -> float:
    return mean(float(getattr(projection, figure)) for projection in layer.projections.values())


def _over_layers(model: MoETypeAnalysis, figure: Callable[[LayerAnalysis], float]) -> float:
    return mean(figure(layer) for layer in model.layers)


def _format_mean_rank(model: MoETypeAnalysis, role: str) -> str:
    found = [layer.projections[role] for layer in model.layers if role in layer.projections]
    if len(found) < 2:
        return format_rank(found[0]) if found else "none"
    return f"{percent(mean(one.rank_ratio for one in found))} of {found[0].max_rank}"


def _headline(model: MoETypeAnalysis) -> list[tuple[str, str, str]]:
    """The figures that matter most: name, value, and what to hold it against."""
    role = model.rank_projection
    kept, close, chance = (percent(model.mean_over_layers(figure)) for figure in ("kept", "close", "chance"))
    noise = percent(_over_layers(model, lambda layer: layer.projections[role].noise_rank_ratio))
    pays = "compressible" if model.compressible else "not compressible"
    return [
        ("Neurons found again", kept, f"{chance} by chance; {close} closely"),
        ("Cosine (down)", f"{model.cosine:.3f}", f"± {_over_layers(model, lambda x: x.cosine.std):.3f} over the pairs"),
        (f"{role.capitalize()} rank", percent(model.rank_ratio), f"of the greatest possible; {noise} of noise"),
        (
            "Overlay",
            f"{model.overlay_ratio:.1f}x",
            f"{pays}; {format_bytes(model.overlay_bytes)} for {format_bytes(model.stored_bytes)}",
        ),
    ]


def _evidence(models: Sequence[MoETypeAnalysis]) -> Table:
    """A row a figure, a column a model; means over the analysed layers."""
    figures: list[tuple[str, Callable[[MoETypeAnalysis], str]]] = [
        ("Verdict", lambda model: model.type),
        ("Confidence", lambda model: whole_percent(model.confidence)),
        ("Kind", lambda model: model.kind or "–"),
        ("Neurons found again", lambda model: percent(model.mean_over_layers("kept"))),
        ("closely", lambda model: percent(model.mean_over_layers("close"))),
        ("by chance", lambda model: percent(model.mean_over_layers("chance"))),
        ("Gate rank", lambda model: _format_mean_rank(model, "gate")),
        ("Up rank", lambda model: _format_mean_rank(model, "up")),
        ("Down rank", lambda model: _format_mean_rank(model, "down")),
        ("of noise", lambda model: percent(_over_layers(model, lambda x: _over_roles(x, "noise_rank_ratio")))),
        ("Delta energy", lambda model: percent(_over_layers(model, lambda x: _over_roles(x, "delta_energy")))),
        ("Cosine (down)", lambda model: f"{model.cosine:.3f} ± {_over_layers(model, lambda x: x.cosine.std):.3f}"),
        ("By rank", lambda model: f"{model.documented_rule.type} ({whole_percent(model.documented_rule.confidence)})"),
        ("Compressible", format_compressible),
        ("Bytes stored", lambda model: format_bytes(model.stored_bytes)),
        ("as overlay", lambda model: format_bytes(model.overlay_bytes)),
        ("Experts", lambda model: f"{model.experts} ({model.storage})"),
    ]
    return Table(
        "The evidence; means over the analysed layers",
        ["Measure", *(model.model for model in models)],
        [[name, *(figure(model) for model in models)] for name, figure in figures],
    )


def _layer_table(model: MoETypeAnalysis) -> Table:
    roles = list(model.layers[0].projections)
    return Table(
        f"The layers of {model.model}: neurons found again, 95 % ranks over the greatest possible, and what follows",
        ["Layer", "Type", "Found", "Closely", "Chance", *roles, "Of noise", "Delta", "Cosine", "Overlay"],
        [
            [
                str(layer.layer),
                layer.type,
                percent(layer.lineage.kept),
                percent(layer.lineage.close),
                percent(layer.lineage.chance),
                *(percent(layer.projections[role].rank_ratio) for role in roles),
                percent(_over_roles(layer, "noise_rank_ratio")),
                percent(_over_roles(layer, "delta_energy")),
                format_cosine(layer.cosine),
                f"{layer.overlay_ratio:.1f}x",
            ]
            for layer in model.layers
        ],
    )


def _rank_table(model: MoETypeAnalysis) -> Table:
    shares = list(next(iter(model.layers[0].projections.values())).rank)
    return Table(
        f"The ranks of the deltas of {model.model}, by the share of their energy; means over the sampled experts",
        ["Projection", "Shape", *(f"{100 * float(share):g} %" for share in shares), "Of the maximum", "Of noise"],
        [
            [
                f"{role}, layer {layer.layer}",
                f"{one.shape[0]} × {one.shape[1]}",
                *(f"{one.rank[share]:.1f}" for share in shares),
                percent(one.rank_ratio),
                percent(one.noise_rank_ratio),
            ]
            for layer in model.layers
            for role, one in layer.projections.items()
        ],
    )


def _expert_table(layer: LayerAnalysis) -> Table:
    """The 95 % ranks, a row for each sampled expert."""
    ranks = {role: one.expert_ranks["0.95"] for role, one in layer.projections.items()}
    experts = next(iter(layer.projections.values())).experts
    return Table(
        "Ranks that hold 95 % of the energy of each expert's delta",
        ["Expert", *ranks],
        [
            *([f"#{expert}", *map(str, row)] for expert, *row in zip(experts, *ranks.values(), strict=True)),
            ["mean", *(f"{mean(row):.1f}" for row in ranks.values())],
            ["deviation", *(f"{pstdev(row):.1f}" for row in ranks.values())],
        ],
    )


def _pictures(report: MoETypeAnalysis | MoETypeComparison) -> list[Picture]:
    """The figures; none where matplotlib can't be had."""

    def draw(title: str, figure: "Figure", numbers: str) -> Picture:
        return Picture(title, to_svg(figure), numbers)

    try:
        if isinstance(report, MoETypeComparison):
            return [draw("The models compared", plot_comparison(report), _compared(report))]
        first = report.layers[0]
        pictures = [
            draw(f"Neurons, layer {first.layer}", plot_matches(first), _matched(first)),
            draw(f"Experts, layer {first.layer}", plot_similarity(first), _alike(first)),
            draw(f"Deltas, layer {first.layer}", plot_decay(first), _decaying(first)),
        ]
        if len(report.layers) > 1:
            pictures.append(draw("From layer to layer", plot_depth(report), _by_layer(report)))
        return pictures
    except ImportError:
        return []


def _between(values: Iterable[float], form: Callable[[float], str]) -> str:
    ordered = sorted(values)
    low, high = form(ordered[0]), form(ordered[-1])
    return f"{low} everywhere" if low == high else f"from {low} to {high}"


def _matched(layer: LayerAnalysis) -> str:
    found, matches = layer.lineage, layer.lineage.matches
    return (
        f"Cosines of {found.neurons} neurons with the nearest neuron of another expert, half of them above "
        f"{_median(matches.nearest):.2f}, and with the second nearest, half above {_median(matches.runner_up):.2f}. "
        f"{percent(found.kept)} are found again, {percent(found.chance)} by chance."
    )


def _median(counts: Sequence[int]) -> float:
    """The median of cosines that were counted in equal bins from -1 to 1."""
    below = list(accumulate(counts))
    return 2 * bisect_left(below, below[-1] / 2) / len(counts) - 1


def _alike(layer: LayerAnalysis) -> str:
    cosines = [one for i, row in enumerate(layer.similarity.cosine) for one in row[:i]]
    pairs = [one for i, row in enumerate(layer.lineage.pairs) for j, one in enumerate(row) if i != j]
    return (
        f"Cosines between the down projections of {len(layer.similarity.experts)} experts, "
        f"{_between(cosines, '{:.3f}'.format)}; the share of one expert's neurons that another has, "
        f"{_between(pairs, percent)}."
    )


def _decaying(layer: LayerAnalysis) -> str:
    ranks = (
        f"{role} {one.rank['0.95']:.0f} of {one.max_rank}, {percent(one.noise_rank_ratio)} of noise"
        for role, one in layer.projections.items()
    )
    return f"Singular values of the experts' deltas beside those of noise. 95 % ranks: {'; '.join(ranks)}."


def _by_layer(model: MoETypeAnalysis) -> str:
    layers, role = model.layers, model.rank_projection
    return (
        f"{len(layers)} layers: neurons found again, {_between((x.lineage.kept for x in layers), percent)}; "
        f"{role} rank, {_between((x.projections[role].rank_ratio for x in layers), percent)}; "
        f"cosine, {_between((x.cosine.mean for x in layers), '{:.3f}'.format)}."
    )


def _compared(comparison: MoETypeComparison) -> str:
    models = (
        f"{model.model}: {percent(model.mean_over_layers('kept'))} of the neurons found again, "
        f"{model.rank_projection} rank {percent(model.rank_ratio)}, cosine {model.cosine:.3f}"
        for model in comparison.models
    )
    return f"{'; '.join(models)}."


def _next_steps(model: MoETypeAnalysis) -> Iterator[Step]:
    name, layers = quote(model.model), model.moe_layers
    analyze = f"{COMMAND} moe-type-analyze -m {name}"
    if model.type == "UNDETERMINED":
        yield Step(
            "Match all neurons of all experts, not a sample; it takes time and memory.",
            f"{analyze} --experts all --thorough",
        )
    if set(layers) - {layer.layer for layer in model.layers}:
        few = min(NEXT_LAYERS, len(layers))
        spread = ",".join(str(layers[place * (len(layers) - 1) // (few - 1)]) for place in range(few))
        yield Step("See whether other layers say the same.", f"{analyze} --layers {spread}")
    if not model.parent:
        yield Step(
            "A dense layer that was cut into experts, no neuron twice, looks native. Name the dense model to find out."
            if model.type == "NATIVE"
            else "Name the dense model that it may come from, to see which of its neurons are in which expert.",
            f"{analyze} --parent {'demo:parent' if model.model.startswith('demo:') else 'DENSE-MODEL'}",
        )
    yield Step(
        "See what an overlay of the whole model would take, and what else pays."
        if model.compressible
        else "At 95 % of the deltas' energy an overlay does not pay. See what the same bytes buy otherwise.",
        f"{COMMAND} moe-overlay-estimate -m {name}",
    )
    if model.compressible:
        yield Step(
            "Rebuild the experts from an overlay, and compare their outputs with the originals'.",
            f"{COMMAND} moe-overlay-verify -m {name}",
        )
