"""Figures from reports: `plot_*` draws one, `save` writes it as a file."""

from .views.figures import (
    plot_analysis,
    plot_comparison,
    plot_decay,
    plot_depth,
    plot_estimate,
    plot_matches,
    plot_parents,
    plot_sharing,
    plot_similarity,
    plot_verification,
    save,
    to_svg,
)

__all__ = [
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
