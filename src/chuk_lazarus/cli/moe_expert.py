"""The commands of `lazarus introspect moe-expert`: parse, call the service, show. Nothing is computed here."""

import re
from pathlib import Path
from typing import Annotated

import typer

from .output import check_writable, print_hint, progress_bar, show

EXAMPLE = "\b\nExample:\n  lazarus introspect moe-expert moe-type-analyze -m demo:native"

app = typer.Typer(
    help=f"Mixture-of-Experts checkpoints: how they were trained, and what can be saved.\n\n{EXAMPLE}",
    no_args_is_help=True,
    rich_markup_mode=None,
)

MODEL = (
    "a folder, a .safetensors file, a Hub id (org/name or org/name@revision), "
    "or demo:upcycled, demo:native, demo:permuted"
)

Model = Annotated[str, typer.Option("--model", "-m", help=f"The model: {MODEL}.", show_default=False)]
Layer = Annotated[
    int | None,
    typer.Option(
        "--layer",
        metavar="N",
        parser=lambda text: parse_layer(text),
        help="The layer to analyse; the first MoE layer if not given.",
    ),
]
Layers = Annotated[
    str | None, typer.Option("--layers", metavar="SPEC", help="Several layers: 0,5,10 or 0-23/6 or all.")
]
ExpertCount = Annotated[
    str,
    typer.Option(
        "--experts", metavar="N|all", help="Of how many experts to take spectra; base and cosines always use all."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Write the JSON object to this file, too.", callback=check_writable),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no hints.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say on stderr what it cost.")]


@app.command("moe-type-analyze", short_help="Tell whether an MoE was upcycled or trained natively.")
def analyze(
    model: Model,
    layer: Layer = None,
    layers: Layers = None,
    experts: ExpertCount = "8",
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Tell how an MoE was trained: upcycled from a dense model, or natively.

    Only the header and the wanted layer's experts are read, from disk or over the network.

    \b
    Examples:
      lazarus introspect moe-expert moe-type-analyze -m demo:upcycled
      lazarus introspect moe-expert moe-type-analyze -m allenai/OLMoE-1B-7B-0924 --layers 0,5,10,15
      lazarus introspect moe-expert moe-type-analyze -m ./my-model --experts all --json -o results.json
    """
    from chuk_lazarus.introspection.moe import MoETypeService

    with progress_bar(quiet) as progress:
        report = MoETypeService.analyze(
            model, layer=layer, layers=layers, experts=parse_experts(experts), progress=progress
        )
    show(report, as_json, output)
    if verbose:
        print_hint(report.cost.describe())


@app.command("moe-type-compare")
def compare(
    model: Model,
    other: Annotated[str, typer.Option("--compare", "-c", help="The model to compare it with.", show_default=False)],
    layer: Layer = None,
    layers: Layers = None,
    experts: ExpertCount = "8",
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Analyse two models in the same way, side by side.

    \b
    Examples:
      lazarus introspect moe-expert moe-type-compare -m demo:upcycled -c demo:native
      lazarus introspect moe-expert moe-type-compare -m openai/gpt-oss-20b -c allenai/OLMoE-1B-7B-0924
    """
    from chuk_lazarus.introspection.moe import MoETypeService

    with progress_bar(quiet) as progress:
        report = MoETypeService.compare(
            model, other, layer=layer, layers=layers, experts=parse_experts(experts), progress=progress
        )
    show(report, as_json, output)
    if verbose:
        for one in report.models:
            print_hint(f"{one.model}: {one.cost.describe()}")


def parse_layer(text: str) -> int:
    """The number of a layer."""
    if not re.fullmatch(r"-?\d{1,9}", text):
        raise typer.BadParameter(f"{text!r} is not the number of a layer")
    return int(text)


def parse_experts(text: str) -> int | None:
    """A number of experts, or None for "all"."""
    if text == "all":
        return None
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither a number of experts from 1 on nor 'all'", param_hint="--experts")
    return int(text)
