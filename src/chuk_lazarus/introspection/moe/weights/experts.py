"""The routed experts of a checkpoint as matrices in canonical form, read only when asked for.

Canonical form: `y = W x`, float32; gate and up are [intermediate, hidden], down is [hidden, intermediate]. Biases are
never part of a matrix.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidRequest, ModelUnreadable, MoEError, NotMoE, UnknownFormat, printable
from .checkpoint import Checkpoint, TensorInfo
from .codecs import NOT_DECODED, SAME_PART, Part, Stored, recognise
from .layouts import ROLES, Layout, Matches, Parts, StoredTensor, has_one_plus_norm, match_names, split_name
from .source import Progress, Range, find_repository

BIAS = "bias"
MATRIX_WINDOW = 4_000_000  # weights of one expert decoded at a time
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")
TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "moe_top_k",
)
EXPERT_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")


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
    """The routed experts of a model.

    `layers` are the numbers of its MoE layers, `mtp_layers` those of multi-token prediction, `family` the layout's
    name, `model_type` what the config says, `notes` what the user should know about how the layout was found.
    Raises NotMoE, UnknownFormat or ModelUnreadable.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = _text_config(checkpoint.config)
        model_type = self.config.get("model_type", checkpoint.config.get("model_type"))
        self.model_type = printable(model_type) if isinstance(model_type, str) else None
        self.notes: list[str] = []
        matches, partial, unmatched = match_names(checkpoint.names)
        for match in partial if unmatched else ():
            if match.names.issuperset(unmatched):
                roles = {role for experts in match.layers.values() for role in experts}
                lacking = next(tensor for tensor in match.layout.tensors if tensor.role not in roles)
                raise ModelUnreadable(
                    f"no layer has its {lacking.role} projections ({lacking.leaf}), as layout {match.layout.name} has",
                    "the checkpoint is incomplete: download it again",
                )
        if unmatched:
            listing = ", ".join(unmatched[:3]) + (f" and {len(unmatched) - 3} more" if len(unmatched) > 3 else "")
            raise UnknownFormat(
                f"no layout in our table holds these tensors, which look like routed experts: {listing}",
                f"model_type is {self.model_type or 'not given'}; please report it",
            )
        roots = sorted({match.root for match in matches if not _is_mtp_root(match.root)})
        if not roots and "overlay_config" in checkpoint.config:
            raise UnknownFormat(
                "the model is an overlay, whose experts are stored as base and factors",
                "give the model that it was made from, or export it to a standard checkpoint",
            )
        if not roots and (_config_count(self.config) or 0) > 1:
            raise UnknownFormat(
                f"config.json says that there are {_config_count(self.config)} experts, and no tensor's name is known",
                f"model_type is {self.model_type or 'not given'}; please report it",
            )
        if not roots:
            raise NotMoE(
                "the model has no routed experts: it is not a Mixture of Experts",
                "give the original MoE checkpoint, not a dense one or an adapter",
            )
        if len(roots) > 1:
            raise UnknownFormat(f"the model has {len(roots)} stacks of MoE layers ({', '.join(roots)}); we read one")
        self._match = self._choose([match for match in matches if match.root == roots[0]])
        depth = self.config.get("num_hidden_layers")
        last = depth if type(depth) is int else max(self._match.layers) + 1
        self.layers = tuple(sorted(layer for layer in self._match.layers if layer < last))
        self.mtp_layers = tuple(sorted(layer for layer in self._match.layers if layer >= last))
        if not self.layers:
            raise ModelUnreadable(f"config.json says num_hidden_layers is {depth}, and no MoE layer lies below that")

    @classmethod
    def open(cls, model: str) -> "Experts":
        """The experts of `model`: a folder, a file, a Hub id or `demo:NAME`."""
        return cls(Checkpoint(find_repository(model)))

    @property
    def family(self) -> str:
        return self._match.layout.name

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
        expected = {"config.json": _config_count(self.config)}
        router = match.routers.get(number, {}).get("weight")
        if router and match.layout.is_flattened:
            expected[router] = next(iter(self.checkpoint.info(router).shape), None)
        one_plus_norm = has_one_plus_norm(self.model_type)
        return ExpertLayer(self.checkpoint, match, number, expected, self._quantization, one_plus_norm)

    @property
    def activation(self) -> str:
        """The name of the experts' activation: the layout's own, or what the config says, or silu."""
        function = self._ffn_config.get("ffn_act_fn")
        names = [self.config.get(key) for key in ACTIVATION_KEYS]
        names += [function.get("name")] if isinstance(function, dict) else []
        return self._match.layout.activation or next((name for name in names if isinstance(name, str)), "silu")

    @property
    def top_k(self) -> int:
        """How many experts a token is sent to, by the config; 1 where it does not say."""
        found = [config.get(key) for config in (self.config, self._ffn_config) for key in TOP_K_KEYS]
        return next((count for count in found if type(count) is int and count > 0), 1)

    @property
    def scoring(self) -> str:
        """softmax or sigmoid; a router with a bias that corrects its scores, as DeepSeek-V3's, takes the sigmoid."""
        corrected = any("correction" in names for names in self._match.beside.values())
        said = self.config.get("scoring_func")
        default = "sigmoid" if corrected else "softmax"
        return self._match.layout.scoring or (said if said in ("sigmoid", "softmax") else default)

    @property
    def _ffn_config(self) -> dict[str, Any]:
        inner = self.config.get("ffn_config")
        return inner if isinstance(inner, dict) else {}

    @property
    def _quantization(self) -> Mapping[str, Any]:
        found = self.checkpoint.config.get("quantization_config") or self.config.get("quantization_config")
        return found if isinstance(found, dict) else {}

    def _choose(self, candidates: list[Matches]) -> Matches:
        """The one match whose layout fits the shapes; where several do, the config's model_type decides."""
        fitting = []
        for match in candidates:
            try:
                self._open(match, min(match.layers)).sizes  # noqa: B018  asked for its errors
                fitting.append(match)
            except _DoesNotFit as error:
                reason = error
        if not fitting:
            raise UnknownFormat(reason.message, reason.hint)
        known = [match for match in fitting if self.model_type in match.layout.model_types]
        if len(fitting) > 1 and len(known) != 1:
            names = ", ".join(match.layout.name for match in fitting)
            raise UnknownFormat(
                f"the expert tensors fit several layouts ({names}) and model_type is {self.model_type or 'not given'}",
                "put the model's config.json beside its weights, or report the model type",
            )
        chosen = known[0] if known else fitting[0]
        if not known and chosen.layout.has_turns:
            raise UnknownFormat(
                f"gates and ups may lie in halves or in turns, and model_type is {self.model_type or 'not given'}",
                "put the model's config.json beside its weights, or report the model type",
            )
        if left := set().union(*(match.names for match in candidates)) - chosen.names:
            raise UnknownFormat(f"layout {chosen.layout.name} fits, and does not account for {min(left)}")
        if not known:
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
        shapes = {tensor.spec.role: tensor.stored.plain_shape for tensor in self.tensors}
        experts = None if self.layout.is_stacked else len(self.tensors[0].parts)
        if self.layout.is_flattened:
            experts = next(reversed(self.expected.values()), None)  # the router's, if there is one
        sizes = self.layout.solve(shapes, experts)
        if sizes is None:
            listing = ", ".join(f"{role} {list(shape)}" for role, shape in shapes.items())
            raise _DoesNotFit(f"layer {self.number}: expert tensors {listing} do not fit layout {self.layout.name}")
        for source, count in self.expected.items():
            if sizes["E"] != count:
                raise ModelUnreadable(
                    f"layer {self.number} has {sizes['E']} experts, and {source} says {count}",
                    "the checkpoint is incomplete or its config.json is not its own",
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
        if self.layout.is_stacked:
            return tuple(ExpertTensor(self, tensor, [found[tensor.role][None]]) for tensor in self.layout.tensors)
        numbers = {expert for experts in found.values() for expert in experts if expert is not None}
        everyone = range(max(max(numbers) + 1, *self.expected.values(), 0))
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

    def prefetch(self, progress: Progress) -> None:
        """Bring all the layer's experts near in few, long reads."""
        spans = ((info.file, (info.start, info.stop)) for tensor in self.tensors for info in tensor.infos())
        self._checkpoint.prefetch(spans, progress)

    def matrices(self, expert: int) -> dict[str, NDArray[np.float32]]:
        """All matrices of one expert by role, float32 in canonical form."""
        return {role: matrix for tensor in self.tensors for role, matrix in tensor.matrices(expert).items()}

    def biases(self, expert: int) -> dict[str, NDArray[np.float32]]:
        """The bias vectors of one expert by role, float32 [out]; {} where the experts have none."""
        return {role: bias for tensor in self.tensors for role, bias in tensor.biases(expert).items()}

    def router(self) -> Router | None:
        """The router of the layer; None where none is known."""
        parts = self._match.routers.get(self.number, {})
        weight = self.vectors(parts.get("weight"))
        if weight is None or weight.shape != (self.count, self.sizes["H"]):
            return None
        correction = self.vectors(self._match.beside.get(self.number, {}).get("correction"))
        return Router(
            weight, self.vectors(parts.get("bias")), correction.reshape(-1) if correction is not None else None
        )

    def norm(self) -> NDArray[np.float32] | None:
        """What the norm before the experts multiplies by, [hidden]; None where no such norm is known."""
        weight = self.vectors(self._match.beside.get(self.number, {}).get("norm"))
        if weight is None or weight.shape != (self.sizes["H"],):
            return None
        return weight + np.float32(1.0) if self._one_plus_norm else weight

    def vectors(self, name: str | None) -> NDArray[np.float32] | None:
        """A small tensor beside the experts, whole, as float32; None where there is none, or not of plain numbers."""
        if name is None:
            return None
        info = self._checkpoint.info(name)
        if info.dtype not in ("BF16", "F16", "F32", "F64") or not info.shape:
            return None
        return self._checkpoint.rows(name, 0, info.shape[0]).astype(np.float32)

    def infos(self, parts: Parts) -> dict[str, TensorInfo]:
        """The tensors that hold a matrix, by their parts' usual names."""
        return find_infos(self._checkpoint, parts)

    def open_parts(self, parts: Parts) -> tuple[dict[str, TensorInfo], Stored]:
        """The tensors that one stored tensor consists of, by their parts' usual names, and how they are decoded."""
        return open_stored(self._checkpoint, parts, self._quantization)

    def read_rows(
        self, infos: Mapping[str, TensorInfo], stored: Stored, rows: int, start: int, stop: int, index: int
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
    def _opened(self) -> list[tuple[dict[str, TensorInfo], Stored]]:
        infos, first = self.layer.open_parts(self.parts[0])
        opened = [(infos, first)]
        alike = {part: (info.dtype, info.shape) for part, info in infos.items()}
        for parts in self.parts[1:]:
            infos = self.layer.infos(parts)
            if {part: (info.dtype, info.shape) for part, info in infos.items()} == alike:
                opened.append((infos, first))
                continue
            _, stored = self.layer.open_parts(parts)
            if stored.shape != first.shape or stored.codec != first.codec:
                name = next(iter(infos.values())).name
                one, other = (f"{each.codec} {list(each.plain_shape)}" for each in (stored, first))
                raise ModelUnreadable(f"{name} is {one}, and the first expert's is {other}")
            opened.append((infos, stored))
        return opened

    @property
    def stored(self) -> Stored:
        """How it is stored; the shape includes the experts' axis where they are stacked."""
        return self._opened[0][1]

    def infos(self) -> Iterator[TensorInfo]:
        """Every tensor of the files that it consists of."""
        return (info for infos, _ in self._opened for info in infos.values())

    @property
    def place(self) -> tuple[str, str]:
        """Its layer, such as "model.layers.3", and the name there of a plain weight, with {expert} for the number."""
        parts = self.parts[0]
        layer, name = split_name(next(iter(parts.values())))
        if "weight" in parts:
            return layer, split_name(parts["weight"])[1]
        return layer, next(template for template in self.spec.names if name.startswith(template))

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
        values = self.layer.vectors(self.parts[0 if stacked else expert].get(BIAS))
        if values is None:
            return {}
        values = values[expert] if stacked else values
        roles = self.spec.roles
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
            infos, stored = self._opened[0 if self.spec.axes.stacked else expert]
            index = expert if self.spec.axes.stacked else 0
            values[place] = self.layer.read_rows(infos, stored, self.rows, start, stop, index)
        return list(self._cut(values, start))

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


def find_infos(checkpoint: Checkpoint, parts: Parts) -> dict[str, TensorInfo]:
    """The tensors that hold a matrix, by their parts' usual names; biases and input scales are left out."""
    return {SAME_PART.get(part, part): checkpoint.info(name) for part, name in parts.items() if part not in NOT_DECODED}


def open_stored(
    checkpoint: Checkpoint, parts: Parts, quantization: Mapping[str, Any]
) -> tuple[dict[str, TensorInfo], Stored]:
    """The tensors that one stored tensor consists of, by their parts' usual names, and how they are decoded.

    Raises UnknownFormat or ModelUnreadable, naming the first of the tensors.
    """
    infos = find_infos(checkpoint, parts)
    part, name = next(iter(parts.items()))
    own = quantization.get(name.removesuffix(f".{part}"))  # MLX says by module what is quantised in another way
    try:
        described = {
            part: Part(info.dtype, info.shape, partial(checkpoint.whole, info.name)) for part, info in infos.items()
        }
        return infos, recognise(described, {**quantization, **own} if isinstance(own, dict) else quantization)
    except MoEError as error:
        raise type(error)(f"{name}: {error.message}", error.hint) from None


def read_rows(
    checkpoint: Checkpoint,
    infos: Mapping[str, TensorInfo],
    stored: Stored,
    rows: int,
    start: int,
    stop: int,
    index: int = 0,
) -> NDArray[np.float32]:
    """Decoded rows [start, stop) of matrix `index` of a stored tensor whose matrices have so many rows each."""
    leading = len(stored.shape) - 2
    raw = {}
    for part, span in stored.rows_per_row.items():
        info = infos[part]
        if span is None:
            own = leading and info.shape[:1] == stored.shape[:1]
            raw[part] = checkpoint.rows(info.name, index, index + 1)[0] if own else checkpoint.whole(info.name)
            continue
        if not leading and rows < stored.shape[0] and rows % span:
            raise UnknownFormat(f"{info.name}: blocks of {span} rows reach over two experts")
        first = index * -(-rows // span)
        raw[part] = checkpoint.rows(info.name, first + start // span, first + -(-stop // span), leading + 1)
    return stored.decode(raw, start, stop)


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


def spans(numbers: Sequence[int]) -> str:
    """Whole numbers in short: [0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{low}-{high}" if high > low else f"{low}" for low, high in runs)


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a multimodal config that describes the language model."""
    while inner := next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), None):
        config = inner
    return config


def _config_count(config: Mapping[str, Any]) -> int | None:
    """How many experts the config says there are."""
    for part in (config, config.get("ffn_config")):
        if isinstance(part, dict):
            for key in EXPERT_COUNTS:
                if type(count := part.get(key)) is int:
                    return count
    return None


def _is_mtp_root(root: str) -> bool:
    return any(part in ("mtp", "mtp_block") for part in root.split("."))
