"""What a conversion lacks or did not quantise, from the names and headers of its tensors alone."""

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

from ..errors import MoEError
from ..text import format_ranges
from ..weights.codecs import NOT_DECODED
from ..weights.expert_layer import ExpertLayer, ShapesDoNotFit
from ..weights.experts import Experts
from ..weights.layouts import Parts
from ..weights.stored import module_of
from ..weights.tensor_info import PLAIN_DTYPES
from .faults import Fault

LISTS = (
    "ignore", "ignored_layers", "exclude", "exclude_modules", "modules_to_not_convert", "llm_int8_skip_modules",
    "exclude_layers",
)  # fmt: skip
"""Where a config's quantisation settings list the modules that were left as they were."""

Place = tuple[int, str, int | None]  # layer, role of the layout, expert


def find_missing(original: Experts, converted: Experts) -> Iterator[Fault]:
    """Layers, experts and roles of the original that the conversion lacks, and layers that only the conversion has."""
    there = {*converted.layers, *converted.mtp_layers}
    here = {*original.layers, *original.mtp_layers}
    for layer in sorted(set(original.layers) - there):
        yield Fault(layer, "missing", "the layer has no experts")
    for layer in sorted(there - here):
        yield Fault(layer, "error", "the original has no experts in this layer")
    for layer in sorted(set(original.layers) & there):
        yield from _find_missing_experts(original.layer(layer), converted.layer(layer))


def _find_missing_experts(original: ExpertLayer, converted: ExpertLayer) -> Iterator[Fault]:
    parts = converted.parts()
    for tensor in converted.layout.tensors:
        if tensor.role not in parts:
            yield from (Fault(converted.number, "missing", "it is missing", role) for role in tensor.roles)
    if set(original.roles) - set(converted.roles):
        for role in original.roles:
            if role not in converted.roles:
                yield Fault(converted.number, "missing", f"layout {converted.layout.name} has no such projection", role)
    if converted.layout.is_single:
        return
    held = {expert for experts in _experts(original).values() for expert in experts}
    for tensor in converted.layout.tensors:
        lacking = held - parts.get(tensor.role, {}).keys() if tensor.role in parts else set()
        for expert in sorted(lacking):
            yield from (Fault(converted.number, "missing", "it is missing", role, expert) for role in tensor.roles)


def _experts(layer: ExpertLayer) -> dict[str, range]:
    return dict.fromkeys(layer.roles, range(layer.count))


def find_unquantised(converted: Experts) -> tuple[list[Fault], list[str]]:
    """Experts that are not quantised beside quantised ones, or although the config says that the model is quantised;
    and notes on those that the config lists as not quantised."""
    plain: dict[Place, str] = {}
    quantised = 0
    for number in (*converted.layers, *converted.mtp_layers):
        for role, experts in converted.layer(number).parts().items():
            for expert, parts in experts.items():
                if _is_plain(converted, parts):
                    plain[number, role, expert] = module_of(parts)
                else:
                    quantised += 1
    settings = converted.checkpoint.model_config.quantization()
    is_declared = settings.get("quant_method") not in (None, "gguf") or bool(settings.get("bits"))
    if not plain or (not quantised and not is_declared):
        return [], []
    left = [place for place, module in plain.items() if quantised and _is_left(module, settings)]
    notes = []
    if left:
        layers = sorted({layer for layer, _, _ in left})
        notes.append(f"the config says that experts of layers {format_ranges(layers)} were not quantised")
    reason = (
        "not quantised, although others are" if quantised else f"not quantised, but the config says {_name(settings)}"
    )
    specs = {tensor.role: tensor.roles for tensor in converted.layer(converted.layers[0]).layout.tensors}
    faults = [
        Fault(layer, "unquantised", reason, role, expert)
        for layer, stored, expert in plain.keys() - set(left)
        for role in specs[stored]
    ]
    return sorted(faults, key=lambda fault: (fault.layer, str(fault.role), fault.expert or 0)), notes


def _name(settings: Mapping[str, Any]) -> str:
    """A config's way of quantisation, such as "gptq" or "4 bits"."""
    method, bits = settings.get("quant_method"), settings.get("bits")
    return str(method) if method else f"{bits} bits"


def _is_plain(converted: Experts, parts: Parts) -> bool:
    """Whether a weight is not quantised; assumed if its header is not read and it has no other part."""
    if parts.keys() - NOT_DECODED != {"weight"}:
        return False
    name, checkpoint = parts["weight"], converted.checkpoint
    return not checkpoint.is_at_hand(name) or checkpoint.info(name).dtype in PLAIN_DTYPES


def _is_left(module: str, settings: Mapping[str, Any]) -> bool:
    """Whether the config says that a module was not quantised."""
    if settings.get(module) is False:  # MLX
        return True
    listed = [entry for key in LISTS if isinstance(settings.get(key), list) for entry in settings[key]]
    return any(_matches(entry, module) for entry in listed if isinstance(entry, str))


def _matches(entry: str, module: str) -> bool:
    if entry.startswith("re:"):
        try:
            return re.match(entry[3:], module) is not None
        except re.error:
            return False
    return fnmatch(module, entry) or module == entry or module.startswith(f"{entry}.") or f".{entry}." in f".{module}."


def explain_misfit(error: ShapesDoNotFit, original: ExpertLayer, expert: int | None = None) -> list[Fault]:
    """What is wrong with stored tensors whose shapes do not fit together, from what they should be."""
    faults = []
    for tensor in error.layout.tensors:
        shape, wanted = error.shapes.get(tensor.role), tensor.axes.shape(original.sizes)
        if shape is None or shape == wanted:
            continue
        is_turned = shape[:-2] == wanted[:-2] and shape[-2:] == wanted[:-3:-1]
        for role in tensor.roles:
            if is_turned:
                detail = f"it is stored as {list(shape)}, not as {list(wanted)}"
                faults.append(Fault(error.layer, "transposed", detail, role, expert))
            elif tensor.axes.stacked and shape[1:] == wanted[1:] and shape[0] < wanted[0]:
                missing = range(shape[0], wanted[0])
                faults += [Fault(error.layer, "missing", "it is missing", role, absent) for absent in missing]
            else:
                detail = f"its shape is {list(shape)}, but the original's would be {list(wanted)}"
                faults.append(Fault(error.layer, "error", detail, role, expert))
    return faults or [Fault(error.layer, "error", error.message, None, expert)]


def compare_shapes(converted: ExpertLayer, original: ExpertLayer, expert: int | None) -> list[Fault]:
    """What is wrong with matrices whose shapes are not the original's."""
    faults = []
    for role in original.roles:
        if role not in converted.roles or converted.shape(role) == original.shape(role):
            continue
        this, that = converted.shape(role), original.shape(role)
        detail = f"its shape is {list(this)}, but the original's is {list(that)}"
        faults.append(Fault(original.number, "transposed" if this == that[::-1] else "error", detail, role, expert))
    return faults


def explain_unreadable(error: MoEError, converted: ExpertLayer, expert: int | None) -> list[Fault]:
    """What is wrong with an expert whose tensors can't be decoded: they lack a part that others have, or else the error
    says it."""
    faults = []
    for stored, experts in converted.parts().items():
        others = set().union(*(parts.keys() for parts in experts.values()))
        lacking = sorted(others - experts.get(expert, {}).keys() - NOT_DECODED)
        if lacking and expert in experts:
            detail = f"its {' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing"
            faults += [Fault(converted.number, "missing", detail, role, expert) for role in stored.split("_")]
    return faults or [Fault(converted.number, "error", error.message, None, expert)]
