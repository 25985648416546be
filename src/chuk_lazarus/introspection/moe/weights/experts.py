"""Which experts a checkpoint has: the stack, the layout, the layers, and what the config says of them."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ..errors import InvalidRequest, ModelUnreadable, MoEError, NotMoE, UnknownFormat, printable
from ..text import format_ranges
from .checkpoint import Checkpoint
from .expert_layer import DoesNotFit, ExpertLayer
from .layouts import Kind, LayoutMatch, has_feature, is_listed, match_names, usual_activation
from .model_config import (
    ACTIVATION_KEYS,
    QUANTIZATION_KEYS,
    TOP_K_KEYS,
    count_experts,
    layer_config,
    stack_config,
    text_config,
)
from .repositories.find import find_repository


class Experts:
    """The routed experts of a model, or its shared ones, or its dense feed-forwards: then a layer has one expert.

    `stack` says which one to read of a model with several stacks of layers, such as "encoder"; the largest if None.
    `layers` are the numbers of the layers that have such experts, `mtp_layers` those of multi-token prediction,
    `stacks` the names of all stacks, `family` the layout's name, `model_type` what the config says, `notes` what the
    user should know about how the experts were found. Raises InvalidRequest, NotMoE, UnknownFormat or ModelUnreadable.
    """

    def __init__(self, checkpoint: Checkpoint, kind: Kind = "routed", stack: str | None = None) -> None:
        self.checkpoint = checkpoint
        self.kind = kind
        self.config = text_config(checkpoint.config)
        self.notes: list[str] = []
        matches, partial, unmatched = match_names(checkpoint.names, kind)
        if unmatched:
            self._refuse(partial, unmatched)
        sizes: dict[str, int] = {}
        for match in matches:
            sizes[match.root] = max(sizes.get(match.root, 0), len(match.layers))
        if not sizes:
            raise self._nothing()
        self.stacks = tuple(sorted(sizes, key=lambda root: (_is_mtp_root(root), -sizes[root], root)))
        root = self._choose_stack(stack)
        self.config, is_own = stack_config(checkpoint.config, root)
        self._match = self._choose([match for match in matches if match.root == root])
        depth = self.config.get("num_hidden_layers")
        main = [one for one in self.stacks if not _is_mtp_root(one)]
        last = max(self._match.layers) + 1
        if type(depth) is int and (is_own or main == [root]):
            last = depth
        self.layers = tuple(sorted(layer for layer in self._match.layers if layer < last))
        self.mtp_layers = tuple(sorted(layer for layer in self._match.layers if layer >= last))
        if left_out := self._open(self._match, min(self._match.layers)).left_out:
            self.notes.append(
                f"experts {format_ranges(left_out)} of a layer have no weights, or other shapes, and are left out"
            )
        if not self.layers:
            raise ModelUnreadable(
                f"{checkpoint.config_file} says num_hidden_layers is {depth}, and no MoE layer lies below that"
            )

    @classmethod
    def open(cls, model: str, kind: Kind = "routed") -> "Experts":
        """The experts of `model`: a folder, a file, a Hub id or `demo:NAME`, where `#STACK` may follow."""
        name, stack = split_model(model)
        return cls(Checkpoint(find_repository(name)), kind, stack)

    @property
    def family(self) -> str:
        return self._match.layout.name

    @property
    def model_type(self) -> str | None:
        found = self.config.get("model_type") or self.checkpoint.config.get("model_type")
        return printable(found) if isinstance(found, str) else None

    @property
    def stack(self) -> str:
        """The name of the stack that is read: what its tensors' names begin with."""
        return self._match.root

    def layer(self, number: int) -> ExpertLayer:
        """One MoE layer; raises InvalidRequest, naming the layers there are, when it is none."""
        if number not in self._match.layers:
            raise InvalidRequest(
                f"layer {number} is not an MoE layer", f"the MoE layers are {format_ranges(self.layers)}"
            )
        return self._open(self._match, number)

    def choose_layers(self, layer: int | None, layers: Sequence[int] | str | None) -> tuple[int, ...]:
        """The layers that the user means: one, several (numbers, or a string such as "0,5,10", "0-23/6" or "all"), or
        the first.

        Raises InvalidRequest, naming the layers there are, for any that is not an MoE layer.
        """
        if layer is not None and layers is not None:
            raise InvalidRequest("both layer and layers are given", "give one of the two")
        if layers == "all":
            return self.layers
        if layers is None:
            chosen = [self.layers[0] if layer is None else layer]
        else:
            chosen = parse_layers(layers) if isinstance(layers, str) else list(layers)
        for number in chosen:
            self.layer(number)
        if not chosen:
            raise InvalidRequest(f"{layers!r} chooses no layer", f"the MoE layers are {format_ranges(self.layers)}")
        return tuple(dict.fromkeys(chosen))

    def _open(self, match: LayoutMatch, number: int) -> ExpertLayer:
        expected: dict[str, int | None] = {}
        if self.kind == "routed":
            expected[self.checkpoint.config_file] = count_experts(layer_config(self.config, number))
            router = match.beside.get(number, {}).get("router", {}).get("weight")
            if router and match.layout.is_flattened:
                expected[router] = next(iter(self.checkpoint.info(router).shape), None)
        one_plus_norm = has_feature(self.model_type, "one_plus_norm")
        return ExpertLayer(self.checkpoint, match, number, expected, self._quantization, one_plus_norm)

    @property
    def activation(self) -> str:
        """The name of the experts' activation: what the config says, or the layout's own, or silu."""
        function = self._ffn_config.get("ffn_act_fn")
        names = [self.config.get(key) for key in ACTIVATION_KEYS]
        names += [function.get("name")] if isinstance(function, dict) else []
        is_gated = any("gate" in tensor.roles for tensor in self._match.layout.tensors)
        if is_gated and has_feature(self.model_type, "swiglu_oai"):
            return "swiglu_oai"
        names += [usual_activation(self.model_type), self._match.layout.activation]
        known = (name for name in names if isinstance(name, str) and (is_gated or name != "swiglu_oai"))
        return printable(next(known, "silu"))

    @property
    def top_k(self) -> int:
        """How many experts a token is sent to, by the config; 1 where it does not say."""
        found = [config.get(key) for config in (self.config, self._ffn_config) for key in TOP_K_KEYS]
        first = [count[0] if isinstance(count, list) and count else count for count in found]  # one for each layer
        return next((count for count in first if type(count) is int and count > 0), 1)

    @property
    def scoring(self) -> str:
        """softmax or sigmoid; a router with a bias that corrects its scores, as DeepSeek-V3's, takes the sigmoid."""
        corrected = any("correction" in found for found in self._match.beside.values())
        said = self.config.get("scoring_func")
        default = "sigmoid" if corrected or has_feature(self.model_type, "sigmoid") else "softmax"
        return said if said in ("sigmoid", "softmax") else default

    @property
    def _ffn_config(self) -> dict[str, Any]:
        inner = self.config.get("ffn_config")
        return inner if isinstance(inner, dict) else {}

    @property
    def _quantization(self) -> Mapping[str, Any]:
        configs = (self.checkpoint.config, self.config)
        found = (config.get(key) for config in configs for key in QUANTIZATION_KEYS)
        return next((one for one in found if isinstance(one, dict) and one), {})

    def _refuse(self, partial: list[LayoutMatch], unmatched: list[str]) -> NoReturn:
        """Raise for tensors that look like routed experts and are in no layout."""
        for match in partial:
            if match.names.issuperset(unmatched):
                roles = {role for experts in match.layers.values() for role in experts}
                lacking = [f"{x.role} projections ({x.leaf})" for x in match.layout.tensors if x.role not in roles]
                raise ModelUnreadable(
                    f"no layer has {f'its {lacking[0]}' if lacking else 'all that it needs'}, as layout "
                    f"{match.layout.name} has",
                    "the checkpoint is incomplete: download it again",
                )
        listing = ", ".join(unmatched[:3]) + (f" and {len(unmatched) - 3} more" if len(unmatched) > 3 else "")
        raise UnknownFormat(
            f"no layout in our table holds these tensors, which look like routed experts: {listing}",
            f"model_type is {self.model_type or 'not given'}; please report it",
        )

    def _nothing(self) -> MoEError:
        """What to raise when nothing in the checkpoint is of the wanted kind."""
        if self.kind != "routed":
            return UnknownFormat(
                f"no layout in our table holds {'shared experts' if self.kind == 'shared' else 'dense feed-forwards'}",
                f"model_type is {self.model_type or 'not given'}",
            )
        if "overlay_config" in self.checkpoint.config:
            return UnknownFormat(
                "the model is an overlay, whose experts are stored as base and factors",
                "give the model that it was made from, or export it to a standard checkpoint",
            )
        if (count := count_experts(self.config) or 0) > 1:
            return UnknownFormat(
                f"{self.checkpoint.config_file} says that there are {count} experts, and no tensor's name is known",
                f"model_type is {self.model_type or 'not given'}; please report it",
            )
        return NotMoE(
            "the model has no routed experts: it is not a Mixture of Experts",
            "give the original MoE checkpoint, not a dense one or an adapter",
        )

    def _choose_stack(self, wanted: str | None) -> str:
        """The root of the stack to read; raises InvalidRequest, naming those there are, when the wanted one is none."""
        others = ", ".join(root or "(no name)" for root in self.stacks)
        if wanted is None:
            main = [root for root in self.stacks if not _is_mtp_root(root)]
            if len(main) > 1:
                self.notes.append(
                    f"the model has {len(main)} stacks of layers ({', '.join(main)}): {main[0]} was read; "
                    f"#{main[1]} behind the model's name reads another"
                )
            for root in self.stacks[len(main) :] if self.kind == "routed" else ():
                self.notes.append(
                    f"layers for multi-token prediction lie apart: #{root} behind the model's name reads them"
                )
            return self.stacks[0]
        found = [root for root in self.stacks if root == wanted] or [
            root for root in self.stacks if wanted in root.split(".")
        ]
        if len(found) != 1:
            raise InvalidRequest(f"the model has no stack of layers named {wanted}", f"there are {others}")
        return found[0]

    def _choose(self, candidates: list[LayoutMatch]) -> LayoutMatch:
        """The one match whose layout fits the shapes and leaves no tensor over; where several do, the config's
        model_type decides."""
        fitting = []
        for match in candidates:
            try:
                self._open(match, min(match.layers)).sizes  # noqa: B018  asked for its errors
                fitting.append(match)
            except DoesNotFit as error:
                reason = error
        if not fitting:
            raise UnknownFormat(reason.message, reason.hint)
        everything = set().union(*(match.names for match in candidates))
        if not (whole := [match for match in fitting if match.names == everything]):
            left = min(everything - fitting[0].names)
            raise UnknownFormat(f"layout {fitting[0].layout.name} fits, and does not account for {left}")
        if is_listed(self.model_type):  # and lies in turns only where its row says so
            whole = [m for m in whole if self.model_type in m.layout.model_types or not m.layout.may_be_halves] or whole
        known = [match for match in whole if self.model_type in match.layout.model_types]
        if len(whole) > 1 and len(known) != 1:
            names = ", ".join(match.layout.name for match in whole)
            raise UnknownFormat(
                f"the expert tensors fit several layouts ({names}) and model_type is {self.model_type or 'not given'}",
                "put the model's config.json beside its weights, or report the model type",
            )
        chosen = known[0] if known else whole[0]
        if chosen.layout.may_be_halves and not known:
            raise UnknownFormat(
                f"gates and ups may lie in halves or in turns, and model_type is {self.model_type or 'not given'}",
                "put the model's config.json beside its weights, or report the model type",
            )
        if chosen.layout.model_types and not is_listed(self.model_type) and self.kind == "routed":
            self.notes.append(
                f"model_type {self.model_type or '(none)'} is not in our table: "
                f"layout {chosen.layout.name} was found by names"
            )
        return chosen


def parse_layers(text: str) -> list[int]:
    """The layers of "0,5,10" or "0-23/6" (every sixth from 0 to 23); raises InvalidRequest for anything else."""
    chosen: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6})(?:/(\d{1,6}))?)?\s*", item)
        if not match or match[3] == "0" * len(match[3] or "x"):
            raise InvalidRequest(f"{text!r} is no list of layers", "write it like 0,5,10 or 0-23/6, or all")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        chosen += range(first, last + 1, step)
    return chosen


def split_model(model: str) -> tuple[str, str | None]:
    """A model's name and the stack that follows it behind a #, if one does: "org/name#encoder"."""
    name, mark, stack = model.rpartition("#")
    return (name, stack) if mark and name and not os.path.exists(model) else (model, None)


def _is_mtp_root(root: str) -> bool:
    return any(part in ("mtp", "mtp_block") for part in root.split("."))
