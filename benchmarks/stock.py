"""What it costs to quantise a model for mlx-lm, beside mlx-lm's own conversion of the same bytes.

    python benchmarks/stock.py [--repeat 5] [--small N] [--output benchmarks/results/stock.json]

The model has the proportions of OLMoE with one layer, in bf16. `mlx_lm.convert` (without the tokenizer) quantises all
of it to 4 bits in groups of 64; ours chooses widths of 4.5 bits a weight with their scales, verifies the layer while it
writes, and has 8 bits for the rest. "written" is ours without trials and verification.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from codes import write_whole_model
from layers import OLMOE
from measuring import CLOCKS, Figures, apart, benchmark, medians, over, timed
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from chuk_lazarus.introspection.moe import MoECompressionService, memory_limit
from chuk_lazarus.introspection.moe.overlays.analysis import OverlayJob

MEMORY = (None, "500MB")


def convert(model: str, folder: str) -> Figures:
    """By mlx-lm, as `mlx_lm.convert -q` does it."""

    def run() -> None:
        loaded, config = load_model(Path(model), lazy=True)
        loaded, config = quantize_model(loaded, config, 64, 4)
        Path(folder).mkdir()
        save_model(folder, loaded)
        save_config(config, Path(folder, "config.json"))

    return timed(run)


def quantise(model: str, folder: str, memory: str | None, verify: bool) -> Figures:
    """By us."""
    with memory_limit(memory), verification(verify):
        return timed(lambda: MoECompressionService.compress(model, folder, bits=4.5, format="mlx", force=True))


@contextmanager
def verification(wanted: bool) -> Iterator[None]:
    """Without it, no layer is verified."""
    if wanted:
        yield
    else:
        with patch.object(OverlayJob, "verified_layers", lambda self, overlaid: []):
            yield


if __name__ == "__main__":
    with benchmark(__doc__) as (options, figures):
        model = options.folder / "model"
        write_whole_model(model, OLMOE.smaller(options.small), 1, 0.0)
        rounds = []
        for number in range(options.repeat):
            names = [str(options.folder / f"{what}-{number}") for what in ("theirs", "ours", "tight", "written")]
            rounds.append(
                {
                    "mlx-lm": apart("stock.convert", model=str(model), folder=names[0]),
                    "ours": apart("stock.quantise", model=str(model), folder=names[1], memory=None, verify=True),
                    "ours, 500MB": apart(
                        "stock.quantise", model=str(model), folder=names[2], memory="500MB", verify=True
                    ),
                    "written": apart("stock.quantise", model=str(model), folder=names[3], memory="500MB", verify=False),
                }
            )
        figures |= {clock: medians(rounds, clock) for clock in (*CLOCKS, "peak_bytes")}
        figures["over_mlx_lm"] = {
            f"{name}, {clock}": over(rounds, name, "mlx-lm", clock)
            for name in ("ours", "ours, 500MB", "written")
            for clock in (*CLOCKS, "peak_bytes")
        }
