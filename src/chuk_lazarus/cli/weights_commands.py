"""Commands about a model's weights beside those of another: parse, call the service, return its report."""

from typing import Annotated

import typer

from .command import JSON, MEMORY, OUTPUT, QUIET, VERBOSE, Result, Run, command
from .options import MODEL, Caption, Html, Plot, check_caption, parse_experts
from .output import write
from .positional import Positional

FAILED = 1  # the exit code where a check failed


@command(MEMORY, JSON, OUTPUT, QUIET, VERBOSE)
def verify(
    run: Run,
    model: Annotated[
        str,
        typer.Option("--model", "-m", metavar="MODEL", help="Another way to give MODEL.", show_default=False),
        Positional("MODEL", f"The converted model: {MODEL}."),
    ],
    against: Annotated[
        str,
        typer.Option("--against", "-a", metavar="ORIGINAL", help="Another way to give ORIGINAL.", show_default=False),
        Positional("ORIGINAL", "The model that it was converted from."),
    ],
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            metavar="SPEC",
            help="Layers to compare: 0,5,10 or 0-23/6, or all with all experts. Default: three.",
        ),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option("--experts", metavar="N|all", help="How many experts of each layer to compare. Default: up to 8."),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            metavar="FACTOR",
            help="Allow an expert this many times the error that its format should cost.",
        ),
    ] = 2.5,
    html: Html = None,
    plot: Plot = None,
    caption: Caption = False,
) -> Result:
    """Check that a converted model still has the experts of the original, and name what is wrong.

    It compares the relative error of each expert with the error that its storage format should cost. Faults are named:
    experts left unquantised, missing, empty, all the same, in another order, gate and up exchanged, and so on. By
    default a sample is read. The exit code is 1 if there is a fault.

    \b
    Examples:
      lazarus introspect moe-expert moe-weights-verify -m ./my-model-4bit --against ./my-model
      lazarus introspect moe-expert moe-weights-verify -m org/OLMoE-1B-7B-0924-4bit -a allenai/OLMoE-1B-7B-0924
      lazarus introspect moe-expert moe-weights-verify -m model.Q4_K_M.gguf -a ./my-model --layers all --html page.html
    """
    from chuk_lazarus.introspection.moe import MoEWeightsService, plots
    from chuk_lazarus.introspection.moe.views import page

    check_caption(plot, caption)
    wanted = None if experts is None else parse_experts(experts)
    report = MoEWeightsService.verify(
        model,
        against,
        layers=layers,
        experts="all" if experts == "all" else wanted,
        tolerance=tolerance,
        progress=run.progress,
    )
    if html:
        write(html, page.to_page(report, run.command_line), "--html")
    if plot:
        plots.save(plots.plot_verification(report, run.command_line, caption=caption), plot)
    return Result(report, hints=[report.cost.describe()], exit_code=0 if report.passed else FAILED)
