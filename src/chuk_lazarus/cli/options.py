"""The options that commands share, each once, and what their words mean."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import check_drawable, check_writable
from .positional import Positional

if TYPE_CHECKING:
    from chuk_lazarus.introspection.moe import OverlayOptions


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


def parse_path(text: str) -> Path:
    """A path, in which ~ is the home folder: a shell leaves it as it is behind "--folder="."""
    from chuk_lazarus.introspection.moe.files import as_path

    return as_path(text)


def limit_memory(context: typer.Context, size: str | None) -> str | None:
    """Keep to a limit while the command runs."""
    if size is not None:
        from chuk_lazarus.introspection.moe import memory_limit

        context.with_resource(memory_limit(size))
    return size


def check_caption(plot: Path | None, caption: bool) -> None:
    """Refuse a caption of no figure."""
    if caption and not plot:
        raise typer.BadParameter("it goes with --plot only", param_hint="--caption")


MODEL = (
    "a folder, a .safetensors or .gguf file, a Hub id (org/name or org/name@revision), "
    "or demo:lora, demo:upcycled, demo:native, demo:permuted"
)

Model = Annotated[
    str,
    typer.Option("--model", "-m", metavar="MODEL", help="Another way to give MODEL.", show_default=False),
    Positional("MODEL", f"The model: {MODEL}."),
]
Layer = Annotated[
    int | None,
    typer.Option(
        "--layer", metavar="N", parser=parse_layer, help="The layer to analyse. Default: the first MoE layer."
    ),
]
Layers = Annotated[
    str | None, typer.Option("--layers", metavar="SPEC", help="Several layers: 0,5,10 or 0-23/6 or all.")
]
ExpertCount = Annotated[
    str,
    typer.Option(
        "--experts",
        metavar="N|all",
        help="How many experts to compute spectra for. The base and the cosines always use all experts.",
    ),
]
Variance = Annotated[
    str,
    typer.Option(
        "--variance", metavar="SHARES", help="Report the rank that holds each of these shares of the delta energy."
    ),
]
Thorough = Annotated[
    bool, typer.Option("--thorough", help="Match all neurons of all experts, not a sample. Needs more time and memory.")
]
Budget = Annotated[str, typer.Option("--budget", metavar="SIZE", help="With --quick: how much of the weights to read.")]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        help="Also write a web page with figures and tables to this file.",
        callback=check_writable,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="FILE", help="Also draw a figure to this file: .png, .svg or .pdf.", callback=check_drawable
    ),
]
Caption = Annotated[
    bool,
    typer.Option("--caption", help="With --plot: add a caption with the model, the meaning and the command."),
]
Dask = Annotated[
    str | None,
    typer.Option(
        "--dask",
        metavar="ADDRESS",
        help="Run on the workers of this dask.distributed scheduler, such as tcp://host:8786.",
        show_default=False,
    ),
]
Folder = Annotated[
    Path,
    typer.Option(
        "--folder", "-O", metavar="FOLDER", help="The folder to write.", parser=parse_path, show_default=False
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace the folder if it exists, and write it even if it is not smaller.")
]

# What the decorator of `command` takes care of

Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Roughly how much memory to use, such as 1GB. Default: 2GB.",
        callback=limit_memory,
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Also write the JSON object to this file.", callback=check_writable),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no hints.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Report time, memory and bytes read on stderr.")]


GateRank = Annotated[int | None, typer.Option("--gate-rank", min=0, help="Rank of the gate deltas.")]
UpRank = Annotated[int | None, typer.Option("--up-rank", min=0, help="Rank of the up deltas.")]
DownRank = Annotated[int | None, typer.Option("--down-rank", min=0, help="Rank of the down deltas.")]
Energy = Annotated[
    float,
    typer.Option(
        "--energy", help="Choose ranks that keep this share of the delta energy, on average over the experts."
    ),
]
MaxError = Annotated[
    float | None,
    typer.Option(
        "--max-error",
        help="The smallest overlay whose relative weight error is at most this. With --coded: codes, not ranks.",
    ),
]
TargetRatio = Annotated[
    float | None,
    typer.Option(
        "--target-ratio",
        metavar="R",
        help="The most accurate overlay that is this many times smaller. With --coded: the same as --bits 16/R.",
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        "--bits",
        help="Store base and deltas in codes: this many bits per expert weight in all, such as 2.25.",
        show_default=False,
    ),
]
RestBits = Annotated[
    str,
    typer.Option(
        "--rest-bits",
        metavar="N|keep",
        help="For an MLX checkpoint: bits for attention, embeddings and everything else.",
    ),
]
Calibrate = Annotated[
    Path | None,
    typer.Option(
        "--calibrate",
        metavar="TEXT",
        parser=parse_path,
        help="With codes: run the model in MLX on this text and weight errors by the experts' real inputs.",
        show_default=False,
    ),
]
Fit = Annotated[
    str | None,
    typer.Option(
        "--fit",
        metavar="SIZE",
        help="Store base and deltas in codes, so that the whole folder takes at most this much, such as 24GB.",
        show_default=False,
    ),
]
AsGoodAs = Annotated[
    int | None,
    typer.Option(
        "--as-good-as",
        metavar="BITS",
        help="Store base and deltas in codes: as few bits as match the error of plain quantisation at BITS.",
        show_default=False,
    ),
]
Coded = Annotated[
    bool,
    typer.Option(
        "--coded", help="Use codes, not ranks, for --max-error or --target-ratio. Alone: the same as --as-good-as 4."
    ),
]
Trellis = Annotated[
    bool,
    typer.Option("--trellis", help="With codes: use trellis codes, which are more accurate and slower to compute."),
]


def overlay_options(
    gate_rank: GateRank = None,
    up_rank: UpRank = None,
    down_rank: DownRank = None,
    energy: Energy = 0.95,
    max_error: MaxError = None,
    target_ratio: TargetRatio = None,
    bits: Bits = None,
    fit: Fit = None,
    as_good_as: AsGoodAs = None,
    coded: Coded = False,
    trellis: Trellis = False,
) -> "OverlayOptions":
    """How the ranks or codes of an overlay are chosen, as the services take it."""
    given = {"gate": gate_rank, "up": up_rank, "down": down_rank}
    return {
        "ranks": {role: rank for role, rank in given.items() if rank is not None},
        "energy": energy,
        "max_error": max_error,
        "target_ratio": target_ratio,
        "bits": bits,
        "fit": fit,
        "as_good_as": as_good_as,
        "coded": coded,
        "trellis": trellis,
    }


def width_options(
    bits: Annotated[
        float | None,
        typer.Option("--bits", help="Bits per expert weight, including scales.", show_default=False),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="SIZE",
            help="As many bits as fit: the whole output takes at most this much, such as 24GB.",
            show_default=False,
        ),
    ] = None,
    as_good_as: Annotated[
        int | None,
        typer.Option(
            "--as-good-as",
            metavar="BITS",
            help="As few bits as match the error of plain quantisation at BITS. Default: 4.",
            show_default=False,
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error", help="As few bits as keep the relative weight error below this.", show_default=False
        ),
    ] = None,
    coded: Annotated[bool, typer.Option("--coded", help="The same as --as-good-as 4, the default.")] = False,
) -> "OverlayOptions":
    """How the widths of experts in a plain format are chosen, as the services take it."""
    return {"bits": bits, "fit": fit, "as_good_as": as_good_as, "max_error": max_error, "coded": coded}
