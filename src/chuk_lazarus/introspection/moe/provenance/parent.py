"""The dense model that experts may come from."""

from collections.abc import Sequence

from ..errors import InvalidRequest, UnknownFormat, name_model
from ..weights.expert_layer import ExpertLayer
from ..weights.experts import Experts
from ..weights.layouts import Kind


def open_parent(parent: str, layers: Sequence[ExpertLayer]) -> Experts:
    """The dense model's feed-forwards, or an MoE's shared experts, which may be what the dense layer has become; raises
    InvalidRequest where they can't be those of the parent."""
    with name_model(parent):
        dense = Experts.open(parent, "dense" if _has_dense(parent, layers) else "shared")
        for layer in layers:
            if layer.number not in dense.layers:
                raise InvalidRequest(f"it has no dense layer {layer.number}", "choose layers that both models have")
            hidden = dense.layer(layer.number).sizes["H"]
            if hidden != layer.sizes["H"]:
                raise InvalidRequest(f"its hidden size is {hidden}, and that of the experts {layer.sizes['H']}")
            if dense.layer(layer.number).roles != layer.roles:
                raise InvalidRequest("one of the two models has a gate, and the other none")
    return dense


def _has_dense(parent: str, layers: Sequence[ExpertLayer]) -> bool:
    """Whether the parent has dense feed-forwards where they are wanted, or at least no shared experts there."""
    wanted = {layer.number for layer in layers}
    has_layers = {}
    kinds: tuple[Kind, Kind] = ("dense", "shared")
    for kind in kinds:
        try:
            has_layers[kind] = wanted <= set(Experts.open(parent, kind).layers)
        except UnknownFormat:
            has_layers[kind] = False
    return has_layers["dense"] or not has_layers["shared"]
