"""What overlays save: computed, verified, estimated, written and run."""

from typing import Literal

from pydantic import Field

from .layout import FitPlan
from .report import Cost, Identity, Report

TokensFrom = Literal["tokenizer", "bytes"]


CLEARLY = 0.98  # a method is better than a simpler one if its error is below this share of the other's


class ProjectionCodes(Report):
    """The codes of a coded projection: of its base, null if it has none, and of each expert's delta from it.

    If only some neurons are shared, `base` is the code of a bank of `bank` neurons; `matched` neurons of each expert
    are deltas from these, and `rest` is the code of the others.
    """

    base: str | None
    delta: str
    rest: str | None = None
    bank: int | None = None
    matched: int | None = None


class OverlayBytes(Report):
    """Bytes by what they hold: bases and deltas without their scales, and the scales of both.

    The index of a bank counts as bases, and neurons outside the bank count as deltas.
    """

    bases: int
    deltas: int
    scales: int


class LayerOverlay(Report):
    """A layer as an overlay.

    `ranks` are by role, `energy_kept` is the share of the deltas' energy that they keep, and `weight_error` the
    relative Frobenius error of the experts that follows from it. Bytes are as in MoETypeAnalysis. A coded layer has
    `codes` by role, no ranks and no `energy_kept`, and its error is measured. `bits_per_weight` counts everything.
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
    codes: dict[str, ProjectionCodes] = Field(default_factory=dict)
    bits_per_weight: float


class MoEOverlay(Identity):
    """The ranks or codes that an overlay needs, and its size; `rule` says how they were chosen."""

    schema_: Literal["moe-overlay/1"] = Field(default="moe-overlay/1", alias="schema")
    rule: str
    layers: tuple[LayerOverlay, ...]
    original_bytes: int
    stored_bytes: int
    overlay_bytes: int
    ratio: float
    ratio_vs_stored: float
    bits_per_weight: float
    bytes_by_part: OverlayBytes
    notes: tuple[str, ...]
    cost: Cost


class ErrorSpread(Report):
    """A relative Frobenius error: mean and maximum over the experts."""

    mean: float
    max: float


class LayerVerification(Report):
    """The errors that an overlay causes in the experts of one layer.

    `output_error` is that of the whole expert function on seeded inputs, `worst_expert` the expert with the largest
    one, and `mixed_output_error` that of the layer's output through its router, null if the router is not known. For
    comparison, `rounding_error` has the mean output error of the same experts under plain quantisation, by bits. A
    coded layer has `codes` by role, and no ranks.
    """

    layer: int
    ranks: dict[str, int]
    weight_error: dict[str, ErrorSpread]
    output_error: ErrorSpread
    worst_expert: int
    mixed_output_error: float | None
    rounding_error: dict[str, float]
    codes: dict[str, ProjectionCodes] = Field(default_factory=dict)


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


class SharingRate(Report):
    """What the experts share in one projection; `aligned_delta_energy`, `bits_saved` and `bound` are as in
    Projection."""

    aligned_delta_energy: float
    bits_saved: float
    bound: float


class LayerEstimate(Report):
    """One layer of a whole-model estimate; if `measured` is false, its ranks are interpolated between its neighbours'.

    A coded layer has `codes` by role and no ranks; if it was not measured, it takes those of the nearest measured
    layer. `sharing` is by role. `bits_saved` is what bases save over all roles, in bits per weight, counting 0 for
    those where they do not pay. Both are null if the layer was not measured.
    """

    layer: int
    measured: bool
    ranks: dict[str, int]
    weight_error: float
    original_bytes: int
    stored_bytes: int
    overlay_bytes: int
    codes: dict[str, ProjectionCodes] = Field(default_factory=dict)
    sharing: dict[str, SharingRate] | None = None
    bits_saved: float | None = None


class SameBytes(Report):
    """Relative weight errors of three ways to use the bytes that plain quantisation to `bits` takes, over the measured
    layers.

    `overlay` is null if even its base does not fit.
    """

    bits: int
    bytes: int
    quantisation: float
    overlay: float | None
    svd: float


class LadderRow(Report):
    """Relative weight errors at `bits` bits per weight of the experts, everything counted, over the measured layers;
    `bytes` is the size of the experts of all MoE layers.

    `rounding` is the error of plain quantisation at `rounding_bits`, the most bits that fit together with their scales;
    `plain` that of our codes without bases, `coded` of an overlay in codes, `low_rank` of one in bf16, `svd` of plain
    SVDs. What does not fit is null. `bound` is the smallest error of any code if the weights were Gaussian; for
    low-rank deltas a code can have a smaller one.
    """

    bits: float
    bytes: int
    rounding: float | None
    rounding_bits: int | None
    plain: float | None
    coded: float | None
    low_rank: float | None
    svd: float
    bound: float

    @property
    def best(self) -> str:
        """The name of the field whose method has the smallest error; a simpler one wins if it is worse by less than 2
        %."""
        best, least = "svd", self.svd
        for method in ("low_rank", "coded", "plain", "rounding"):  # the simplest comes last
            error: float | None = getattr(self, method)
            if error is not None and CLEARLY * error <= least:
                best, least = method, error
        return best


class MoEOverlayEstimate(Identity):
    """The size of an overlay of the whole model, and which method has the smallest error at the same bytes.

    `format` is what `moe-overlay-compress` writes by this rule: an overlay or, if the experts share nothing, a plain
    quantised checkpoint for mlx-lm. `fit` is there if the rule is the size of a folder. `ladder` is empty in reports of
    earlier versions. `bits_saved` is what bases save over all layers, as in LayerEstimate, interpolated between the
    measured ones; null in reports of earlier versions.
    """

    schema_: Literal["moe-overlay-estimate/1"] = Field(default="moe-overlay-estimate/1", alias="schema")
    rule: str
    format: Literal["overlay", "mlx"] = "overlay"
    fit: FitPlan | None = None
    moe_layers: tuple[int, ...]
    layers_measured: tuple[int, ...]
    layers: tuple[LayerEstimate, ...]
    original_bytes: int
    stored_bytes: int
    overlay_bytes: int
    ratio: float
    ratio_vs_stored: float
    weight_error: float
    bits_saved: float | None = None
    same_bytes: tuple[SameBytes, ...]
    ladder: tuple[LadderRow, ...] = ()
    advice: str
    notes: tuple[str, ...]
    cost: Cost


class SampleMean(Report):
    """A mean and its standard error, which is null for a sample of one."""

    mean: float
    stderr: float | None


class Evaluation(Report):
    """How well and how fast a model predicts tokens: `loss` in nats per token, over the `tokens` predicted tokens.

    `parameter_bytes` is what the model's parameters take in memory. `bits_per_weight` counts everything that is stored
    of the routed experts, null if that is not known. `seconds` is the time of the model alone.
    """

    loss: float
    perplexity: float
    tokens: int
    context: int
    seconds: float
    tokens_per_second: float
    parameter_bytes: int
    bits_per_weight: float | None = None


class MoEOverlayCompression(Identity):
    """A checkpoint that was written into `folder`; bytes are those of all the model's tensors, before and after.

    `format` is `overlay`, or `mlx` for a plain quantised checkpoint; `codes` then have no base. `ranks` or `codes` are
    by layer and role. `bits_per_weight` and `bytes_by_part` are of the experts that were coded.
    """

    schema_: Literal["moe-overlay-compression/1"] = Field(default="moe-overlay-compression/1", alias="schema")
    format: Literal["overlay", "mlx"] = "overlay"
    folder: str
    rule: str
    ranks: dict[int, dict[str, int]]
    codes: dict[int, dict[str, ProjectionCodes]] = Field(default_factory=dict)
    bytes_before: int
    bytes_after: int
    ratio: float
    bits_per_weight: float
    bytes_by_part: OverlayBytes
    verification: tuple[LayerVerification, ...]
    notes: tuple[str, ...]
    cost: Cost


class MoEOverlayExport(Report):
    """An overlay, or another model, in the requested format; `bytes` is the size of all tensors.

    `widths` are by layer and role, "bf16" for what is not quantised, and {} in the format `standard`; `rule` says how
    they were chosen. `verification` has the errors of some layers, relative to the overlay if there is one. For a
    `gguf-recipe`, `folder` is the file that was written, and `bytes` and `weight_error` are those expected of the GGUF
    file. `commands` are what to run next.
    """

    schema_: Literal["moe-overlay-export/1"] = Field(default="moe-overlay-export/1", alias="schema")
    overlay: str
    format: Literal["standard", "mlx", "compressed-tensors", "gguf-recipe"] = "standard"
    folder: str
    family: str
    layers: tuple[int, ...]
    rule: str | None = None
    widths: dict[int, dict[str, str]] = Field(default_factory=dict)
    weight_error: float | None = None
    verification: tuple[LayerVerification, ...] = ()
    bytes: int
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float


class MoEOverlayEvaluation(Report):
    """How a model and its overlay predict the same text; `loss_difference` is overlay minus original.

    The folder `overlay` may also hold another checkpoint of the same model; then `is_overlay` is false. `kl` is the
    mean over the predicted tokens of KL(original || overlay), the divergence of the next token's distribution from the
    original's, in nats. Its standard error, and that of `loss_difference`, treat the windows of `context` tokens as a
    random sample, because tokens within a window depend on each other; with a single window, they treat its tokens so.
    """

    schema_: Literal["moe-overlay-evaluation/1"] = Field(default="moe-overlay-evaluation/1", alias="schema")
    model: str
    overlay: str
    is_overlay: bool
    text: str
    tokens_from: TokensFrom
    original_result: Evaluation
    overlay_result: Evaluation
    loss_difference: float
    loss_difference_stderr: float | None
    perplexity_ratio: float
    kl: SampleMean
