"""A model written as a checkpoint that compressed-tensors, transformers and vLLM read: each expert's matrices as packed
integers under the names of the family's own modules, all else in bf16.

Experts are read, coded and written one at a time.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...errors import UnknownFormat
from ...jobs.resources import Resources
from ...progress import Progress
from ...weights.checkpoint import Checkpoint
from ...weights.expert_layer import ExpertLayer
from ...weights.model_config import ModelConfig
from ..codes.packed import PackedCode
from ..fidelity import FidelityCheck
from .coded_experts import Bf16Code, coded_tensors, write_experts
from .dequantise import dequantise, dequantised_config
from .folder import Contents, Shard, ShardFile, Tensor, encode_json, group_into_shards

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
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
        layer, code = self.layers[number], self.widths[number] or Bf16Code()
        for role, template in _templates(layer).items():
            for expert in range(layer.count):
                yield from coded_tensors(template.replace("{expert}", str(expert)), layer.shape(role), code)


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
                f"{METHOD} needs one module per matrix of an expert, and layout {layer.layout.name} has none: {name}",
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
    """Write the experts of one layer."""
    layer, code, templates = model.layers[number], model.widths[number] or Bf16Code(), _templates(model.layers[number])

    def write(expert: int, role: str, part: str, data: bytes) -> None:
        shard.write(f"{templates[role].replace('{expert}', str(expert))}.{part}", data)

    codes, check = dict.fromkeys(layer.roles, code), checks.get(number)
    write_experts(layer, codes, write, check=check, resources=resources, progress=progress)
