"""`lazarus introspect moe-expert`: its commands, in the order in which the help lists them."""

import typer

from .overlay_commands import compress, compute, estimate, evaluate, export, verify
from .type_commands import analyze, compare, layout, survey
from .weights_commands import verify as verify_weights

EXAMPLE = "\b\nExample:\n  lazarus introspect moe-expert moe-type-analyze -m demo:native"

app = typer.Typer(
    help=f"Mixture-of-Experts checkpoints: how they were trained, and what can be saved.\n\n{EXAMPLE}",
    no_args_is_help=True,
    rich_markup_mode=None,
)

for name, run, short_help in (
    ("moe-layout", layout, "Show what is in a checkpoint, from its headers alone."),
    ("moe-type-analyze", analyze, "Tell whether an MoE was upcycled or trained natively."),
    ("moe-type-compare", compare, None),
    ("moe-overlay-compute", compute, "Choose ranks for an overlay, and say what it keeps and takes."),
    ("moe-overlay-verify", verify, "Rebuild experts from an overlay, and compare with the originals."),
    ("moe-overlay-estimate", estimate, "Estimate an overlay of the whole model, and what pays instead."),
    ("moe-overlay-compress", compress, "Write a model with its experts as overlays."),
    ("moe-overlay-export", export, "Rebuild a standard checkpoint from an overlay."),
    ("moe-overlay-eval", evaluate, "Run a model and its overlay on a text, side by side."),
    ("moe-weights-verify", verify_weights, "Tell whether a converted model still has the original's experts."),
    ("moe-type-survey", survey, "Analyse many models into one table, and go on where it was interrupted."),
):
    app.command(name, short_help=short_help)(run)
