"""The routed experts of a checkpoint as matrices in canonical form, read only when asked for.

Canonical form: `y = W x`, float32; gate and up are [intermediate, hidden], down is [hidden, intermediate]. Biases are
never part of a matrix.
"""

import os
import re
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidRequest, ModelUnreadable, MoEError, NotMoE, UnknownFormat, printable, spans
from .checkpoint import QUANTIZATION_KEYS, Checkpoint, TensorInfo
from .codecs import NOT_DECODED, SAME_PART, Part, Stored, recognise
from .layouts import (
    ROLES,
    Kind,
    Layout,
    Matches,
    Parts,
    StoredTensor,
    has_feature,
    is_listed,
    match_names,
    split_name,
    usual_activation,
)
from .source import Progress, Range, find_repository

BIAS = "bias"
MATRIX_WINDOW = 4_000_000  # weights of one expert decoded at a time
MAX_EXPERTS = 4096  # of a layer: twice as many as any published; products of all pairs of them are taken
MAX_SIDE = 2**17  # of a matrix: twice as long as any published; hundreds of rows are compared with all others
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
ACTIVATION_KEYS = ("mlp_hidden_act", "hidden_act", "hidden_activation", "activation_function", "dense_act_fn")
TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "moe_top_k",
    "moe_num_active_primary_experts",
    "experts_per_token",
    "router_topk",
)
EXPERT_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts", "moe_num_primary_experts")


Infos = Mapping[str, TensorInfo]
"""The tensors of the files that hold one matrix, or a slice of it, by their parts' usual names."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The same cut-out of one role's matrix in several experts.

    `values` is float32 [experts, rows, columns]; `index` says where in the canonical matrix it belongs.
    """

    role: str
    index: tuple[slice, slice]
    values: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Router:
    """A router's weight [experts, hidden], its bias and what corrects its choice, [experts] each, where it has them."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    correction: NDArray[np.float32] | None


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
        self.config = _text_config(checkpoint.config)
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
        self.config, is_own = _stack_config(checkpoint.config, root)
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
                f"experts {spans(left_out)} of a layer have no weights, or other shapes, and are left out"
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

    def layer(self, number: int) -> "ExpertLayer":
        """One MoE layer; raises InvalidRequest, naming the layers there are, when it is none."""
        if number not in self._match.layers:
            raise InvalidRequest(f"layer {number} is not an MoE layer", f"the MoE layers are {spans(self.layers)}")
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
            raise InvalidRequest(f"{layers!r} chooses no layer", f"the MoE layers are {spans(self.layers)}")
        return tuple(dict.fromkeys(chosen))

    def _open(self, match: Matches, number: int) -> "ExpertLayer":
        expected: dict[str, int | None] = {}
        if self.kind == "routed":
            expected[self.checkpoint.config_file] = _config_count(_layer_config(self.config, number))
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

    def _refuse(self, partial: list[Matches], unmatched: list[str]) -> NoReturn:
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
        if (count := _config_count(self.config) or 0) > 1:
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

    def _choose(self, candidates: list[Matches]) -> Matches:
        """The one match whose layout fits the shapes and leaves no tensor over; where several do, the config's
        model_type decides."""
        fitting = []
        for match in candidates:
            try:
                self._open(match, min(match.layers)).sizes  # noqa: B018  asked for its errors
                fitting.append(match)
            except _DoesNotFit as error:
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


class _DoesNotFit(UnknownFormat):
    """The stored shapes are not those of the layout."""


class ExpertLayer:
    """The routed experts of one MoE layer.

    `expected` says how many there should be, by who says so (None where it does not); `tensors` are the stored tensors,
    each of which holds one role or two.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        match: Matches,
        number: int,
        expected: Mapping[str, int | None],
        quantization: Mapping[str, Any],
        one_plus_norm: bool = False,
    ) -> None:
        self.number = number
        self._one_plus_norm = one_plus_norm
        self.expected = {source: count for source, count in expected.items() if count is not None}
        self._checkpoint = checkpoint
        self._match = match
        self._quantization = quantization

    @property
    def layout(self) -> Layout:
        return self._match.layout

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The number of experts E, the intermediate size I and the hidden size H."""
        shapes = {tensor.spec.role: tensor.plain_shape for tensor in self.tensors}
        experts = None if self.layout.is_stacked else len(self.tensors[0].parts)  # 1 in a dense layer
        if self.layout.is_flattened:
            experts = next(reversed(self.expected.values()), None)  # the router's, if there is one
        sizes = self.layout.solve(shapes, experts)
        if sizes is None:
            listing = ", ".join(f"{role} {list(shape)}" for role, shape in shapes.items())
            raise _DoesNotFit(f"layer {self.number}: expert tensors {listing} do not fit layout {self.layout.name}")
        if sizes["E"] > MAX_EXPERTS or max(sizes["I"], sizes["H"]) > MAX_SIDE:
            raise UnknownFormat(
                f"layer {self.number} has {sizes['E']} experts of {sizes['I']} x {sizes['H']}",
                f"we read up to {MAX_EXPERTS} experts of up to {MAX_SIDE} x {MAX_SIDE}",
            )
        for source, count in self.expected.items():
            if sizes["E"] != count:
                raise ModelUnreadable(
                    f"layer {self.number} has {sizes['E']} experts, and {source} says {count}",
                    "the checkpoint is incomplete, or this is said of another model",
                )
        return sizes

    @property
    def count(self) -> int:
        return self.sizes["E"]

    @property
    def roles(self) -> tuple[str, ...]:
        found = {role for tensor in self.layout.tensors for role in tensor.roles}
        return tuple(role for role in ROLES if role in found)

    def shape(self, role: str) -> tuple[int, int]:
        """(out, in) of a role's matrix."""
        hidden, intermediate = self.sizes["H"], self.sizes["I"]
        return (hidden, intermediate) if role == "down" else (intermediate, hidden)

    @cached_property
    def tensors(self) -> tuple["ExpertTensor", ...]:
        """The stored tensors; raises ModelUnreadable, naming it, when an expert or a role is missing."""
        found = self._match.layers[self.number]
        for tensor in self.layout.tensors:
            if tensor.role not in found:
                raise ModelUnreadable(
                    f"layer {self.number} lacks its {tensor.role} projections ({tensor.leaf})",
                    "the checkpoint is incomplete: download it again",
                )
        if self.layout.is_single:
            return tuple(ExpertTensor(self, tensor, [found[tensor.role][None]]) for tensor in self.layout.tensors)
        numbers = {expert for experts in found.values() for expert in experts if expert is not None}
        everyone = range(max(max(numbers) + 1 - len(self.left_out), *self.expected.values(), 0))
        for role, experts in found.items():
            missing = next((expert for expert in everyone if expert not in experts), None)
            if missing is not None:
                raise ModelUnreadable(
                    f"layer {self.number} lacks the {role} projection of expert {missing}",
                    "the checkpoint is incomplete: download it again",
                )
        return tuple(
            ExpertTensor(self, tensor, [found[tensor.role][expert] for expert in everyone])
            for tensor in self.layout.tensors
        )

    @cached_property
    def left_out(self) -> tuple[int, ...]:
        """The experts beyond those that the config counts, where they are of another kind: identity experts, which have
        no down projection, or those of another modality, which have another size."""
        found = self._match.layers[self.number]
        count, down = self.expected.get(self._checkpoint.config_file, 0), found.get("down", {})
        others = sorted({e for experts in found.values() for e in experts if e is not None and e >= count > 0})
        if (
            not others
            or 0 not in down
            or any(e in down and self._shapes(down[e]) == self._shapes(down[0]) for e in others)
        ):
            return ()
        return tuple(others)

    def _shapes(self, parts: Parts) -> set[tuple[int, ...]]:
        return {self._checkpoint.info(name).shape for name in parts.values()}

    @property
    def storage(self) -> str:
        """The storage format, or formats, of the matrices."""
        return "+".join(dict.fromkeys(tensor.stored.codec for tensor in self.tensors))

    @property
    def parameters(self) -> int:
        """How many weights the routed experts have."""
        return self.count * sum(prod(self.shape(role)) for role in self.roles)

    @property
    def stored_bytes(self) -> int:
        """What the routed experts' matrices occupy in the files, scales included and biases not."""
        return sum(info.nbytes for tensor in self.tensors for info in tensor.infos())

    @property
    def is_at_hand(self) -> bool:
        """Whether the headers that describe the layer have been read already."""
        found = self._match.layers[self.number]
        parts = (parts for experts in found.values() for parts in experts.values())
        return all(self._checkpoint.is_at_hand(name) for each in parts for name in each.values())

    def prefetch(self, progress: Progress, ranges: Iterable[tuple[str, Range]] | None = None) -> None:
        """Bring all the layer's experts, or the given byte ranges of files, near in few, long reads."""
        if ranges is None:
            ranges = ((info.file, (info.start, info.stop)) for tensor in self.tensors for info in tensor.infos())
        self._checkpoint.prefetch(ranges, progress)

    def matrices(self, expert: int) -> dict[str, NDArray[np.float32]]:
        """All matrices of one expert by role, float32 in canonical form."""
        return {role: matrix for tensor in self.tensors for role, matrix in tensor.matrices(expert).items()}

    def biases(self, expert: int) -> dict[str, NDArray[np.float32]]:
        """The bias vectors of one expert by role, float32 [out]; {} where the experts have none."""
        return {role: bias for tensor in self.tensors for role, bias in tensor.biases(expert).items()}

    def router(self) -> Router | None:
        """The router of the layer; None where none is known."""
        parts = self._beside("router")
        weight = self.vectors(parts.get("weight"))
        if weight is None or weight.shape != (self.count, self.sizes["H"]):
            return None
        correction = self.vectors(next(iter(self._beside("correction").values()), None))
        found = (self.vectors(parts.get("bias")), correction)
        bias, correction = (one if one is None else one.reshape(-1) for one in found)
        if any(one is not None and len(one) != self.count for one in (bias, correction)):
            return None
        return Router(weight, bias, correction)

    def norm(self) -> NDArray[np.float32] | None:
        """What the norm before the experts multiplies by, [hidden]; None where no such norm is known."""
        weight = self.vectors(self._beside("norm").get("weight"))
        if weight is None or weight.shape != (self.sizes["H"],):
            return None
        return weight + np.float32(1.0) if self._one_plus_norm else weight

    def _beside(self, what: str) -> Parts:
        return self._match.beside.get(self.number, {}).get(what, {})

    def vectors(self, name: str | None) -> NDArray[np.float32] | None:
        """A small tensor beside the experts, whole, as float32; None where there is none, or not of plain numbers."""
        if name is None:
            return None
        info = self._checkpoint.info(name)
        if info.dtype not in ("BF16", "F16", "F32", "F64") or not info.shape or not info.nbytes:
            return None
        return self._checkpoint.rows(info, 0, info.shape[0]).astype(np.float32)

    def open_tensor(self, parts: Sequence[Parts]) -> list[tuple[list[Infos], Stored]]:
        """The slices of a stored tensor for each of its parts, and how they are decoded."""
        _, first = open_stored(self._checkpoint, parts[0], self._quantization)
        slices = find_slices(self._checkpoint, parts[0])
        opened, alike = [(slices, first)], _look(slices[0])
        for own in parts[1:]:
            slices = find_slices(self._checkpoint, own)
            if all(_look(infos) == alike for infos in slices):
                opened.append((slices, first))  # which spares reading what would be needed to recognise it
                continue
            _, stored = open_stored(self._checkpoint, own, self._quantization)
            if stored.shape != first.shape or stored.codec != first.codec:
                name = next(iter(slices[0].values())).name
                one, other = (f"{each.codec} {list(each.plain_shape)}" for each in (stored, first))
                raise ModelUnreadable(f"{name} is {one}, and the first expert's is {other}: they must be stored alike")
            opened.append((slices, stored))
        return opened

    def read_rows(
        self, infos: Infos, stored: Stored, rows: int, start: int, stop: int, index: int
    ) -> NDArray[np.float32]:
        return read_rows(self._checkpoint, infos, stored, rows, start, stop, index)


class ExpertTensor:
    """One stored tensor of a layer, for all experts.

    `parts` has one entry per expert, or a single one where one tensor holds them all.
    """

    def __init__(self, layer: ExpertLayer, spec: StoredTensor, parts: Sequence[Parts]) -> None:
        self.layer = layer
        self.spec = spec
        self.parts = parts

    @cached_property
    def _opened(self) -> list[tuple[list[Infos], Stored]]:
        opened = self.layer.open_tensor(self.parts)
        if len({len(slices) for slices, _ in opened}) > 1 or (len(opened[0][0]) > 1 and len(self.spec.roles) > 1):
            name = next(iter(self.parts[0].values()))
            raise UnknownFormat(f"{name} is cut into {len(opened[0][0])} slices in a way that we don't know")
        if self.spec.axes.flattened and opened[0][1].transposed:
            raise UnknownFormat(f"{next(iter(self.parts[0].values()))}: {opened[0][1].codec} of several experts in one")
        return opened

    @cached_property
    def _readable(self) -> list[tuple[list[Infos], Stored]]:
        """The opened tensors; raises UnknownFormat where a block of scales may reach over gate and up, or not, because
        they were fused once they had scales of their own."""
        slices, stored = self._opened[0]
        halved = self.spec.axes.groups[0] == ("2", "I") and not stored.transposed
        half, rest = divmod(stored.shape[-2], 2)
        grids = [part for part in stored.rows_per_row if part != "weight" and len(slices[0][part].shape) > 1]
        for part in grids if halved and not rest else ():
            span = stored.rows_per_row[part]
            if span and span == int(span) and half % span and 2 * -(-half // span) == -(-2 * half // span):
                name = slices[0][part].name
                raise UnknownFormat(f"{name}: a block of {span} rows may reach over gate and up, or end between them")
        return self._opened

    @property
    def stored(self) -> Stored:
        """How it is stored, a slice of it where it is cut; the shape includes the experts' axis if they are stacked."""
        return self._opened[0][1]

    @property
    def plain_shape(self) -> tuple[int, ...]:
        """The shape that it has as plain numbers, its slices put together."""
        shape, count = self.stored.plain_shape, len(self._opened[0][0])
        axes = [*[()] * len(shape), *self.spec.axes.groups][2:]  # those before the last two are not cut
        return tuple(length * (count if "I" in group else 1) for length, group in zip(shape, axes, strict=True))

    def infos(self) -> Iterator[TensorInfo]:
        """Every tensor of the files that it consists of."""
        return (info for slices, _ in self._opened for infos in slices for info in infos.values())

    @property
    def place(self) -> tuple[str, str]:
        """Its layer, such as "model.layers.3", and the name there of a plain weight, with {expert} for the number."""
        layer, name = split_name(next(iter(self.parts[0].values())))
        template = max((one for one in self.spec.names if name.startswith(one)), key=len)
        return layer, f"{template}.weight" if name.startswith(f"{template}.") else template

    @property
    def rows(self) -> int:
        """The number of stored rows per expert."""
        return self._length(self._groups[0])

    @property
    def columns(self) -> int:
        return self._length(self._groups[1])

    @property
    def _groups(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What the rows and the columns are that decoding gives."""
        first, second = self.spec.axes.groups
        return (second, first) if self.stored.transposed else (first, second)

    def _length(self, group: tuple[str, ...]) -> int:
        return prod(2 if letter == "2" else self.layer.sizes[letter] for letter in group)

    def windows(self, values: int, experts: int | None = None) -> list[Range]:
        """Runs of stored rows that cover an expert, each with at most about `values` numbers over all, or so many,
        experts."""
        step = values // ((experts or self.layer.count) * self.columns)
        block = self.stored.granule
        # whole blocks of rows that share a scale where they fit; else each piece of one reads the scale again
        step = step // block * block if step >= block else max(step, min(8, block))
        return [(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def matrices(self, expert: int) -> dict[str, NDArray[np.float32]]:
        """The matrices of one expert that this tensor holds, by role, float32 in canonical form."""
        result = {role: np.empty(self.layer.shape(role), np.float32) for role in self.spec.roles}
        for window in self.windows(MATRIX_WINDOW, 1):
            for piece in self.read([expert], *window):
                result[piece.role][piece.index] = piece.values[0]
        return result

    def biases(self, expert: int) -> dict[str, NDArray[np.float32]]:
        """The bias vectors of one expert by role: laid out along the stored outputs, gates and ups as in the matrix."""
        stacked = self.spec.axes.stacked
        name = self.parts[0 if stacked else expert].get(BIAS)
        values = self.layer.vectors(name)
        if values is None:
            return {}
        roles = self.spec.roles
        length = sum(self.layer.shape(role)[0] for role in roles)
        wanted = (self.layer.count, length) if stacked else (length,)
        if values.shape != wanted:
            raise ModelUnreadable(f"{name} is {list(values.shape)}, expected {list(wanted)}")
        values = values[expert] if stacked else values
        if len(roles) == 1:
            return {roles[0]: values}
        turns = ("I", "2") in self.spec.axes.groups
        size = len(values) // 2
        return {
            role: values[half::2] if turns else values[half * size : (half + 1) * size]
            for half, role in enumerate(roles)
        }

    def read(self, experts: Sequence[int], start: int, stop: int) -> list[Piece]:
        """Stored rows [start, stop) of the given experts, decoded and cut by role."""
        values = np.empty((len(experts), stop - start, self.columns), np.float32)
        for place, expert in enumerate(experts):
            values[place] = self._read_expert(expert, start, stop)
        return list(self._cut(values, start))

    def _read_expert(self, expert: int, start: int, stop: int) -> NDArray[np.float32]:
        """Stored rows [start, stop) of one expert; slices are cut along its intermediate axis."""
        stacked = self.spec.axes.stacked
        slices, stored = self._readable[0 if stacked else expert]
        read = partial(self.layer.read_rows, index=expert if stacked else 0)
        if len(slices) == 1:
            return read(slices[0], stored, self.rows, start, stop)
        if "I" in self._groups[1]:
            return np.concatenate([read(infos, stored, self.rows, start, stop) for infos in slices], axis=1)
        rows = self.rows // len(slices)
        ranges = [(max(0, start - i * rows), min(rows, stop - i * rows)) for i in range(len(slices))]
        return np.concatenate(
            [read(infos, stored, rows, *own) for infos, own in zip(slices, ranges, strict=True) if own[0] < own[1]]
        )

    def byte_ranges(self, expert: int, start: int, stop: int) -> Iterator[tuple[str, Range]]:
        """The byte ranges, each with its file's name, that stored rows [start, stop) of an expert are read from."""
        stacked = self.spec.axes.stacked
        slices, stored = self._readable[0 if stacked else expert]
        for infos in slices:
            for info, low, high, leading in find_rows(infos, stored, self.rows, start, stop, expert if stacked else 0):
                if len(slices) > 1 or high is None:
                    yield info.file, (info.start, info.stop)
                else:
                    yield info.file, Checkpoint.row_range(info, low, high, leading)

    def neurons(self, count: int) -> list[Range]:
        """The stored rows that hold the first `count` neurons of an expert; where rows are no neurons, as many rows as
        hold the same share of every neuron."""
        rows, first, size = self.rows, self._groups[0], self.layer.sizes["I"]
        if first == ("2", "I"):
            return [(0, count), (size, size + count)]
        if first == ("I", "2"):
            return [(0, 2 * count)]
        return [(0, -(-rows * count // size))]

    def _cut(self, values: NDArray[np.float32], start: int) -> Iterator[Piece]:
        """Cut stored rows, from `start` on, into the pieces of each role, in canonical orientation."""
        first, second = self._groups
        size, stop, everything = self.layer.sizes["I"], start + values.shape[1], slice(None)
        for half, role in enumerate(self.spec.roles):
            rows, columns = slice(start, stop), everything
            if first == ("2", "I"):
                low, high = max(start, half * size), min(stop, (half + 1) * size)
                if low >= high:
                    continue
                cut, rows = values[:, low - start : high - start], slice(low - half * size, high - half * size)
            elif first == ("I", "2"):
                # a window may start or end between a gate and its up
                low, high = -(-(start - half) // 2), -(-(stop - half) // 2)
                cut, rows = values[:, 2 * low + half - start :: 2], slice(low, high)
            elif second == ("2", "I"):
                cut = values[:, :, half * size : (half + 1) * size]
            elif second == ("I", "2"):
                cut = values[:, :, half::2]
            else:
                cut = values
            out = "H" if role == "down" else "I"
            yield (
                Piece(role, (rows, columns), cut)
                if out in first
                else Piece(role, (columns, rows), cut.transpose(0, 2, 1))
            )


def find_slices(checkpoint: Checkpoint, parts: Parts) -> list[Infos]:
    """The tensors that hold a matrix, one group for each slice of it; biases and input scales are left out.

    Raises ModelUnreadable where the parts are not all cut into as many slices, or the slices are not alike.
    """
    slices = {
        SAME_PART.get(part, part): checkpoint.slices(name) for part, name in parts.items() if part not in NOT_DECODED
    }
    if not slices:
        raise ModelUnreadable(f"{next(iter(parts.values()))} is there without its weight", "download it again")
    if len({len(infos) for infos in slices.values()}) > 1:
        raise ModelUnreadable(f"{next(iter(parts.values()))} has parts that are not cut into as many slices")
    found: list[Infos] = [dict(zip(slices, infos, strict=True)) for infos in zip(*slices.values(), strict=True)]
    if any(_look(infos) != _look(found[0]) for infos in found):
        raise ModelUnreadable(f"the slices of {next(iter(parts.values()))} are not alike", "download it again")
    return found


def _look(infos: Infos) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """What a matrix is recognised by; the text that bitsandbytes adds is as long as its numbers are."""
    return {part: (info.dtype, None if "quant_state" in part else info.shape) for part, info in infos.items()}


def open_stored(checkpoint: Checkpoint, parts: Parts, quantization: Mapping[str, Any]) -> tuple[Infos, Stored]:
    """The tensors that one stored tensor, or the first slice of it, consists of, and how they are decoded.

    Raises UnknownFormat or ModelUnreadable, naming the first of the parts.
    """
    part, name = next(iter(parts.items()))
    own = quantization.get(name.removesuffix(f".{part}"))  # MLX says by module what is quantised in another way
    infos = find_slices(checkpoint, parts)[0]
    described = {part: Part(info.dtype, info.shape, partial(checkpoint.whole, info)) for part, info in infos.items()}
    try:
        # what such an entry leaves out is not what the others have: no mode means affine
        return infos, recognise(
            described, {**quantization, "mode": "affine", **own} if isinstance(own, dict) else quantization
        )
    except MoEError as error:
        raise type(error)(f"{name}: {error.message}", error.hint) from None


def read_rows(
    checkpoint: Checkpoint,
    infos: Infos,
    stored: Stored,
    rows: int,
    start: int,
    stop: int,
    index: int = 0,
) -> NDArray[np.float32]:
    """Decoded rows [start, stop) of matrix `index` of a stored tensor whose matrices have so many rows each."""
    raw = {}
    found = find_rows(infos, stored, rows, start, stop, index)
    for (part, span), (info, low, high, leading) in zip(stored.rows_per_row.items(), found, strict=True):
        if high is None:
            raw[part] = checkpoint.whole(info)
        else:
            read = checkpoint.rows(info, low, high, leading)
            raw[part] = read[0] if span is None else read
    return stored.decode(raw, start, stop)


def find_rows(
    infos: Infos, stored: Stored, rows: int, start: int, stop: int, index: int
) -> Iterator[tuple[TensorInfo, int, int | None, int]]:
    """For each part of a stored tensor, where rows [start, stop) of matrix `index` lie in it: the first row, the one
    after the last, with so many leading axes seen as one; None for all of the tensor."""
    leading = len(stored.shape) - 2
    for part, span in stored.rows_per_row.items():
        info = infos[part]
        if span is None:
            own = leading and info.shape[:1] == stored.shape[:1]
            yield (info, index, index + 1, 1) if own else (info, 0, None, 1)
            continue
        if not leading and rows < stored.shape[0] and rows % span:
            raise UnknownFormat(f"{info.name}: blocks of {span} rows reach over two experts")
        first = index * -(-rows // span)
        yield info, int(first + start // span), int(first + -(-stop // span)), leading + 1


def stored_rows(spec: StoredTensor, matrices: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The rows [rows, columns] that a stored tensor has for one expert, from its matrices by role: undoes `_cut`."""
    first, second = spec.axes.groups
    axis = 0 if "I" in first else 1
    turned = [matrices[role] if ("H" if role == "down" else "I") in first else matrices[role].T for role in spec.roles]
    if len(turned) == 1:
        return turned[0]
    if ("2", "I") in (first, second):
        return np.concatenate(turned, axis)
    rows, columns = turned[0].shape
    return np.stack(turned, axis + 1).reshape((2 * rows, columns) if axis == 0 else (rows, 2 * columns))


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


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a multimodal config that describes the language model."""
    while inner := next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), None):
        config = inner
    return config


def _stack_config(config: dict[str, Any], root: str) -> tuple[dict[str, Any], bool]:
    """The part of a multimodal config that describes a stack of layers ("talker.model" has a `talker_config`), and
    whether it is this stack's own."""
    first = root.partition(".")[0].removesuffix("_encoder")
    inner = config.get(f"{first}_config")
    return (_text_config(inner), True) if isinstance(inner, dict) else (_text_config(config), False)


def _layer_config(config: dict[str, Any], number: int) -> Mapping[str, Any]:
    """The config with what it says about one layer."""
    by_layer = config.get("per_layer_config")
    own = by_layer.get(str(number)) if isinstance(by_layer, dict) else None
    return ChainMap(own, config) if isinstance(own, dict) else config


def _config_count(config: Mapping[str, Any]) -> int | None:
    """How many experts the config says there are."""
    for part in (config, config.get("ffn_config")):
        if isinstance(part, Mapping):
            for key in EXPERT_COUNTS:
                if type(count := part.get(key)) is int:
                    return count
    return None


def _is_mtp_root(root: str) -> bool:
    return any(part in ("mtp", "mtp_block") for part in root.split("."))
