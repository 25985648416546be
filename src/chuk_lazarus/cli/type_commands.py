"""Commands about what is in a checkpoint and how it was trained: parse, call the service, return its report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command import JSON, MEMORY, OUTPUT, QUIET, VERBOSE, Result, Run, command
from .options import (
    Budget,
    Caption,
    Dask,
    ExpertCount,
    Html,
    Layer,
    Layers,
    Memory,
    Model,
    Plot,
    RestBits,
    Thorough,
    Variance,
    check_caption,
    parse_experts,
    parse_shares,
)
from .output import check_writable, print_hint, write
from .positional import Positional

if TYPE_CHECKING:
    from chuk_lazarus.introspection.moe import MoELayout, MoEQuickAnalysis, MoESurveyPlan

# options that a quick analysis has no use for
NOT_QUICK = {"layer", "experts", "variance", "parent", "thorough", "html", "plot", "caption", "visualize"}


@command(JSON, OUTPUT, VERBOSE)
def layout(
    run: Run,
    model: Model,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            metavar="SPEC",
            help="Whose headers to read: 0,5,10 or 0-23/6 or all; the first and the last MoE layer's if not given.",
        ),
    ] = None,
    fit: Annotated[
        str | None, typer.Option("--fit", metavar="SIZE", help="Does it fit into 24GB, and what would that cost?")
    ] = None,
    context: Annotated[int, typer.Option("--context", min=1, help="With --fit: tokens that the cache holds.")] = 8192,
    rest_bits: RestBits = "8",
) -> "MoELayout":
    """Show what is in a checkpoint: layout, storage format, layers, experts, shapes and bytes. No weight is read.

    With --fit, too, whether it fits, in how many bits a weight of its experts, with which error and on which machine.

    \b
    Examples:
      lazarus introspect moe-expert moe-layout -m demo:upcycled
      lazarus introspect moe-expert moe-layout -m deepseek-ai/DeepSeek-V3
      lazarus introspect moe-expert moe-layout -m Qwen/Qwen3-30B-A3B --fit 16GB
    """
    from chuk_lazarus.introspection.moe import MoELayoutService

    return MoELayoutService.describe(model, layers=layers, fit=fit, context=context, rest_bits=rest_bits)


@command(JSON, OUTPUT, QUIET)
def analyze(
    run: Run,
    model: Model,
    layer: Layer = None,
    layers: Layers = None,
    experts: ExpertCount = "8",
    variance: Variance = "0.90,0.95,0.99",
    parent: Annotated[
        str | None,
        typer.Option(
            "--parent",
            help="A dense model: does this one come from it, and which layers from which?",
            show_default=False,
        ),
    ] = None,
    thorough: Thorough = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A verdict from a part of some experts in three layers: megabytes, seconds.")
    ] = False,
    budget: Budget = "64MB",
    html: Html = None,
    plot: Plot = None,
    caption: Caption = False,
    visualize: Annotated[
        bool, typer.Option("--visualize", help="Draw the first layer's decay curves and cosines in the terminal.")
    ] = False,
    memory: Memory = None,
    dask: Dask = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say more: the cost, and the ranks of single experts.")
    ] = False,
) -> "MoEQuickAnalysis | Result":
    """Tell how an MoE was trained: upcycled from a dense model, or natively.

    Only the header and the wanted layer's experts are read, from disk or over the network.

    \b
    Examples:
      lazarus introspect moe-expert moe-type-analyze -m demo:upcycled
      lazarus introspect moe-expert moe-type-analyze -m allenai/OLMoE-1B-7B-0924 --layers 0,5,10,15
      lazarus introspect moe-expert moe-type-analyze -m deepseek-ai/DeepSeek-V3 --quick
      lazarus introspect moe-expert moe-type-analyze -m ./my-model --experts all --json -o results.json
      lazarus introspect moe-expert moe-type-analyze -m demo:upcycled --layers all --html page.html --plot figure.pdf
      lazarus introspect moe-expert moe-type-analyze -m deepseek-ai/DeepSeek-V3 --layers all --dask tcp://head:8786
    """
    from chuk_lazarus.introspection.moe import MoETypeService, plots
    from chuk_lazarus.introspection.moe.views import page

    check_caption(plot, caption)
    _check_quick(run, quick)
    if quick:
        if dask:
            raise typer.BadParameter("a quick analysis needs no workers", param_hint="--dask")
        return MoETypeService.quick(model, layers=layers, budget=budget, progress=run.progress)
    _refuse_memory_of_workers(memory, dask)
    report = MoETypeService.analyze(
        model,
        layer=layer,
        layers=layers,
        experts=parse_experts(experts),
        variance=parse_shares(variance),
        parent=parent,
        thorough=thorough,
        dask=dask,
        progress=run.progress,
    )
    if html:
        write(html, page.to_page(report, run.command_line), "--html")
    if plot:
        plots.save(plots.plot_analysis(report, run.command_line, caption=caption), plot)
    more = [report.details()] if verbose else []
    if visualize:
        from chuk_lazarus.introspection.moe.views.terminal import LayerDrawing

        more.append(LayerDrawing(report.layers[0]))
    return Result(report, more, [report.cost.describe()])


@command(MEMORY, JSON, OUTPUT, QUIET, VERBOSE)
def compare(
    run: Run,
    model: Model,
    others: Annotated[
        list[str],
        typer.Option(
            "--compare", "-c", metavar="OTHER", help="The same, by name; once for each model.", show_default=False
        ),
        Positional("OTHER", "The models to compare it with."),
    ],
    layer: Layer = None,
    layers: Layers = None,
    experts: ExpertCount = "8",
    variance: Variance = "0.90,0.95,0.99",
    thorough: Thorough = False,
    html: Html = None,
    plot: Plot = None,
    caption: Caption = False,
) -> Result:
    """Analyse two or more models in the same way, side by side.

    \b
    Examples:
      lazarus introspect moe-expert moe-type-compare -m demo:upcycled -c demo:native
      lazarus introspect moe-expert moe-type-compare -m openai/gpt-oss-20b -c allenai/OLMoE-1B-7B-0924
      lazarus introspect moe-expert moe-type-compare demo:upcycled demo:permuted demo:native --html page.html
    """
    from chuk_lazarus.introspection.moe import MoETypeService, plots
    from chuk_lazarus.introspection.moe.views import page

    check_caption(plot, caption)
    report = MoETypeService.compare(
        model,
        *others,
        layer=layer,
        layers=layers,
        experts=parse_experts(experts),
        variance=parse_shares(variance),
        thorough=thorough,
        progress=run.progress,
    )
    if html:
        write(html, page.to_page(report, run.command_line), "--html")
    if plot:
        plots.save(plots.plot_comparison(report, run.command_line, caption=caption), plot)
    return Result(report, hints=[f"{analysis.model}: {analysis.cost.describe()}" for analysis in report.models])


@command(JSON, QUIET)
def survey(
    run: Run,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL|FILE...",
            help="Models, and lists of models: .txt files with a model a line, where parent=ID, layers=SPEC and "
            "experts=N may follow, and .toml files with [[model]] tables.",
            show_default=False,
        ),
    ],
    layer: Layer = None,
    layers: Layers = None,
    experts: ExpertCount = "8",
    quick: Annotated[
        bool, typer.Option("--quick", help="A verdict from a part of some experts in three layers of each model.")
    ] = False,
    budget: Budget = "64MB",
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="How many models to analyse side by side; they share the memory.")
    ] = 1,
    memory: Memory = None,
    dask: Dask = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.jsonl",
            help="Append each model's row, a line of JSON, when it is done; models that it has an answer for are not "
            "analysed again.",
            callback=check_writable,
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what each model would cost, by the shapes in .toml lists.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say more: a line for each model as it ends, and figures by type.")
    ] = False,
) -> "MoESurveyPlan | Result":
    """Tell of many models how each was trained, a row each; one that can't be analysed is a row that says why.

    Exits with 1 where some model could not be analysed.

    \b
    Examples:
      lazarus introspect moe-expert moe-type-survey demo:upcycled demo:native
      lazarus introspect moe-expert moe-type-survey models.txt -o survey.jsonl --jobs 2
      lazarus introspect moe-expert moe-type-survey models.txt --quick -o quick.jsonl
      lazarus introspect moe-expert moe-type-survey experiments/known_models/models.toml --plan
    """
    from chuk_lazarus.introspection.moe import MoESurveyService

    if plan:
        if run.given - {"models", "plan", "as_json", "quiet", "verbose"}:
            raise typer.BadParameter("it goes with --json only", param_hint="--plan")
        return MoESurveyService.plan(models)
    _check_quick(run, quick)
    _refuse_memory_of_workers(memory, dask)
    report = MoESurveyService.survey(
        models,
        layer=layer,
        layers=layers,
        experts=parse_experts(experts),
        budget=budget if quick else None,
        jobs=jobs,
        dask=dask,
        file=output,
        progress=run.progress,
        finished=(lambda row: print_hint(row.describe())) if verbose else None,
    )
    is_partial = any(row.error for row in report.rows)
    return Result(report, [report.summary()] if verbose else [], exit_code=1 if is_partial else 0)


def _check_quick(run: Run, quick: bool) -> None:
    """Refuse what a quick analysis has no use for, and what only a quick one has."""
    if quick and run.given & NOT_QUICK:
        raise typer.BadParameter("it goes with --layers and --budget only", param_hint="--quick")
    if not quick and "budget" in run.given:
        raise typer.BadParameter("it goes with --quick only", param_hint="--budget")


def _refuse_memory_of_workers(memory: str | None, dask: str | None) -> None:
    """A limit here is none for workers elsewhere."""
    if memory and dask:
        raise typer.BadParameter("each worker keeps to the limit it was started with", param_hint="--memory")
