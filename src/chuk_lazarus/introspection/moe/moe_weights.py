"""Is this conversion still the same model? `MoEWeightsService` compares its experts with the original's."""

from . import views  # noqa: F401  which registers how reports are shown
from .arguments import ExpertCount, Layers, ModelName, expert_count, layer_numbers, model_name, real_number
from .conversion.verification import TOLERANCE, verify
from .progress import Progress
from .reports import MoEWeightsVerification


class MoEWeightsService:
    """Verifies the experts of a converted model: one that was quantised, renamed, stacked or split.

    >>> MoEWeightsService.verify("demo:native", "demo:native").passed
    True
    """

    @staticmethod
    def verify(
        model: ModelName,
        against: ModelName,
        *,
        layers: Layers | None = None,
        experts: ExpertCount = None,
        tolerance: float = TOLERANCE,
        progress: Progress | None = None,
    ) -> MoEWeightsVerification:
        """Compare the experts of `model` with those of `against`, the model that it was made from.

        Both are named as for `MoETypeService.analyze`. `layers` are those of the original, by default three evenly
        spaced ones. `experts` are evenly spaced, by default up to eight per layer, or all if `layers` is "all". Names
        and headers are checked in all layers. The error of an expert may be `tolerance` times the error that plain
        rounding to its storage format causes in the original's weights. Raises a child of MoEError if the models can't
        be compared; what is missing from `model` is a fault in the report instead.
        """
        count = expert_count(experts)
        return verify(
            model_name(model),
            model_name(against, "the original"),
            layers=layer_numbers(layers),
            experts="all" if experts == "all" else count,
            tolerance=real_number(tolerance, "the tolerance"),
            progress=progress,
        )
