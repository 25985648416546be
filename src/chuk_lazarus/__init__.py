"""chuk-lazarus: read the expert weights of Mixture-of-Experts checkpoints and say what is inside.

>>> import chuk_lazarus
>>> chuk_lazarus.analyze("demo:native").type
'NATIVE'

`analyze`, `compare`, `survey` and `shrink` are the services' methods of `chuk_lazarus.introspection.moe`, where
everything else is.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .introspection.moe import (
        Experts,
        MoECompressionService,
        MoEError,
        MoELayoutService,
        MoESurveyService,
        MoETypeService,
        plots,
    )

    analyze, compare = MoETypeService.analyze, MoETypeService.compare
    layout = MoELayoutService.describe
    shrink = MoECompressionService.compress
    survey = MoESurveyService.survey

__version__ = "0.5.0"

__all__ = ["Experts", "MoEError", "__version__", "analyze", "compare", "layout", "plots", "shrink", "survey"]

# name -> where it is in chuk_lazarus.introspection.moe
_HOMES = {
    "Experts": "Experts",
    "MoEError": "MoEError",
    "analyze": "MoETypeService.analyze",
    "compare": "MoETypeService.compare",
    "layout": "MoELayoutService.describe",
    "plots": "plots",
    "shrink": "MoECompressionService.compress",
    "survey": "MoESurveyService.survey",
}


def __getattr__(name: str) -> Any:
    """Find a public name when it is first used, so that `import chuk_lazarus` loads nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: Any = import_module(".introspection.moe", __name__)
    for part in _HOMES[name].split("."):
        found = getattr(found, part)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
