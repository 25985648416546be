"""A model described from its headers alone."""

import time
from collections.abc import Sequence
from typing import TypedDict

from ..errors import MoEError, name_model, printable
from ..reports import Cost, LayerLayout, MoELayout, SharedExperts
from ..text import parse_size
from ..weights.checkpoint import Checkpoint
from ..weights.expert_layer import ExpertLayer
from ..weights.experts import Experts, split_model
from ..weights.layouts import Kind, match_names, split_name
from ..weights.repositories.find import find_repository
from .measure import DEFAULT_EXPERTS, bytes_to_measure
from .model import evenly_spaced
from .parts import BUDGET, further_bytes, further_layers, quick_bytes
from .resources import Resources


def describe_layout(model: str, layers: Sequence[int] | str | None) -> MoELayout:
    """The layout of a model, by the headers that hold `layers`; None for the first and the last MoE layer's."""
    with name_model(model):
        return _describe(model, layers)


def _describe(model: str, layers: Sequence[int] | str | None) -> MoELayout:
    started = time.perf_counter()
    name, stack = split_model(model)
    checkpoint = Checkpoint(find_repository(name))
    experts = Experts(checkpoint, stack=stack)
    first, last = experts.layer(experts.layers[0]), experts.layer(experts.layers[-1])
    opened = [first] if first.number == last.number else [first, last]
    if layers is not None:
        opened = [experts.layer(number) for number in sorted(experts.choose_layers(None, layers))]
    elif all(layer.sizes for layer in opened) and all(map(checkpoint.is_at_hand, checkpoint.names)):
        opened = [experts.layer(number) for number in experts.layers]  # all headers are read already
    described = [_describe_layer(layer) for layer in opened]
    # a layer of multi-token prediction is described if asked for, and counted only where there is no other
    counted = [layer for layer in described if layer.layer in experts.layers] or described
    share = len(experts.layers) / len(counted)
    notes = list(experts.notes)
    dense = _open_beside(checkpoint, "dense", experts, notes)
    shared = _open_beside(checkpoint, "shared", experts, notes)
    repository = checkpoint.repository
    measured = bytes_to_measure(first, evenly_spaced(first.count, DEFAULT_EXPERTS), Resources.current())
    beside = further_bytes(first, experts.layers, measured)
    return MoELayout(
        model=printable(model),
        revision=repository.revision,
        family=experts.family,
        model_type=experts.model_type,
        storage=", ".join(dict.fromkeys(layer.storage for layer in described)),
        experts=described[0].experts,
        stack=experts.stack,
        stacks=experts.stacks,
        top_k=experts.top_k,
        activation=experts.activation,
        moe_layers=experts.layers,
        mtp_layers=experts.mtp_layers,
        dense_layers=dense.layers if dense else (),
        tensors=_names(opened[0]),
        order=experts.order,
        order_by=experts.order_by,
        layers=tuple(described),
        shared=_describe_shared(shared) if shared else None,
        exact={layer.layer for layer in counted} == set(experts.layers),
        parameters=round(share * sum(layer.parameters for layer in counted)),
        stored_bytes=round(share * sum(layer.stored_bytes for layer in counted)),
        other_bytes=count_other_bytes(experts, first),
        cache_bytes_per_token=experts.model_config.cache_bytes_per_token,
        analysis_bytes=measured + beside,
        further_layers=further_layers(experts.layers, first.number),
        further_bytes=beside,
        notes=tuple(notes),
        quick_bytes=quick_bytes(opened[0], len(experts.layers), parse_size(BUDGET, "the budget")),
        cost=Cost(
            bytes_read=checkpoint.bytes_read,
            bytes_fetched=repository.bytes_fetched,
            seconds=time.perf_counter() - started,
        ),
    )


class HeaderFacts(TypedDict):
    """What headers and config tell of a model's size, as MoELayout has it."""

    parameters: int
    stored_bytes: int
    other_bytes: int | None
    cache_bytes_per_token: int | None


def header_facts(experts: Experts) -> HeaderFacts:
    """The size of a model and of its experts."""
    layers = [experts.layer(number) for number in experts.layers]
    return {
        "parameters": sum(layer.parameters for layer in layers),
        "stored_bytes": sum(layer.stored_bytes for layer in layers),
        "other_bytes": count_other_bytes(experts),
        "cache_bytes_per_token": experts.model_config.cache_bytes_per_token,
    }


def count_other_bytes(experts: Experts, first: ExpertLayer | None = None) -> int | None:
    """Bytes of everything but routed experts, as stored; None if headers and index do not tell.

    If not all headers are read, layers are assumed to be like the first one.
    """
    total = experts.checkpoint.total_bytes
    numbers = (*experts.layers, *experts.mtp_layers)
    if total is None or not numbers:
        return None
    if all(map(experts.checkpoint.is_at_hand, experts.checkpoint.names)):
        of_experts = sum(experts.layer(number).stored_bytes for number in numbers)
    else:
        of_experts = len(numbers) * (first or experts.layer(numbers[0])).stored_bytes
    return max(0, total - of_experts)


def _describe_layer(layer: ExpertLayer) -> LayerLayout:
    formats = {role: "+".join(tensor.codecs) for tensor in layer.tensors for role in tensor.spec.roles}
    return LayerLayout(
        layer=layer.number,
        storage=layer.storage,
        formats={role: formats[role] for role in layer.roles},
        experts=layer.count,
        shapes={role: layer.shape(role) for role in layer.roles},
        parameters=layer.parameters,
        stored_bytes=layer.stored_bytes,
    )


def _describe_shared(shared: Experts) -> SharedExperts:
    layer = shared.layer(shared.layers[0])
    return SharedExperts(
        family=shared.family,
        storage=layer.storage,
        layers=shared.layers,
        shapes={role: layer.shape(role) for role in layer.roles},
        stored_bytes=layer.stored_bytes,
    )


def _names(layer: ExpertLayer) -> dict[str, tuple[str, ...]]:
    """The names of the files' tensors by what they hold, the largest first, with {expert} for an expert's number."""
    names: dict[str, tuple[str, ...]] = {}
    for tensor in layer.tensors:
        sizes: dict[str, int] = {}
        for info in tensor.infos():
            name = ".".join(split_name(info.name))
            sizes[name] = sizes.get(name, 0) + info.nbytes
        names[tensor.spec.role] = tuple(sorted(sizes, key=lambda name: (-sizes[name], name)))
    return names


def _open_beside(checkpoint: Checkpoint, kind: Kind, experts: Experts, notes: list[str]) -> Experts | None:
    """What else of a kind is in the same stack; None where there is none, or, with a note, where it can't be read."""
    try:
        beside = Experts(checkpoint, kind, experts.stack)
    except MoEError as error:
        if experts.stack in {match.root for match in match_names(checkpoint.names, kind)[0]}:
            what = {"shared": "shared experts", "dense": "dense layers"}[kind]
            notes.append(f"the {what} can't be described: {error.message}")
        return None
    return beside if beside.stack == experts.stack else None
