"""`lazarus introspect moe-expert`: its commands, in the order in which the help lists them, and their short names."""

import re
from inspect import getdoc

import typer

from .command import Command
from .overlay_commands import compress, compute, estimate, evaluate, export, verify
from .type_commands import analyze, compare, layout, survey
from .weights_commands import verify as verify_weights

PATH = "lazarus introspect moe-expert"
DOCUMENTATION = "Documentation: https://github.com/chrishayuk/chuk-mlx/tree/main/docs"
EXAMPLE = f"\b\nExample:\n  {PATH} moe-type-analyze -m demo:native"

# name, short name, function, what it does
COMMANDS = (
    ("moe-layout", "layout", layout, "Show what is in a checkpoint. Reads headers only."),
    ("moe-type-analyze", "analyze", analyze, "Tell whether an MoE was upcycled or trained natively."),
    ("moe-type-compare", "compare", compare, "Analyse models side by side."),
    ("moe-overlay-compute", "compute", compute, "Compute an overlay; report its error and size."),
    ("moe-overlay-verify", "verify", verify, "Rebuild experts from their overlay and compare."),
    ("moe-overlay-estimate", "estimate", estimate, "Estimate how small a model can be made."),
    ("moe-overlay-compress", "shrink", compress, "Write a smaller copy of a model."),
    ("moe-overlay-export", "export", export, "Write an overlay or a model for other programs."),
    ("moe-overlay-eval", "eval", evaluate, "Run a model and its smaller version on a text."),
    ("moe-weights-verify", "check", verify_weights, "Check a converted model against the original."),
    ("moe-type-survey", "survey", survey, "Analyse many models into one table; can be resumed."),
)

app = typer.Typer(
    help=f"Mixture-of-Experts checkpoints: how they were trained, and what can be saved.\n\n{EXAMPLE}",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=DOCUMENTATION,
)


def add_short_names(parent: typer.Typer) -> None:
    """Let the commands also stand under their short names, with examples that have these."""
    for name, short, run, short_help in COMMANDS:
        text = (getdoc(run) or "").replace(f"{PATH} {name}", f"lazarus {short}")
        text = re.sub(" (-[mca]|--against) ", " ", text)
        parent.command(short, cls=Command, short_help=short_help, help=text)(run)


for name, _, run, short_help in COMMANDS:
    app.command(name, cls=Command, short_help=short_help)(run)
