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

from ...errors import ModelUnreadable
from ...jobs.resources import Resources, Shaped
from ...progress import Progress
from ...weights.checkpoint import Checkpoint
from ...weights.fingerprint import fingerprint
from ...weights.model_config import ModelConfig
from ..codes.affine import AffineCode
from ..codes.code import WIDTHS
from ..fidelity import MATRICES_COMPARED, ExpertErrors, FidelityCheck
from ..quantisation import BF16
from .dequantise import dequantise, dequantised_config
from .folder import (
    SHARD,
    Contents,
    Shard,
    ShardFile,
    Tensor,
    bf16_tensor,
    encode_json,
    group_into_shards,
    name_beside,
    remove,
    write_model,
)

REST = "rest"
ORIGIN = "origin.json"  # in the folder of the rest: what it was made from
WINDOW = 1 << 22  # weights of a tensor that are coded at a time
MATRICES_HELD = 8  # by a thread that codes one expert

Matrices = dict[str, NDArray[np.float32]]


class ExpertSource(Shaped, Protocol):
    """The experts of one layer, wherever they come from."""

    @property
    def count(self) -> int:
        """How many there are."""

    def prefetch(self, progress: Progress) -> None:
        """Fetch all of them in a few long requests."""

    def matrices(self, expert: int) -> Matrices:
        """One expert's matrices by role, float32 in canonical form."""

    def biases(self, expert: int) -> Matrices:
        """One expert's bias vectors by role, {} where it has none."""


class RestTensor(Protocol):
    """A tensor that is no expert's, under the name that it is written with; `load` reads it, once."""

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

    experts: Mapping[int, ExpertSource]
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
        tensors = [tensor for layer in self.experts for tensor in self.expert_tensors(layer)]
        tensors += [part for tensor in self.rest for part in self.rest_parts(tensor)]
        return {tensor.name: tensor.shape for tensor in tensors}

    def expert_tensors(self, layer: int) -> list[Tensor]:
        """The tensors of one layer's experts."""
        source = self.experts[layer]
        tensors = [
            bf16_tensor(f"{self.paths[layer, role]}.bias", (source.count, len(bias)))
            for role, bias in source.biases(0).items()
        ]
        for role in source.roles:
            tensors += _coded_tensors(
                self.paths[layer, role], (source.count, *source.shape(role)), self.widths[layer, role]
            )
        return tensors

    def rest_parts(self, tensor: RestTensor) -> list[Tensor]:
        """The tensors that one of the others becomes."""
        path = tensor.name.removesuffix(".weight")
        if path != tensor.name and path in self.rest_codes:
            return _coded_tensors(path, tensor.shape, self.rest_codes[path])
        return [Tensor(tensor.name, tensor.dtype, tensor.shape, WIDTHS[tensor.dtype] * prod(tensor.shape))]


def _coded_tensors(path: str, shape: tuple[int, ...], code: AffineCode | None) -> list[Tensor]:
    """The tensors of a module whose weight has that shape."""
    if code is None:
        return [bf16_tensor(f"{path}.weight", shape)]
    *leading, rows, columns = shape
    count = prod(leading)
    return [
        Tensor(f"{path}.{name}", part.dtype, (*leading, *part.shape), count * part.nbytes)
        for name, part in code.layout((rows, columns)).items()
    ]


def write_rest(checkpoint: Checkpoint, names: Sequence[str], folder: Path, progress: Progress) -> Path:
    """Write these tensors of a checkpoint, decoded to bf16, beside the folder that is to be made; returns where."""
    target = name_beside(folder, REST)
    origin = encode_json({"names": sorted(names), **fingerprint(checkpoint)})
    try:
        if (target / ORIGIN).read_bytes() == origin:  # of a run that was stopped
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
        *(Shard(tuple(model.expert_tensors(layer)), partial(fill, layer)) for layer in model.experts),
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
    """Shards of about SHARD bytes with all tensors that are no experts'."""

    def fill(group: Sequence[RestTensor], shard: ShardFile) -> None:
        for tensor in group:
            _write_rest_tensor(model, tensor, shard)

    group: list[RestTensor] = []
    tensors: list[Tensor] = []
    for tensor in model.rest:
        parts = model.rest_parts(tensor)
        if group and sum(each.nbytes for each in (*tensors, *parts)) > SHARD:
            yield Shard(tuple(tensors), partial(fill, group))
            group, tensors = [], []
        group.append(tensor)
        tensors += parts
    if group:
        yield Shard(tuple(tensors), partial(fill, group))


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
        for name, part in _encode(code, rows[start : start + step].astype(np.float32), tensor.name).items():
            data = part.tobytes()
            shard.write(f"{path}.{name}", data, offsets[name])
            offsets[name] += len(data)


def _fill_experts(
    model: StockModel,
    layer: int,
    shard: ShardFile,
    *,
    checks: Mapping[int, FidelityCheck],
    resources: Resources,
    progress: Progress,
) -> None:
    """Write the experts of one layer, each as soon as it is coded."""
    source, check = model.experts[layer], checks.get(layer)
    source.prefetch(progress)

    def write(expert: int) -> ExpertErrors | None:
        exact, rebuilt = source.matrices(expert), {}
        is_checked = check is not None and expert in check.experts
        for role, bias in source.biases(expert).items():
            data = bias.astype(BF16).tobytes()
            shard.write(f"{model.paths[layer, role]}.bias", data, expert * len(data))
        for role, matrix in exact.items():
            code, path = model.widths[layer, role], model.paths[layer, role]
            parts = (
                {"weight": matrix.astype(BF16)}
                if code is None
                else _encode(code, matrix, f"layer {layer}: {role} of expert {expert}")
            )
            for name, part in parts.items():
                data = part.tobytes()
                shard.write(f"{path}.{name}", data, expert * len(data))
            if is_checked:
                shape = matrix.shape[0], matrix.shape[1]
                rebuilt[role] = parts["weight"].astype(np.float32) if code is None else code.decode(parts, shape)
        return check.compare(expert, exact, rebuilt) if check and is_checked else None

    with resources.worker_threads(source, matrices=MATRICES_COMPARED if check else MATRICES_HELD) as pool:
        for errors in pool.map(write, range(source.count)):
            if check and errors:
                check.add(errors)


def _encode(code: AffineCode, matrix: NDArray[np.float32], name: str) -> dict[str, NDArray[Any]]:
    try:
        return code.encode(matrix)
    except ValueError as error:
        raise ModelUnreadable(f"{name}: {error}", "the checkpoint is broken") from None
