"""How a model was trained: verdict and evidence."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..terms import Origin
from .report import Cost, Identity, Report, as_details

if TYPE_CHECKING:
    from rich.console import RenderableType


class Cosine(Report):
    """Mean pairwise cosine of the experts' flattened matrices; `mean` and `std` are those of the down projections."""

    mean: float
    std: float
    gate: float | None = None
    up: float
    down: float


class Projection(Report):
    """The deltas (expert minus mean of all experts) of one projection.

    `rank` is the effective rank at each share of energy, the mean over `experts`, and `expert_ranks` has that of each
    expert. `rank_ratio` is the rank at 0.95 divided by `max_rank`, and `noise_rank_ratio` the same rank divided by that
    of an iid Gaussian matrix of the same shape.

    `delta_energy` is the delta's share of an expert's energy. `aligned_delta_energy` is the same over all experts,
    after their neurons were brought into one order, and with a separate mean for each group of experts that share
    neurons. `bits_saved` is what such a base saves at best, in bits per weight, negative if it costs more than it
    saves, and `bound` the most that any code can save; all three are null in reports of earlier versions.

    `decay` has the singular values at evenly spaced ranks from the first to the last, divided by their root mean
    square, the mean over `experts`. `breadth` has the rank that holds 80 % of the energy of the `base` (the mean of all
    experts), and the one that holds 99 % of the `deltas` (the mean over `experts`), each divided by that of noise.
    """

    shape: tuple[int, int]
    max_rank: int
    rank: dict[str, float]
    rank_ratio: float
    noise_rank_ratio: float
    delta_energy: float
    experts: tuple[int, ...]
    expert_ranks: dict[str, tuple[int, ...]]
    decay: tuple[float, ...]
    breadth: dict[str, float]
    aligned_delta_energy: float | None = None
    bits_saved: float | None = None
    bound: float | None = None


class Similarity(Report):
    """The cosines between the flattened down projections of `experts`, all of a layer or 64 evenly spaced ones."""

    experts: tuple[int, ...]
    cosine: tuple[tuple[float, ...], ...]


class MatchHistogram(Report):
    """How many neurons have a match of each cosine (the mean over the roles), in equal bins from -1 to 1.

    `nearest` counts the cosines with the nearest neuron in the expert's best partner, `runner_up` those with the second
    nearest there, which shows what the nearest of unrelated neurons looks like. If no pairs of experts could be
    compared, both are of the neurons sampled in `Lineage.experts`, against every other of these experts.
    """

    nearest: tuple[int, ...]
    runner_up: tuple[int, ...]


class ProjectionMatch(Report):
    """How similar two projections of attention are: the mean `cosine` of rows at the same position (null if the shapes
    differ), and the unbiased `cka` of W^T W over the hidden side, which does not change if the rows are rotated."""

    cosine: float | None
    cka: float


class AttentionMatch(Report):
    """How similar the attention of a layer is to that of its parent.

    `layer` is the most similar layer of the parent, and `layers` the mean `cka` of each that was compared; the search
    stops at one that is nearly identical. `projections` are its roles (q, k, v, o, or those of latent attention that
    have a hidden side), and `cka` and `cosine` are the means over them.
    """

    layer: int
    layers: dict[int, float]
    cka: float
    cosine: float | None
    projections: dict[str, ProjectionMatch]


class EmbeddingMatch(Report):
    """How similar the embeddings of `tokens` tokens with equal ids are; `cosine` and `cka` are as in ProjectionMatch.

    `correlation` is the mean correlation of columns. `assigned` says whether the hidden dimensions are the parent's in
    another order or with other signs; everything else was then compared in the parent's order.
    """

    tokens: int
    cosine: float
    cka: float
    correlation: float
    assigned: bool


class ParentMatch(Report):
    """Which of the sampled neurons come from the feed-forwards of a dense parent, in any of its layers.

    `kept` is the share of neurons that are found in some layer, `strong` the share found with a mean cosine of at least
    0.8. `layers` has the share found in each searched layer of the parent, which has `of_layers` layers. The layer with
    the same attention, or with the same number, is searched first; the others only if it lacks many of the neurons.
    `layer` is the one with the most, null if nothing is found. `chance` and `p_value` are as in Lineage, for all
    searched layers together.

    Of the found neurons, `in_place` is the share at their own position, `cosine` the mean cosine, and `flipped` the
    share whose up row and down column both have the opposite sign. `copies` is how often each neuron of the parent
    occurs, over all experts: 1 if a layer was sliced once. By expert: `shares` has the share of its neurons that are
    found, `sources` the parent's layer with most of them, and `ranges` the range of neurons (first, last) among which
    they were found there. `attention` compares the attention of the same layer; null if there is none to compare, or if
    the parent is an MoE.
    """

    kept: float
    chance: float
    p_value: float
    in_place: float
    cosine: float
    shares: dict[int, float]
    ranges: dict[int, tuple[int, int]]
    strong: float = 0.0
    flipped: float = 0.0
    layer: int | None = None
    layers: dict[int, float] = Field(default_factory=dict)
    of_layers: int = 0
    copies: float = 0.0
    sources: dict[int, int | None] = Field(default_factory=dict)
    attention: AttentionMatch | None = None


class Sharing(Report):
    """Which experts share neurons, over all experts of a layer; this decides the verdict.

    A neuron is found in another expert if the nearest neighbour of its vector is the same neuron there in all roles,
    and clearly nearer than the second nearest. Columns, signs and identical roles make no difference.

    `shared` is the share of an expert's neurons that are found in its best partner and, in the reverse direction, found
    back as the same neuron, the mean over the experts. `strong` is the share found so with a mean cosine of at least
    0.8. `without_down` is the share found so in all roles, or in gate and up alone with a mean cosine of at least 0.6,
    as when down projections were mixed; null unless gate and up are two roles beside down. `neurons` is how many were
    searched for, and `roles` how many roles differ.

    `twins` are groups of experts with (nearly) the same weights, of which only the first is counted, `identical` groups
    of those with exactly the same weights, and `groups` those that share neurons only among themselves. `partners`
    names the best partner of each expert. `pairs` has the share of neurons of one of `experts` (row, up to 64) that are
    found in another (column), in all roles or in gate and up alone.
    """

    neurons: int
    shared: float
    strong: float
    without_down: float | None = None
    roles: int = 3
    twins: tuple[tuple[int, ...], ...]
    identical: tuple[tuple[int, ...], ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    partners: dict[int, int]
    experts: tuple[int, ...]
    pairs: tuple[tuple[float, ...], ...]


class Lineage(Report):
    """Whether neurons of one expert are found in others.

    A neuron is found in another expert if its gate row, up row and down column all have the same neuron there as their
    nearest. `neurons` were sampled in `experts`. `kept` is the share that is found in some other expert, `close` the
    share found with a mean cosine of at least 0.5, `chance` the share expected of unrelated experts, and `p_value` the
    probability of at least as many by chance.

    `spread` is the share of the other experts in which a found neuron occurs, `in_place` the share of these matches at
    the neuron's own position, `groups` the experts that share more than half of their neurons, and `pairs` the share of
    the neurons of one of `experts` (row) that are found in another (column).

    `cosine` is the mean cosine of neurons at the same position, `permuted_cosine` its expected value if each expert's
    neurons were shuffled, and `cosine_p_value` the probability of at least as much if they were. `above` has, by role,
    the share of neurons whose nearest in another expert is nearer than `unrelated`, the nearest that any has in an
    expert of another layer; both are null if no other layer is analysed. `sharing` covers all experts.
    """

    neurons: int
    experts: tuple[int, ...]
    kept: float
    close: float
    chance: float
    p_value: float
    spread: float
    in_place: float
    cosine: float
    permuted_cosine: float
    cosine_p_value: float
    groups: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[float, ...], ...]
    matches: MatchHistogram
    above: dict[str, float] | None
    unrelated: dict[str, float] | None
    parent: ParentMatch | None
    sharing: Sharing


class DocumentedRule(Report):
    """The outcome of the documented rule (gate rank and cosine), and, if it differs from the verdict, `why`."""

    type: Origin
    confidence: float
    why: str | None


class LayerAnalysis(Report):
    """The evidence of one layer, and the verdict that it would give alone."""

    layer: int
    type: Origin
    confidence: float
    kind: str | None
    original_bytes: int
    stored_bytes: int
    overlay_bytes: int
    overlay_ratio: float
    cosine: Cosine
    similarity: Similarity
    projections: dict[str, Projection]
    lineage: Lineage


class QuickLayer(Report):
    """The evidence of a part of one layer: the share `part` of the gates and ups of `experts`, neurons of `inputs`
    numbers.

    Of the `neurons` in these parts, `kept`, `close`, `chance` and `in_place` are as in Lineage, and `shared`, `strong`,
    `twins` and `identical` as in Sharing, but from gate and up alone (up and down of ungated experts), of which `roles`
    differ. `reach` is the share that would be found in the best partner if the experts were shuffled copies.
    `delta_energy` and `breadth` are of the differences of neighbouring experts, `breadth` like that of deltas in
    Projection, and `base_breadth` like that of the base, for the role where it is largest. `type` and `confidence` are
    the verdict that this part would give alone.
    """

    layer: int
    type: Origin = "UNDETERMINED"
    confidence: float = 0.5
    experts: tuple[int, ...]
    neurons: int
    part: float
    inputs: int
    reach: float
    kept: float
    close: float
    chance: float
    in_place: float
    shared: float = 0.0
    strong: float = 0.0
    twins: tuple[tuple[int, ...], ...] = ()
    identical: tuple[tuple[int, ...], ...] = ()
    roles: int = 2
    breadth: float = 1.0
    base_breadth: float = 1.0
    delta_energy: float = 1.0
    kind: str | None


class MoETypeAnalysis(Identity):
    """How the experts of one model were trained, as far as their neurons show, and whether an overlay would pay.

    `type` and `confidence` (a probability) come from the layers' `lineage` and, if no layers were asked for, also from
    the neurons of two `further_layers`, of which parts were read. `kind` is the kind of upcycling that it looks like,
    and `documented_rule` the outcome of gate rank and cosine. `parent` is the dense model that was compared with, and
    `parent_embeddings` how similar the token embeddings of the two are, null if they were not compared.

    `bits_saved` is what a base for the experts saves over all projections, in bits per weight, counting 0 for those
    where it does not pay; null in reports of earlier versions. `compressible` says whether an overlay takes fewer bytes
    than the experts as stored, and fewer than two bytes per weight. `original_bytes` counts two bytes per weight,
    `stored_bytes` what the files really use, and `overlay_bytes` a base and rank-r factors at two bytes per number,
    where r is each projection's mean 95 %-energy rank; all three are of the analysed layers. `parameters` counts the
    weights of the routed experts of all layers, assuming that they are like the analysed ones; null in reports of
    earlier versions.
    """

    schema_: Literal["moe-type-analysis/1"] = Field(default="moe-type-analysis/1", alias="schema")
    moe_layers: tuple[int, ...]
    mtp_layers: tuple[int, ...]
    parameters: int | None = None
    type: Origin
    confidence: float
    kind: str | None
    documented_rule: DocumentedRule
    parent: str | None
    parent_embeddings: EmbeddingMatch | None = None
    rank_projection: Literal["gate", "up"]
    rank_ratio: float
    cosine: float
    compressible: bool
    bits_saved: float | None = None
    overlay_ratio: float
    original_bytes: int
    stored_bytes: int
    overlay_bytes: int
    layers: tuple[LayerAnalysis, ...]
    further_layers: tuple[QuickLayer, ...] = ()
    notes: tuple[str, ...]
    cost: Cost

    def mean_over_layers(self, figure: str) -> float:
        """The mean of one of the figures of `Lineage` over the analysed layers."""
        return sum(float(getattr(layer.lineage, figure)) for layer in self.layers) / len(self.layers)

    def details(self) -> "RenderableType":
        """The outcome of the documented rule, all groups of experts, and the ranks of single experts, for
        `rich.print`."""
        return as_details(self)


class MoEQuickAnalysis(Identity):
    """How the experts of one model were trained, from a part of some experts in a few layers.

    `type` and `confidence` (a probability) come from `shared`, `strong` and `reach`, means over `layers`.
    `full_confidence` is what a full analysis would have by the same evidence, or by clear evidence if this one does not
    decide. `weight_bytes` of the experts were read, at most about `budget`; this is the `share` of `stored_bytes`, the
    bytes of all experts, extrapolated from the analysed layers. A full analysis of one layer would read `full_bytes`.
    `parameters` is as in MoETypeAnalysis.
    """

    schema_: Literal["moe-type-quick/1"] = Field(default="moe-type-quick/1", alias="schema")
    moe_layers: tuple[int, ...]
    parameters: int | None = None
    type: Origin
    confidence: float
    full_confidence: float
    kind: str | None
    close: float
    shared: float = 0.0
    strong: float = 0.0
    reach: float
    budget: int
    weight_bytes: int
    stored_bytes: int
    share: float
    full_bytes: int
    layers: tuple[QuickLayer, ...]
    notes: tuple[str, ...]
    cost: Cost


class MoETypeComparison(Report):
    """Several analyses side by side."""

    schema_: Literal["moe-type-comparison/1"] = Field(default="moe-type-comparison/1", alias="schema")
    models: tuple[MoETypeAnalysis, ...]

    def details(self) -> "RenderableType":
        """The details of each analysis, for `rich.print`."""
        return as_details(self)
