"""The results as data: what `--json` prints, what the services return, and how each shows itself."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .classifier import LINEAGE, Origin
from .errors import spans

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


TokensFrom = Literal["tokenizer", "bytes"]


class Report(BaseModel):
    """A frozen result that validates its own JSON, and shows itself in a notebook as it does in a terminal."""

    model_config = ConfigDict(frozen=True, serialize_by_alias=True, validate_by_name=True, extra="forbid")

    def _repr_html_(self) -> str:
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

    `rank` is the effective rank at each share of energy, mean over `experts`; `rank_ratio` is that at 0.95 over
    `max_rank`, and `noise_rank_ratio` the same rank over that of an iid Gaussian matrix of the same shape.
    `delta_energy` is the delta's share of an expert's energy.
    """

    shape: tuple[int, int]
    max_rank: int
    rank: dict[str, float]
    rank_ratio: float
    noise_rank_ratio: float
    delta_energy: float
    experts: tuple[int, ...]


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
    share more than half of their neurons. `cosine` is that of neurons at the same position, `permuted_cosine` that of
    neurons at others. `above` says, by role, for what share of neurons the nearest in another expert is nearer than
    `unrelated`, the nearest that any has in an expert of another layer; both null where no other layer is analysed.
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
    groups: tuple[tuple[int, ...], ...]
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
    projections: dict[str, Projection]
    lineage: Lineage


class Cost(Report):
    """What the analysis took: bytes asked of the model's files, of which `bytes_fetched` came over the network."""

    bytes_read: int
    bytes_fetched: int
    seconds: float

    def describe(self) -> str:
        """For instance "read 805.3 MB, of which 0 B over the network, in 1.6 s"."""
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
    experts.
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
    notes: tuple[str, ...]
    cost: Cost

    def __rich__(self) -> "RenderableType":
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
        return render_analysis(self)


class MoETypeComparison(Report):
    """Several analyses side by side."""

    schema_: Literal["moe-type-comparison/1"] = Field(default="moe-type-comparison/1", alias="schema")
    models: tuple[MoETypeAnalysis, ...]

    def __rich__(self) -> "RenderableType":
        return render_comparison(self)


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
        return render_evaluation(self)


def percent(share: float) -> str:
    """For instance "48.9 %"."""
    return f"{100 * share:.1f} %"


def format_rank(projection: Projection) -> str:
    """For instance "1408 / 2880 (48.9 %)"."""
    return f"{projection.rank['0.95']:.0f} / {projection.max_rank} ({percent(projection.rank_ratio)})"


def format_cosine(cosine: Cosine) -> str:
    """For instance "0.418 ± 0.163"."""
    return f"{cosine.mean:.3f} ± {cosine.std:.3f}"


def format_compressible(analysis: MoETypeAnalysis) -> str:
    """For instance "yes (overlay 7.9x)"."""
    return f"{'yes' if analysis.compressible else 'no'} (overlay {analysis.overlay_ratio:.1f}x)"


def format_count(number: float) -> str:
    """A number with three digits or so and a unit: 46.7 B, 805 M, 12.3 k."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.{0 if number >= 100 * size else 1}f} {unit}"
    return f"{number:,.0f}"


def format_bytes(count: float) -> str:
    """For instance "1.2 GB"; decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def explain(analysis: MoETypeAnalysis) -> str:
    """One sentence on why the verdict is what it is."""
    neurons = sum(layer.lineage.neurons for layer in analysis.layers)
    kept, close, chance = (_mean(analysis, figure) for figure in ("kept", "close", "chance"))
    evidence = (
        f"{percent(kept)} of {neurons:,} neurons are found again in another expert ({percent(close)} closely), "
        f"{percent(chance)} by chance"
    )
    match analysis.type:
        case "UPCYCLED":
            return f"{evidence}: {analysis.kind}."
        case "NATIVE":
            return f"{evidence}: each expert has neurons of its own, or all of them were drawn anew."
    if chance > LINEAGE.chance:
        return f"{evidence}: the experts have too few neurons to judge by."
    return f"{evidence}: too many for independent experts, and too few for copies."


def explain_rule(analysis: MoETypeAnalysis) -> str:
    """What the documented rule says, and why it may say something else."""
    rule = analysis.documented_rule
    figures = f"{analysis.rank_projection} rank {percent(analysis.rank_ratio)}, cosine {analysis.cosine:.3f}"
    said = f"the documented rule says {rule.type} ({rule.confidence:.0%}; {figures})"
    return f"{said}: {rule.why}" if rule.why else said


def explain_parent(analysis: MoETypeAnalysis) -> str:
    """How much of the experts comes from the dense parent."""
    found = [layer.lineage.parent for layer in analysis.layers if layer.lineage.parent]
    kept, chance, cosine, place = (
        sum(getattr(one, figure) for one in found) / len(found) for figure in ("kept", "chance", "cosine", "in_place")
    )
    share = f"{percent(kept)} of the neurons are found in {analysis.parent}, {percent(chance)} by chance"
    if kept - chance < LINEAGE.native:
        return share
    return f"{share}; cosine {cosine:.2f}, {percent(place)} of them at their own position"


def _mean(analysis: MoETypeAnalysis, figure: str) -> float:
    return sum(float(getattr(layer.lineage, figure)) for layer in analysis.layers) / len(analysis.layers)


def _grid(rows: Sequence[tuple[str, Any]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in rows:
        grid.add_row(Text(key, style="dim"), value if isinstance(value, Text) else Text(str(value)))
    return grid


_STYLES = {"UPCYCLED": "bold cyan", "NATIVE": "bold green", "UNDETERMINED": "bold yellow"}


def render_analysis(analysis: MoETypeAnalysis) -> "RenderableType":
    """The analysis as a person reads it: verdict, evidence per layer, overlay."""
    from rich.console import Group
    from rich.text import Text

    confidence = "" if analysis.type == "UNDETERMINED" else f" ({analysis.confidence:.0%} confidence)"
    verdict = Text.assemble((analysis.type, _STYLES[analysis.type]), confidence)
    name = analysis.model + (f" @ {analysis.revision[:12]}" if analysis.revision else "")
    kind = f"{analysis.model_type or 'unknown type'}, {analysis.experts} experts, {analysis.storage}"
    many = len(analysis.layers) > 1
    blocks: list[Any] = [Text("MOE TYPE ANALYSIS", style="bold")]
    blocks.append(
        _grid(
            [
                ("Model", name),
                ("Family", f"{analysis.family} ({kind})"),
                ("Layers" if many else "Layer", ", ".join(str(layer.layer) for layer in analysis.layers)),
                ("Type", verdict),
                ("Why", explain(analysis)),
                *([("Parent", explain_parent(analysis))] if analysis.parent else []),
                ("By rank", explain_rule(analysis)),
            ]
        )
    )
    blocks.append(_layer_table(analysis) if many else _projection_table(analysis.layers[0]))
    rows: list[tuple[str, Any]] = []
    if not many:
        cosine = analysis.layers[0].cosine
        others = ", ".join(
            f"{role} {value:.3f}" for role in ("gate", "up") if (value := getattr(cosine, role)) is not None
        )
        rows.append(("Cosine", f"{format_cosine(cosine)} (down), {others}"))
    rows += [
        ("Compressible", format_compressible(analysis)),
        (
            "Bytes",
            f"{format_bytes(analysis.stored_bytes)} stored, {format_bytes(analysis.overlay_bytes)} as overlay "
            f"at 95 % of the delta energy",
        ),
    ]
    rows += [("Note", note) for note in analysis.notes]
    blocks.append(_grid(rows))
    return Group(*blocks)


def render_layout(layout: MoELayout) -> "RenderableType":
    """What is in the checkpoint, and a table of layers where they differ."""
    from rich.console import Group
    from rich.text import Text

    first = layout.layers[0]
    many = len({(_storage(layer), layer.experts, layer.stored_bytes) for layer in layout.layers}) > 1
    counts = sorted({layer.experts for layer in layout.layers})
    experts = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    formats = dict.fromkeys(name for layer in layout.layers for name in layer.formats.values())
    bits = 8 * first.stored_bytes / first.parameters
    read = "" if layout.exact else f" (by the headers of {_layers(layout.layers)})"

    def shapes(found: dict[str, tuple[int, int]]) -> str:
        return ", ".join(f"{role} {out} x {inner}" for role, (out, inner) in found.items())

    rows: list[tuple[str, Any]] = [
        ("Model", layout.model + (f" @ {layout.revision[:12]}" if layout.revision else "")),
        ("Family", f"{layout.family} ({layout.model_type or 'unknown type'})"),
        (
            "Storage",
            f"{', '.join(formats)}, by layer below" if len(set(map(_storage, layout.layers))) > 1 else _storage(first),
        ),
        ("MoE layers", f"{len(layout.moe_layers)} ({spans(layout.moe_layers)})"),
    ]
    for where, numbers in (
        ("", set(layout.dense_layers).difference(layout.moe_layers)),
        (", beside the experts", set(layout.dense_layers).intersection(layout.moe_layers)),
    ):
        if numbers:
            rows.append(("Dense layers", f"{len(numbers)} ({spans(sorted(numbers))}){where}"))
    if layout.mtp_layers:
        rows.append(("MTP layers", f"{len(layout.mtp_layers)} ({spans(layout.mtp_layers)}), not in the sums"))
    rows += [
        ("Experts", f"{experts}, {layout.top_k} for each token, {layout.activation}"),
        ("Shapes", f"{shapes(first.shapes)} (out x in)"),
        ("Tensors", _tensor_names(layout.tensors)),
    ]
    if shared := layout.shared:
        where = f"in {_count(len(shared.layers), 'layer')} of {format_bytes(shared.stored_bytes)}"
        rows.append(("Shared", f"{shapes(shared.shapes)}, {shared.storage}, {where}"))
    rows += [
        (
            f"Layer {first.layer}" if many else "A layer",
            f"{format_bytes(first.stored_bytes)}, {format_count(first.parameters)} weights of {bits:.3g} bits",
        ),
        (
            "All layers",
            f"{'' if layout.exact else 'about '}{format_bytes(layout.stored_bytes)}, "
            f"{format_count(layout.parameters)} weights{read}",
        ),
        ("An analysis", f"reads {format_bytes(layout.analysis_bytes)} (moe-type-analyze, by default)"),
        *(("Note", note) for note in layout.notes),
    ]
    blocks: list[Any] = [Text("MOE LAYOUT", style="bold"), _grid(rows)]
    if many:
        blocks.append(_storage_table(layout))
    return Group(*blocks)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _layers(layers: Sequence[LayerLayout]) -> str:
    return f"layer{'' if len(layers) == 1 else 's'} {spans([layer.layer for layer in layers])}"


def _storage(layer: LayerLayout) -> str:
    """For instance "bf16", or "mlx-4bit (gate, up), mlx-6bit (down)"."""
    roles: dict[str, list[str]] = {}
    for role, name in layer.formats.items():
        roles.setdefault(name, []).append(role)
    return ", ".join(f"{name} ({', '.join(of)})" if len(roles) > 1 else name for name, of in roles.items())


def _tensor_names(tensors: dict[str, tuple[str, ...]]) -> str:
    """What the names begin with, and below it how they go on, a line for what a tensor holds."""
    everything = [name for names in tensors.values() for name in names]
    low, high = min(everything), max(everything)
    same = next((i for i, (one, other) in enumerate(zip(low, high, strict=False)) if one != other), len(low))
    start = low[: low.rfind(".", 0, same) + 1]
    width = max(map(len, tensors))
    lines = (f"{role:{width}}  {', '.join(n.removeprefix(start) for n in names)}" for role, names in tensors.items())
    return "\n".join([start, *lines])


def _storage_table(layout: MoELayout) -> "Table":
    """The layers of each kind, where they are not all stored alike."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("Layers", "Experts", "Storage", "Bytes a layer"):
        table.add_column(heading, overflow="fold")
    alike: dict[tuple[str, int, int], list[int]] = {}
    for layer in layout.layers:
        alike.setdefault((_storage(layer), layer.experts, layer.stored_bytes), []).append(layer.layer)
    for (storage, experts, nbytes), numbers in alike.items():
        table.add_row(spans(numbers), str(experts), storage, format_bytes(nbytes))
    return table


def _projection_table(layer: LayerAnalysis) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Projection")
    for heading in ("Rank (95 %)", "of noise", "Delta energy"):
        table.add_column(heading, justify="right", overflow="fold")
    for role, projection in layer.projections.items():
        table.add_row(
            role, format_rank(projection), percent(projection.noise_rank_ratio), percent(projection.delta_energy)
        )
    return table


def _layer_table(analysis: MoETypeAnalysis) -> "Table":
    from rich import box
    from rich.table import Table

    first, *others = analysis.layers[0].projections  # the verdict's own rank first, with its share of noise beside it
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    ranks = (f"{role} rank" for role in others)
    for heading in ("Layer", f"{first} rank", "of noise", *ranks, "Cosine (down)", "Overlay"):
        table.add_column(heading, justify="right", overflow="fold")

    def rank(layer: LayerAnalysis, role: str) -> str:
        return f"{layer.projections[role].rank['0.95']:.0f} ({layer.projections[role].rank_ratio:.0%})"

    for layer in analysis.layers:
        table.add_row(
            str(layer.layer),
            rank(layer, first),
            percent(layer.projections[first].noise_rank_ratio),
            *(rank(layer, role) for role in others),
            format_cosine(layer.cosine),
            f"{layer.overlay_ratio:.1f}x",
        )
    return table


def render_comparison(comparison: MoETypeComparison) -> "RenderableType":
    """One row per figure, one column per model; means over the layers where there are several."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Metric", no_wrap=True)
    for model in comparison.models:
        table.add_column(Text(model.model), overflow="fold")

    def mean(model: MoETypeAnalysis, role: str, figure: str) -> str:
        found = [layer.projections[role] for layer in model.layers if role in layer.projections]
        if not found:
            return "none"
        if figure == "rank":
            return f"{sum(p.rank['0.95'] for p in found) / len(found):.0f} / {found[0].max_rank}"
        return percent(sum(getattr(p, figure) for p in found) / len(found))

    def row(metric: str, cells: Sequence[Any]) -> None:
        table.add_row(metric, *(cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells))

    models = comparison.models
    row("Type", [Text(model.type, style=_STYLES[model.type]) for model in models])
    row("Confidence", [f"{model.confidence:.0%}" for model in models])
    row("Kind", [model.kind or "" for model in models])
    row("Neurons found", [percent(_mean(model, "kept")) for model in models])
    row("  closely", [percent(_mean(model, "close")) for model in models])
    row("  by chance", [percent(_mean(model, "chance")) for model in models])
    row("By rank", [f"{model.documented_rule.type} ({model.documented_rule.confidence:.0%})" for model in models])
    row("Layers", [", ".join(str(layer.layer) for layer in model.layers) for model in models])
    row("Experts", [f"{model.experts} ({model.storage})" for model in models])
    for role in ("gate", "up", "down"):
        row(f"{role.capitalize()} rank", [mean(model, role, "rank") for model in models])
        row(f"{role.capitalize()} rank %", [mean(model, role, "rank_ratio") for model in models])
        row("  of noise", [mean(model, role, "noise_rank_ratio") for model in models])
    row(
        "Cosine (down)",
        [f"{model.cosine:.3f} ± {sum(x.cosine.std for x in model.layers) / len(model.layers):.3f}" for model in models],
    )
    row("Compressible", [format_compressible(model) for model in models])
    return Group(Text("MOE TYPE COMPARISON", style="bold"), table)


def _heading(title: str, report: Identity, *rows: tuple[str, Any]) -> list[Any]:
    from rich.text import Text

    name = report.model + (f" @ {report.revision[:12]}" if report.revision else "")
    kind = f"{report.family} ({report.model_type or 'unknown type'}, {report.experts} experts, {report.storage})"
    return [Text(title, style="bold"), _grid([("Model", name), ("Family", kind), *rows])]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _roles(ranks: dict[str, int]) -> list[str]:
    return [role for role in ("gate", "up", "down") if role in ranks]


def render_overlay(overlay: MoEOverlay) -> "RenderableType":
    """Ranks, energy, error and bytes, a row per layer."""
    from rich.console import Group

    roles = _roles(overlay.layers[0].ranks)
    rows = [
        [
            str(layer.layer),
            *(f"{layer.ranks[role]}/{layer.max_ranks[role]} ({layer.energy_kept[role]:.1%})" for role in roles),
            percent(layer.weight_error),
            f"{layer.ratio:.1f}x",
        ]
        for layer in overlay.layers
    ]
    headings = ["Layer", *(f"{role} rank (kept)" for role in roles), "Error", "Ratio"]
    blocks = _heading("MOE OVERLAY", overlay, ("Ranks", overlay.rule))
    return Group(*blocks, _table(headings, rows), _grid([*_byte_rows(overlay), *(("Note", n) for n in overlay.notes)]))


def _byte_rows(report: "MoEOverlay | MoEOverlayEstimate") -> list[tuple[str, Any]]:
    stored, original = format_bytes(report.stored_bytes), format_bytes(report.original_bytes)
    return [
        ("Experts", f"{stored} as stored, {original} at two bytes a weight"),
        (
            "Overlay",
            f"{format_bytes(report.overlay_bytes)}: {report.ratio:.1f}x against two bytes a weight, "
            f"{report.ratio_vs_stored:.1f}x against the file",
        ),
    ]


def render_verification(report: MoEOverlayVerification) -> "RenderableType":
    """Pass or fail, and the errors, a row per layer."""
    from rich.console import Group
    from rich.text import Text

    verdict = Text("PASSED", style="bold green") if report.passed else Text("FAILED", style="bold red")
    verdict.append(f" (worst expert's output error, tolerance {percent(report.tolerance)})", style="default")
    roles = _roles(report.layers[0].ranks)
    rows = [
        [
            str(layer.layer),
            *(f"{layer.ranks[role]} ({layer.weight_error[role].mean:.1%})" for role in roles),
            percent(layer.output_error.mean),
            percent(layer.output_error.max),
            f"#{layer.worst_expert}",
            "?" if layer.mixed_output_error is None else percent(layer.mixed_output_error),
        ]
        for layer in report.layers
    ]
    headings = ["Layer", *(f"{role} (error)" for role in roles), "Output", "Worst", "Expert", "Mixed"]
    blocks = _heading("MOE OVERLAY VERIFICATION", report, ("Ranks", report.rule), ("Result", verdict))
    rounding = (
        f"{percent(sum(layer.rounding_error[bits] for layer in report.layers) / len(report.layers))} at {bits} bits"
        for bits in report.layers[0].rounding_error
    )
    notes = [
        ("Inputs", f"{report.inputs} seeded vectors (seed {report.seed}), activation {report.activation}"),
        ("Rounding", f"the mean output error of plain quantisation is {', '.join(rounding)}"),
    ]
    return Group(*blocks, _table(headings, rows), _grid([*notes, *(("Note", note) for note in report.notes)]))


def render_estimate(report: MoEOverlayEstimate) -> "RenderableType":
    """The whole model's bytes, its layers, and what else the same bytes would buy."""
    from rich.console import Group

    roles = _roles(report.layers[0].ranks)
    rows = [
        [
            str(layer.layer),
            *(f"{layer.ranks[role]}" for role in roles),
            percent(layer.weight_error),
            f"{layer.original_bytes / layer.overlay_bytes:.1f}x",
            "measured" if layer.measured else "interpolated",
        ]
        for layer in report.layers
    ]
    same = [
        [
            f"{row.bits} bit",
            format_bytes(row.bytes),
            percent(row.quantisation),
            "does not fit" if row.overlay is None else percent(row.overlay),
            percent(row.svd),
        ]
        for row in report.same_bytes
    ]
    blocks = _heading("MOE OVERLAY ESTIMATE", report, ("Ranks", report.rule))
    return Group(
        *blocks,
        _table(["Layer", *(f"{role} rank" for role in roles), "Error", "Ratio", "How"], rows),
        _grid(
            [
                *_byte_rows(report),
                ("Error", f"{percent(report.weight_error)} of the weights"),
                (
                    "Same bytes",
                    f"weight errors and bytes of layers {', '.join(map(str, report.layers_measured))}",
                ),
            ]
        ),
        _table(["As", "Bytes", "Quantised", "Overlay", "Plain SVD"], same),
        _grid([("Advice", report.advice), *(("Note", note) for note in report.notes)]),
    )


def render_compression(report: MoEOverlayCompression) -> "RenderableType":
    """Where it is, what it takes, and the errors of the layers that were verified."""
    from rich.console import Group

    size = f"{format_bytes(report.bytes_before)} before, {format_bytes(report.bytes_after)} after ({report.ratio:.2f}x)"
    rows = [
        [str(one.layer), *map(str, one.ranks.values()), percent(one.output_error.mean), percent(one.output_error.max)]
        for one in report.verification
    ]
    roles = _roles(next(iter(report.ranks.values())))
    headings = ["Layer", *(f"{role} rank" for role in roles), "Output error", "Worst expert"]
    blocks = _heading("MOE OVERLAY WRITTEN", report, ("Ranks", report.rule), ("Folder", report.folder))
    rest = [("Model", size), *(("Note", note) for note in report.notes)]
    return Group(*blocks, _table(headings, rows), _grid(rest))


def render_export(report: MoEOverlayExport) -> "RenderableType":
    """Where it is and what it takes."""
    from rich.console import Group
    from rich.text import Text

    rows = [
        ("Overlay", report.overlay),
        ("Folder", report.folder),
        ("Family", report.family),
        ("Bytes", format_bytes(report.bytes)),
    ]
    return Group(Text("MOE OVERLAY EXPORTED", style="bold"), _grid(rows))


def render_evaluation(report: MoEOverlayEvaluation) -> "RenderableType":
    """Original and overlay side by side."""
    from rich.console import Group
    from rich.text import Text

    results = (report.original_result, report.overlay_result)
    rows = [
        ["Loss", *(f"{one.loss:.4f}" for one in results), f"{report.loss_difference:+.4f}"],
        ["Perplexity", *(f"{one.perplexity:.3f}" for one in results), f"{report.perplexity_ratio:.3f}x"],
        ["Tokens per second", *(f"{one.tokens_per_second:,.0f}" for one in results), ""],
        ["Weights in memory", *(format_bytes(one.parameter_bytes) for one in results), ""],
    ]
    heading = [("Model", report.model), ("Overlay", report.overlay), ("Text", report.text)]
    heading += [("Tokens", f"{results[0].tokens:,} by {report.tokens_from}, in windows of {results[0].context}")]
    table = _table(["", "Original", "Overlay", "Difference"], rows)
    return Group(Text("MOE OVERLAY EVALUATION", style="bold"), _grid(heading), table)


def to_html(renderable: Any) -> str:
    """A report as the HTML that a notebook shows."""
    from io import StringIO

    from rich.console import Console

    console = Console(record=True, width=100, file=StringIO(), force_jupyter=False)
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format='<pre style="line-height:1.3">{code}</pre>')
