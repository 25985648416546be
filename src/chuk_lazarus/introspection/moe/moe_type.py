"""How was this MoE trained? `MoETypeService` measures layers and gives the verdict."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from . import views  # noqa: F401  which registers how reports are shown
from .classifier import THRESHOLDS, classify, is_alike_in_place, judge
from .errors import InvalidRequest, MoEError, NotMoE, UnknownFormat, name_model, printable
from .jobs.cluster import Cluster, Task, connect, locate
from .jobs.measure import DEFAULT_EXPERTS, RoleMeasure, evenly_spaced, measure_layer
from .jobs.parts import BUDGET
from .jobs.resume import ResumableLayers, describe_state
from .lineage import QUERIES, Evidence, find_groups, name_kind, weigh, weigh_parent
from .numerics.gram import pairwise_cosines
from .numerics.low_rank import original_bytes, overlay_bytes
from .numerics.spectra import SHARES, effective_rank, mean_rank, noise_rank, sample_decay
from .progress import Progress, no_progress
from .quick import analyze_quickly
from .reports import (
    Cosine,
    Cost,
    DocumentedRule,
    LayerAnalysis,
    Lineage,
    MatchHistogram,
    MoEQuickAnalysis,
    MoETypeAnalysis,
    MoETypeComparison,
    ParentMatch,
    Projection,
    Similarity,
)
from .terms import Origin
from .text import parse_size
from .weights.expert_layer import ExpertLayer
from .weights.experts import Experts
from .weights.layouts import Kind

MATCH_BINS = 50
MOST_SHOWN = 64  # experts of a layer whose cosines a report keeps


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
        variance: Sequence[float] = SHARES,
        parent: str | None = None,
        thorough: bool = False,
        dask: str | None = None,
        progress: Progress | None = None,
    ) -> MoETypeAnalysis:
        """Analyse one model.

        `model` is a folder, a .safetensors or .gguf file, a Hub id (`org/name`, `org/name@revision`) or `demo:NAME`.
        `layer` or `layers` (numbers, or a string such as "0,5,10", "0-23/6" or "all") say where to look; the default is
        the first MoE layer. `experts` says of how many the spectra are taken and the neurons matched (two at least),
        None for all; base and cosines always use all. `variance` are the shares of energy whose ranks are reported,
        0.95 always among them. `parent` names a dense model whose neurons are looked for, too.
        `thorough` matches all neurons of all experts, and so holds one role of the whole layer in memory. `dask` is the
        address of a dask.distributed scheduler ("tcp://host:8786"), whose workers then take a layer at a time; the cost
        is the sum of theirs. `progress` is told (what, done, total) as work goes on. An interrupted analysis of several
        layers goes on, when it is asked for again, with those that were not finished. Raises a child of MoEError.
        """
        shares = check_variance(variance)
        if experts is not None and experts < 1:
            raise InvalidRequest("the number of experts must be at least 1", "give a number, or 'all'")
        wanted, queries = (None, None) if thorough else (experts and max(2, experts), QUERIES)
        sample = Sample(wanted, queries, shares)
        with connect(dask) as cluster, name_model(model):
            return _analyze(model, layer, layers, sample, parent, progress or no_progress, cluster)

    @staticmethod
    def quick(
        model: str,
        *,
        layers: Sequence[int] | str | None = None,
        budget: int | str = BUDGET,
        progress: Progress | None = None,
    ) -> MoEQuickAnalysis:
        """A verdict from some neurons of some experts, at most about `budget` bytes ("64MB") of their weights.

        Without `layers`, three evenly spaced MoE layers are looked into. Raises a child of MoEError.
        """
        size = budget if isinstance(budget, int) else parse_size(budget, "the budget")
        with name_model(model):
            return analyze_quickly(model, layers, size, DEFAULT_EXPERTS, progress or no_progress)

    @staticmethod
    def compare(
        *models: str,
        layer: int | None = None,
        layers: Sequence[int] | str | None = None,
        experts: int | None = DEFAULT_EXPERTS,
        variance: Sequence[float] = SHARES,
        thorough: bool = False,
        progress: Progress | None = None,
    ) -> MoETypeComparison:
        """Analyse several models in the same way, side by side."""

        def analyze(model: str) -> MoETypeAnalysis:
            return MoETypeService.analyze(
                model,
                layer=layer,
                layers=layers,
                experts=experts,
                variance=variance,
                thorough=thorough,
                progress=progress,
            )

        return MoETypeComparison(models=tuple(analyze(model) for model in models))


def check_variance(shares: Sequence[float]) -> tuple[float, ...]:
    """The shares of energy in order, each once, with the verdict's own 0.95; raises InvalidRequest."""
    for share in shares:
        if not 0 < share < 1:
            raise InvalidRequest(f"a share of the variance is {share:g}", "give numbers between 0 and 1, such as 0.95")
    return tuple(sorted({*shares, 0.95}))


@dataclass(frozen=True, slots=True)
class Sample:
    """Of how many experts the spectra are taken, how many neurons are matched (None for all), and at which shares of
    energy ranks are reported."""

    experts: int | None
    queries: int | None
    variance: tuple[float, ...]


def _analyze(
    model: str,
    layer: int | None,
    layers: Sequence[int] | str | None,
    sample: Sample,
    parent: str | None,
    progress: Progress,
    cluster: Cluster | None,
) -> MoETypeAnalysis:
    started = time.perf_counter()
    opened = Experts.open(model)
    analysed = [opened.layer(number) for number in opened.choose_layers(layer, layers)]
    for one in analysed:
        if one.count < 2:
            raise NotMoE(f"layer {one.number} has a single expert: there is nothing to compare it with")
    dense = _open_parent(parent, analysed) if parent else None
    origin = describe_state(dense.checkpoint) if dense else None
    job = ["analyze", model, sample.experts, sample.variance, sample.queries, origin]
    sweep = ResumableLayers(opened.checkpoint, job, analysed, progress)
    neighbours = {
        one.number: after if after is not one and after.roles == one.roles else None
        for one, after in zip(analysed, [*analysed[1:], *analysed[:1]], strict=True)
    }
    costs: list[Cost] = []

    def find(due: Sequence[ExpertLayer], watched: Sequence[Progress]) -> Iterator[tuple[int, LayerAnalysis]]:
        if not cluster:
            for place, one in enumerate(due):
                own = dense.layer(one.number) if dense else None
                yield place, _analyze_layer(one, neighbours[one.number], own, sample, watched[place])
            costs.append(_cost_since(started, opened))
            return
        places = [locate(model, opened.checkpoint.repository.revision)]
        if parent and dense:
            places.append(locate(parent, dense.checkpoint.repository.revision))
        tasks = []
        for one in due:
            after = neighbours[one.number]
            which = (one.number, after and after.number)
            asked = ([place.name for place in places], dense and dense.kind, *which, sample)
            tasks.append(Task(f"layer {one.number}", analyze_apart, asked, tuple(places)))
        costs.append(_cost_since(started, opened))
        for place, found in cluster.run(tasks, lambda place, what, done, total: watched[place](what, done, total)):
            if isinstance(found, MoEError):
                raise found
            costs.append(found[1])
            yield place, found[0]

    results = sweep.layers(analysed, find, LayerAnalysis.model_dump_json, LayerAnalysis.model_validate_json)
    sweep.end()
    rank_projection, rank_ratio, cosine = _headline(results)
    verdict = judge([layer.lineage for layer in results])
    kinds = [layer.kind for layer in results if layer.kind]
    original, overlay = (sum(getattr(x, figure) for x in results) for figure in ("original_bytes", "overlay_bytes"))
    stored = sum(one.stored_bytes for one in analysed)
    return MoETypeAnalysis(
        model=printable(model),
        revision=opened.checkpoint.repository.revision,
        family=opened.family,
        model_type=opened.model_type,
        storage=", ".join(dict.fromkeys(one.storage for one in analysed)),
        experts=analysed[0].count,
        moe_layers=opened.layers,
        mtp_layers=opened.mtp_layers,
        type=verdict.origin,
        confidence=verdict.confidence,
        kind=max(kinds, key=kinds.count) if kinds and verdict.origin == "UPCYCLED" else None,
        documented_rule=_documented(rank_ratio, cosine, verdict.origin),
        parent=printable(parent) if parent else None,
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
            bytes_read=sum(cost.bytes_read for cost in costs),
            bytes_fetched=sum(cost.bytes_fetched for cost in costs),
            seconds=sum(cost.seconds for cost in costs),
        ),
    )


def analyze_apart(
    models: Sequence[str], kind: Kind | None, layer: int, neighbour: int | None, sample: Sample, progress: Progress
) -> tuple[LayerAnalysis, Cost]:
    """One layer of a model that is opened for it, as on a worker, and what it has cost.

    `models` are the model and, where `kind` says what is read of it, the parent.
    """
    started = time.perf_counter()
    opened = Experts.open(models[0])
    own = Experts.open(models[1], kind).layer(layer) if kind else None
    after = None if neighbour is None else opened.layer(neighbour)
    found = _analyze_layer(opened.layer(layer), after, own, sample, progress)
    return found, _cost_since(started, opened)


def _cost_since(started: float, opened: Experts) -> Cost:
    return Cost(
        bytes_read=opened.checkpoint.bytes_read,
        bytes_fetched=opened.checkpoint.repository.bytes_fetched,
        seconds=time.perf_counter() - started,
    )


def _open_parent(parent: str, layers: Sequence[ExpertLayer]) -> Experts:
    """The dense model's feed-forwards, or an MoE's shared experts, which may be what the dense layer has become; raises
    InvalidRequest where they can't be those of the parent."""
    with name_model(parent):
        dense = Experts.open(parent, "dense" if _has_dense(parent, layers) else "shared")
        for layer in layers:
            if layer.number not in dense.layers:
                raise InvalidRequest(f"it has no dense layer {layer.number}", "choose layers that both models have")
            hidden = dense.layer(layer.number).sizes["H"]
            if hidden != layer.sizes["H"]:
                raise InvalidRequest(f"its hidden size is {hidden}, and that of the experts {layer.sizes['H']}")
            if dense.layer(layer.number).roles != layer.roles:
                raise InvalidRequest("one of the two models has a gate, and the other none")
    return dense


def _has_dense(parent: str, layers: Sequence[ExpertLayer]) -> bool:
    """Whether the parent has dense feed-forwards where they are wanted, or at least no shared experts there."""
    wanted = {layer.number for layer in layers}
    found = {}
    kinds: tuple[Kind, Kind] = ("dense", "shared")
    for kind in kinds:
        try:
            found[kind] = wanted <= set(Experts.open(parent, kind).layers)
        except UnknownFormat:
            found[kind] = False
    return found["dense"] or not found["shared"]


def _documented(rank_ratio: float, cosine: float, origin: Origin) -> DocumentedRule:
    """The documented rule's outcome, and in a few words why it is another."""
    rule, why = classify(rank_ratio, cosine), None
    if origin == "UPCYCLED" != rule.origin:
        copied = cosine > THRESHOLDS.native_cosine
        why = "training makes the deltas of copies broad" if copied else "it compares neurons by their position only"
    elif origin == "NATIVE" != rule.origin:
        why = "what trained experts have in common lowers the rank of their deltas"
    return DocumentedRule(type=rule.origin, confidence=rule.confidence, why=why)


def _lineage(
    layer: ExpertLayer, measures: Mapping[str, RoleMeasure], has_neighbour: bool, parent: ExpertLayer | None
) -> tuple[Lineage, Evidence]:
    any_measure = next(iter(measures.values()))
    chosen, positions = any_measure.chosen, any_measure.positions.reshape(-1)
    own = np.repeat(np.arange(len(chosen)), any_measure.positions.shape[1])
    nearest = {role: measure.nearest for role, measure in measures.items() if measure.nearest}
    evidence = weigh(nearest, own, positions, layer.sizes["I"])
    others = np.arange(len(chosen)) != own[:, None]
    above = unrelated = None
    if has_neighbour:
        unrelated = {role: float(measure.elsewhere[0].cosine.max()) for role, measure in measures.items()}
        best = {role: np.where(others, found.cosine, -1.0).max(axis=1) for role, found in nearest.items()}
        above = {role: float((best[role] > unrelated[role]).mean()) for role in nearest}
    match = None
    if parent:
        found = weigh_parent({r: m.elsewhere[-1] for r, m in measures.items()}, own, positions, parent.sizes["I"])
        match = ParentMatch(
            kept=found.kept,
            chance=found.chance,
            p_value=found.p_value,
            in_place=found.in_place,
            cosine=found.cosine,
            shares={expert: float(share) for expert, share in zip(chosen, found.shares, strict=True)},
            ranges={expert: (int(low), int(high)) for expert, (low, high) in zip(chosen, found.ranges, strict=True)},
        )
    lineage = Lineage(
        neurons=evidence.queries,
        experts=chosen,
        kept=evidence.kept,
        close=evidence.close,
        chance=evidence.chance,
        p_value=evidence.p_value,
        spread=evidence.spread,
        in_place=evidence.in_place,
        cosine=evidence.cosine,
        permuted_cosine=evidence.permuted_cosine,
        cosine_p_value=evidence.cosine_p_value,
        groups=find_groups(evidence, chosen),
        pairs=_rounded(evidence.pairs),
        matches=MatchHistogram(nearest=_histogram(evidence.nearest), runner_up=_histogram(evidence.runner_up)),
        above=above,
        unrelated=unrelated,
        parent=match,
    )
    return lineage, evidence


def _name(share: float) -> str:
    """The key of a share of energy: two digits, more where it has more."""
    return f"{share:.2f}" if round(share, 2) == share else repr(share)


def _histogram(cosines: NDArray[np.float32]) -> tuple[int, ...]:
    return tuple(int(n) for n in np.histogram(np.clip(cosines, -1.0, 1.0), MATCH_BINS, (-1.0, 1.0))[0])


def _rounded(matrix: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    """To four digits, which is more than any picture shows."""
    return tuple(tuple(row) for row in matrix.round(4).tolist())


def _similarity(gram: NDArray[np.float64]) -> Similarity:
    shown = evenly_spaced(len(gram), MOST_SHOWN)
    cosines = np.eye(len(shown))
    upper = np.triu_indices(len(shown), 1)
    cosines[upper] = cosines.T[upper] = pairwise_cosines(gram[np.ix_(shown, shown)])
    return Similarity(experts=shown, cosine=_rounded(cosines))


def _analyze_layer(
    layer: ExpertLayer, unrelated: ExpertLayer | None, parent: ExpertLayer | None, sample: Sample, progress: Progress
) -> LayerAnalysis:
    others = [(other, 0) for other in (unrelated, parent) if other]
    measures = measure_layer(layer, evenly_spaced(layer.count, sample.experts), progress, sample.queries, others)
    shapes = {role: measure.shape for role, measure in measures.items()}
    ranks = {role: mean_rank(measure.spectra, 0.95) for role, measure in measures.items()}
    cosines = {role: pairwise_cosines(measure.gram) for role, measure in measures.items()}
    projections = {
        role: Projection(
            shape=measure.shape,
            max_rank=min(measure.shape),
            rank={_name(fraction): mean_rank(measure.spectra, fraction) for fraction in sample.variance},
            rank_ratio=ranks[role] / min(measure.shape),
            noise_rank_ratio=ranks[role] / noise_rank(measure.shape, 0.95),
            delta_energy=measure.delta_energy,
            experts=measure.chosen,
            expert_ranks={
                _name(fraction): tuple(effective_rank(spectrum, fraction) for spectrum in measure.spectra)
                for fraction in sample.variance
            },
            decay=tuple(np.mean([sample_decay(spectrum) for spectrum in measure.spectra], axis=0).round(6).tolist()),
        )
        for role, measure in measures.items()
    }
    means = {role: float(values.mean()) for role, values in cosines.items()}
    lineage, evidence = _lineage(layer, measures, unrelated is not None, parent)
    verdict = judge([lineage])
    original, overlay = original_bytes(shapes, layer.count), overlay_bytes(shapes, ranks, layer.count)
    return LayerAnalysis(
        layer=layer.number,
        type=verdict.origin,
        confidence=verdict.confidence,
        kind=name_kind(evidence, is_alike_in_place([lineage])) if verdict.origin == "UPCYCLED" else None,
        original_bytes=original,
        stored_bytes=layer.stored_bytes,
        overlay_bytes=overlay,
        overlay_ratio=original / overlay,
        cosine=Cosine(mean=means["down"], std=float(cosines["down"].std()), **means),
        similarity=_similarity(measures["down"].gram),
        projections=projections,
        lineage=lineage,
    )


def _headline(layers: Sequence[LayerAnalysis]) -> tuple[Literal["gate", "up"], float, float]:
    """The documented metrics over the layers: whose rank it is, the mean rank ratio and the mean cosine."""
    role: Literal["gate", "up"] = "gate" if "gate" in layers[0].projections else "up"
    ratios = [layer.projections[role].rank_ratio for layer in layers]
    return role, sum(ratios) / len(ratios), sum(layer.cosine.mean for layer in layers) / len(layers)


def _notes(layers: Sequence[LayerAnalysis]) -> list[str]:
    notes = []
    if "gate" not in layers[0].projections:
        notes.append("the experts have no gate: the documented rule uses the up projection")
    if all(p.delta_energy == 0 for layer in layers for p in layer.projections.values()):
        notes.append("all sampled experts are equal to their mean: they are copies of one expert")
    return notes
