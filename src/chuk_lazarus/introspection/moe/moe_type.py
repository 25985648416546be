"""How was this MoE trained? `MoETypeService` measures layers and gives the verdict."""

from collections.abc import Sequence
from typing import TypedDict, Unpack

from . import views  # noqa: F401  which registers how reports are shown
from .arguments import (
    ExpertCount,
    Layers,
    ModelName,
    address,
    byte_size,
    expert_count,
    layer_number,
    layer_numbers,
    model_name,
    shares,
)
from .errors import InvalidRequest
from .jobs.measure import DEFAULT_EXPERTS
from .jobs.parts import BUDGET
from .numerics.spectra import SHARES
from .progress import Progress
from .provenance.analysis import analyze, choose_sample
from .provenance.quick import analyze_quickly
from .reports import MoEQuickAnalysis, MoETypeAnalysis, MoETypeComparison


class AnalysisOptions(TypedDict, total=False):
    """Options that all analyses of a comparison share; `MoETypeService.analyze` explains them."""

    layer: int | None
    layers: Layers | None
    experts: ExpertCount
    variance: float | Sequence[float]
    thorough: bool
    progress: Progress | None


class MoETypeService:
    """Determines from its weights how an MoE was trained.

    >>> MoETypeService.analyze("demo:native").type
    'NATIVE'
    """

    @staticmethod
    def analyze(
        model: ModelName,
        *,
        layer: int | None = None,
        layers: Layers | None = None,
        experts: ExpertCount = DEFAULT_EXPERTS,
        variance: float | Sequence[float] = SHARES,
        parent: ModelName | None = None,
        thorough: bool = False,
        dask: str | None = None,
        progress: Progress | None = None,
    ) -> MoETypeAnalysis:
        """Analyse one model.

        `model` is a folder, a .safetensors or .gguf file, a Hub id (`org/name`, `org/name@revision`) or `demo:NAME`.
        `layer` or `layers` (numbers, or a string such as "0,5,10", "0-23/6" or "all") select the layers; the default is
        the first MoE layer, plus parts of a middle and of the last one. `experts` is the number of experts whose
        spectra are computed and whose neurons are matched (at least two), "all" for all; base and cosines always use
        all. `variance` are the shares of energy whose ranks are reported; 0.95 is always among them. `parent` names a
        dense model: the neurons are searched for in its layers, and its attention and embeddings are compared with the
        model's. `thorough` matches all neurons of all experts, and so holds one role of the whole layer in memory.

        `dask` is the address of a dask.distributed scheduler ("tcp://host:8786"), whose workers then take one layer at
        a time; the cost is the sum of theirs. `progress` is called with (what, done, total) during the work. If an
        analysis of several layers is interrupted, the same call continues with the unfinished layers. Raises a child of
        MoEError.
        """
        sample = choose_sample(expert_count(experts), shares(variance), thorough)
        name, dense = model_name(model), None if parent is None else model_name(parent, "the parent")
        cluster = None if dask is None else address(dask)
        return analyze(name, layer_number(layer), layer_numbers(layers), sample, dense, cluster, progress)

    @staticmethod
    def quick(
        model: ModelName,
        *,
        layers: Layers | None = None,
        budget: int | str = BUDGET,
        progress: Progress | None = None,
    ) -> MoEQuickAnalysis:
        """A verdict from some neurons of some experts, reading at most about `budget` bytes ("64MB") of their weights.

        Without `layers`, three evenly spaced MoE layers are read. Raises a child of MoEError.
        """
        size = byte_size(budget, "the budget")
        return analyze_quickly(model_name(model), layers=layer_numbers(layers), budget=size, progress=progress)

    @staticmethod
    def compare(*models: ModelName, **options: Unpack[AnalysisOptions]) -> MoETypeComparison:
        """Analyse several models in the same way, side by side; `options` are those of `analyze`.

        Raises a child of MoEError.

        >>> [model.type for model in MoETypeService.compare("demo:native", "demo:upcycled").models]
        ['NATIVE', 'UPCYCLED']
        """
        if not models:
            raise InvalidRequest("no model was given", "give two or more")
        return MoETypeComparison(models=tuple(MoETypeService.analyze(model, **options) for model in models))
