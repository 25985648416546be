"""What is in this checkpoint? `MoELayoutService` tells it from the headers alone."""

from collections.abc import Sequence

from . import views  # noqa: F401  which registers how reports are shown
from .jobs.layout import describe_layout
from .reports import MoELayout


class MoELayoutService:
    """Tells how the experts of a model lie in its files, without reading one weight.

    >>> MoELayoutService.describe("demo:native").storage
    'bf16'
    """

    @staticmethod
    def describe(model: str, *, layers: Sequence[int] | str | None = None) -> MoELayout:
        """Describe one model, named as for `MoETypeService.analyze`.

        The headers that hold `layers` are read; if None, those of the first and the last MoE layer, and the others are
        taken to be like them unless all headers had to be read anyway. Raises a child of MoEError.
        """
        return describe_layout(model, layers)
