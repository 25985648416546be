"""A verdict from a few megabytes: parts of some experts in a few layers."""

from collections.abc import Sequence

from ..errors import name_model
from ..jobs.measure import DEFAULT_EXPERTS, bytes_to_measure
from ..jobs.model import OpenedModel, evenly_spaced
from ..jobs.parts import BUDGET, LAYERS, further_bytes
from ..progress import Progress, no_progress
from ..reports import MoEQuickAnalysis
from ..text import parse_size
from .classifier import CALIBRATION, QUICK, UNTRAINED, classify_quickly, part_looks_untrained, weigh_parts
from .kinds import note_identical_parts
from .part import analyze_part


def analyze_quickly(
    model: str,
    *,
    layers: Sequence[int] | str | None = None,
    budget: int | str = BUDGET,
    progress: Progress | None = None,
) -> MoEQuickAnalysis:
    """The verdict from at most about `budget` bytes ("64MB") of the experts' weights; headers are extra.

    Raises InvalidRequest if the budget is too small for any evidence.
    """
    size = budget if isinstance(budget, int) else parse_size(budget, "the budget")
    with name_model(model):
        return _analyze(model, layers, size, progress or no_progress)


def _analyze(model: str, layers: Sequence[int] | str | None, budget: int, progress: Progress) -> MoEQuickAnalysis:
    opened = OpenedModel(model, None, layers or None, samples=LAYERS, purpose="compare it with")
    experts = opened.experts
    headers = experts.checkpoint.bytes_read
    results = [analyze_part(layer, budget, len(opened.layers), opened.resources, progress) for layer in opened.layers]
    neurons = sum(result.neurons for result in results)

    def mean(figure: str) -> float:
        return sum(float(getattr(result, figure)) * result.neurons for result in results) / neurons

    close, reach, shared, strong = (mean(figure) for figure in ("close", "reach", "shared", "strong"))
    verdict, notes = classify_quickly(results), [*experts.notes, *note_identical_parts(results)]
    if (width := min(result.inputs for result in results)) < QUICK.width:
        notes.append(f"with only {width} inputs, unrelated neurons look close too; --quick needs {QUICK.width}")
    elif all(result.chance == 1.0 for result in results):
        notes.append("no neuron is close to any other: the weights are zeros, or all orthogonal")
    if neurons and all(map(part_looks_untrained, results)):
        notes.append(UNTRAINED)
    kinds = [result.kind for result in results if result.kind]
    stored = round(sum(layer.stored_bytes for layer in opened.layers) / len(opened.layers) * len(experts.layers))
    first, read = opened.layers[0], experts.checkpoint.bytes_read - headers
    measured = bytes_to_measure(first, evenly_spaced(first.count, DEFAULT_EXPERTS), opened.resources)
    return MoEQuickAnalysis(
        **opened.identity(),
        moe_layers=experts.layers,
        parameters=opened.parameters,
        type=verdict.origin,
        confidence=verdict.confidence,
        full_confidence=CALIBRATION.decide(verdict.origin, weigh_parts(results)).confidence
        if verdict.origin != "UNDETERMINED"
        else min(CALIBRATION.ceiling, 1 - CALIBRATION.floor),
        kind=max(kinds, key=kinds.count) if kinds and verdict.origin == "UPCYCLED" else None,
        close=close,
        shared=shared,
        strong=strong,
        reach=reach,
        budget=budget,
        weight_bytes=read,
        stored_bytes=stored,
        share=read / stored,
        full_bytes=measured + further_bytes(first, experts.layers, measured),
        layers=tuple(results),
        notes=tuple(notes),
        cost=opened.cost(),
    )
