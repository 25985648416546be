"""Open questions about training history, asked of tiny mixtures of experts: results.json.

    python experiments/03_open_questions/run.py OUT --zoo ZOO

ZOO is what 02_training_history/zoo.py trains. What the questions need besides is trained here, with the same code, and
kept in OUT, and is not trained again. Needs torch and safetensors.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import t as student
from torch import Tensor

from chuk_lazarus.introspection.moe import Experts as Stored
from chuk_lazarus.introspection.moe import MoETypeService
from chuk_lazarus.introspection.moe.errors import MoEError
from chuk_lazarus.introspection.moe.numerics.neurons import as_neurons, find_nearest, join
from chuk_lazarus.introspection.moe.provenance.lineage import parent_evidence
from chuk_lazarus.introspection.moe.weights.expert_layer import ExpertLayer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "02_training_history"))

from zoo import (  # noqa: E402
    DENSE,
    FAMILIES,
    HOT,
    LONG,
    MEDIUM,
    MILD,
    NATIVE,
    SHORT,
    Experts,
    Family,
    Model,
    copy_trunk,
    read_corpus,
    save,
    train,
    upcycle,
    validate,
)

TUNED = (0, 1, 5, 6, 8)  # families whose natives are fine-tuned: both corpora, both optimisers, 4, 8 and 16 experts
OTHER = {"python": "c++", "c++": "python"}
ALIKE = 0  # the family whose settings are kept while one of them changes
COPIES = (f"copy-{LONG}", f"copy-hot-{LONG}", f"copy-mild-{SHORT}")
NATIVES = (f"native-{NATIVE}", f"native-b-{NATIVE}")
ROLES = ("gate", "up", "down")

Row = dict[str, Any]

# ---------------------------------------------------------------------------------------------------------------------
# Training


class SharedExperts(Experts):
    """Routed experts and a shared one, through which every token passes."""

    def __init__(self, experts: int, intermediate: int, hidden: int, top_k: int, shared: int) -> None:
        super().__init__(experts, intermediate, hidden, top_k)
        self.shared = Experts(1, shared, hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shared(x)


corpus = cache(read_corpus)


@dataclass
class Trainer:
    """Trains what OUT/log.json does not have yet; checkpoints are OUT/name-step/."""

    out: Path

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.log_file = self.out / "log.json"
        self.log: dict[str, Row] = json.loads(self.log_file.read_text()) if self.log_file.exists() else {}

    def run(
        self, model: Model, name: str, family: Family, rate: float, seed: int, marks: Sequence[int], constant: bool
    ) -> None:
        """Train to the last mark on the family's corpus, saving at each."""
        if f"{name}-{marks[-1]}" in self.log:
            return
        started = time.process_time()

        def write(step: int) -> None:
            folder = self.out / f"{name}-{step}"
            save(model, folder)
            if isinstance(model.blocks[0].experts, SharedExperts):
                add_shared(model, folder)
            loss = {text: round(validate(model, corpus(text)[1]), 4) for text in OTHER}
            spent = time.process_time() - started
            facts = {"steps": step, "rate": rate, "constant": constant, "seed": seed, "corpus": family.corpus}
            self.log[folder.name] = {**facts, "loss": loss, "cpu_seconds": round(spent, 1)}
            self.log_file.write_text(json.dumps(self.log, indent=1) + "\n")
            print(f"{spent:5.0f} s  {folder.name}  {loss}", flush=True)

        if marks[0] == 0:
            write(0)
        written = {step: lambda step=step: write(step) for step in marks if step}
        train(model, family, corpus(family.corpus)[0], marks[-1], rate, seed, written, constant)


def load(folder: Path, family: Family) -> Model:
    """A mixture that `save` wrote; bfloat16, so rounded once."""
    stored = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    layers = [Experts(family.experts, family.intermediate, family.hidden, family.top_k) for _ in range(family.layers)]
    model = Model(family.hidden, layers)
    found = {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
    found["norm.weight"] = "model.norm.weight"
    state: dict[str, Tensor] = {}
    for number in range(family.layers):
        ours, theirs = f"blocks.{number}.", f"model.layers.{number}."
        found[f"{ours}norm1.weight"] = f"{theirs}input_layernorm.weight"
        found[f"{ours}norm2.weight"] = f"{theirs}post_attention_layernorm.weight"
        found |= {f"{ours}attention.{name}.weight": f"{theirs}self_attn.{name}_proj.weight" for name in "qkvo"}
        found[f"{ours}experts.router"] = f"{theirs}block_sparse_moe.gate.weight"
        for role, short in zip(ROLES, ("w1", "w3", "w2"), strict=True):
            every = [f"{theirs}block_sparse_moe.experts.{expert}.{short}.weight" for expert in range(family.experts)]
            state[f"{ours}experts.{role}"] = torch.stack([stored[name] for name in every])
    model.load_state_dict(state | {ours: stored[theirs] for ours, theirs in found.items()})
    return model


def add_shared(model: Model, folder: Path) -> None:
    """Add the shared experts to a saved mixture, and save them once more as a dense model: folder/shared."""
    tensors = load_file(folder / "model.safetensors")
    for number, block in enumerate(model.blocks):
        for role in ROLES:
            name = f"model.layers.{number}.block_sparse_moe.shared_experts.{role}_proj.weight"
            tensors[name] = getattr(block.experts.shared, role)[0].detach().to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    (folder / "model.safetensors.tmp").rename(folder / "model.safetensors")  # what was loaded may be mapped
    hidden = model.embed.weight.shape[1]
    dense = Model(hidden, [block.experts.shared for block in model.blocks])
    save(copy_trunk(model, dense), folder / "shared")


def share(routed: Model, parent: Model, family: Family) -> Model:
    """An upcycled mixture with the parent's feed-forward as a shared expert; each half, so that copies begin as the
    parent's function."""
    layers = []
    for block, dense in zip(routed.blocks, parent.blocks, strict=True):
        experts, intermediate, hidden = block.experts.gate.shape
        mixed = SharedExperts(experts, intermediate, hidden, block.experts.top_k, family.intermediate)
        mixed.load_state_dict(block.experts.state_dict(), strict=False)
        mixed.shared.load_state_dict(dense.experts.state_dict())
        for down in (mixed.down, mixed.shared.down):
            down.data *= 0.5
        layers.append(mixed)
    return copy_trunk(parent, Model(family.hidden, layers))


def train_natives(trainer: Trainer, name: str, family: Family, shared: int = 0, halves: Sequence[int] = (1, 2)) -> None:
    """Natives as in the zoo: one at the family's rate, one from another seed at half of it."""
    for half in halves:
        torch.manual_seed(100 + 400 * half)
        sizes = (family.experts, family.intermediate, family.hidden, family.top_k)
        layers = [SharedExperts(*sizes, shared) if shared else Experts(*sizes) for _ in range(family.layers)]
        model = Model(family.hidden, layers)
        trainer.run(model, f"{name}-{'ab'[half - 1]}", family, family.rate / half, half, (NATIVE,), constant=False)


def train_all(trainer: Trainer, zoo: Path) -> None:
    for seed in TUNED:
        family = FAMILIES[seed]
        other = replace(family, corpus=OTHER[family.corpus])
        for name, rate, read in (("mild", MILD, other), ("hot", HOT, other), ("own-hot", HOT, family)):
            model = load(zoo / f"{seed:02d}" / NATIVES[0], family)
            trainer.run(model, f"{seed:02d}-{name}", read, rate * family.rate, seed, (SHORT, DENSE), constant=True)
    family = FAMILIES[ALIKE]
    parent = Model(family.hidden, [Experts(1, family.intermediate, family.hidden, 1) for _ in range(family.layers)])
    parent.load_state_dict(torch.load(zoo / f"{ALIKE:02d}" / "parent.pt"))
    for name, scheme, rate, constant in (
        ("copy", "copy", MEDIUM, False),
        ("copy-hot", "copy", HOT, True),
        ("slice-shuffle-drop50", "slice-shuffle-drop50", MEDIUM, False),
        ("redrawn", "redrawn", MEDIUM, False),
    ):
        torch.manual_seed(100)  # of the routers
        model = share(upcycle(parent, family, scheme, torch.Generator().manual_seed(ALIKE)), parent, family)
        trainer.run(model, f"shared-{name}", family, rate * family.rate, ALIKE, (0, SHORT, LONG), constant)
    train_natives(trainer, "shared-native", family, shared=family.intermediate, halves=(1,))
    for experts in (4, 32):
        train_natives(trainer, f"experts-{experts}", replace(family, experts=experts))
    for hidden, halves in ((96, (1, 2)), (128, (1,))):  # the largest once only: it is slow
        larger = replace(family, hidden=hidden, intermediate=2 * hidden)
        train_natives(trainer, f"hidden-{hidden}", larger, halves=halves)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def judge(folder: Path) -> Row:
    """The figures of a checkpoint, layer by layer, of every neuron of every expert."""
    report = MoETypeService.analyze(str(folder), layers="all", thorough=True)
    layers = [
        {
            **{f"cosine_{role}": round(getattr(layer.cosine, role), 4) for role in ROLES},
            **{f"rank_{role}": round(layer.projections[role].noise_rank_ratio, 4) for role in ROLES},
            "excess": round(layer.lineage.kept - layer.lineage.chance, 4),
            "close": round(layer.lineage.close, 4),
            "chance": round(layer.lineage.chance, 4),
        }
        for layer in report.layers
    ]
    return {"type": report.type, "experts": report.experts, "layers": layers}


def mean(row: Row) -> dict[str, float]:
    """Over the layers."""
    return {figure: float(np.mean([layer[figure] for layer in row["layers"]])) for figure in row["layers"][0]}


def interval(values: Sequence[float]) -> Row:
    """The mean, and half of its 95 % interval by Student's t."""
    spread = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return {"mean": round(float(np.mean(values)), 4), "half_95": round(spread, 4), "n": len(values)}


def intervals(rows: Sequence[dict[str, float]]) -> dict[str, Row]:
    return {figure: interval([row[figure] for row in rows]) for figure in rows[0]}


def changes(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {figure: after[figure] - before[figure] for figure in before}


def average(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {figure: round(float(np.mean([row[figure] for row in rows])), 4) for figure in rows[0]}


def ask_fine_tuning(trainer: Trainer, zoo: Path) -> Row:
    """1. Every family before, and after each run; the mean change over families."""
    before = {}
    for seed in TUNED:
        folder = zoo / f"{seed:02d}" / NATIVES[0]
        model = load(folder, FAMILIES[seed])
        before[seed] = {"loss": {text: round(validate(model, corpus(text)[1]), 4) for text in OTHER}, **judge(folder)}
    result: Row = {"before": {f"{seed:02d}": row for seed, row in before.items()}, "after": {}, "change": {}}
    for name, step in product(("mild", "hot", "own-hot"), (SHORT, DENSE)):
        rows = {seed: judge(trainer.out / f"{seed:02d}-{name}-{step}") for seed in TUNED}
        for seed, row in rows.items():
            run = f"{seed:02d}-{name}-{step}"
            result["after"][run] = {**trainer.log[run], **row}
        result["change"][f"{name}-{step}"] = intervals([changes(mean(before[s]), mean(rows[s])) for s in TUNED])
    return result


def ask_depth(zoo: Path, families: Iterable[int]) -> Row:
    """2. The last layer's figures minus the first's, averaged over a family's checkpoints; families are independent."""
    result: Row = {}
    for kind, names in {"native": NATIVES, **{name: (name,) for name in COPIES}}.items():
        rows = {seed: [judge(zoo / f"{seed:02d}" / name) for name in names] for seed in families}
        ends = [[changes(row["layers"][0], row["layers"][-1]) for row in own] for own in rows.values()]
        by_layer = {
            f"{seed:02d}": [average(layers) for layers in zip(*(row["layers"] for row in own), strict=True)]
            for seed, own in rows.items()
        }
        result[kind] = {"last_minus_first": intervals([average(own) for own in ends]), "by_layer": by_layer}
    return result


def ask_size(trainer: Trainer, zoo: Path, families: Iterable[int], size: str, own: Sequence[int]) -> Row:
    """3 and 4. Natives and copies of the zoo by experts or hidden size, and natives that differ in nothing else."""
    zoo_rows: Row = {}
    for seed in families:
        group = zoo_rows.setdefault(str(getattr(FAMILIES[seed], size)), {})
        for name in (*NATIVES, *COPIES):
            kind = "native" if name in NATIVES else name
            group.setdefault(kind, []).append(mean(judge(zoo / f"{seed:02d}" / name)))
    folders = {
        value: [trainer.out / name for name in trainer.log if name.startswith(f"{size}-{value}-")] for value in own
    }
    for seed in (seed for seed, family in enumerate(FAMILIES) if differ_in(family, FAMILIES[ALIKE]) <= {size}):
        folders[getattr(FAMILIES[seed], size)] = [zoo / f"{seed:02d}" / name for name in NATIVES]
    return {
        "zoo": {
            value: {kind: {"n": len(rows), **average(rows)} for kind, rows in kinds.items()}
            for value, kinds in sorted(zoo_rows.items(), key=lambda item: int(item[0]))
        },
        "alike": {str(value): [judge(folder) for folder in folders[value]] for value in sorted(folders)},
    }


def differ_in(one: Family, other: Family) -> set[str]:
    return {name for name in vars(one) if getattr(one, name) != getattr(other, name)}


def neurons(layer: ExpertLayer) -> list[dict[str, np.ndarray]]:
    """Each expert's neurons, a row each, by role."""
    found = (layer.matrices(expert) for expert in range(layer.count))
    return [{role: as_neurons(role, matrix) for role, matrix in expert.items()} for expert in found]


def match(asked: list[dict[str, np.ndarray]], pools: list[dict[str, np.ndarray]]) -> Row:
    """What share of all asked neurons is found again in some of the pools, beyond chance."""
    places = np.concatenate([np.arange(len(one["gate"])) for one in asked])
    own = np.repeat(np.arange(len(asked)), len(asked[0]["gate"]))
    queries = {role: np.concatenate([one[role] for one in asked]) for role in ROLES}
    nearest = [{role: find_nearest(queries[role], places, pool[role]) for role in ROLES} for pool in pools]
    chances = [parent_evidence(one, own, places, len(pools[0]["gate"])).chance for one in nearest]
    found = np.stack([join([one[role] for one in nearest]).neuron for role in ROLES])
    kept = float((found == found[0]).all(axis=0).any(axis=1).mean())
    chance = 1.0 - float(np.prod([1.0 - chance for chance in chances]))
    return {"kept": round(kept, 4), "chance": round(chance, 4)}


def ask_shared(trainer: Trainer, zoo: Path) -> Row:
    """5. Routed neurons in the shared expert and the other way round, both in the parent, and what the product says."""
    dense = Stored.open(str(zoo / f"{ALIKE:02d}" / f"parent-{DENSE}"), "dense")
    result: Row = {}
    for name in (name for name in trainer.log if name.startswith("shared-")):
        folder = trainer.out / name
        row = {**trainer.log[name], **judge(folder), "matches": []}
        routed, shared = Stored.open(str(folder)), Stored.open(str(folder), "shared")
        for number in routed.layers:
            experts, common, parent = (neurons(opened.layer(number)) for opened in (routed, shared, dense))
            row["matches"].append(
                {
                    "routed_in_shared": match(experts, common),
                    "shared_in_routed": match(common, experts),
                    "routed_in_parent": match(experts, parent),
                    "shared_in_parent": match(common, parent),
                }
            )
        for what, given in (("itself", folder), ("its shared expert as a dense model", folder / "shared")):
            try:
                report = MoETypeService.analyze(str(folder), layers="all", thorough=True, parent=str(given))
                row[f"parent: {what}"] = [round(layer.lineage.parent.kept, 4) for layer in report.layers]
            except MoEError as error:
                row[f"parent: {what}"] = error.message.removeprefix(f"{given}: ")
        result[name] = row
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Train what the questions need, and answer them.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--zoo", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)  # as in the zoo
    trainer = Trainer(given.out)
    train_all(trainer, given.zoo)
    logs = {int(file.parent.name): json.loads(file.read_text()) for file in given.zoo.glob("*/log.json")}
    families = sorted(seed for seed, log in logs.items() if {*NATIVES, *COPIES} <= set(log["checkpoints"]))
    runs = {name.rpartition("-")[0]: facts["cpu_seconds"] for name, facts in trainer.log.items()}  # the last mark's
    results = {
        "families": families,
        "training_cpu_seconds": round(sum(runs.values())),
        "1_fine_tuning": ask_fine_tuning(trainer, given.zoo),
        "2_depth": ask_depth(given.zoo, families),
        "3_experts": ask_size(trainer, given.zoo, families, "experts", (4, 32)),
        "4_hidden": ask_size(trainer, given.zoo, families, "hidden", (96, 128)),
        "5_shared": ask_shared(trainer, given.zoo),
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
