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
    "or demo:upcycled, demo:native, demo:permuted"
)

Model = Annotated[
    str,
    typer.Option("--model", "-m", metavar="MODEL", help="The same, by name.", show_default=False),
    Positional("MODEL", f"The model: {MODEL}."),
]
Layer = Annotated[
    int | None,
    typer.Option(
        "--layer", metavar="N", parser=parse_layer, help="The layer to analyse; the first MoE layer if not given."
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
    typer.Option("--variance", metavar="SHARES", help="At which shares of the deltas' energy to take ranks."),
]
Thorough = Annotated[
    bool, typer.Option("--thorough", help="Match all neurons of all experts, not a sample; takes time and memory.")
]
Budget = Annotated[str, typer.Option("--budget", metavar="SIZE", help="With --quick: how much to read of the weights.")]
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
Caption = Annotated[
    bool,
    typer.Option("--caption", help="With --plot: say in the figure what it shows, of which model, by which command."),
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
Folder = Annotated[
    Path,
    typer.Option(
        "--folder", "-O", metavar="FOLDER", help="The folder to write.", parser=parse_path, show_default=False
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the folder if it is there.")]

# What the decorator of `command` takes care of

Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="About how much memory to use, such as 1GB; 2GB if not given.",
        callback=limit_memory,
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Write the JSON object to this file, too.", callback=check_writable),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no hints.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say on stderr what it cost.")]


GateRank = Annotated[int | None, typer.Option("--gate-rank", min=0, help="The rank of the gate deltas.")]
UpRank = Annotated[int | None, typer.Option("--up-rank", min=0, help="The rank of the up deltas.")]
DownRank = Annotated[int | None, typer.Option("--down-rank", min=0, help="The rank of the down deltas.")]
Energy = Annotated[
    float, typer.Option("--energy", help="Choose each rank as the mean rank at this share of the deltas' energy.")
]
MaxError = Annotated[
    float | None,
    typer.Option(
        "--max-error",
        help="Spread rank for this relative weight error of the experts, in the fewest bytes; with --coded, bits.",
    ),
]
TargetRatio = Annotated[
    float | None,
    typer.Option(
        "--target-ratio",
        metavar="R",
        help="Spread rank for this ratio of bytes, with the least weight error; with --coded, as --bits 16/R.",
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        "--bits",
        help="Code bases and deltas in so many bits for each weight of the experts, everything counted, such as 2.25.",
        show_default=False,
    ),
]
RestBits = Annotated[
    str,
    typer.Option("--rest-bits", metavar="N|keep", help="In MLX's format: bits of attention, embeddings and all else."),
]
Calibrate = Annotated[
    Path | None,
    typer.Option(
        "--calibrate",
        metavar="TEXT",
        parser=parse_path,
        help="With codes: run the model in MLX on this text file, and let errors count as the experts' inputs do.",
        show_default=False,
    ),
]
Fit = Annotated[
    str | None,
    typer.Option(
        "--fit",
        metavar="SIZE",
        help="Code bases and deltas in the bits with which the whole folder takes at most so much, such as 24GB.",
        show_default=False,
    ),
]
AsGoodAs = Annotated[
    int | None,
    typer.Option(
        "--as-good-as",
        metavar="BITS",
        help="Code bases and deltas in the fewest bits with which they err no more than plain quantisation at BITS.",
        show_default=False,
    ),
]
Coded = Annotated[
    bool,
    typer.Option(
        "--coded", help="Codes in place of ranks for --max-error or --target-ratio; alone, as --as-good-as 4."
    ),
]
Trellis = Annotated[
    bool,
    typer.Option("--trellis", help="With codes: code by trellises, which err less, and take longer to be made."),
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
        typer.Option("--bits", help="Bits for each weight of the experts, everything counted.", show_default=False),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="SIZE",
            help="The bits with which all of it takes at most so much: 24GB.",
            show_default=False,
        ),
    ] = None,
    as_good_as: Annotated[
        int | None,
        typer.Option(
            "--as-good-as",
            metavar="BITS",
            help="The fewest bits that err no more than plain quantisation at BITS; 4 if nothing else is given.",
            show_default=False,
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option("--max-error", help="The fewest bits within this relative weight error.", show_default=False),
    ] = None,
    coded: Annotated[bool, typer.Option("--coded", help="As --as-good-as 4, which is meant without it, too.")] = False,
) -> "OverlayOptions":
    """How the widths of experts in a plain format are chosen, as the services take it."""
    return {"bits": bits, "fit": fit, "as_good_as": as_good_as, "max_error": max_error, "coded": coded}
