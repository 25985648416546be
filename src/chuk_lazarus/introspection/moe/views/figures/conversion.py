"""Figures of verified conversions."""

from math import ceil, nan
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InvalidRequest
from ...reports import MoEWeightsVerification
from .. import verdicts
from ..words import identify
from .style import figure_of, finish, given_panels, needs_style, new_figure, palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST = 2.0**-9  # the error that arithmetic makes, by which those of exact formats are divided
RANGE = (0.25, 64.0)  # ratios beyond which colours do not change
CAPTION = (
    "The relative error of each compared expert over what its storage format should cost, by layer and role; crosses: "
    "no number."
)


NARROW = 4.6  # inches: the width on a page, which a phone shows whole


@needs_style
def plot_verification(
    report: MoEWeightsVerification,
    command: str | None = None,
    *,
    ax: Any = None,
    caption: bool = False,
    dark: bool = False,
) -> "Figure":
    """The error of each compared expert over what its format should cost: a row for each layer and role, a column for
    each expert. Raises InvalidRequest where none was compared."""
    rows = _rows(report)
    if ax is not None:
        panels = given_panels(ax, 1)
        _paint(panels[0], rows, report.tolerance)
        return figure_of(panels)
    title = f"{report.model}: {'passed' if report.passed else 'failed'}" if caption else ""
    figure = new_figure(_height(rows), title)
    _paint(figure.subplots(), rows, report.tolerance)
    source = f"{identify(report)} against {verdicts.identify_original(report)}"
    return finish(figure, [CAPTION, source, *([command] if command else [])] if caption else ())


@needs_style
def draw_verification(report: MoEWeightsVerification) -> "Figure":
    """The same, for a page."""
    rows = _rows(report)
    figure = new_figure(_height(rows), width=NARROW)
    _paint(figure.subplots(), rows, report.tolerance)
    return finish(figure)


Rows = list[tuple[str, dict[int, float | None], float]]


def _rows(report: MoEWeightsVerification) -> Rows:
    rows = verdicts.heat_rows(report.layers)
    if not rows:
        raise InvalidRequest("no expert was compared", "the report says what is missing")
    return rows


def _height(rows: Rows) -> float:
    return min(8.0, 1.2 + 0.2 * len(rows))


def _paint(ax: "Axes", rows: Rows, tolerance: float) -> None:
    import matplotlib
    from matplotlib.colors import LogNorm

    experts = sorted({expert for _, errors, _ in rows for expert in errors})
    ratios = np.full((len(rows), len(experts)), nan)
    for place, (_, errors, expected) in enumerate(rows):
        for expert, error in errors.items():
            if error is not None:
                ratios[place, experts.index(expert)] = max(error / max(expected, LEAST), RANGE[0])
            else:
                ax.plot(experts.index(expert), place, "x", color=palette().colors[1], markersize=4)
    colors = matplotlib.colormaps["cividis"].with_extremes(bad=(0.0, 0.0, 0.0, 0.0))
    image = ax.imshow(ratios, cmap=colors, norm=LogNorm(*RANGE), interpolation="nearest", aspect="auto")
    figure = ax.get_figure()
    assert figure
    bar = figure.colorbar(image, cax=ax.inset_axes((1.02, 0, 0.03, 1)), format="{x:g}", ticks=[0.25, 1, 4, 16, 64])
    bar.ax.axhline(tolerance, color=palette().colors[1], linewidth=1.5)
    if bar.solids:
        bar.solids.set_rasterized(True)  # vector strips would show seams
    bar.outline.set_visible(False)
    step, down = ceil(len(experts) / 16), ceil(len(rows) / 36)
    ax.set_xticks(range(0, len(experts), step), [str(expert) for expert in experts[::step]])
    ax.set_yticks(range(0, len(rows), down), [name for name, *_ in rows[::down]])
    ax.set(xlabel="expert", ylabel="layer and role")
    ax.set_facecolor("none")
    for panel in (ax, bar.ax):
        panel.grid(False)
        panel.spines[:].set_visible(False)
