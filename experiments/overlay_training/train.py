"""Can a mixture of experts be trained in the overlay's form, and what does it give up for that?

A tiny dense byte model is pretrained; from it, on equally many bytes,

    dense      trains on as it is
    adapters   becomes an overlay: base = the dense feed-forward, frozen like all the rest; router and factors train
               (`adapters_fast`: at four times the rate)
    overlay    the same overlay with everything training, the base too
    upcycled   the feed-forward copied into every expert in full, everything trained; then also with each expert's
               difference from the mean truncated to a few ranks
    native     the full mixture trained from scratch on as many bytes as pretraining and the second stage together

Two processes work side by side. The corpus is the running interpreter's own standard library, so nothing is downloaded
and the numbers depend a little on the Python version.

    python experiments/overlay_training/train.py                        # rewrites results.json beside this file
    python experiments/overlay_training/train.py --seed 120 --out FILE

Needs this package, mlx and mlx-lm.
"""

import argparse
import hashlib
import json
import platform
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.mixtral import Model, ModelArgs

from chuk_lazarus.introspection.moe.numerics.low_rank import factorise, rebuild
from chuk_lazarus.introspection.moe.overlays.runtime.evaluate import evaluate
from chuk_lazarus.introspection.moe.overlays.runtime.modules import OverlayMoE

HERE = Path(__file__).resolve().parent

SEED = 20
EXPERTS, TOP_K, RANK = 8, 2, 8
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rope_theta": 10000.0,
}
CONTEXT, BATCH = 128, 16
DENSE_STEPS, MORE_STEPS = 300, 150
RATE, MORE_RATE, FINAL_FRACTION, WARMUP = 6e-3, 1.5e-3, 0.02, 25
BALANCE, WEIGHT_DECAY, BETAS, CLIP = 0.01, 0.1, (0.9, 0.95), 1.0
EXCERPTS, EXCERPT = 16, 2048
CURVE_EVERY = 50
TRUNCATED_TO = (0, 2, 4, 8, 16, 32, 64)

SECOND_STAGE = ("upcycled", "overlay", "adapters", "adapters_fast", "dense")

EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
ROLES = ("gate", "up", "down")


def read_corpus() -> tuple[np.ndarray, np.ndarray, dict]:
    """Training bytes, validation bytes and a description; every 20th file by the sha1 of its name validates."""
    root = Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    # _sysconfigdata and config-* describe one build of the interpreter, not the library.
    names = (name for name in names if not EXCLUDED.intersection(name.parts) and "config-" not in str(name))
    parts: dict[str, list[bytes]] = {"train": [], "validation": []}
    for name in sorted(name.as_posix() for name in names if not name.name.startswith("_sysconfigdata")):
        part = "validation" if int(hashlib.sha1(name.encode()).hexdigest(), 16) % 20 == 0 else "train"
        parts[part].append((root / name).read_bytes())
    joined = {part: b"".join(texts) for part, texts in parts.items()}
    info = {"source": "Python standard library, .py files without tests and site-packages"}
    info |= {f"{part}_bytes": len(text) for part, text in joined.items()}
    info["sha256"] = hashlib.sha256(joined["train"] + joined["validation"]).hexdigest()
    return np.frombuffer(joined["train"], np.uint8), np.frombuffer(joined["validation"], np.uint8), info


# ---------------------------------------------------------------------------------------------------------------------
# Models: mlx-lm's Mixtral, with the feed-forward that the arm is about


class Router(nn.Linear):
    """A router whose logits the load-balancing loss can have."""

    seen: ClassVar[list[mx.array]] = []

    def __call__(self, x: mx.array) -> mx.array:
        logits = super().__call__(x)
        Router.seen.append(logits)
        return logits


class Dense(nn.Module):
    """A SwiGLU feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        hidden, intermediate = SHAPE["hidden_size"], SHAPE["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


def new_router() -> Router:
    router = Router(SHAPE["hidden_size"], EXPERTS, bias=False)
    router.weight = mx.random.normal(router.weight.shape) * 0.05
    return router


def new_mixture() -> Model:
    model = Model(ModelArgs(model_type="mixtral", num_local_experts=EXPERTS, num_experts_per_tok=TOP_K, **SHAPE))
    for layer in model.layers:
        layer.block_sparse_moe.gate = new_router()
    return model


def new_dense() -> Model:
    model = new_mixture()
    for layer in model.layers:
        layer.block_sparse_moe = Dense()
    return model


def copy_rest(model: Model, dense: Model) -> None:
    """Give the model all of the dense one's weights that are no feed-forward's."""
    rest = [(name, value) for name, value in tree_flatten(dense.parameters()) if "block_sparse_moe" not in name]
    model.load_weights(rest, strict=False)


def new_overlay(dense: Model, *, adapters_only: bool) -> Model:
    model = new_mixture()
    copy_rest(model, dense)
    for layer, source in zip(model.layers, dense.layers, strict=True):
        matrices = [source.block_sparse_moe[f"{role}_proj"].weight for role in ROLES]
        block = OverlayMoE.from_dense(*matrices, experts=EXPERTS, top_k=TOP_K, rank=RANK)
        block.router = new_router()
        layer.block_sparse_moe = block
    if adapters_only:
        model.freeze()
        for layer in model.layers:
            layer.block_sparse_moe.unfreeze()
            layer.block_sparse_moe.freeze(keys="base")
    return model


def new_upcycled(dense: Model) -> Model:
    model = new_mixture()
    copy_rest(model, dense)
    for layer, source in zip(model.layers, dense.layers, strict=True):
        for role in ROLES:
            matrix = source.block_sparse_moe[f"{role}_proj"].weight
            layer.block_sparse_moe.switch_mlp[f"{role}_proj"].weight = mx.stack([matrix] * EXPERTS)
    return model


def truncated(model: Model, rank: int) -> Model:
    """A copy whose experts are their mean plus the best approximation of that rank to what sets each apart."""
    copy = new_mixture()
    copy.update(model.parameters())
    for layer in copy.layers:
        for role in ROLES:
            linear = layer.block_sparse_moe.switch_mlp[f"{role}_proj"]
            experts = np.array(linear.weight)
            base = experts.mean(axis=0, dtype=np.float64).astype(np.float32)
            linear.weight = mx.array(np.stack([rebuild(base, factorise(each - base, rank)) for each in experts]))
    return copy


# ---------------------------------------------------------------------------------------------------------------------
# Training


def balance() -> mx.array:
    """The load-balancing loss of the routers that have just been asked: 1 per expert of a token if all are used alike.

    As in Mixtral: experts times the sum over them of (share of tokens routed there) x (mean probability).
    """
    total = mx.array(0.0)
    for logits in Router.seen:
        flat = logits.reshape(-1, EXPERTS)
        chosen = mx.argpartition(-flat, kth=TOP_K - 1, axis=-1)[:, :TOP_K]
        share = (chosen[..., None] == mx.arange(EXPERTS)).sum(axis=1).mean(axis=0)
        total = total + EXPERTS * (mx.stop_gradient(share) * mx.softmax(flat, axis=-1).mean(axis=0)).sum()
    return total / max(1, len(Router.seen))


def losses(model: Model, windows: mx.array) -> tuple[mx.array, mx.array]:
    """What is minimised, and the mean cross entropy in it."""
    Router.seen.clear()
    entropy = nn.losses.cross_entropy(model(windows[:, :-1]), windows[:, 1:], reduction="mean")
    total = entropy + BALANCE * balance()
    Router.seen.clear()
    return total, entropy


def schedule(steps: int, peak: float) -> object:
    """Linear warm-up, then a cosine down to a small fraction of the peak."""
    fall = optim.cosine_decay(peak, steps - WARMUP, FINAL_FRACTION * peak)
    return optim.join_schedules([optim.linear_schedule(peak / WARMUP, peak, WARMUP), fall], [WARMUP])


def train(name: str, model: Model, corpus: np.ndarray, steps: int, peak: float, data_seed: int) -> dict:
    """Train in place on random windows; the curve holds the mean training loss since the mark before."""
    started = time.perf_counter()
    draw = np.random.default_rng(data_seed)
    optimizer = optim.AdamW(schedule(steps, peak), betas=list(BETAS), weight_decay=WEIGHT_DECAY)
    gradients_of = nn.value_and_grad(model, losses)
    seen, curve = [], []
    for step in range(steps):
        starts = draw.integers(0, len(corpus) - CONTEXT, (BATCH, 1))
        windows = mx.array(corpus[starts + np.arange(CONTEXT + 1)].astype(np.int32))
        (_, entropy), gradients = gradients_of(model, windows)
        gradients, _ = optim.clip_grad_norm(gradients, CLIP)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state, entropy)
        seen.append(entropy.item())
        if (step + 1) % CURVE_EVERY == 0:
            curve.append([step + 1, round(float(np.mean(seen[-CURVE_EVERY:])), 4)])
            print(f"{name}: step {step + 1:4d}  loss {curve[-1][1]:.4f}", flush=True)
    return {
        "steps": steps,
        "bytes_seen": steps * BATCH * CONTEXT,
        "peak_rate": peak,
        "data_seed": data_seed,
        "wall_seconds": round(time.perf_counter() - started, 1),
        "curve": curve,
    }


def validate(model: Model, corpus: np.ndarray) -> float:
    """Mean loss in nats per byte over evenly spaced excerpts of the validation bytes."""
    starts = np.linspace(0, len(corpus) - EXCERPT - 1, EXCERPTS).astype(int)
    excerpts = (corpus[start : start + EXCERPT + 1] for start in starts)
    loss = float(np.mean([evaluate(model, excerpt, CONTEXT, batch=BATCH).loss for excerpt in excerpts]))
    Router.seen.clear()
    return loss


def count(parameters: dict) -> int:
    return sum(value.size for _, value in tree_flatten(parameters))


def sizes(model: Model) -> dict:
    experts = [value for name, value in tree_flatten(model.parameters()) if "block_sparse_moe" in name]
    return {
        "stored_parameters": count(model.parameters()),
        "feed_forward_parameters": sum(value.size for value in experts),
        "trainable_parameters": count(model.trainable_parameters()),
    }


def run(name: str, model: Model, data: tuple, steps: int, peak: float, data_seed: int) -> dict:
    training, validation = data
    before = validate(model, validation)
    result = {**sizes(model), "validation_loss_before": before, **train(name, model, training, steps, peak, data_seed)}
    result["validation_loss"] = validate(model, validation)
    print(f"{name}: validation {before:.4f} -> {result['validation_loss']:.4f}", flush=True)
    return result


def truncate_all(model: Model, validation: np.ndarray) -> list[dict]:
    rows = []
    for rank in TRUNCATED_TO:
        per_layer = sum(m * n + EXPERTS * rank * (m + n) for m, n in ((128, 64), (128, 64), (64, 128)))
        loss = validate(truncated(model, rank), validation)
        rows.append({"rank": rank, "validation_loss": loss, "expert_parameters": len(model.layers) * per_layer})
        print(f"upcycled: truncated to rank {rank:2d}: {loss:.4f}", flush=True)
    return rows


def pretrain(folder: str, seed: int) -> dict:
    mx.random.seed(seed)
    model = new_dense()
    result = run("pretraining", model, read_corpus()[:2], DENSE_STEPS, RATE, seed + 1)
    model.save_weights(f"{folder}/dense.safetensors")
    return result


def second_stage(name: str, folder: str, seed: int) -> dict:
    dense = new_dense()
    dense.load_weights(f"{folder}/dense.safetensors")
    mx.random.seed(seed + 2)
    match name:
        case "dense":
            model = dense
        case "upcycled":
            model = new_upcycled(dense)
        case _:
            model = new_overlay(dense, adapters_only=name != "overlay")
    rate = RATE if name == "adapters_fast" else MORE_RATE
    data = read_corpus()[:2]
    result = run(name, model, data, MORE_STEPS, rate, seed + 3)
    if name == "upcycled":
        result["truncated"] = truncate_all(model, data[1])
    return result


def native(seed: int) -> dict:
    mx.random.seed(seed + 4)
    return run("native", new_mixture(), read_corpus()[:2], DENSE_STEPS + MORE_STEPS, RATE, seed + 5)


def run_all(seed: int) -> dict[str, dict]:
    with TemporaryDirectory() as folder, ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        from_scratch = pool.submit(native, seed)
        runs = {"pretraining": pool.submit(pretrain, folder, seed).result()}
        arms = {name: pool.submit(second_stage, name, folder, seed) for name in SECOND_STAGE}
        return runs | {name: arm.result() for name, arm in arms.items()} | {"native": from_scratch.result()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train tiny mixtures in and out of the overlay's form.")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    started = time.perf_counter()
    *_, corpus = read_corpus()
    runs = run_all(arguments.seed)
    results = {
        "seed": arguments.seed,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("mlx", "mlx-lm", "numpy")},
        "corpus": corpus,
        "model": {**SHAPE, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "overlay_rank": RANK},
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
        "validation_bytes_scored": EXCERPTS * EXCERPT,
        "runs": runs,
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{results['wall_seconds']} s, written to {arguments.out}")


if __name__ == "__main__":
    main()
