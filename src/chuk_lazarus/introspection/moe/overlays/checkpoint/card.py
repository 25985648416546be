"""The model card of an overlay."""

import re
from collections.abc import Mapping, Sequence
from shlex import quote

from ...errors import printable
from ...reports import LayerVerification
from ...text import format_ranges
from ...weights.expert_layer import ExpertLayer
from .format import OverlayConfig

CARD = "README.md"


def write_card(
    overlay: OverlayConfig, layers: Sequence[ExpertLayer], before: int, after: int, options: str, text: str
) -> str:
    """The card in Markdown: the experts' source and ranks, the model's bytes before and after, and further `text`.

    `options` are those of the command that verifies the overlay.
    """
    source = printable(overlay.source)
    shown_source = _code_span(source)
    layers_by_codes: dict[str, list[int]] = {}
    for layer, ranks in overlay.layers.items():
        listing = " ".join(f"{role} {rank}" for role, rank in ranks.items())
        layers_by_codes.setdefault(listing, []).append(layer)
    for layer, coded in overlay.coded.items():
        listing = ", ".join(
            f"{role} {of_role.delta}"
            + (f" on {of_role.base}" if of_role.base else "")
            + (f" and {of_role.rest}" if of_role.rest else "")
            for role, of_role in coded.codes.items()
        )
        layers_by_codes.setdefault(listing, []).append(layer)
    if any(coded.index for coded in overlay.coded.values()):
        what, kept = "codes", "shared neurons, deltas from these, and all other neurons, in few bits per weight."
    elif overlay.coded:
        what, kept = "codes", "one base and a delta per expert, all in few bits per weight: expert = base + delta."
    else:
        what, kept = "ranks", "one base and low-rank factors: expert = base + left @ right."
    lines = [
        f"# Overlay of {shown_source}",
        "",
        f"The routed experts of this model are stored as {kept}",
        "Everything else is a copy, byte for byte. Loaders that do not know `overlay_config` find no experts:",
        "for them, export the folder to a standard checkpoint. mlx-lm runs it as it is, with `--trust-remote-code`,",
        "if chuk-lazarus is installed.",
        "",
        f"- source: {shown_source}" + (f", revision {overlay.revision}" if overlay.revision else ""),
        *(
            f"- {what} of layer{'s' if len(numbers) > 1 else ''} {format_ranges(numbers)}: {listing}"
            for listing, numbers in layers_by_codes.items()
        ),
        f"- experts of these layers in the source: {sum(layer.stored_bytes for layer in layers):,} bytes",
        f"- the whole model: {before:,} bytes before, {after:,} after",
        "",
        f"To measure, layer by layer, how close an overlay of these {what} is to the source's experts, run",
        "",
        f"    lazarus introspect moe-expert moe-overlay-verify -m {quote(source)} {options}",
    ]
    return "\n".join([*lines, *(["", text.strip()] if text.strip() else []), ""])


def write_stock_card(source: str, widths: Mapping[str, Sequence[int]], rule: str, text: str) -> str:
    """The card, in Markdown, of a model that is quantised for mlx-lm: the layers of each listing of `widths`, the rule
    that chose them, and further `text`.
    """
    how = "`mlx_lm.generate --model FOLDER` runs it"
    return _write_width_card(f"{_code_span(source)} in MLX", how, "projection by projection", widths, rule, text)


def write_packed_card(source: str, widths: Mapping[str, Sequence[int]], rule: str, text: str) -> str:
    """As `write_stock_card`, of a model in the format of compressed-tensors."""
    how = "vLLM loads it, format compressed-tensors"
    return _write_width_card(f"{_code_span(source)} in packed integers", how, "layer by layer", widths, rule, text)


def _write_width_card(
    title: str, how: str, measured: str, widths: Mapping[str, Sequence[int]], rule: str, text: str
) -> str:
    lines = [
        f"# {title}",
        "",
        f"A plain quantised checkpoint: {how}. The routed experts have",
        f"the widths with the smallest error at this size, measured {measured} (bits:weights that share a scale).",
        "",
        f"- rule: {_code_span(printable(rule))}",
        *(
            f"- layer{'s' if len(numbers) > 1 else ''} {format_ranges(numbers)}: {listing}"
            for listing, numbers in widths.items()
        ),
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
            "Relative error of the experts' outputs (whole expert function, seeded inputs, "
            f"{'codes' if layers[0].codes else 'factors'} as stored):",
            "",
            "| layer | mean over experts | worst expert |",
            "|---|---|---|",
            *rows,
        ]
    )
