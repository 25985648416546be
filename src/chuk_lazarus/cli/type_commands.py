"""Commands about what is in a checkpoint and how it was trained: parse, call the service, return its report."""

from collections.abc import Sequence, Set
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    parse_path,
    parse_shares,
)
from .output import check_writable, format_json, print_hint, write
from .positional import Positional

if TYPE_CHECKING:
    from chuk_lazarus.introspection.moe import MoELayout, MoEQuickAnalysis, MoESurveyPlan, MoETypeSurvey

ShowMore = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Show more: the rank of each expert, an older rule's verdict, time and memory used."
    ),
]

# options that a quick analysis has no use for
NOT_QUICK = {"layer", "experts", "variance", "parent", "thorough", "html", "plot", "caption", "visualize"}

# options that a plan has a use for
OF_A_PLAN = {"models", "plan", "layer", "layers", "experts", "quick", "budget"}
OF_A_PLAN |= {"table_format", "as_json", "quiet", "verbose"}


class TableFormat(StrEnum):
    """How the rows of many models are printed."""

    CSV = "csv"
    MARKDOWN = "markdown"
    JSON = "json"


@command(JSON, OUTPUT, QUIET, VERBOSE)
def layout(
    run: Run,
    model: Model,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            metavar="SPEC",
            help="Layers whose headers to read: 0,5,10 or 0-23/6 or all. Default: the first and the last.",
        ),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit", metavar="SIZE", help="Tell whether it fits into this much memory, such as 24GB, and at what error."
        ),
    ] = None,
    context: Annotated[
        int,
        typer.Option("--context", min=1, help="With --fit: the context length, in tokens, to keep cache memory for."),
    ] = 8192,
    rest_bits: RestBits = "8",
) -> "MoELayout":
    """Show what is in a checkpoint: layout, storage format, layers, experts, shapes and bytes. Reads headers only.

    With --fit, it also estimates how many bits per weight fit into a size, the error, and which Mac has enough memory.

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
            help="A dense model. Tell whether this one was made from it, layer by layer.",
            show_default=False,
        ),
    ] = None,
    thorough: Thorough = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Decide from small parts of three layers: reads megabytes, takes seconds.")
    ] = False,
    budget: Budget = "64MB",
    html: Html = None,
    plot: Plot = None,
    caption: Caption = False,
    visualize: Annotated[
        bool, typer.Option("--visualize", help="Draw the first layer's spectra and cosines in the terminal.")
    ] = False,
    memory: Memory = None,
    dask: Dask = None,
    verbose: ShowMore = False,
) -> "MoEQuickAnalysis | Result":
    """Tell whether an MoE was upcycled from a dense model or trained natively.

    By default it reads the experts of the first MoE layer and parts of two more layers, from disk or from the Hub.

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


@command(MEMORY, JSON, OUTPUT, QUIET)
def compare(
    run: Run,
    model: Model,
    others: Annotated[
        list[str],
        typer.Option(
            "--compare",
            "-c",
            metavar="OTHER",
            help="Another way to give OTHER; repeat it for each model.",
            show_default=False,
        ),
        Positional("OTHER", "One or more models to compare it with."),
    ],
    layer: Layer = None,
    layers: Layers = None,
    experts: ExpertCount = "8",
    variance: Variance = "0.90,0.95,0.99",
    thorough: Thorough = False,
    html: Html = None,
    plot: Plot = None,
    caption: Caption = False,
    verbose: ShowMore = False,
) -> Result:
    """Analyse two or more models and show them side by side.

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
    more = [report.details()] if verbose else []
    return Result(report, more, [f"{analysis.model}: {analysis.cost.describe()}" for analysis in report.models])


@command(JSON, QUIET)
def survey(
    run: Run,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL|FILE...",
            help="Models, folders of models (such as the Hub's cache), or lists of models: a .txt file with one model "
            "per line, optionally followed by parent=ID, layers=SPEC or experts=N; a .toml file with [[model]] tables; "
            "- for lines from stdin.",
            show_default=False,
        ),
    ],
    layer: Layer = None,
    layers: Layers = None,
    experts: ExpertCount = "8",
    quick: Annotated[
        bool, typer.Option("--quick", help="Decide from small parts of three layers of each model.")
    ] = False,
    budget: Budget = "64MB",
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="How many models to analyse at once. They share the memory limit.")
    ] = 1,
    memory: Memory = None,
    dask: Dask = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.jsonl",
            help="Append one line of JSON per finished model to this file. Models already in it are skipped.",
            callback=check_writable,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FOLDER",
            parser=parse_path,
            help="Also write web pages to this folder: index.html for all models, and one page per model.",
            show_default=False,
        ),
    ] = None,
    table_format: Annotated[
        TableFormat | None,
        typer.Option("--format", help="Print the rows in this format. json is the same as --json.", show_default=False),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Only estimate how much would be read and how long it would take. Reads headers only."
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show more: a line as each model finishes, and figures by type.")
    ] = False,
) -> Result:
    """Analyse many models, one row each. A model that can't be analysed gets a row that says why.

    The exit code is 1 if any model failed.

    \b
    Examples:
      lazarus introspect moe-expert moe-type-survey demo:upcycled demo:native
      lazarus introspect moe-expert moe-type-survey models.txt -o survey.jsonl --jobs 2
      lazarus introspect moe-expert moe-type-survey models.txt --quick -o quick.jsonl
      lazarus introspect moe-expert moe-type-survey models.txt -o survey.jsonl --html pages
      lazarus introspect moe-expert moe-type-survey ~/.cache/huggingface/hub --quick --format markdown
      lazarus introspect moe-expert moe-type-survey experiments/known_models/models.toml --plan
    """
    from chuk_lazarus.introspection.moe import MoESurveyService

    if "as_json" in run.given and table_format:
        raise typer.BadParameter("give it or --json", param_hint="--format")
    _check_quick(run, quick, NOT_QUICK - {"html"})
    if plan:
        if run.given - OF_A_PLAN:
            raise typer.BadParameter(
                "it goes with --layer, --layers, --experts, --quick, --budget, --format and --json only",
                param_hint="--plan",
            )
        planned = MoESurveyService.plan(
            models,
            layer=layer,
            layers=layers,
            experts=parse_experts(experts),
            budget=budget if quick else None,
            progress=run.progress,
        )
        return _show_rows(planned, table_format, is_partial=any(model.error for model in planned.models))
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
        html=html,
        command=run.command_line,
        progress=run.progress,
        finished=(lambda row: print_hint(row.describe())) if verbose else None,
    )
    more = [report.summary()] if verbose else []
    return _show_rows(report, table_format, more, is_partial=any(row.error for row in report.rows))


def _show_rows(
    report: "MoETypeSurvey | MoESurveyPlan",
    table_format: TableFormat | None,
    more: Sequence[Any] = (),
    *,
    is_partial: bool,
) -> Result:
    """The rows of many models in the format that is asked for."""
    text: str | None = None
    if table_format == TableFormat.CSV:
        text = report.to_csv()
    elif table_format == TableFormat.MARKDOWN:
        text = report.to_markdown()
    elif table_format == TableFormat.JSON:
        text = format_json(report.model_dump(mode="json")) + "\n"
    return Result(report, more, exit_code=1 if is_partial else 0, text=text)


def _check_quick(run: Run, quick: bool, not_quick: Set[str] = frozenset(NOT_QUICK)) -> None:
    """Refuse what a quick analysis has no use for, and what only a quick one has."""
    if quick and run.given & not_quick:
        raise typer.BadParameter("it goes with --layers and --budget only", param_hint="--quick")
    if not quick and "budget" in run.given:
        raise typer.BadParameter("it goes with --quick only", param_hint="--budget")


def _refuse_memory_of_workers(memory: str | None, dask: str | None) -> None:
    """A limit here is none for workers elsewhere."""
    if memory and dask:
        raise typer.BadParameter("each worker keeps to the limit it was started with", param_hint="--memory")
