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

    `rank` is the effective rank at each share of energy, mean over `experts`, and `expert_ranks` are those of each;
    `rank_ratio` is that at 0.95 over `max_rank`, and `noise_rank_ratio` the same rank over that of an iid Gaussian
    matrix of the same shape. `delta_energy` is the delta's share of an expert's energy. `aligned_delta_energy` is that
    of all experts together after their neurons were brought into one order, where each group of experts that share
    neurons has a mean of its own; `bits_saved` is what such a base saves at best, in bits a weight, below 0 where it
    costs more than it saves, and `bound` the most that any code can save: null in reports of earlier versions. `decay`
    has the singular values at evenly spaced ranks from the first to the last, over their root mean square, mean over
    `experts`. `breadth` has the rank that holds 80 % of the energy of the `base`, the mean of all experts, and the one
    that holds 99 % of the `deltas`, mean over `experts`, each over that of noise.
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
    """How many of the looked-for neurons have such a mean cosine over the roles, in equal bins from -1 to 1.

    `nearest` counts the cosines with the nearest neuron of the expert's best partner, `runner_up` those with the second
    nearest there: what the nearest of unrelated neurons looks like. Where no pairs of experts could be compared, both
    are of the neurons sampled in `Lineage.experts`, and of any other of these.
    """

    nearest: tuple[int, ...]
    runner_up: tuple[int, ...]


class ProjectionMatch(Report):
    """How alike two projections of attention are: the mean `cosine` of rows at equal places (null where the shapes
    differ), and the unbiased `cka` of W^T W over the hidden side, which is blind to any rotation of the rows."""

    cosine: float | None
    cka: float


class AttentionMatch(Report):
    """How alike the attention of a layer is to that of a parent's.

    `layer` is the most similar of the parent's `layers`, the mean `cka` by layer of all that were compared: no more
    where one is nearly the same. `projections` are its roles (q, k, v, o, or those of latent attention that have a
    hidden side), and `cka` and `cosine` the means over them.
    """

    layer: int
    layers: dict[int, float]
    cka: float
    cosine: float | None
    projections: dict[str, ProjectionMatch]


class EmbeddingMatch(Report):
    """How alike the embeddings of `tokens` tokens with equal numbers are, `cosine` and `cka` as in ProjectionMatch.

    `correlation` is the mean correlation of columns, and `assigned` says whether they are the parent's in another order
    or with other signs, in which case everything else was compared in the parent's order.
    """

    tokens: int
    cosine: float
    cka: float
    correlation: float
    assigned: bool


class ParentMatch(Report):
    """Which of the sampled neurons come from a dense parent's feed-forwards, in whatever layer.

    `kept` is the share that is found in some layer, `strong` that of neurons found with a mean cosine of at least 0.8,
    and `layers` the share by the parent's layer, of all that were searched, out of `of_layers`: the layer with the same
    attention, or the same number, comes first, and no other is searched where it has nearly all. `layer` is the one
    that has most, null where nothing is found. `chance` and `p_value` as in Lineage, of all searched layers together.
    Of the found neurons `in_place` is the share at their own position, `cosine` their mean cosine, and `flipped` the
    share whose up row and down column both have the other sign. `copies` is how often each of the parent's neurons is
    there, over all experts: 1 where a layer was cut once. By expert: `shares` of its neurons, the parent's layer that
    has most of them as `sources`, and the `ranges` of neurons (first, last) that they were found among in that layer.
    `attention` is that of the layer beside the experts; null where there is none to compare, or the parent is itself an
    MoE.
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
    """Which experts share neurons, over all experts of a layer; the verdict is from this.

    A neuron is found in another expert where its vectors in all roles have one and the same neuron there for their
    nearest, clearly nearer than the second nearest; columns, signs and equal roles make no difference. `shared` is the
    share of an expert's neurons that are found in its best partner, and there in turn as the same, mean over the
    experts; `strong` that of neurons that are found so with a mean cosine of at least 0.8. `without_down` is the share
    that are found so by all roles, or by gate and up alone with a mean cosine of at least 0.6, as where the down
    projections were mixed; null where gate and up are not two roles beside down. `neurons` were looked for, by `roles`
    that differ. `twins` are groups of experts with the same weights, or nearly, of which only the first is counted,
    `identical` groups of those with the same weights to the last bit, and `groups` those that share neurons only among
    themselves. `partners` names the best partner of each expert, and
    `pairs` the share of the neurons of one of `experts` (row, up to 64 of them) that are found in another (column), by
    all roles or by gate and up alone.
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
    """Whether neurons of one expert are found again in others.

    A neuron is found again where its gate row, up row and down column all have one and the same neuron of another
    expert for their nearest. Of `neurons` sampled in `experts`, `kept` is the share for which this holds in some other
    expert, `close` that for which the mean cosine is then at least 0.5, `chance` the share to be expected of unrelated
    experts, and `p_value` the probability of so many by that chance. `spread` is the share of other experts in which a
    kept neuron is found, `in_place` the share of these matches at the neuron's own position, `groups` the experts that
    share more than half of their neurons, `pairs` the share of the neurons of one of `experts` (row) that are found in
    another (column). `cosine` is the mean of neurons at the same position, `permuted_cosine` what to expect of it if
    each expert's neurons were shuffled, and `cosine_p_value` the probability of so much or more if they were. `above`
    says, by role, for what share of neurons the nearest in another expert is nearer than `unrelated`, the nearest that
    any has in an expert of another layer; both null where no other layer is analysed. `sharing` says it of all experts.
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
    """What the documented rule (gate rank and cosine) says, and where its outcome differs, why."""

    type: Origin
    confidence: float
    why: str | None


class LayerAnalysis(Report):
    """One layer's evidence, and what it would say alone."""

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
    """What a part of one layer says: the share `part` of the gates and ups of `experts`, neurons of `inputs` numbers.

    Of `neurons` in these parts, `kept`, `close`, `chance` and `in_place` as in Lineage, and `shared`, `strong`,
    `twins` and `identical` as in Sharing, by gate and up alone (up and down of ungated experts), of which `roles`
    differ. `reach` is the share that would be found in the best partner if the experts were shuffled copies.
    `delta_energy` and `breadth` are of the differences of neighbouring experts, `breadth` as that of deltas in
    Projection, and `base_breadth` as that of the base, of the role where it is greatest. `type` and `confidence` are
    what this part would say alone.
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
    """How one model's experts were trained, as far as their neurons tell, and whether an overlay would pay.

    `type` and `confidence`, the probability by such evidence, come from the layers' `lineage` and, where no layers were
    asked for, from the neurons of two `further_layers`, of which parts were read. `kind` says what kind of upcycling it
    looks like, and `documented_rule` what gate rank and cosine say. `parent` is the dense model that was compared with,
    and `parent_embeddings` how alike the two models' token embeddings are, null where they were not compared.
    `bits_saved` is what a base for the experts saves over all projections, in bits a weight, 0 for those where it does
    not pay; null in reports of earlier versions. `compressible` says whether an overlay takes fewer bytes than the
    experts as stored, and than two bytes a weight. `original_bytes` counts two bytes a weight, `stored_bytes` what the
    files really spend, `overlay_bytes` a base and rank-r factors at two bytes a number, r being each projection's mean
    95 %-energy rank; all three are of the analysed layers. `parameters` are the weights of the routed experts of all
    layers, taken to be like the analysed ones; null in reports of earlier versions.
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
        """What the documented rule says, all groups of experts, and the ranks of single experts, for `rich.print`."""
        return as_details(self)


class MoEQuickAnalysis(Identity):
    """How one model's experts were trained, by a part of some experts in a few layers.

    `type` and `confidence`, the probability by such evidence, come from `shared`, `strong` and `reach`, means over
    `layers`; `full_confidence` is what a full analysis would have by the same evidence (by clear evidence, where this
    one does not decide). `weight_bytes` of the experts were read, at most about `budget`, which is the `share` of
    `stored_bytes`, those of all experts (taken from the analysed layers); a full analysis of one layer would read
    `full_bytes`. `parameters` are as in MoETypeAnalysis.
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
