"""Train a zoo of tiny mixtures of experts whose history is known.

    python experiments/02_training_history/zoo.py OUT [--seed N ...]

Each seed is one family: a dense parent, natives, and the parent upcycled in every scheme, each saved at several lengths
of training. Seeds from 10 on are natives alone, of the same families with other draws. Two families have a copy and a
native that are trained for very long and hot. A family has its own size, number of experts, corpus, optimiser and
learning rates (FAMILIES). Checkpoints are bfloat16 in Mixtral's names, OUT/seed/scheme-step/; OUT/seed/log.json has
steps, rates and losses. What was saved already is not trained again.

Corpora come with pinned packages: the interpreter's standard library (.py), and the C++ headers of torch. Needs torch
and safetensors.
"""

import argparse
import hashlib
import json
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

CONTEXT, BATCH = 128, 8
DENSE, LONG, SHORT, NATIVE, BRANCH = 1000, 1300, 400, 2300, 120
LONGEST, LONGEST_OF = 8000, (0, 6)  # steps at the parent's peak rate, and of which seeds
WARMUP, BALANCE, CLIP, WEIGHT_DECAY = 40, 0.01, 1.0, 0.1
MILD, MEDIUM, HOT = 0.1, 0.4, 1.0  # of the dense parent's peak rate
EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Family:
    """What one seed stands for; `rate` is the peak learning rate of the dense parent."""

    hidden: int
    intermediate: int
    layers: int
    experts: int
    corpus: str
    optimiser: str
    rate: float
    top_k: int = 2


SMALL, MIDDLE, LARGE = (64, 128, 2), (96, 192, 3), (128, 256, 4)
FAMILIES = [
    Family(*SMALL, 8, "python", "adamw", 4e-3),
    Family(*SMALL, 4, "c++", "lion", 6e-4),
    Family(*MIDDLE, 8, "c++", "adamw", 3e-3),
    Family(*SMALL, 16, "python", "adamw", 4e-3),
    Family(*LARGE, 8, "python", "adamw", 2e-3),
    Family(*MIDDLE, 8, "python", "lion", 5e-4),
    Family(*SMALL, 8, "c++", "adamw", 6e-3),
    Family(*MIDDLE, 4, "python", "adamw", 3e-3),
    Family(*SMALL, 16, "c++", "lion", 6e-4),
    Family(*LARGE, 4, "c++", "adamw", 2e-3),
]

# ---------------------------------------------------------------------------------------------------------------------
# Text


def read_corpus(name: str) -> tuple[Tensor, Tensor]:
    """Training and validation bytes; every 20th file by the sha1 of its name validates."""
    root = Path(sysconfig.get_path("stdlib")) if name == "python" else Path(torch.__file__).parent / "include"
    pattern = "*.py" if name == "python" else "*.h"
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob(pattern))
    parts: dict[str, list[bytes]] = {"train": [], "validation": []}
    for file in names:
        if not EXCLUDED.intersection(file.split("/")):
            held_out = int(hashlib.sha1(file.encode()).hexdigest(), 16) % 20 == 0
            parts["validation" if held_out else "train"].append((root / file).read_bytes())
    train, validation = (
        torch.tensor(bytearray(b"".join(text)[:12_000_000]), dtype=torch.uint8) for text in parts.values()
    )
    return train, validation


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
        self.heads = hidden // 32
        self.q, self.k, self.v, self.o = (linear(hidden, hidden) for _ in range(4))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = (layer(x).view(batch, length, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(rotate(q, rotary), rotate(k, rotary), v, is_causal=True)
        return self.o(out.transpose(1, 2).reshape(batch, length, hidden))


class Experts(nn.Module):
    """Routed experts, [experts, out, in]; a dense feed-forward is one expert without a router."""

    def __init__(self, experts: int, intermediate: int, hidden: int, top_k: int, tied: int = 1) -> None:
        super().__init__()
        self.top_k, self.tied = top_k, tied
        self.gate = nn.Parameter(torch.randn(experts, intermediate, hidden) * hidden**-0.5)
        self.up = nn.Parameter(torch.randn(experts, intermediate, hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, intermediate) * intermediate**-0.5)
        self.router = nn.Parameter(torch.randn(experts, hidden) * 0.02) if experts > 1 else None
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        if self.router is None:
            return self.run(x, 0)
        flat = x.reshape(-1, x.shape[-1])
        shares = (flat @ self.router.T).softmax(dim=-1)
        top, chosen = shares.topk(self.top_k, dim=-1)
        top = top / top.sum(dim=-1, keepdim=True)
        count = len(self.router)
        load = F.one_hot(chosen, count).float().sum(dim=1).mean(dim=0)
        self.balance = count * (load * shares.mean(dim=0)).sum()
        out = torch.zeros_like(flat)
        for expert in range(count):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            if len(token):
                out = out.index_add(0, token, self.run(flat[token], expert) * top[token, slot, None])
        return out.view_as(x)

    def run(self, x: Tensor, expert: int) -> Tensor:
        inner = F.silu(x @ self.gate[expert].T) * (x @ self.up[expert].T)
        return inner @ self.down[expert].T


class Block(nn.Module):
    def __init__(self, hidden: int, experts: Experts) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(hidden), Norm(hidden)
        self.attention, self.experts = Attention(hidden), experts

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.norm1(x), rotary)
        return x + self.experts(self.norm2(x))


class Model(nn.Module):
    def __init__(self, hidden: int, layers: list[Experts]) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, hidden)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(hidden, experts) for experts in layers)
        self.norm, self.head = Norm(hidden), linear(256, hidden)
        angles = torch.outer(torch.arange(CONTEXT), 10000.0 ** -(torch.arange(0, 32, 2) / 32))
        self.rotary = (angles.cos().repeat(1, 2), angles.sin().repeat(1, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.rotary)
        return self.head(self.norm(x))


def linear(out: int, inner: int) -> nn.Linear:
    layer = nn.Linear(inner, out, bias=False)
    nn.init.normal_(layer.weight, std=inner**-0.5)
    return layer


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Lion(torch.optim.Optimizer):
    """Chen et al., Symbolic Discovery of Optimization Algorithms, 2023: the sign of an interpolated momentum."""

    def __init__(self, parameters: Iterator[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(momentum.lerp(p.grad, 0.1).sign_(), alpha=-group["lr"])
                momentum.lerp_(p.grad, 0.01)


def train(
    model: Model,
    family: Family,
    corpus: Tensor,
    steps: int,
    rate: float,
    seed: int,
    marks: dict[int, Callable[[], None]] | None = None,
    constant: bool = False,
) -> None:
    """Train in place, calling a mark at its step; warm-up, then a cosine to a tenth, or a constant rate."""
    draw = torch.Generator().manual_seed(seed)
    parameters = list(model.parameters())
    if family.optimiser == "lion":
        optimiser: torch.optim.Optimizer = Lion(iter(parameters), rate, 10 * WEIGHT_DECAY)
    else:
        optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    model.train()
    for step in range(steps):
        share = min(1.0, (step + 1) / WARMUP)
        if not constant:
            share *= 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate * share
        starts = torch.randint(0, len(corpus) - CONTEXT - 1, (BATCH, 1), generator=draw)
        windows = corpus[starts + torch.arange(CONTEXT + 1)].long()
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        for block in model.blocks:
            if block.experts.router is not None:
                loss = loss + BALANCE * block.experts.balance
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimiser.step()
        if marks and step + 1 in marks:
            marks[step + 1]()
            model.train()


@torch.no_grad()
def validate(model: Model, corpus: Tensor) -> float:
    model.eval()
    starts = torch.linspace(0, len(corpus) - CONTEXT - 2, 256).long()[:, None]
    windows = corpus[starts + torch.arange(CONTEXT + 1)].long()
    total = sum(
        F.cross_entropy(model(chunk[:, :-1]).flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").item()
        for chunk in windows.split(64)
    )
    return total / (len(windows) * CONTEXT)


def save(model: Model, folder: Path) -> None:
    """bfloat16 in Mixtral's names, or Llama's for a dense model."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"model.embed_tokens.weight": model.embed.weight, "lm_head.weight": model.head.weight}
    tensors["model.norm.weight"] = model.norm.weight
    experts = model.blocks[0].experts
    for number, block in enumerate(model.blocks):
        prefix = f"model.layers.{number}."
        tensors[f"{prefix}input_layernorm.weight"] = block.norm1.weight
        tensors[f"{prefix}post_attention_layernorm.weight"] = block.norm2.weight
        for name in "qkvo":
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = getattr(block.attention, name).weight
        if block.experts.router is None:
            for name in ("gate", "up", "down"):
                tensors[f"{prefix}mlp.{name}_proj.weight"] = getattr(block.experts, name)[0]
            continue
        tensors[f"{prefix}block_sparse_moe.gate.weight"] = block.experts.router
        for name, short in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            for expert, matrix in enumerate(getattr(block.experts, name)):
                tensors[f"{prefix}block_sparse_moe.experts.{expert}.{short}.weight"] = matrix
    dense = experts.router is None
    config = {
        "architectures": ["LlamaForCausalLM" if dense else "MixtralForCausalLM"],
        "model_type": "llama" if dense else "mixtral",
        "vocab_size": 256,
        "hidden_size": experts.gate.shape[2],
        "intermediate_size": experts.gate.shape[1],
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.blocks[0].attention.heads,
        "num_key_value_heads": model.blocks[0].attention.heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if not dense:
        config |= {"num_local_experts": len(experts.router), "num_experts_per_tok": experts.top_k}
    saved = {name: tensor.detach().to(torch.bfloat16).clone().contiguous() for name, tensor in tensors.items()}
    save_file(saved, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "model.safetensors.tmp").rename(folder / "model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Upcycling: one layer's dense matrices -> its experts'

Matrices = dict[str, Tensor]  # gate and up [n, intermediate, hidden], down [n, hidden, intermediate]
AXIS = {"gate": 1, "up": 1, "down": 2}  # where the neurons are


def copies(dense: Matrices, experts: int, draw: torch.Generator) -> Matrices:
    return {role: matrix.repeat(experts, 1, 1) for role, matrix in dense.items()}


def shuffled(found: Matrices, draw: torch.Generator) -> Matrices:
    """Every expert's neurons in an order of its own: the same function."""
    result = {role: matrix.clone() for role, matrix in found.items()}
    for expert in range(len(found["gate"])):
        order = torch.randperm(found["gate"].shape[1], generator=draw)
        for role, matrix in result.items():
            matrix[expert] = found[role][expert].index_select(AXIS[role] - 1, order)
    return result


def noisy(found: Matrices, draw: torch.Generator, share: float = 0.5) -> Matrices:
    return {
        role: matrix + share * matrix.std() * torch.randn(matrix.shape, generator=draw)
        for role, matrix in found.items()
    }


def dropped(found: Matrices, share: float, draw: torch.Generator, together: bool = True) -> Matrices:
    """A share of each expert's neurons drawn anew with the mean and deviation of those that they replace.

    `together` redraws gate, up and down of the same neurons; else each has its own, as in the published code.
    """
    result = {role: matrix.clone() for role, matrix in found.items()}
    for expert in range(len(found["gate"])):
        size = found["gate"].shape[1]
        common = torch.randperm(size, generator=draw)[: round(share * size)]
        for role, matrix in result.items():
            chosen = common if together else torch.randperm(size, generator=draw)[: round(share * size)]
            old = matrix[expert].index_select(AXIS[role] - 1, chosen)
            new = old.mean() + old.std() * torch.randn(old.shape, generator=draw)
            matrix[expert].index_copy_(AXIS[role] - 1, chosen, new)
    return result


def slices(dense: Matrices, experts: int, draw: torch.Generator, mixed: bool, pieces: int) -> Matrices:
    """The dense layer cut into `pieces`, as many copies of it as there are experts for; `mixed` shuffles each copy
    before the cut."""
    cut: dict[str, list[Tensor]] = {role: [] for role in dense}
    for _ in range(experts // pieces):
        whole = shuffled(dense, draw) if mixed else dense
        for role, matrix in whole.items():
            cut[role] += list(matrix[0].chunk(pieces, dim=AXIS[role] - 1))
    scale = {"gate": 1.0, "up": 1.0, "down": float(pieces)}
    return {role: scale[role] * torch.stack(found) for role, found in cut.items()}


def redrawn(dense: Matrices, experts: int, draw: torch.Generator) -> Matrices:
    """Every weight anew: nothing of the parent is left in the experts."""
    return dropped(copies(dense, experts, draw), 1.0, draw)


SCHEMES: dict[str, Callable[[Matrices, int, torch.Generator], Matrices]] = {
    "copy": copies,
    "noise": lambda dense, n, draw: noisy(copies(dense, n, draw), draw),
    "shuffle": lambda dense, n, draw: shuffled(copies(dense, n, draw), draw),
    "shuffle-noise": lambda dense, n, draw: noisy(shuffled(copies(dense, n, draw), draw), draw),
    "drop25": lambda dense, n, draw: dropped(copies(dense, n, draw), 0.25, draw),
    "drop50": lambda dense, n, draw: dropped(copies(dense, n, draw), 0.5, draw),
    "drop75": lambda dense, n, draw: dropped(copies(dense, n, draw), 0.75, draw),
    "drop50-apart": lambda dense, n, draw: dropped(shuffled(copies(dense, n, draw), draw), 0.5, draw, together=False),
    "slice": lambda dense, n, draw: slices(dense, n, draw, False, pieces(n)),
    "slice-shuffle": lambda dense, n, draw: slices(dense, n, draw, True, pieces(n)),
    "slice-shuffle-drop50": lambda dense, n, draw: dropped(slices(dense, n, draw, True, pieces(n)), 0.5, draw),
    "split": lambda dense, n, draw: slices(dense, n, draw, False, n),
    "redrawn": redrawn,
}


def pieces(experts: int) -> int:
    """Half as many slices as experts, four at most: each neuron is in two experts or more."""
    return min(4, experts // 2)


def upcycle(parent: Model, family: Family, scheme: str, draw: torch.Generator) -> Model:
    layers = []
    for block in parent.blocks:
        dense = {role: getattr(block.experts, role).detach() for role in ("gate", "up", "down")}
        found = SCHEMES[scheme](dense, family.experts, draw)
        cut = "slice" in scheme or scheme == "split"
        top_k = min(family.experts, family.top_k * (2 if cut else 1))
        experts = Experts(family.experts, found["gate"].shape[1], family.hidden, top_k)
        for role, matrix in found.items():
            getattr(experts, role).data = matrix.clone()
        layers.append(experts)
    return copy_trunk(parent, Model(family.hidden, layers))


def copy_trunk(source: Model, target: Model) -> Model:
    """Everything but the experts."""
    state = {name: value for name, value in source.state_dict().items() if ".experts." not in name}
    target.load_state_dict(state, strict=False)
    return target


# ---------------------------------------------------------------------------------------------------------------------
# One family


def plan(seed: int) -> list[tuple[str, str, float, int, bool]]:
    """(name, scheme, share of the parent's rate, steps, constant rate): lengths and rates turn with the seed."""
    runs = [
        ("copy", "copy", MEDIUM, LONG, False),
        ("copy-hot", "copy", HOT, LONG, True),
        ("copy-mild", "copy", MILD, SHORT, True),
    ]
    others = [name for name in SCHEMES if name != "copy"]
    for place, scheme in enumerate(others):
        rate = (MILD, MEDIUM, HOT)[(place + seed) % 3]
        runs.append((scheme, scheme, rate, LONG if (place + seed) % 4 == 0 else SHORT, False))
    return runs


def make_family(seed: int, out: Path) -> None:
    family = FAMILIES[seed % len(FAMILIES)]
    folder = out / f"{seed:02d}"
    log_file = folder / "log.json"
    log = json.loads(log_file.read_text()) if log_file.exists() else {"family": asdict(family), "checkpoints": {}}
    train_bytes, validation = read_corpus(family.corpus)
    started = time.perf_counter()

    def mark(model: Model, name: str, step: int, **facts: object) -> Callable[[], None]:
        def write() -> None:
            save(model, folder / f"{name}-{step}")
            loss = validate(model, validation)
            log["checkpoints"][f"{name}-{step}"] = {"steps": step, "loss": round(loss, 4), **facts}
            log_file.write_text(json.dumps(log, indent=1) + "\n")
            print(f"{seed:02d} {time.perf_counter() - started:6.0f} s  {name}-{step}  loss {loss:.3f}", flush=True)

        return write

    def run(model: Model, name: str, steps: int, rate: float, marks: tuple[int, ...], constant: bool = False, **facts):
        facts |= {"rate": rate, "constant": constant}
        if f"{name}-{steps}" in log["checkpoints"]:
            return
        if 0 in marks:
            mark(model, name, 0, **facts)()
        written = {step: mark(model, name, step, **facts) for step in marks if step}
        train(model, family, train_bytes, steps, rate, 1000 * seed + len(name), written, constant)

    def native(name: str, init: int, rate: float, marks: tuple[int, ...] = (0, SHORT, DENSE, NATIVE), **facts) -> None:
        torch.manual_seed(init)
        layers = [
            Experts(family.experts, family.intermediate, family.hidden, family.top_k) for _ in range(family.layers)
        ]
        run(Model(family.hidden, layers), name, marks[-1], rate, marks, **{"scheme": "native", **facts})

    folder.mkdir(parents=True, exist_ok=True)
    if seed >= len(FAMILIES):
        native("native", 500 + seed, family.rate, (SHORT, DENSE, NATIVE))
        return
    torch.manual_seed(seed)
    state_file = folder / "parent.pt"
    parent = Model(family.hidden, [Experts(1, family.intermediate, family.hidden, 1) for _ in range(family.layers)])
    if state_file.exists():
        parent.load_state_dict(torch.load(state_file))
    else:
        train(parent, family, train_bytes, DENSE, family.rate, seed)
        mark(parent, "parent", DENSE, scheme="dense", rate=family.rate)()
        torch.save(parent.state_dict(), state_file)
    native("native", 500 + seed, family.rate)
    native("native-b", 900 + seed, 0.5 * family.rate)
    if seed in LONGEST_OF:
        torch.manual_seed(700 + seed)
        model = upcycle(parent, family, "copy", torch.Generator().manual_seed(seed))
        marks = tuple(LONGEST * share // 16 for share in (1, 2, 4, 8, 16))
        run(model, "copy-longest", LONGEST, family.rate, marks, constant=True, scheme="copy-longest")
        length = LONGEST + DENSE
        native("native-longest", 800 + seed, family.rate, (length,), constant=True, scheme="native-longest")
    torch.manual_seed(100 + seed)  # of the routers
    draw = torch.Generator().manual_seed(seed)
    for name, scheme, share, steps, constant in plan(seed):
        model = upcycle(parent, family, scheme, draw)
        marks = (0, 50, SHORT) if steps == SHORT else (0, SHORT, LONG)
        run(model, name, steps, share * family.rate, marks, constant, scheme=scheme)
    if f"btx-{SHORT}" not in log["checkpoints"]:
        branches = []
        for expert, part in enumerate(train_bytes.chunk(family.experts)):
            branch = Model(family.hidden, [Experts(1, family.intermediate, family.hidden, 1) for _ in parent.blocks])
            branch.load_state_dict(parent.state_dict())
            train(branch, family, part, BRANCH, 0.5 * family.rate, 77 * seed + expert)
            branches.append(branch)
        model = upcycle(parent, family, "copy", draw)
        for number, block in enumerate(model.blocks):
            for role in ("gate", "up", "down"):
                own = [getattr(branch.blocks[number].experts, role)[0].detach() for branch in branches]
                getattr(block.experts, role).data = torch.stack(own)
        mean = {k: torch.stack([b.state_dict()[k] for b in branches]).mean(dim=0) for k in parent.state_dict()}
        parent_of_all = Model(family.hidden, [Experts(1, family.intermediate, family.hidden, 1) for _ in parent.blocks])
        parent_of_all.load_state_dict(mean)
        run(copy_trunk(parent_of_all, model), "btx", SHORT, MEDIUM * family.rate, (0, 50, SHORT), scheme="btx")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the zoo.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, action="append", help="train these families only")
    given = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are tiny, and one thread always sums in the same order
    for seed in given.seed or range(len(FAMILIES)):
        make_family(seed, given.out)


if __name__ == "__main__":
    main()
