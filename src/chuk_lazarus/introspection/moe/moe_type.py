"""How was this MoE trained? `MoETypeService` measures layers and gives the verdict."""

import time
from collections.abc import Mapping, Sequence
from typing import Literal

from .classifier import classify
from .errors import InvalidRequest, NotMoE, naming, printable
from .measure import RoleMeasure, evenly_spaced, measure_layer
from .overlay import original_bytes, overlay_bytes
from .reports import Cosine, Cost, LayerAnalysis, MoETypeAnalysis, MoETypeComparison, Projection
from .similarity import pairwise_cosines
from .spectra import mean_rank, noise_rank
from .weights.experts import ExpertLayer, Experts
from .weights.source import Progress, unwatched

FRACTIONS = (0.90, 0.95, 0.99)
DEFAULT_EXPERTS = 8


class MoETypeService:
    """Tells how an MoE was trained, from its weights.

    >>> MoETypeService.analyze("demo:native").type
    'NATIVE'
    """

    @staticmethod
    def analyze(
        model: str,
        *,
        layer: int | None = None,
        layers: Sequence[int] | str | None = None,
        experts: int | None = DEFAULT_EXPERTS,
        progress: Progress | None = None,
    ) -> MoETypeAnalysis:
        """Analyse one model.

        `model` is a folder, a .safetensors file, a Hub id (`org/name`, `org/name@revision`) or `demo:NAME`. `layer` or
        `layers` (numbers, or a string such as "0,5,10", "0-23/6" or "all") say where to look; the default is the first
        MoE layer. `experts` says of how many the spectra are taken, None for all; base and cosines always use all.
        `progress` is told (what, done, total) as work goes on. Raises a child of MoEError.
        """
        if experts is not None and experts < 1:
            raise InvalidRequest("the number of experts must be at least 1", "give a number, or 'all'")
        with naming(model):
            return _analyze(model, layer, layers, experts, progress or unwatched)

    @staticmethod
    def compare(
        *models: str,
        layer: int | None = None,
        layers: Sequence[int] | str | None = None,
        experts: int | None = DEFAULT_EXPERTS,
        progress: Progress | None = None,
    ) -> MoETypeComparison:
        """Analyse several models in the same way, side by side."""

        def analyze(model: str) -> MoETypeAnalysis:
            return MoETypeService.analyze(model, layer=layer, layers=layers, experts=experts, progress=progress)

        return MoETypeComparison(models=tuple(analyze(model) for model in models))


def _analyze(
    model: str, layer: int | None, layers: Sequence[int] | str | None, experts: int | None, progress: Progress
) -> MoETypeAnalysis:
    started = time.perf_counter()
    opened = Experts.open(model)
    analysed = [opened.layer(number) for number in opened.choose_layers(layer, layers)]
    for one in analysed:
        if one.count < 2:
            raise NotMoE(f"layer {one.number} has a single expert: there is nothing to compare it with")
    results = [_analyze_layer(one, measure_layer(one, evenly_spaced(one.count, experts), progress)) for one in analysed]
    rank_projection, rank_ratio, cosine = _headline(results)
    verdict = classify(rank_ratio, cosine)
    original, overlay = (sum(getattr(x, figure) for x in results) for figure in ("original_bytes", "overlay_bytes"))
    stored = sum(one.stored_bytes for one in analysed)
    repository = opened.checkpoint.repository
    return MoETypeAnalysis(
        model=printable(model),
        revision=repository.revision,
        family=opened.family,
        model_type=opened.model_type,
        storage=analysed[0].storage,
        experts=analysed[0].count,
        moe_layers=opened.layers,
        mtp_layers=opened.mtp_layers,
        type=verdict.origin,
        confidence=verdict.confidence,
        rank_projection=rank_projection,
        rank_ratio=rank_ratio,
        cosine=cosine,
        compressible=overlay < min(stored, original),
        overlay_ratio=original / overlay,
        original_bytes=original,
        stored_bytes=stored,
        overlay_bytes=overlay,
        layers=tuple(results),
        notes=(*opened.notes, *_notes(results)),
        cost=Cost(
            bytes_read=opened.checkpoint.bytes_read,
            bytes_fetched=repository.bytes_fetched,
            seconds=time.perf_counter() - started,
        ),
    )


def _analyze_layer(layer: ExpertLayer, measures: Mapping[str, RoleMeasure]) -> LayerAnalysis:
    shapes = {role: measure.shape for role, measure in measures.items()}
    ranks = {role: mean_rank(measure.spectra, 0.95) for role, measure in measures.items()}
    cosines = {role: pairwise_cosines(measure.gram) for role, measure in measures.items()}
    projections = {
        role: Projection(
            shape=measure.shape,
            max_rank=min(measure.shape),
            rank={f"{fraction:.2f}": mean_rank(measure.spectra, fraction) for fraction in FRACTIONS},
            rank_ratio=ranks[role] / min(measure.shape),
            noise_rank_ratio=ranks[role] / noise_rank(measure.shape, 0.95),
            delta_energy=measure.delta_energy,
            experts=measure.chosen,
        )
        for role, measure in measures.items()
    }
    means = {role: float(values.mean()) for role, values in cosines.items()}
    headline = "gate" if "gate" in projections else "up"
    verdict = classify(projections[headline].rank_ratio, means["down"])
    original, overlay = original_bytes(shapes, layer.count), overlay_bytes(shapes, ranks, layer.count)
    return LayerAnalysis(
        layer=layer.number,
        type=verdict.origin,
        confidence=verdict.confidence,
        original_bytes=original,
        stored_bytes=layer.stored_bytes,
        overlay_bytes=overlay,
        overlay_ratio=original / overlay,
        cosine=Cosine(mean=means["down"], std=float(cosines["down"].std()), **means),
        projections=projections,
    )


def _headline(layers: Sequence[LayerAnalysis]) -> tuple[Literal["gate", "up"], float, float]:
    """The documented metrics over the layers: whose rank it is, the mean rank ratio and the mean cosine."""
    role: Literal["gate", "up"] = "gate" if "gate" in layers[0].projections else "up"
    ratios = [layer.projections[role].rank_ratio for layer in layers]
    return role, sum(ratios) / len(ratios), sum(layer.cosine.mean for layer in layers) / len(layers)


def _notes(layers: Sequence[LayerAnalysis]) -> list[str]:
    notes = []
    if "gate" not in layers[0].projections:
        notes.append("the experts have no gate: the verdict uses the up projection")
    if all(p.delta_energy == 0 for layer in layers for p in layer.projections.values()):
        notes.append("all sampled experts are equal to their mean: they are copies of one expert")
    return notes
