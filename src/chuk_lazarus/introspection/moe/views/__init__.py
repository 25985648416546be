"""How a result is shown: in a terminal, in a notebook, as a page, as a figure.

Importing this room registers how each kind of report looks (docs/decisions/views.md).
"""

from ..reports import (
    MoECache,
    MoELayout,
    MoEOverlay,
    MoEOverlayCompression,
    MoEOverlayEstimate,
    MoEOverlayEvaluation,
    MoEOverlayExport,
    MoEOverlayVerification,
    MoEQuickAnalysis,
    MoESurveyPlan,
    MoETypeAnalysis,
    MoETypeComparison,
    MoETypeSurvey,
    as_details,
    as_html,
    as_rich,
)
from .page import show_estimate, to_fragment
from .tables.cache import render_cache
from .tables.layout import render_layout
from .tables.overlays import (
    render_compression,
    render_estimate,
    render_evaluation,
    render_export,
    render_overlay,
    render_verification,
)
from .tables.provenance import render_analysis, render_comparison, render_expert_ranks, render_quick
from .tables.survey import SurveyTable, render_survey_plan, render_survey_summary

as_rich.register(MoECache, render_cache)
as_rich.register(MoELayout, render_layout)
as_rich.register(MoETypeAnalysis, render_analysis)
as_rich.register(MoEQuickAnalysis, render_quick)
as_rich.register(MoETypeComparison, render_comparison)
as_rich.register(MoEOverlay, render_overlay)
as_rich.register(MoEOverlayVerification, render_verification)
as_rich.register(MoEOverlayEstimate, render_estimate)
as_rich.register(MoEOverlayCompression, render_compression)
as_rich.register(MoEOverlayExport, render_export)
as_rich.register(MoEOverlayEvaluation, render_evaluation)
as_rich.register(MoETypeSurvey, SurveyTable)
as_rich.register(MoESurveyPlan, render_survey_plan)

as_details.register(MoETypeAnalysis, render_expert_ranks)
as_details.register(MoETypeSurvey, render_survey_summary)

as_html.register(MoETypeAnalysis, to_fragment)
as_html.register(MoETypeComparison, to_fragment)
as_html.register(MoEOverlayEstimate, show_estimate)
