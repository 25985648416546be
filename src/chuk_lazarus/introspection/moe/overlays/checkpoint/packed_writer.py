"""A model written as a checkpoint that compressed-tensors, transformers and vLLM read: each expert's matrices as packed
integers under the names of the family's own modules, all else in bf16.

Experts are read, coded and written one at a time.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ...errors import ModelUnreadable, UnknownFormat
from ...jobs.resources import Resources
from ...progress import Progress
from ...weights.checkpoint import Checkpoint
from ...weights.expert_layer import ExpertLayer
from ...weights.model_config import ModelConfig
from ..codes.packed import PackedCode
from ..fidelity import MATRICES_COMPARED, ExpertErrors, FidelityCheck
from ..quantisation import BF16
from .dequantise import dequantise, dequantised_config
from .folder import Contents, Shard, ShardFile, Tensor, bf16_tensor, encode_json, group_into_shards

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
MATRICES_HELD = 8  # by a thread that codes one expert
WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class PackedModel:
    """What is written: the experts of each layer, and how these are coded, None for bf16; `rest` are the names of all
    other tensors.
    """

    layers: Mapping[int, ExpertLayer]
    widths: Mapping[int, PackedCode | None]
    rest: Sequence[str]

    def expert_tensors(self, number: int) -> Iterator[Tensor]:
        """The tensors of one layer's experts."""
        layer, code = self.layers[number], self.widths[number]
        for role, template in _templates(layer).items():
            for expert in range(layer.count):
                module = template.replace("{expert}", str(expert))
                if code is None:
                    yield bf16_tensor(f"{module}{WEIGHT}", layer.shape(role))
                    continue
                for name, part in code.layout(layer.shape(role)).items():
                    yield Tensor(f"{module}.{name}", part.dtype, part.shape, part.nbytes)


def packed_contents(
    checkpoint: Checkpoint,
    model: PackedModel,
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
    rest = list(group_into_shards(dequantise(checkpoint, model.rest), checkpoint, progress))
    shards = [*rest, *(Shard(tuple(model.expert_tensors(layer)), partial(fill, layer)) for layer in model.layers)]
    kept = [tensor for shard in rest for tensor in shard.tensors]
    return Contents(shards, encode_json(packed_config(checkpoint.model_config, model, kept)), files)


def packed_config(config: ModelConfig, model: PackedModel, kept: Sequence[Tensor]) -> dict[str, Any]:
    """The config with a group of modules for each width, by patterns of their names, and the others that are `kept`."""
    values = dequantised_config(config)
    by_code: dict[PackedCode, list[ExpertLayer]] = {}
    ignored = [tensor.name.removesuffix(WEIGHT) for tensor in kept if _is_matrix(tensor)]
    for number, code in model.widths.items():
        layer = model.layers[number]
        if code:
            by_code.setdefault(code, []).append(layer)
            continue
        for template in _templates(layer).values():
            ignored += [template.replace("{expert}", str(expert)) for expert in range(layer.count)]
    groups = {
        f"group_{place}": {
            "targets": _targets(layers),
            "weights": {
                "num_bits": code.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": code.group,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for place, (code, layers) in enumerate(by_code.items())
    }
    if not groups:
        return values
    settings = {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignored),
        "kv_cache_scheme": None,
    }
    return {**values, "quantization_config": settings}


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.name.endswith(WEIGHT) and len(tensor.shape) > 1


def check_modules(layer: ExpertLayer) -> None:
    """Raise UnknownFormat where an expert's matrices are not weights [out, in] of modules of their own."""
    for tensor in layer.tensors:
        _, name = tensor.place
        axes = (("H",), ("I",)) if tensor.spec.role == "down" else (("I",), ("H",))
        if tensor.spec.axes.groups != axes or "{expert}" not in name or not name.endswith(WEIGHT):
            raise UnknownFormat(
                f"layout {layer.layout.name} keeps no module for each matrix of an expert, as {METHOD} needs: {name}",
                "give --format mlx, gguf-recipe or standard",
            )


def _templates(layer: ExpertLayer) -> dict[str, str]:
    """The modules of the experts' matrices by role, with {expert} for an expert's number."""
    places = ((tensor.spec.role, tensor.place) for tensor in layer.tensors)
    named = {role: f"{prefix}.{name.removesuffix(WEIGHT)}" for role, (prefix, name) in places}
    return {role: named[role] for role in layer.roles}


def _targets(layers: Sequence[ExpertLayer]) -> list[str]:
    """Patterns of the names of all experts' modules in these layers.

    Loaders have other names above the layers, and vLLM asks for gate_proj whatever the projections are called: the
    patterns hold whatever stands there.
    """
    numbers: dict[tuple[str, str], set[str]] = {}
    for layer in layers:
        for template in _templates(layer).values():
            head, _, _ = template.partition("{expert}")
            above, below = head.split(f".{layer.number}.", 1)
            numbers.setdefault((above.rpartition(".")[2], below), set()).add(str(layer.number))
    return [
        rf"re:(.*\.)?{re.escape(word)}\.({'|'.join(sorted(of_word, key=int))})\.{re.escape(below)}\d+(\..*)?$"
        for (word, below), of_word in sorted(numbers.items())
    ]


def _fill_experts(
    model: PackedModel,
    number: int,
    shard: ShardFile,
    *,
    checks: Mapping[int, FidelityCheck],
    resources: Resources,
    progress: Progress,
) -> None:
    """Write the experts of one layer, each as soon as it is coded."""
    layer, code, check = model.layers[number], model.widths[number], checks.get(number)
    templates = _templates(layer)
    layer.prefetch(progress)

    def write(expert: int) -> ExpertErrors | None:
        exact, rebuilt = layer.matrices(expert), {}
        is_checked = check is not None and expert in check.experts
        for role, matrix in exact.items():
            module = templates[role].replace("{expert}", str(expert))
            try:
                parts = {"weight": matrix.astype(BF16)} if code is None else code.encode(matrix)
            except ValueError as error:
                raise ModelUnreadable(f"{module}: {error}", "the checkpoint is broken") from None
            for name, part in parts.items():
                shard.write(f"{module}.{name}", part.tobytes())
            if is_checked:
                rebuilt[role] = (
                    parts["weight"].astype(np.float32) if code is None else code.decode(parts, layer.shape(role))
                )
        return check.compare(expert, exact, rebuilt) if check and is_checked else None

    with resources.worker_threads(layer, matrices=MATRICES_COMPARED if check else MATRICES_HELD) as pool:
        for errors in pool.map(write, range(layer.count)):
            if check and errors:
                check.add(errors)
