"""Mixture-of-Experts checkpoints: how the experts were trained, and what an overlay would save.

>>> from chuk_lazarus.introspection.moe import MoETypeService
>>> MoETypeService.analyze("demo:native").type
'NATIVE'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import InvalidRequest, LibraryMissing, ModelUnreadable, MoEError, NotMoE, UnknownFormat
    from .jobs.resources import memory_limit
    from .moe_cache import MoECacheService
    from .moe_compression import MoECompressionService
    from .moe_layout import MoELayoutService
    from .moe_survey import MoESurveyService
    from .moe_type import MoETypeService
    from .moe_weights import MoEWeightsService
    from .overlays.allocation import RankOptions
    from .overlays.bit_budget import OverlayOptions
    from .overlays.runtime.load import load_overlay as load_overlay  # not in __all__: these need MLX,
    from .overlays.runtime.load import overlay_classes as overlay_classes  # which some platforms lack
    from .overlays.runtime.modules import OverlayMoE as OverlayMoE
    from .reports import (
        Cost,
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
        SurveyRequest,
        SurveyRow,
    )
    from .weights.expert_layer import ExpertLayer
    from .weights.experts import Experts

__all__ = [
    "Cost",
    "ExpertLayer",
    "Experts",
    "InvalidRequest",
    "LibraryMissing",
    "MoECache",
    "MoECacheService",
    "MoECompressionService",
    "MoEError",
    "MoELayout",
    "MoELayoutService",
    "MoEOverlay",
    "MoEOverlayCompression",
    "MoEOverlayEstimate",
    "MoEOverlayEvaluation",
    "MoEOverlayExport",
    "MoEOverlayVerification",
    "MoEQuickAnalysis",
    "MoESurveyPlan",
    "MoESurveyService",
    "MoETypeAnalysis",
    "MoETypeComparison",
    "MoETypeService",
    "MoETypeSurvey",
    "MoEWeightsService",
    "MoEWeightsVerification",
    "ModelUnreadable",
    "NotMoE",
    "OverlayOptions",
    "RankOptions",
    "SurveyRequest",
    "SurveyRow",
    "UnknownFormat",
    "memory_limit",
]

_HOMES = {
    "errors": ("InvalidRequest", "LibraryMissing", "ModelUnreadable", "MoEError", "NotMoE", "UnknownFormat"),
    "jobs.resources": ("memory_limit",),
    "moe_cache": ("MoECacheService",),
    "moe_compression": ("MoECompressionService",),
    "moe_layout": ("MoELayoutService",),
    "moe_survey": ("MoESurveyService",),
    "moe_type": ("MoETypeService",),
    "moe_weights": ("MoEWeightsService",),
    "reports": (
        "Cost",
        "MoECache",
        "MoELayout",
        "MoEOverlay",
        "MoEOverlayCompression",
        "MoEOverlayEstimate",
        "MoEOverlayEvaluation",
        "MoEOverlayExport",
        "MoEOverlayVerification",
        "MoEQuickAnalysis",
        "MoESurveyPlan",
        "MoETypeAnalysis",
        "MoETypeComparison",
        "MoETypeSurvey",
        "MoEWeightsVerification",
        "SurveyRequest",
        "SurveyRow",
    ),
    "overlays.allocation": ("RankOptions",),
    "overlays.bit_budget": ("OverlayOptions",),
    "overlays.runtime.load": ("load_overlay", "overlay_classes"),
    "overlays.runtime.modules": ("OverlayMoE",),
    "weights.expert_layer": ("ExpertLayer",),
    "weights.experts": ("Experts",),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `lazarus --help` must not wait for numpy and pydantic."""
    if name == "plots":
        return import_module(".plots", __name__)
    for module, names in _HOMES.items():
        if name in names:
            if module == "reports":
                import_module(".views", __name__)  # which registers how reports are shown
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "plots", *(name for names in _HOMES.values() for name in names)})
