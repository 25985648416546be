"""The dense model that experts may come from: which of its layers an MoE layer's neurons and attention match."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc

from ..errors import InvalidRequest, MoEError, UnknownFormat, name_model
from ..jobs.measure import RoleMeasure, refuse_not_finite
from ..jobs.resources import Resources
from ..numerics.neurons import Array, as_neurons
from ..numerics.search import Found, find_neurons, prepare_queries, prepare_role, searching_order
from ..numerics.similarity import Assignment
from ..progress import Counter, Progress
from ..reports import EmbeddingMatch, LayerAnalysis, ParentMatch
from ..weights.attention import NOT_FINITE
from ..weights.expert_layer import ExpertLayer
from ..weights.experts import Experts
from ..weights.layouts import Kind
from .attention import AttentionPair, compare_embeddings, is_mixture, match_attention, pair_attention
from .classifier import LINEAGE, is_from_parent
from .lineage import STRONG

TWICE = 1.5  # experts share neurons if a parent's neuron is found more often than this
CONVINCING = 0.9  # the share of neurons found in one layer of the parent above which no other is searched


@dataclass(frozen=True, slots=True)
class Parent:
    """A dense model's feed-forwards, or an MoE's shared experts, which the dense layers may have become.

    `attention` is None if the parent is an MoE: what two mixtures have in common does not show how the experts of one
    were initialised. `assignment` brings the hidden side of the experts to the order of the parent, if it was permuted
    or signs were changed.
    """

    dense: Experts
    attention: AttentionPair | None = None
    embeddings: EmbeddingMatch | None = None
    assignment: Assignment | None = None

    @classmethod
    def open(cls, name: str, kind: Kind, model: Experts, assignment: Assignment | None) -> "Parent":
        """Opens on a worker what `open_parent` has found."""
        dense = Experts.open(name, kind)
        return cls(dense, _pair_attention(model, dense), None, assignment)


def open_parent(name: str, model: Experts, layers: Sequence[ExpertLayer], progress: Progress) -> Parent:
    """The parent of these layers of a model; raises InvalidRequest where they can't have come from it."""
    with name_model(name):
        dense = _open_feed_forwards(name, [layer.number for layer in layers])
        first = dense.layer(dense.layers[0])
        for layer in layers:
            if first.sizes["H"] != layer.sizes["H"]:
                raise InvalidRequest(
                    f"its hidden size is {first.sizes['H']}, but that of the experts is {layer.sizes['H']}",
                    "experts keep the hidden size of the model that they come from",
                )
            if first.roles != layer.roles:
                raise InvalidRequest("only one of the two models has a gate projection")
    pair = _pair_attention(model, dense)
    embeddings, assignment = (compare_embeddings(model, dense, progress) if pair else None) or (None, None)
    return Parent(dense, pair, embeddings, assignment)


def _pair_attention(model: Experts, dense: Experts) -> AttentionPair | None:
    return None if is_mixture(dense) else pair_attention(model, dense, dense.layer(dense.layers[0]).sizes["H"])


def _open_feed_forwards(name: str, wanted: Sequence[int]) -> Experts:
    """The kind of feed-forwards, dense or shared, that more of the wanted layers have; else that of more layers."""
    found: list[Experts] = []
    kinds: tuple[Kind, Kind] = ("dense", "shared")
    for kind in kinds:
        try:
            found.append(Experts.open(name, kind))
        except UnknownFormat as error:
            reason = error
    if not found:
        if has_experts(name):
            raise InvalidRequest("it is itself a Mixture of Experts, without shared experts", "name a dense model")
        raise reason
    return max(found, key=lambda experts: (len({*wanted} & {*experts.layers}), len(experts.layers)))


def has_experts(name: str) -> bool:
    """Whether a model has routed experts."""
    try:
        Experts.open(name)
    except MoEError:
        return False
    return True


def match_parent(
    layer: ExpertLayer, measures: Mapping[str, RoleMeasure], parent: Parent, resources: Resources, progress: Progress
) -> ParentMatch:
    """The parent's layers in which the neurons of an MoE layer are found, and the one with the same attention.

    Attention is small, and compared first. Neurons are searched for in the layer that has it, or else in that of the
    same number, and then in its neighbours; if nearly all are found in one, the search ends.
    """
    measure = next(iter(measures.values()))
    experts, positions = measure.chosen, measure.positions.reshape(-1)
    owner = np.repeat(np.arange(len(experts)), measure.positions.shape[1])
    vectors = {role: m.queries.reshape(len(owner), -1) for role, m in measures.items() if m.queries is not None}
    if parent.assignment:
        vectors = {role: parent.assignment.apply(matrix) for role, matrix in vectors.items()}
    attention = None
    if parent.attention:
        attention = match_attention(layer.number, parent.attention, parent.assignment, resources, progress)
    is_alike = attention is not None and attention.cka >= LINEAGE.attention_cka
    start = attention.layer if attention and is_alike else layer.number
    found = search_layers(layer.number, start, prepare_queries(vectors), parent.dense, resources, progress)
    evidence = parent_evidence(found, owner, positions)
    widths = {number: parent.dense.layer(number).sizes["I"] for number in evidence.layers}
    times = sum(share / widths[number] for number, share in evidence.layers.items())
    sources = [None if source < 0 else int(source) for source in evidence.sources]
    best = max(evidence.layers, key=lambda number: evidence.layers[number]) if evidence.kept else None
    return ParentMatch(
        kept=evidence.kept,
        strong=evidence.strong,
        chance=evidence.chance,
        p_value=evidence.p_value,
        in_place=evidence.in_place,
        cosine=evidence.cosine,
        flipped=evidence.flipped,
        layer=best,
        layers=evidence.layers,
        of_layers=len(parent.dense.layers),
        copies=times * layer.count * layer.sizes["I"],
        shares={expert: float(share) for expert, share in zip(experts, evidence.shares, strict=True)},
        sources=dict(zip(experts, sources, strict=True)),
        ranges={expert: (int(low), int(high)) for expert, (low, high) in zip(experts, evidence.ranges, strict=True)},
        attention=attention,
    )


def search_layers(
    number: int, start: int, queries: Mapping[str, Array], dense: Experts, resources: Resources, progress: Progress
) -> dict[int, Found]:
    """Where the queries of MoE layer `number` are found, by the parent's layer, starting at layer `start`."""
    found: dict[int, Found] = {}
    alive = np.asarray(np.stack([matrix.any(axis=1) for matrix in queries.values()]).all(axis=0))
    layers = {other: dense.layer(other) for other in searching_order(start, dense.layers)}
    sizes = {other: layer.stored_bytes for other, layer in layers.items()}
    counter = Counter(progress, f"layer {number} in its parent", sum(sizes.values()))
    for other, layer in layers.items():
        layer.prefetch(progress)
        neurons = _prepare_layer(layer, queries)
        with resources.worker_threads() as pool:
            found[other] = find_neurons(queries, neurons, pool.map)
        counter.add(sizes.pop(other))
        if alive.any() and np.mean(found[other].neuron[alive] >= 0) >= CONVINCING:
            counter.add(sum(sizes.values()))
            break
    return found


def _prepare_layer(layer: ExpertLayer, roles: Container[str]) -> dict[str, Array]:
    """A dense layer's neurons by role, ready to be searched; one stored tensor at a time is held beside them."""
    prepared = {}
    for tensor in layer.tensors:
        for role, matrix in tensor.matrices(0).items():
            if not np.isfinite(matrix).all():
                with name_model("the parent"):
                    refuse_not_finite(layer, 0, role)
            if role in roles:
                prepared[role] = prepare_role(as_neurons(role, matrix))
    return prepared


@dataclass(frozen=True, slots=True)
class ParentEvidence:
    """The evidence of matches of neurons with all layers of a parent that were searched.

    `kept` is the share of the queries that are found in some layer, `strong` the share found with a mean cosine of at
    least STRONG. `chance` is the value of `kept` to expect if the roles' matches were independent, over all the layers
    together, and `p_value` the probability of at least as many by chance. A neuron that is found in several layers
    counts where its cosine is largest: there, `in_place` is the share of neurons at their own position, `cosine` the
    mean cosine, and `flipped` the share whose up and down have the opposite sign.

    `layers` is the share found by layer, in ascending order. By expert, `shares` [experts] is the share that is found,
    `sources` [experts] the layer with most of it, -1 without one, and `ranges` [experts, 2] the first and last neuron
    found there, -1 without one.
    """

    kept: float
    strong: float
    chance: float
    p_value: float
    in_place: float
    cosine: float
    flipped: float
    layers: dict[int, float]
    shares: NDArray[np.float64]
    sources: NDArray[np.int64]
    ranges: NDArray[np.int64]


def parent_evidence(found: Mapping[int, Found], owner: NDArray[np.intp], positions: NDArray[np.intp]) -> ParentEvidence:
    """The evidence of queries that are from `positions` [queries] of the experts `owner` [queries], by layer."""
    numbers = sorted(found)
    neurons = np.stack([found[number].neuron for number in numbers])  # [layers, queries]
    is_found = neurons >= 0
    cosines = np.where(is_found, np.stack([found[number].cosine for number in numbers]), -1.0)
    best, queries = cosines.argmax(axis=0), np.arange(len(owner))
    kept = np.asarray(is_found.any(axis=0))
    neuron, cosine = neurons[best, queries], cosines[best, queries]
    is_flipped = np.stack([found[number].is_flipped for number in numbers])[best, queries]
    chance = 1.0 - float(np.prod([1.0 - min(1.0, layer.chance) for layer in found.values()]))
    shares, sources, ranges = [], [], []
    for expert in range(int(owner.max()) + 1):
        mine = owner == expert
        by_layer = is_found[:, mine].sum(axis=1)
        source = int(by_layer.argmax())
        places = neurons[source, mine][is_found[source, mine]]
        shares.append(kept[mine].mean())
        sources.append(numbers[source] if places.size else -1)
        ranges.append([places.min(), places.max()] if places.size else [-1, -1])
    return ParentEvidence(
        float(kept.mean()),
        float((kept & (cosine >= STRONG)).mean()),
        chance,
        float(bdtrc(kept.sum() - 1, kept.size, chance)),
        float((neuron == positions)[kept].mean()) if kept.any() else 0.0,
        float(cosine[kept].mean()) if kept.any() else 0.0,
        float(is_flipped[kept].mean()) if kept.any() else 0.0,
        {number: float(share) for number, share in zip(numbers, is_found.mean(axis=1), strict=True)},
        np.array(shares),
        np.array(sources),
        np.array(ranges),
    )


def name_parentage(matches: Sequence[ParentMatch], has_twins: bool) -> str:
    """The relation of the experts to the parent in words, if only the parent shows it."""
    if not is_from_parent(matches):
        return "from this parent, experts re-initialised"
    if has_twins:
        return "from this parent, in identical copies"
    if fmean(match.copies for match in matches) >= TWICE:
        return "from this parent, copies trained far apart"
    if fmean(match.kept for match in matches) < 0.5:
        return "from this parent, mostly re-initialised"
    return "from this parent, no neuron twice"


def describe_gaps(parent: Parent, layers: Sequence[LayerAnalysis]) -> list[str]:
    """Why the attention, or a part of it, was not compared."""
    if not parent.attention:
        return [
            "the parent is itself a Mixture of Experts: its attention does not show how the experts were initialised"
        ]
    if all(layer.lineage.parent and layer.lineage.parent.attention for layer in layers):
        return [note for note in parent.attention.notes if NOT_FINITE in note]
    return [*parent.attention.notes[:4]] or ["the parent's attention could not be compared"]
