"""Reports as figures, and figures as files."""

from .conversion import plot_verification
from .overlays import plot_estimate
from .provenance import (
    plot_analysis,
    plot_comparison,
    plot_decay,
    plot_depth,
    plot_matches,
    plot_parents,
    plot_similarity,
)
from .style import ENDINGS, save, to_svg

__all__ = [
    "ENDINGS",
    "plot_analysis",
    "plot_comparison",
    "plot_decay",
    "plot_depth",
    "plot_estimate",
    "plot_matches",
    "plot_parents",
    "plot_similarity",
    "plot_verification",
    "save",
    "to_svg",
]
