"""The results as data: what `--json` prints and what the services return."""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from .terms import Origin

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult


TokensFrom = Literal["tokenizer", "bytes"]


class Report(BaseModel):
    """A frozen result that validates its own JSON, and shows itself in a notebook as it does in a terminal.

    Its numbers are finite.
    """

    model_config = ConfigDict(
        frozen=True, serialize_by_alias=True, validate_by_name=True, extra="forbid", allow_inf_nan=False
    )

    def _repr_html_(self) -> str:
        from .tables import to_html

        return to_html(self)


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
    matrix of the same shape. `delta_energy` is the delta's share of an expert's energy. `decay` has the singular values
    at evenly spaced ranks from the first to the last, over their root mean square, mean over `experts`.
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


class Similarity(Report):
    """The cosines between the flattened down projections of `experts`, all of a layer or 64 evenly spaced ones."""

    experts: tuple[int, ...]
    cosine: tuple[tuple[float, ...], ...]


class Matches(Report):
    """How many of the sampled neurons have such a mean cosine over the roles, in equal bins from -1 to 1.

    `nearest` counts the cosines with the nearest neurons of another expert, `runner_up` those with the second nearest:
    what the nearest of unrelated neurons looks like.
    """

    nearest: tuple[int, ...]
    runner_up: tuple[int, ...]


class ParentMatch(Report):
    """Which of the sampled neurons come from a dense parent's feed-forward in the layer of the same number.

    `kept`, `chance`, `p_value` and `in_place` as in Lineage; `cosine` is the mean cosine of the found neurons. By
    expert: `shares` of its neurons, and the `ranges` of the parent's neurons (first, last) that they were found among.
    """

    kept: float
    chance: float
    p_value: float
    in_place: float
    cosine: float
    shares: dict[int, float]
    ranges: dict[int, tuple[int, int]]


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
    any has in an expert of another layer; both null where no other layer is analysed.
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
    matches: Matches
    above: dict[str, float] | None
    unrelated: dict[str, float] | None
    parent: ParentMatch | None


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


class Cost(Report):
    """What the analysis took: bytes asked of the model's files, of which `bytes_fetched` came over the network."""

    bytes_read: int
    bytes_fetched: int
    seconds: float

    def describe(self) -> str:
        """For instance "read 805.3 MB, of which 0 B over the network, in 1.6 s"."""
        from .text import format_bytes

        read, fetched = format_bytes(self.bytes_read), format_bytes(self.bytes_fetched)
        return f"read {read}, of which {fetched} over the network, in {self.seconds:.1f} s"


class Identity(Report):
    """Which model a report is about; `revision` is the commit on the Hub, `family` the layout's name."""

    model: str
    revision: str | None
    family: str
    model_type: str | None
    storage: str
    experts: int


class LayerLayout(Report):
    """How one layer's routed experts lie in the files; `formats` are the storage formats by role, shapes [out, in] by
    role, bytes what the files spend."""

    layer: int
    storage: str
    formats: dict[str, str]
    experts: int
    shapes: dict[str, tuple[int, int]]
    parameters: int
    stored_bytes: int


class SharedExperts(Report):
    """The experts that every token passes through, in `layers`; shapes and bytes are those of one layer.

    Several shared experts often lie in one matrix, and are one here.
    """

    family: str
    storage: str
    layers: tuple[int, ...]
    shapes: dict[str, tuple[int, int]]
    stored_bytes: int


class MoELayout(Identity):
    """What is in a checkpoint, from its headers alone.

    `family` is the row of the layout table, `stack` what the tensors' names begin with, `stacks` all such beginnings
    with experts; `tensors` names the stored tensors of the first described layer by what they hold. `layers` are the
    layers whose headers were read; `exact` says whether these are all, else `parameters` and `stored_bytes`, those of
    all routed experts of `moe_layers`, take the others to be like them. `dense_layers` have a dense feed-forward, in
    the place of experts or beside them. `analysis_bytes` is what an analysis with default options would read of the
    experts, `quick_bytes` what a quick one would at most.
    """

    schema_: Literal["moe-layout/1"] = Field(default="moe-layout/1", alias="schema")
    stack: str
    stacks: tuple[str, ...]
    top_k: int
    activation: str
    moe_layers: tuple[int, ...]
    mtp_layers: tuple[int, ...]
    dense_layers: tuple[int, ...]
    tensors: dict[str, tuple[str, ...]]
    layers: tuple[LayerLayout, ...]
    shared: SharedExperts | None
    exact: bool
    parameters: int
    stored_bytes: int
    analysis_bytes: int
    quick_bytes: int
    notes: tuple[str, ...]
    cost: Cost

    def __rich__(self) -> "RenderableType":
        from .tables import render_layout

        return render_layout(self)


class MoETypeAnalysis(Identity):
    """How one model's experts were trained, as far as their neurons tell, and whether an overlay would pay.

    `type` and `confidence`, a measured rate, come from the layers' `lineage`, `kind` says what kind of upcycling it
    looks like, and `documented_rule` what gate rank and cosine say. `parent` is the dense model that was compared with.
    `compressible` says whether an overlay takes fewer bytes than the experts as stored, and than two bytes a weight.
    `original_bytes` counts two bytes a weight, `stored_bytes` what the files really spend, `overlay_bytes` a base and
    rank-r factors at two bytes a number, r being each projection's mean 95 %-energy rank; all three are of the analysed
    layers.
    """

    schema_: Literal["moe-type-analysis/1"] = Field(default="moe-type-analysis/1", alias="schema")
    moe_layers: tuple[int, ...]
    mtp_layers: tuple[int, ...]
    type: Origin
    confidence: float
    kind: str | None
    documented_rule: DocumentedRule
    parent: str | None
    rank_projection: Literal["gate", "up"]
    rank_ratio: float
    cosine: float
    compressible: bool
    overlay_ratio: float
    original_bytes: int
    stored_bytes: int
    overlay_bytes: int
    layers: tuple[LayerAnalysis, ...]
    notes: tuple[str, ...]
    cost: Cost

    def __rich__(self) -> "RenderableType":
        from .tables import render_analysis

        return render_analysis(self)

    def _repr_html_(self) -> str:
        from .page import to_fragment

        return to_fragment(self)

    def details(self) -> "RenderableType":
        """The ranks of the single experts, as a table for `rich.print`."""
        from .tables import render_expert_ranks

        return render_expert_ranks(self)


class QuickLayer(Report):
    """What a part of one layer says: the share `part` of the gates and ups of `experts`, neurons of `inputs` numbers.

    Of `neurons` in these parts, `kept`, `close`, `chance` and `in_place` as in Lineage, by gate and up alone (up and
    down of ungated experts); `reach` is the share that would be found again if the experts were shuffled copies.
    """

    layer: int
    experts: tuple[int, ...]
    neurons: int
    part: float
    inputs: int
    reach: float
    kept: float
    close: float
    chance: float
    in_place: float
    kind: str | None


class MoEQuickAnalysis(Identity):
    """How one model's experts were trained, by a part of some experts in a few layers.

    `type` and `confidence`, the rate of such verdicts that are right, come from `close` and `reach`, means over
    `layers`; `full_confidence` is the rate of full analyses that say so (of those that decide, where this one does
    not). `weight_bytes` of the experts were read, at most about `budget`, which is the `share` of `stored_bytes`,
    those of all experts (taken from the analysed layers); a full analysis of one layer would read `full_bytes`.
    """

    schema_: Literal["moe-type-quick/1"] = Field(default="moe-type-quick/1", alias="schema")
    moe_layers: tuple[int, ...]
    type: Origin
    confidence: float
    full_confidence: float
    kind: str | None
    close: float
    reach: float
    budget: int
    weight_bytes: int
    stored_bytes: int
    share: float
    full_bytes: int
    layers: tuple[QuickLayer, ...]
    notes: tuple[str, ...]
    cost: Cost

    def __rich__(self) -> "RenderableType":
        from .tables import render_quick

        return render_quick(self)


class MoETypeComparison(Report):
    """Several analyses side by side."""

    schema_: Literal["moe-type-comparison/1"] = Field(default="moe-type-comparison/1", alias="schema")
    models: tuple[MoETypeAnalysis, ...]

    def __rich__(self) -> "RenderableType":
        from .tables import render_comparison

        return render_comparison(self)

    def _repr_html_(self) -> str:
        from .page import to_fragment

        return to_fragment(self)


class LayerOverlay(Report):
    """A layer as an overlay.

    `ranks` by role; `energy_kept` the share of the deltas' energy that they hold; `weight_error` the relative Frobenius
    error of the experts that follows from it. Bytes as in MoETypeAnalysis.
    """

    layer: int
    ranks: dict[str, int]
    max_ranks: dict[str, int]
    energy_kept: dict[str, float]
    weight_error: float
    original_bytes: int
    stored_bytes: int
    overlay_bytes: int
    ratio: float


class MoEOverlay(Identity):
    """What ranks an overlay needs, and what it takes; `rule` says how the ranks were chosen."""

    schema_: Literal["moe-overlay/1"] = Field(default="moe-overlay/1", alias="schema")
    rule: str
    layers: tuple[LayerOverlay, ...]
    original_bytes: int
    stored_bytes: int
    overlay_bytes: int
    ratio: float
    ratio_vs_stored: float
    notes: tuple[str, ...]
    cost: Cost

    def __rich__(self) -> "RenderableType":
        from .tables import render_overlay

        return render_overlay(self)


class ErrorSpread(Report):
    """A relative Frobenius error: mean and maximum over the experts."""

    mean: float
    max: float


class LayerVerification(Report):
    """What an overlay does to one layer's experts.

    `output_error` is that of the whole expert function on seeded inputs, `worst_expert` whose it is largest;
    `mixed_output_error` that of the layer's output through its router, null where no router is known. For comparison,
    `rounding_error` is the mean output error of the same experts plainly quantised, by bits.
    """

    layer: int
    ranks: dict[str, int]
    weight_error: dict[str, ErrorSpread]
    output_error: ErrorSpread
    worst_expert: int
    mixed_output_error: float | None
    rounding_error: dict[str, float]


class MoEOverlayVerification(Identity):
    """Whether the worst expert's output error stays within the tolerance."""

    schema_: Literal["moe-overlay-verification/1"] = Field(default="moe-overlay-verification/1", alias="schema")
    passed: bool
    tolerance: float
    rule: str
    activation: str
    inputs: int
    seed: int
    layers: tuple[LayerVerification, ...]
    notes: tuple[str, ...]
    cost: Cost

    def __rich__(self) -> "RenderableType":
        from .tables import render_verification

        return render_verification(self)


class LayerEstimate(Report):
    """One layer of a whole-model estimate; where `measured` is false, the ranks lie between those of its neighbours."""

    layer: int
    measured: bool
    ranks: dict[str, int]
    weight_error: float
    original_bytes: int
    stored_bytes: int
    overlay_bytes: int


class SameBytes(Report):
    """Relative weight errors of three ways to spend the bytes that plain quantisation to `bits` takes, over the
    measured layers.

    `overlay` is null where not even its base fits.
    """

    bits: int
    bytes: int
    quantisation: float
    overlay: float | None
    svd: float


class MoEOverlayEstimate(Identity):
    """What an overlay would take for the whole model, and what pays at the same bytes."""

    schema_: Literal["moe-overlay-estimate/1"] = Field(default="moe-overlay-estimate/1", alias="schema")
    rule: str
    moe_layers: tuple[int, ...]
    layers_measured: tuple[int, ...]
    layers: tuple[LayerEstimate, ...]
    original_bytes: int
    stored_bytes: int
    overlay_bytes: int
    ratio: float
    ratio_vs_stored: float
    weight_error: float
    same_bytes: tuple[SameBytes, ...]
    advice: str
    notes: tuple[str, ...]
    cost: Cost

    def __rich__(self) -> "RenderableType":
        from .tables import render_estimate

        return render_estimate(self)


class Evaluation(Report):
    """How well and how fast a model predicts tokens: `loss` in nats per token, of the `tokens` that were predicted.

    `parameter_bytes` is what the model's parameters take in memory.
    """

    loss: float
    perplexity: float
    tokens: int
    context: int
    seconds: float
    tokens_per_second: float
    parameter_bytes: int


class MoEOverlayCompression(Identity):
    """An overlay checkpoint that was written into `folder`; bytes are of all the model's tensors, before and after."""

    schema_: Literal["moe-overlay-compression/1"] = Field(default="moe-overlay-compression/1", alias="schema")
    folder: str
    rule: str
    ranks: dict[int, dict[str, int]]
    bytes_before: int
    bytes_after: int
    ratio: float
    verification: tuple[LayerVerification, ...]
    notes: tuple[str, ...]
    cost: Cost

    def __rich__(self) -> "RenderableType":
        from .tables import render_compression

        return render_compression(self)


class MoEOverlayExport(Report):
    """A standard checkpoint that was rebuilt from an overlay."""

    schema_: Literal["moe-overlay-export/1"] = Field(default="moe-overlay-export/1", alias="schema")
    overlay: str
    folder: str
    family: str
    layers: tuple[int, ...]
    bytes: int
    seconds: float

    def __rich__(self) -> "RenderableType":
        from .tables import render_export

        return render_export(self)


class MoEOverlayEvaluation(Report):
    """How a model and its overlay predict the same text; `loss_difference` is overlay minus original."""

    schema_: Literal["moe-overlay-evaluation/1"] = Field(default="moe-overlay-evaluation/1", alias="schema")
    model: str
    overlay: str
    text: str
    tokens_from: TokensFrom
    original_result: Evaluation
    overlay_result: Evaluation
    loss_difference: float
    perplexity_ratio: float

    def __rich__(self) -> "RenderableType":
        from .tables import render_evaluation

        return render_evaluation(self)


class SurveyRequest(Report):
    """What a survey asks of one model: the options of an analysis, `layers` as on the command line, null for the usual
    ones; `experts` null for all; `budget` the bytes of a quick analysis, null for a full one."""

    model: str
    parent: str | None = None
    layers: str | None = None
    experts: int | None = 8
    budget: int | None = None


class SurveyAnswer(Identity):
    """An analysis in short: its verdict, and the evidence over the analysed layers as means.

    `kept`, `close` and `chance` are those of Lineage, `parent_kept` that of ParentMatch, null without a parent; the
    rest is as in MoETypeAnalysis. A quick analysis has no ranks, cosine and overlay: they are null, and `reach`, as in
    MoEQuickAnalysis, is null of all others.
    """

    layers: tuple[int, ...]
    type: Origin
    confidence: float
    kind: str | None
    rank_projection: Literal["gate", "up"] | None = None
    rank_ratio: float | None = None
    cosine: float | None = None
    kept: float
    close: float
    chance: float
    reach: float | None = None
    parent_kept: float | None = None
    overlay_ratio: float | None = None
    compressible: bool | None = None
    notes: tuple[str, ...]
    cost: Cost


class SurveyError(Report):
    """Why there is no answer: the exit code that an analysis ends with, and its line."""

    code: int
    message: str
    hint: str


class SurveyRow(Report):
    """One model of a survey: either `answer` or `error` is null. `stated` is the origin that the list states."""

    schema_: Literal["moe-type-survey-row/1"] = Field(default="moe-type-survey-row/1", alias="schema")
    request: SurveyRequest
    stated: str | None
    answer: SurveyAnswer | None
    error: SurveyError | None

    def describe(self) -> str:
        """For instance "demo:native: NATIVE (87%), read 401.6 kB, of which 0 B over the network, in 0.1 s"."""
        if self.answer:
            found = f"{self.answer.type} ({self.answer.confidence:.0%}), {self.answer.cost.describe()}"
            return f"{self.request.model}: {found}"
        return self.error.message if self.error else ""


class MoETypeSurvey(Report):
    """The rows of many models, in the order in which they were given."""

    schema_: Literal["moe-type-survey/1"] = Field(default="moe-type-survey/1", alias="schema")
    rows: tuple[SurveyRow, ...]

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from .tables import render_survey

        yield render_survey(self, options.max_width)

    def summary(self) -> "RenderableType":
        """How many models are of which type, and the range of their figures, as a table for `rich.print`."""
        from .tables import render_survey_summary

        return render_survey_summary(self)


class PlannedModel(Report):
    """What a model of a survey would cost, by the shape that its list gives; null where it gives none.

    Bytes of the routed experts as stored, headers and biases not among them: of one layer, and of all.
    """

    request: SurveyRequest
    stated: str | None
    layer_bytes: int | None
    stored_bytes: int | None


class MoESurveyPlan(Report):
    """What a survey would cost, without reading anything; the sums are over the models whose shape is given."""

    schema_: Literal["moe-survey-plan/1"] = Field(default="moe-survey-plan/1", alias="schema")
    models: tuple[PlannedModel, ...]
    layer_bytes: int
    stored_bytes: int

    def __rich__(self) -> "RenderableType":
        from .tables import render_survey_plan

        return render_survey_plan(self)
