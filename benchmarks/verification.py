"""What `moe-weights-verify` takes of the processor beside reading and decoding both models.

    python benchmarks/verification.py [--experts N] [--repeat N]

An OLMoE-shaped layer (experts of 3 x 1024x2048) of noise in bf16, and the same converted to each of several formats.
`decoded` reads and decodes every expert of both, `verified` compares them all; processor seconds of one thread, medians
of rounds that do both, with all files in the page cache.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import conversions
from chuk_lazarus.introspection.moe import Experts, MoEWeightsService
from chuk_lazarus.introspection.moe.jobs.resources import Resources, thread_limit

NEURONS, HIDDEN = 1024, 2048
FORMS: dict[str, Callable[[Path, list[conversions.Layer]], Path]] = {
    "bf16, stacked": lambda path, layers: conversions.write_plain(path, "halves", layers),
    "MLX 4 bits": lambda path, layers: conversions.write_mlx(path, layers, 4, 64),
    "MLX mxfp4": lambda path, layers: conversions.write_mlx(path, layers, 4, 32, "mxfp4"),
    "MLX nvfp4": lambda path, layers: conversions.write_mlx(path, layers, 4, 16, "nvfp4"),
    "GGUF Q8_0": lambda path, layers: conversions.write_gguf(path / "model.gguf", layers, "Q8_0"),
    "GGUF Q4_0": lambda path, layers: conversions.write_gguf(path / "model.gguf", layers, "Q4_0"),
}


def decode(*models: Path) -> None:
    """Read and decode every expert of the models, as many at a time as a verification does."""
    layers = [Experts.open(str(model)).layer(0) for model in models]

    def read(expert: int) -> None:
        for layer in layers:
            layer.matrices(expert)

    with Resources.current().worker_threads(layers[0], 8) as pool:
        for _ in pool.map(read, range(layers[0].count)):
            pass


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    layers = [conversions.make_layer(0, options.experts, NEURONS, HIDDEN)]
    with tempfile.TemporaryDirectory() as folder, thread_limit(1):
        original = conversions.write_plain(Path(folder, "original"), "gate_up_down", layers)
        for number, (name, write) in enumerate(FORMS.items()):
            model = write(Path(folder, str(number)), layers)
            rounds = []
            for _ in range(1 + options.repeat):
                decoded = seconds(lambda model=model: decode(original, model))
                verified = seconds(
                    lambda model=model: MoEWeightsService.verify(str(model), str(original), experts="all")
                )
                rounds.append((decoded, verified))
            decoded, verified = (median(times) for times in zip(*rounds[1:], strict=True))
            ratio = median(after / before for before, after in rounds[1:])
            print(f"{name:14} decoded {decoded:6.2f} s, verified {verified:6.2f} s, ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
