"""The results as data: what `--json` prints, what the services return, and how each shows itself."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .classifier import THRESHOLDS, Origin

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


class Report(BaseModel):
    """A frozen result that validates its own JSON."""

    model_config = ConfigDict(frozen=True, serialize_by_alias=True, validate_by_name=True, extra="forbid")


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


class LayerAnalysis(Report):
    """One layer's evidence, and what it would say alone."""

    layer: int
    type: Origin
    confidence: float
    original_bytes: int
    stored_bytes: int
    overlay_bytes: int
    overlay_ratio: float
    cosine: Cosine
    projections: dict[str, Projection]


class Cost(Report):
    """What the analysis took: bytes asked of the model's files, of which `bytes_fetched` came over the network."""

    bytes_read: int
    bytes_fetched: int
    seconds: float

    def describe(self) -> str:
        """For instance "read 805.3 MB, of which 0 B over the network, in 1.6 s"."""
        read, fetched = format_bytes(self.bytes_read), format_bytes(self.bytes_fetched)
        return f"read {read}, of which {fetched} over the network, in {self.seconds:.1f} s"


class MoETypeAnalysis(Report):
    """How one model's experts were trained, as far as the documented rule can tell, and whether an overlay would pay.

    `compressible` says whether an overlay takes fewer bytes than the experts as stored, and than two bytes a weight.
    `original_bytes` counts two bytes a weight, `stored_bytes` what the files really spend, `overlay_bytes` a base and
    rank-r factors at two bytes a number, r being each projection's mean 95 %-energy rank; all three are of the analysed
    layers.
    """

    schema_: Literal["moe-type-analysis/1"] = Field(default="moe-type-analysis/1", alias="schema")
    model: str
    revision: str | None
    family: str
    model_type: str | None
    storage: str
    experts: int
    moe_layers: tuple[int, ...]
    mtp_layers: tuple[int, ...]
    type: Origin
    confidence: float
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

    def _repr_html_(self) -> str:
        return to_html(self)


class MoETypeComparison(Report):
    """Several analyses side by side."""

    schema_: Literal["moe-type-comparison/1"] = Field(default="moe-type-comparison/1", alias="schema")
    models: tuple[MoETypeAnalysis, ...]

    def __rich__(self) -> "RenderableType":
        return render_comparison(self)

    def _repr_html_(self) -> str:
        return to_html(self)


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


def format_bytes(count: float) -> str:
    """For instance "1.2 GB"; decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def explain(analysis: MoETypeAnalysis) -> str:
    """One sentence on why the verdict is what it is."""
    evidence = (
        f"{analysis.rank_projection} rank {percent(analysis.rank_ratio)} of the maximum, cosine {analysis.cosine:.3f}"
    )
    match analysis.type:
        case "UPCYCLED":
            return f"{evidence}: the experts are one base with small changes."
        case "NATIVE":
            return f"{evidence}: position by position, the experts are as unlike as independent ones."
    if analysis.cosine > THRESHOLDS.upcycled_cosine:
        return f"{evidence}: the experts are alike, as if copied, but their differences are too broad for the rule."
    return f"{evidence}: the rule asks for both to point the same way, and they do not."


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

    verdict = Text.assemble((analysis.type, _STYLES[analysis.type]), f" ({analysis.confidence:.0%} confidence)")
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

    roles = list(analysis.layers[0].projections)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading in ("Layer", *(f"{role} rank" for role in roles), "of noise", "Cosine (down)", "Overlay"):
        table.add_column(heading, justify="right", overflow="fold")
    for layer in analysis.layers:
        first = layer.projections[analysis.rank_projection]
        table.add_row(
            str(layer.layer),
            *(
                f"{layer.projections[role].rank['0.95']:.0f} ({layer.projections[role].rank_ratio:.0%})"
                for role in roles
            ),
            percent(first.noise_rank_ratio),
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


def to_html(renderable: Any) -> str:
    """A report as the HTML that a notebook shows."""
    from io import StringIO

    from rich.console import Console

    console = Console(record=True, width=100, file=StringIO(), force_jupyter=False)
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format='<pre style="line-height:1.3">{code}</pre>')
