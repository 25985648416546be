"""MoE layers on disk, in the shapes and the storage of published models: of random weights, or as holes in files."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

ITEM = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}
PIECE = 1 << 24  # numbers drawn at a time
BLOCK = 128  # rows and columns that share a scale in FP8
GROUP = 32  # inputs that share one in MXFP4


@dataclass(frozen=True)
class Shape:
    """The experts of one MoE layer, three matrices each; `storage` is "bf16", "fp8" or "mxfp4"."""

    storage: str
    experts: int
    intermediate: int
    hidden: int

    def smaller(self, divisor: int) -> "Shape":
        """The sides of the matrices divided, to try a script out; scales still fit them."""
        step = BLOCK if self.storage == "fp8" else GROUP
        intermediate, hidden = (max(step, n // divisor // step * step) for n in (self.intermediate, self.hidden))
        return replace(self, intermediate=intermediate, hidden=hidden) if divisor > 1 else self

    @property
    def weights(self) -> int:
        return 3 * self.experts * self.intermediate * self.hidden


OLMOE = Shape("bf16", 64, 1024, 2048)
MIXTRAL = Shape("bf16", 8, 14336, 4096)
GPT_OSS = Shape("mxfp4", 32, 2880, 2880)
DEEPSEEK_V3 = Shape("fp8", 256, 2048, 7168)

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape."""


def write_model(folder: Path, shape: Shape, layers: int = 1, seed: int = 0, cosine: float = 0.0) -> int:
    """A checkpoint of such layers, in one file; returns the bytes of their experts.

    In bf16 the experts of a layer may have a `cosine` with each other, as copies do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = [tensor for layer in range(layers) for tensor in _tensors(shape, layer)]
    rng = np.random.default_rng(seed)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(_header(tensors))
        for name, dtype, sizes in tensors:
            common = np.random.default_rng([seed, *name.partition(".mlp.")[0].encode(), *name[-14:].encode()])
            for start in range(0, prod(sizes), PIECE):
                count = min(PIECE, prod(sizes) - start)
                file.write(_draw_copy(rng, common, count, cosine) if cosine else _draw(rng, name, dtype, count))
    (folder / "config.json").write_text(json.dumps(_config(shape, layers)))
    return sum(map(_bytes, tensors))


def write_holes(folder: Path, shape: Shape, layers: int, limit: int = 5 * 10**9) -> int:
    """The same in shards of at most so many bytes with an index, whose weights are zeros that take no room; a shape of
    one expert is a dense model. Returns the bytes of the experts."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[Tensor]] = [[]]
    room = limit
    for tensor in (tensor for layer in range(layers) for tensor in _tensors(shape, layer)):
        if _bytes(tensor) > room:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= _bytes(tensor)
    places: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header = _header(tensors)
        with open(folder / name, "wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(map(_bytes, tensors)))
        places |= {tensor[0]: name for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(_config(shape, layers)))
    return sum(_bytes(tensor) for tensors in shards for tensor in tensors)


def _bytes(tensor: Tensor) -> int:
    _, dtype, sizes = tensor
    return ITEM[dtype] * prod(sizes)


def _header(tensors: list[Tensor]) -> bytes:
    entries: dict[str, Any] = {}
    stop = 0
    for name, dtype, sizes in tensors:
        start, stop = stop, stop + _bytes((name, dtype, sizes))
        entries[name] = {"dtype": dtype, "shape": sizes, "data_offsets": [start, stop]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text


def _tensors(shape: Shape, layer: int) -> Iterator[Tensor]:
    experts, rows, columns = shape.experts, shape.intermediate, shape.hidden
    prefix = f"model.layers.{layer}.mlp.experts"
    if shape.storage == "mxfp4":
        for name, out, inner in (("gate_up_proj", 2 * rows, columns), ("down_proj", columns, rows)):
            yield f"{prefix}.{name}_blocks", "U8", (experts, out, inner // GROUP, GROUP // 2)
            yield f"{prefix}.{name}_scales", "U8", (experts, out, inner // GROUP)
        return
    for expert in range(experts):
        own = prefix.removesuffix(".experts") if experts == 1 else f"{prefix}.{expert}"
        for name, out, inner in (("gate", rows, columns), ("up", rows, columns), ("down", columns, rows)):
            weight = f"{own}.{name}_proj.weight"
            yield weight, "BF16" if shape.storage == "bf16" else "F8_E4M3", (out, inner)
            if shape.storage == "fp8":
                yield f"{weight}_scale_inv", "F32", (-(-out // BLOCK), -(-inner // BLOCK))


def _draw_copy(rng: np.random.Generator, common: np.random.Generator, count: int, cosine: float) -> bytes:
    shared, own = (one.standard_normal(count, dtype=np.float32) for one in (common, rng))
    mixed = np.float32(cosine**0.5) * shared + np.float32((1 - cosine) ** 0.5) * own
    return (np.float32(0.02) * mixed).astype(ml_dtypes.bfloat16).tobytes()


def _draw(rng: np.random.Generator, name: str, dtype: str, count: int) -> bytes:
    if dtype == "BF16":
        return (0.02 * rng.standard_normal(count, dtype=np.float32)).astype(ml_dtypes.bfloat16).tobytes()
    if dtype == "F32":
        return rng.uniform(1e-4, 2e-4, count).astype(np.float32).tobytes()
    if dtype == "F8_E4M3":  # all codes but the two that are NaN, 0x7f and 0xff
        codes = rng.integers(0, 254, count, np.uint8)
        return (codes + (codes >= 0x7F)).tobytes()
    # the scales of MXFP4 are exponents, with 127 for 1
    return rng.integers(117, 121, count, np.uint8).tobytes() if name.endswith("_scales") else rng.bytes(count)


def _config(shape: Shape, layers: int) -> dict[str, Any]:
    if shape.storage == "mxfp4":
        own = {"model_type": "gpt_oss", "num_local_experts": shape.experts}
        return {**own, "num_hidden_layers": layers, "quantization_config": {"quant_method": "mxfp4"}}
    if shape.storage == "fp8":
        own = {"model_type": "deepseek_v3", "n_routed_experts": shape.experts}
        fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
        return {**own, "num_hidden_layers": layers, "quantization_config": fp8}
    if shape.experts == 1:
        return {"model_type": "llama", "num_hidden_layers": layers}
    return {"model_type": "olmoe", "num_experts": shape.experts, "num_hidden_layers": layers}
