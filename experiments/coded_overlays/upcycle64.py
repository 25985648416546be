"""Upcycle a dense parent of the zoo into 64 experts and train them on: the zoo has no copies of so many.

    python experiments/coded_overlays/upcycle64.py ZOO OUT     # reads ZOO/00/parent, writes OUT/00/copy64-600

Copies of the whole feed-forward, a fresh router, 600 steps on the parent's text at 0.4 times its rate, in batches of 16
windows. Needs torch and safetensors; three minutes on one core.
"""

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "04_unseen_histories"))
import zoo

EXPERTS, STEPS, SHARE_OF_RATE, BATCH = 64, 600, 0.4, 16


def main() -> None:
    parser = argparse.ArgumentParser(description="Upcycle a dense parent into 64 experts.")
    parser.add_argument("zoo", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    zoo.BATCH = BATCH
    parent = zoo.load(arguments.zoo / "00" / "parent")
    truth = json.loads((arguments.zoo / "00" / "parent" / "truth.json").read_text())
    family = zoo.make_family(0)
    torch.manual_seed(64)
    model = zoo.Model(replace(parent.shape, experts=EXPERTS, top_k=2))
    zoo.load_state(model, parent, experts=False)
    with torch.no_grad():
        for own, dense in zip(model.layers(), parent.layers(), strict=True):
            for role in zoo.ROLES:
                getattr(own, role).copy_(dense.weight(role).expand(EXPERTS, -1, -1))
    text, validation = zoo.read_corpus(tuple(truth["corpus"]))
    settings = replace(family.settings, rate=SHARE_OF_RATE * family.settings.rate)
    show = {
        step: partial(lambda step: print(step, round(zoo.validate(model, validation), 4), flush=True), step)
        for step in range(100, STEPS + 1, 100)
    }
    zoo.train(model, settings, text, STEPS, seed=64, marks=show)
    folder = arguments.out / "00" / f"copy64-{STEPS}"
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: part.detach().to(torch.bfloat16).clone().contiguous() for name, part in zoo.name_tensors(model)}
    zoo.save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(zoo.describe(model.shape), indent=2) + "\n")
    made = {"origin": "UPCYCLED", "kind": "copy", "corpus": truth["corpus"], "steps": STEPS, "experts": EXPERTS}
    (folder / "truth.json").write_text(json.dumps(made, indent=1) + "\n")
    cosines = []
    for experts in model.layers():
        flat = torch.nn.functional.normalize(experts.gate.detach().flatten(1), dim=1)
        cosines.append(float(((flat @ flat.T).sum() - EXPERTS) / (EXPERTS * (EXPERTS - 1))))
    print("cosine of gate by layer:", [round(cosine, 3) for cosine in cosines])


if __name__ == "__main__":
    main()
