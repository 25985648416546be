"""Figures of overlays."""

from math import nan, sqrt
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from ...reports import MoEOverlayEstimate
from ...text import format_bytes
from ..words import identify, name_layers
from .style import GREY, STYLES, finish, format_share, new_figure, styled, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ESTIMATE = "Relative error of the weights of the measured layers, root mean square, against the bytes of these layers."


@styled()
def plot_estimate(estimate: MoEOverlayEstimate, command: str | None = None) -> "Figure":
    """The weight error that bytes buy, as an overlay, quantised, and as plain SVDs.

    Errors are relative Frobenius norms, root mean squares over the measured layers; bytes are those of these layers.
    """
    figure = new_figure(3.6, "What the same bytes buy")
    _paint_estimate(figure.subplots(), estimate)
    source = f"{identify(estimate)}, {name_layers(estimate.layers_measured)}"
    return finish(figure, f"{ESTIMATE} What pays: {estimate.advice}.", [source], command)


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
    ax.plot(overlay, error, "*", color=STYLES[0][0], markersize=12, label=wrap(f"overlay, {estimate.rule}", 1.6))
    ax.axvline(stored, color=GREY, linewidth=1.2, linestyle=":", label=wrap(f"as stored, {format_bytes(stored)}", 1.6))
    errors_drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines[:4]])
    ax.set_yscale("symlog", linthresh=0.001)  # logarithmic, with a place for an error of zero
    ax.set_ylim(0.7 * np.nanmin(errors_drawn) or -0.0002, 1.4 * np.nanmax(errors_drawn))
    ax.set_xlim(0, 1.08 * max(*sizes, overlay, stored))
    ax.yaxis.set_major_locator(FixedLocator([0, *(a * 10.0**b for b in (-3, -2, -1) for a in (1, 2, 5)), 1]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(format_share)
    ax.xaxis.set_major_formatter(EngFormatter("B"))
    top = ax.secondary_xaxis("top")
    top.set_xticks(sizes, [str(row.bits) for row in rows])
    top.set_xlabel("bits of a quantised weight", loc="left")
    top.spines.top.set_visible(False)
    ax.set(xlabel="bytes", ylabel="relative error of the weights")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
