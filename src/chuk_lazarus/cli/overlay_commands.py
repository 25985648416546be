"""Commands about overlays, what can be saved: parse, call the service, return its report."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command import JSON, MEMORY, OUTPUT, QUIET, VERBOSE, OptionGroup, Result, Run, command
from .options import (
    Calibrate,
    Caption,
    ExpertCount,
    Folder,
    Force,
    Layer,
    Layers,
    Model,
    Plot,
    RestBits,
    check_caption,
    overlay_options,
    parse_experts,
    parse_path,
    width_options,
)
from .positional import Positional

if TYPE_CHECKING:
    from chuk_lazarus.introspection.moe import (
        MoEOverlay,
        MoEOverlayCompression,
        MoEOverlayEstimate,
        MoEOverlayEvaluation,
        MoEOverlayExport,
        OverlayOptions,
    )

Rule = Annotated["OverlayOptions", OptionGroup(overlay_options)]


class Format(StrEnum):
    """What a written folder is."""

    AUTO = "auto"
    OVERLAY = "overlay"
    MLX = "mlx"


class ExportFormat(StrEnum):
    """What an export writes."""

    STANDARD = "standard"
    MLX = "mlx"
    COMPRESSED_TENSORS = "compressed-tensors"
    GGUF_RECIPE = "gguf-recipe"


@command(MEMORY, JSON, OUTPUT, QUIET, VERBOSE)
def compute(
    run: Run,
    model: Model,
    *,
    layer: Layer = None,
    layers: Layers = None,
    rule: Rule,
    experts: ExpertCount = "all",
    calibrate: Calibrate = None,
) -> "MoEOverlay":
    """Compute an overlay (one base and a delta per expert) and report its error and size.

    By default the deltas are low-rank. You give the ranks, or choose them by energy, by error or by size. With --bits,
    --fit, --as-good-as or --coded, base and deltas are stored in codes of few bits instead.

    \b
    Examples:
      lazarus introspect moe-expert moe-overlay-compute -m demo:upcycled
      lazarus introspect moe-expert moe-overlay-compute -m demo:upcycled --layers all --target-ratio 2
      lazarus introspect moe-expert moe-overlay-compute -m demo:upcycled --max-error 0.05
      lazarus introspect moe-expert moe-overlay-compute -m demo:upcycled --layers all --bits 2.25
      lazarus introspect moe-expert moe-overlay-compute -m demo:upcycled --layers all --max-error 0.05 --coded
    """
    from chuk_lazarus.introspection.moe import MoECompressionService

    return MoECompressionService.compute(
        model,
        layer=layer,
        layers=layers,
        experts=parse_experts(experts),
        calibrate=calibrate,
        progress=run.progress,
        **rule,
    )


@command(MEMORY, JSON, OUTPUT, QUIET, VERBOSE)
def verify(
    run: Run,
    model: Model,
    *,
    layer: Layer = None,
    layers: Layers = None,
    rule: Rule,
    experts: ExpertCount = "all",
    calibrate: Calibrate = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="The largest relative output error that an expert may have.")
    ] = 0.05,
    inputs: Annotated[int, typer.Option("--inputs", min=1, help="How many random input vectors to test with.")] = 256,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The seed of the input vectors.")] = 0,
) -> Result:
    """Rebuild experts from their overlay, exactly as a file would store it, and compare them with the originals.

    The exit code is 1 if an expert's output error is above the tolerance.

    \b
    Examples:
      lazarus introspect moe-expert moe-overlay-verify -m demo:upcycled
      lazarus introspect moe-expert moe-overlay-verify -m demo:upcycled --max-error 0.02 --tolerance 0.03
      lazarus introspect moe-expert moe-overlay-verify -m demo:upcycled --layers all --as-good-as 4 --tolerance 0.15
    """
    from chuk_lazarus.introspection.moe import MoECompressionService

    report = MoECompressionService.verify(
        model,
        layer=layer,
        layers=layers,
        experts=parse_experts(experts),
        tolerance=tolerance,
        inputs=inputs,
        seed=seed,
        calibrate=calibrate,
        progress=run.progress,
        **rule,
    )
    return Result(report, hints=[report.cost.describe()], exit_code=0 if report.passed else 1)


@command(MEMORY, JSON, OUTPUT, QUIET, VERBOSE)
def estimate(
    run: Run,
    model: Model,
    *,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="SPEC", help="Layers to measure: 0,5,10 or 0-23/6 or all.")
    ] = None,
    samples: Annotated[
        int,
        typer.Option("--samples", min=1, help="How many evenly spaced layers to measure, unless --layers is given."),
    ] = 3,
    rule: Rule,
    experts: ExpertCount = "8",
    plot: Plot = None,
    caption: Caption = False,
) -> "MoEOverlayEstimate":
    """Estimate how small the whole model can be made, and at what error.

    It compares codes, plain quantisation and low-rank overlays at several sizes. A few layers are measured, and the
    others are interpolated from them.

    \b
    Examples:
      lazarus introspect moe-expert moe-overlay-estimate -m demo:upcycled
      lazarus introspect moe-expert moe-overlay-estimate -m demo:upcycled --as-good-as 4 --plot ladder.svg
      lazarus introspect moe-expert moe-overlay-estimate -m allenai/OLMoE-1B-7B-0924 --samples 4
    """
    from chuk_lazarus.introspection.moe import MoECompressionService, plots

    check_caption(plot, caption)
    report = MoECompressionService.estimate(
        model, layers=layers, samples=samples, experts=parse_experts(experts), progress=run.progress, **rule
    )
    if plot:
        plots.save(plots.plot_estimate(report, run.command_line, caption=caption), plot)
    return report


@command(MEMORY, JSON, OUTPUT, QUIET, VERBOSE)
def compress(
    run: Run,
    model: Model,
    folder: Folder,
    *,
    layers: Annotated[
        str, typer.Option("--layers", metavar="SPEC", help="Layers to compress: 0,5,10 or 0-23/6 or all.")
    ] = "all",
    rule: Rule,
    experts: ExpertCount = "all",
    calibrate: Calibrate = None,
    format: Annotated[
        Format,
        typer.Option(
            "--format", help="overlay; mlx, which plain mlx-lm loads; or auto: mlx if the experts share nothing."
        ),
    ] = Format.AUTO,
    rest_bits: RestBits = "8",
    force: Force = False,
) -> "MoEOverlayCompression":
    """Write a smaller copy of a model into a new folder.

    The experts become overlays: one base, and a delta per expert, low-rank or (with --bits, --fit, --as-good-as or
    --coded) in codes of few bits. If the experts share nothing, a base saves nothing. Then the copy is a quantised MLX
    checkpoint that plain mlx-lm loads, with the bits of each projection chosen for the least error. If it is
    interrupted, run the same command again to continue.

    \b
    Examples:
      lazarus introspect moe-expert moe-overlay-compress -m demo:upcycled -O ./overlay
      lazarus introspect moe-expert moe-overlay-compress -m ./my-model -O ./overlay --target-ratio 3
      lazarus introspect moe-expert moe-overlay-compress -m ./my-model -O ./overlay --as-good-as 4
      lazarus introspect moe-expert moe-overlay-compress -m ./my-model -O ./overlay --fit 24GB
      lazarus introspect moe-expert moe-overlay-compress -m ./my-model -O ./overlay --bits 2.25 --calibrate text.txt
    """
    from chuk_lazarus.introspection.moe import MoECompressionService

    return MoECompressionService.compress(
        model,
        folder,
        layers=layers,
        experts=parse_experts(experts),
        force=force,
        calibrate=calibrate,
        format=format.value,
        rest_bits=rest_bits,
        progress=run.progress,
        **rule,
    )


@command(MEMORY, JSON, OUTPUT, QUIET)
def export(
    run: Run,
    overlay: Annotated[
        str,
        typer.Argument(
            metavar="OVERLAY",
            help="The folder of an overlay, or any model if --format is not standard.",
            show_default=False,
        ),
    ],
    folder: Annotated[
        Path,
        typer.Option(
            "--folder",
            "-O",
            metavar="TARGET",
            help="The folder to write, or the file if the format is gguf-recipe.",
            parser=parse_path,
            show_default=False,
        ),
    ],
    *,
    format: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="standard: bfloat16; mlx: for mlx-lm; compressed-tensors: for vLLM; gguf-recipe: for llama-quantize.",
        ),
    ] = ExportFormat.STANDARD,
    widths: Annotated["OverlayOptions", OptionGroup(width_options)],
    rest_bits: Annotated[
        str | None,
        typer.Option(
            "--rest-bits",
            metavar="N|keep",
            help="With mlx and gguf-recipe: bits for attention, embeddings and everything else. Default: 8.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
) -> "MoEOverlayExport":
    """Turn an overlay back into a standard checkpoint, or write any model in few bits for other programs.

    The standard format is bfloat16, as the model's family stores it. The other formats quantise: each projection of
    each layer gets the number of bits with the least error for the size. A recipe is a
    tensor-type file for llama-quantize; the commands that make a GGUF file with it are printed.

    \b
    Examples:
      lazarus introspect moe-expert moe-overlay-export ./overlay -O ./rebuilt
      lazarus introspect moe-expert moe-overlay-export ./overlay -O ./mlx --format mlx --bits 4.5
      lazarus introspect moe-expert moe-overlay-export ./overlay -O ./packed --format compressed-tensors
      lazarus introspect moe-expert moe-overlay-export ./my-model -O ./types.txt --format gguf-recipe --fit 24GB
    """
    from chuk_lazarus.introspection.moe import MoECompressionService

    return MoECompressionService.export(
        overlay,
        folder,
        format=format.value,
        rest_bits=rest_bits,
        force=force,
        progress=run.progress,
        **widths,
    )


@command(JSON, OUTPUT, QUIET)
def evaluate(
    run: Run,
    model: Model,
    overlay: Annotated[
        Path,
        typer.Option(
            "--overlay",
            metavar="OVERLAY",
            parser=parse_path,
            help="Another way to give OVERLAY.",
            show_default=False,
        ),
        Positional(
            "OVERLAY",
            "The folder of its overlay, or of another version of the model: exported, quantised by "
            "mlx_lm.convert, or trained further.",
        ),
    ],
    text: Annotated[
        Path,
        typer.Option("--text", metavar="TEXT", help="A text file in UTF-8.", parser=parse_path, show_default=False),
    ],
    context: Annotated[int, typer.Option("--context", min=1, help="Window length in tokens.")] = 512,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=2, help="Use at most this many tokens of the text.")
    ] = None,
) -> "MoEOverlayEvaluation":
    """Run a model and its smaller version on a text, and compare loss, KL divergence, speed and memory.

    It needs MLX, and memory for both models.

    \b
    Examples:
      lazarus introspect moe-expert moe-overlay-eval -m demo:upcycled --overlay ./overlay --text README.md
      lazarus introspect moe-expert moe-overlay-eval -m ./my-model --overlay ./my-model-4bit --text wiki.txt
    """
    from chuk_lazarus.introspection.moe import MoECompressionService

    return MoECompressionService.evaluate(model, overlay, text, context=context, tokens=tokens, progress=run.progress)
