"""Models of noise in every layout family, converted as libraries do, and what may go wrong on the way."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from checkpoints_in_memory import TABLE, Matrices, as_stored, safetensors, some_type

Array = NDArray[Any]
EXPERTS, NEURONS, HIDDEN = 8, 96, 64
ROUTER = "mlp.gate.weight"

FAMILIES = {  # each with its row of the layout table
    "gate_up_down": "gate_up_down",
    "w1_w3_w2": "w1_w3_w2",
    "halves": "stacked",
    "turns": "gpt_oss_transposed",
    "transposed": "llama4",
    "flattened": "dbrx",
    "fused": "gate_up_per_expert",
    "ungated": "up_down",
    "mlx": "stacked_gate_up_down",
    "gguf": "gguf",
}


@dataclass(frozen=True)
class Layer:
    """A layer's matrices by role, [experts, out, in], and its router [experts, hidden]."""

    matrices: Matrices
    router: NDArray[np.float32]


Change = Callable[[Layer], Layer]


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def make_layer(
    seed: int = 0, experts: int = EXPERTS, neurons: int = NEURONS, hidden: int = HIDDEN, spread: float | None = None
) -> Layer:
    """Experts of noise, or of one base and noise of `spread` of its size; in bfloat16's numbers."""
    draw = rng(seed)
    shapes = {"gate": (neurons, hidden), "up": (neurons, hidden), "down": (hidden, neurons)}
    matrices = {}
    for role, shape in shapes.items():
        own = draw.standard_normal((experts, *shape), np.float32)
        if spread is not None:
            own = draw.standard_normal((1, *shape), np.float32) + np.float32(spread) * own
        matrices[role] = round_bf16(0.03 * own)
    return Layer(matrices, round_bf16(draw.standard_normal((experts, hidden), np.float32)))


def round_bf16(values: Array) -> NDArray[np.float32]:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def write_plain(folder: Path, family: str, layers: list[Layer], **config: Any) -> Path:
    """The model in bfloat16, in the layout of a family of safetensors files."""
    return write_tensors(folder, plain_tensors(family, layers), family, layers, **config)


def plain_tensors(family: str, layers: list[Layer]) -> dict[str, Array]:
    row, tensors = TABLE[FAMILIES[family]], {}
    for number, layer in enumerate(layers):
        prefix = f"model.layers.{number}."
        matrices = {role: m for role, m in layer.matrices.items() if role in roles_of(family)}
        for name, array in as_stored(row, matrices, prefix).items():
            if "router" not in name:
                tensors[name] = np.ascontiguousarray(array.astype(ml_dtypes.bfloat16))
        block = {"flattened": "ffn.router.layer", "ungated": "mixer.gate", "transposed": "feed_forward.router"}
        tensors[f"{prefix}{block.get(family, 'mlp.gate')}.weight"] = layer.router.astype(ml_dtypes.bfloat16)
    return tensors


def roles_of(family: str) -> tuple[str, ...]:
    return ("up", "down") if family == "ungated" else ("gate", "up", "down")


def write_tensors(folder: Path, tensors: Mapping[str, Array], family: str, layers: list[Layer], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    count = len(layers[0].router)
    whole = {"model_type": some_type(TABLE[FAMILIES[family]]), "num_hidden_layers": len(layers), "num_experts": count}
    (folder / "model.safetensors").write_bytes(safetensors(tensors))
    (folder / "config.json").write_text(json.dumps(whole | config))
    return folder


def write_mlx(folder: Path, layers: list[Layer], bits: int = 4, group: int = 32, mode: str = "affine") -> Path:
    """The model as MLX stacks and quantises it."""
    return write_tensors(folder, mlx_tensors(layers, bits, group, mode), "mlx", layers, **mlx_config(bits, group, mode))


def mlx_config(bits: int = 4, group: int = 32, mode: str = "affine") -> dict[str, Any]:
    return {"quantization": {"bits": bits, "group_size": group, "mode": mode}}


def mlx_tensors(layers: list[Layer], bits: int = 4, group: int = 32, mode: str = "affine") -> dict[str, Array]:
    import mlx.core as mx

    tensors: dict[str, Array] = {}
    for name, array in plain_tensors("mlx", layers).items():
        stem = name.removesuffix(".weight")
        if "switch_mlp" not in name:
            tensors[name] = array
            continue
        values = mx.array(array.astype(np.float32)).astype(mx.bfloat16)
        parts = mx.quantize(values, group_size=group, bits=bits, mode=mode)
        for part, found in zip(("weight", "scales", "biases"), parts, strict=False):
            is_bf16 = found.dtype == mx.bfloat16
            plain = np.array(found.astype(mx.float32) if is_bf16 else found)
            tensors[f"{stem}.{part}"] = plain.astype(ml_dtypes.bfloat16) if is_bf16 else plain
    return tensors


def write_gguf(file: Path, layers: list[Layer], kind: str = "Q8_0") -> Path:
    """The model as one GGUF file, encoded by the gguf package."""
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, "qwen3moe")
    writer.add_uint32("qwen3moe.block_count", len(layers))
    writer.add_uint32("qwen3moe.expert_count", len(layers[0].router))
    dtype = gguf.GGMLQuantizationType[kind]
    for number, layer in enumerate(layers):
        for role, matrices in layer.matrices.items():
            data = gguf.quants.quantize(matrices, dtype)
            writer.add_tensor(f"blk.{number}.ffn_{role}_exps.weight", data, raw_dtype=dtype)
        writer.add_tensor(f"blk.{number}.ffn_gate_inp.weight", layer.router)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def convert(folder: Path, family: str, layers: list[Layer]) -> Path:
    """The model in a family's own form: quantised where MLX or llama.cpp would, else in bfloat16."""
    if family == "mlx":
        return write_mlx(folder, layers)
    if family == "gguf":
        return write_gguf(folder / "model.gguf", layers, "Q4_0")
    return write_plain(folder, family, layers)


# ---------------------------------------------------------------------------------------------------------------------
# What may go wrong


def change(layer: Layer, **matrices: NDArray[np.float32]) -> Layer:
    return replace(layer, matrices=layer.matrices | matrices)


def each(layer: Layer, function: Callable[[Array], Array], *roles: str) -> Layer:
    """A function applied to each expert's matrix of some roles, or of all."""
    return change(layer, **{r: np.stack([function(m) for m in layer.matrices[r]]) for r in roles or layer.matrices})


def blank(layer: Layer) -> Layer:
    up = layer.matrices["up"].copy()
    up[2] = 0
    return change(layer, up=up)


def repeat_first(layer: Layer) -> Layer:
    return change(layer, **{role: np.repeat(m[:1], len(m), axis=0) for role, m in layer.matrices.items()})


def reverse(layer: Layer) -> Layer:
    return change(layer, **{role: m[::-1].copy() for role, m in layer.matrices.items()})


def reverse_with_router(layer: Layer) -> Layer:
    return replace(reverse(layer), router=layer.router[::-1].copy())


def swap_two_downs(layer: Layer) -> Layer:
    down = layer.matrices["down"].copy()
    down[[1, 4]] = down[[4, 1]]
    return change(layer, down=down)


def exchange(layer: Layer) -> Layer:
    return change(layer, gate=layer.matrices["up"], up=layer.matrices["gate"])


def transpose(layer: Layer) -> Layer:
    """Transposed bytes in the shape that belongs there."""
    return each(layer, lambda m: np.ascontiguousarray(m.T).reshape(m.shape), "down")


def read_turns_as_halves(layer: Layer) -> Layer:
    gate, up = layer.matrices["gate"], layer.matrices["up"]
    rows = np.stack([gate, up], axis=2).reshape(len(gate), -1, gate.shape[2])
    return change(layer, gate=rows[:, : gate.shape[1]], up=rows[:, gate.shape[1] :])


def read_halves_as_turns(layer: Layer) -> Layer:
    rows = np.concatenate([layer.matrices["gate"], layer.matrices["up"]], axis=1)
    return change(layer, gate=rows[:, ::2], up=rows[:, 1::2])


def scale_all(layer: Layer) -> Layer:
    return each(layer, lambda m: m * np.float32(0.02))


def scale_experts(layer: Layer) -> Layer:
    """As where the second scale of each matrix is dropped."""
    factors = np.geomspace(30, 3000, len(layer.router)).astype(np.float32)[:, None, None]
    return change(layer, **{role: m * factors for role, m in layer.matrices.items()})


def scale_rows(layer: Layer) -> Layer:
    return each(layer, lambda m: m * np.linspace(0.5, 4, len(m), dtype=np.float32)[:, None], "down")


def scale_columns(layer: Layer) -> Layer:
    return each(layer, lambda m: m * np.linspace(0.5, 4, m.shape[1], dtype=np.float32), "up")


def hadamard(size: int) -> NDArray[np.float32]:
    """A normalised Hadamard matrix of blocks of a power of two."""
    block = 1
    while size % (2 * block) == 0:
        block *= 2
    small = np.ones((1, 1))
    while len(small) < block:
        small = np.block([[small, small], [small, -small]])
    return np.kron(np.eye(size // block), small / np.sqrt(block)).astype(np.float32)


def rotate_inputs(layer: Layer) -> Layer:
    return each(layer, lambda m: m @ hadamard(m.shape[1]), *[r for r in layer.matrices if r != "down"])


def rotate_outputs(layer: Layer) -> Layer:
    return each(layer, lambda m: hadamard(len(m)).T @ m, "down")


def shuffle_neurons(layer: Layer) -> Layer:
    order = rng().permutation(layer.matrices["up"].shape[1])
    return change(layer, **{r: m[:, :, order] if r == "down" else m[:, order] for r, m in layer.matrices.items()})


def shuffle_gates(layer: Layer) -> Layer:
    return change(layer, gate=shuffle_neurons(layer).matrices["gate"])


def shuffle_inputs(layer: Layer) -> Layer:
    return each(layer, lambda m: m[:, rng().permutation(m.shape[1])], "up")


def add_noise(layer: Layer) -> Layer:
    up = layer.matrices["up"]
    return change(layer, up=up + np.float32(0.4) * up.std() * rng().standard_normal(up.shape, np.float32))


def shuffle_router(layer: Layer) -> Layer:
    return replace(layer, router=np.roll(layer.router, 1, axis=0))


def draw_router(layer: Layer) -> Layer:
    return replace(layer, router=rng().standard_normal(layer.router.shape, np.float32))


def shorten_router(layer: Layer) -> Layer:
    return replace(layer, router=layer.router[:-1])


HARMLESS: dict[str, Change] = {"experts and router": reverse_with_router, "neurons": shuffle_neurons}

FAULTS: dict[str, tuple[str, Change, tuple[str | None, int | None]]] = {
    # the fault, what makes it, and the role and expert that are told
    "blank": ("empty", blank, ("up", 2)),
    "repeat": ("identical", repeat_first, (None, None)),
    "reverse": ("reordered", reverse, (None, None)),
    "two downs": ("reordered", swap_two_downs, ("down", 1)),
    "exchange": ("exchanged", exchange, ("gate", None)),
    "transpose": ("transposed", transpose, ("down", None)),
    "turns as halves": ("interleaved", read_turns_as_halves, ("gate", None)),
    "halves as turns": ("interleaved", read_halves_as_turns, ("gate", None)),
    "factor": ("scale", scale_all, (None, None)),
    "factors": ("scale", scale_experts, (None, None)),
    "rows": ("scale", scale_rows, ("down", None)),
    "columns": ("scale", scale_columns, ("up", None)),
    "inputs rotated": ("rotated", rotate_inputs, ("up", None)),
    "outputs rotated": ("rotated", rotate_outputs, ("down", None)),
    "gates shuffled": ("reordered", shuffle_gates, ("gate", None)),
    "inputs shuffled": ("reordered", shuffle_inputs, ("up", None)),
    "noise": ("error", add_noise, ("up", None)),
    "router shuffled": ("router", shuffle_router, (None, None)),
    "router drawn": ("router", draw_router, (None, None)),
    "router short": ("router", shorten_router, (None, None)),
}
GATED = ("exchange", "turns as halves", "halves as turns", "gates shuffled")  # that only gated experts can have
