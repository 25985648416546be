"""Train the tiny demo models: one dense parent and four mixtures of experts whose history is known.

    parent     a dense Llama-shaped byte model, trained from scratch
    upcycled   the parent's feed-forward copied into 8 experts with a fresh router, then trained on
    native     the same mixture trained from scratch on as many bytes as parent and upcycled together
    permuted   `upcycled` with every expert's intermediate neurons shuffled: the same function, other weights
    lora       the parent's feed-forward in 8 experts, each with a LoRA adapter of rank 4 of its own, merged; only the
               adapters and the router are trained

The corpus is the running interpreter's own standard library, so nothing is downloaded and the numbers depend a
little on the Python version. Every checkpoint is written in bfloat16, loaded again with transformers and evaluated
in that state. The cosines and ranks in results.json come from a literal full SVD in float64.

    python experiments/demo_models/train.py              # rewrites the packaged checkpoints and results.json
    python experiments/demo_models/train.py --out DIR    # writes everything, results.json too, to DIR
    python experiments/demo_models/train.py --lora       # trains `lora` alone, from the parent that is there

Needs torch, transformers, safetensors and numpy.
"""

import argparse
import hashlib
import itertools
import json
import math
import platform
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "src" / "chuk_lazarus" / "demo"

SEED = 20
EXPERTS, TOP_K = 8, 2
ROPE_THETA = 10000.0
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}

CONTEXT, BATCH = 128, 16
PARENT_STEPS, UPCYCLED_STEPS = 1000, 500
LORA_RANK, LORA_RATE = 4, 6e-3
NATIVE_STEPS = PARENT_STEPS + UPCYCLED_STEPS
RATE, UPCYCLED_RATE, FINAL_FRACTION, WARMUP = 6e-3, 1.5e-3, 0.02, 50
BALANCE, WEIGHT_DECAY, BETAS, CLIP = 0.01, 0.1, (0.9, 0.95), 1.0
CURVE_EVERY, VALIDATION_WINDOWS = 100, 1024

EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
PROJECTIONS = {"gate": "w1", "up": "w3", "down": "w2"}


def read_corpus() -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Training bytes, validation bytes and a description; every 20th file by the sha1 of its name validates."""
    root = Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    # _sysconfigdata and config-* describe one build of the interpreter, not the library.
    names = (name for name in names if not EXCLUDED.intersection(name.parts) and "config-" not in str(name))
    parts: dict[str, list[bytes]] = {"train": [], "validation": []}
    for name in sorted(name.as_posix() for name in names if not name.name.startswith("_sysconfigdata")):
        part = "validation" if int(hashlib.sha1(name.encode()).hexdigest(), 16) % 20 == 0 else "train"
        parts[part].append((root / name).read_bytes())
    info: dict = {"source": "Python standard library, .py files without tests and site-packages"}
    info |= {f"{part}_files": len(texts) for part, texts in parts.items()}
    info |= {f"{part}_bytes": sum(map(len, texts)) for part, texts in parts.items()}
    info["sha256"] = hashlib.sha256(b"".join(parts["train"] + parts["validation"])).hexdigest()
    train, validation = (torch.tensor(bytearray(b"".join(texts)), dtype=torch.uint8) for texts in parts.values())
    return train, validation, info


def mixtral_config() -> MixtralConfig:
    return MixtralConfig(**SHAPE, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K, router_aux_loss_coef=BALANCE)


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a small fraction of the peak."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))
    return peak * (FINAL_FRACTION + (1 - FINAL_FRACTION) * cosine)


def train(model: torch.nn.Module, corpus: torch.Tensor, steps: int, peak: float, data_seed: int) -> dict:
    """Train in place on random windows; the curve holds the mean training loss since the mark before."""
    started = time.perf_counter()
    sparse = model.config.model_type == "mixtral"
    options = {"output_router_logits": True} if sparse else {}
    draw = torch.Generator().manual_seed(data_seed)
    optimizer = torch.optim.AdamW(
        [one for one in model.parameters() if one.requires_grad], lr=peak, betas=BETAS, weight_decay=WEIGHT_DECAY
    )
    losses, curve = [], []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, peak)
        starts = torch.randint(0, len(corpus) - CONTEXT, (BATCH, 1), generator=draw)
        windows = corpus[starts + torch.arange(CONTEXT + 1)].long()
        output = model(input_ids=windows[:, :-1], use_cache=False, **options)
        loss = cross_entropy(output.logits.flatten(0, 1), windows[:, 1:].flatten())
        losses.append(loss.item())
        if sparse:
            loss = loss + BALANCE * output.aux_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if (step + 1) % CURVE_EVERY == 0:
            curve.append([step + 1, round(float(np.mean(losses[-CURVE_EVERY:])), 4)])
            print(f"  step {step + 1:5d}  loss {curve[-1][1]:.4f}", flush=True)
    return {
        "steps": steps,
        "bytes_seen": steps * BATCH * CONTEXT,
        "peak_rate": peak,
        "data_seed": data_seed,
        "wall_seconds": round(time.perf_counter() - started, 1),
        "curve": curve,
    }


@torch.no_grad()
def validate(model: torch.nn.Module, corpus: torch.Tensor) -> float:
    """Mean loss in nats per byte over evenly spaced windows of the validation bytes."""
    model.eval()
    starts = torch.linspace(0, len(corpus) - CONTEXT - 1, VALIDATION_WINDOWS).long()[:, None]
    windows = corpus[starts + torch.arange(CONTEXT + 1)].long()
    total = 0.0
    for chunk in windows.split(64):
        logits = model(input_ids=chunk[:, :-1], use_cache=False).logits
        total += cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").item()
    return total / (VALIDATION_WINDOWS * CONTEXT)


def save(model: torch.nn.Module, folder: Path) -> None:
    """Write bfloat16 weights under the hub's names and a config that also carries the classic `rope_theta`."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text()) | {"rope_theta": ROPE_THETA}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "model.safetensors").chmod(0o644)


def load(folder: Path) -> tuple[torch.nn.Module, dict]:
    """A checkpoint in float32, with the counts of keys that found no place or no value."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model, {kind: len(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def upcycle(folder: Path) -> MixtralForCausalLM:
    """A Mixtral whose experts are all the feed-forward of the dense checkpoint, with a fresh random router."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer, _, projection = name.removesuffix("_proj.weight").partition(".mlp.")
        if not projection:
            tensors[name] = tensor.float()
            continue
        for expert in range(EXPERTS):
            copy = f"{layer}.block_sparse_moe.experts.{expert}.{PROJECTIONS[projection]}.weight"
            tensors[copy] = tensor.float().clone()
    for layer in range(SHAPE["num_hidden_layers"]):
        router = torch.randn(EXPERTS, SHAPE["hidden_size"]) * SHAPE["initializer_range"]
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = router
    model, report = MixtralForCausalLM.from_pretrained(
        None, config=mixtral_config(), state_dict=tensors, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return model


class Adapter(torch.nn.Module):
    """A LoRA adapter for each of some stacked matrices [..., outputs, inputs]; at first it changes nothing."""

    def __init__(self, parts: int, stack: torch.Tensor) -> None:
        super().__init__()
        experts, outputs, inputs = stack.shape
        self.down = torch.nn.Parameter(torch.randn(experts, parts, LORA_RANK, inputs) / math.sqrt(inputs))
        self.up = torch.nn.Parameter(torch.zeros(experts, parts, outputs // parts, LORA_RANK))

    def forward(self, stack: torch.Tensor) -> torch.Tensor:
        return stack + (self.up @ self.down).flatten(1, 2)


def train_adapters(model: MixtralForCausalLM, corpus: torch.Tensor) -> dict:
    """Train a LoRA adapter for each matrix of each expert, and the routers; then merge the adapters."""
    model.requires_grad_(False)
    stacks = {"gate_up_proj": 2, "down_proj": 1}
    for layer in model.model.layers:
        layer.mlp.gate.requires_grad_(True)
        for name, parts in stacks.items():
            adapter = Adapter(parts, getattr(layer.mlp.experts, name))
            parametrize.register_parametrization(layer.mlp.experts, name, adapter)
    run = train(model, corpus, UPCYCLED_STEPS, LORA_RATE, data_seed=SEED + 8)
    for layer in model.model.layers:
        for name in stacks:
            parametrize.remove_parametrizations(layer.mlp.experts, name)
    return run | {"rank": LORA_RANK}


def permute(source: Path, folder: Path, seed: int) -> None:
    """Copy a checkpoint with each expert's neurons in an order of its own: rows of w1 and w3, columns of w2."""
    tensors = load_file(source / "model.safetensors")
    shuffle = torch.Generator().manual_seed(seed)
    for layer, expert in itertools.product(range(SHAPE["num_hidden_layers"]), range(EXPERTS)):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
        order = torch.randperm(SHAPE["intermediate_size"], generator=shuffle)
        for name in (f"{prefix}.w1.weight", f"{prefix}.w3.weight"):
            tensors[name] = tensors[name][order]
        tensors[f"{prefix}.w2.weight"] = tensors[f"{prefix}.w2.weight"][:, order].contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    (folder / "config.json").write_text((source / "config.json").read_text())


def rank95(matrix: np.ndarray) -> float:
    """The smallest rank that holds 95% of the energy, over the full rank."""
    energy = np.cumsum(np.linalg.svd(matrix, compute_uv=False) ** 2)
    rank = 1 + int(np.argmax(energy >= 0.95 * energy[-1]))
    return rank / min(matrix.shape)


def measure(folder: Path) -> dict:
    """Per layer and projection: pairwise cosine of flattened experts, rank of what sets each apart from their mean."""
    tensors = load_file(folder / "model.safetensors")
    layers: list[dict] = []
    for layer in range(SHAPE["num_hidden_layers"]):
        row: dict = {"cosine": {}, "cosine_std": {}, "rank95": {}}
        for projection, short in PROJECTIONS.items():
            names = [f"model.layers.{layer}.block_sparse_moe.experts.{e}.{short}.weight" for e in range(EXPERTS)]
            experts = np.stack([tensors[name].double().numpy() for name in names])
            flat = experts.reshape(EXPERTS, -1)
            unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
            cosines = [float(unit[i] @ unit[j]) for i, j in itertools.combinations(range(EXPERTS), 2)]
            row["cosine"][projection] = float(np.mean(cosines))
            row["cosine_std"][projection] = float(np.std(cosines))
            row["rank95"][projection] = float(np.mean([rank95(delta) for delta in experts - experts.mean(axis=0)]))
        layers.append(row)
    return {"layers": layers}


def check(name: str, out: Path, corpus: torch.Tensor) -> dict:
    """Load a written checkpoint with transformers: its architecture, loading report, loss, size and digest."""
    model, report = load(out / name)
    assert not any(report.values()), (name, report)
    data = (out / name / "model.safetensors").read_bytes()
    loss = validate(model, corpus)
    print(f"{name:9s} validation loss {loss:.4f}, {len(data):,} bytes", flush=True)
    return {
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **report,
        "validation_loss": loss,
        "file_bytes": len(data),
        "file_sha256": hashlib.sha256(data).hexdigest(),
    }


def list_versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


def train_lora(out: Path, training: torch.Tensor, validation: torch.Tensor) -> dict:
    """Write `lora`, made of the parent that is in `out`."""
    print("lora: the parent's feed-forward in every expert, each with an adapter of its own")
    torch.manual_seed(SEED + 7)
    model = upcycle(out / "parent")
    run = train_adapters(model, training)
    run["validation_loss_before_rounding"] = validate(model, validation)
    save(model, out / "lora")
    run |= check("lora", out, validation)
    assert abs(run["validation_loss"] - run["validation_loss_before_rounding"]) < 0.01
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny demo models.")
    parser.add_argument("--out", type=Path, help="folder for the checkpoints and results.json (default: the package)")
    parser.add_argument("--lora", action="store_true", help="train only `lora`, and add it to results.json")
    arguments = parser.parse_args()
    target = arguments.out
    out, results_file = target or DEMO, (target or HERE) / "results.json"
    started = time.perf_counter()
    torch.set_num_threads(1)  # the matrices are tiny, and one thread always sums in the same order
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    training, validation, corpus = read_corpus()
    print(corpus)
    if arguments.lora:
        results = json.loads(results_file.read_text())
        results["runs"]["lora"] = train_lora(out, training, validation) | {
            "versions": list_versions(),
            "corpus": corpus,
        }
        results["oracle"]["lora"] = measure(out / "lora")
        results_file.write_text(json.dumps(results, indent=2) + "\n")
        return
    runs: dict[str, dict] = {}

    print("parent: dense, from scratch")
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    runs["parent"] = train(model, training, PARENT_STEPS, RATE, data_seed=SEED + 1)
    runs["parent"]["validation_loss_before_rounding"] = validate(model, validation)
    save(model, out / "parent")

    print("upcycled: the parent's feed-forward in every expert, trained on")
    torch.manual_seed(SEED + 2)
    model = upcycle(out / "parent")
    at_copy = validate(model, validation)
    runs["upcycled"] = train(model, training, UPCYCLED_STEPS, UPCYCLED_RATE, data_seed=SEED + 3)
    runs["upcycled"]["validation_loss_at_copy"] = at_copy
    runs["upcycled"]["validation_loss_before_rounding"] = validate(model, validation)
    save(model, out / "upcycled")

    print("native: the mixture, from scratch")
    torch.manual_seed(SEED + 4)
    model = MixtralForCausalLM(mixtral_config())
    runs["native"] = train(model, training, NATIVE_STEPS, RATE, data_seed=SEED + 5)
    runs["native"]["validation_loss_before_rounding"] = validate(model, validation)
    save(model, out / "native")

    print("permuted: upcycled, neurons reordered")
    permute(out / "upcycled", out / "permuted", seed=SEED + 6)
    runs["permuted"] = {"permutation_seed": SEED + 6}

    for name, run in runs.items():
        run |= check(name, out, validation)
        if "validation_loss_before_rounding" in run:
            assert abs(run["validation_loss"] - run["validation_loss_before_rounding"]) < 0.01, name
    runs["lora"] = train_lora(out, training, validation)
    difference = runs["permuted"]["validation_loss"] - runs["upcycled"]["validation_loss"]
    assert abs(difference) < 1e-4, difference
    runs["permuted"]["validation_loss_minus_upcycled"] = difference

    results = {
        "seed": SEED,
        "versions": list_versions(),
        "corpus": corpus,
        "model": {**SHAPE, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K},
        "training": {
            "optimizer": "AdamW, float32, linear warm-up then cosine",
            "context": CONTEXT,
            "batch": BATCH,
            "warmup_steps": WARMUP,
            "final_rate_fraction": FINAL_FRACTION,
            "betas": BETAS,
            "weight_decay": WEIGHT_DECAY,
            "gradient_clip": CLIP,
            "load_balancing_loss": BALANCE,
        },
        "validation_windows": VALIDATION_WINDOWS,
        "runs": runs,
        "oracle": {name: measure(out / name) for name in ("upcycled", "native", "permuted", "lora")},
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    results_file.write_text(json.dumps(results, indent=2) + "\n")
    print(f"wrote {results_file} after {results['wall_seconds']} s")


if __name__ == "__main__":
    main()
