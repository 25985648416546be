"""A part of a layer: some neurons of some experts, for a quick analysis."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..numerics.neurons import as_neurons
from ..text import parse_size
from ..weights.expert_layer import ExpertLayer, ExpertTensor
from .model import evenly_spaced

LAYERS, EXPERTS = 3, 16  # that a quick analysis reads
BUDGET = "64MB"  # of a quick analysis, if the user gives none


def quick_bytes(layer: ExpertLayer, layers: int, budget: int) -> int:
    """The most that a quick analysis reads of the experts of a model with `layers` layers like this one."""
    whole = bytes_per_neuron(layer) * layer.sizes["I"] * len(evenly_spaced(layer.count, EXPERTS))
    return min(budget, round(whole * len(evenly_spaced(layers, LAYERS))))


def further_layers(layers: Sequence[int], first: int) -> tuple[int, ...]:
    """The layers that an analysis of the first layer also reads parts of: `LAYERS` evenly spaced ones, without the
    first."""
    return tuple(layers[place] for place in evenly_spaced(len(layers), LAYERS) if layers[place] != first)


def further_budget(measured: int) -> int:
    """How many bytes of further layers may be read in total: half of the `measured` bytes of the first layer, but no
    more than a quick analysis reads."""
    return min(measured // 2, parse_size(BUDGET, "the budget"))


def further_bytes(first: ExpertLayer, layers: Sequence[int], measured: int) -> int:
    """What an analysis of the first layer, which reads `measured` bytes of it, reads of further layers."""
    further = further_layers(layers, first.number)
    return quick_bytes(first, len(further), further_budget(measured)) if further else 0


def roles_to_read(layer: ExpertLayer) -> tuple[list[str], list[ExpertTensor]]:
    """The roles that are read, gate and up, of ungated experts up and down; and the tensors that hold them."""
    roles = [role for role in layer.roles if role != "down"] if "gate" in layer.roles else list(layer.roles)
    return roles, [tensor for tensor in layer.tensors if set(tensor.spec.roles) & set(roles)]


def bytes_per_neuron(layer: ExpertLayer) -> float:
    """What the files spend on the roles of one neuron that are read."""
    _, tensors = roles_to_read(layer)
    return sum(info.nbytes for tensor in tensors for info in tensor.infos()) / layer.count / layer.sizes["I"]


def read_part(
    tensors: Sequence[ExpertTensor], roles: Sequence[str], expert: int, count: int
) -> dict[str, NDArray[np.float32]]:
    """By role, the first `count` neurons of an expert, [count, inputs]; of a transposed tensor all neurons, and as many
    of their inputs as take no more bytes."""
    neurons: dict[str, NDArray[np.float32]] = {}
    for tensor in tensors:
        for window in tensor.neurons(count):
            for piece in tensor.read([expert], *window):
                if piece.role in roles:
                    neurons[piece.role] = as_neurons(piece.role, piece.values[0])
    return neurons


def part_ranges(tensor: ExpertTensor, chosen: Sequence[int], count: int) -> list[tuple[str, tuple[int, int]]]:
    """The byte ranges, each with its file's name, that hold the first `count` neurons of the chosen experts."""
    return [
        byte_range
        for expert in chosen
        for window in tensor.neurons(count)
        for byte_range in tensor.byte_ranges(expert, *window)
    ]
