"""Figures of overlays."""

from collections.abc import Sequence
from math import nan
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InvalidRequest
from ...reports import MoEOverlayEstimate
from ...text import format_bytes
from ..words import identify, name_layers
from .style import figure_of, finish, format_share, given_panels, needs_style, new_figure, palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ESTIMATE = (
    "Relative error of the weights of the measured layers (root mean square), by bits per expert weight with scales, "
    "and by the bytes of the experts of all layers."
)
WAYS = {  # key of a row -> how its line is labelled
    "coded": "codes on a base",
    "plain": "plain codes",
    "rounding": "quantised",
    "low_rank": "low rank, bf16",
    "svd": "plain SVD, bf16",
}
MOST_BITS = 9.0  # right of which nothing is drawn
GAP = 0.062  # between two labels, as a share of the height


@needs_style
def plot_estimate(
    estimate: MoEOverlayEstimate,
    command: str | None = None,
    *,
    ax: Any = None,
    caption: bool = False,
    dark: bool = False,
) -> "Figure":
    """The weight error that bits buy: in codes with and without a base, quantised, of low rank, and at best.

    Errors are relative Frobenius norms, root mean squares over the measured layers. Raises InvalidRequest for a report
    of an earlier version, which has no ladder.
    """
    if not estimate.ladder:
        raise InvalidRequest("the estimate is of an earlier version, and has no ladder", "make it again")
    if ax is not None:
        panels = given_panels(ax, 1)
        _paint_ladder(panels[0], estimate)
        return figure_of(panels)
    figure = new_figure(4.2, "What bits buy" if caption else "")
    _paint_ladder(figure.subplots(), estimate)
    if not caption:
        return finish(figure)
    source = f"{identify(estimate)}, {name_layers(estimate.layers_measured)}"
    star = f" Star: {estimate.rule}." if _bits(estimate, estimate.overlay_bytes) <= MOST_BITS else ""
    text = f"{ESTIMATE}{star} What pays: {estimate.advice}."
    return finish(figure, [text, source, *([command] if command else [])])


def _paint_ladder(ax: "Axes", estimate: MoEOverlayEstimate) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    rows = estimate.ladder
    bits = [row.bits for row in rows]
    ends: list[tuple[float, str, str]] = []
    drawn: list[float] = []
    for (name, label), (color, dash, marker) in zip(WAYS.items(), palette().styles, strict=False):
        errors = [nan if getattr(row, name) is None else getattr(row, name) for row in rows]
        if name == "coded" and all(row.coded == row.plain for row in rows):
            continue  # no base pays
        drawn += errors
        ax.plot(bits, errors, color=color, linestyle=dash, marker=marker, label=label)
        ends.append((errors[-1], label, color))
    bound = [row.bound for row in rows]
    ax.plot(bits, bound, color=palette().grey, linewidth=3, alpha=0.5, label="bound")
    ends.append((bound[-1], "bound", palette().grey))
    drawn += bound
    stored, chosen = _bits(estimate, estimate.stored_bytes), _bits(estimate, estimate.overlay_bytes)
    if chosen <= MOST_BITS:
        ax.plot(
            chosen, estimate.weight_error, "*", color=palette().colors[-1], markersize=11, label="estimate", zorder=3
        )
        drawn.append(estimate.weight_error)
    if stored <= MOST_BITS:
        ax.axvline(stored, color=palette().grey, linewidth=1.2, linestyle=":", label="as stored")
        ax.annotate(
            "as stored", (stored, 0.02), (3, 0), ("data", "axes fraction"), "offset points", color=palette().grey
        )
    ax.set_xscale("log", base=2)
    ax.set_xlim(0.95 * bits[0], 1.03 * max(bits[-1], stored if stored <= MOST_BITS else 0.0))
    ax.xaxis.set_major_locator(FixedLocator(bits))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(bits, [f"{row.bits:g}\n{format_bytes(row.bytes)}" for row in rows])
    ax.set_yscale("symlog", linthresh=0.001)  # logarithmic, with a place for an error of zero
    ax.set_ylim(0.7 * np.nanmin(drawn) or -0.0002, 1.4 * np.nanmax(drawn) or 0.001)
    ax.yaxis.set_major_locator(FixedLocator([0, *(a * 10.0**b for b in (-3, -2, -1) for a in (1, 2, 5)), 1]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(format_share)
    ax.set(xlabel="bits per weight; bytes of all experts", ylabel="relative error of the weights")
    _label_ends(ax, bits[-1], ends)


def _bits(estimate: MoEOverlayEstimate, size: int) -> float:
    """The bits per weight of experts that take so many bytes in all."""
    return 16 * size / estimate.original_bytes


def _label_ends(ax: "Axes", x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """The name of each line beside its last point, those of neighbours moved apart."""
    to_axes = ax.transData + ax.transAxes.inverted()
    places = sorted((float(to_axes.transform((x, y))[1]), y, label, color) for y, label, color in ends if y == y)
    heights: list[float] = []
    for height, *_ in places:
        heights.append(max(height, heights[-1] + GAP) if heights else height)
    for place in reversed(range(len(places) - 1)):
        heights[place] = min(heights[place], max(places[place][0], heights[place + 1] - GAP))
    for height, (_, y, label, color) in zip(heights, places, strict=True):
        ax.annotate(
            label,
            (x, y),
            (1.02, height),
            textcoords="axes fraction",
            color=color,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6},
        )
