"""What somebody may want next, as a command to paste: printed on stderr below a result."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chuk_lazarus.introspection.moe.files import has_tokenizer

if TYPE_CHECKING:
    from chuk_lazarus.introspection.moe import MoEOverlayCompression, MoEOverlayEstimate

PROGRAM = "lazarus"
PROMPT = "The history of "
RULES = ("bits", "fit", "as_good_as", "max_error", "target_ratio", "coded", "trellis", "energy", "rest_bits")


def next_steps(report: Any, command: str, parameters: dict[str, Any]) -> list[str]:
    """A line for each step: what it does, and the command.

    `command` is the name of the function that gave the report, `parameters` are the options that the user gave it.
    """
    match command:
        case "layout":
            return [_step("see how it was trained", "analyze", report.model)]
        case "analyze":
            return [_step("see what can be saved", "estimate", report.model)]
        case "estimate":
            return _after_estimate(report, parameters)
        case "compute" | "verify":
            rule = _options(parameters)
            return [_step("write it", "shrink", report.model, *rule, "-O", "./smaller")] if rule else []
        case "compress":
            return _after_compression(report)
        case _:
            return []


def _after_estimate(report: "MoEOverlayEstimate", parameters: dict[str, Any]) -> list[str]:
    """The command that writes what was estimated; without a rule of the user's, as good as 4 bits, where that pays."""
    rule = _options(parameters)
    if not rule:
        if report.advice.startswith("nothing"):
            return []
        rule = ["--as-good-as", "4"]
    return [_step("write it", "shrink", report.model, *rule, "-O", "./smaller")]


def _after_compression(report: "MoEOverlayCompression") -> list[str]:
    """How to run what was written, if it has a tokenizer, and how to see what it costs, on a text that is there."""
    words = ["mlx_lm.generate", "--model", report.folder]
    if report.format == "overlay":
        words.append("--trust-remote-code")
    run = [f"Next, run it: {shlex.join([*words, '--prompt', PROMPT])}"] if has_tokenizer(Path(report.folder)) else []
    text = str(Path(report.folder, "README.md"))
    return [*run, _step("see what it costs, on any text", "eval", report.model, report.folder, "--text", text)]


def _options(parameters: dict[str, Any]) -> list[str]:
    """The rule among the options that were given, as words of a command."""
    words: list[str] = []
    for name in RULES:
        if name in parameters:
            option = f"--{name.replace('_', '-')}"
            value = parameters[name]
            words += [option] if value is True else [option, f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def _step(what: str, command: str, model: str, *words: str) -> str:
    return f"Next, {what}: {PROGRAM} {shlex.join([command, model, *words])}"
