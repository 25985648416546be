"""The evidence of one layer: spectra, cosines, and matched neurons."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..jobs.measure import RoleMeasure, measure_layer
from ..jobs.model import evenly_spaced
from ..jobs.resources import Resources
from ..numerics.alignment import FOUND, Alignment, Run, align, keep_order
from ..numerics.bank import may_share, rate_sharing, share_neurons
from ..numerics.copies import group_copies, meet
from ..numerics.gram import pairwise_cosines
from ..numerics.low_rank import original_bytes, overlay_bytes
from ..numerics.neurons import Array
from ..numerics.spectra import effective_rank, mean_rank, noise_rank, sample_decay
from ..progress import Progress
from ..reports import Cosine, LayerAnalysis, Lineage, MatchHistogram, ParentMatch, Projection, Sharing, Similarity
from ..weights.expert_layer import ExpertLayer
from .classifier import classify_by_neurons
from .kinds import group_experts, name_kind
from .lineage import Evidence, Group, PairEvidence, find_groups, match_evidence, pair_evidence
from .parent import Parent, match_parent

MATCH_BINS = 50
IN_PLACE = 0.98  # the share of matches at their own position above which no expert is shuffled
MOST_SHOWN = 64  # experts of a layer whose cosines a report keeps


@dataclass(frozen=True, slots=True)
class Sample:
    """How many experts' spectra are computed, how many neurons are matched (None: all), and the shares of energy whose
    ranks are reported."""

    experts: int | None
    queries: int | None
    variance: tuple[float, ...]


def analyze_layer(
    layer: ExpertLayer,
    unrelated: ExpertLayer | None,
    parent: Parent | None,
    sample: Sample,
    resources: Resources,
    progress: Progress,
) -> LayerAnalysis:
    """The evidence of one layer, and its own verdict; `unrelated` is another layer of the same model."""
    others = [(unrelated, 0)] if unrelated else []
    chosen = evenly_spaced(layer.count, sample.experts)
    measures = measure_layer(layer, chosen, resources, progress, sample.queries, others)
    shapes = {role: measure.shape for role, measure in measures.items()}
    vectors = {role: measure.vectors for role, measure in measures.items() if measure.vectors is not None}
    grams = {role: measure.gram for role, measure in measures.items()}
    with resources.worker_threads(layer) as pool:
        sharing = pair_evidence(vectors, sample.queries, pool.map, grams=tuple(grams.values()))
        alignment = _align(layer, vectors, sharing, pool.map)
        has_bank = sharing.anywhere >= FOUND and may_share(vectors, pool.map)
    rates = rate_sharing(grams, vectors, alignment, share_neurons(vectors, alignment) if has_bank else alignment)
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
            breadth=_breadth(measure),
            aligned_delta_energy=rates[role].delta_energy,
            bits_saved=rates[role].bits_saved,
            bound=rates[role].bound,
            decay=tuple(np.mean([sample_decay(spectrum) for spectrum in measure.spectra], axis=0).round(6).tolist()),
        )
        for role, measure in measures.items()
    }
    means = {role: float(values.mean()) for role, values in cosines.items()}
    match = match_parent(layer, measures, parent, resources, progress) if parent else None
    lineage = _lineage(layer, measures, unrelated is not None, match, sharing)
    verdict = classify_by_neurons([lineage], [projections])
    original, overlay = original_bytes(shapes, layer.count), overlay_bytes(shapes, ranks, layer.count)
    return LayerAnalysis(
        layer=layer.number,
        type=verdict.origin,
        confidence=verdict.confidence,
        kind=name_kind(sharing) if verdict.origin == "UPCYCLED" else None,
        original_bytes=original,
        stored_bytes=layer.stored_bytes,
        overlay_bytes=overlay,
        overlay_ratio=original / overlay,
        cosine=Cosine(mean=means["down"], std=float(cosines["down"].std()), **means),
        similarity=_similarity(measures["down"].gram),
        projections=projections,
        lineage=lineage,
    )


def _align(layer: ExpertLayer, vectors: Mapping[str, Array], sharing: PairEvidence, run: Run) -> Alignment:
    """The experts' neurons in one order, by the groups that share them; unchanged if none are shuffled."""
    groups = group_experts(sharing)
    if groups and sharing.queries and sharing.in_place < IN_PLACE:
        return align(vectors, groups, run)
    return keep_order(layer.count, layer.sizes["I"], groups)


def _breadth(measure: RoleMeasure) -> dict[str, float]:
    """The number of directions of the base and of the deltas, relative to noise."""
    assert measure.base_spectrum is not None  # neurons were matched
    return {
        "base": effective_rank(measure.base_spectrum, 0.80) / noise_rank(measure.shape, 0.80),
        "deltas": mean_rank(measure.spectra, 0.99) / noise_rank(measure.shape, 0.99),
    }


def _lineage(
    layer: ExpertLayer,
    measures: Mapping[str, RoleMeasure],
    has_neighbour: bool,
    match: ParentMatch | None,
    sharing: PairEvidence,
) -> Lineage:
    any_measure = next(iter(measures.values()))
    chosen, positions = any_measure.chosen, any_measure.positions.reshape(-1)
    owner = np.repeat(np.arange(len(chosen)), any_measure.positions.shape[1])
    nearest = {role: measure.nearest for role, measure in measures.items() if measure.nearest}
    evidence = match_evidence(nearest, owner, positions, layer.sizes["I"])
    others = np.arange(len(chosen)) != owner[:, None]
    above = unrelated = None
    if has_neighbour:
        unrelated = {role: float(measure.elsewhere[0].cosine.max()) for role, measure in measures.items()}
        best = {role: np.where(others, matches.cosine, -1.0).max(axis=1) for role, matches in nearest.items()}
        above = {role: float((best[role] > unrelated[role]).mean()) for role in nearest}
    return Lineage(
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
        matches=_describe_matches(sharing if sharing.queries else evidence),
        above=above,
        unrelated=unrelated,
        parent=match,
        sharing=_describe_sharing(sharing, group_copies(meet(*(measure.first for measure in measures.values())))),
    )


def _describe_sharing(evidence: PairEvidence, identical: tuple[Group, ...]) -> Sharing:
    """The sharing of all experts; twins get the shares of their first one, and share all neurons with each other."""
    first = {expert: group[0] for group in evidence.twins for expert in group}
    shown = evenly_spaced(evidence.count, MOST_SHOWN)
    places = [evidence.experts.index(first.get(expert, expert)) for expert in shown]
    pairs = evidence.pairs[np.ix_(places, places)]
    pairs[np.equal.outer(places, places)] = 1.0
    np.fill_diagonal(pairs, 0.0)
    return Sharing(
        neurons=evidence.queries,
        shared=evidence.shared,
        strong=evidence.strong,
        without_down=evidence.without_down,
        roles=evidence.roles,
        twins=evidence.twins,
        identical=identical,
        groups=group_experts(evidence),
        partners=dict(zip(evidence.experts, evidence.partners, strict=True)),
        experts=shown,
        pairs=_rounded(pairs),
    )


def _name(share: float) -> str:
    """The key of a share of energy: two digits, more where it has more."""
    return f"{share:.2f}" if round(share, 2) == share else repr(share)


def _describe_matches(evidence: PairEvidence | Evidence) -> MatchHistogram:
    return MatchHistogram(nearest=_histogram(evidence.nearest), runner_up=_histogram(evidence.runner_up))


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
