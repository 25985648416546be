"""What do per-expert biases do to the figures, when they are added to the weights: results.json beside this file.

    python experiments/bias_contamination/run.py

GPT-OSS has a bias for every expert and output, [experts, 2 x intermediate] for gate and up. Here experts of its shape
are drawn at random and written as it is published: MXFP4, gates and ups in turns, biases apart. They are analysed as
they are, and once more from a checkpoint into whose weights the biases were added, row by row. All matrices are square.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import cos, pi, sin, sqrt
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from scipy.optimize import brentq
from scipy.special import ndtri

from chuk_lazarus.introspection.moe import Experts, MoETypeAnalysis, MoETypeService

HERE = Path(__file__).resolve().parent
SEED = 20
EXPERTS = "model.layers.0.mlp.experts"
WEIGHT_RMS = 0.02  # any number would do: all is relative to it
SHARED_BIAS = 0.43  # of a bias's energy, what all experts have in common
BIASES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
TRAINED = {"spread": 0.55, "shared": 0.0173}  # gives the published 48.9 % and 0.017, without any bias
PUBLISHED = {  # layer: 95 % ranks of gate, up and down in matrices of 2880 x 2880, as published
    "0": (1.0, 260.0, 140.7),
    "0, 8 experts": (1.0, 337.0, 206.0),
    "6": (1.0, 1.0, 533.1),
    "12": (1.0, 1.0, 768.0),
    "18": (1.0, 1.0, 436.8),
    "23": (1.0, 3.9, 764.2),
}

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Setup:
    """What is drawn: square experts, with biases of `bias` times the weights' root mean square.

    `spread` is the standard deviation of the logarithms of the inputs' scales (log-normal quantiles), which makes
    spectra fall faster than those of noise; `shared` is the share of the weights' energy that all experts have in
    common.
    """

    experts: int
    size: int
    bias: float
    spread: float = 0.0
    shared: float = 0.0


def draw(setup: Setup) -> tuple[dict[str, Array], dict[str, Array]]:
    """Weights [experts, out, in] and biases [experts, out] of gate, up and down.

    The weights do not depend on the biases' size: two setups that differ in nothing else have the same.
    """
    rng = np.random.default_rng(SEED)
    weights, biases = {}, {}
    for role in ("gate", "up", "down"):
        shape = (setup.experts, setup.size, setup.size)
        weights[role] = mix(rng, shape, setup.shared)
        scales = np.exp(setup.spread * ndtri((np.arange(setup.size) + 0.5) / setup.size))
        weights[role] *= (WEIGHT_RMS * scales / np.sqrt(np.mean(scales**2))).astype(np.float32)
        biases[role] = WEIGHT_RMS * setup.bias * mix(rng, shape[:2], SHARED_BIAS)
    return weights, biases


def mix(rng: np.random.Generator, shape: tuple[int, ...], shared: float) -> Array:
    """Normal numbers, of which those along the first axis have this share of their energy in common."""
    values = rng.standard_normal(shape, np.float32)
    values *= np.float32(sqrt(1 - shared))
    values += np.float32(sqrt(shared)) * rng.standard_normal(shape[1:], np.float32)
    return values


def in_turns(gate: Array, up: Array) -> Array:
    """Gates and ups as GPT-OSS has them: in turns along axis 1."""
    return np.stack([gate, up], axis=2).reshape(len(gate), -1, *gate.shape[2:])


def to_mxfp4(matrices: Array) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Blocks [..., in / 32, 16], low half of a byte first, and scales [..., in / 32], a power of two for 32 numbers."""
    groups = matrices.reshape(*matrices.shape[:-1], -1, 32)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    exponents = np.frexp(np.maximum(largest, 1e-30))[1] - 3  # the largest becomes 4 to 8; the format ends at 6
    scaled = np.clip(np.ldexp(groups, -exponents), -6.0, 6.0)
    codes = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents[..., 0] + 127).astype(np.uint8)


def write_right(folder: Path, setup: Setup) -> str:
    """A checkpoint as GPT-OSS is published: matrices in MXFP4, biases apart."""
    weights, biases = draw(setup)
    tensors: dict[str, NDArray[Any]] = {}
    stored = {
        "gate_up_proj": (in_turns(weights["gate"], weights["up"]), in_turns(biases["gate"], biases["up"])),
        "down_proj": (weights["down"], biases["down"]),
    }
    for name, (matrices, bias) in stored.items():
        encoded = [to_mxfp4(matrix) for matrix in matrices]
        tensors[f"{EXPERTS}.{name}_blocks"] = np.stack([blocks for blocks, _ in encoded])
        tensors[f"{EXPERTS}.{name}_scales"] = np.stack([scales for _, scales in encoded])
        tensors[f"{EXPERTS}.{name}_bias"] = bias.astype(ml_dtypes.bfloat16)
    return write(folder, tensors, setup, {"quantization_config": {"quant_method": "mxfp4"}})


def write_wrong(folder: Path, right: str, setup: Setup) -> str:
    """The same checkpoint, in bfloat16, with every bias added to all weights of its row."""
    layer = Experts.open(right).layer(0)
    found: dict[str, list[NDArray[Any]]] = {role: [] for role in layer.roles}
    for expert in range(layer.count):
        biases = layer.biases(expert)
        for role, matrix in layer.matrices(expert).items():
            found[role].append((matrix + biases[role][:, None]).astype(ml_dtypes.bfloat16))
    gate, up, down = (np.stack(found[role]) for role in ("gate", "up", "down"))
    transposed = {"gate_up_proj": in_turns(gate, up), "down_proj": down}  # in bfloat16 it has [experts, in, out]
    tensors = {f"{EXPERTS}.{name}": np.ascontiguousarray(x.transpose(0, 2, 1)) for name, x in transposed.items()}
    return write(folder, tensors, setup, {})


def write(folder: Path, tensors: dict[str, NDArray[Any]], setup: Setup, more: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    sizes = {"hidden_size": setup.size, "intermediate_size": setup.size, "num_local_experts": setup.experts}
    config = {"model_type": "gpt_oss", "num_hidden_layers": 1, "num_experts_per_tok": 4, **sizes, **more}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def summarise(report: MoETypeAnalysis) -> dict[str, Any]:
    layer = report.layers[0]
    return {
        "rank": {role: one.rank["0.95"] for role, one in layer.projections.items()},
        "rank_ratio": {role: one.rank_ratio for role, one in layer.projections.items()},
        "cosine": layer.cosine.model_dump(),
        "documented_rule": report.documented_rule.model_dump(include={"type", "confidence"}),
        "type": report.type,
        "kept": layer.lineage.kept,
        "storage": report.storage,
    }


def noise_share(angle: float) -> tuple[float, float]:
    """Of a square matrix of noise, the share of the energy and of the number of its largest singular values.

    The Marchenko-Pastur law with m = n: both above eigenvalue 2 + 2 cos(angle), the largest being 4.
    """
    return (angle - sin(angle) * cos(angle)) / pi, (angle - sin(angle)) / pi


def missing_share(ratio: float) -> float:
    """The share of the weights' energy that a 95 % rank has to count besides a term b 1^T, or less than 0 for none.

    `ratio` is the root mean square of b, over that of the weights. The term has s = ratio^2 / (1 + ratio^2) of the
    energy and comes first; (0.95 - s) / (1 - s) of the weights' energy is missing.
    """
    return 0.95 - 0.05 * ratio**2


def expected_rank(size: int, ratio: float) -> float:
    """The 95 % rank of Gaussian weights [size, size] and such a term."""
    wanted = missing_share(ratio)
    if wanted <= 0:
        return 1.0
    angle = brentq(lambda t: noise_share(t)[0] - wanted, 0.0, pi)
    return size * noise_share(angle)[1] + (1.0 if ratio else 0.0)


def own_ratios(model: str) -> Array:
    """By expert: the root mean square of what its gate bias has for itself, over that of its weights as stored.

    The mean of the experts takes the rest, and MXFP4 some of what was drawn.
    """
    layer = Experts.open(model).layer(0)
    weights = np.stack([layer.matrices(expert)["gate"] for expert in range(layer.count)])
    biases = np.stack([layer.biases(expert)["gate"] for expert in range(layer.count)])
    weights -= weights.mean(axis=0)
    biases -= biases.mean(axis=0)
    return np.asarray(np.sqrt(np.mean(biases**2, axis=1) / np.mean(weights**2, axis=(1, 2))))


def expected_cosine(setup: Setup) -> float:
    """The mean cosine to expect once biases are added: the share of all energy that experts have in common."""
    return (setup.shared + SHARED_BIAS * setup.bias**2) / (1 + setup.bias**2)


def ratio_of_rank(size: int, rank: float) -> float:
    """The size of a bias's own part over the weights' root mean square at which the closed form gives such a rank."""
    highest = sqrt(19.0)  # from here on the term alone has 95 % of the energy
    if rank <= 1:
        return highest
    return float(brentq(lambda ratio: expected_rank(size, ratio) - rank, 1e-9, highest))


def setups() -> Iterator[tuple[str, Setup]]:
    for bias in BIASES:
        yield "noise", Setup(32, 384, bias)
    for bias in BIASES:
        yield "trained", Setup(32, 384, bias, **TRAINED)
    for experts, size in ((4, 384), (8, 384), (32, 192), (32, 768), (8, 2880)):
        yield "sizes", Setup(experts, size, 3.0)
    yield "published", Setup(8, 2880, 6.0, **TRAINED)


def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for what, setup in setups():
            right = write_right(Path(scratch) / "right", setup)
            wrong = write_wrong(Path(scratch) / "wrong", right, setup)
            added = MoETypeService.analyze(wrong)
            ratios = own_ratios(right)[list(added.layers[0].projections["gate"].experts)]
            share = missing_share(float(np.sqrt(np.mean(ratios**2))))
            apart = MoETypeService.analyze(right, variance=(share,) if share > 0 else ())
            ranks = apart.layers[0].projections["gate"].rank  # at that share, and at 95 %
            row = {
                "what": what,
                **asdict(setup),
                "apart": summarise(apart),
                "added": summarise(added),
                "own_ratio": float(np.mean(ratios)),
                "closed_form": float(np.mean([expected_rank(setup.size, ratio) for ratio in ratios.tolist()])),
                "from_apart": 1.0 if share <= 0 else min(ranks.values()) + (setup.bias > 0),
                "expected_cosine": expected_cosine(setup),
            }
            rows.append(row)
            show(row)
    implied = {
        layer: dict(zip(("gate", "up", "down"), (ratio_of_rank(2880, rank) for rank in ranks), strict=True))
        for layer, ranks in PUBLISHED.items()
    }
    lines = {f"rank {share:.0%}": ratio_of_rank(2880, share * 2880) for share in (0.5, 0.3, 0.05)}
    results = {
        "seed": SEED,
        "apart_does_not_depend_on_bias": all(
            row["apart"] == other["apart"] for row in rows for other in rows if is_same_but_bias(row, other)
        ),
        "ratios": {**lines, "rank 1": sqrt(19.0)},
        "implied_ratios": implied,
        "rows": rows,
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def is_same_but_bias(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(row[key] == other[key] for key in ("experts", "size", "spread", "shared"))


def show(row: dict[str, Any]) -> None:
    """One line of the README's tables."""
    apart, added = row["apart"], row["added"]
    cells = (
        f"{row['what']}, {row['experts']} x {row['size']}",
        f"{row['bias']:g} ({row['own_ratio']:.2f})",
        f"{apart['rank']['gate']:.1f} ({apart['rank_ratio']['gate']:.1%})",
        f"{apart['cosine']['gate']:.3f}, {apart['cosine']['down']:.3f}",
        f"{apart['documented_rule']['type']} ({apart['documented_rule']['confidence']:.0%})",
        f"{added['rank']['gate']:.1f} ({added['rank_ratio']['gate']:.1%})",
        f"{row['closed_form']:.1f}, {row['from_apart']:.1f}",
        f"{added['cosine']['gate']:.3f}, {added['cosine']['down']:.3f}",
        f"{row['expected_cosine']:.3f}",
        f"{added['documented_rule']['type']} ({added['documented_rule']['confidence']:.0%})",
        f"{apart['type']}, {added['type']}",
    )
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
