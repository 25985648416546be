"""Figures of verdicts and their evidence."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from math import ceil, nan
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidRequest
from ...numerics.spectra import noise_decay, noise_rank
from ...reports import Identity, LayerAnalysis, Lineage, MoETypeAnalysis, MoETypeComparison, Projection
from ...text import percent, whole_percent
from .. import facts
from ..words import format_confidence, format_likeness, identify, name_layers
from .style import (
    COLORS,
    GREY,
    ROLE_STYLES,
    STYLES,
    WIDTH,
    add_panels,
    finish,
    format_share,
    new_figure,
    styled,
    wrap,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = "osD^vP*X"  # one for each share of energy
FLOOR = 0.01  # singular values below this share of their root mean square are off the scale
MOST_WRITTEN = 6  # layers of a parent up to which figures are written into their squares
LEAST_SCALE = 0.1  # the least top of a heat map's scale, so that noise does not look like structure
DECAY = (
    "Singular values of the deltas (expert minus mean of all experts) over their root mean square, mean over the "
    "sampled experts; grey: Gaussian noise of the same shape. Marks: effective ranks at shares of the energy."
)
SIMILARITY = (
    "Cosine of the experts' flattened down projections, and the share of an expert's neurons (row) that are "
    "found again in another (column); alike experts stand together."
)
MATCHES = (
    "Cosine of neurons with the nearest neuron of the best partner of their expert, and with the second nearest there, "
    "which is what unrelated neurons look like."
)
DEPTH = (
    "Effective rank at 95 % of the delta's energy, mean cosine of two experts, and the share of an expert's neurons "
    "that its best partner has, too."
)
PARENTS = (
    "For each layer (row) and each layer of the parent (column): the share of the sampled neurons that are found "
    "there, and how alike the attention is (CKA). Grey: not looked into, because another layer has nearly all."
)
COMPARISON = (
    "Top, the first analysed layer of each: singular values of the deltas (expert minus mean of all experts) over "
    "their root mean square; broad and pale, Gaussian noise of the same shape. Bottom, means over the layers: upright "
    "ticks are the rank of noise; bars the standard deviation over pairs of experts."
)


@styled()
def plot_decay(layer: LayerAnalysis, model: Identity | None = None, command: str | None = None) -> "Figure":
    """The deltas' singular values against those of noise, a panel for each projection.

    Singular values are over their root mean square, ranks a share of the greatest possible one.
    """
    figure = new_figure(2.9, "How fast the deltas' singular values fall")
    _paint_decays(add_panels(figure, figure.add_gridspec()[0], len(layer.projections)), layer)
    return finish(figure, DECAY, _source(model, [layer]), command)


@styled()
def plot_similarity(layer: LayerAnalysis, model: Identity | None = None, command: str | None = None) -> "Figure":
    """How alike the experts are: the cosines of their down projections, and the share of neurons that they share.

    The order of the experts is that of a hierarchical clustering with average linkage.
    """
    figure = new_figure(3.4, "How alike the experts are")
    _paint_similarity(add_panels(figure, figure.add_gridspec()[0], 2), layer)
    return finish(figure, SIMILARITY, _source(model, [layer]), command)


@styled()
def plot_matches(layer: LayerAnalysis, model: Identity | None = None, command: str | None = None) -> "Figure":
    """How near a neuron's nearest neuron in another expert is, and its second nearest, which shows what chance does."""
    figure = new_figure(2.7, "How near the nearest neurons are")
    ax = figure.subplots()
    _paint_matches(ax, layer.lineage)
    ax.set_title("")
    return finish(figure, f"{MATCHES} {_describe_matches(layer.lineage)}", _source(model, [layer]), command)


@styled()
def plot_depth(analysis: MoETypeAnalysis, command: str | None = None) -> "Figure":
    """Rank ratio, cosine and the share of neurons that are shared, by layer."""
    figure = new_figure(5.2, "From layer to layer")
    axes = figure.subplots(3, 1, sharex=True)
    _paint_depth(axes, analysis.layers)
    for ax in axes:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
        ax.label_outer()
    return finish(figure, DEPTH, _source(analysis, analysis.layers), command)


@styled()
def plot_parents(analysis: MoETypeAnalysis, command: str | None = None) -> "Figure":
    """Which layers of the parent the neurons of which layer come from; an InvalidRequest where none was compared."""
    panels = {"Neurons found": facts.share_by_layer(analysis), "Attention (CKA)": facts.attention_by_layer(analysis)}
    drawn = {title: figures for title, figures in panels.items() if not np.isnan(figures.values).all()}
    if not drawn:
        raise InvalidRequest("the analysis has no parent", "name one as parent")
    figure = new_figure(min(5.0, 1.4 + 0.22 * len(analysis.layers)), "Where in the parent the layers come from")
    axes = add_panels(figure, figure.add_gridspec()[0], len(drawn))
    for ax, (title, figures) in zip(axes, drawn.items(), strict=True):
        _paint_by_layer(ax, figures, format_share if title == "Neurons found" else None)
        ax.set_title(title)
    return finish(figure, PARENTS, _source(analysis, analysis.layers), command)


@styled()
def plot_analysis(analysis: MoETypeAnalysis, command: str | None = None) -> "Figure":
    """An analysis in one figure: decay, similarity and matches of its first layer, and what changes with depth."""
    first, many = analysis.layers[0], len(analysis.layers) > 1
    figure = new_figure(7.4 if many else 4.7, f"{identify(analysis)}: {_format_verdict(analysis)}")
    rows = figure.add_gridspec(4, height_ratios=(2, 2, 2, 0.36)) if many else figure.add_gridspec(2)
    _paint_decays(add_panels(figure, rows[0], len(first.projections)), first)
    *heat_maps, matches = add_panels(figure, rows[1], 3)
    _paint_similarity(heat_maps, first)
    _paint_matches(matches, first.lineage)
    text = [DECAY, f"{SIMILARITY} {MATCHES} {_describe_matches(first.lineage)}"]
    if many:
        axes = add_panels(figure, rows[2], 3)
        _paint_depth(axes, analysis.layers)
        for ax, below in zip(axes, add_panels(figure, rows[3], 3), strict=True):
            below.set_axis_off()
            below.legend(*ax.get_legend_handles_labels(), loc="upper left", ncols=2, borderpad=0, borderaxespad=0)
        text = [f"Top, layer {first.layer}: {text[0]}", f"Middle, layer {first.layer}: {text[1]}", f"Bottom: {DEPTH}"]
    return finish(figure, "\n".join(text), _source(analysis, analysis.layers), command)


@styled()
def plot_comparison(comparison: MoETypeComparison, command: str | None = None) -> "Figure":
    """Several models in one figure: decay in the first layer of each; ranks, cosines and neurons shared."""
    models = comparison.models
    names = [wrap(f"{identify(model)}: {_format_verdict(model)}", WIDTH - 0.8) for model in models]
    legend_height = sum(0.21 + 0.13 * name.count("\n") for name in names)
    figure = new_figure(4.8 + legend_height, "Models compared")
    rows = figure.add_gridspec(3, height_ratios=(legend_height, 2.4, 2.4))
    _paint_names(figure.add_subplot(rows[0]), names)
    roles = [role for role in ROLE_STYLES if any(role in model.layers[0].projections for model in models)]
    _paint_decays_of_models(add_panels(figure, rows[1], len(roles[:2])), models, roles[:2])
    ranks, cosines, neurons = add_panels(figure, rows[2], 3)

    def means(figure: facts.LayerFigure) -> list[float]:
        return [facts.mean_over_layers(model, figure) for model in models]

    _paint_dots(
        ranks,
        "Rank (95 %)",
        {role: means(facts.of_projection(role, facts.RANK_RATIO)) for role in roles},
        ticks={role: means(facts.of_projection(role, _noise_ratio)) for role in roles},
    )
    spread = {"down": means(facts.COSINE_SPREAD)}
    _paint_dots(cosines, "Cosine", {role: means(_cosine(role)) for role in roles}, bars=spread)
    _paint_dots(neurons, "Neurons shared", {"all": means(facts.SHARED), "strongly": means(facts.STRONG)})
    cosines.set_xlim(*_from_zero(*cosines.dataLim.intervalx))
    for ax in (ranks, neurons):
        ax.set_xlim(-0.03, 1.03)
        ax.xaxis.set_major_formatter(format_share)
    return finish(figure, COMPARISON, [line for model in models for line in _source(model, model.layers)], command)


def _source(model: Identity | None, layers: Sequence[LayerAnalysis]) -> list[str]:
    """The line of a caption that names the model and its layers."""
    names = name_layers([layer.layer for layer in layers])
    return [f"{identify(model)}, {names}" if model else names.capitalize()]


def _format_verdict(analysis: MoETypeAnalysis) -> str:
    return analysis.type + format_confidence(analysis)


def _describe_matches(lineage: Lineage) -> str:
    return (
        f"{percent(lineage.sharing.shared)} of an expert's neurons are shared with its best partner, "
        f"{percent(lineage.sharing.strong)} strongly."
    )


def _paint_decays(axes: Sequence["Axes"], layer: LayerAnalysis) -> None:
    for ax, (role, projection) in zip(axes, layer.projections.items(), strict=True):
        _paint_decay(ax, role, projection)
    _scale_decays(axes)


def _paint_decay(ax: "Axes", role: str, projection: Projection) -> None:
    color, dash, _ = ROLE_STYLES[role]
    shares, largest = _rank_shares(projection), projection.max_rank
    noise = noise_decay(projection.shape, len(projection.decay))
    ax.plot(shares, noise, color=GREY, linewidth=3, alpha=0.5)
    middle = len(shares) * 2 // 3
    ax.annotate("noise", (shares[middle], noise[middle]), (3, 3), textcoords="offset points", color=GREY)
    if any(projection.decay):
        ax.plot(shares, projection.decay, color=color, linestyle=dash)
    else:
        ax.text(0.97, 0.97, "no deltas: the sampled\nexperts are equal", transform=ax.transAxes, ha="right", va="top")
    ranks = sorted(projection.rank.items(), key=lambda item: float(item[0]))
    for mark, (energy, rank) in zip(cycle(MARKS), ranks, strict=False):
        share = 100 * rank / largest
        height = float(np.interp(share, shares, projection.decay)) if rank else nan
        label = f"{format_share(float(energy))}: rank {rank:.0f}"
        ax.plot(share, height, mark, color=color, markerfacecolor="white", markeredgewidth=1.4, label=label)
    out, inner = projection.shape
    ax.set(title=f"{role}, {out} × {inner}", xlabel=f"rank, % of {largest}")
    ax.legend(loc="best")


def _rank_shares(projection: Projection) -> NDArray[np.float64]:
    """The ranks of the values of `decay`, in per cent of the greatest."""
    places = np.linspace(0, projection.max_rank - 1, len(projection.decay)).round()
    return np.asarray(100 * (places + 1) / projection.max_rank)


def _scale_decays(axes: Sequence["Axes"]) -> None:
    """One logarithmic scale with room for the lines of all panels."""
    from matplotlib.ticker import LogLocator, NullLocator

    values = np.concatenate([np.asarray(line.get_ydata(), float) for ax in axes for line in ax.lines])
    seen = values[values >= FLOOR]
    low, high = 0.6 * seen.min(), 1.5 * seen.max()
    for ax in axes:
        ax.set_yscale("log")
        ax.set_ylim(low, high)
        ax.set_xlim(-2, 102)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter("{x:g}")
        ax.tick_params(labelleft=ax is axes[0])
    axes[0].set_ylabel("singular value")


def _paint_similarity(axes: Sequence["Axes"], layer: LayerAnalysis) -> None:
    left, right = axes
    similarity, sharing = layer.similarity, layer.lineage.sharing
    cosines, pairs = np.array(similarity.cosine), np.array(sharing.pairs)
    if similarity.experts == sharing.experts:
        order = right_order = _order(cosines + pairs + pairs.T)
    else:
        order, right_order = _order(cosines), _order(pairs + pairs.T)
    _paint_heat(left, cosines, similarity.experts, order, "Cosine (down)")
    _paint_heat(right, pairs, sharing.experts, right_order, "Neurons shared", format_share)
    left.set(xlabel="expert", ylabel="expert")
    right.set(xlabel="in expert", ylabel="neurons of expert")


def _order(likeness: NDArray[np.float64]) -> list[int]:
    """The order of a hierarchical clustering: alike experts stand together, otherwise by their number."""
    from scipy.cluster.hierarchy import linkage

    distances = (likeness.max() - likeness[np.triu_indices(len(likeness), 1)]).round(2)
    groups = [[i] for i in range(len(likeness))]
    for left, right, *_ in linkage(distances, "average"):
        first, second = sorted((groups[int(left)], groups[int(right)]), key=min)
        groups.append(first + second)
    return groups[-1]


def _paint_heat(
    ax: "Axes",
    values: NDArray[np.float64],
    experts: Sequence[int],
    order: Sequence[int],
    title: str,
    scale: Callable[[float, object], str] | None = None,
) -> None:
    """A square of experts by experts, the diagonal left out."""
    import matplotlib

    ordered = np.where(np.eye(len(values), dtype=bool), nan, values)[np.ix_(order, order)]
    colors = matplotlib.colormaps["cividis"].with_extremes(bad="#E4E4E4")
    low, high = min(0.0, float(np.nanmin(ordered))), max(LEAST_SCALE, float(np.nanmax(ordered)))
    figure: Any = ax.figure
    image = ax.imshow(ordered, cmap=colors, vmin=low, vmax=high, interpolation="nearest")
    bar = figure.colorbar(image, cax=ax.inset_axes((1.04, 0, 0.06, 1)), format=scale)
    bar.solids.set_rasterized(True)  # vector strips would show seams
    bar.outline.set_visible(False)
    ticks = range(0, len(order), ceil(len(order) / 8))
    names = [str(experts[order[i]]) for i in ticks]
    ax.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 2 else 0)
    ax.set_yticks(ticks, names)
    for panel in (ax, bar.ax):
        panel.grid(False)
        panel.spines[:].set_visible(False)
    ax.set_title(title)


def _paint_by_layer(ax: "Axes", figures: facts.ByLayer, scale: Callable[[float, object], str] | None) -> None:
    """A square for each layer and each of the parent's, with its figure where there is room."""
    import matplotlib

    values = np.array(figures.values)
    colors = matplotlib.colormaps["cividis"].with_extremes(bad="#E4E4E4")
    figure: Any = ax.figure
    image = ax.imshow(values, cmap=colors, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    bar = figure.colorbar(image, ax=ax, format=scale, fraction=0.08, pad=0.03)
    bar.solids.set_rasterized(True)  # vector strips would show seams
    bar.outline.set_visible(False)
    if values.shape[1] <= MOST_WRITTEN:
        for row, column in np.argwhere(~np.isnan(values)):
            value = float(values[row, column])
            text = whole_percent(value) if scale else format_likeness(value)
            ax.text(column, row, text, ha="center", va="center", color="white" if value < 0.5 else "black")
    for set_ticks, numbers in ((ax.set_xticks, figures.parents), (ax.set_yticks, figures.layers)):
        places = range(0, len(numbers), ceil(len(numbers) / 12))
        set_ticks(places, [str(numbers[place]) for place in places])
    ax.set(xlabel="layer of the parent", ylabel="layer")
    for panel in (ax, bar.ax):
        panel.grid(False)
        panel.spines[:].set_visible(False)


def _paint_matches(ax: "Axes", lineage: Lineage) -> None:
    matches = lineage.matches
    nearest, second = (np.array(counts) / sum(counts) for counts in (matches.nearest, matches.runner_up))
    edges = np.linspace(-1, 1, len(nearest) + 1)
    ax.stairs(second, edges, color=GREY, linestyle="--", linewidth=1.4, label="second nearest")
    ax.stairs(nearest, edges, color=COLORS[0], fill=True, alpha=0.35)
    ax.stairs(nearest, edges, color=COLORS[0], linewidth=1.4, label="nearest")
    ax.set_xlim(edges[np.flatnonzero(nearest + second)[0]] - 0.06, 1.02)
    ax.set_ylim(0, 1.45 * max(nearest.max(), second.max()))  # leaves room for the legend
    ax.set_yticks([tick for tick in ax.get_yticks() if tick <= 1])
    ax.yaxis.set_major_formatter(format_share)
    ax.set(title="Nearest neurons", xlabel="cosine, mean over the roles", ylabel="neurons")
    ax.legend(loc="best")


def _paint_depth(axes: Sequence["Axes"], layers: Sequence[LayerAnalysis]) -> None:
    from matplotlib.ticker import MaxNLocator

    ranks, cosines, neurons = axes
    numbers = [layer.layer for layer in layers]
    every = ceil(len(layers) / 12)

    def draw(ax: "Axes", figure: facts.LayerFigure, style: tuple[str, str, str], label: str) -> None:
        color, dash, marker = style
        values = [figure(layer) for layer in layers]
        ax.plot(numbers, values, color=color, linestyle=dash, marker=marker, markevery=every, label=label)

    roles = [role for role in ROLE_STYLES if any(role in layer.projections for layer in layers)]
    for role in roles:
        draw(ranks, facts.of_projection(role, facts.RANK_RATIO), ROLE_STYLES[role], role)
        draw(cosines, _cosine(role), ROLE_STYLES[role], role)
    noise = facts.over_projections(_noise_ratio)
    ranks.plot(numbers, [noise(layer) for layer in layers], color=GREY, linewidth=3, alpha=0.5, zorder=1, label="noise")
    for figure, style, label in (
        (facts.SHARED, ROLE_STYLES["gate"], "shared"),
        (facts.STRONG, ROLE_STYLES["up"], "strongly"),
    ):
        draw(neurons, figure, style, label)
    cosines.set_ylim(*_from_zero(*cosines.dataLim.intervaly))
    for ax in (ranks, neurons):
        ax.set_ylim(-0.03, 1.03)
        ax.yaxis.set_major_formatter(format_share)
    for ax, title in ((ranks, "Rank (95 %)"), (cosines, "Cosine"), (neurons, "Neurons shared")):
        ax.set(title=title, xlabel="layer")
        ax.set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _from_zero(low: float, high: float) -> tuple[float, float]:
    """A scale for cosines that begins at zero, so that small differences look small."""
    top = max(LEAST_SCALE, 1.1 * high)
    return min(-0.03 * top, 1.1 * low), top


def _noise_ratio(projection: Projection) -> float:
    """The 95 % rank of noise over the greatest possible rank."""
    return noise_rank(projection.shape, 0.95) / projection.max_rank


def _cosine(role: str) -> facts.LayerFigure:
    """The mean cosine of two experts, NaN where the layer has no such projection."""
    return lambda layer: float(getattr(layer.cosine, role)) if role in layer.projections else nan


def _paint_names(ax: "Axes", names: Sequence[str]) -> None:
    """A legend of the models, in place of a panel."""
    ax.set_axis_off()
    for color, dash, marker in islice(cycle(STYLES), len(names)):
        ax.plot([], [], color=color, linestyle=dash, marker=marker, label="?")
    legend = ax.legend(loc="upper left", borderpad=0, borderaxespad=0)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)  # as a label, a name that begins with "_" would be left out


def _paint_decays_of_models(axes: Sequence["Axes"], models: Sequence[MoETypeAnalysis], roles: Sequence[str]) -> None:
    for ax, role in zip(axes, roles, strict=True):
        for model, (color, dash, marker) in zip(models, cycle(STYLES), strict=False):
            if not (projection := model.layers[0].projections.get(role)):
                continue
            shares = _rank_shares(projection)
            ax.plot(shares, noise_decay(projection.shape, len(shares)), color=color, linewidth=3, alpha=0.3)
            if any(projection.decay):
                every = ceil(len(shares) / 8)
                ax.plot(shares, projection.decay, color=color, linestyle=dash, marker=marker, markevery=every)
        ax.set(title=f"{role}, deltas", xlabel="rank, % of the greatest")
    _scale_decays(axes)


def _paint_dots(
    ax: "Axes",
    title: str,
    rows: Mapping[str, Sequence[float]],
    ticks: Mapping[str, Sequence[float]] = MappingProxyType({}),
    bars: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> None:
    """A line for each name with a mark for each model; where given, a tick in its colour, and a bar around the mark."""
    for place, (name, values) in enumerate(rows.items()):
        for number, (value, (color, _, marker)) in enumerate(zip(values, cycle(STYLES), strict=False)):
            y = place + 0.7 * ((number + 0.5) / len(values) - 0.5)
            if name in ticks:
                ax.plot(ticks[name][number], y, "|", color=color, markersize=9, markeredgewidth=1.4)
            if name in bars:
                ax.plot([value - bars[name][number], value + bars[name][number]], [y, y], color=color, linewidth=1.2)
            ax.plot(value, y, marker, color=color)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.margins(x=0.1)
    ax.set_title(title)
