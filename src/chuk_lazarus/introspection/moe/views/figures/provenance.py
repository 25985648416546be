"""Figures of verdicts and their evidence."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from math import ceil, nan
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidRequest
from ...numerics.spectra import noise_decay, noise_rank
from ...provenance.classifier import LINEAGE
from ...reports import Identity, LayerAnalysis, Lineage, MoETypeAnalysis, MoETypeComparison, Projection
from ...text import percent, whole_percent
from .. import facts
from ..words import format_confidence, format_likeness, identify, name_layers
from .style import (
    WIDTH,
    add_panels,
    figure_of,
    finish,
    format_share,
    given_panels,
    needs_style,
    new_figure,
    palette,
    wrap,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

MARKS = "osD^vP*X"  # one for each share of energy
FLOOR = 0.01  # singular values below this share of their root mean square are off the scale
MOST_WRITTEN = 6  # layers of a parent up to which figures are written into their squares
LEAST_SCALE = 0.1  # the least top of a scale of cosines, so that noise does not look like structure
APART = 3.7  # inches: the width of a panel that stands alone on a page, which a phone shows whole
ON_DARK, ON_BRIGHT = "#fefefe", "#010101"  # figures in squares, which keep their colour on any ground
DECAY = (
    "Singular values of the deltas (expert minus mean of all experts), divided by their root mean square; the mean "
    "over the sampled experts. Grey: Gaussian noise of the same shape. Marks: the ranks that hold shares of the energy."
)
SHARING = (
    "The share of an expert's neurons (row) that have a match in another expert (column). Similar experts are next to "
    "each other. The colour changes at 10 %, where the verdict UPCYCLED begins."
)
SIMILARITY = f"{SHARING} Beside it, the cosine of the experts' flattened down projections."
MATCHES = (
    "The cosine of each neuron with the nearest neuron in the expert most like its own, and with the second nearest "
    "there, which shows what unrelated neurons look like."
)
DEPTH = (
    "The share of an expert's neurons that have a match in another expert, the mean cosine of two experts, and the "
    "rank that holds 95 % of the delta energy."
)
PARENTS = (
    "For each layer (row) and each layer of the parent (column): the share of the sampled neurons that have a match "
    "there, and how similar the attention is (CKA). Blank: not searched, because another layer has nearly all."
)
COMPARISON = (
    "Top: means over the layers. Bars show the standard deviation over pairs of experts, upright ticks the rank of "
    "noise. Bottom: the first analysed layer of each model. Singular values of the deltas (expert minus mean of all "
    "experts), divided by their root mean square; broad and pale, Gaussian noise of the same shape."
)


@needs_style
def plot_sharing(
    layer: LayerAnalysis,
    model: Identity | None = None,
    command: str | None = None,
    *,
    ax: Any = None,
    caption: bool = False,
    dark: bool = False,
) -> "Figure":
    """Which experts share neurons, the panel that decides: the share of each one's (row) that another (column) has.

    The colour turns at 10 %, where a verdict of UPCYCLED begins. Alike experts stand together, in the order of a
    hierarchical clustering with average linkage.
    """
    if ax is not None:
        panels = given_panels(ax, 1)
        _paint_sharing(panels[0], layer)
        return figure_of(panels)
    figure = new_figure(3.4, "Which experts share neurons" if caption else "", width=4.2)
    _paint_sharing(figure.subplots(), layer)
    return finish(figure, [SHARING, *_source(model, [layer], command)] if caption else ())


@needs_style
def plot_decay(
    layer: LayerAnalysis,
    model: Identity | None = None,
    command: str | None = None,
    *,
    ax: Any = None,
    caption: bool = False,
    dark: bool = False,
) -> "Figure":
    """The deltas' singular values against those of noise, a panel for each projection.

    Singular values are over their root mean square, ranks a share of the greatest possible one.
    """
    count = len(layer.projections)
    if ax is not None:
        panels = given_panels(ax, count)
        _paint_decays(panels, layer)
        return figure_of(panels)
    figure = new_figure(2.9, "How fast the deltas' singular values fall" if caption else "")
    _paint_decays(add_panels(figure, figure.add_gridspec()[0], count), layer)
    return finish(figure, [DECAY, *_source(model, [layer], command)] if caption else ())


@needs_style
def plot_similarity(
    layer: LayerAnalysis,
    model: Identity | None = None,
    command: str | None = None,
    *,
    ax: Any = None,
    caption: bool = False,
    dark: bool = False,
) -> "Figure":
    """How alike the experts are: the share of neurons that they share, and the cosines of their down projections.

    The order of the experts is that of a hierarchical clustering with average linkage.
    """
    if ax is not None:
        panels = given_panels(ax, 2)
        _paint_similarity(panels, layer)
        return figure_of(panels)
    figure = new_figure(3.4, "How alike the experts are" if caption else "")
    _paint_similarity(add_panels(figure, figure.add_gridspec()[0], 2), layer)
    return finish(figure, [SIMILARITY, *_source(model, [layer], command)] if caption else ())


@needs_style
def plot_matches(
    layer: LayerAnalysis,
    model: Identity | None = None,
    command: str | None = None,
    *,
    ax: Any = None,
    caption: bool = False,
    dark: bool = False,
) -> "Figure":
    """How near a neuron's nearest neuron in another expert is, and its second nearest, which shows what chance does."""
    if ax is not None:
        panels = given_panels(ax, 1)
        _paint_matches(panels[0], layer.lineage)
        return figure_of(panels)
    figure = new_figure(2.7, "How near the nearest neurons are" if caption else "")
    panel = figure.subplots()
    _paint_matches(panel, layer.lineage)
    panel.set_title("")
    text = f"{MATCHES} {_describe_matches(layer.lineage)}"
    return finish(figure, [text, *_source(model, [layer], command)] if caption else ())


@needs_style
def plot_depth(
    analysis: MoETypeAnalysis,
    command: str | None = None,
    *,
    ax: Any = None,
    caption: bool = False,
    dark: bool = False,
) -> "Figure":
    """The share of neurons that are shared, cosine and rank ratio, by layer."""
    if ax is not None:
        panels = given_panels(ax, 3)
        _paint_depth(panels, analysis.layers)
        for panel in panels:
            panel.legend(loc="best")
        return figure_of(panels)
    figure = new_figure(5.2, "From layer to layer" if caption else "")
    axes = figure.subplots(3, 1, sharex=True)
    _paint_depth(axes, analysis.layers)
    for panel in axes:
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
        panel.label_outer()
    return finish(figure, [DEPTH, *_source(analysis, analysis.layers, command)] if caption else ())


@needs_style
def plot_parents(
    analysis: MoETypeAnalysis,
    command: str | None = None,
    *,
    ax: Any = None,
    caption: bool = False,
    dark: bool = False,
) -> "Figure":
    """Which layers of the parent the neurons of which layer come from; an InvalidRequest where none was compared."""
    drawn = _parent_panels(analysis)
    if not drawn:
        raise InvalidRequest("the analysis has no parent", "name one as parent")
    if ax is not None:
        panels = given_panels(ax, len(drawn))
        _paint_parents(panels, drawn)
        return figure_of(panels)
    title = "Where in the parent the layers come from" if caption else ""
    figure = new_figure(min(5.0, 1.4 + 0.22 * len(analysis.layers)), title)
    _paint_parents(add_panels(figure, figure.add_gridspec()[0], len(drawn)), drawn)
    return finish(figure, [PARENTS, *_source(analysis, analysis.layers, command)] if caption else ())


@needs_style
def plot_analysis(
    analysis: MoETypeAnalysis,
    command: str | None = None,
    *,
    ax: Any = None,
    caption: bool = False,
    dark: bool = False,
) -> "Figure":
    """An analysis in one figure: what decides, similarity and decay of its first layer, and what changes with depth.

    On one `ax`, the neurons shared alone.
    """
    first, many = analysis.layers[0], len(analysis.layers) > 1
    if ax is not None:
        panels = given_panels(ax, 1)
        _paint_sharing(panels[0], first)
        return figure_of(panels)
    title = f"{identify(analysis)}: {_format_verdict(analysis)}" if caption else ""
    figure = new_figure(7.4 if many else 4.7, title)
    rows = figure.add_gridspec(4, height_ratios=(2, 2, 2, 0.36)) if many else figure.add_gridspec(2)
    sharing, matches, cosines = add_panels(figure, rows[0], 3)
    _paint_similarity([sharing, cosines], first)
    _paint_matches(matches, first.lineage)
    _paint_decays(add_panels(figure, rows[1], len(first.projections)), first)
    text = [f"{SIMILARITY} {MATCHES} {_describe_matches(first.lineage)}", DECAY]
    if many:
        axes = add_panels(figure, rows[2], 3)
        _paint_depth(axes, analysis.layers)
        for panel, below in zip(axes, add_panels(figure, rows[3], 3), strict=True):
            below.set_axis_off()
            below.legend(*panel.get_legend_handles_labels(), loc="upper left", ncols=2, borderpad=0, borderaxespad=0)
        text = [f"Top, layer {first.layer}: {text[0]}", f"Middle, layer {first.layer}: {text[1]}", f"Bottom: {DEPTH}"]
    return finish(figure, [*text, *_source(analysis, analysis.layers, command)] if caption else ())


@needs_style
def plot_comparison(
    comparison: MoETypeComparison,
    command: str | None = None,
    *,
    ax: Any = None,
    caption: bool = False,
    dark: bool = False,
) -> "Figure":
    """Several models in one figure: neurons shared, cosines and ranks; decay in the first layer of each.

    On one `ax`, the neurons shared alone, and whose marks are whose.
    """
    models = comparison.models
    if ax is not None:
        panels = given_panels(ax, 1)
        _paint_shared_of_models(panels[0], models)
        _add_key(panels[0], [identify(model) for model in models])
        return figure_of(panels)
    names = [wrap(f"{identify(model)}: {_format_verdict(model)}", WIDTH - 0.8) for model in models]
    legend_height = sum(0.21 + 0.13 * name.count("\n") for name in names)
    figure = new_figure(4.8 + legend_height, "Models compared" if caption else "")
    rows = figure.add_gridspec(3, height_ratios=(legend_height, 2.4, 2.4))
    _paint_names(figure.add_subplot(rows[0]), names)
    _paint_measures_of_models(add_panels(figure, rows[1], 3), models)
    roles = _roles_of(models)
    _paint_decays_of_models(add_panels(figure, rows[2], len(roles)), models, roles)
    source = [line for model in models for line in _source(model, model.layers)]
    return finish(figure, [COMPARISON, *source, *([command] if command else [])] if caption else ())


@needs_style
def draw_apart(paint: Callable[[Sequence["Axes"]], None], count: int, height: float = 2.9) -> list["Figure"]:
    """Small figures of one panel each, for a page to set beside or below each other; `paint` draws on all of them."""
    figures = [new_figure(height, width=APART) for _ in range(count)]
    axes = [figure.subplots() for figure in figures]
    paint(axes)
    for ax in axes:
        ax.tick_params(labelleft=True)
    return [finish(figure) for figure in figures]


def draw_layer(layer: LayerAnalysis) -> list["Figure"]:
    """The neurons shared, the nearest neurons and the cosines of one layer, apart."""

    def paint(axes: Sequence["Axes"]) -> None:
        sharing, matches, cosines = axes
        _paint_similarity([sharing, cosines], layer)
        _paint_matches(matches, layer.lineage)

    return draw_apart(paint, 3)


def draw_decays(layer: LayerAnalysis) -> list["Figure"]:
    """The decay of each projection, apart."""
    return draw_apart(lambda axes: _paint_decays(axes, layer), len(layer.projections))


def draw_depth(analysis: MoETypeAnalysis) -> list["Figure"]:
    """The panels of `plot_depth`, apart."""

    def paint(axes: Sequence["Axes"]) -> None:
        _paint_depth(axes, analysis.layers)
        for ax in axes:
            ax.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=4, borderpad=0, columnspacing=1)

    return draw_apart(paint, 3)


def draw_parents(analysis: MoETypeAnalysis) -> list["Figure"]:
    """The panels of `plot_parents`, apart."""
    drawn = _parent_panels(analysis)
    height = min(5.0, 1.4 + 0.22 * len(analysis.layers))
    return draw_apart(lambda axes: _paint_parents(axes, drawn), len(drawn), height)


def draw_measures(models: Sequence[MoETypeAnalysis]) -> list["Figure"]:
    """The neurons shared, cosines and ranks of several models, apart; the first one says whose marks are whose."""

    def paint(axes: Sequence["Axes"]) -> None:
        _paint_measures_of_models(axes, models)
        _add_key(axes[0], [identify(model) for model in models])

    return draw_apart(paint, 3)


def draw_decays_of_models(models: Sequence[MoETypeAnalysis]) -> list["Figure"]:
    """The decay of each projection of several models, apart."""
    roles = _roles_of(models)
    return draw_apart(lambda axes: _paint_decays_of_models(axes, models, roles), len(roles))


def _source(model: Identity | None, layers: Sequence[LayerAnalysis], command: str | None = None) -> list[str]:
    """The lines of a caption that name the model and its layers, and the command that made it."""
    names = name_layers([layer.layer for layer in layers])
    return [f"{identify(model)}, {names}" if model else names.capitalize(), *([command] if command else [])]


def _format_verdict(analysis: MoETypeAnalysis) -> str:
    return analysis.type + format_confidence(analysis)


def _describe_matches(lineage: Lineage) -> str:
    return (
        f"{percent(lineage.sharing.shared)} of an expert's neurons are shared with its best partner, "
        f"{percent(lineage.sharing.strong)} strongly."
    )


def _paint_decays(axes: Sequence["Axes"], layer: LayerAnalysis) -> None:
    for ax, (role, projection) in zip(axes, layer.projections.items(), strict=False):
        _paint_decay(ax, role, projection)
    _scale_decays(axes)


def _paint_decay(ax: "Axes", role: str, projection: Projection) -> None:
    color, dash, _ = palette().role_styles[role]
    shares, largest = _rank_shares(projection), projection.max_rank
    noise = noise_decay(projection.shape, len(projection.decay))
    ax.plot(shares, noise, color=palette().grey, linewidth=3, alpha=0.5)
    middle = len(shares) * 2 // 3
    ax.annotate("noise", (shares[middle], noise[middle]), (3, 3), textcoords="offset points", color=palette().grey)
    if any(projection.decay):
        ax.plot(shares, projection.decay, color=color, linestyle=dash)
    else:
        ax.text(0.97, 0.97, "no deltas: the sampled\nexperts are equal", transform=ax.transAxes, ha="right", va="top")
    ranks = sorted(projection.rank.items(), key=lambda item: float(item[0]))
    for mark, (energy, rank) in zip(cycle(MARKS), ranks, strict=False):
        share = 100 * rank / largest
        height = float(np.interp(share, shares, projection.decay)) if rank else nan
        label = f"{format_share(float(energy))}: rank {rank:.0f}"
        ax.plot(share, height, mark, color=color, markerfacecolor=palette().ground, markeredgewidth=1.4, label=label)
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


def _paint_sharing(ax: "Axes", layer: LayerAnalysis, order: Sequence[int] | None = None) -> None:
    """The neurons shared; the colour turns where experts share what natives don't."""
    from matplotlib.colors import TwoSlopeNorm

    sharing = layer.lineage.sharing
    pairs = np.array(sharing.pairs)
    bar = _paint_heat(
        ax,
        pairs,
        sharing.experts,
        _order(pairs + pairs.T) if order is None else order,
        "Neurons shared",
        TwoSlopeNorm(LINEAGE.upcycled, 0.0, 1.0),
        format_share,
    )
    bar.set_ticks([0.0, LINEAGE.native, LINEAGE.upcycled, 0.5, 1.0])
    count = len(sharing.partners) + sum(len(group) - 1 for group in sharing.twins)
    some = f" ({len(sharing.experts)} of {count})" if len(sharing.experts) < count else ""
    ax.set(xlabel=f"in expert{some}", ylabel="neurons of expert")


def _paint_similarity(axes: Sequence["Axes"], layer: LayerAnalysis) -> None:
    """The neurons shared, and where there is a second panel, the cosines."""
    from matplotlib.colors import Normalize

    similarity, sharing = layer.similarity, layer.lineage.sharing
    cosines, pairs = np.array(similarity.cosine), np.array(sharing.pairs)
    if similarity.experts == sharing.experts:
        order = right_order = _order(cosines + pairs + pairs.T)
    else:
        order, right_order = _order(pairs + pairs.T), _order(cosines)
    _paint_sharing(axes[0], layer, order)
    for ax in axes[1:]:
        low = min(0.0, float(np.min(cosines)))
        _paint_heat(ax, cosines, similarity.experts, right_order, "Cosine (down)", Normalize(low, 1.0))
        ax.set(xlabel="expert", ylabel="expert")


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
    norm: "Normalize",
    scale: Callable[[float, object], str] | None = None,
) -> "Colorbar":
    """A square of experts by experts, the diagonal left out; its scale is the same for all models."""
    ordered = np.where(np.eye(len(values), dtype=bool), nan, values)[np.ix_(order, order)]
    figure: Any = ax.figure
    image = ax.imshow(ordered, cmap=_color_map(), norm=norm, interpolation="nearest")
    bar: Colorbar = figure.colorbar(image, cax=ax.inset_axes((1.04, 0, 0.06, 1)), format=scale)
    _clear(ax, bar)
    ticks = range(0, len(order), ceil(len(order) / 8))
    names = [str(experts[order[i]]) for i in ticks]
    ax.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 2 else 0)
    ax.set_yticks(ticks, names)
    ax.set_title(title)
    return bar


def _color_map() -> "Colormap":
    """Blue to yellow; what is not known is left blank, on light and dark grounds."""
    import matplotlib

    return matplotlib.colormaps["cividis"].with_extremes(bad=(0.0, 0.0, 0.0, 0.0))


def _clear(ax: "Axes", bar: "Colorbar") -> None:
    """Take grid and edges from a heat map and its scale."""
    solids, outline = bar.solids, cast(Any, bar.outline)
    if solids is not None:
        solids.set_rasterized(True)  # vector strips would show seams
    outline.set_visible(False)
    ax.set_facecolor("none")
    for panel in (ax, bar.ax):
        panel.grid(False)
        panel.spines[:].set_visible(False)


def _parent_panels(analysis: MoETypeAnalysis) -> dict[str, facts.ByLayer]:
    """What there is to show of the parent's layers, by title."""
    panels = {"Neurons found": facts.share_by_layer(analysis), "Attention (CKA)": facts.attention_by_layer(analysis)}
    return {title: figures for title, figures in panels.items() if not np.isnan(figures.values).all()}


def _paint_parents(axes: Sequence["Axes"], drawn: Mapping[str, facts.ByLayer]) -> None:
    for ax, (title, figures) in zip(axes, drawn.items(), strict=False):
        _paint_by_layer(ax, figures, format_share if title == "Neurons found" else None)
        ax.set_title(title)


def _paint_by_layer(ax: "Axes", figures: facts.ByLayer, scale: Callable[[float, object], str] | None) -> None:
    """A square for each layer and each of the parent's, with its figure where there is room."""
    values = np.array(figures.values)
    figure: Any = ax.figure
    image = ax.imshow(values, cmap=_color_map(), vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    _clear(ax, figure.colorbar(image, ax=ax, format=scale, fraction=0.08, pad=0.03))
    if values.shape[1] <= MOST_WRITTEN:
        for row, column in np.argwhere(~np.isnan(values)):
            value = float(values[row, column])
            text = whole_percent(value) if scale else format_likeness(value)
            ax.text(column, row, text, ha="center", va="center", color=ON_DARK if value < 0.5 else ON_BRIGHT)
    for set_ticks, numbers in ((ax.set_xticks, figures.parents), (ax.set_yticks, figures.layers)):
        places = range(0, len(numbers), ceil(len(numbers) / 12))
        set_ticks(places, [str(numbers[place]) for place in places])
    ax.set(xlabel="layer of the parent", ylabel="layer")


def _paint_matches(ax: "Axes", lineage: Lineage) -> None:
    matches = lineage.matches
    nearest, second = (np.array(counts) / sum(counts) for counts in (matches.nearest, matches.runner_up))
    edges = np.linspace(-1, 1, len(nearest) + 1)
    ax.stairs(second, edges, color=palette().grey, linestyle="--", linewidth=1.4, label="second nearest")
    ax.stairs(nearest, edges, color=palette().colors[0], fill=True, alpha=0.35)
    ax.stairs(nearest, edges, color=palette().colors[0], linewidth=1.4, label="nearest")
    ax.set_xlim(edges[np.flatnonzero(nearest + second)[0]] - 0.06, 1.02)
    ax.set_ylim(0, 1.45 * max(nearest.max(), second.max()))  # leaves room for the legend
    ax.set_yticks([tick for tick in ax.get_yticks() if tick <= 1])
    ax.yaxis.set_major_formatter(format_share)
    ax.set(title="Nearest neurons", xlabel="cosine, mean over the roles", ylabel="neurons")
    ax.legend(loc="best")


def _paint_depth(axes: Sequence["Axes"], layers: Sequence[LayerAnalysis]) -> None:
    """Neurons shared, and where there are more panels, cosines and ranks, by layer."""
    from matplotlib.ticker import MaxNLocator

    numbers = [layer.layer for layer in layers]
    every, styles = ceil(len(layers) / 12), palette().role_styles
    roles = [role for role in styles if any(role in layer.projections for layer in layers)]

    def draw(ax: "Axes", figure: facts.LayerFigure, style: tuple[str, str, str], label: str) -> None:
        color, dash, marker = style
        values = [figure(layer) for layer in layers]
        ax.plot(numbers, values, color=color, linestyle=dash, marker=marker, markevery=every, label=label)

    def draw_shared(ax: "Axes") -> None:
        draw(ax, facts.SHARED, styles["gate"], "shared")
        draw(ax, facts.STRONG, styles["up"], "strongly")

    def draw_cosines(ax: "Axes") -> None:
        for role in roles:
            draw(ax, _cosine(role), styles[role], role)
        ax.set_ylim(*_from_zero(*ax.dataLim.intervaly))

    def draw_ranks(ax: "Axes") -> None:
        noise = facts.over_projections(_noise_ratio)
        for role in roles:
            draw(ax, facts.of_projection(role, facts.RANK_RATIO), styles[role], role)
        values = [noise(layer) for layer in layers]
        ax.plot(numbers, values, color=palette().grey, linewidth=3, alpha=0.5, zorder=1, label="noise")

    panels = {"Neurons shared": draw_shared, "Cosine": draw_cosines, "Rank (95 %)": draw_ranks}
    for ax, (title, paint) in zip(axes, panels.items(), strict=False):
        paint(ax)
        if title != "Cosine":
            ax.set_ylim(-0.03, 1.03)
            ax.yaxis.set_major_formatter(format_share)
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


def _roles_of(models: Sequence[MoETypeAnalysis]) -> list[str]:
    return [role for role in palette().role_styles if any(role in model.layers[0].projections for model in models)]


def _means(models: Sequence[MoETypeAnalysis], figure: facts.LayerFigure) -> list[float]:
    return [facts.mean_over_layers(model, figure) for model in models]


def _paint_shared_of_models(ax: "Axes", models: Sequence[MoETypeAnalysis]) -> None:
    rows = {"all": _means(models, facts.SHARED), "strongly": _means(models, facts.STRONG)}
    _paint_dots(ax, "Neurons shared", rows)
    ax.set_xlim(-0.03, 1.03)
    ax.xaxis.set_major_formatter(format_share)


def _paint_measures_of_models(axes: Sequence["Axes"], models: Sequence[MoETypeAnalysis]) -> None:
    """Neurons shared, cosines and ranks."""
    neurons, cosines, ranks = axes
    roles = _roles_of(models)
    _paint_shared_of_models(neurons, models)
    spread = {"down": _means(models, facts.COSINE_SPREAD)}
    _paint_dots(cosines, "Cosine", {role: _means(models, _cosine(role)) for role in roles}, bars=spread)
    cosines.set_xlim(*_from_zero(*cosines.dataLim.intervalx))
    _paint_dots(
        ranks,
        "Rank (95 %)",
        {role: _means(models, facts.of_projection(role, facts.RANK_RATIO)) for role in roles},
        ticks={role: _means(models, facts.of_projection(role, _noise_ratio)) for role in roles},
    )
    ranks.set_xlim(-0.03, 1.03)
    ranks.xaxis.set_major_formatter(format_share)


def _paint_names(ax: "Axes", names: Sequence[str]) -> None:
    """A legend of the models, in place of a panel."""
    ax.set_axis_off()
    _name_lines(ax, names, loc="upper left", borderpad=0, borderaxespad=0)


def _add_key(ax: "Axes", names: Sequence[str]) -> None:
    """A legend of the models below a panel."""
    _name_lines(ax, [wrap(name, APART - 0.6) for name in names], loc="upper left", bbox_to_anchor=(-0.1, -0.12))


def _name_lines(ax: "Axes", names: Sequence[str], **options: Any) -> None:
    handles = []
    for color, dash, marker in islice(cycle(palette().styles), len(names)):
        handles += ax.plot([], [], color=color, linestyle=dash, marker=marker, label="?")
    legend = ax.legend(handles=handles, **options)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)  # as a label, a name that begins with "_" would be left out


def _paint_decays_of_models(axes: Sequence["Axes"], models: Sequence[MoETypeAnalysis], roles: Sequence[str]) -> None:
    for ax, role in zip(axes, roles, strict=True):
        for model, (color, dash, marker) in zip(models, cycle(palette().styles), strict=False):
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
        for number, (value, (color, _, marker)) in enumerate(zip(values, cycle(palette().styles), strict=False)):
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
