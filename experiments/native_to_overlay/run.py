"""Can a natively trained mixture be turned into an overlay afterwards, and at what loss?

    python experiments/native_to_overlay/run.py ZOO      # writes results.json beside this file

Natives, and upcycled models as a control, are put into several forms of equal expert bytes: base and low-rank deltas,
the same after matching the neurons of all experts, a plain SVD of each expert, and plain quantisation. Some are then
trained on in their form ("healed"), beside the original that is trained on as long.

ZOO is the folder of experiments/02_training_history/zoo.py; of its checkpoints, those that are needed and missing are
trained and saved there. Models that results.json has already are not measured again. Needs this package, torch and
safetensors.
"""

import argparse
import copy
import json
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils import parametrize

import chuk_lazarus
from chuk_lazarus.introspection.moe.numerics.low_rank import factorise
from chuk_lazarus.introspection.moe.numerics.spectra import energy_spectrum
from chuk_lazarus.introspection.moe.overlays.allocation import allocate
from chuk_lazarus.introspection.moe.overlays.curves import RateCurve
from chuk_lazarus.introspection.moe.overlays.quantisation import quantised_bytes, round_to_bits

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "02_training_history"))

import zoo  # noqa: E402
from zoo import FAMILIES, Matrices  # noqa: E402

DEMO = Path(chuk_lazarus.__file__).parent / "demo"
ROLES = {"gate": "w1", "up": "w3", "down": "w2"}

# History, and pretraining in steps of zoo.BATCH windows; the demo models' steps had twice as many.
MODELS = {
    "demo:native": ("native", 2 * 1500),
    "00/native-2300": ("native", zoo.NATIVE),
    "03/native-2300": ("native", zoo.NATIVE),
    "demo:upcycled": ("upcycled", 2 * (1000 + 500)),
    "00/copy-1300": ("upcycled", zoo.DENSE + zoo.LONG),
}
FAMILY = FAMILIES[0]  # of the optimiser and the peak rate, for all models
# By history: a model of no table on which the rates are chosen, and those that are tried for the original and for
# overlays of a half and of a quarter of the bytes, as shares of the peak rate.
TUNING: dict[str, tuple[str, dict[str, tuple[float, ...]]]] = {
    "native": ("00/native-b-2300", {"original": (0.05, 0.1, 0.25), "1/2": (0.25, 0.5, 1.0), "1/4": (0.5, 1.0, 2.0)}),
    "upcycled": ("03/copy-1300", {"original": (0.05, 0.1, 0.25), "1/2": (0.1, 0.25, 0.5), "1/4": (0.1, 0.25, 0.5)}),
}
TUNING_STEPS = zoo.NATIVE  # as many as the pretraining of both
SEED = 7

SHORT, LONG = 0.05, 0.25  # trained on, as shares of the pretraining
HALF, QUARTER, BASE_ONLY = 0.5, 0.25, 0.0
ARMS: list[tuple[str, float, tuple[float, ...]]] = [  # form, share of the expert bytes, how long it is trained on
    ("mean", HALF, (0.0, SHORT, LONG)),
    ("mean", QUARTER, (0.0, SHORT, LONG)),
    ("mean", BASE_ONLY, (0.0, LONG)),
    ("aligned", HALF, (0.0,)),
    ("aligned", QUARTER, (0.0, LONG)),
    ("aligned", BASE_ONLY, (0.0,)),
    ("svd", HALF, (0.0,)),
    ("svd", QUARTER, (0.0, LONG)),
    ("redrawn", QUARTER, (LONG,)),
]
BITS = (7, 4, 3, 2)  # 7 and 3 are the most that fit into a half and a quarter


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


class Experts(zoo.Experts):
    """Experts whose matrices may be put together from factors: once for a forward pass, not once for each expert."""

    def forward(self, x: Tensor) -> Tensor:
        with parametrize.cached():
            return super().forward(x)


def load(folder: Path) -> zoo.Model:
    """A Mixtral checkpoint, in float32."""
    config = json.loads((folder / "config.json").read_text())
    stored = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    count, hidden = config["num_local_experts"], config["hidden_size"]
    sizes = (count, config["intermediate_size"], hidden, config["num_experts_per_tok"])
    model = zoo.Model(hidden, [Experts(*sizes) for _ in range(config["num_hidden_layers"])])
    state = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    for layer, block in enumerate(model.blocks):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        block.attention.heads = config["num_attention_heads"]
        state |= {f"{ours}attention.{name}": f"{theirs}self_attn.{name}_proj" for name in "qkvo"}
        state |= {f"{ours}norm1": f"{theirs}input_layernorm", f"{ours}norm2": f"{theirs}post_attention_layernorm"}
    weights = {f"{ours}.weight": stored[f"{theirs}.weight"] for ours, theirs in state.items()}
    for layer in range(len(model.blocks)):
        moe = f"model.layers.{layer}.block_sparse_moe."
        weights[f"blocks.{layer}.experts.router"] = stored[f"{moe}gate.weight"]
        for role, name in ROLES.items():
            found = [stored[f"{moe}experts.{expert}.{name}.weight"] for expert in range(count)]
            weights[f"blocks.{layer}.experts.{role}"] = torch.stack(found)
    model.load_state_dict(weights)
    width = hidden // config["num_attention_heads"]
    angles = torch.outer(torch.arange(zoo.CONTEXT), config["rope_theta"] ** -(torch.arange(0, width, 2) / width))
    model.rotary = (angles.cos().repeat(1, 2), angles.sin().repeat(1, 2))
    return model


def checkpoint(name: str, folder: Path) -> Path:
    """A demo model's folder, or a zoo model's, which is trained as in zoo.py if it isn't there."""
    if name.startswith("demo:"):
        return DEMO / name.removeprefix("demo:")
    path = folder / name
    if not (path / "model.safetensors").exists():
        seed, kind = int(name.split("/")[0]), name.split("/")[1].rpartition("-")[0]
        zoo.save(train_anew(seed, kind), path)
    return path


def train_anew(seed: int, kind: str) -> zoo.Model:
    """The model that zoo.make_family trains under this name: same seeds, steps and rates."""
    family = FAMILIES[seed]
    corpus, _ = zoo.read_corpus(family.corpus)

    def new(experts: int) -> zoo.Model:
        sizes = (experts, family.intermediate, family.hidden, family.top_k)
        return zoo.Model(family.hidden, [zoo.Experts(*sizes) for _ in range(family.layers)])

    match kind:
        case "native" | "native-b":
            torch.manual_seed((500 if kind == "native" else 900) + seed)
            model, steps = new(family.experts), zoo.NATIVE
            rate = family.rate * (1.0 if kind == "native" else 0.5)
        case "copy":
            torch.manual_seed(seed)
            parent = new(1)
            zoo.train(parent, family, corpus, zoo.DENSE, family.rate, seed)
            torch.manual_seed(100 + seed)
            model = zoo.upcycle(parent, family, "copy", torch.Generator())
            steps, rate = zoo.LONG, zoo.MEDIUM * family.rate
        case _:
            raise ValueError(f"{kind} is not trained here")
    zoo.train(model, family, corpus, steps, rate, 1000 * seed + len(kind))
    return model


def matrices(experts: zoo.Experts) -> Matrices:
    return {role: getattr(experts, role).detach() for role in ROLES}


def changed(model: zoo.Model, change: Callable[[Matrices], Matrices]) -> zoo.Model:
    """A copy with other experts."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        for role, found in change(matrices(block.experts)).items():
            getattr(block.experts, role).data = found
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Forms


def aligned(found: Matrices) -> Matrices:
    """Every expert's neurons in the order and with the signs that bring the experts nearest to each other: the same
    function.

    Weight matching (Ainsworth et al., Git Re-Basin, 2023): the assignment to a reference with the least distance. The
    reference is expert 0, and then, until no neuron moves, the mean of the other experts. A gated neuron computes the
    same if its up row and its down column change their signs together.
    """
    found = {role: matrix.clone() for role, matrix in found.items()}
    count = len(found["gate"])
    moved, reference = True, {role: matrix[0].clone() for role, matrix in found.items()}
    for attempt in range(100):
        if not moved:
            break
        moved = False
        for expert in range(count):
            own = {role: matrix[expert].clone() for role, matrix in found.items()}
            if attempt:
                reference = {role: matrix.sum(dim=0) - matrix[expert] for role, matrix in found.items()}
            signed = reference["up"] @ own["up"].T + reference["down"].T @ own["down"]
            likeness = reference["gate"] @ own["gate"].T + signed.abs()
            places, order = (torch.from_numpy(axis) for axis in linear_sum_assignment(likeness, maximize=True))
            sign = torch.where(signed[places, order] < 0, -1.0, 1.0)
            found["gate"][expert] = own["gate"][order]
            found["up"][expert] = sign[:, None] * own["up"][order]
            found["down"][expert] = own["down"][:, order] * sign
            moved = moved or not (torch.equal(places, order) and bool((sign > 0).all()))
    return found


def rotated(found: Matrices) -> Matrices:
    """Every expert turned in a random direction of its own, so that no two share a neuron: what chance gives."""
    hidden = found["gate"].shape[2]
    draw = torch.Generator().manual_seed(SEED)
    turns = torch.linalg.qr(torch.randn(len(found["gate"]), hidden, hidden, generator=draw)).Q
    return {"gate": found["gate"] @ turns, "up": found["up"] @ turns, "down": turns.mT @ found["down"]}


def redrawn(found: Matrices) -> Matrices:
    """Random experts of the same mean and deviation: healing them is training them."""
    return zoo.dropped(found, 1.0, torch.Generator().manual_seed(SEED))


class LowRank(nn.Module):
    """Experts [experts, out, in] as factors of their deltas from a base, their mean; or, without it, of themselves."""

    def __init__(self, rank: int, base: bool) -> None:
        super().__init__()
        self.rank, self.base = rank, base

    def right_inverse(self, experts: Tensor) -> tuple[Tensor, ...]:
        mean = experts.double().mean(dim=0).float() if self.base else torch.zeros_like(experts[0])
        factors = [factorise(delta.numpy(), self.rank) for delta in experts.detach() - mean]
        left, right = (torch.from_numpy(np.stack([getattr(f, side) for f in factors])) for side in ("left", "right"))
        return (left, right, mean) if self.base else (left, right)

    def forward(self, left: Tensor, right: Tensor, base: Tensor | None = None) -> Tensor:
        return left @ right if base is None else base + left @ right


def factored(model: zoo.Model, share: float, base: bool) -> zoo.Model:
    """A copy whose experts are base and factors, or factors, of at most that share of their bytes; rank is spread as
    `moe-overlay-compute --target-ratio` does."""
    model = copy.deepcopy(model)
    choices, budget = {}, 0.0
    for layer, block in enumerate(model.blocks):
        for role, found in matrices(block.experts).items():
            mean = found.mean(dim=0) if base else torch.zeros_like(found[0])
            spectrum = np.sum([energy_spectrum(delta.numpy()) for delta in found - mean], axis=0)
            choices[layer, role] = RateCurve(spectrum, 2 * len(found) * sum(mean.shape))
            budget += 2 * (share * found.numel() - (mean.numel() if base else 0))
    for (layer, role), rank in allocate(choices, budget=budget).items():
        parametrize.register_parametrization(model.blocks[layer].experts, role, LowRank(rank, base))
    return model


def put_into_form(model: zoo.Model, form: str, share: float) -> zoo.Model:
    changes: dict[str, Callable[[Matrices], Matrices]] = {"aligned": aligned, "redrawn": redrawn}
    start = changed(model, changes[form]) if form in changes else model
    return factored(start, share, base=form != "svd")


def quantised(model: zoo.Model, bits: int) -> zoo.Model:
    """A copy with every expert rounded to the nearest of 2^bits levels, in groups of 64."""

    def rounded(found: Matrices) -> Matrices:
        return {
            role: torch.from_numpy(np.stack([round_to_bits(expert.numpy(), bits) for expert in experts]))
            for role, experts in found.items()
        }

    return changed(model, rounded)


def as_stored(model: zoo.Model) -> zoo.Model:
    """A copy with every parameter rounded to bfloat16."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def expert_parameters(model: zoo.Model) -> int:
    names = model.named_parameters()
    return sum(p.numel() for name, p in names if ".experts." in name and not name.endswith("router"))


def quantised_share(model: zoo.Model, bits: int) -> float:
    """The bytes of experts of `bits` per weight over those of two bytes per weight."""
    found = [matrix for block in model.blocks for matrix in matrices(block.experts).values()]
    size = sum(len(matrix) * quantised_bytes(matrix.shape[1:], bits) for matrix in found)
    return size / (2 * expert_parameters(model))


def delta_energy(model: zoo.Model, change: Callable[[Matrices], Matrices] = lambda found: found) -> float:
    """The share of the experts' energy that their mean doesn't hold, over all roles and layers."""
    found = [matrix for block in model.blocks for matrix in change(matrices(block.experts)).values()]
    return float(sum((m - m.mean(dim=0)).square().sum() for m in found) / sum(m.square().sum() for m in found))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


class Bench:
    """Trains models on, and measures them, on one text."""

    def __init__(self) -> None:
        self.training, self.validation = zoo.read_corpus(FAMILY.corpus)

    def loss(self, model: zoo.Model) -> float:
        """Nats per byte, of the weights as a file would hold them."""
        return zoo.validate(as_stored(model), self.validation)

    def heal(self, model: zoo.Model, steps: int, rate: float) -> zoo.Model:
        """A copy, trained on: all parameters, with the same windows in the same order for all models."""
        model = copy.deepcopy(model)
        zoo.train(model, FAMILY, self.training, steps, rate * FAMILY.rate, SEED)
        for block in model.blocks:
            block.experts.balance = torch.zeros(())  # it holds the last step's graph, which can't be copied
        return model

    def try_rates(self, model: zoo.Model, rates: dict[str, tuple[float, ...]]) -> dict[str, Any]:
        """The loss at each rate, of the original and of two overlays, by how long they are trained on."""
        overlays = {"1/2": put_into_form(model, "mean", HALF), "1/4": put_into_form(model, "mean", QUARTER)}
        return {
            kind: {
                f"{length:.0%}": {
                    str(rate): self.loss(self.heal(start, round(length * TUNING_STEPS), rate)) for rate in rates[kind]
                }
                for length in (SHORT, LONG)
            }
            for kind, start in ({"original": model} | overlays).items()
        }

    def measure(self, name: str, model: zoo.Model, tried: dict[str, Any]) -> dict[str, Any]:
        """All arms of one model, trained on at the best of the rates that were tried."""
        _, pretraining = MODELS[name]
        original = self.loss(model)
        rows: list[dict[str, Any]] = []

        def add(form: str, share: float, length: float, loss: float) -> None:
            change = loss / original - 1
            rows.append({"form": form, "bytes": share, "trained_on": length, "loss": loss, "change": change})
            print(f"{name}  {form:17s} {share:6.1%}  on {length:3.0%}  {loss:.4f} {change:+7.1%}", flush=True)

        def trained(start: zoo.Model, length: float, kind: str) -> zoo.Model:
            if not length:
                return start
            losses = tried[kind][f"{length:.0%}"]
            return self.heal(start, round(length * pretraining), float(min(losses, key=losses.__getitem__)))

        for length in (0.0, SHORT, LONG):
            other = as_stored(trained(model, length, "original"))
            add("original", 1.0, length, self.loss(other))
            for bits in BITS if length != SHORT else ():
                rounded = zoo.validate(quantised(other, bits), self.validation)
                add(f"quantised, {bits} bits", quantised_share(other, bits), length, rounded)
        for form, share, lengths in ARMS:
            start = put_into_form(model, form, share)
            for length in lengths:
                size = expert_parameters(start) / expert_parameters(model)
                add(form, size, length, self.loss(trained(start, length, "1/2" if share == HALF else "1/4")))
        return {
            "experts": len(model.blocks[0].experts.router),
            "original_loss": original,
            "aligned_loss": self.loss(changed(model, aligned)),
            "delta_energy": {
                "mean": delta_energy(model),
                "aligned": delta_energy(model, aligned),
                "rotated": delta_energy(model, rotated),
                "rotated, aligned": delta_energy(model, lambda found: aligned(rotated(found))),
            },
            "arms": rows,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn trained mixtures into overlays.")
    parser.add_argument("zoo", type=Path, help="folder of trained checkpoints; missing ones are trained")
    folder = parser.parse_args().zoo
    torch.set_num_threads(1)  # the matrices are tiny, and one thread always sums in the same order
    bench = Bench()
    file = HERE / "results.json"
    results: dict[str, Any] = {
        "seed": SEED,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy")},
        "windows_per_step": zoo.BATCH,
        "peak_rate": FAMILY.rate,
        "rates_tried": {},
        "models": {},
    }
    if file.exists():
        results |= json.loads(file.read_text())
    for history, (name, rates) in TUNING.items():
        if history not in results["rates_tried"]:
            results["rates_tried"][history] = bench.try_rates(load(checkpoint(name, folder)), rates)
            file.write_text(json.dumps(results, indent=2) + "\n")
    for name, (history, _) in MODELS.items():
        if name not in results["models"]:
            tried = results["rates_tried"][history]
            results["models"][name] = bench.measure(name, load(checkpoint(name, folder)), tried)
            file.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
