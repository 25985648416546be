"""The evidence as plain rows, for the terminal and the page to draw.

Both show the same figures; the terminal has room for fewer of them, and for fewer digits.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import isnan, nan, prod
from operator import attrgetter
from statistics import fmean, pstdev
from typing import Any, NamedTuple

from ..numerics.rates import mean_saved
from ..reports import LayerAnalysis, MoETypeAnalysis, ParentMatch, Projection
from ..terms import ROLES
from ..text import format_bytes, percent, whole_percent
from .words import (
    format_bits,
    format_cosine,
    format_likeness,
    format_low_rank,
    format_rank,
    format_ratio,
    format_spread,
    list_numbers,
    name_sources,
)

LayerFigure = Callable[[LayerAnalysis], float]
ProjectionFigure = Callable[[Projection], float]
Column = tuple[str, Callable[[LayerAnalysis], Any], Callable[[Any], str]]  # heading, figure, how it is written
Measure = tuple[str, Callable[[MoETypeAnalysis], str]]  # name, cell


class Table(NamedTuple):
    """Cells in rows; the first cell of a row names it, and `footers` are means."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    footers: Sequence[str] = ()


def of_projection(role: str, figure: ProjectionFigure) -> LayerFigure:
    """A figure of one projection, NaN where the layer has no such projection."""
    return lambda layer: figure(layer.projections[role]) if role in layer.projections else nan


def over_projections(figure: ProjectionFigure) -> LayerFigure:
    """The mean of a figure over the projections of a layer."""
    return lambda layer: fmean(map(figure, layer.projections.values()))


def mean_over_layers(model: MoETypeAnalysis, figure: LayerFigure) -> float:
    """The mean over the analysed layers that have the figure, NaN if none has."""
    values = [value for layer in model.layers if not isnan(value := figure(layer))]
    return fmean(values) if values else nan


RANK_RATIO: ProjectionFigure = attrgetter("rank_ratio")
NOISE_RATIO: ProjectionFigure = attrgetter("noise_rank_ratio")
SHARED: LayerFigure = attrgetter("lineage.sharing.shared")
STRONG: LayerFigure = attrgetter("lineage.sharing.strong")
COSINE: LayerFigure = attrgetter("cosine.mean")
COSINE_SPREAD: LayerFigure = attrgetter("cosine.std")
OVERLAY: LayerFigure = attrgetter("overlay_ratio")
NOISE = over_projections(NOISE_RATIO)
DELTA_ENERGY = over_projections(attrgetter("delta_energy"))


def bits_saved(layer: LayerAnalysis) -> float:
    """What a base saves in one layer, over all its projections; NaN where an earlier version measured it."""
    known = [(one.bits_saved, prod(one.shape)) for one in layer.projections.values() if one.bits_saved is not None]
    return mean_saved(known) if len(known) == len(layer.projections) else nan


def compare(models: Sequence[MoETypeAnalysis]) -> Table:
    """A row for each figure, a column for each model; means over the analysed layers."""
    measures: list[Measure] = [
        ("Verdict", lambda model: model.type),
        ("Confidence, as measured on tiny models", lambda model: whole_percent(model.confidence)),
        ("Kind", lambda model: model.kind or "–"),
        ("Neurons shared", _mean_of(SHARED)),
        ("with cosine 0.8 or more", _mean_of(STRONG)),
        *((f"{role.capitalize()} rank", partial(_format_mean_rank, role=role)) for role in ROLES),
        ("Rank vs noise", _mean_of(NOISE)),
        ("Delta energy", _mean_of(DELTA_ENERGY)),
        ("Bits saved", lambda model: format_bits(model.bits_saved)),
        ("Cosine (down)", _format_mean_cosine),
        ("Low-rank overlay", format_low_rank),
        ("Bytes stored", lambda model: format_bytes(model.stored_bytes)),
        ("as overlay", lambda model: format_bytes(model.overlay_bytes)),
        ("Experts", _format_experts),
    ]
    return _tabulate("The evidence; means over the analysed layers", "Measure", measures, models)


def compare_briefly(models: Sequence[MoETypeAnalysis]) -> Table:
    """The comparison for a terminal, where each projection has a row for its rank beside that of noise."""
    measures: list[Measure] = [
        ("Type", lambda model: model.type),
        ("Confidence*", lambda model: f"{model.confidence:.0%}"),
        ("Kind", lambda model: model.kind or ""),
        ("Neurons shared", _mean_of(SHARED)),
        ("  strongly", _mean_of(STRONG)),
        ("Layers", _name_layers),
        ("Experts", _format_experts),
    ]
    for role in ROLES:
        measures += [
            (f"{role.capitalize()} rank", partial(_format_mean_rank, role=role, brief=True)),
            (f"{role.capitalize()} rank %", _mean_of(of_projection(role, RANK_RATIO))),
            ("  vs noise", _mean_of(of_projection(role, NOISE_RATIO))),
        ]
    measures += [
        ("Cosine (down)", _format_mean_cosine),
        ("Bits saved", lambda model: format_bits(model.bits_saved)),
        ("Low-rank overlay", format_low_rank),
    ]
    return _tabulate("", "Metric", measures, models)


def list_layers(model: MoETypeAnalysis) -> Table:
    """A row for each layer: its verdict and its evidence."""
    columns: list[Column] = [
        ("Shared", SHARED, percent),
        ("Strongly", STRONG, percent),
        *_rank_columns(model, percent),
        ("Vs noise", NOISE, percent),
        ("Delta", DELTA_ENERGY, percent),
        ("Cosine", attrgetter("cosine"), format_cosine),
        ("Bits saved", bits_saved, format_bits),
        ("Overlay", OVERLAY, format_ratio),
    ]
    return Table(
        f"The layers of {model.model}: neurons shared, 95 % ranks over the greatest possible, and what follows",
        ["Layer", "Type", *(heading for heading, _, _ in columns)],
        [[str(layer.layer), layer.type, *_cells(layer, columns)] for layer in model.layers],
    )


def list_layers_briefly(model: MoETypeAnalysis) -> Table:
    """A row for each layer, for a terminal, and the means below."""
    columns: list[Column] = [
        *_rank_columns(model, whole_percent),
        ("Noise", NOISE, whole_percent),
        ("Cosine", COSINE, "{:.3f}".format),
        ("Delta", DELTA_ENERGY, whole_percent),
        ("Shared", SHARED, whole_percent),
        ("Bits", bits_saved, format_bits),
        ("Ratio", OVERLAY, format_ratio),
    ]
    return Table(
        "gate, up, down: the rank that holds 95 % of the delta energy, of the largest possible; Noise: that rank vs "
        "noise; Bits: bits per weight that a shared base saves; Ratio: how much smaller a low-rank overlay is",
        ["Layer", *(heading for heading, _, _ in columns), "Type"],
        [[str(layer.layer), *_cells(layer, columns), layer.type] for layer in model.layers],
        ["mean", *(write(mean_over_layers(model, figure)) for _, figure, write in columns), ""],
    )


def list_ranks(model: MoETypeAnalysis) -> Table:
    """A row for each projection of each layer: its ranks at all shares of the energy."""
    shares = list(next(iter(model.layers[0].projections.values())).rank)
    return Table(
        f"The ranks of the deltas of {model.model}, by the share of their energy; means over the sampled experts",
        [
            "Projection",
            "Shape",
            *(f"{100 * float(share):g} %" for share in shares),
            "Of the maximum",
            "Vs noise",
            "Aligned delta",
            "Bits saved",
            "Bound",
        ],
        [
            [
                f"{role}, layer {layer.layer}",
                f"{projection.shape[0]} × {projection.shape[1]}",
                *(f"{projection.rank[share]:.1f}" for share in shares),
                percent(projection.rank_ratio),
                percent(projection.noise_rank_ratio),
                "–" if projection.aligned_delta_energy is None else percent(projection.aligned_delta_energy),
                format_bits(projection.bits_saved),
                format_bits(projection.bound),
            ]
            for layer in model.layers
            for role, projection in layer.projections.items()
        ],
    )


def list_ranks_briefly(layer: LayerAnalysis) -> Table:
    """A row for each projection of one layer: its rank at 95 % of the energy."""
    rows = [
        [
            role,
            format_rank(projection),
            percent(projection.noise_rank_ratio),
            percent(projection.delta_energy),
            "–" if projection.aligned_delta_energy is None else percent(projection.aligned_delta_energy),
            format_bits(projection.bits_saved),
            format_bits(projection.bound),
        ]
        for role, projection in layer.projections.items()
    ]
    caption = (
        "Rank: directions that hold 95 % of the energy of an expert's delta, its difference from the mean expert; vs "
        "noise: of the rank of a random matrix; Delta energy: the delta's share of the expert's energy; aligned: with "
        "the neurons in one order; Bits saved: per weight, by a shared base; Bound: by the best possible code"
    )
    headings = ["Role", "Rank (95 %)", "vs noise", "Delta energy", "aligned", "Bits saved", "Bound"]
    return Table(caption, headings, rows)


def list_expert_ranks(layer: LayerAnalysis) -> Table:
    """A row for each sampled expert of one layer, a column for each projection; below them mean and deviation."""
    experts = next(iter(layer.projections.values())).experts
    ranks = {role: projection.expert_ranks["0.95"] for role, projection in layer.projections.items()}
    columns = {role: [*map(str, of_role), *_mean_and_deviation(of_role)] for role, of_role in ranks.items()}
    names = [*(f"#{expert}" for expert in experts), "mean", "deviation"]
    return Table(
        "Ranks that hold 95 % of the energy of each expert's delta",
        ["Expert", *columns],
        list(zip(names, *columns.values(), strict=True)),
    )


def list_expert_ranks_briefly(model: MoETypeAnalysis) -> Table:
    """A row for each projection of each layer: mean, deviation, range, the first and last experts."""
    rows = []
    for layer in model.layers:
        for role, projection in layer.projections.items():
            ranks = projection.expert_ranks["0.95"]
            named = [f"#{expert} {rank}" for expert, rank in zip(projection.experts, ranks, strict=True)]
            shown = named if len(named) <= 8 else [*named[:4], "...", *named[-4:]]
            extremes = (str(min(ranks)), str(max(ranks)))
            rows.append([str(layer.layer), role, *_mean_and_deviation(ranks), *extremes, ", ".join(shown)])
    headings = ["Layer", "Projection", "Mean", "Deviation", "Least", "Most", "Experts"]
    return Table("Ranks of the experts' deltas (95 %)", headings, rows)


def list_parents(model: MoETypeAnalysis) -> Table:
    """A row for each layer: where in the parent its neurons and its attention are from."""
    matches = [(layer.layer, layer.lineage.parent) for layer in model.layers if layer.lineage.parent]
    attention = [match.attention for _, match in matches if match.attention]
    roles = list(dict.fromkeys(role for layer in attention for role in layer.projections))
    rows = []
    for number, match in matches:
        searched = f"{len(match.layers)} of {match.of_layers}"
        row = [str(number), name_sources(match), whole_percent(match.kept)]
        row += [whole_percent(match.in_place), f"{match.cosine:.2f}"] if match.kept else ["–", "–"]
        row.append(searched)
        if attention:
            alike = match.attention.projections if match.attention else {}
            row.append(str(match.attention.layer) if match.attention else "–")
            row += [format_likeness(alike[role].cka) if role in alike else "–" for role in roles]
        rows.append(row)
    caption = (
        "From: the parent's layers that have the neurons; Found: the share found; Place: of these, at their own "
        "position; Searched: layers looked into"
    )
    headings = ["Layer", "From", "Found", "Place", "Cosine", "Searched"]
    if attention:
        headings += ["Like", *roles]
        caption += f"; Like: the layer that the attention is most like; {', '.join(roles)}: how much (CKA)"
    return Table(caption, headings, rows)


class ByLayer(NamedTuple):
    """A figure for each analysed layer and each of a parent's: rows of `values`, NaN where not looked into."""

    layers: Sequence[int]
    parents: Sequence[int]
    values: Sequence[Sequence[float]]


def share_by_layer(model: MoETypeAnalysis) -> ByLayer:
    """The share of neurons found."""
    return _by_layer(model, lambda match: match.layers)


def attention_by_layer(model: MoETypeAnalysis) -> ByLayer:
    """How alike the attention is."""
    return _by_layer(model, lambda match: match.attention.layers if match.attention else {})


def _by_layer(model: MoETypeAnalysis, figure: Callable[[ParentMatch], Mapping[int, float]]) -> ByLayer:
    matches = [(layer.layer, layer.lineage.parent) for layer in model.layers if layer.lineage.parent]
    searched = {number for _, match in matches for number in match.layers}
    searched |= {number for _, match in matches if match.attention for number in match.attention.layers}
    parents = sorted(searched)
    values = [[figure(match).get(number, nan) for number in parents] for _, match in matches]
    return ByLayer([number for number, _ in matches], parents, values)


def _tabulate(caption: str, heading: str, measures: Iterable[Measure], models: Sequence[MoETypeAnalysis]) -> Table:
    rows = [[name, *(cell(model) for model in models)] for name, cell in measures]
    return Table(caption, [heading, *(model.model for model in models)], rows)


def _mean_of(figure: LayerFigure) -> Callable[[MoETypeAnalysis], str]:
    """The cell of a share: its mean over the layers."""

    def cell(model: MoETypeAnalysis) -> str:
        mean = mean_over_layers(model, figure)
        return "none" if isnan(mean) else percent(mean)

    return cell


def _name_layers(model: MoETypeAnalysis) -> str:
    """For instance "0, 5", or "0; parts of 8, 15"."""
    whole, parts = (list_numbers([each.layer for each in layers]) for layers in (model.layers, model.further_layers))
    return f"{whole}; parts of {parts}" if parts else whole


def _format_experts(model: MoETypeAnalysis) -> str:
    return f"{' to '.join(map(str, model.experts_range or [model.experts]))} ({model.storage})"


def _format_mean_cosine(model: MoETypeAnalysis) -> str:
    return format_spread(model.cosine, mean_over_layers(model, COSINE_SPREAD))


def _format_mean_rank(model: MoETypeAnalysis, role: str, brief: bool = False) -> str:
    """For instance "1408 / 2880 (48.9 %)" of one layer, "48.9 % of 2880" of several, or in brief "1408 / 2880"."""
    projections = [layer.projections[role] for layer in model.layers if role in layer.projections]
    if not projections:
        return "none"
    if brief:
        return f"{fmean(matrix.rank['0.95'] for matrix in projections):.0f} / {projections[0].max_rank}"
    if len(projections) == 1:
        return format_rank(projections[0])
    return f"{percent(fmean(map(RANK_RATIO, projections)))} of {projections[0].max_rank}"


def _rank_columns(model: MoETypeAnalysis, write: Callable[[float], str]) -> list[Column]:
    return [(role, of_projection(role, RANK_RATIO), write) for role in model.layers[0].projections]


def _cells(layer: LayerAnalysis, columns: Iterable[Column]) -> list[str]:
    return [write(figure(layer)) for _, figure, write in columns]


def _mean_and_deviation(ranks: Sequence[int]) -> tuple[str, str]:
    return f"{fmean(ranks):.1f}", f"{pstdev(ranks):.1f}"
