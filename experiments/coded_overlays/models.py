"""The models, the text they are tried on, and how they run: weights in and out of mlx-lm's modules, loss and KL."""

import hashlib
import json
import math
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model
from numpy.typing import NDArray

Array = NDArray[np.float32]
Layers = list[dict[str, Array]]
"""For each layer the experts of each role, [experts, out, in]."""

ROLES = ("gate", "up", "down")
TOKENS, CALIBRATION = 8_192, 32_768
EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
DEMO = Path(__file__).resolve().parents[2] / "src" / "chuk_lazarus" / "demo"

# what is shown -> where it is: a demo model, or a folder of the zoo of 04_unseen_histories
MODELS = {
    "copies, cosine 1.00": "00/copy-150",
    "copies, cosine 0.97": "demo:upcycled",
    "copies, cosine 0.65": "00/copy-hot-150",
    "shuffled copies": "demo:permuted",
    "copies + noise": "00/copy-noise-160",
    "half re-initialised": "00/drop50-160",
    "shuffled halves": "00/slice2-shuffle-160",
    "slices, E = 32": "00/granular-S8E32-blocks-150",
    "branches": "00/branches-160",
    "copies, E = 64": "00/copy64-600",
    "native": "demo:native",
    "native, wider": "21/native-400",
    "native, E = 64": "00/native-many-300",
}
NATIVES = tuple(name for name in MODELS if name.startswith("native"))

# ---------------------------------------------------------------------------------------------------------------------
# Text, as the models' own training scripts split it

PARTS = {"modules": ["."], "licences": []}


def read_demo_text(held_out: bool) -> bytes:
    """The corpus of demo_models: every 20th file of the standard library by the sha1 of its name is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    chosen = [
        name
        for name in names
        if not EXCLUDED.intersection(Path(name).parts)
        and "config-" not in name
        and not Path(name).name.startswith("_sysconfigdata")
        and (int(hashlib.sha1(name.encode()).hexdigest(), 16) % 20 == 0) == held_out
    ]
    return b"".join((root / name).read_bytes() for name in chosen)


def read_zoo_text(parts: Sequence[str], held_out: bool) -> bytes:
    """The corpus of 04_unseen_histories, of which every 20th page is held out."""
    texts = []
    for part in parts:
        if part == "licences":
            files = sorted({path.resolve() for path in Path("/usr/share/common-licenses").iterdir()})
        elif part == "modules":
            root = Path(sysconfig.get_path("stdlib"))
            files = [root / path for path in sorted(path.relative_to(root) for path in root.rglob("*.py"))]
            files = [path for path in files if path.parent == root]
        else:
            raise ValueError(f"a model was trained on {part}")
        texts.append(b"".join(path.read_bytes() for path in files)[:4_000_000])
    longest = max(map(len, texts))
    if len(texts) > 1:
        texts = [(text * math.ceil(longest / len(text)))[:longest] for text in texts]
    text = b"".join(texts)
    pages = [text[start : start + 4096] for start in range(0, len(text), 4096)]
    return b"".join(page for number, page in enumerate(pages) if (number % 20 == 0) == held_out)


def cut_windows(text: bytes, context: int, tokens: int) -> NDArray[np.int32]:
    """Windows [n, context + 1], evenly spaced over the text, n * context at most `tokens`."""
    count = min(tokens // context, len(text) // (context + 1))
    starts = np.linspace(0, len(text) - context - 1, count).astype(int)
    return np.frombuffer(text, np.uint8)[starts[:, None] + np.arange(context + 1)].astype(np.int32)


# ---------------------------------------------------------------------------------------------------------------------
# Running


@dataclass(frozen=True)
class Measured:
    """Nats per token on held-out text; standard errors over windows."""

    loss: float
    loss_change: float
    loss_change_stderr: float
    kl: float
    kl_stderr: float


@dataclass(frozen=True)
class Routed:
    """What a layer's experts saw of a text: inputs [tokens, hidden], and of each token the chosen experts and their
    shares, [tokens, top_k]."""

    inputs: Array
    chosen: NDArray[np.intp]
    shares: Array


class Bench:
    """One model, its held-out windows and what it predicts of them.

    numpy runs Mixtral here, in float32: on a busy CPU it is several times as fast as MLX's gathered products of such
    small matrices. On opening, its first logits are compared with those of mlx-lm.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model, _ = load_model(folder)
        model.set_dtype(mx.float32)
        self.model = model
        truth = folder / "truth.json"
        if truth.exists():
            parts, self.context = json.loads(truth.read_text())["corpus"], 64
            held_out, self.seen = read_zoo_text(parts, True), read_zoo_text(parts, False)
        else:
            self.context = 128
            held_out, self.seen = read_demo_text(True), read_demo_text(False)
        self.windows = cut_windows(held_out, self.context, TOKENS)
        self.top_k = model.args.num_experts_per_tok
        self.layers: Layers = [
            {role: np.array(getattr(layer.block_sparse_moe.switch_mlp, f"{role}_proj").weight) for role in ROLES}
            for layer in model.layers
        ]
        self.routed: list[Routed] = []
        self.predict(self.layers, cut_windows(self.seen, self.context, CALIBRATION), found=self.routed)
        self.before = self.predict(self.layers, self.windows)
        some = self.windows[:4]
        logits = np.array(model(mx.array(some[:, :-1])))
        logits -= logits.max(-1, keepdims=True)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert np.abs(expected - self.before[:4]).max() < 1e-2, "numpy and mlx-lm differ"

    def measure(self, layers: Layers, kept: list[NDArray[np.bool_]] | None = None) -> Measured:
        """The model with other experts, and routed to those that are `kept` alone, of each layer [experts]."""
        after, targets = self.predict(layers, self.windows, kept), self.windows[:, 1:, None]
        kl = (np.exp(self.before) * (self.before - after)).sum(-1).mean(-1)
        losses = [
            -np.take_along_axis(each, targets, -1).mean((1, 2), dtype=np.float64) for each in (self.before, after)
        ]
        change, root = losses[1] - losses[0], math.sqrt(len(kl))
        return Measured(
            loss=float(losses[1].mean()),
            loss_change=float(change.mean()),
            loss_change_stderr=float(change.std(ddof=1) / root),
            kl=float(kl.mean()),
            kl_stderr=float(kl.std(ddof=1) / root),
        )

    def predict(
        self,
        layers: Layers,
        windows: NDArray[np.int32],
        kept: list[NDArray[np.bool_]] | None = None,
        found: list[Routed] | None = None,
    ) -> Array:
        """The log probabilities of the next token, [windows, context, vocabulary]; appends to `found` what each layer's
        experts saw."""
        model = self.model.model
        x = np.array(model.embed_tokens.weight)[windows[:, :-1]]
        for place, (layer, experts) in enumerate(zip(model.layers, layers, strict=True)):
            x = x + attend(norm(x, layer.input_layernorm), layer.self_attn)
            inputs = norm(x, layer.post_attention_layernorm).reshape(-1, x.shape[-1])
            routed = route(inputs, layer.block_sparse_moe.gate, self.top_k, kept[place] if kept else None)
            if found is not None:
                found.append(routed)
            x = x + mix_experts(routed, experts).reshape(x.shape)
        logits = norm(x, model.norm) @ np.array(self.model.lm_head.weight).T
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def norm(x: Array, module: Any) -> Array:
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(module.eps)) * np.array(module.weight)


def attend(x: Array, module: Any) -> Array:
    """Causal attention of x [windows, context, hidden]; as many heads of keys as of queries."""
    count, length, hidden = x.shape
    heads = module.num_heads
    size = hidden // heads
    turns = np.outer(np.arange(length), 10000.0 ** -(np.arange(0, size, 2) / size))
    cos, sin = np.cos(turns).astype(np.float32), np.sin(turns).astype(np.float32)

    def project(name: str, is_turned: bool) -> Array:
        y = (x @ np.array(getattr(module, name).weight).T).reshape(count, length, heads, size).transpose(0, 2, 1, 3)
        first, second = y[..., : size // 2], y[..., size // 2 :]
        if is_turned:
            y = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return y

    scores = project("q_proj", True) @ project("k_proj", True).swapaxes(-1, -2) * np.float32(size**-0.5)
    scores += np.triu(np.full((length, length), -np.inf, np.float32), 1)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    mixed = (scores @ project("v_proj", False)).transpose(0, 2, 1, 3).reshape(count, length, hidden)
    return mixed @ np.array(module.o_proj.weight).T


def route(inputs: Array, gate: Any, top_k: int, kept: NDArray[np.bool_] | None) -> Routed:
    logits = inputs @ np.array(gate.weight).T
    if kept is not None:
        logits[:, ~kept] = -np.inf
    chosen = np.argpartition(-logits, top_k - 1, axis=1)[:, :top_k]
    picked = np.take_along_axis(logits, chosen, 1)
    shares = np.exp(picked - picked.max(1, keepdims=True))
    return Routed(inputs, chosen, shares / shares.sum(1, keepdims=True))


def run_expert(layer: dict[str, Array], expert: int, inputs: Array) -> tuple[Array, Array]:
    """What goes into the down projection, and what comes out."""
    gate, up = inputs @ layer["gate"][expert].T, inputs @ layer["up"][expert].T
    inner = gate / (1 + np.exp(-np.maximum(gate, -80))) * up
    return inner, inner @ layer["down"][expert].T


def mix_experts(routed: Routed, layer: dict[str, Array]) -> Array:
    result = np.zeros_like(routed.inputs)
    for expert in range(len(layer["gate"])):
        token, slot = np.nonzero(routed.chosen == expert)
        if len(token):  # no token is twice among them
            result[token] += run_expert(layer, expert, routed.inputs[token])[1] * routed.shares[token, slot, None]
    return result


def find_folder(place: str, zoos: Sequence[Path]) -> Path | None:
    """The folder of a model: a demo, or the first zoo that has it."""
    if place.startswith("demo:"):
        return DEMO / place.removeprefix("demo:")
    return next((zoo / place for zoo in zoos if (zoo / place / "model.safetensors").exists()), None)


def weight_error(original: Layers, rebuilt: Layers) -> float:
    """The relative Frobenius error over all experts."""
    left = sum(float(np.square(a[role] - b[role]).sum()) for a, b in zip(original, rebuilt, strict=True) for role in a)
    return math.sqrt(left / sum(float(np.square(a[role]).sum()) for a in original for role in a))
