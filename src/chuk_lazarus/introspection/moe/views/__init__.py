"""How a result is shown: in a terminal, in a notebook, as a page, as a figure.

Importing this package registers how each kind of report looks (docs/decisions/views.md).
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
    MoEWeightsVerification,
    as_details,
    as_figure,
    as_html,
    as_markdown,
    as_rich,
    as_rows,
    as_text,
)
from .figures import plot_analysis, plot_comparison, plot_estimate, plot_verification
from .page import show_estimate, to_fragment
from .rows import (
    list_analysis,
    list_comparison,
    list_estimate,
    list_evaluation,
    list_layout,
    list_overlay,
    list_plan,
    list_quick,
    list_survey,
    list_verification,
    list_weights,
)
from .summaries import (
    summarise_analysis,
    summarise_comparison,
    summarise_compression,
    summarise_estimate,
    summarise_evaluation,
    summarise_export,
    summarise_layout,
    summarise_overlay,
    summarise_plan,
    summarise_quick,
    summarise_survey,
    summarise_verification,
    summarise_weights,
)
from .tables.cache import render_cache
from .tables.conversion import render_weights
from .tables.layout import render_layout
from .tables.overlays import (
    render_compression,
    render_estimate,
    render_evaluation,
    render_export,
    render_overlay,
    render_verification,
)
from .tables.provenance import (
    render_analysis,
    render_comparison,
    render_comparison_details,
    render_details,
    render_quick,
)
from .tables.survey import PlanTable, SurveyTable, plan_to_markdown, render_survey_summary, survey_to_markdown

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
as_rich.register(MoEWeightsVerification, render_weights)
as_rich.register(MoETypeSurvey, SurveyTable)
as_rich.register(MoESurveyPlan, PlanTable)

as_details.register(MoETypeAnalysis, render_details)
as_details.register(MoETypeComparison, render_comparison_details)
as_details.register(MoETypeSurvey, render_survey_summary)

as_html.register(MoETypeAnalysis, to_fragment)
as_html.register(MoETypeComparison, to_fragment)
as_html.register(MoEWeightsVerification, to_fragment)
as_html.register(MoEOverlayEstimate, show_estimate)

as_text.register(MoELayout, summarise_layout)
as_text.register(MoETypeAnalysis, summarise_analysis)
as_text.register(MoEQuickAnalysis, summarise_quick)
as_text.register(MoETypeComparison, summarise_comparison)
as_text.register(MoEOverlay, summarise_overlay)
as_text.register(MoEOverlayVerification, summarise_verification)
as_text.register(MoEOverlayEstimate, summarise_estimate)
as_text.register(MoEOverlayCompression, summarise_compression)
as_text.register(MoEOverlayExport, summarise_export)
as_text.register(MoEOverlayEvaluation, summarise_evaluation)
as_text.register(MoETypeSurvey, summarise_survey)
as_text.register(MoESurveyPlan, summarise_plan)
as_text.register(MoEWeightsVerification, summarise_weights)

as_rows.register(MoELayout, list_layout)
as_rows.register(MoETypeAnalysis, list_analysis)
as_rows.register(MoEQuickAnalysis, list_quick)
as_rows.register(MoETypeComparison, list_comparison)
as_rows.register(MoEOverlay, list_overlay)
as_rows.register(MoEOverlayVerification, list_verification)
as_rows.register(MoEOverlayEstimate, list_estimate)
as_rows.register(MoEOverlayEvaluation, list_evaluation)
as_rows.register(MoETypeSurvey, list_survey)
as_rows.register(MoESurveyPlan, list_plan)
as_rows.register(MoEWeightsVerification, list_weights)

as_markdown.register(MoETypeSurvey, survey_to_markdown)
as_markdown.register(MoESurveyPlan, plan_to_markdown)

as_figure.register(MoETypeAnalysis, plot_analysis)
as_figure.register(MoETypeComparison, plot_comparison)
as_figure.register(MoEOverlayEstimate, plot_estimate)
as_figure.register(MoEWeightsVerification, plot_verification)
