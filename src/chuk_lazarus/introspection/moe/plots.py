"""Reports as figures, and figures as files.

Colours are those of Okabe and Ito and matplotlib's cividis, which the colour-blind tell apart; lines differ by dash or
marker, too. Figures are made without pyplot, so in any thread, and a notebook shows them as they are.
"""

import hashlib
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from itertools import cycle, islice
from math import ceil, isnan, nan, sqrt
from pathlib import Path
from statistics import fmean
from threading import RLock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidRequest, printable
from .files import write_file
from .numerics.spectra import noise_decay, noise_rank
from .reports import (
    Identity,
    LayerAnalysis,
    Lineage,
    MoEOverlayEstimate,
    MoETypeAnalysis,
    MoETypeComparison,
    Projection,
)
from .text import format_bytes, format_ranges, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


ENDINGS = (".png", ".svg", ".pdf")
WIDTH = 7.5  # inches: a page's, so that type is printed in its own size
PAD = 0.08  # inches around panels
SMALL = 8  # points, the smallest type
GREY, DARK = "#767676", "#404040"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = [(COLORS[i % 7], ("-", "--", "-.", ":")[i % 4], "os^DvPX*"[i % 8]) for i in range(56)]  # no two alike
ROLES = dict(zip(("gate", "up", "down"), STYLES, strict=False))
MARKS = "osD^vP*X"  # of the shares of energy
FLOOR = 0.01  # of the root mean square: smaller singular values are off the scale
LEAST_SCALE = 0.1  # the least top of a heat map's scale, so that noise does not look like structure
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": SMALL,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.color": DARK,
    "ytick.color": DARK,
    "legend.fontsize": SMALL,
    "legend.edgecolor": "none",
    "legend.handletextpad": 0.5,
    "savefig.dpi": 200,
    "text.parse_math": False,  # a model's name may have dollars
    "svg.fonttype": "none",  # text stays text: it can be found, copied and read aloud
    "svg.hashsalt": "chuk-lazarus",
    "pdf.fonttype": 42,
}
DECAY = (
    "Singular values of the deltas (expert minus mean of all experts) over their root mean square, mean over the "
    "sampled experts; grey: Gaussian noise of the same shape. Marks: effective ranks at shares of the energy."
)
SIMILARITY = (
    "Cosine of the experts' flattened down projections, and the share of an expert's sampled neurons (row) that are "
    "found again in another (column); alike experts stand together."
)
MATCHES = (
    "Cosine of sampled neurons with the nearest neuron of another expert, and with the second nearest, which is what "
    "unrelated neurons look like."
)
DEPTH = "Effective rank at 95 % of the delta's energy, mean cosine of two experts, and neurons found in another expert."
COMPARISON = (
    "Top, the first analysed layer of each: singular values of the deltas (expert minus mean of all experts) over "
    "their root mean square; broad and pale, Gaussian noise of the same shape. Bottom, means over the layers: upright "
    "ticks are the rank of noise, and the share found by chance; bars the standard deviation over pairs of experts."
)
ESTIMATE = "Relative error of the weights of the measured layers, root mean square, against the bytes of these layers."
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

_lock = RLock()


@contextmanager
def _styled() -> Iterator[None]:
    """Our style and nobody else's; one thread at a time, since matplotlib's settings belong to the process."""
    from matplotlib import style

    with _lock, style.context(["default", STYLE]):
        yield


@_styled()
def plot_decay(layer: LayerAnalysis, model: Identity | None = None, command: str | None = None) -> "Figure":
    """The deltas' singular values against those of noise, a panel for each projection.

    Singular values are over their root mean square, ranks a share of the greatest possible one.
    """
    figure = _new_figure(2.9, "How fast the deltas' singular values fall")
    _paint_decays(_row(figure, figure.add_gridspec()[0], len(layer.projections)), layer)
    return _finish(figure, DECAY, _source(model, [layer]), command)


@_styled()
def plot_similarity(layer: LayerAnalysis, model: Identity | None = None, command: str | None = None) -> "Figure":
    """How alike the experts are: the cosines of their down projections, and the share of neurons found again.

    The order of the experts is that of a hierarchical clustering with average linkage.
    """
    figure = _new_figure(3.4, "How alike the experts are")
    _paint_similarity(_row(figure, figure.add_gridspec()[0], 2), layer)
    return _finish(figure, SIMILARITY, _source(model, [layer]), command)


@_styled()
def plot_matches(layer: LayerAnalysis, model: Identity | None = None, command: str | None = None) -> "Figure":
    """How near a neuron's nearest in another expert is, against its second nearest: what chance does."""
    figure = _new_figure(2.7, "How near the nearest neurons are")
    ax = figure.subplots()
    _paint_matches(ax, layer.lineage)
    ax.set_title("")
    return _finish(figure, f"{MATCHES} {_found(layer.lineage)}", _source(model, [layer]), command)


@_styled()
def plot_depth(analysis: MoETypeAnalysis, command: str | None = None) -> "Figure":
    """Rank ratio, cosine and the share of neurons found again, by layer."""
    figure = _new_figure(5.2, "From layer to layer")
    axes = figure.subplots(3, 1, sharex=True)
    _paint_depth(axes, analysis.layers)
    for ax in axes:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
        ax.label_outer()
    return _finish(figure, DEPTH, _source(analysis, analysis.layers), command)


@_styled()
def plot_analysis(analysis: MoETypeAnalysis, command: str | None = None) -> "Figure":
    """An analysis in one figure: decay, similarity and matches of its first layer, and what changes with depth."""
    first, many = analysis.layers[0], len(analysis.layers) > 1
    figure = _new_figure(7.4 if many else 4.7, f"{_name(analysis)}: {_verdict(analysis)}")
    rows = figure.add_gridspec(4, height_ratios=(2, 2, 2, 0.36)) if many else figure.add_gridspec(2)
    _paint_decays(_row(figure, rows[0], len(first.projections)), first)
    *heat_maps, matches = _row(figure, rows[1], 3)
    _paint_similarity(heat_maps, first)
    _paint_matches(matches, first.lineage)
    text = [DECAY, f"{SIMILARITY} {MATCHES} {_found(first.lineage)}"]
    if many:
        axes = _row(figure, rows[2], 3)
        _paint_depth(axes, analysis.layers)
        for ax, key in zip(axes, _row(figure, rows[3], 3), strict=True):
            key.set_axis_off()
            key.legend(*ax.get_legend_handles_labels(), loc="upper left", ncols=2, borderpad=0, borderaxespad=0)
        text = [f"Top, layer {first.layer}: {text[0]}", f"Middle, layer {first.layer}: {text[1]}", f"Bottom: {DEPTH}"]
    return _finish(figure, "\n".join(text), _source(analysis, analysis.layers), command)


@_styled()
def plot_comparison(comparison: MoETypeComparison, command: str | None = None) -> "Figure":
    """Several models in one figure: decay in the first layer of each; ranks, cosines and neurons found again."""
    models = comparison.models
    names = [_wrap(f"{_name(model)}: {_verdict(model)}", WIDTH - 0.8) for model in models]
    key = sum(0.21 + 0.13 * name.count("\n") for name in names)
    figure = _new_figure(4.8 + key, "Models compared")
    rows = figure.add_gridspec(3, height_ratios=(key, 2.4, 2.4))
    _paint_names(figure.add_subplot(rows[0]), names)
    roles = [role for role in ROLES if any(role in model.layers[0].projections for model in models)]
    _paint_decays_of_models(_row(figure, rows[1], len(roles[:2])), models, roles[:2])
    ranks, cosines, found = _row(figure, rows[2], 3)

    def means(of: Callable[[LayerAnalysis], float]) -> list[float]:
        return [_mean(model, of) for model in models]

    _paint_dots(
        ranks,
        "Rank (95 %)",
        {role: means(partial(_rank_ratio, role=role)) for role in roles},
        ticks={role: means(partial(_noise_ratio, role=role)) for role in roles},
    )
    _paint_dots(
        cosines,
        "Cosine",
        {role: means(partial(_cosine, role=role)) for role in roles},
        bars={"down": means(lambda layer: layer.cosine.std)},
    )
    chance = means(lambda layer: layer.lineage.chance)
    _paint_dots(
        found,
        "Neurons found",
        {"again": means(lambda layer: layer.lineage.kept), "closely": means(lambda layer: layer.lineage.close)},
        ticks={"again": chance, "closely": chance},
    )
    cosines.set_xlim(*_from_zero(*cosines.dataLim.intervalx))
    for ax in (ranks, found):
        ax.set_xlim(-0.03, 1.03)
        ax.xaxis.set_major_formatter(_share)
    return _finish(figure, COMPARISON, [line for model in models for line in _source(model, model.layers)], command)


@_styled()
def plot_estimate(estimate: MoEOverlayEstimate, command: str | None = None) -> "Figure":
    """The weight error that bytes buy, as an overlay, quantised, and as plain SVDs.

    Errors are relative Frobenius norms, root mean squares over the measured layers; bytes are those of these layers.
    """
    figure = _new_figure(3.6, "What the same bytes buy")
    _paint_estimate(figure.subplots(), estimate)
    source = f"{_name(estimate)}, {_layers(estimate.layers_measured)}"
    return _finish(figure, f"{ESTIMATE} What pays: {estimate.advice}.", [source], command)


def save(figure: "Figure", path: str | Path) -> None:
    """Write a figure as .png, .svg or .pdf, whole or not at all; the same figure gives the same bytes.

    Raises InvalidRequest for another ending and where nothing can be written.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise InvalidRequest(f"a figure can't be written as {path.name!r}", "end its name in .png, .svg or .pdf")
    if ending == ".svg":
        data = to_svg(figure).encode()
    else:
        data = _render(figure, ending[1:], {"Software": None} if ending == ".png" else {"CreationDate": None})
    try:
        write_file(path, data)
    except OSError as error:
        raise InvalidRequest(f"can't write {str(path)!r}: {error.strerror}") from None


def to_svg(figure: "Figure") -> str:
    """A figure as one `<svg>` element, for a page or a file of its own: text as text, nothing from elsewhere.

    Ids begin with a digest of the figure, so that several figures on a page don't meet.
    """
    drawn = _render(figure, "svg", dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(drawn)
    prefix = f"f{hashlib.sha256(drawn).hexdigest()[:8]}-"
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = {found for one in root.iter() for value in one.attrib.values() for found in re.findall(r"#([\w-]+)", value)}
    known = {one.get("id") for one in root.iter()} & used
    for one in root.iter():
        one.tag = one.tag.split("}")[-1]
        attributes = {name.replace(f"{{{XLINK}}}", "xlink:"): value for name, value in one.attrib.items()}
        one.attrib.clear()
        for name, value in attributes.items():
            if name == "id":
                if value in known:
                    one.set("id", prefix + value)
            else:
                one.set(name, re.sub(r"#([\w-]+)", lambda m: f"#{prefix * (m[1] in known)}{m[1]}", value))
    # what matplotlib says in a style sheet for "*", which would hold for the whole page
    root.attrib |= {"xmlns": SVG, "xmlns:xlink": XLINK, "stroke-linejoin": "round", "stroke-linecap": "butt"}
    return ElementTree.tostring(root, encoding="unicode")


@_styled()
def _render(figure: "Figure", kind: str, metadata: Mapping[str, None]) -> bytes:
    """The figure's file, without the metadata that would change from one run to the next."""
    file = BytesIO()
    figure.savefig(file, format=kind, metadata=dict(metadata))
    return file.getvalue()


def _new_figure(height: float, title: str) -> "Figure":
    """A figure with so many inches for its panels, beside title and caption."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    shown = _wrap(title, WIDTH - 2 * PAD, 11)
    height += shown.count("\n") * 1.2 * 11 / 72
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=PAD, h_pad=PAD))
    figure.suptitle(shown, x=PAD / WIDTH, ha="left", fontsize=11, fontweight="bold")
    figure._repr_svg_ = partial(to_svg, figure)  # type: ignore[attr-defined]  # what a notebook asks for
    return figure


def _finish(figure: "Figure", text: str, source: Sequence[str], command: str | None) -> "Figure":
    """The figure with its caption: what is to be seen, of which model and layers, by which command."""
    from matplotlib.axes import Axes

    caption = _wrap("\n".join([text, *source, *([command] if command else [])]), WIDTH - 2 * PAD)
    lines = caption.count("\n") + 1
    figure.supxlabel(caption, x=PAD / WIDTH, ha="left", fontsize=SMALL, color=DARK, linespacing=1.3)
    figure.set_figheight(figure.get_figheight() + lines * 1.3 * SMALL / 72)
    for ax in figure.findobj(Axes):
        ax.tick_params(labelsize=SMALL)  # how many numbers an axis gets must not depend on whoever draws it
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once for all: again, it would move by a hair
    return figure


def _wrap(text: str, inches: float, points: float = SMALL) -> str:
    """The text in lines that fit, also where it has no blanks; what the font can't show is escaped."""
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=points, weight="bold" if points > SMALL else "normal")
    known = get_font(findfont(font)).get_char_index

    def width(line: str) -> float:
        # more than is measured: at 100 dots per inch, letters are made whole dots wide
        return 1.1 / 72 * float(text_to_path.get_text_width_height_descent(line, font, ismath=False)[0])

    lines = []
    for paragraph in text.split("\n"):
        shown = "".join(c if known(ord(c)) else c.encode("unicode_escape").decode() for c in printable(paragraph))
        broken, most = [shown], len(shown)
        while (widest := max(map(width, broken), default=0.0)) > inches and most > 1:
            most = min(most - 1, ceil(most * inches / widest))
            broken = textwrap.wrap(shown, most, break_on_hyphens=False)
        lines += broken
    return "\n".join(lines)


def _name(model: Identity) -> str:
    return model.model + (f" @ {model.revision[:12]}" if model.revision else "")


def _layers(numbers: Sequence[int]) -> str:
    return f"layer{'' if len(numbers) == 1 else 's'} {format_ranges(numbers)}"


def _source(model: Identity | None, layers: Sequence[LayerAnalysis]) -> list[str]:
    """What a caption says of where the figures come from."""
    where = _layers([layer.layer for layer in layers])
    return [f"{_name(model)}, {where}" if model else where.capitalize()]


def _verdict(analysis: MoETypeAnalysis) -> str:
    return analysis.type + ("" if analysis.type == "UNDETERMINED" else f" ({analysis.confidence:.0%} confidence)")


def _found(lineage: Lineage) -> str:
    return (
        f"{percent(lineage.kept)} of {lineage.neurons:,} neurons are found again, {percent(lineage.close)} closely, "
        f"{percent(lineage.chance)} by chance."
    )


def _share(value: float, _place: object = None) -> str:
    """A tick of a scale of shares: "0.5 %"."""
    return f"{100 * value:.4g} %"


def _row(figure: "Figure", place: Any, panels: int) -> list["Axes"]:
    """So many panels side by side in a place of the figure's grid."""
    grid = place.subgridspec(1, panels)
    return [figure.add_subplot(grid[0, i]) for i in range(panels)]


def _paint_decays(axes: Sequence["Axes"], layer: LayerAnalysis) -> None:
    for ax, (role, projection) in zip(axes, layer.projections.items(), strict=True):
        _paint_decay(ax, role, projection)
    _scale_decays(axes)


def _paint_decay(ax: "Axes", role: str, projection: Projection) -> None:
    color, dash, _ = ROLES[role]
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
        label = f"{_share(float(energy))}: rank {rank:.0f}"
        ax.plot(share, height, mark, color=color, markerfacecolor="white", markeredgewidth=1.4, label=label)
    out, inner = projection.shape
    ax.set(title=f"{role}, {out} × {inner}", xlabel=f"rank, % of {largest}")
    ax.legend(loc="best")


def _rank_shares(projection: Projection) -> NDArray[np.float64]:
    """Which ranks the values of `decay` have, in per cent of the greatest."""
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
    similarity, lineage = layer.similarity, layer.lineage
    cosines, pairs = np.array(similarity.cosine), np.array(lineage.pairs)
    if similarity.experts == lineage.experts:
        order = right_order = _order(cosines + pairs + pairs.T)
    else:
        order, right_order = _order(cosines), _order(pairs + pairs.T)
    _paint_heat(left, cosines, similarity.experts, order, "Cosine (down)")
    _paint_heat(right, pairs, lineage.experts, right_order, "Neurons found again", _share)
    left.set(xlabel="expert", ylabel="expert")
    right.set(xlabel="in expert", ylabel="neurons of expert")


def _order(likeness: NDArray[np.float64]) -> list[int]:
    """The order of a hierarchical clustering: the alike stand together, and else the lower number comes first."""
    from scipy.cluster.hierarchy import linkage

    distances = (likeness.max() - likeness[np.triu_indices(len(likeness), 1)]).round(2)
    groups = [[i] for i in range(len(likeness))]
    for one, other, *_ in linkage(distances, "average"):
        first, second = sorted((groups[int(one)], groups[int(other)]), key=min)
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

    shown = np.where(np.eye(len(values), dtype=bool), nan, values)[np.ix_(order, order)]
    colors = matplotlib.colormaps["cividis"].with_extremes(bad="#E4E4E4")
    low, high = min(0.0, float(np.nanmin(shown))), max(LEAST_SCALE, float(np.nanmax(shown)))
    figure: Any = ax.figure
    image = ax.imshow(shown, cmap=colors, vmin=low, vmax=high, interpolation="nearest")
    bar = figure.colorbar(image, cax=ax.inset_axes((1.04, 0, 0.06, 1)), format=scale)
    bar.solids.set_rasterized(True)  # as strips, they would show seams
    bar.outline.set_visible(False)
    ticks = range(0, len(order), ceil(len(order) / 8))
    names = [str(experts[order[i]]) for i in ticks]
    ax.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 2 else 0)
    ax.set_yticks(ticks, names)
    for panel in (ax, bar.ax):
        panel.grid(False)
        panel.spines[:].set_visible(False)
    ax.set_title(title)


def _paint_matches(ax: "Axes", lineage: Lineage) -> None:
    matches = lineage.matches
    nearest, second = (np.array(counts) / lineage.neurons for counts in (matches.nearest, matches.runner_up))
    edges = np.linspace(-1, 1, len(nearest) + 1)
    ax.stairs(second, edges, color=GREY, linestyle="--", linewidth=1.4, label="second nearest")
    ax.stairs(nearest, edges, color=COLORS[0], fill=True, alpha=0.35)
    ax.stairs(nearest, edges, color=COLORS[0], linewidth=1.4, label="nearest")
    ax.set_xlim(edges[np.flatnonzero(nearest + second)[0]] - 0.06, 1.02)
    ax.set_ylim(0, 1.45 * max(nearest.max(), second.max()))  # room for the key
    ax.set_yticks([tick for tick in ax.get_yticks() if tick <= 1])
    ax.yaxis.set_major_formatter(_share)
    ax.set(title="Nearest neurons", xlabel="cosine, mean over the roles", ylabel="neurons")
    ax.legend(loc="best")


def _paint_depth(axes: Sequence["Axes"], layers: Sequence[LayerAnalysis]) -> None:
    from matplotlib.ticker import MaxNLocator

    ranks, cosines, found = axes
    numbers = [layer.layer for layer in layers]
    every = ceil(len(layers) / 12)

    def draw(ax: "Axes", values: Sequence[float], style: tuple[str, str, str], label: str) -> None:
        color, dash, marker = style
        ax.plot(numbers, values, color=color, linestyle=dash, marker=marker, markevery=every, label=label)

    roles = [role for role in ROLES if any(role in layer.projections for layer in layers)]
    for role in roles:
        draw(ranks, [_rank_ratio(layer, role) for layer in layers], ROLES[role], role)
        draw(cosines, [_cosine(layer, role) for layer in layers], ROLES[role], role)
    noise = [fmean(_noise_ratio(layer, role) for role in layer.projections) for layer in layers]
    ranks.plot(numbers, noise, color=GREY, linewidth=3, alpha=0.5, zorder=1, label="noise")
    for figure, style, label in (
        ("kept", ROLES["gate"], "found again"),
        ("close", ROLES["up"], "closely"),
        ("chance", (GREY, ":", "x"), "by chance"),
    ):
        draw(found, [getattr(layer.lineage, figure) for layer in layers], style, label)
    cosines.set_ylim(*_from_zero(*cosines.dataLim.intervaly))
    for ax in (ranks, found):
        ax.set_ylim(-0.03, 1.03)
        ax.yaxis.set_major_formatter(_share)
    for ax, title in ((ranks, "Rank (95 %)"), (cosines, "Cosine"), (found, "Neurons found again")):
        ax.set(title=title, xlabel="layer")
        ax.set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _from_zero(low: float, high: float) -> tuple[float, float]:
    """A scale for cosines that begins at zero, so that little differences look little."""
    top = max(LEAST_SCALE, 1.1 * high)
    return min(-0.03 * top, 1.1 * low), top


def _rank_ratio(layer: LayerAnalysis, role: str) -> float:
    """NaN where the layer has no such projection, as in the two below."""
    return layer.projections[role].rank_ratio if role in layer.projections else nan


def _noise_ratio(layer: LayerAnalysis, role: str) -> float:
    if role not in layer.projections:
        return nan
    projection = layer.projections[role]
    return noise_rank(projection.shape, 0.95) / projection.max_rank


def _cosine(layer: LayerAnalysis, role: str) -> float:
    return float(getattr(layer.cosine, role)) if role in layer.projections else nan


def _mean(model: MoETypeAnalysis, of: Callable[[LayerAnalysis], float]) -> float:
    """Over the layers that have the figure."""
    found = [value for layer in model.layers if not isnan(value := of(layer))]
    return fmean(found) if found else nan


def _paint_names(ax: "Axes", names: Sequence[str]) -> None:
    """A key of models in place of a panel."""
    ax.set_axis_off()
    for color, dash, marker in islice(cycle(STYLES), len(names)):
        ax.plot([], [], color=color, linestyle=dash, marker=marker, label="?")
    key = ax.legend(loc="upper left", borderpad=0, borderaxespad=0)
    for text, name in zip(key.get_texts(), names, strict=True):
        text.set_text(name)  # not given as a label: one that begins with "_" would be left out


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
    """A line for each name, on it a mark for each model, and where given a tick in its colour or a bar about it."""
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


def _paint_estimate(ax: "Axes", estimate: MoEOverlayEstimate) -> None:
    from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

    rows = sorted(estimate.same_bytes, key=lambda row: row.bytes)
    sizes = [row.bytes for row in rows]
    for name, (color, dash, marker), errors in (
        ("overlay", STYLES[0], [nan if row.overlay is None else row.overlay for row in rows]),
        ("quantised", STYLES[1], [row.quantisation for row in rows]),
        ("plain SVD", STYLES[2], [row.svd for row in rows]),
    ):
        ax.plot(sizes, errors, color=color, linestyle=dash, marker=marker, label=name)
    measured = [layer for layer in estimate.layers if layer.measured]
    error = sqrt(fmean(layer.weight_error**2 for layer in measured))
    overlay = sum(layer.overlay_bytes for layer in measured)
    stored = sum(layer.stored_bytes for layer in measured)
    ax.plot(overlay, error, "*", color=STYLES[0][0], markersize=12, label=_wrap(f"overlay, {estimate.rule}", 1.6))
    ax.axvline(stored, color=GREY, linewidth=1.2, linestyle=":", label=_wrap(f"as stored, {format_bytes(stored)}", 1.6))
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines[:4]])
    ax.set_yscale("symlog", linthresh=0.001)  # logarithmic, but with a place for no error at all
    ax.set_ylim(0.7 * np.nanmin(drawn) or -0.0002, 1.4 * np.nanmax(drawn))
    ax.set_xlim(0, 1.08 * max(*sizes, overlay, stored))
    ax.yaxis.set_major_locator(FixedLocator([0, *(a * 10.0**b for b in (-3, -2, -1) for a in (1, 2, 5)), 1]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(_share)
    ax.xaxis.set_major_formatter(EngFormatter("B"))
    top = ax.secondary_xaxis("top")
    top.set_xticks(sizes, [str(row.bits) for row in rows])
    top.set_xlabel("bits of a quantised weight", loc="left")
    top.spines.top.set_visible(False)
    ax.set(xlabel="bytes", ylabel="relative error of the weights")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
