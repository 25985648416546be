"""The model card of an overlay."""

import re
from collections.abc import Sequence
from shlex import quote

from ...errors import printable
from ...reports import LayerVerification
from ...text import format_ranges
from ...weights.expert_layer import ExpertLayer
from .format import OverlayConfig

CARD = "README.md"


def write_card(overlay: OverlayConfig, layers: Sequence[ExpertLayer], before: int, after: int, text: str) -> str:
    """The card in Markdown: the experts' source and ranks, the model's bytes before and after, and further `text`."""
    source = printable(overlay.source)
    shown_source = _code_span(source)
    layers_by_ranks: dict[str, list[int]] = {}
    for layer, ranks in overlay.layers.items():
        listing = " ".join(f"{role} {rank}" for role, rank in ranks.items())
        layers_by_ranks.setdefault(listing, []).append(layer)
    first, ranks = next(iter(overlay.layers.items()))
    options = " ".join(f"--{role}-rank {rank}" for role, rank in ranks.items())
    lines = [
        f"# Overlay of {shown_source}",
        "",
        "The routed experts of this model are stored as one base and low-rank factors: expert = base + left @ right.",
        "Everything else is a copy, byte for byte. Loaders that do not know `overlay_config` find no experts here:",
        "export the folder to a standard checkpoint for them.",
        "",
        f"- source: {shown_source}" + (f", revision {overlay.revision}" if overlay.revision else ""),
        *(
            f"- ranks of layer{'s' if len(numbers) > 1 else ''} {format_ranges(numbers)}: {listing}"
            for listing, numbers in layers_by_ranks.items()
        ),
        f"- experts of these layers as they were: {sum(layer.stored_bytes for layer in layers):,} bytes",
        f"- the whole model: {before:,} bytes before, {after:,} after",
        "",
        "What an overlay of these ranks leaves of the source's experts is measured, layer by layer, by",
        "",
        f"    lazarus introspect moe-expert moe-overlay-verify -m {quote(source)} --layer {first} {options}",
    ]
    return "\n".join([*lines, *(["", text.strip()] if text.strip() else []), ""])


def _code_span(text: str) -> str:
    """A line as Markdown that shows it as it is: no link, picture or HTML in it takes effect."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def card_table(layers: Sequence[LayerVerification]) -> str:
    """The errors of the verified layers, in Markdown for the card."""
    rows = [
        f"| {layer.layer} | {100 * layer.output_error.mean:.1f} % | {100 * layer.output_error.max:.1f} % |"
        for layer in layers
    ]
    if not rows:
        return "Nothing was verified: the experts' activation is not known."
    return "\n".join(
        [
            "Relative error of the experts' outputs (whole expert function, seeded inputs, factors as stored):",
            "",
            "| layer | mean over experts | worst expert |",
            "|---|---|---|",
            *rows,
        ]
    )
