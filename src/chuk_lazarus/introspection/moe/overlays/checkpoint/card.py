"""The model card of an overlay."""

import re
from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Any

from ...errors import printable
from ...reports import LayerVerification
from ...text import format_ranges
from ...weights.expert_layer import ExpertLayer

CARD = "README.md"


def write_card(facts: Mapping[str, Any], layers: Sequence[ExpertLayer], before: int, after: int, text: str) -> str:
    """The card in Markdown: where the experts came from, their ranks, and the bytes before and after."""
    source = printable(facts["source"])
    shown = _code_span(source)
    ranks = {
        number: " ".join(f"{role} {rank}" for role, rank in own.items()) for number, own in facts["layers"].items()
    }
    by_ranks: dict[str, list[int]] = {}
    for number, own in ranks.items():
        by_ranks.setdefault(own, []).append(int(number))
    first, own = next(iter(facts["layers"].items()))
    options = " ".join(f"--{role}-rank {rank}" for role, rank in own.items())
    lines = [
        f"# Overlay of {shown}",
        "",
        "The routed experts of this model are stored as one base and low-rank factors: expert = base + left @ right.",
        "Everything else is a copy, byte for byte. Loaders that do not know `overlay_config` find no experts here:",
        "export the folder to a standard checkpoint for them.",
        "",
        f"- source: {shown}" + (f", revision {facts['revision']}" if facts["revision"] else ""),
        *(
            f"- ranks of layer{'s' if len(numbers) > 1 else ''} {format_ranges(numbers)}: {own}"
            for own, numbers in by_ranks.items()
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
    """A line as Markdown that shows it as it is: no link, picture or HTML in it is one."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def card_table(layers: Sequence[LayerVerification]) -> str:
    """Markdown for the model card."""
    rows = [
        f"| {one.layer} | {100 * one.output_error.mean:.1f} % | {100 * one.output_error.max:.1f} % |" for one in layers
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
