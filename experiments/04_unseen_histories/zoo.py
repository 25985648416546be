"""Train families of tiny mixtures of experts of known history, of the kinds that are hard to tell apart.

    python experiments/04_unseen_histories/zoo.py OUT --families 0-11 [--minutes 40]

A family is one text, size, seed and setting of the optimiser; it has a dense parent, natives, and many kinds of
upcycled mixtures, and each of them is post-processed: quantised, pruned, rescaled, shuffled, rebuilt from a base and
deltas. Every checkpoint is a folder, OUT/family/name, of bfloat16 weights in Mixtral's names (Qwen2-MoE's where there
is a shared expert, Llama's where there are no experts), with truth.json beside them. What is there already is not made
again, and what a checkpoint draws depends on its family and name alone, so a run can be stopped and gone on with. Of
six families at a time, cheap kinds come first. Needs torch and safetensors.
"""

import argparse
import json
import math
import os
import random
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROUND = 6  # families of which the cheap kinds come before all others
CONTEXT, BATCH, WARMUP, CLIP = 64, 4, 30, 1.0
ROLES = ("gate", "up", "down")
NEURONS = {"gate": -2, "up": -2, "down": -1}  # the axis of neurons in [experts, out, in]


@dataclass(frozen=True)
class Shape:
    """One expert is a dense feed-forward. `shared` is the width of the shared expert."""

    hidden: int
    intermediate: int
    layers: int
    experts: int = 1
    top_k: int = 1
    routing: str = "learned"  # or random, or hash (by the byte)
    activation: str = "silu"
    tied: bool = False  # gate = up; stored as a gated feed-forward
    shared: int = 0


@dataclass(frozen=True)
class Settings:
    """How to train; `balance` weighs the load-balancing loss."""

    optimiser: str
    rate: float
    decay: float
    schedule: str = "cosine"
    balance: float = 0.01


@dataclass(frozen=True)
class Family:
    number: int
    shape: Shape  # of the parent; `experts` is how many its copies are
    experts: int
    corpus: tuple[str, ...]
    settings: Settings
    parent_steps: int
    native_steps: int

    @property
    def name(self) -> str:
        return f"{self.number:02d}"


# hidden, intermediate, layers, experts
SIZES = [
    (64, 128, 2, 8),
    (32, 256, 2, 16),
    (48, 256, 3, 8),
    (96, 256, 2, 4),
    (64, 256, 2, 8),
    (16, 128, 3, 16),
    (32, 128, 2, 8),
    (128, 256, 2, 8),
    (64, 512, 2, 6),
    (48, 128, 2, 12),
    (80, 128, 3, 8),
    (32, 512, 2, 8),
    (64, 128, 2, 24),
    (128, 128, 2, 4),
    (96, 128, 3, 6),
    (16, 256, 2, 8),
    (256, 256, 2, 4),
]
CORPORA = [
    ("modules",),
    ("tests-0",),
    ("network", "licences"),
    ("tests-1", "tools"),
    ("encodings", "licences"),
    ("tools",),
    ("tests-2",),
    ("licences",),
    ("network",),
    ("tests-3", "encodings"),
    ("modules", "licences"),
]
OPTIMISERS = ("adamw", "adamw", "lion", "adamw", "muon", "adamw-slow", "lion")


def make_family(number: int) -> Family:
    draw = random.Random(number)
    hidden, intermediate, layers, experts = SIZES[number % len(SIZES)]
    optimiser = OPTIMISERS[number % len(OPTIMISERS)]
    low, high = (3e-4, 8e-4) if optimiser == "lion" else (2e-3, 6e-3)
    rate = low * (high / low) ** draw.random() * min(1.0, (64 / hidden) ** 0.5)
    decay = draw.choice([0.0, 0.01, 0.1, 0.3]) * (5 if optimiser == "lion" else 1)
    return Family(
        number,
        Shape(hidden, intermediate, layers),
        experts,
        CORPORA[number % len(CORPORA)],
        Settings(optimiser, rate, decay, draw.choice(["cosine", "cosine", "constant", "decay at the end"])),
        parent_steps=draw.choice([400, 500, 600]),
        native_steps=draw.choice([400, 600, 800]),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Text

PARTS = {
    "modules": ["."],
    "tests-0": ["test"],
    "tests-1": ["test"],
    "tests-2": ["test"],
    "tests-3": ["test"],
    "network": ["asyncio", "email", "xml", "http", "urllib", "html", "xmlrpc", "multiprocessing", "logging"],
    "tools": ["idlelib", "tkinter", "unittest", "distutils", "lib2to3", "ctypes", "importlib"],
    "encodings": ["encodings"],
}


@cache
def read_part(part: str) -> bytes:
    if part == "licences":
        texts = sorted({path.resolve() for path in Path("/usr/share/common-licenses").iterdir()})
    else:
        root = Path(sysconfig.get_path("stdlib"))
        found = sorted(path.relative_to(root) for path in root.rglob("*.py"))
        inside = [path for path in found if (path.parts[0] if len(path.parts) > 1 else ".") in PARTS[part]]
        share = part.partition("-")[2]
        texts = [root / path for path in (inside[int(share) :: 4] if share else inside)]
    return b"".join(path.read_bytes() for path in texts)[:4_000_000]


@cache
def read_corpus(parts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Training and validation bytes; every 20th page of 4096 bytes validates. Parts are brought to one length."""
    texts = [read_part(part) for part in parts]
    longest = max(map(len, texts))
    text = b"".join((text * math.ceil(longest / len(text)))[:longest] if len(texts) > 1 else text for text in texts)
    pages = torch.tensor(bytearray(text), dtype=torch.uint8).split(4096)
    train = torch.cat([page for number, page in enumerate(pages) if number % 20])
    return train, torch.cat(pages[::20])


# ---------------------------------------------------------------------------------------------------------------------
# Model: Llama with a feed-forward that is dense or a mixture


class Norm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-5)


class Attention(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.heads = count_heads(hidden)
        self.q, self.k, self.v, self.o = (nn.Parameter(torch.randn(hidden, hidden) * hidden**-0.5) for _ in range(4))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = (
            (x @ weight.T).view(batch, length, self.heads, -1).transpose(1, 2) for weight in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(rotate(q, rotary), rotate(k, rotary), v, is_causal=True)
        return out.transpose(1, 2).reshape(batch, length, hidden) @ self.o.T


class Experts(nn.Module):
    """Routed experts, [experts, out, in], and perhaps a shared one; a dense feed-forward is one expert."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.shape = shape
        count, inner, hidden = shape.experts, shape.intermediate, shape.hidden
        self.gate = nn.Parameter(torch.randn(count, inner, hidden) * hidden**-0.5)
        self.up = None if shape.tied else nn.Parameter(torch.randn(count, inner, hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(count, hidden, inner) * inner**-0.5)
        self.router = nn.Parameter(torch.randn(count, hidden) * 0.02) if count > 1 else None
        if shape.shared:
            self.shared = Experts(Shape(hidden, shape.shared, 1, activation=shape.activation), layer)
            self.shared_gate = nn.Parameter(torch.zeros(1, hidden))
        self.adapters: nn.ParameterDict | None = None  # low-rank updates, role.a and role.b
        self.balance = torch.zeros(())
        if shape.routing == "hash":
            drawn = torch.rand(256, count, generator=torch.Generator().manual_seed(1000 + layer))
            self.table = drawn.topk(shape.top_k).indices

    def weight(self, role: str) -> Tensor:
        weight = self.gate if role == "up" and self.up is None else getattr(self, role)
        if self.adapters is not None:
            weight = weight + self.adapters[f"{role}_b"] @ self.adapters[f"{role}_a"]
        return weight

    def run(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        act = F.silu if self.shape.activation == "silu" else F.relu
        return (act(x @ gate.mT) * (x @ up.mT)) @ down.mT

    def choose(self, flat: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of every token, and their shares, both [tokens, top_k]."""
        count, k = self.shape.experts, self.shape.top_k
        if self.shape.routing != "learned":
            chosen = (
                self.table[tokens.flatten()]
                if self.shape.routing == "hash"
                else torch.rand(len(flat), count).topk(k).indices
            )
            return chosen, flat.new_full(chosen.shape, 1 / k)
        shares = (flat @ self.router.T).softmax(dim=-1)
        top, chosen = shares.topk(k, dim=-1)
        load = torch.bincount(chosen.flatten(), minlength=count) / len(flat)
        self.balance = count * (load * shares.mean(dim=0)).sum()
        return chosen, top if k == 1 else top / top.sum(dim=-1, keepdim=True)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        weights = [self.weight(role) for role in ROLES]
        if self.router is None:
            return self.run(x, *(weight[0] for weight in weights))
        count, k, flat = self.shape.experts, self.shape.top_k, x.reshape(-1, x.shape[-1])
        chosen, share = self.choose(flat, tokens)
        experts, order = chosen.flatten().sort(stable=True)
        load = torch.bincount(experts, minlength=count)
        most, source = int(load.max()), order // k
        if count * most <= 4 * len(order):  # one product for all experts, padded to the fullest
            slot = experts * most + torch.arange(len(order)) - (load.cumsum(0) - load)[experts]
            padded = flat.new_zeros(count * most, flat.shape[1]).index_copy(0, slot, flat[source])
            out = self.run(padded.view(count, most, -1), *weights).flatten(0, 1)[slot]
        else:
            parts = flat[source].split(load.tolist())
            out = torch.cat([self.run(part, *(w[e] for w in weights)) for e, part in enumerate(parts) if len(part)])
        result = torch.zeros_like(flat).index_add(0, source, out * share.flatten()[order, None])
        result = result.view_as(x)
        if self.shape.shared:
            result = result + self.shared(x, tokens) * 2 * torch.sigmoid(x @ self.shared_gate.T)
        return result


class Block(nn.Module):
    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(shape.hidden), Norm(shape.hidden)
        self.attention, self.experts = Attention(shape.hidden), Experts(shape, layer)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], tokens: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), rotary)
        return x + self.experts(self.norm2(x), tokens)


class Model(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Parameter(torch.randn(256, shape.hidden) * 0.02)
        self.blocks = nn.ModuleList(Block(shape, layer) for layer in range(shape.layers))
        self.norm = Norm(shape.hidden)
        self.head = nn.Parameter(torch.randn(256, shape.hidden) * shape.hidden**-0.5)
        size = shape.hidden // count_heads(shape.hidden)
        angles = torch.outer(torch.arange(CONTEXT), 10000.0 ** -(torch.arange(0, size, 2) / size))
        self.rotary = (angles.cos().repeat(1, 2), angles.sin().repeat(1, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.embed)
        for block in self.blocks:
            x = block(x, self.rotary, tokens)
        return self.norm(x) @ self.head.T

    def layers(self) -> list[Experts]:
        return [block.experts for block in self.blocks]


def count_heads(hidden: int) -> int:
    return hidden // (32 if hidden % 32 == 0 and hidden > 64 else 16)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Lion(torch.optim.Optimizer):
    """Chen et al., Symbolic Discovery of Optimization Algorithms, 2023: the sign of an interpolated momentum."""

    def __init__(self, groups: list[dict], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(momentum.lerp(p.grad, 0.1).sign_(), alpha=-group["lr"])
                momentum.lerp_(p.grad, 0.01)


class Muon(torch.optim.Optimizer):
    """Jordan et al., 2024: the momentum of a matrix brought to singular values near 1, at the size of AdamW's steps."""

    def __init__(self, groups: list[dict], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(0.95).add_(p.grad)
                x = p.grad + 0.95 * momentum
                flip = x.shape[-2] > x.shape[-1]
                x = x.mT if flip else x
                x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
                for _ in range(5):
                    square = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
                x = x.mT if flip else x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x, alpha=-0.2 * group["lr"] * max(p.shape[-2:]) ** 0.5)


def make_optimisers(model: Model, settings: Settings) -> list[torch.optim.Optimizer]:
    wanted = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in wanted if p.ndim > 1 and name not in ("embed", "head") and "router" not in name]
    inside = {id(p) for p in matrices}
    tables = [p for _, p in wanted if p.ndim > 1 and id(p) not in inside]
    vectors = [{"params": [p for _, p in wanted if p.ndim == 1], "weight_decay": 0.0}]
    first = [{"params": matrices, "weight_decay": settings.decay}]
    rest = [{"params": tables, "weight_decay": settings.decay}, *vectors]
    groups = [[group for group in part if group["params"]] for part in (first, rest)]
    if settings.optimiser == "lion":
        return [Lion(groups[0] + groups[1], settings.rate)]
    betas = (0.9, 0.99) if settings.optimiser == "adamw-slow" else (0.9, 0.95)
    adamw = partial(torch.optim.AdamW, lr=settings.rate, betas=betas, fused=True)
    if settings.optimiser == "muon":
        return [Muon(groups[0], settings.rate), *([adamw(groups[1])] if groups[1] else [])]
    return [adamw(groups[0] + groups[1])]


def schedule_rate(step: int, steps: int, schedule: str) -> float:
    share = min(1.0, (step + 1) / WARMUP)
    if schedule == "cosine":
        return share * (0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
    if schedule == "decay at the end":
        return share * min(1.0, 0.1 + 0.9 * (steps - step) / (0.25 * steps))
    return share


def draw_windows(corpus: Tensor, draw: torch.Generator) -> Tensor:
    starts = torch.randint(0, len(corpus) - CONTEXT - 1, (BATCH, 1), generator=draw)
    return corpus[starts + torch.arange(CONTEXT + 1)].long()


def score(model: Model, windows: Tensor) -> Tensor:
    """The mean loss of every window."""
    losses = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return losses.view(len(windows), -1).mean(dim=1)


def train(
    model: Model,
    settings: Settings,
    corpus: Tensor,
    steps: int,
    seed: int,
    marks: dict[int, Callable[[], None]] | None = None,
    preferences: bool = False,
) -> None:
    """Train in place, calling a mark at its step. With `preferences`, prefer text to corrupted text, as DPO does."""
    draw = torch.Generator().manual_seed(seed)
    reference = load_state(Model(model.shape), model) if preferences else None
    optimisers = make_optimisers(model, settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for step in range(steps):
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = settings.rate * schedule_rate(step, steps, settings.schedule)
        windows = draw_windows(corpus, draw)
        if reference is None:
            loss = score(model, windows).mean()
        else:
            other = torch.where(torch.rand(windows.shape, generator=draw) < 0.15, windows.roll(1, 0).flip(1), windows)
            with torch.no_grad():
                ahead = score(reference, other) - score(reference, windows)
            loss = -F.logsigmoid(5 * (score(model, other) - score(model, windows) - ahead)).mean()
        if settings.balance and model.shape.experts > 1 and model.shape.routing == "learned":
            loss = loss + settings.balance * sum(experts.balance for experts in model.layers())
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        for optimiser in optimisers:
            optimiser.step()
        if marks and step + 1 in marks:
            marks[step + 1]()


@torch.no_grad()
def validate(model: Model, corpus: Tensor) -> float:
    starts = torch.linspace(0, len(corpus) - CONTEXT - 2, 64).long()[:, None]
    return score(model, corpus[starts + torch.arange(CONTEXT + 1)].long()).mean().item()


def load_state(target: Model, source: Model, experts: bool = True) -> Model:
    """Everything of a model, or all but its feed-forwards."""
    state = {name: value for name, value in source.state_dict().items() if experts or ".experts." not in name}
    target.load_state_dict(state, strict=False)
    return target


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def name_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Each stored name, and the part of a parameter that it is."""
    shape = model.shape
    yield from (("model.embed_tokens.weight", model.embed), ("model.norm.weight", model.norm.weight))
    yield "lm_head.weight", model.head
    for number, block in enumerate(model.blocks):
        prefix, experts = f"model.layers.{number}.", block.experts
        yield f"{prefix}input_layernorm.weight", block.norm1.weight
        yield f"{prefix}post_attention_layernorm.weight", block.norm2.weight
        for name in "qkvo":
            yield f"{prefix}self_attn.{name}_proj.weight", getattr(block.attention, name)
        if shape.experts == 1:
            yield from ((f"{prefix}mlp.{role}_proj.weight", experts.weight(role)[0]) for role in ROLES)
            continue
        router = "mlp.gate" if shape.shared else "block_sparse_moe.gate"
        yield f"{prefix}{router}.weight", experts.router
        for role, short in zip(ROLES, ("w1", "w3", "w2"), strict=True):
            for expert, matrix in enumerate(experts.weight(role)):
                inner = f"experts.{expert}."
                name = f"mlp.{inner}{role}_proj" if shape.shared else f"block_sparse_moe.{inner}{short}"
                yield f"{prefix}{name}.weight", matrix
        if shape.shared:
            yield f"{prefix}mlp.shared_expert_gate.weight", experts.shared_gate
            for role in ROLES:
                yield f"{prefix}mlp.shared_expert.{role}_proj.weight", experts.shared.weight(role)[0]


def describe(shape: Shape) -> dict:
    kind = "llama" if shape.experts == 1 else "qwen2_moe" if shape.shared else "mixtral"
    architecture = {"llama": "Llama", "qwen2_moe": "Qwen2Moe", "mixtral": "Mixtral"}[kind]
    config = {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": kind,
        "vocab_size": 256,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "hidden_act": shape.activation,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": count_heads(shape.hidden),
        "num_key_value_heads": count_heads(shape.hidden),
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if kind == "mixtral":
        config |= {"num_local_experts": shape.experts, "num_experts_per_tok": shape.top_k}
    if kind == "qwen2_moe":
        config |= {"num_experts": shape.experts, "num_experts_per_tok": shape.top_k, "norm_topk_prob": True}
        config |= {"moe_intermediate_size": shape.intermediate, "shared_expert_intermediate_size": shape.shared}
    return config


def load(folder: Path) -> Model:
    shape = Shape(**json.loads((folder / "truth.json").read_text())["shape"])
    model, stored = Model(replace(shape, tied=False)), load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, part in name_tensors(model):
            part.copy_(stored[name])
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Upcycling: one layer's dense matrices [1, out, in] -> its experts'

Matrices = dict[str, Tensor]


def copy(dense: Matrices, experts: int) -> Matrices:
    return {role: matrix.repeat(experts, 1, 1) for role, matrix in dense.items()}


def shuffle(found: Matrices) -> Matrices:
    """Every expert's neurons in an order of its own: the same function."""
    count, size = found["gate"].shape[:2]
    orders = torch.stack([torch.randperm(size) for _ in range(count)])
    return {
        role: m.gather(2, orders[:, None].expand(m.shape))
        if role == "down"
        else m[torch.arange(count)[:, None], orders]
        for role, m in found.items()
    }


def blur(found: Matrices, share: float = 0.5) -> Matrices:
    return {role: matrix + share * matrix.std() * torch.randn(matrix.shape) for role, matrix in found.items()}


def drop(found: Matrices, share: float, together: bool = True) -> Matrices:
    """A share of each expert's neurons drawn anew, with the mean and deviation of those that they replace."""
    result = {role: matrix.clone() for role, matrix in found.items()}
    count, size = found["gate"].shape[:2]
    for expert in range(count):
        common = torch.randperm(size)[: round(share * size)]
        for role, matrix in result.items():
            chosen = common if together else torch.randperm(size)[: round(share * size)]
            axis = NEURONS[role] % 3 - 1
            old = matrix[expert].index_select(axis, chosen)
            matrix[expert].index_copy_(axis, chosen, old.mean() + old.std() * torch.randn(old.shape))
    return result


def cut(dense: Matrices, copies: int, pieces: int, mixed: bool) -> Matrices:
    """Slices of copies, one copy after the other; `mixed` shuffles each copy before it is cut."""
    whole = copy(dense, copies)
    whole = shuffle(whole) if mixed else whole
    scale = {"gate": 1.0, "up": 1.0, "down": float(pieces)}
    return {
        role: scale[role] * torch.stack([part for one in m for part in one.chunk(pieces, dim=NEURONS[role])])
        for role, m in whole.items()
    }


def upcycle(parent: Model, make: Callable[[Matrices], Matrices], top_k: int = 2, pieces: int = 1) -> Model:
    """The parent with the experts that `make` makes of each layer; slices of one copy begin with one router row."""
    made = [make(get_matrices(experts)) for experts in parent.layers()]
    count, inner = made[0]["gate"].shape[:2]
    model = Model(replace(parent.shape, experts=count, intermediate=inner, top_k=min(top_k, count)))
    load_state(model, parent, experts=False)
    for experts, found in zip(model.layers(), made, strict=True):
        set_matrices(experts, found)
        if pieces > 1:
            experts.router.data = experts.router.data[: count // pieces].repeat_interleave(pieces, dim=0)
    return model


def get_matrices(experts: Experts) -> Matrices:
    return {role: experts.weight(role).detach().clone() for role in ROLES}


def set_matrices(experts: Experts, found: Matrices) -> None:
    for role, matrix in found.items():
        getattr(experts, role).data = matrix.clone()


def reorder_experts(model: Model, order: Tensor) -> Model:
    for experts in model.layers():
        set_matrices(experts, {role: matrix[order] for role, matrix in get_matrices(experts).items()})
        experts.router.data = experts.router.data[order]
    return model


def in_turns(experts: int, pieces: int) -> Tensor:
    """From copy * pieces + slice to slice * copies + copy."""
    return torch.arange(experts).view(-1, pieces).T.flatten()


# ---------------------------------------------------------------------------------------------------------------------
# What is done to a finished checkpoint: model -> model, in place


def on_matrices(change: Callable[[Matrices], Matrices], model: Model) -> Model:
    for experts in model.layers():
        set_matrices(experts, change(get_matrices(experts)))
    return model


def rescale(found: Matrices) -> Matrices:
    """Up against down, neuron by neuron: the same function."""
    factor = (0.7 * torch.randn(found["gate"].shape[:2])).exp()
    return {"gate": found["gate"], "up": found["up"] * factor[:, :, None], "down": found["down"] / factor[:, None]}


def flip(found: Matrices, whole: bool = False) -> Matrices:
    """Up and down change sign, in half of the neurons or in half of the experts: the same function."""
    count, size = found["gate"].shape[:2]
    sign = torch.randint(0, 2, (count, size)).float() * 2 - 1
    if whole:
        sign = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0)[:, None].expand(count, size)
    return {"gate": found["gate"], "up": found["up"] * sign[:, :, None], "down": found["down"] * sign[:, None]}


def mix_down(found: Matrices) -> Matrices:
    """One rotation of the neurons' side of all down projections, which a runtime would undo."""
    size = found["down"].shape[2]
    return found | {"down": found["down"] @ torch.linalg.qr(torch.randn(size, size))[0]}


def overlay(found: Matrices, rank: int) -> Matrices:
    """The mean expert and a delta of low rank."""
    result = {}
    for role, matrix in found.items():
        base = matrix.mean(dim=0, keepdim=True)
        u, s, v = torch.linalg.svd(matrix - base, full_matrices=False)
        result[role] = base + (u[..., :rank] * s[:, None, :rank]) @ v[:, :rank]
    return result


def add_adapter(found: Matrices, rank: int, share: float) -> Matrices:
    """One update of low rank for all experts, of a share of their norm."""
    result = {}
    for role, matrix in found.items():
        update = torch.randn(matrix.shape[1], rank) @ torch.randn(rank, matrix.shape[2])
        result[role] = matrix + update * share * matrix.norm(dim=(1, 2)).mean() / update.norm()
    return result


def merge_pairs(found: Matrices) -> Matrices:
    """Every two experts averaged, and stored twice; an odd one stays."""
    result = {role: matrix.clone() for role, matrix in found.items()}
    for matrix in result.values():
        for first in range(0, len(matrix) - 1, 2):
            matrix[first : first + 2] = matrix[first : first + 2].mean(dim=0, keepdim=True)
    return result


def store_twice(found: Matrices) -> Matrices:
    first, second = torch.randperm(len(found["gate"]))[:2]
    result = {role: matrix.clone() for role, matrix in found.items()}
    for matrix in result.values():
        matrix[second] = matrix[first]
    return result


def quantise(found: Matrices, bits: int) -> Matrices:
    """Round to nearest in groups of 32 (or 16) inputs; with 2 bits, ternary with the mean magnitude."""
    result = {}
    for role, matrix in found.items():
        size = next(size for size in (32, 16, 8, 4, 2, 1) if matrix.shape[2] % size == 0)
        groups = matrix.unflatten(2, (-1, size))
        if bits == 2:
            scale = groups.abs().mean(dim=-1, keepdim=True).clamp_min(1e-9)
            quantised = (groups / scale).round().clamp(-1, 1) * scale
        else:
            scale = (groups.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp_min(1e-9)
            quantised = (groups / scale).round() * scale
        result[role] = quantised.flatten(2)
    return result


def prune(found: Matrices) -> Matrices:
    """Of every four inputs, the two largest."""
    result = {}
    for role, matrix in found.items():
        groups = matrix.unflatten(2, (-1, 4))
        mask = torch.zeros_like(groups).scatter_(-1, groups.abs().topk(2).indices, 1.0)
        result[role] = (groups * mask).flatten(2)
    return result


def scale_columns(model: Model, make: Callable[[int], Tensor]) -> Model:
    """What reads the norm's output times a factor, the norm divided by it: the same function."""
    for block in model.blocks:
        factor, experts = make(model.shape.hidden), block.experts
        block.norm2.weight.data /= factor
        readers = [experts.gate, experts.up, experts.router]
        if model.shape.shared:
            readers += [experts.shared.gate, experts.shared.up, experts.shared_gate]
        for reader in readers:
            reader.data *= factor
    return model


def one_column(hidden: int, times: float) -> Tensor:
    factor = torch.ones(hidden)
    factor[torch.randint(0, hidden, (1,))] = times
    return factor


def fold_norms(model: Model) -> Model:
    """Norms of ones, their weights in what reads them: the same function."""
    for block in model.blocks:
        for name in "qkv":
            getattr(block.attention, name).data *= block.norm1.weight.data
        block.norm1.weight.data.fill_(1.0)
    scale_columns(model, lambda _: torch.ones(model.shape.hidden))
    for block in model.blocks:
        weight, experts = block.norm2.weight.data.clone(), block.experts
        readers = [experts.gate, experts.up, experts.router]
        if model.shape.shared:
            readers += [experts.shared.gate, experts.shared.up, experts.shared_gate]
        for reader in readers:
            reader.data *= weight
        block.norm2.weight.data.fill_(1.0)
    model.head.data *= model.norm.weight.data
    model.norm.weight.data.fill_(1.0)
    return model


def rotate_hidden(model: Model) -> Model:
    """The hidden side of the whole model turned, norms folded: the same function."""
    fold_norms(model)
    turn = torch.linalg.qr(torch.randn(model.shape.hidden, model.shape.hidden))[0]
    readers, writers = [model.embed, model.head], []
    for block in model.blocks:
        parts = [block.experts, *([block.experts.shared] if model.shape.shared else [])]
        readers += [block.attention.q, block.attention.k, block.attention.v, block.experts.router]
        readers += [matrix for part in parts for matrix in (part.gate, part.up)]
        readers += [block.experts.shared_gate] if model.shape.shared else []
        writers += [block.attention.o, *(part.down for part in parts)]
    for reader in readers:
        reader.data = reader.data @ turn.T
    for writer in writers:
        writer.data = turn @ writer.data
    return model


SAME = {  # the same function, or close to it
    "shuffled": partial(on_matrices, shuffle),
    "disguised": partial(on_matrices, lambda found: shuffle(flip(rescale(found)))),
    "flipped": partial(on_matrices, flip),
    "negated": partial(on_matrices, partial(flip, whole=True)),
    "column5": partial(scale_columns, make=partial(one_column, times=5.0)),
    "column30": partial(scale_columns, make=partial(one_column, times=30.0)),
    "columns": partial(scale_columns, make=lambda hidden: torch.randn(hidden).exp()),
    "folded": fold_norms,
    "rotated": rotate_hidden,
    "int4": partial(on_matrices, partial(quantise, bits=4)),
    "ternary": partial(on_matrices, partial(quantise, bits=2)),
    "pruned": partial(on_matrices, prune),
    "int4-shuffled": partial(on_matrices, lambda found: shuffle(quantise(found, bits=4))),
    "rotated-int4": lambda model: on_matrices(partial(quantise, bits=4), rotate_hidden(model)),
    "scattered": lambda model: reorder_experts(model, torch.randperm(model.shape.experts)),
}
BASE = {  # what gives experts something in common
    **{f"overlay{rank}": partial(on_matrices, partial(overlay, rank=rank)) for rank in (2, 8, 16, 32, 64)},
    "adapter": partial(on_matrices, partial(add_adapter, rank=8, share=0.2)),
    "adapter-strong": partial(on_matrices, partial(add_adapter, rank=4, share=0.5)),
    "adapter-wide": partial(on_matrices, partial(add_adapter, rank=16, share=0.3)),
    "pairs": partial(on_matrices, merge_pairs),
    "twice": partial(on_matrices, store_twice),
    "twice-int4": partial(on_matrices, lambda found: quantise(store_twice(found), bits=4)),
}
TURNED = {
    "mixed-down": partial(on_matrices, mix_down),
    "shuffled-rotated": lambda model: rotate_hidden(on_matrices(shuffle, model)),
    "shuffled-mixed-down": partial(on_matrices, lambda found: mix_down(shuffle(found))),
    "shuffled-negated": partial(on_matrices, lambda found: flip(shuffle(found), whole=True)),
    "disguised-columns": lambda model: SAME["disguised"](SAME["columns"](model)),
    "disguised-int4": partial(on_matrices, lambda found: quantise(shuffle(flip(rescale(found))), bits=4)),
}
POSTS: dict[str, Callable[[Model], Model]] = SAME | BASE | TURNED
NATIVE_POSTS, UPCYCLED_POSTS = list(SAME | BASE), [*SAME, *TURNED, "overlay8", "overlay32", "adapter"]
LOSSLESS = {"shuffled", "disguised", "flipped", "negated", "column5", "column30", "columns", "folded", "rotated"}


# ---------------------------------------------------------------------------------------------------------------------
# One family


@dataclass(frozen=True)
class Run:
    """A training: the model that `start` gives is saved at `marks`, the last of which is where it ends."""

    kind: str
    origin: str
    tier: int
    marks: tuple[int, ...]
    detail: str
    start: Callable[[], Model]
    settings: Settings
    corpus: Tensor
    name: str = ""
    parent: bool = False
    preferences: bool = False
    adapters: int = 0  # their rank; only they and the routers are trained
    posts: tuple[str, ...] = ()  # what is done to the last checkpoint
    extra: dict[str, Any] = field(default_factory=dict)  # for truth.json


class Maker:
    def __init__(self, family: Family, out: Path) -> None:
        self.family, self.folder = family, out / family.name
        self.text, self.validation = read_corpus(family.corpus)
        self.draw = random.Random(1000 + family.number)

    # Files

    def exists(self, name: str) -> bool:
        return (self.folder / name / "truth.json").exists()

    def load(self, name: str) -> Model:
        return load(self.folder / name)

    def seed(self, name: str) -> int:
        seed = zlib.crc32(f"{self.family.number}/{name}".encode())
        torch.manual_seed(seed)
        return seed

    def save(self, model: Model, name: str, truth: dict) -> None:
        folder, shape = self.folder / name, model.shape
        folder.mkdir(parents=True, exist_ok=True)
        stored = {key: part.detach().to(torch.bfloat16).clone().contiguous() for key, part in name_tensors(model)}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(describe(shape), indent=2) + "\n")
        loss = validate(model, self.validation)
        known = {key: truth.get(key) for key in ("origin", "kind")} | {"family": self.family.name}
        known |= {"parent": truth.get("parent"), "steps": truth.get("steps", 0)}
        known |= {key: getattr(shape, key) for key in ("experts", "hidden", "intermediate", "top_k")}
        known |= {"seed": truth["seed"], "detail": truth.get("detail", ""), "loss": round(loss, 4)}
        known |= {key: value for key, value in truth.items() if key not in known}
        known |= {"shape": asdict(shape), "corpus": list(self.family.corpus)}
        temporary = folder / "truth.json.tmp"
        temporary.write_text(json.dumps(known, indent=1) + "\n")
        os.replace(temporary, folder / "truth.json")
        print(f"{time.strftime('%H:%M:%S')} {self.family.name}/{name}  {truth['origin']}  loss {loss:.3f}", flush=True)

    # Making

    def make(self, run: Run) -> None:
        name = run.name or run.kind
        last = f"{name}-{run.marks[-1]}" if run.origin != "DENSE" else name
        if not self.exists(last):
            seed = self.seed(name)
            model = run.start()
            if run.adapters:
                add_adapters(model, run.adapters)
            truth = {"origin": run.origin, "kind": run.kind, "seed": seed, "detail": run.detail, **run.extra}
            truth |= {"settings": asdict(run.settings)}
            if run.parent:
                truth["parent"] = f"{self.family.name}/parent"

            def write(step: int) -> None:
                self.save(model, f"{name}-{step}" if run.origin != "DENSE" else name, truth | {"steps": step})

            if 0 in run.marks:
                write(0)
            marks = {step: partial(write, step) for step in run.marks if step}
            if marks:
                train(model, run.settings, run.corpus, run.marks[-1], seed, marks, run.preferences)
        for post in run.posts:
            self.post(last, post)

    def post(self, source: str, post: str) -> None:
        name = f"{source}+{post}"
        if self.exists(name):
            return
        truth = json.loads((self.folder / source / "truth.json").read_text())
        if post.startswith("overlay") and int(post[7:]) >= 0.75 * min(truth["hidden"], truth["intermediate"]):
            return
        seed = self.seed(name)
        with torch.no_grad():
            model = POSTS[post](self.load(source))
        kept = {key: truth[key] for key in ("origin", "parent", "steps", "detail", "settings")}
        facts = {"kind": f"{truth['kind']}+{post}", "source": source, "post": post, "source_loss": truth["loss"]}
        self.save(model, name, kept | facts | {"seed": seed, "same_function": post in LOSSLESS})

    def some(self, posts: list[str], count: int) -> tuple[str, ...]:
        return tuple(self.draw.sample(posts, count))

    # What there is to make

    def plan(self) -> list[Run]:
        runs = [self.dense("parent", 0), *self.natives(), *self.upcycled()]
        return [run for _, run in sorted(enumerate(runs), key=lambda item: (item[1].tier, item[0]))]

    def dense(self, name: str, tier: int, corpus: Tensor | None = None, **changes: int) -> Run:
        steps = self.family.parent_steps
        shape, text = replace(self.family.shape, **changes), self.text if corpus is None else corpus
        return Run("dense", "DENSE", tier, (steps,), "", partial(Model, shape), self.family.settings, text, name)

    def native(self, kind: str, tier: int, shape: Shape, steps: int | tuple[int, ...], detail: str, **more: Any) -> Run:
        usual = {"start": partial(Model, shape), "settings": self.family.settings, "corpus": self.text}
        usual |= {"posts": self.some(NATIVE_POSTS, 3)}
        return Run(kind, "NATIVE", tier, as_marks(steps), detail, **(usual | more))

    def natives(self) -> Iterator[Run]:
        family, draw, base, make = self.family, self.draw, self.family.settings, self.native
        width = max(16, family.shape.intermediate // draw.choice([1, 2, 2, 4]))
        usual = replace(family.shape, experts=family.experts, intermediate=width, top_k=2)
        one = replace(usual, top_k=1)
        random_routed, hashed = (
            replace(usual, routing="random"),
            replace(usual, routing="hash", top_k=draw.choice([1, 2])),
        )
        tied = replace(usual, tied=True, activation="relu")
        shared = replace(usual, shared=family.shape.intermediate, intermediate=max(16, width // 2))
        many = replace(usual, experts=draw.choice([32, 64, 128]), intermediate=draw.choice([16, 32, 64]))
        many = replace(many, top_k=draw.choice([2, 4, 8]))
        few = replace(usual, experts=draw.choice([2, 3, 4]), intermediate=family.shape.intermediate)
        few = replace(few, top_k=min(2, few.experts - 1))
        half = replace(usual, top_k=max(2, family.experts // 2))

        steps, length = family.native_steps, draw.choice([300, 400, 500])
        free = replace(base, balance=0.0)
        heavy = replace(base, balance=draw.choice([0.3, 1.0, 3.0]))
        adamw = replace(base, optimiser="adamw", rate=draw.uniform(2e-3, 5e-3) * min(1.0, (64 / usual.hidden) ** 0.5))
        strong = replace(adamw, decay=draw.choice([1.0, 2.0, 3.0]), schedule="constant")
        hot, mild = replace(base, rate=3 * base.rate, schedule="constant"), replace(base, rate=0.3 * base.rate)
        other = read_corpus(CORPORA[(family.number + 4) % len(CORPORA)])[0]

        for way in ("normal", "uniform", "orthogonal", "heavy-tailed", "tied"):
            shape = replace(tied if way == "tied" else usual, layers=2, experts=draw.choice([4, 8, 16, 32, 64]))
            shape = replace(shape, intermediate=draw.choice([16, 32, 64, 128, 256]))
            posts = self.some(list(SAME), 1) + self.some(list(BASE), 2)
            yield make(f"untrained-{way}", 1, shape, 0, way, start=partial(make_noise, shape, way), posts=posts)
        yield make("native", 1, usual, (150, steps), "top-2, balanced", posts=tuple(NATIVE_POSTS))
        yield make("native-top1", 1, one, length, "top-1 without balancing", settings=free)
        yield make("native-random", 1, random_routed, (150, length), "random routing", settings=free)
        yield make("native-hash", 2, hashed, length, "routed by the byte", settings=free)
        yield make("native-balanced", 2, usual, length, f"balancing times {heavy.balance}", settings=heavy)
        yield make("native-decay", 2, usual, (200, length), f"weight decay {strong.decay}", settings=strong)
        alike = partial(begin_alike, usual)
        yield make("native-one-seed", 2, usual, (150, length), "all experts begin alike; arguable", start=alike)
        yield make("native-tied", 2, tied, length, "gate = up: squared ReLU stored as gated")
        yield make("native-shared", 2, shared, length, "shared and routed experts")
        yield make("native-many", 2, many, 300, "many small experts")
        yield make("native-few", 2, few, length, "few experts")
        yield make("native-hot", 2, usual, 300, "three times the rate", settings=hot)
        yield make("native-half", 3, half, length, "half of the experts at once")
        many_random = replace(many, routing="random", top_k=2)
        yield make("native-many-random", 3, many_random, 300, "many small experts, random routing", settings=free)
        yield make("native-random-decay", 3, random_routed, 300, "random routing, weight decay", settings=strong)
        whole = partial(self.load, f"native-{steps}")
        yield make(
            "native-tuned", 3, usual, 200, "trained on with other text", start=whole, settings=mild, corpus=other
        )

        deep = {"layers": 8, "intermediate": min(128, family.shape.intermediate)}
        yield self.dense("deep", 2, **deep)
        for name, stride in (("layers", False), ("layers-in-turns", True)):
            detail = "layers of one dense model taken as experts; arguable"
            yield make("layers", 2, usual, (0, 150), detail, name=name, start=partial(self.from_layers, stride))

    def from_layers(self, stride: bool) -> Model:
        """Two layers of four experts: layers 0 to 3 and 4 to 7 of the deep model, or the even and the odd ones."""
        deep = self.load("deep")
        layers = [get_matrices(experts) for experts in deep.layers()]
        groups = [layers[0::2], layers[1::2]] if stride else [layers[:4], layers[4:]]
        model = Model(replace(deep.shape, layers=2, experts=4, top_k=2))
        model.embed.data, model.head.data = deep.embed.data.clone(), deep.head.data.clone()
        for block, source, group in zip(model.blocks, (deep.blocks[0], deep.blocks[7]), groups, strict=True):
            block.attention.load_state_dict(source.attention.state_dict())
            set_matrices(block.experts, {role: torch.cat([layer[role] for layer in group]) for role in ROLES})
        return model

    def made(
        self, kind: str, tier: int, start: Callable[[], Model], steps: int | tuple[int, ...], detail: str, **more: Any
    ) -> Run:
        settings = replace(self.family.settings, rate=0.4 * self.family.settings.rate)
        usual = {"settings": settings, "corpus": self.text, "parent": True, "posts": self.some(UPCYCLED_POSTS, 3)}
        return Run(kind, "UPCYCLED", tier, as_marks(steps), detail, start=start, **(usual | more))

    def upcycled(self) -> Iterator[Run]:
        family, draw, base, make, up = self.family, self.draw, self.family.settings, self.made, self.from_parent
        count, layers, every = family.experts, list(range(family.shape.layers)), tuple(UPCYCLED_POSTS)
        long, short = draw.choice([400, 500, 700]), draw.choice([120, 160, 240])
        mild, medium = replace(base, rate=0.1 * base.rate), replace(base, rate=0.4 * base.rate)
        hot, dpo = replace(base, rate=1.5 * base.rate, schedule="constant"), replace(base, rate=0.05 * base.rate)
        other = read_corpus(CORPORA[(family.number + 3) % len(CORPORA)])[0]

        def any_rate() -> Settings:
            return draw.choice([mild, medium, base])

        copied = partial(copy, experts=count)
        yield make("copy", 1, up(copied), (0, 150), "copies, short and mild", settings=mild, posts=every)
        yield make("shuffle", 1, up(lambda m: shuffle(copied(m))), short, "shuffled copies", settings=any_rate())
        noisy = up(lambda m: blur(copied(m)))
        yield make("copy-noise", 1, noisy, (0, short), "copies + 0.5 sigma", settings=any_rate())
        dropped = partial(drop_copies, count=count)
        yield make("drop50", 1, up(partial(dropped, share=0.5)), (0, short), "half of the neurons drawn anew")
        yield from self.granular(any_rate())
        yield make("copy-long", 2, up(copied), long, "copies, long", posts=every)
        yield make("copy-hot", 2, up(copied), (150, 400), "copies, hot", settings=hot)
        yield make("drop90", 2, up(partial(dropped, share=0.9)), (0, short), "90% of the neurons drawn anew")
        anew = up(partial(dropped, share=1.0))
        yield make("redrawn", 2, anew, (0, 300), "all feed-forward weights drawn anew, attention kept")
        for pieces, mixed in ((2, False), (2, True), (4, False), (4, True)):
            name, copies = f"slice{pieces}{'-shuffle' if mixed else ''}", max(2, count // pieces)
            start = up(partial(cut, copies=copies, pieces=pieces, mixed=mixed), pieces, pieces)
            detail = f"S = {pieces}, {copies} copies{', shuffled before the cut' if mixed else ''}"
            extra = {"slices": pieces, "copies": copies}
            yield make("slice", 2, start, short, detail, name=name, extra=extra)
        split = up(partial(cut, copies=1, pieces=8, mixed=False), top_k=4)
        yield make(
            "split", 2, split, (0, short), "cut once: only the parent shows it", extra={"slices": 8, "copies": 1}
        )
        yield make("shared", 2, self.with_slices, short, "parent as the shared expert, shuffled slices half drawn anew")
        yield self.dense("parent-b", 2, other)
        detail = "half of the experts from parent, half from parent-b"
        yield make("groups", 2, partial(self.from_two, False), (0, short), detail)
        yield make("groups", 3, partial(self.from_two, True), (0, short), f"{detail}, in turns", name="groups-turns")
        yield make("branches", 2, self.branch, (0, short), "dense branches trained on parts of the text")
        grown = {"parent": False, "extra": {"grown_from": f"native-{family.native_steps}"}}
        detail = "every expert of a native doubled"
        yield make("grown", 2, partial(self.grow, False), (0, 150, 400), detail, **grown)
        start = partial(self.grow, True)
        yield make("grown", 2, start, (0, 150), f"{detail}, in turns", name="grown-turns", settings=base, **grown)
        rank = draw.choice([2, 4, 8])
        detail = f"only adapters of rank {rank} and the router trained"
        yield make("lora", 2, up(copied), short, detail, settings=base, adapters=rank)
        start, detail = partial(self.load, "copy-150"), "copy-150 trained on preferences"
        yield make("dpo", 2, start, 60, detail, settings=dpo, preferences=True)
        reverse, deeper = partial(self.relayer, layers[::-1]), partial(self.relayer, [*layers, layers[-1]])
        yield make("exchanged", 2, reverse, (0, short), "the parent's layers in reverse")
        yield make("deepened", 2, deeper, (0, short), "the parent's last layer twice")
        yield make("copy-top1", 3, up(copied, 1), short, "copies, top-1")
        apart = up(partial(dropped, share=0.5, together=False, mixed=True))
        yield make("drop50-apart", 3, apart, short, "shuffled, half of the neurons of each role drawn anew")
        yield make("drop75", 3, up(partial(dropped, share=0.75)), short, "75% drawn anew", settings=base)
        yield make("shared-copy", 3, self.with_copies, short, "parent as the shared expert, and copies")
        start, detail = partial(self.load, f"copy-long-{long}"), "copy-long trained on with other text"
        yield make("copy-tuned", 3, start, 200, detail, corpus=other)
        yield make("copy-random", 3, self.route_randomly, short, "copies, random routing")

    def granular(self, settings: Settings) -> Iterator[Run]:
        """Every copy cut in the same slices, in both orders."""
        width = self.family.shape.intermediate
        shapes = [(8, 16), (8, 32), (8, 64), (16, 32), (16, 64), (16, 128), (8, 128)]
        shapes = [(s, e) for s, e in shapes if width // s >= 16 and e * width // s <= 4096]
        for place, (pieces, experts) in enumerate(self.draw.sample(shapes, min(3, len(shapes)))):
            for second, order in enumerate(("blocks", "turns") if place % 2 else ("turns", "blocks")):
                cut_all = partial(cut, copies=experts // pieces, pieces=pieces, mixed=False)
                start = self.from_parent(cut_all, pieces, pieces, order == "turns")
                rule = {"turns": "slice * copies + copy", "blocks": "copy * slices + slice"}[order]
                extra = {"slices": pieces, "copies": experts // pieces, "order": order}
                more = {"settings": settings, "name": f"granular-S{pieces}E{experts}-{order}", "extra": extra}
                tier = 3 if second else 2 if place else 1
                yield self.made("granular", tier, start, (0, 150), f"S = {pieces}, e = {rule}", **more)

    def from_parent(
        self, make: Callable[[Matrices], Matrices], top_k: int = 2, pieces: int = 1, turns: bool = False
    ) -> Callable[[], Model]:
        def start() -> Model:
            model = upcycle(self.load("parent"), make, top_k, pieces)
            return reorder_experts(model, in_turns(model.shape.experts, pieces)) if turns else model

        return start

    def with_slices(self) -> Model:
        copies = max(2, self.family.experts // 2)
        parent = self.load("parent")
        return self.with_shared(parent, upcycle(parent, lambda dense: drop(cut(dense, copies, 2, True), 0.5), 2, 2))

    def with_copies(self) -> Model:
        parent = self.load("parent")
        return self.with_shared(parent, upcycle(parent, partial(copy, experts=self.family.experts)))

    def with_shared(self, parent: Model, model: Model) -> Model:
        """The parent's feed-forward beside the routed experts, all at half their size."""
        result = load_state(Model(replace(model.shape, shared=parent.shape.intermediate)), model)
        for experts, dense in zip(result.layers(), parent.layers(), strict=True):
            set_matrices(experts.shared, get_matrices(dense))
            experts.down.data *= 0.5
            experts.shared.down.data *= 0.5
        return result

    def from_two(self, turns: bool) -> Model:
        count = self.family.experts
        first, others = upcycle(self.load("parent"), partial(copy, experts=count)), self.load("parent-b").layers()
        chosen = torch.arange(count) % 2 == 1 if turns else torch.arange(count) >= count // 2
        for experts, other in zip(first.layers(), others, strict=True):
            for role, matrix in get_matrices(other).items():
                getattr(experts, role).data[chosen] = matrix
        return first

    def branch(self) -> Model:
        count, parent, settings = min(8, self.family.experts), self.load("parent"), self.family.settings
        branches = [load_state(Model(parent.shape), parent) for _ in range(count)]
        for number, (one, part) in enumerate(zip(branches, self.text.chunk(count), strict=True)):
            train(one, replace(settings, rate=0.5 * settings.rate), part, 80, number)
        states = [one.state_dict() for one in branches]
        parent.load_state_dict({key: torch.stack([state[key] for state in states]).mean(dim=0) for key in states[0]})
        model = upcycle(parent, partial(copy, experts=count))
        for number, experts in enumerate(model.layers()):
            found = [get_matrices(one.layers()[number]) for one in branches]
            set_matrices(experts, {role: torch.cat([one[role] for one in found]) for role in ROLES})
        return model

    def grow(self, turns: bool) -> Model:
        small = self.load(f"native-{self.family.native_steps}")
        count = small.shape.experts
        order = torch.arange(2 * count) % count if turns else torch.arange(2 * count) // 2
        model = load_state(Model(replace(small.shape, experts=2 * count)), small, experts=False)
        for experts, source in zip(model.layers(), small.layers(), strict=True):
            set_matrices(experts, {role: matrix[order] for role, matrix in get_matrices(source).items()})
            router = source.router.data[order]
            experts.router.data = router + 0.1 * router.std() * torch.randn(router.shape)
        return model

    def relayer(self, order: list[int]) -> Model:
        parent = self.load("parent")
        result = load_state(Model(replace(parent.shape, layers=len(order))), parent)
        for block, source in zip(result.blocks, order, strict=True):
            block.load_state_dict(parent.blocks[source].state_dict())
        return upcycle(result, partial(copy, experts=self.family.experts))

    def route_randomly(self) -> Model:
        model = upcycle(self.load("parent"), partial(copy, experts=self.family.experts))
        return load_state(Model(replace(model.shape, routing="random")), model)


def as_marks(steps: int | tuple[int, ...]) -> tuple[int, ...]:
    return (steps,) if isinstance(steps, int) else steps


def drop_copies(dense: Matrices, count: int, share: float, together: bool = True, mixed: bool = False) -> Matrices:
    found = copy(dense, count)
    return drop(shuffle(found) if mixed else found, share, together)


def make_noise(shape: Shape, way: str) -> Model:
    model = Model(shape)
    for experts in model.layers():
        for weight in (experts.gate, experts.up, experts.down):
            if weight is None:
                continue
            scale = weight.shape[2] ** -0.5
            if way == "uniform":
                weight.data.uniform_(-scale, scale)
            elif way == "orthogonal":
                for matrix in weight.data:
                    nn.init.orthogonal_(matrix)
            elif way == "heavy-tailed":
                weight.data *= torch.randn(weight.shape).exp()
    return model


def begin_alike(shape: Shape) -> Model:
    model = Model(shape)
    for experts in model.layers():
        set_matrices(experts, {role: m[:1].repeat(len(m), 1, 1) for role, m in get_matrices(experts).items()})
    return model


def add_adapters(model: Model, rank: int) -> None:
    """Adapters for every expert; nothing else is trained but the routers."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "router" in name
    for experts in model.layers():
        experts.adapters = nn.ParameterDict()
        for role in ROLES:
            count, out, inner = getattr(experts, role).shape
            experts.adapters[f"{role}_a"] = nn.Parameter(torch.randn(count, rank, inner) * inner**-0.5)
            experts.adapters[f"{role}_b"] = nn.Parameter(torch.zeros(count, out, rank))


def parse_families(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Train tiny mixtures of known history.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--families", type=parse_families, default=list(range(24)), help="such as 0-9 or 0,2,4")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no training after this time")
    parser.add_argument("--tier", type=int, default=3, help="0: parents; 1: cheap kinds, too; 2: most; 3: all")
    given = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    for first in range(0, len(given.families), ROUND):
        plans = []
        for number in given.families[first : first + ROUND]:
            maker = Maker(make_family(number), given.out)
            plans.append((maker, maker.plan()))
        for stage in ((0, 1), (2,), (3,)):
            for maker, run in ((maker, run) for maker, plan in plans for run in plan):
                if run.tier in stage and run.tier <= given.tier:
                    if time.monotonic() - started > 60 * given.minutes:
                        print("Out of time; run it again to go on.")
                        return
                    maker.make(run)
    print("All there.")


if __name__ == "__main__":
    main()
