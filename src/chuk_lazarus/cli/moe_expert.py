"""The commands of `lazarus introspect moe-expert`: parse, call the service, show. Nothing is computed here."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import check_drawable, check_writable, print_hint, progress_bar, show, write

EXAMPLE = "\b\nExample:\n  lazarus introspect moe-expert moe-type-analyze -m demo:native"

if TYPE_CHECKING:
    from chuk_lazarus.introspection.moe import Cost

app = typer.Typer(
    help=f"Mixture-of-Experts checkpoints: how they were trained, and what can be saved.\n\n{EXAMPLE}",
    no_args_is_help=True,
    rich_markup_mode=None,
)

MODEL = (
    "a folder, a .safetensors or .gguf file, a Hub id (org/name or org/name@revision), "
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
Variance = Annotated[
    str,
    typer.Option(
        "--variance",
        metavar="SHARES",
        help="At which shares of the deltas' energy to take ranks.",
    ),
]
Thorough = Annotated[
    bool, typer.Option("--thorough", help="Match all neurons of all experts, not a sample; takes time and memory.")
]
Budget = Annotated[str, typer.Option("--budget", metavar="SIZE", help="With --quick: how much to read of the weights.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Write the JSON object to this file, too.", callback=check_writable),
]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        help="Write it as a page with figures and tables to this file, too.",
        callback=check_writable,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="FILE", help="Draw it to this file, too: .png, .svg or .pdf.", callback=check_drawable
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="About how much memory to use, such as 1GB; 2GB if not given.",
        callback=lambda context, text: limit_memory(context, text),
        show_default=False,
    ),
]
Dask = Annotated[
    str | None,
    typer.Option(
        "--dask",
        metavar="ADDRESS",
        help="Let the workers of this dask.distributed scheduler do it, such as tcp://host:8786.",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no hints.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say on stderr what it cost.")]


# What an analysis that is not quick is told.
NOT_QUICK = {"layer", "experts", "variance", "parent", "thorough", "html", "plot", "visualize"}

# What says where a result goes, and how.
WHERE_TO = {"html", "plot", "visualize", "memory", "dask", "as_json", "output", "quiet", "verbose"}

GateRank = Annotated[int | None, typer.Option("--gate-rank", min=0, help="The rank of the gate deltas.")]
UpRank = Annotated[int | None, typer.Option("--up-rank", min=0, help="The rank of the up deltas.")]
DownRank = Annotated[int | None, typer.Option("--down-rank", min=0, help="The rank of the down deltas.")]
Energy = Annotated[
    float, typer.Option("--energy", help="Choose each rank as the mean rank at this share of the deltas' energy.")
]
MaxError = Annotated[
    float | None,
    typer.Option("--max-error", help="Spread rank for this relative weight error of the experts, in the fewest bytes."),
]
TargetRatio = Annotated[
    float | None,
    typer.Option("--target-ratio", help="Spread rank for this ratio of bytes, with the least weight error."),
]

Folder = Annotated[Path, typer.Option("--folder", "-O", help="The folder to write.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace the folder if it is there.")]


@app.command("moe-layout", short_help="Show what is in a checkpoint, from its headers alone.")
def layout(
    model: Model,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            metavar="SPEC",
            help="Whose headers to read: 0,5,10 or 0-23/6 or all; the first and the last MoE layer's if not given.",
        ),
    ] = None,
    as_json: Json = False,
    output: Output = None,
    verbose: Verbose = False,
) -> None:
    """Show what is in a checkpoint: layout, storage format, layers, experts, shapes and bytes. No weight is read.

    \b
    Examples:
      lazarus introspect moe-expert moe-layout -m demo:upcycled
      lazarus introspect moe-expert moe-layout -m deepseek-ai/DeepSeek-V3
    """
    from chuk_lazarus.introspection.moe import MoELayoutService

    report = MoELayoutService.describe(model, layers=layers)
    show(report, as_json, output)
    hint_cost(report.cost, verbose)


@app.command("moe-type-analyze", short_help="Tell whether an MoE was upcycled or trained natively.")
def analyze(
    context: typer.Context,
    model: Model,
    layer: Layer = None,
    layers: Layers = None,
    experts: ExpertCount = "8",
    variance: Variance = "0.90,0.95,0.99",
    parent: Annotated[
        str | None,
        typer.Option("--parent", help="A dense model: are the experts' neurons from it?", show_default=False),
    ] = None,
    thorough: Thorough = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A verdict from a part of some experts in three layers: megabytes, seconds.")
    ] = False,
    budget: Budget = "64MB",
    html: Html = None,
    plot: Plot = None,
    visualize: Annotated[
        bool, typer.Option("--visualize", help="Draw the first layer's decay curves and cosines in the terminal.")
    ] = False,
    memory: Memory = None,
    dask: Dask = None,
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say more: the cost, and the ranks of single experts.")
    ] = False,
) -> None:
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
    from chuk_lazarus.introspection.moe.views.terminal import LayerDrawing

    check_quick(context, quick)
    if quick:
        if dask:
            raise typer.BadParameter("a quick analysis needs no workers", param_hint="--dask")
        with progress_bar(quiet) as progress:
            found = MoETypeService.quick(model, layers=layers, budget=budget, progress=progress)
        show(found, as_json, output)
        hint_cost(found.cost, verbose)
        return
    refuse_memory_there(memory, dask)
    with progress_bar(quiet) as progress:
        report = MoETypeService.analyze(
            model,
            layer=layer,
            layers=layers,
            experts=parse_experts(experts),
            variance=parse_shares(variance),
            parent=parent,
            thorough=thorough,
            dask=dask,
            progress=progress,
        )
    if html:
        write(html, page.to_page(report, command_line(context)), "--html")
    if plot:
        plots.save(plots.plot_analysis(report, command_line(context)), plot)
    more = [*([report.details()] if verbose else []), *([LayerDrawing(report.layers[0])] if visualize else [])]
    show(report, as_json, output, more)
    hint_cost(report.cost, verbose)


@app.command("moe-type-compare")
def compare(
    context: typer.Context,
    model: Model,
    other: Annotated[str, typer.Option("--compare", "-c", help="The model to compare it with.", show_default=False)],
    layer: Layer = None,
    layers: Layers = None,
    experts: ExpertCount = "8",
    variance: Variance = "0.90,0.95,0.99",
    thorough: Thorough = False,
    html: Html = None,
    plot: Plot = None,
    memory: Memory = None,
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
    from chuk_lazarus.introspection.moe import MoETypeService, plots
    from chuk_lazarus.introspection.moe.views import page

    with progress_bar(quiet) as progress:
        report = MoETypeService.compare(
            model,
            other,
            layer=layer,
            layers=layers,
            experts=parse_experts(experts),
            variance=parse_shares(variance),
            thorough=thorough,
            progress=progress,
        )
    if html:
        write(html, page.to_page(report, command_line(context)), "--html")
    if plot:
        plots.save(plots.plot_comparison(report, command_line(context)), plot)
    show(report, as_json, output)
    for one in report.models:
        hint_cost(one.cost, verbose, f"{one.model}: ")


@app.command("moe-overlay-compute", short_help="Choose ranks for an overlay, and say what it keeps and takes.")
def compute(
    model: Model,
    layer: Layer = None,
    layers: Layers = None,
    gate_rank: GateRank = None,
    up_rank: UpRank = None,
    down_rank: DownRank = None,
    energy: Energy = 0.95,
    max_error: MaxError = None,
    target_ratio: TargetRatio = None,
    experts: ExpertCount = "all",
    memory: Memory = None,
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Choose ranks for an overlay (one base and a low-rank delta per expert), and say what it keeps and takes.

    Ranks are given, or chosen by the energy of the deltas, by error, or by size.

    \b
    Examples:
      lazarus introspect moe-expert moe-overlay-compute -m demo:upcycled
      lazarus introspect moe-expert moe-overlay-compute -m demo:upcycled --layers all --target-ratio 2
      lazarus introspect moe-expert moe-overlay-compute -m demo:upcycled --max-error 0.05
    """
    from chuk_lazarus.introspection.moe import MoECompressionService

    with progress_bar(quiet) as progress:
        report = MoECompressionService.compute(
            model,
            layer=layer,
            layers=layers,
            ranks=given_ranks(gate_rank, up_rank, down_rank),
            energy=energy,
            max_error=max_error,
            target_ratio=target_ratio,
            experts=parse_experts(experts),
            progress=progress,
        )
    show(report, as_json, output)
    hint_cost(report.cost, verbose)


@app.command("moe-overlay-verify", short_help="Rebuild experts from an overlay, and compare with the originals.")
def verify(
    model: Model,
    layer: Layer = None,
    layers: Layers = None,
    gate_rank: GateRank = None,
    up_rank: UpRank = None,
    down_rank: DownRank = None,
    energy: Energy = 0.95,
    max_error: MaxError = None,
    target_ratio: TargetRatio = None,
    experts: ExpertCount = "all",
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="The worst expert's relative output error that still passes.")
    ] = 0.05,
    inputs: Annotated[int, typer.Option("--inputs", min=1, help="On how many vectors to try the experts.")] = 256,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The seed of these vectors.")] = 0,
    memory: Memory = None,
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Rebuild the experts of a layer from base and factors as a file would hold them, and compare with the originals.

    Exits with 1 when the worst expert's output error is over the tolerance.

    \b
    Examples:
      lazarus introspect moe-expert moe-overlay-verify -m demo:upcycled
      lazarus introspect moe-expert moe-overlay-verify -m demo:upcycled --max-error 0.02 --tolerance 0.03
    """
    from chuk_lazarus.introspection.moe import MoECompressionService

    with progress_bar(quiet) as progress:
        report = MoECompressionService.verify(
            model,
            layer=layer,
            layers=layers,
            ranks=given_ranks(gate_rank, up_rank, down_rank),
            energy=energy,
            max_error=max_error,
            target_ratio=target_ratio,
            experts=parse_experts(experts),
            tolerance=tolerance,
            inputs=inputs,
            seed=seed,
            progress=progress,
        )
    show(report, as_json, output)
    hint_cost(report.cost, verbose)
    if not report.passed:
        raise typer.Exit(1)


@app.command("moe-overlay-estimate", short_help="Estimate an overlay of the whole model, and what pays instead.")
def estimate(
    context: typer.Context,
    model: Model,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="SPEC", help="Which layers to measure: 0,5,10 or 0-23/6 or all.")
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Without --layers: how many evenly spaced layers to measure.")
    ] = 3,
    gate_rank: GateRank = None,
    up_rank: UpRank = None,
    down_rank: DownRank = None,
    energy: Energy = 0.95,
    max_error: MaxError = None,
    target_ratio: TargetRatio = None,
    experts: ExpertCount = "8",
    plot: Plot = None,
    memory: Memory = None,
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Estimate an overlay of the whole model, beside plain quantisation and plain SVDs at the same bytes.

    Some layers are measured, the others interpolated.

    \b
    Examples:
      lazarus introspect moe-expert moe-overlay-estimate -m demo:upcycled
      lazarus introspect moe-expert moe-overlay-estimate -m allenai/OLMoE-1B-7B-0924 --samples 4
    """
    from chuk_lazarus.introspection.moe import MoECompressionService, plots

    with progress_bar(quiet) as progress:
        report = MoECompressionService.estimate(
            model,
            layers=layers,
            samples=samples,
            ranks=given_ranks(gate_rank, up_rank, down_rank),
            energy=energy,
            max_error=max_error,
            target_ratio=target_ratio,
            experts=parse_experts(experts),
            progress=progress,
        )
    if plot:
        plots.save(plots.plot_estimate(report, command_line(context)), plot)
    show(report, as_json, output)
    hint_cost(report.cost, verbose)


@app.command("moe-overlay-compress", short_help="Write a model with its experts as overlays.")
def compress(
    model: Model,
    folder: Folder,
    layers: Annotated[
        str, typer.Option("--layers", metavar="SPEC", help="Which layers to overlay: 0,5,10 or 0-23/6 or all.")
    ] = "all",
    gate_rank: GateRank = None,
    up_rank: UpRank = None,
    down_rank: DownRank = None,
    energy: Energy = 0.95,
    max_error: MaxError = None,
    target_ratio: TargetRatio = None,
    experts: ExpertCount = "all",
    force: Force = False,
    memory: Memory = None,
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a model with its experts as overlays (base and low-rank factors) into a new folder, a complete checkpoint.

    Killed at any moment, the same command goes on where it was.

    \b
    Examples:
      lazarus introspect moe-expert moe-overlay-compress -m demo:upcycled -O ./overlay
      lazarus introspect moe-expert moe-overlay-compress -m ./my-model -O ./overlay --target-ratio 3
    """
    from chuk_lazarus.introspection.moe import MoECompressionService

    with progress_bar(quiet) as progress:
        report = MoECompressionService.compress(
            model,
            folder,
            layers=layers,
            ranks=given_ranks(gate_rank, up_rank, down_rank),
            energy=energy,
            max_error=max_error,
            target_ratio=target_ratio,
            experts=parse_experts(experts),
            force=force,
            progress=progress,
        )
    show(report, as_json, output)
    hint_cost(report.cost, verbose)


@app.command("moe-overlay-export", short_help="Rebuild a standard checkpoint from an overlay.")
def export(
    overlay: Annotated[Path, typer.Argument(help="The folder of an overlay checkpoint.", show_default=False)],
    folder: Folder,
    force: Force = False,
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Rebuild a standard checkpoint of the original family, in bfloat16, from an overlay.

    \b
    Example:
      lazarus introspect moe-expert moe-overlay-export ./overlay -O ./rebuilt
    """
    from chuk_lazarus.introspection.moe import MoECompressionService

    with progress_bar(quiet) as progress:
        report = MoECompressionService.export(overlay, folder, force=force, progress=progress)
    show(report, as_json, output)


@app.command("moe-overlay-eval", short_help="Run a model and its overlay on a text, side by side.")
def evaluate(
    model: Model,
    overlay: Annotated[Path, typer.Option("--overlay", help="The folder of its overlay.", show_default=False)],
    text: Annotated[Path, typer.Option("--text", help="A text file in UTF-8.", show_default=False)],
    context: Annotated[int, typer.Option("--context", min=1, help="The length of the windows, in tokens.")] = 512,
    tokens: Annotated[int | None, typer.Option("--tokens", min=2, help="How many tokens of the text at most.")] = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Run a model and its overlay in MLX on the same text: loss, perplexity, speed and memory of both.

    \b
    Example:
      lazarus introspect moe-expert moe-overlay-eval -m demo:upcycled --overlay ./overlay --text README.md
    """
    from chuk_lazarus.introspection.moe import MoECompressionService

    show(
        MoECompressionService.evaluate(model, overlay, text, context=context, tokens=tokens),
        as_json,
        output,
    )


@app.command("moe-type-survey", short_help="Analyse many models into one table, and go on where it was interrupted.")
def survey(
    context: typer.Context,
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
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say more: a line for each model as it ends, and figures by type.")
    ] = False,
) -> None:
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
        if options_given(context) - {"models", "plan", "as_json", "quiet", "verbose"}:
            raise typer.BadParameter("it goes with --json only", param_hint="--plan")
        show(MoESurveyService.plan(models), as_json, None)
        return
    check_quick(context, quick)
    refuse_memory_there(memory, dask)
    with progress_bar(quiet) as progress:
        report = MoESurveyService.survey(
            models,
            layer=layer,
            layers=layers,
            experts=parse_experts(experts),
            budget=budget if quick else None,
            jobs=jobs,
            dask=dask,
            file=output,
            progress=progress,
            finished=(lambda row: print_hint(row.describe())) if verbose else None,
        )
    show(report, as_json, None, [report.summary()] if verbose else [])
    if any(row.error for row in report.rows):
        raise typer.Exit(1)


def options_given(context: typer.Context) -> set[str]:
    """The names of the parameters that stand on the command line."""
    sources = {str(option.name): context.get_parameter_source(str(option.name)) for option in context.command.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def check_quick(context: typer.Context, quick: bool) -> None:
    """Refuse what a quick analysis has no use for, and what only a quick one has."""
    given = options_given(context)
    if quick and given & NOT_QUICK:
        raise typer.BadParameter("it goes with --layers and --budget only", param_hint="--quick")
    if not quick and "budget" in given:
        raise typer.BadParameter("it goes with --quick only", param_hint="--budget")


def command_line(context: typer.Context) -> str:
    """The command that gives such a result, without the options that say where it goes."""
    words, given = context.command_path.split(), options_given(context)
    for option in context.command.params:
        name = str(option.name)
        if name in given - WHERE_TO:
            value = context.params[name]
            words += [option.opts[-1], *([] if value is True else [str(value)])]
    return shlex.join(words)


def limit_memory(context: typer.Context, size: str | None) -> str | None:
    """Keep to a limit while the command runs."""
    if size:
        from chuk_lazarus.introspection.moe import memory_limit

        context.with_resource(memory_limit(size))
    return size


def refuse_memory_there(memory: str | None, dask: str | None) -> None:
    """A limit here is none for workers elsewhere."""
    if memory and dask:
        raise typer.BadParameter("each worker keeps to the limit it was started with", param_hint="--memory")


def hint_cost(cost: "Cost", verbose: bool, prefix: str = "") -> None:
    """Say what it cost, if asked to."""
    if verbose:
        print_hint(prefix + cost.describe())


def given_ranks(gate: int | None, up: int | None, down: int | None) -> dict[str, int]:
    """The ranks that were given, by role."""
    return {role: rank for role, rank in (("gate", gate), ("up", up), ("down", down)) if rank is not None}


def parse_layer(text: str) -> int:
    """The number of a layer."""
    if not re.fullmatch(r"-?\d{1,9}", text):
        raise typer.BadParameter(f"{text!r} is not the number of a layer")
    return int(text)


def parse_shares(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers such as 0.9,0.99", param_hint="--variance") from None


def parse_experts(text: str) -> int | None:
    """A number of experts, or None for "all"."""
    if text == "all":
        return None
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither a number of experts from 1 on nor 'all'", param_hint="--experts")
    return int(text)
