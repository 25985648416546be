"""How a model was trained: layer by layer, here or on workers, to one verdict."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Literal

from pydantic import TypeAdapter

from ..errors import InvalidRequest, ModelUnreadable, MoEError, UnknownFormat, name_model, printable
from ..jobs.cluster import Cluster, Task, connect, locate
from ..jobs.measure import DEFAULT_EXPERTS, bytes_to_measure
from ..jobs.model import OpenedModel, evenly_spaced
from ..jobs.parts import further_budget, further_layers
from ..jobs.resume import ResumableLayers
from ..numerics.rates import mean_saved
from ..numerics.similarity import Assignment
from ..numerics.spectra import SHARES
from ..progress import Progress, no_progress
from ..reports import Cost, DocumentedRule, LayerAnalysis, MoETypeAnalysis, QuickLayer
from ..terms import Origin
from ..text import format_ranges
from ..weights.expert_layer import ExpertLayer
from ..weights.fingerprint import fingerprint
from ..weights.layouts import Kind
from .classifier import (
    CALIBRATION,
    PLENTY,
    THRESHOLDS,
    UNTRAINED,
    classify,
    classify_by_neurons,
    classify_quickly,
    combine,
    has_its_attention,
    is_between,
    is_from_parent,
    looks_untrained,
)
from .kinds import note_identical, note_identical_parts
from .layer import Sample, analyze_layer
from .lineage import QUERIES
from .parent import Parent, describe_gaps, name_parentage, open_parent
from .part import analyze_part


def analyze(
    model: str,
    layer: int | None,
    layers: Sequence[int] | str | None,
    sample: Sample,
    parent: str | None = None,
    dask: str | None = None,
    progress: Progress | None = None,
) -> MoETypeAnalysis:
    """The verdict on one model, from the evidence of each of the chosen layers."""
    if parent is not None and not parent.strip():
        raise InvalidRequest("the parent has no name", "give a dense model: a folder, a file or a Hub id")
    with connect(dask) as cluster, name_model(model):
        return _analyze(model, layer, layers, sample, parent, cluster, progress or no_progress)


def choose_sample(experts: int | None, variance: Sequence[float] = SHARES, thorough: bool = False) -> Sample:
    """The sample of each layer: spectra and neurons of that many `experts`, None for all."""
    shares = tuple(sorted({*variance, 0.95}))  # the documented rule needs 0.95
    return Sample(None, None, shares) if thorough else Sample(experts and max(2, experts), QUERIES, shares)


def _analyze(
    model: str,
    layer: int | None,
    layers: Sequence[int] | str | None,
    sample: Sample,
    parent: str | None,
    cluster: Cluster | None,
    progress: Progress,
) -> MoETypeAnalysis:
    opened = OpenedModel(model, layer, layers, purpose="compare it with")
    experts = opened.experts
    ancestor = open_parent(parent, experts, opened.layers, progress) if parent else None
    state = fingerprint(ancestor.dense.checkpoint) if ancestor else None
    job = ["analyze", model, sample.experts, sample.variance, sample.queries, state]
    resumable = ResumableLayers(experts.checkpoint, job, opened.layers, progress)
    neighbours = {
        layer.number: after if after is not layer and after.roles == layer.roles else None
        for layer, after in zip(opened.layers, [*opened.layers[1:], *opened.layers[:1]], strict=True)
    }
    worker_costs: list[Cost] = []

    def analyze_here(layer: ExpertLayer, watched: Progress) -> LayerAnalysis:
        return analyze_layer(layer, neighbours[layer.number], ancestor, sample, opened.resources, watched)

    def analyze_on_cluster(
        due: Sequence[ExpertLayer], watched: Sequence[Progress]
    ) -> Iterator[tuple[int, LayerAnalysis]]:
        assert cluster
        places = [locate(model, experts.checkpoint.repository.revision)]
        if parent and ancestor:
            places.append(locate(parent, ancestor.dense.checkpoint.repository.revision))
        names, tasks = [place.name for place in places], []
        origin = (ancestor.dense.kind, ancestor.assignment) if ancestor else None
        for layer in due:
            neighbour = neighbours[layer.number]
            arguments = (names, origin, layer.number, None if neighbour is None else neighbour.number, sample)
            tasks.append(Task(f"layer {layer.number}", analyze_layer_on_worker, arguments, tuple(places)))
        for place, result in cluster.run(tasks, lambda place, what, done, total: watched[place](what, done, total)):
            if isinstance(result, MoEError):
                raise result
            analysis, cost = result
            worker_costs.append(cost)
            yield place, analysis

    kind = TypeAdapter(LayerAnalysis)
    further, gaps = _look_further(opened, progress) if layer is None and layers is None else ([], [])
    opening = opened.cost()
    results = resumable.all(kind, analyze_on_cluster) if cluster else resumable.each(kind, analyze_here)
    costs = [opening, *worker_costs] if cluster else [opened.cost()]
    resumable.end()
    rank_projection, rank_ratio, cosine = _headline(results)
    verdict = combine(
        classify_by_neurons([layer.lineage for layer in results], [layer.projections for layer in results]),
        classify_quickly(further) if further else None,
        is_between([layer.lineage for layer in results]),
    )
    kinds = [found.kind for found in results if found.kind and verdict.origin == "UPCYCLED"]
    if verdict.origin == "UPCYCLED" and not kinds:  # parts can't tell copies from slices
        kinds = [part.kind for part in further if part.kind and part.type == "UPCYCLED"]
    alone = verdict  # without the parent
    matches = [layer.lineage.parent for layer in results if layer.lineage.parent]
    if is_from_parent(matches) or has_its_attention(matches):
        verdict = CALIBRATION.decide("UPCYCLED", PLENTY)
        kinds = kinds or [name_parentage(matches, any(layer.lineage.sharing.twins for layer in results))]
    original, overlay = (sum(getattr(x, figure) for x in results) for figure in ("original_bytes", "overlay_bytes"))
    stored = sum(layer.stored_bytes for layer in opened.layers)
    return MoETypeAnalysis(
        **opened.identity(),
        moe_layers=experts.layers,
        mtp_layers=experts.mtp_layers,
        parameters=opened.parameters,
        type=verdict.origin,
        confidence=verdict.confidence,
        kind=max(kinds, key=kinds.count) if kinds else None,
        documented_rule=_documented(rank_ratio, cosine, verdict.origin, alone.origin),
        parent=printable(parent) if parent else None,
        parent_embeddings=ancestor.embeddings if ancestor else None,
        rank_projection=rank_projection,
        rank_ratio=rank_ratio,
        cosine=cosine,
        compressible=overlay < min(stored, original),
        bits_saved=_bits_saved(results),
        overlay_ratio=original / overlay,
        original_bytes=original,
        stored_bytes=stored,
        overlay_bytes=overlay,
        layers=tuple(results),
        further_layers=tuple(further),
        notes=(
            *experts.notes,
            *_notes(results, {layer.number: layer.count for layer in opened.layers}),
            *note_identical_parts(further),
            *gaps,
            *(describe_gaps(ancestor, results) if ancestor else ()),
        ),
        cost=Cost(
            bytes_read=sum(cost.bytes_read for cost in costs),
            bytes_fetched=sum(cost.bytes_fetched for cost in costs),
            seconds=sum(cost.seconds for cost in costs),
        ),
    )


def _look_further(opened: OpenedModel, progress: Progress) -> tuple[list[QuickLayer], list[str]]:
    """The evidence of parts of a middle and a late layer, and notes on those that could not be read."""
    (first,) = opened.layers
    numbers = further_layers(opened.experts.layers, first.number)
    measured = bytes_to_measure(first, evenly_spaced(first.count, DEFAULT_EXPERTS), opened.resources)
    found, gaps = [], []
    for number in numbers:
        try:
            layer = opened.experts.layer(number)
            if layer.count > 1:
                budget = further_budget(measured)
                found.append(analyze_part(layer, budget, len(numbers), opened.resources, progress))
        except (ModelUnreadable, UnknownFormat) as error:
            gaps.append(f"layer {number} was not read: {error.message}")
        except InvalidRequest:
            gaps.append(f"layer {number} was not read: half as many bytes as for layer {first.number} are too few")
    return found, gaps


def analyze_layer_on_worker(
    names: Sequence[str],
    origin: tuple[Kind, Assignment | None] | None,
    number: int,
    neighbour: int | None,
    sample: Sample,
    progress: Progress,
) -> tuple[LayerAnalysis, Cost]:
    """One layer of a model, opened for it on a worker, and the cost.

    `names` are those of the model and, if `origin` is given, of the parent; `origin` says what to read of the parent,
    and how to bring the hidden side to its order.
    """
    opened = OpenedModel(names[0], number, None, purpose="compare it with")
    parent = Parent.open(names[1], origin[0], opened.experts, origin[1]) if origin else None
    after = None if neighbour is None else opened.experts.layer(neighbour)
    analysis = analyze_layer(opened.layers[0], after, parent, sample, opened.resources, progress)
    return analysis, opened.cost()


def _documented(rank_ratio: float, cosine: float, origin: Origin, alone: Origin) -> DocumentedRule:
    """The documented rule's outcome, and why it differs from `origin`, or from `alone`, the origin without the parent's
    evidence."""
    rule, why = classify(rank_ratio, cosine), None
    if origin == "UPCYCLED" != alone and rule.origin != origin:
        why = "it does not look at the parent"
    elif origin == "UPCYCLED" != rule.origin:
        copied = cosine > THRESHOLDS.native_cosine
        why = (
            "the deltas of trained copies have a high rank"
            if copied
            else "it compares neurons only at the same position"
        )
    elif origin == "NATIVE" != rule.origin:
        why = "trained experts share a common part, which lowers the rank of their deltas"
    return DocumentedRule(type=rule.origin, confidence=rule.confidence, why=why)


def _headline(layers: Sequence[LayerAnalysis]) -> tuple[Literal["gate", "up"], float, float]:
    """The documented metrics over the layers: the role of the rank, the mean rank ratio and the mean cosine."""
    role: Literal["gate", "up"] = "gate" if "gate" in layers[0].projections else "up"
    ratios = [layer.projections[role].rank_ratio for layer in layers]
    return role, sum(ratios) / len(ratios), sum(layer.cosine.mean for layer in layers) / len(layers)


def _bits_saved(layers: Sequence[LayerAnalysis]) -> float | None:
    """What bases save over all projections, None if an earlier version has measured some of them."""
    projections = [projection for layer in layers for projection in layer.projections.values()]
    known = [(one.bits_saved, prod(one.shape)) for one in projections if one.bits_saved is not None]
    return mean_saved(known) if len(known) == len(projections) else None


def _notes(layers: Sequence[LayerAnalysis], counts: Mapping[int, int]) -> list[str]:
    """`counts` are the numbers of experts by layer."""
    identical = {layer.layer: layer.lineage.sharing.identical for layer in layers}
    notes = note_identical([(number, counts[number], groups) for number, groups in identical.items()])
    for layer in layers:
        sharing = layer.lineage.sharing
        others = [group for group in sharing.twins if group not in sharing.identical]
        for twins in others[:4] if len(sharing.partners) > 1 else ():
            who = f"layer {layer.layer}: experts {format_ranges(twins)}"
            notes.append(f"{who} are copies of one expert: nearly identical, or with reordered neurons")
    noise = [
        layer.layer
        for layer in layers
        if looks_untrained(layer.projections, layer.lineage.sharing, counts[layer.layer])
    ]
    if noise:
        where = f"layer{'' if len(noise) == 1 else 's'} {format_ranges(noise)}"
        notes.append(f"{where}: {UNTRAINED}")
    if "gate" not in layers[0].projections:
        notes.append("the experts have no gate: the documented rule uses the up projection")
    is_zero = all(layer.cosine.mean == 0 for layer in layers)
    is_said = all(sum(map(len, groups)) == counts[number] for number, groups in identical.items())
    if not is_zero and not is_said and all(p.delta_energy == 0 for layer in layers for p in layer.projections.values()):
        notes.append("all sampled experts are equal to their mean: they are copies of one expert")
    return notes
