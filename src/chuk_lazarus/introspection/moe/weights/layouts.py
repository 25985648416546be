"""The layout table, and how the names of a checkpoint's tensors are matched with it.

The layers and experts of a model are those whose names match; no name is composed from numbers in the config.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from math import prod
from typing import Any, Literal

Kind = Literal["routed", "shared", "dense"]
"""Routed experts, shared experts, or the feed-forward of a dense layer."""

Order = Literal["halves", "turns"]
"""How two roles lie along one stored axis: all of the first, then all of the second, or neuron by neuron."""

Feature = Literal["one_plus_norm", "swiglu_oai", "shared_last", "sigmoid", "gguf_rotary_pairs"]
"""A fact by model type that the config does not give."""

_LAYER = re.compile(
    r"(?:(?P<root>.*?)(?:\.|(?<=_stream)_))?"
    r"(?:layers|blocks|block|blk|decoder_layer|transformer_blocks|meta_mlp|h)\.(?P<layer>\d{1,9})\.(?P<rest>.+)"
)
# a dot precedes the part where the tensor belongs to a module, and an underscore where it is a bare parameter
_PART = re.compile(
    r"\.(?P<part>[A-Za-z_][\w.:]*)"
    r"|_(?P<suffix>bias|blocks|scales|scale(?:_inv|_2)?|weight_(?:scale(?:_inv|_2)?|packed)|[a-z]\w*_scale"
    r"|(?:weight_)?(?:packed|shape|zero_point|g_idx|amax|outer_scale_denominator))"
)
_BARE_PARTS = {
    suffix: f"weight_{suffix}"
    for suffix in ("packed", "shape", "zero_point", "g_idx", "global_scale", "amax", "outer_scale_denominator")
}
"""The usual names of parts that a bare parameter has without "weight_"."""
_LOOKS_ROUTED = re.compile(
    r"(?:^|\.)(?:experts|switch_mlp|switch_glu)(?:[._]|$)|(?:^|\.)moe\.\d|^ffn_(?!norm)\w+_exps\.|(?:^|\.)moe_mlp\.W_"
)
_NOT_ROUTED = re.compile(
    r"shared_expert|share_expert|shared_mlp|shared_w\d|chunk_experts|vision_moe|self_attention|residual_mlp"
    r"|e_score_correction_bias|post_expert_norm|experts\.bias$|switch_mlp_1|\.lora_fc\d|_extra_state$"
)


@dataclass(frozen=True, slots=True)
class StoredAxes:
    """The axes of a stored tensor in terms of the canonical form, from a string such as "E (2 I) H".

    `groups` are the two stored axes of a single expert; `stacked` tells whether one tensor holds all experts, and
    `flattened` whether its first axis is experts times rows.
    """

    text: str
    groups: tuple[tuple[str, ...], tuple[str, ...]]
    stacked: bool
    flattened: bool

    @classmethod
    def parse(cls, text: str) -> "StoredAxes":
        """The axes that `text` describes; raises ValueError for a text that does not describe an expert."""
        groups = [tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", text)]
        stacked = text.startswith(("E", "(E"))
        flattened = stacked and groups[0] != ("E",)
        if stacked:
            groups = [groups[0][1:], *groups[1:]] if flattened else groups[1:]
        if len(groups) != 2 or ("H",) not in groups or not {("I",), ("2", "I"), ("I", "2")} & set(groups):
            raise ValueError(f"not the axes of an expert: {text}")
        return cls(text, (groups[0], groups[1]), stacked, flattened)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of a stored tensor with these sizes E, I and H."""
        groups: list[tuple[str, ...]] = list(self.groups)
        if self.flattened:
            groups[0] = ("E", *groups[0])
        elif self.stacked:
            groups.insert(0, ("E",))
        known = {"2": 2, **sizes}
        return tuple(prod(known[letter] for letter in group) for group in groups)

    def solve(self, shape: Sequence[int], sizes: Mapping[str, int]) -> dict[str, int] | None:
        """`sizes` and those of E, I and H that follow from the shape, or None where the shape does not fit the axes.

        From a group with two unknown axes, no size follows.
        """
        groups: list[tuple[str, ...]] = list(self.groups)
        if self.flattened:
            groups[0] = ("E", *groups[0])
        elif self.stacked:
            groups.insert(0, ("E",))
        if len(shape) != len(groups) or min(*shape, *sizes.values(), 1) < 1:
            return None
        known = {"2": 2, **sizes}
        for group, length in zip(groups, shape, strict=True):
            unknown = [letter for letter in group if letter not in known]
            size, rest = divmod(length, prod(known.get(letter, 1) for letter in group))
            if rest or (not unknown and size != 1):
                return None
            if len(unknown) == 1:
                known[unknown[0]] = size
        del known["2"]
        return known


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a layout.

    `role` is gate, up or down; or gate_up or up_gate, where one tensor holds both in this order.
    """

    role: str
    names: tuple[str, ...]
    axes: StoredAxes

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(self.role.split("_"))

    @property
    def leaf(self) -> str:
        """The last component of its name, such as "down_proj"."""
        return self.names[0].rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Layout:
    """One row of the table."""

    name: str
    kind: Kind
    model_types: frozenset[str]
    tensors: tuple[StoredTensor, ...]
    activation: str | None
    plain: str | None
    routed_only: bool

    @property
    def is_flattened(self) -> bool:
        """Whether a tensor's first axis is experts times rows, so that no shape gives the number of experts."""
        return self.tensors[0].axes.flattened

    @property
    def order(self) -> Order | None:
        """How gates and ups lie in the tensor that holds both, None where each has its own."""
        for tensor in self.tensors:
            if len(tensor.roles) == 2:
                return "turns" if ("I", "2") in tensor.axes.groups else "halves"
        return None

    def with_order(self, order: Order) -> "Layout":
        """The same layout with gates and ups in the given order."""
        this, that = ("(I 2)", "(2 I)") if order == "halves" else ("(2 I)", "(I 2)")
        tensors = (
            replace(tensor, axes=StoredAxes.parse(tensor.axes.text.replace(this, that))) for tensor in self.tensors
        )
        return replace(self, tensors=tuple(tensors))

    @property
    def may_be_halves(self) -> bool:
        """Whether gates and ups lie in turns here, and in halves in other models with the same names.

        A row in turns that lists model types holds for these alone.
        """
        in_turns = {name for tensor in self.tensors if ("I", "2") in tensor.axes.groups for name in tensor.names}
        if in_turns and self.model_types:
            return True
        in_halves = {
            name
            for row in load_table()
            for tensor in row.tensors
            if ("2", "I") in tensor.axes.groups
            for name in tensor.names
        }
        return bool(in_turns & in_halves)

    @property
    def is_stacked(self) -> bool:
        """Whether each tensor holds all experts, rather than one."""
        return self.tensors[0].axes.stacked

    @property
    def is_single(self) -> bool:
        """Whether a layer has one tensor of each role, rather than one per expert."""
        return not any("{expert}" in name for tensor in self.tensors for name in tensor.names)

    def solve(self, shapes: Mapping[str, Sequence[int]], experts: int | None) -> dict[str, int] | None:
        """The sizes E, I and H for stored tensors of these shapes, by role; None where the layout does not fit them."""
        sizes = {} if experts is None else {"E": experts}
        for tensor in (*self.tensors, *self.tensors):  # twice, since a later tensor may give what an earlier one needs
            solved = tensor.axes.solve(shapes[tensor.role], sizes)
            if solved is None:
                return None
            sizes = solved
        return sizes if sizes.keys() == {"E", "I", "H"} else None


@cache
def _load_toml() -> dict[str, Any]:
    return tomllib.loads(files(__package__).joinpath("layouts.toml").read_text())


@cache
def load_table() -> tuple[Layout, ...]:
    """The rows of layouts.toml; raises ValueError or KeyError where the table itself is wrong."""

    def expand(template: str, blocks: list[str]) -> tuple[str, ...]:
        names = [template.replace("{block}.", block and f"{block}.") for block in blocks]
        # ModelOpt and llm-compressor put the expert's number behind the projection
        names += [re.sub(r"experts\.\{expert\}\.(\w+)$", r"experts.\1.{expert}", name) for name in names]
        return tuple(dict.fromkeys(names))

    return tuple(
        Layout(
            row["name"],
            row.get("kind", "routed"),
            frozenset(row["model_types"]),
            tuple(
                StoredTensor(
                    entry["role"], expand(entry["name"], row.get("blocks", [""])), StoredAxes.parse(entry["axes"])
                )
                for entry in row["tensors"]
            ),
            row.get("activation"),
            row.get("plain"),
            row.get("routed_only", False),
        )
        for row in _load_toml()["layout"]
    )


def is_listed(model_type: str | None) -> bool:
    """Whether a row of routed experts lists this model type."""
    return any(model_type in row.model_types for row in load_table() if row.kind == "routed")


def has_feature(model_type: str | None, feature: Feature) -> bool:
    """Whether the table lists this model type under the feature."""
    return model_type in _load_toml()[feature]


def usual_activation(model_type: str | None) -> str | None:
    """The activation of this model type, where its configs may leave it out."""
    name = _load_toml()["activation"].get(model_type)
    return name if isinstance(name, str) else None


Parts = dict[str, str]
"""The parts of a stored tensor ("weight", "scales", ...), each with the name of the tensor that holds it."""


@dataclass(slots=True)
class LayoutMatch:
    """The names of a checkpoint that match one row of the table, below one root such as "model".

    `layers[layer][role][expert]` are the parts of a stored tensor; the expert is None where one tensor holds all
    experts. `beside[layer][kind]` are the parts of a small tensor beside the experts, such as the router.
    """

    layout: Layout
    root: str
    beside: dict[int, dict[str, Parts]]
    layers: dict[int, dict[str, dict[int | None, Parts]]] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """All tensors that are matched as parts of experts."""
        return {
            name
            for roles in self.layers.values()
            for experts in roles.values()
            for parts in experts.values()
            for name in parts.values()
        }

    @property
    def is_complete(self) -> bool:
        """Whether a layer has all tensors of the layout."""
        required = {tensor.role for tensor in self.layout.tensors}
        return any(roles.keys() == required for roles in self.layers.values())


@cache
def _expert_number() -> re.Pattern[str]:
    """A pattern that finds an expert's number in a name, by the words that precede {expert} in the table."""
    before = {
        name.partition("{expert}")[0].rpartition(".")[2] or name.partition("{expert}")[0].split(".")[-2] + "."
        for row in load_table()
        for tensor in row.tensors
        for name in tensor.names
        if "{expert}" in name
    }
    return re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(sorted(map(re.escape, before)))})(\d{{1,18}})(?=\.|$)")


def split_name(name: str) -> tuple[str, str]:
    """The name of a tensor's layer, such as "model.layers.3", and the rest, with {expert} for an expert's number.

    Raises ValueError for a name outside of all layers.
    """
    if not (match := _LAYER.fullmatch(name)):
        raise ValueError(f"{name} is in no layer")
    return name[: match.start("rest") - 1], _split_number(match["rest"])[0]


def _split_number(rest: str) -> tuple[str, int | None]:
    """A name below its layer with {expert} for an expert's number, and this number, None where there is none."""
    if not (number := _expert_number().search(rest)):
        return rest, None
    return f"{rest[: number.start(1)]}{{expert}}{rest[number.end(1) :]}", int(number[1])


@cache
def _places(pattern: str, kind: Kind) -> tuple[tuple[int, str, str], ...]:
    """The (row, role, part) triples that fit a name with {expert} for its number."""
    places = []
    for row, layout in enumerate(load_table()):
        for tensor in layout.tensors if layout.kind == kind else ():
            for name in tensor.names:
                rest = pattern.removeprefix(name)
                if rest == "":
                    places.append((row, tensor.role, "weight"))
                elif rest != pattern and (match := _PART.fullmatch(rest)):
                    places.append((row, tensor.role, _part_of(match)))
    return tuple(places)


def _part_of(match: re.Match[str]) -> str:
    """The part that a match of _PART names."""
    return match["part"] or _BARE_PARTS.get(match["suffix"], match["suffix"])


@cache
def _place_beside(pattern: str) -> tuple[str, str] | None:
    """The kind of small tensor beside the experts that a name stands for, and its part; None where it is none."""
    for kind, names in _load_toml()["beside"].items():
        for name in names:
            rest = pattern.removeprefix(name)
            if rest == "" or (rest != pattern and rest[0] == "." and "." not in rest[1:]):
                return kind, rest[1:] or "weight"
    return None


def is_mtp_root(root: str) -> bool:
    """Whether what is named so is for multi-token prediction."""
    return any(part.startswith(("mtp", "nextn")) for part in root.split("."))


def _looks_routed(name: str) -> bool:
    return bool(_LOOKS_ROUTED.search(name)) and not _NOT_ROUTED.search(name)


def match_names(names: Iterable[str], kind: Kind = "routed") -> tuple[list[LayoutMatch], list[LayoutMatch], list[str]]:
    """The complete matches of the names with rows of the table, the incomplete matches, and the unmatched names.

    Unmatched names look like routed experts and are in no complete match: those in layers, and those in heads for
    multi-token prediction that have no layers.
    """
    matches: dict[tuple[int, str], LayoutMatch] = {}
    beside: dict[str, dict[int, dict[str, Parts]]] = {}
    suspects: list[str] = []
    for name in names:
        if not (match := _LAYER.fullmatch(name)):
            if kind == "routed" and is_mtp_root(name) and _looks_routed(name):
                suspects.append(name)
            continue
        root, layer = match["root"] or "", int(match["layer"])
        pattern, number = _split_number(match["rest"])
        if place := _place_beside(pattern):
            small_tensor, part = place
            beside.setdefault(root, {}).setdefault(layer, {}).setdefault(small_tensor, {})[part] = name
        elif kind == "routed" and _looks_routed(match["rest"]):
            suspects.append(name)
        for row, role, part in _places(pattern, kind):
            if (row, root) not in matches:
                matches[row, root] = LayoutMatch(load_table()[row], root, beside.setdefault(root, {}))
            experts = matches[row, root].layers.setdefault(layer, {}).setdefault(role, {})
            experts.setdefault(number, {})[part] = name
    for candidate in matches.values():
        if candidate.layout.routed_only:
            for layer in [layer for layer in candidate.layers if "router" not in candidate.beside.get(layer, {})]:
                del candidate.layers[layer]
    complete = [candidate for candidate in matches.values() if candidate.is_complete]
    partial = [candidate for candidate in matches.values() if not candidate.is_complete]
    matched = set().union(*(candidate.names for candidate in complete))
    return complete, partial, [name for name in suspects if name not in matched]


# ---------------------------------------------------------------------------------------------------------------------
# Attention and embeddings

_INPUTS = {"o": "O", "q_b": "P", "kv_b": "C"}
"""The axis of a role's inputs, where it is not hidden."""

_LOOKS_ATTENTION = re.compile(
    r"(?:^|[._])(?:attn|attention|mamba|ssm|recurrent|conv)[._](?!.*(?:norm|sink|bias|alpha|beta|base|scale|fn)$)|A_log$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class ProjectionTensor:
    """One tensor of an attention layout: its role, its names, and its axes from a string such as "(G Q K V) H".

    `groups` are its two stored axes, each of one letter or of several.
    """

    role: str
    names: tuple[str, ...]
    axes: str
    groups: tuple[tuple[str, ...], tuple[str, ...]]

    @classmethod
    def parse(cls, role: str, names: tuple[str, ...], axes: str) -> "ProjectionTensor":
        """Raises ValueError where `axes` does not describe a projection of this role."""
        groups = [tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", axes)]
        if len(groups) != 2 or (_INPUTS.get(role, "H"),) not in groups or not all(groups):
            raise ValueError(f"not the axes of {role}: {axes}")
        return cls(role, names, axes, (groups[0], groups[1]))

    @property
    def is_transposed(self) -> bool:
        """Whether the stored rows are inputs."""
        return self.groups[0] == (_INPUTS.get(self.role, "H"),)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The letters of the axis of outputs; several where it has more than one part."""
        return self.groups[self.is_transposed]


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """One row of the table of attention projections; without `model_types` it holds for all."""

    name: str
    model_types: frozenset[str]
    rotary_pairs: bool
    tensors: tuple[ProjectionTensor, ...]

    def holds_for(self, model_type: str | None) -> bool:
        return not self.model_types or model_type in self.model_types


@cache
def load_attention_table() -> tuple[AttentionLayout, ...]:
    """The rows for attention of layouts.toml; raises ValueError or KeyError where the table itself is wrong."""
    return tuple(
        AttentionLayout(
            row["name"],
            frozenset(row["model_types"]),
            row.get("rotary_pairs", False),
            tuple(
                ProjectionTensor.parse(
                    entry["role"],
                    tuple(entry["name"].replace("{block}", block) for block in row.get("blocks", [""])),
                    entry["axes"],
                )
                for entry in row["tensors"]
            ),
        )
        for row in _load_toml()["attention"]
    )


@cache
def load_embedding_names() -> tuple[str, ...]:
    """The names of token embeddings below the root of a stack of layers, the ones to prefer first."""
    return tuple(name for row in _load_toml()["embedding"] for name in row["names"])


def load_rotary_pairs() -> tuple[str, ...]:
    """The architectures of llama.cpp whose q and k have the rows of each head in rotary pairs."""
    return tuple(_load_toml()["gguf_rotary_pairs"])


@dataclass(slots=True)
class AttentionMatch:
    """The names of one layer that match rows of the attention table.

    `rows[row]` are the entries of `AttentionLayout.tensors` that the layer has, by their place in the row, each with
    the parts of its stored tensor. `other` is a tensor that looks like attention and is in no row, "" where there is
    none.
    """

    rows: dict[int, dict[int, Parts]] = field(default_factory=dict)
    other: str = ""


@cache
def _projections(rest: str) -> tuple[tuple[int, int, int, str], ...]:
    """The (row, tensor, name, part) quadruples, by their places in the attention table, that fit a name in a layer."""
    found: list[tuple[int, int, int, str]] = []
    for row, layout in enumerate(load_attention_table()):
        fitting = []
        for place, tensor in enumerate(layout.tensors):
            for number, name in enumerate(tensor.names):
                part = rest.removeprefix(name)
                if part == "":
                    fitting.append((len(name), (row, place, number, "weight")))
                elif part != rest and (match := _PART.fullmatch(part)) and "lora_" not in part:
                    fitting.append((len(name), (row, place, number, _part_of(match))))
        # "q_proj.linear" goes before "q_proj", of which "linear.weight" would be a part
        found += [place for length, place in fitting if length == max(fitting)[0]]
    return tuple(found)


def match_attention(names: Iterable[str], root: str) -> dict[int, AttentionMatch]:
    """For each layer below the root, the names that match rows of the attention table.

    A tensor's first name in the table goes before its others.
    """
    found: dict[int, AttentionMatch] = {}
    numbers: dict[tuple[int, int, int], int] = {}
    for name in names:
        if not (match := _LAYER.fullmatch(name)) or (match["root"] or "") != root:
            continue
        layer, rest = int(match["layer"]), match["rest"]
        one = found.setdefault(layer, AttentionMatch())
        if "expert" in rest:
            continue
        places = _projections(rest)
        for row, place, number, part in places:
            first = numbers.setdefault((layer, row, place), number)
            if number < first:
                numbers[layer, row, place] = number
                one.rows[row][place] = {}
            if number <= first:
                one.rows.setdefault(row, {}).setdefault(place, {})[part] = name
        if not places and not one.other and "norm" not in rest and _LOOKS_ATTENTION.search(rest):
            one.other = name
    return found


def match_embeddings(names: Iterable[str], root: str) -> Parts:
    """The parts of the token embeddings of the stack below the root; {} where no name of the table is there.

    Embeddings with the root's own name go first, then those nearest above.
    """
    places = {name: place for place, name in enumerate(load_embedding_names())}
    leaves = {name.rpartition(".")[2] for name in places}
    found: dict[tuple[str, int], Parts] = {}
    for name in names:
        pieces = name.split(".")
        for end, piece in enumerate(pieces, 1):
            if piece not in leaves:
                continue
            for start in (end - 1, end - 2):
                place, above = places.get(".".join(pieces[max(start, 0) : end])), ".".join(pieces[: max(start, 0)])
                if place is not None and not _LAYER.fullmatch(f"{above}._"):
                    part = ".".join(pieces[end:]) or "weight"
                    if "." not in part or part.startswith("weight."):  # a part, and not a module within
                        found.setdefault((above, place), {})[part] = name
    kinds = ("weight", "qweight", "blocks")
    found = {key: parts for key, parts in found.items() if any(part.startswith(kinds) for part in parts)}
    above = root
    while found:
        if own := [place for place_root, place in found if place_root == above]:
            return found[above, min(own)]
        if not above:
            break
        above = above.rpartition(".")[0]
    return {}
