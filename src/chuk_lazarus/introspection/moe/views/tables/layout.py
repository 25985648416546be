"""What is in a checkpoint, as a table."""

from typing import TYPE_CHECKING, Any

from ...reports import LayerLayout, MoELayout
from ...text import format_bytes, format_count, format_ranges
from .grid import count_things, fact_grid, name_layers

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


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
    read = "" if layout.exact else f" (by the headers of {name_layers(layout.layers)})"

    def shapes(found: dict[str, tuple[int, int]]) -> str:
        return ", ".join(f"{role} {out} x {inner}" for role, (out, inner) in found.items())

    rows: list[tuple[str, Any]] = [
        ("Model", layout.model + (f" @ {layout.revision[:12]}" if layout.revision else "")),
        ("Family", f"{layout.family} ({layout.model_type or 'unknown type'})"),
        (
            "Storage",
            f"{', '.join(formats)}, by layer below" if len(set(map(_storage, layout.layers))) > 1 else _storage(first),
        ),
        ("MoE layers", f"{len(layout.moe_layers)} ({format_ranges(layout.moe_layers)})"),
    ]
    for where, numbers in (
        ("", set(layout.dense_layers).difference(layout.moe_layers)),
        (", beside the experts", set(layout.dense_layers).intersection(layout.moe_layers)),
    ):
        if numbers:
            rows.append(("Dense layers", f"{len(numbers)} ({format_ranges(sorted(numbers))}){where}"))
    if layout.mtp_layers:
        rows.append(("MTP layers", f"{len(layout.mtp_layers)} ({format_ranges(layout.mtp_layers)}), not in the sums"))
    rows += [
        ("Experts", f"{experts}, {layout.top_k} for each token, {layout.activation}"),
        ("Shapes", f"{shapes(first.shapes)} (out x in)"),
        ("Tensors", _tensor_names(layout.tensors)),
    ]
    if shared := layout.shared:
        where = f"in {count_things(len(shared.layers), 'layer')} of {format_bytes(shared.stored_bytes)}"
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
        (
            "An analysis",
            f"reads {format_bytes(layout.analysis_bytes)} (moe-type-analyze), {format_bytes(layout.quick_bytes)} "
            f"(--quick), or {format_bytes(layout.analysis_bytes * layout.stored_bytes / first.stored_bytes)} "
            "(--layers all)",
        ),
        *(("Note", note) for note in layout.notes),
    ]
    blocks: list[Any] = [Text("MOE LAYOUT", style="bold"), fact_grid(rows)]
    if many:
        blocks.append(_storage_table(layout))
    return Group(*blocks)


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
        table.add_row(format_ranges(numbers), str(experts), storage, format_bytes(nbytes))
    return table
