"""The experts of a checkpoint: their stack, layout and layers, and how tokens are routed to them."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal, NoReturn, get_args

import numpy as np

from ..arguments import ModelName, layer_number, layer_numbers, model_name, whole_number
from ..errors import InvalidRequest, ModelUnreadable, MoEError, NotMoE, UnknownFormat, printable
from ..terms import OVERLAY_CONFIG
from ..text import format_ranges
from .checkpoint import Checkpoint
from .codecs import refused
from .expert_layer import DoesNotFit, ExpertLayer, LacksRole, ShapesDoNotFit
from .gate_up_order import SAMPLE, weigh_orders
from .layouts import Kind, LayoutMatch, Order, has_feature, is_listed, is_mtp_root, match_names, usual_activation
from .repositories.find import find_repository

PROBED = 8  # experts of a damaged model of which one must fit


class Experts:
    """The routed experts of a model, or its shared experts, or its dense feed-forwards, one per layer.

    `stack` selects one of a model's stacks of layers by name, such as "encoder"; None is the largest stack. If the
    model may be `damaged`, the experts of a layer need not be complete or stored alike, and each is read with
    `ExpertLayer.alone`.

    `layers` are the numbers of the layers that have these experts, `mtp_layers` those for multi-token prediction.
    `stacks` are the names of all stacks, `family` is the name of the layout, `model_type` the one in the config, and
    `model_config` the config of the chosen stack. `notes` are sentences for the user on how the experts were found.
    `order_by` is how it is known whether gate and up rows in one tensor are in halves or in turns: from the model type,
    the tensors' names, or the norms of the weights; None if each has its own tensor.

    Raises InvalidRequest, NotMoE, UnknownFormat or ModelUnreadable.

    >>> experts = Experts.open("demo:native")
    >>> len(experts), experts.layer(0)
    (2, ExpertLayer(0, 8 experts, gate and up 128 x 64))
    >>> experts.layer(0).matrices(3)["down"].shape
    (64, 128)
    """

    def __init__(
        self, checkpoint: Checkpoint, kind: Kind = "routed", stack: str | None = None, damaged: bool = False
    ) -> None:
        if not isinstance(checkpoint, Checkpoint):
            raise InvalidRequest("Experts(...) takes an open checkpoint", "give the model to Experts.open")
        self._damaged = damaged
        self.checkpoint = checkpoint
        self.kind = kind
        self.model_config = checkpoint.model_config.language_model()
        self.notes = list(checkpoint.notes)
        self.order_by: Literal["model_type", "names", "norms"] | None = None
        matches, partial, unmatched = match_names(checkpoint.names, kind)
        unmatched = self._leave_out_heads(unmatched)
        if unmatched:
            self._refuse(partial, unmatched)
        sizes: dict[str, int] = {}
        for match in matches:
            sizes[match.root] = max(sizes.get(match.root, 0), len(match.layers))
        if not sizes:
            raise self._nothing()
        self.stacks = tuple(sorted(sizes, key=lambda root: (is_mtp_root(root), -sizes[root], root)))
        root = self._choose_stack(stack)
        self.model_config = checkpoint.model_config.stack(root)
        if rotation := self.model_config.rotation(of_experts=True):
            raise refuse_rotated(rotation)
        self._match = self._choose_match([match for match in matches if match.root == root])
        depth = self.model_config.num_hidden_layers
        main_stacks = [name for name in self.stacks if not is_mtp_root(name)]
        end = max(self._match.layers) + 1
        if depth is not None and (self.model_config.is_stack or main_stacks == [root]):
            end = depth
        self.layers = tuple(sorted(layer for layer in self._match.layers if layer < end))
        self.mtp_layers = tuple(sorted(layer for layer in self._match.layers if layer >= end))
        first = self._probe(self._match)
        if first.has_shared_last:
            self.notes.append(f"expert {first.count} of each stack is the shared expert, and is left out")
        elif left_out := first.left_out:
            self.notes.append(
                f"experts {format_ranges(left_out)} of a layer are left out: no weights, or weights of other shapes"
            )
        if any(".switch_mlp_1." in name for name in checkpoint.names):
            self.notes.append("the experts of another modality, switch_mlp_1, are left out")
        if not self.layers:
            raise ModelUnreadable(
                f"{checkpoint.config_file} says num_hidden_layers is {depth}, but no MoE layer is below that"
            )

    def _leave_out_heads(self, unmatched: list[str]) -> list[str]:
        """The unmatched names without those in heads for multi-token prediction, which get a note."""
        depth = self.model_config.num_hidden_layers
        heads = [name for name in unmatched if is_in_head(name, depth)]
        if heads:
            module, _, _ = heads[0].rpartition(".")
            self.notes.append(f"experts in a head for multi-token prediction are not read: {module}")
        return [name for name in unmatched if name not in set(heads)] if heads else unmatched

    @classmethod
    def open(cls, model: ModelName, kind: Kind = "routed", damaged: bool = False) -> "Experts":
        """Open the experts of `model`: a folder, a file, a Hub id or `demo:NAME`, each optionally followed by
        `#STACK`."""
        name, stack = split_model(model_name(model))
        if kind not in get_args(Kind):
            raise InvalidRequest(f"there are no {kind!r} experts", f"give {', '.join(get_args(Kind))}")
        return cls(Checkpoint(find_repository(name)), kind, stack, damaged)

    def __repr__(self) -> str:
        """For instance "Experts('org/name', mixtral, layers 0-31)"; does not read anything."""
        return f"Experts({self.checkpoint.repository.name!r}, {self.family}, layers {format_ranges(self.layers)})"

    def __len__(self) -> int:
        """The number of layers with these experts, not counting those for multi-token prediction."""
        return len(self.layers)

    def __iter__(self) -> Iterator[ExpertLayer]:
        """The layers in order."""
        return map(self.layer, self.layers)

    @property
    def config(self) -> Mapping[str, Any]:
        """The JSON object in the config that describes the chosen stack."""
        return self.model_config.values

    @property
    def family(self) -> str:
        return self._match.layout.name

    @property
    def order(self) -> Order | None:
        """How gate and up rows are arranged in the tensor that holds both, None if each has its own."""
        return self._match.layout.order

    @property
    def model_type(self) -> str | None:
        return self.model_config.model_type

    @property
    def stack(self) -> str:
        """The name of the chosen stack: the prefix of its tensors' names."""
        return self._match.root

    def layer(self, number: int) -> ExpertLayer:
        """One MoE layer; for any other number raises InvalidRequest, which lists the MoE layers."""
        number = whole_number(number, "the layer", f"the MoE layers are {format_ranges(self.layers)}")
        if number not in self._match.layers:
            raise InvalidRequest(
                f"layer {number} is not an MoE layer", f"the MoE layers are {format_ranges(self.layers)}"
            )
        return self._open(self._match, number)

    def choose_layers(self, layer: int | None, layers: Sequence[int] | str | None) -> tuple[int, ...]:
        """The numbers of the layers that the user asks for: `layer`, or `layers`, or the first MoE layer.

        `layers` are numbers, or a string such as "0,5,10", "0-23/6" or "all". Raises InvalidRequest, which lists the
        MoE layers, for any other layer; also if both `layer` and `layers` are given, or `layers` is empty.
        """
        layer, layers = layer_number(layer), layer_numbers(layers)
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
            raise InvalidRequest(f"{layers!r} selects no layer", f"the MoE layers are {format_ranges(self.layers)}")
        return tuple(dict.fromkeys(chosen))

    def _open(self, match: LayoutMatch, number: int) -> ExpertLayer:
        expected: dict[str, int | None] = {}
        if self.kind == "routed":
            expected[self.checkpoint.config_file] = self.model_config.layer(number).expert_count
            router = match.beside.get(number, {}).get("router", {}).get("weight")
            is_counted = self._damaged and any(expected.values())  # and the router may be what is wrong
            if router and match.layout.is_flattened and not is_counted:
                expected[router] = next(iter(self.checkpoint.info(router).shape), None)
        return ExpertLayer(
            self.checkpoint,
            match,
            number,
            expected,
            self.model_config,
            one_plus_norm=has_feature(self.model_type, "one_plus_norm"),
            shared_last=has_feature(self.model_type, "shared_last"),
            remark=self._remark,
            damaged=self._damaged,
        )

    def _probe(self, match: LayoutMatch) -> ExpertLayer:
        """The first layer, which determines layout and sizes; of a damaged model, one of its experts that fits.

        If none of the first PROBED fits, raises what the first expert's tensors raise.
        """
        first = self._open(match, min(match.layers))
        if not self._damaged or first.layout.is_single:
            return first
        required = {tensor.role for tensor in match.layout.tensors}
        complete = (
            layer.alone(expert)
            for layer in (self._open(match, number) for number in sorted(match.layers))
            for expert in sorted(next(iter(layer.parts().values())), key=lambda number: number or 0)
            if expert is not None
            and all(expert in experts for experts in layer.parts().values())
            and layer.parts().keys() == required
        )
        reason: MoEError | None = None
        for candidate in islice(complete, PROBED):
            try:
                candidate.sizes  # noqa: B018  which raises where it does not fit
            except MoEError as error:
                reason = reason or error
            else:
                return candidate
        raise reason or ModelUnreadable("no expert has all its tensors", "the checkpoint is incomplete")

    def _remark(self, sentence: str) -> None:
        """Add a sentence to the notes, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    @property
    def activation(self) -> str:
        """The name of the experts' activation: the config's, or else the layout's, or else silu."""
        layout = self._match.layout
        is_gated = any("gate" in tensor.roles for tensor in layout.tensors)
        if is_gated and has_feature(self.model_type, "swiglu_oai"):
            return "swiglu_oai"
        names = [*self.model_config.activations, usual_activation(self.model_type), layout.activation]
        if layout.activation == "gelu_up_plus_one":  # which no config can name
            names.reverse()
        fitting = (name for name in names if name is not None and (is_gated or name != "swiglu_oai"))
        return printable(next(fitting, "silu"))

    @property
    def top_k(self) -> int:
        """The number of experts per token, from the config; 1 if it does not say."""
        return self.model_config.top_k

    @property
    def scoring(self) -> str:
        """The router's function, "softmax" or "sigmoid".

        If the config does not name it, a router whose scores are corrected by a bias, like that of DeepSeek-V3, uses
        the sigmoid.
        """
        is_corrected = any("correction" in parts for parts in self._match.beside.values())
        default = "sigmoid" if is_corrected or has_feature(self.model_type, "sigmoid") else "softmax"
        return self.model_config.scoring or default

    def _refuse(self, partial: list[LayoutMatch], unmatched: list[str]) -> NoReturn:
        """Raise ModelUnreadable or UnknownFormat for tensors that look like routed experts but fit no layout."""
        for match in partial:
            if match.names.issuperset(unmatched):
                roles = {role for experts in match.layers.values() for role in experts}
                absent = [tensor for tensor in match.layout.tensors if tensor.role not in roles]
                lacking = [f"{tensor.role} projections ({tensor.leaf})" for tensor in absent]
                raise LacksRole.of(
                    f"no layer has {f'the {lacking[0]}' if lacking else 'all tensors'} that layout "
                    f"{match.layout.name} needs",
                    [role for tensor in absent for role in tensor.roles],
                )
        if method := refused.name_method(self.checkpoint.model_config.quantization()):
            raise UnknownFormat(
                f"{unmatched[0]}: stored as {method}, which we don't decode",
                "use the original model, or one in a format that docs/families.md lists",
            )
        listing = ", ".join(unmatched[:3]) + (f" and {len(unmatched) - 3} more" if len(unmatched) > 3 else "")
        raise UnknownFormat(
            f"no layout in our table holds these tensors, which look like routed experts: {listing}",
            f"model_type is {self.model_type or 'not given'}; please report it",
        )

    def _nothing(self) -> MoEError:
        """The error to raise for a checkpoint without experts of the wanted kind."""
        if self.kind != "routed":
            return UnknownFormat(
                f"no layout in our table has {'shared experts' if self.kind == 'shared' else 'dense feed-forwards'}",
                f"model_type is {self.model_type or 'not given'}",
            )
        if OVERLAY_CONFIG in self.checkpoint.config:
            return UnknownFormat(
                "the model is an overlay, whose experts are stored as base and factors",
                "give the model that it was made from, or export it to a standard checkpoint",
            )
        if (count := self.model_config.expert_count or 0) > 1:
            return UnknownFormat(
                f"{self.checkpoint.config_file} says that there are {count} experts, but no tensor's name is known",
                f"model_type is {self.model_type or 'not given'}; please report it",
            )
        return NotMoE(
            "the model has no routed experts: it is not a Mixture of Experts",
            "give the original MoE checkpoint, not a dense one or an adapter",
        )

    def _choose_stack(self, wanted: str | None) -> str:
        """The root of the stack to read; raises InvalidRequest, which lists the stacks, if none is `wanted`."""
        if wanted is None:
            main_stacks = [root for root in self.stacks if not is_mtp_root(root)]
            if len(main_stacks) > 1:
                self.notes.append(
                    f"the model has {len(main_stacks)} stacks of layers ({', '.join(main_stacks)}): {main_stacks[0]} "
                    f"was read; to read another, add #{main_stacks[1]} to the model's name"
                )
            for root in self.stacks[len(main_stacks) :] if self.kind == "routed" else ():
                self.notes.append(
                    f"layers for multi-token prediction are separate: to read them, add #{root} to the model's name"
                )
            return self.stacks[0]
        if wanted in self.stacks:
            return wanted
        roots = [root for root in self.stacks if wanted in root.split(".")]
        if len(roots) != 1:
            listing = ", ".join(root or "(no name)" for root in self.stacks)
            raise InvalidRequest(f"the model has no stack of layers named {wanted}", f"the stacks are {listing}")
        return roots[0]

    def _choose_match(self, candidates: list[LayoutMatch]) -> LayoutMatch:
        """The match whose layout fits the shapes and accounts for all tensors; if several do, model_type decides.

        Raises UnknownFormat if no layout does, or if model_type does not decide.
        """
        fitting: list[LayoutMatch] = []
        reason: DoesNotFit | None = None
        for match in candidates:
            try:
                self._probe(match).sizes  # noqa: B018  which raises where the shapes do not fit
                fitting.append(match)
            except DoesNotFit as error:
                is_usual = isinstance(reason, ShapesDoNotFit) and self.model_type in reason.layout.model_types
                reason = reason if is_usual else error
        if not fitting and reason:
            raise reason
        all_names = set().union(*(match.names for match in candidates))
        whole = [match for match in fitting if match.names == all_names]
        if not whole:
            leftover = min(all_names - fitting[0].names)
            raise UnknownFormat(f"layout {fitting[0].layout.name} fits, but leaves over {leftover}")
        if is_listed(self.model_type):
            # the gates and ups of a listed model lie in turns only where a row of its type says so
            whole = [m for m in whole if self.model_type in m.layout.model_types or not m.layout.may_be_halves] or whole
        known = [match for match in whole if self.model_type in match.layout.model_types]
        if len(whole) > 1 and len(known) != 1 and (known or not _differ_in_order(whole)):
            names = ", ".join(match.layout.name for match in whole)
            raise UnknownFormat(
                f"the expert tensors fit several layouts ({names}) and model_type is {self.model_type or 'not given'}",
                "put the model's config.json beside its weights, or report the model type",
            )
        chosen = known[0] if known else whole[0]
        if chosen.layout.order:
            self.order_by = "model_type" if known or is_listed(self.model_type) else "names"
        is_unlisted = bool(chosen.layout.model_types) and not is_listed(self.model_type) and self.kind == "routed"
        if chosen.layout.order and not known and (chosen.layout.may_be_halves or is_unlisted):
            chosen = self._choose_order(chosen, whole)
        if is_unlisted:
            self.notes.append(
                f"model_type {self.model_type or '(none)'} is not in our table: "
                f"layout {chosen.layout.name} was chosen by its tensors' names"
            )
        return chosen

    def _choose_order(self, match: LayoutMatch, others: list[LayoutMatch]) -> LayoutMatch:
        """The match with gate and up rows in the order that the weights of its first layer show.

        Raises UnknownFormat if they show none, and the names allow both orders.
        """
        assert match.layout.order
        layer = self._probe(match)
        sample = np.linspace(0, layer.count - 1, min(SAMPLE, layer.count)).astype(int)
        evidence = weigh_orders((layer.matrices(int(expert)) for expert in sample), match.layout.order)
        if not evidence.order:
            if not match.layout.may_be_halves and len(others) == 1:
                return match
            raise UnknownFormat(
                f"gate and up rows may be in halves or in turns: model_type is {self.model_type or 'not given'}, and "
                f"the weights do not show which ({evidence.describe()})",
                "put the model's config.json beside its weights, or report the model type",
            )
        self.order_by = "norms"
        self.notes.append(f"gate and up rows are in {evidence.order}: {evidence.describe()}")
        for other in others:
            if other.layout.order == evidence.order:
                return other
        return replace(match, layout=match.layout.with_order(evidence.order))


def _differ_in_order(matches: Sequence[LayoutMatch]) -> bool:
    """Whether the matches differ only in the order of gate and up rows."""
    axes = [[tensor.axes for tensor in match.layout.with_order("halves").tensors] for match in matches]
    return all(match.layout.order for match in matches) and all(one == axes[0] for one in axes)


def refuse_rotated(key: str) -> UnknownFormat:
    """The error for a model whose config says, under this key, that its weights are stored rotated."""
    return UnknownFormat(
        f"its config says under {key} that weights are stored rotated, which we can't undo",
        "give the model that it was made from, or a version that is not rotated",
    )


def parse_layers(text: str) -> list[int]:
    """The layers in a list such as "0,5,10" or "0-23/6" (every sixth from 0 to 23).

    Raises InvalidRequest for any other text.
    """
    chosen: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6})(?:/(\d{1,6}))?)?\s*", item)
        if not match or match[3] == "0" * len(match[3] or "x"):
            raise InvalidRequest(f"{text!r} is not a list of layers", "write it like 0,5,10 or 0-23/6, or all")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        chosen += range(first, last + 1, step)
    return chosen


def split_model(model: str) -> tuple[str, str | None]:
    """A model's name, and the stack that may follow it after a #: "org/name#encoder"."""
    name, mark, stack = model.rpartition("#")
    return (name, stack) if mark and name and not os.path.exists(model) else (model, None)


def is_in_head(name: str, depth: int | None) -> bool:
    """Whether the tensor belongs to a head for multi-token prediction, by its name or its layer's number."""
    layer = re.search(r"(?:^|\.)layers\.(\d{1,9})\.", name)
    return is_mtp_root(name) or bool(layer and depth is not None and int(layer[1]) >= depth)
