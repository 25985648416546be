"""A model written as a plain quantised checkpoint that mlx-lm itself loads, with a width for each projection.

Experts are read, coded and written one at a time. All else goes by way of `<folder>.rest`, where it lies in bf16 under
the model's own names, so that mlx-lm can give it those of its model class.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...jobs.resources import Resources
from ...progress import Progress
from ...weights.checkpoint import Checkpoint
from ...weights.expert_layer import ExpertLayer
from ...weights.fingerprint import fingerprint
from ...weights.model_config import ModelConfig
from ..codes.affine import AffineCode
from ..codes.code import WIDTHS
from ..fidelity import FidelityCheck
from ..quantisation import BF16
from .coded_experts import Bf16Code, coded_tensors, encode, write_experts
from .dequantise import dequantise, dequantised_config
from .folder import (
    Contents,
    Shard,
    ShardFile,
    Tensor,
    bf16_tensor,
    encode_json,
    group_by_size,
    group_into_shards,
    name_beside,
    remove,
    write_model,
)

REST = "rest"
ORIGIN = "origin.json"  # in the folder of the rest: what it was made from
WINDOW = 1 << 22  # weights of a tensor that are coded at a time


class RestTensor(Protocol):
    """A tensor that is not part of an expert, under the name that it is written with; `load` reads it, once."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def load(self) -> Callable[[], NDArray[Any]]: ...


@dataclass(frozen=True, slots=True)
class StockModel:
    """What is written: the experts of each layer, the modules of their projections and how these are coded, None for
    bf16, by layer and role; all other tensors, and the codes of those of their modules that are quantised, by path.
    """

    layers: Mapping[int, ExpertLayer]
    paths: Mapping[tuple[int, str], str]
    widths: Mapping[tuple[int, str], AffineCode | None]
    rest: Sequence[RestTensor]
    rest_codes: Mapping[str, AffineCode]

    @property
    def codes(self) -> dict[str, AffineCode]:
        """The codes of all quantised modules, by path."""
        return {**self.rest_codes, **{self.paths[place]: code for place, code in self.widths.items() if code}}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors, by name."""
        tensors = [tensor for layer in self.layers for tensor in self.expert_tensors(layer)]
        tensors += [part for tensor in self.rest for part in self.rest_parts(tensor)]
        return {tensor.name: tensor.shape for tensor in tensors}

    def expert_tensors(self, number: int) -> list[Tensor]:
        """The tensors of one layer's experts."""
        layer = self.layers[number]
        tensors = [
            bf16_tensor(f"{self.paths[number, role]}.bias", (layer.count, len(bias)))
            for role, bias in layer.biases(0).items()
        ]
        for role in layer.roles:
            code = self.widths[number, role] or Bf16Code()
            tensors += coded_tensors(self.paths[number, role], (layer.count, *layer.shape(role)), code)
        return tensors

    def rest_parts(self, tensor: RestTensor) -> list[Tensor]:
        """The tensors that one of the others becomes."""
        path = tensor.name.removesuffix(".weight")
        if path != tensor.name and path in self.rest_codes:
            return coded_tensors(path, tensor.shape, self.rest_codes[path])
        return [Tensor(tensor.name, tensor.dtype, tensor.shape, WIDTHS[tensor.dtype] * prod(tensor.shape))]


def write_rest(checkpoint: Checkpoint, names: Sequence[str], folder: Path, progress: Progress) -> Path:
    """Write these tensors of a checkpoint, decoded to bf16, beside the folder that is to be made; returns where."""
    target = name_beside(folder, REST)
    origin = encode_json({"names": sorted(names), **fingerprint(checkpoint)})
    try:
        if (target / ORIGIN).read_bytes() == origin:  # of an interrupted run
            return target
    except OSError:
        pass
    shards = list(group_into_shards(dequantise(checkpoint, sorted(names)), checkpoint, progress))
    plan = {"writes": "rest", **fingerprint(checkpoint)}
    write_model(target, Contents(shards, None, {ORIGIN: origin}), plan, checkpoint.repository.folder, True, progress)
    return target


def remove_rest(folder: Path) -> None:
    """Delete what `write_rest` wrote for the folder, if it is there."""
    target = name_beside(folder, REST)
    if (target / ORIGIN).is_file():
        remove(target)


def stock_contents(
    checkpoint: Checkpoint,
    model: StockModel,
    *,
    files: Mapping[str, bytes | Callable[[], bytes]],
    checks: Mapping[int, FidelityCheck],
    resources: Resources,
    progress: Progress,
) -> Contents:
    """What the folder of the model holds; `files` are those beside config and weights.

    `checks`, by layer, compare its experts with the originals, while these are written.
    """
    fill = partial(_fill_experts, model, checks=checks, resources=resources, progress=progress)
    shards = [
        *_rest_shards(model),
        *(Shard(tuple(model.expert_tensors(layer)), partial(fill, layer)) for layer in model.layers),
    ]
    return Contents(shards, encode_json(stock_config(checkpoint.model_config, model.codes)), files)


def stock_config(config: ModelConfig, codes: Mapping[str, AffineCode]) -> dict[str, Any]:
    """The config with the settings of each quantised module, as mlx-lm writes and reads them."""
    values = dequantised_config(config)
    if not codes:
        return values
    most = max(set(codes.values()), key=list(codes.values()).count)
    settings: dict[str, Any] = {"group_size": most.group, "bits": most.bits, "mode": "affine"}
    settings |= {path: {"group_size": code.group, "bits": code.bits} for path, code in sorted(codes.items())}
    return {**values, "quantization": settings, "quantization_config": settings}


def _rest_shards(model: StockModel) -> Iterator[Shard]:
    """Shards with all tensors that are not part of experts."""

    def fill(group: Sequence[RestTensor], shard: ShardFile) -> None:
        for tensor in group:
            _write_rest_tensor(model, tensor, shard)

    for group in group_by_size(model.rest, lambda tensor: sum(part.nbytes for part in model.rest_parts(tensor))):
        yield Shard(tuple(part for tensor in group for part in model.rest_parts(tensor)), partial(fill, group))


def _write_rest_tensor(model: StockModel, tensor: RestTensor, shard: ShardFile) -> None:
    values = tensor.load()
    path = tensor.name.removesuffix(".weight")
    code = model.rest_codes.get(path) if path != tensor.name else None
    if code is None:
        shard.write(tensor.name, values.tobytes())
        return
    rows = values.reshape(-1, values.shape[-1])
    offsets = dict.fromkeys(code.layout((1, rows.shape[1])), 0)
    for start in range(0, len(rows), step := max(1, WINDOW // rows.shape[1])):
        for name, part in encode(code, rows[start : start + step].astype(np.float32), tensor.name).items():
            data = part.tobytes()
            shard.write(f"{path}.{name}", data, offsets[name])
            offsets[name] += len(data)


def _fill_experts(
    model: StockModel,
    number: int,
    shard: ShardFile,
    *,
    checks: Mapping[int, FidelityCheck],
    resources: Resources,
    progress: Progress,
) -> None:
    """Write the experts of one layer."""
    layer, check = model.layers[number], checks.get(number)
    codes = {role: model.widths[number, role] or Bf16Code() for role in layer.roles}

    def write(expert: int, role: str, part: str, data: bytes) -> None:
        shard.write(f"{model.paths[number, role]}.{part}", data, expert * len(data))

    write_experts(layer, codes, write, check=check, resources=resources, progress=progress)
    for expert in range(layer.count):
        for role, bias in layer.biases(expert).items():
            write(expert, role, "bias", bias.astype(BF16).tobytes())
