"""What is in a checkpoint, as a table."""

from typing import TYPE_CHECKING

from ...reports import FitPlan, LayerLayout, MoELayout
from ...text import format_bytes, format_count, format_ranges, percent
from ..words import count_noun, identify, name_layers
from .grid import WORDS, Fact, Grid, draw_facts, draw_table, stack

if TYPE_CHECKING:
    from rich.console import RenderableType

Kind = tuple[str, int, int]  # storage, experts and bytes of a layer

ORDER_BY = {"model_type": "the model type", "names": "the tensor names", "norms": "the norms of the weights"}


def render_layout(layout: MoELayout) -> "RenderableType":
    """What is in the checkpoint, and a table of layers where they differ."""
    first = layout.layers[0]
    kinds = _group_layers(layout)
    storages = list(dict.fromkeys(storage for storage, _, _ in kinds))
    counts = sorted({layer.experts for layer in layout.layers})
    experts = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    formats = dict.fromkeys(name for layer in layout.layers for name in layer.formats.values())
    bits = 8 * first.stored_bytes / first.parameters
    read = "" if layout.exact else f" (from the headers of {name_layers([layer.layer for layer in layout.layers])})"

    facts: list[Fact] = [
        ("Model", identify(layout)),
        ("Family", f"{layout.family} ({layout.model_type or 'unknown type'})"),
        (
            "Storage",
            f"{', '.join(formats)}, by layer below" if len(storages) > 1 else storages[0],
        ),
        ("MoE layers", f"{len(layout.moe_layers)} ({format_ranges(layout.moe_layers)})"),
    ]
    for where, numbers in (
        ("", set(layout.dense_layers).difference(layout.moe_layers)),
        (", beside the experts", set(layout.dense_layers).intersection(layout.moe_layers)),
    ):
        if numbers:
            facts.append(("Dense layers", f"{len(numbers)} ({format_ranges(sorted(numbers))}){where}"))
    if layout.mtp_layers:
        facts.append(
            ("MTP layers", f"{len(layout.mtp_layers)} ({format_ranges(layout.mtp_layers)}), not counted below")
        )
    facts += [
        ("Experts", f"{experts}, {layout.top_k} per token, {layout.activation}"),
        ("Shapes", f"{_format_shapes(first.shapes)} (out x in)"),
        ("Tensors", _describe_tensors(layout.tensors)),
    ]
    if layout.order and layout.order_by:
        facts.append(("Gates, ups", f"in {layout.order}, decided by {ORDER_BY[layout.order_by]}"))
    if shared := layout.shared:
        where = f"in {count_noun(len(shared.layers), 'layer')} of {format_bytes(shared.stored_bytes)}"
        facts.append(("Shared", f"{_format_shapes(shared.shapes)}, {shared.storage}, {where}"))
    fit = list_fit(layout.fit) if layout.fit else []
    measured = layout.analysis_bytes - layout.further_bytes
    whole = measured * layout.stored_bytes / first.stored_bytes
    beside = f"layer {layout.moe_layers[0]}"
    if layout.further_layers:
        beside += f", and {format_bytes(layout.further_bytes)} of {name_layers(layout.further_layers)}"
    facts += [
        (
            f"Layer {first.layer}" if len(kinds) > 1 else "A layer",
            f"{format_bytes(first.stored_bytes)}, {format_count(first.parameters)} weights of {bits:.3g} bits",
        ),
        (
            "All layers",
            f"{'' if layout.exact else 'about '}{format_bytes(layout.stored_bytes)}, "
            f"{format_count(layout.parameters)} weights{read}",
        ),
        (
            "An analysis",
            f"reads {format_bytes(layout.analysis_bytes)} ({beside}), "
            f"{format_bytes(layout.quick_bytes)} with --quick, or {format_bytes(whole)} with --layers all",
        ),
        *fit,
    ]
    return stack("MOE LAYOUT", draw_facts(facts, layout.notes), *([_draw_kinds(kinds)] if len(kinds) > 1 else []))


def list_fit(fit: FitPlan) -> list[Fact]:
    """Whether a model fits, and what that costs."""
    size = format_bytes(fit.size)
    how = "as stored" if fit.rest_bits is None else f"in {fit.rest_bits} bits"
    rest = "not counted" if fit.rest_bytes is None else f"{format_bytes(fit.rest_bytes)} {how}"
    if fit.bits_per_weight is None:
        return [
            ("Fits", f"no: quantised for MLX, it takes at least {format_bytes(fit.least_bytes)} (the rest: {rest})")
        ]
    if fit.bits_per_weight >= 16:
        fits = f"yes: {size} is enough for bf16"
    else:
        fits = f"yes, with {fit.bits_per_weight:.2f} bits per expert weight in {size} (the rest: {rest})"
    facts: list[Fact] = [("Fits", fits)]
    if fit.weight_error is not None and fit.bound is not None:
        how = "measured on the sampled layers" if fit.measured else "expected for Gaussian weights; no weight was read"
        facts.append(
            ("Error", f"about {percent(fit.weight_error)}, relative ({how}); the best possible is {percent(fit.bound)}")
        )
    if fit.memory_bytes is not None:
        cache = (
            "the cache size is unknown"
            if fit.cache_bytes is None
            else f"including up to {format_bytes(fit.cache_bytes)} of cache for {fit.context:,} tokens"
        )
        machine = (
            "more than any Mac has"
            if fit.machine_bytes is None
            else f"a Mac with {format_bytes(fit.machine_bytes)} runs it"
        )
        facts.append(("Memory", f"{format_bytes(fit.memory_bytes)}, {cache}: {machine}"))
    return [*facts, ("Reads", f"{format_bytes(fit.download_bytes)}, one expert at a time")]


def _format_shapes(shapes: dict[str, tuple[int, int]]) -> str:
    return ", ".join(f"{role} {out} x {inner}" for role, (out, inner) in shapes.items())


def _describe_storage(layer: LayerLayout) -> str:
    """For instance "bf16", or "mlx-4bit (gate, up), mlx-6bit (down)"."""
    roles: dict[str, list[str]] = {}
    for role, name in layer.formats.items():
        roles.setdefault(name, []).append(role)
    return ", ".join(f"{name} ({', '.join(of)})" if len(roles) > 1 else name for name, of in roles.items())


def _describe_tensors(tensors: dict[str, tuple[str, ...]]) -> str:
    """The common beginning of the names, and below it the rest of each name, a line for each part of an expert."""
    everything = [name for names in tensors.values() for name in names]
    first, last = min(everything), max(everything)
    alike = next((i for i, (left, right) in enumerate(zip(first, last, strict=False)) if left != right), len(first))
    start = first[: first.rfind(".", 0, alike) + 1]
    width = max(map(len, tensors))
    lines = (
        f"{part:{width}}  {', '.join(name.removeprefix(start) for name in names)}" for part, names in tensors.items()
    )
    return "\n".join([start, *lines])


def _group_layers(layout: MoELayout) -> dict[Kind, list[int]]:
    """The layers that are stored alike, by what they have in common."""
    kinds: dict[Kind, list[int]] = {}
    for layer in layout.layers:
        kinds.setdefault((_describe_storage(layer), layer.experts, layer.stored_bytes), []).append(layer.layer)
    return kinds


def _draw_kinds(kinds: dict[Kind, list[int]]) -> Grid:
    headings = ["Layers", "Experts", "Storage", "Bytes a layer"]
    rows = [
        [format_ranges(layers), str(experts), storage, format_bytes(layer_bytes)]
        for (storage, experts, layer_bytes), layers in kinds.items()
    ]
    return draw_table(headings, rows, dict.fromkeys(headings, WORDS))
