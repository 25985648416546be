"""Reports as figures, and figures as files."""

from .conversion import draw_verification, plot_verification
from .overlays import plot_estimate
from .provenance import (
    draw_decays,
    draw_decays_of_models,
    draw_depth,
    draw_layer,
    draw_measures,
    draw_parents,
    plot_analysis,
    plot_comparison,
    plot_decay,
    plot_depth,
    plot_matches,
    plot_parents,
    plot_sharing,
    plot_similarity,
)
from .style import ENDINGS, save, to_svg

__all__ = [
    "ENDINGS",
    "draw_decays",
    "draw_decays_of_models",
    "draw_depth",
    "draw_layer",
    "draw_measures",
    "draw_parents",
    "draw_verification",
    "plot_analysis",
    "plot_comparison",
    "plot_decay",
    "plot_depth",
    "plot_estimate",
    "plot_matches",
    "plot_parents",
    "plot_sharing",
    "plot_similarity",
    "plot_verification",
    "save",
    "to_svg",
]
