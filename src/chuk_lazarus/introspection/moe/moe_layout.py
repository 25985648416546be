"""What is in this checkpoint? `MoELayoutService` tells it from the headers alone."""

import time
from collections.abc import Sequence

from .errors import UnknownFormat, naming, printable
from .measure import bytes_to_measure, evenly_spaced
from .moe_type import DEFAULT_EXPERTS
from .reports import Cost, LayerLayout, MoELayout, SharedExperts
from .weights.checkpoint import Checkpoint
from .weights.experts import ExpertLayer, Experts, split_model
from .weights.layouts import Kind
from .weights.source import find_repository


class MoELayoutService:
    """Tells how the experts of a model lie in its files, without reading one weight.

    >>> MoELayoutService.describe("demo:native").storage
    'bf16'
    """

    @staticmethod
    def describe(model: str, *, layers: Sequence[int] | str | None = None) -> MoELayout:
        """Describe one model, named as for `MoETypeService.analyze`.

        The headers that hold `layers` are read; if None, those of the first and the last MoE layer, and the others are
        taken to be like them unless their headers came along. Raises a child of MoEError.
        """
        with naming(model):
            return _describe(model, layers)


def _describe(model: str, layers: Sequence[int] | str | None) -> MoELayout:
    started = time.perf_counter()
    name, stack = split_model(model)
    checkpoint = Checkpoint(find_repository(name))
    experts = Experts(checkpoint, stack=stack)
    if layers is None:
        ends = (experts.layers[0], experts.layers[-1])
        for number in ends:
            experts.layer(number).sizes  # noqa: B018  reads the headers that tell them
        numbers = [number for number in experts.layers if number in ends or experts.layer(number).is_at_hand]
    else:
        numbers = sorted(experts.choose_layers(None, layers))
    opened = [experts.layer(number) for number in numbers]
    first = opened[0]
    described = [
        LayerLayout(
            layer=layer.number,
            storage=layer.storage,
            experts=layer.count,
            shapes={role: layer.shape(role) for role in layer.roles},
            parameters=layer.parameters,
            stored_bytes=layer.stored_bytes,
        )
        for layer in opened
    ]
    share = len(experts.layers) / len(described)
    repository = checkpoint.repository
    return MoELayout(
        model=printable(model),
        revision=repository.revision,
        family=experts.family,
        model_type=experts.model_type,
        storage=", ".join(dict.fromkeys(layer.storage for layer in described)),
        experts=first.count,
        stack=experts.stack,
        stacks=experts.stacks,
        top_k=experts.top_k,
        activation=experts.activation,
        moe_layers=experts.layers,
        mtp_layers=experts.mtp_layers,
        dense_layers=_layers_of(checkpoint, "dense", experts),
        tensors={tensor.spec.role: ".".join(tensor.place) for tensor in first.tensors},
        layers=tuple(described),
        shared=_shared(checkpoint, experts),
        exact=len(described) == len(experts.layers),
        parameters=round(share * sum(layer.parameters for layer in described)),
        stored_bytes=round(share * sum(layer.stored_bytes for layer in described)),
        analysis_bytes=bytes_to_measure(first, evenly_spaced(first.count, DEFAULT_EXPERTS)),
        notes=tuple(experts.notes),
        cost=Cost(
            bytes_read=checkpoint.bytes_read,
            bytes_fetched=repository.bytes_fetched,
            seconds=time.perf_counter() - started,
        ),
    )


def _open_beside(checkpoint: Checkpoint, kind: Kind, experts: Experts) -> Experts | None:
    """What else of a kind is in the same stack; None where nothing is known."""
    try:
        found = Experts(checkpoint, kind, experts.stack)
    except UnknownFormat:
        return None
    return found if found.stack == experts.stack else None


def _layers_of(checkpoint: Checkpoint, kind: Kind, experts: Experts) -> tuple[int, ...]:
    found = _open_beside(checkpoint, kind, experts)
    return found.layers if found else ()


def _shared(checkpoint: Checkpoint, experts: Experts) -> SharedExperts | None:
    if not (found := _open_beside(checkpoint, "shared", experts)):
        return None
    layer: ExpertLayer = found.layer(found.layers[0])
    return SharedExperts(
        family=found.family,
        storage=layer.storage,
        layers=found.layers,
        shapes={role: layer.shape(role) for role in layer.roles},
        stored_bytes=layer.stored_bytes,
    )
