"""What is in this checkpoint? `MoELayoutService` reads it from the headers alone."""

from . import views  # noqa: F401  which registers how reports are shown
from .arguments import Layers, ModelName, byte_size, layer_numbers, model_name, whole_number
from .jobs.layout import describe_layout
from .overlays.fit import CONTEXT, REST_BITS, parse_rest_bits, plan_fit
from .reports import MoELayout


class MoELayoutService:
    """Describes how the experts of a model are stored in its files, without reading weights.

    >>> MoELayoutService.describe("demo:native").storage
    'bf16'
    """

    @staticmethod
    def describe(
        model: ModelName,
        *,
        layers: Layers | None = None,
        fit: int | str | None = None,
        context: int = CONTEXT,
        rest_bits: int | str = REST_BITS,
    ) -> MoELayout:
        """Describe one model, named as for `MoETypeService.analyze`.

        Reads the headers that hold `layers`, by default the first and the last MoE layer; the others are assumed to be
        like them, unless all headers had to be read anyway. `fit` asks whether the model fits into that many bytes
        ("24GB") when quantised for mlx-lm, with everything but the experts in `rest_bits`, and which machine runs it at
        `context` tokens. Raises a child of MoEError.
        """
        bits, context = parse_rest_bits(rest_bits), whole_number(context, "the context", least=1)
        layout = describe_layout(model_name(model), layer_numbers(layers))
        if fit is None:
            return layout
        size = byte_size(fit, "the size of the folder")
        facts = layout.model_dump(include={"parameters", "stored_bytes", "other_bytes", "cache_bytes_per_token"})
        return layout.model_copy(update={"fit": plan_fit(size, **facts, context=context, rest_bits=bits)})
