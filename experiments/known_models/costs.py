"""What would it cost to look at the public models of known origin?

    python experiments/known_models/costs.py            # rewrites the tables of README.md beside this file
    python experiments/known_models/costs.py --check    # fails where they are stale

Arithmetic on models.toml and the layout table: nothing is opened, and nothing is fetched.
"""

import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from chuk_lazarus.introspection.moe.jobs.resources import Resources
from chuk_lazarus.introspection.moe.moe_type import DEFAULT_EXPERTS
from chuk_lazarus.introspection.moe.text import format_bytes
from chuk_lazarus.introspection.moe.weights.layouts import Layout, load_table

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
BEGIN, END = "<!-- costs.py: begin -->", "<!-- costs.py: end -->"
COMMAND = "lazarus introspect moe-expert moe-type-analyze"

Origin = Literal["upcycled", "native", "undecided"]


@dataclass(frozen=True, slots=True)
class Shape:
    """The routed experts of a model: layers that have some, experts in each, and their sizes."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int


@dataclass(frozen=True, slots=True)
class Model:
    """One entry of models.toml, whose head says what the fields are; raises ValueError where they contradict."""

    id: str
    origin: Origin
    how: str
    source: str
    verified: bool
    shape_source: str
    parent: str | None = None
    parent_needs: str | None = None
    blind: str | None = None
    model_type: str | None = None
    layout: str | None = None
    needs: str | None = None
    gated: bool = True
    storage: str | None = None
    storage_verified: bool = True
    shape: Shape | None = None

    def __post_init__(self) -> None:
        if self.origin not in get_args(Origin):
            raise ValueError(f"{self.id}: no origin is named {self.origin}")
        if self.layout and (self.row.kind != "routed" or self.gated != ("gate" in _roles(self.row))):
            raise ValueError(f"{self.id}: layout {self.layout} holds other matrices")
        if self.shape and not (self.layout or self.needs):
            raise ValueError(f"{self.id}: neither a layout nor what is needed")

    @property
    def row(self) -> Layout:
        """The row of the layout table that reads it; raises ValueError where there is none of that name."""
        for row in load_table():
            if row.name == self.layout:
                return row
        raise ValueError(f"{self.id}: no layout is named {self.layout}")

    @property
    def command(self) -> str | None:
        """What analyses it, beside its parent where that can be read, too; None where the tool can't read it."""
        if not self.layout:
            return None
        parent = f" --parent {self.parent}" if self.parent and not self.parent_needs else ""
        return f"{COMMAND} -m {self.id}{parent}"


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes of routed experts, scales included and headers not: of all layers, of one, and those that a default
    analysis reads, None where the tool can't read the model."""

    all_layers: int
    one_layer: int
    read: int | None


def load_models() -> tuple[Model, ...]:
    """All entries of models.toml; raises TypeError or ValueError for an entry that is wrong, and for an id that is
    there twice."""

    def build(entry: dict[str, Any]) -> Model:
        shape = entry.pop("shape", None)
        return Model(**entry, shape=Shape(**shape) if shape else None)

    models = tuple(build(entry) for entry in tomllib.loads((HERE / "models.toml").read_text())["model"])
    if len({model.id for model in models}) < len(models):
        raise ValueError("an id is there twice")
    return models


def matrix_bytes(storage: str, rows: int, columns: int) -> int:
    """The bytes of one stored matrix: fp8 has a float32 scale for each block of 128 x 128, as DeepSeek-V3's, and mxfp4
    a byte for each 32 numbers; raises ValueError for other formats."""
    match storage:
        case "f32":
            return 4 * rows * columns
        case "bf16" | "f16":
            return 2 * rows * columns
        case "fp8":
            return rows * columns + 4 * -(-rows // 128) * -(-columns // 128)
        case "mxfp4":
            return rows * columns // 2 + rows * columns // 32
    raise ValueError(f"no size is known for {storage}")


def find_cost(model: Model) -> Cost | None:
    """The cost of a model, None where its shape is not known.

    A default analysis reads one layer, all experts once, and the sampled ones again where their matrices of one stored
    tensor are too many to be kept (`bytes_to_measure`).
    """
    if not (model.shape and model.storage):
        return None
    shape, experts = model.shape, model.shape.experts
    matrix = matrix_bytes(model.storage, shape.intermediate, shape.hidden)
    layer = experts * matrix * (3 if model.gated else 2)
    read = None
    if model.layout:
        sampled = min(experts, DEFAULT_EXPERTS)
        read = 0
        for tensor in model.row.tensors:
            is_kept = (
                sampled * len(tensor.roles) * shape.intermediate * shape.hidden <= Resources.current().kept_weights
            )
            read += len(tensor.roles) * matrix * (experts if is_kept else experts + sampled)
    return Cost(shape.layers * layer, layer, read)


def write_tables(models: Iterable[Model]) -> str:
    """The generated part of README.md."""
    models = tuple(models)
    return "\n\n".join(
        "\n".join(lines) for lines in (_costs(models), _statements(models), _needs(models), _blind(models))
    )


def _roles(row: Layout) -> set[str]:
    return {role for tensor in row.tensors for role in tensor.roles}


def _costs(models: Iterable[Model]) -> Iterator[str]:
    yield "| model | stated origin | experts, all layers | one layer | read | command |"
    yield "|---|---|---:|---:|---:|---|"
    readable = []
    for model in models:
        cost = find_cost(model)
        figures = astuple(cost) if cost else (None, None, None)
        if None not in figures:
            readable.append(figures)
        cells = [f"{model.id}{_mark(model)}", model.origin]
        cells += ["-" if figure is None else format_bytes(figure) for figure in figures]
        cells += [f"`{model.command}`" if model.command else "see below"]
        yield f"| {' | '.join(cells)} |"
    sums = [format_bytes(sum(column)) for column in zip(*readable, strict=True)]
    yield f"| the {len(readable)} that can be read | | {' | '.join(sums)} | |"


def _statements(models: Iterable[Model]) -> Iterator[str]:
    yield "| model | stated origin | how | source | layers x experts (top-k), hidden x intermediate | from |"
    yield "|---|---|---|---|---|---|"
    for model in models:
        shape = model.shape
        sizes = (
            f"{shape.layers} x {shape.experts} ({shape.top_k}), {shape.hidden} x {shape.intermediate}, {model.storage}"
            if shape
            else "-"
        )
        cells = [f"{model.id}{_mark(model)}", model.origin, model.how, model.source, sizes, model.shape_source]
        yield f"| {' | '.join(cells)} |"


def _needs(models: Iterable[Model]) -> Iterator[str]:
    yield "What the tool lacks:\n"
    for model in models:
        if model.needs:
            yield f"- {model.id}: {model.needs}"
        if model.parent_needs:
            yield f"- {model.parent}, the parent of {model.id}: {model.parent_needs}"


def _blind(models: Iterable[Model]) -> Iterator[str]:
    yield "What the experts alone can't show:\n"
    yield from (f"- {model.id}: {model.blind}" for model in models if model.blind)


def _mark(model: Model) -> str:
    return ("" if model.verified else " *") + ("" if model.storage_verified else " †")


def main() -> None:
    before, rest = README.read_text().split(BEGIN)
    stale, after = rest.split(END)
    fresh = f"\n{write_tables(load_models())}\n"
    if "--check" in sys.argv[1:]:
        if stale != fresh:
            sys.exit(f"{README.name} is stale: run {Path(__file__).name}")
    else:
        README.write_text(f"{before}{BEGIN}{fresh}{END}{after}")


if __name__ == "__main__":
    main()
