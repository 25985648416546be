"""`lazarus introspect moe-expert`: its commands, in the order in which the help lists them, and their short names."""

import re
from inspect import getdoc

import typer

from .command import Command
from .overlay_commands import compress, compute, estimate, evaluate, export, verify
from .type_commands import analyze, compare, layout, survey
from .weights_commands import verify as verify_weights

PATH = "lazarus introspect moe-expert"
EXAMPLE = f"\b\nExample:\n  {PATH} moe-type-analyze -m demo:native"

# name, short name, function, what it does
COMMANDS = (
    ("moe-layout", "layout", layout, "Show what is in a checkpoint, from its headers alone."),
    ("moe-type-analyze", "analyze", analyze, "Tell whether an MoE was upcycled or trained natively."),
    ("moe-type-compare", "compare", compare, "Analyse models in the same way, side by side."),
    ("moe-overlay-compute", "compute", compute, "Choose ranks for an overlay, and say what it keeps and takes."),
    ("moe-overlay-verify", "verify", verify, "Rebuild experts from an overlay, and compare with the originals."),
    ("moe-overlay-estimate", "estimate", estimate, "Estimate an overlay of the whole model, and what pays instead."),
    ("moe-overlay-compress", "shrink", compress, "Write a model with its experts as overlays."),
    ("moe-overlay-export", "export", export, "Rebuild a standard checkpoint from an overlay."),
    ("moe-overlay-eval", "eval", evaluate, "Run a model and its overlay on a text, side by side."),
    ("moe-weights-verify", "check", verify_weights, "Tell whether a converted model still has the original's experts."),
    ("moe-type-survey", "survey", survey, "Analyse many models into one table, and go on where it was interrupted."),
)

app = typer.Typer(
    help=f"Mixture-of-Experts checkpoints: how they were trained, and what can be saved.\n\n{EXAMPLE}",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def add_short_names(parent: typer.Typer) -> None:
    """Let the commands also stand under their short names, with examples that have these."""
    for name, short, run, short_help in COMMANDS:
        text = (getdoc(run) or "").replace(f"{PATH} {name}", f"lazarus {short}")
        text = re.sub(" (-[mca]|--against) ", " ", text)
        parent.command(short, cls=Command, short_help=short_help, help=text)(run)


for name, _, run, short_help in COMMANDS:
    app.command(name, cls=Command, short_help=short_help)(run)
