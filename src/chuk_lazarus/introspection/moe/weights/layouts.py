"""The layout table, and how the names of a checkpoint's tensors are matched with it.

The layers and experts of a model are those whose names match; no name is composed from numbers in the config.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from math import prod
from typing import Any, Literal

Kind = Literal["routed", "shared", "dense"]
"""Routed experts, shared experts, or the feed-forward of a dense layer."""

_LAYER = re.compile(
    r"(?:(?P<root>.*?)\.)?(?:layers|blocks|block|blk|decoder_layer|h)\.(?P<layer>\d{1,9})\.(?P<rest>.+)"
)
# a dot precedes the part where the tensor belongs to a module, and an underscore where it is a bare parameter
_PART = re.compile(
    r"\.(?P<part>[A-Za-z][\w.]*)"
    r"|_(?P<suffix>bias|blocks|scales|scale(?:_inv|_2)?|weight_(?:scale(?:_inv|_2)?|packed)|\w+_scale)"
)
_LOOKS_ROUTED = re.compile(r"(?:^|\.)(?:experts|switch_mlp|switch_glu)(?:[._]|$)|(?:^|\.)moe\.\d|^ffn_\w+_exps\.")
_NOT_ROUTED = re.compile(
    r"shared_expert|share_expert|shared_mlp|shared_w\d|chunk_experts|vision_moe|self_attention|residual_mlp"
    r"|e_score_correction_bias|post_expert_norm|experts\.bias$"
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

    @property
    def is_flattened(self) -> bool:
        """Whether a tensor's first axis is experts times rows, so that no shape gives the number of experts."""
        return self.tensors[0].axes.flattened

    @property
    def may_be_halves(self) -> bool:
        """Whether gates and ups lie in turns here, and in halves in another row of the table with the same names."""
        in_turns = {name for tensor in self.tensors if ("I", "2") in tensor.axes.groups for name in tensor.names}
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
        return tuple(dict.fromkeys(template.replace("{block}.", block and f"{block}.") for block in blocks))

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
        )
        for row in _load_toml()["layout"]
    )


def is_listed(model_type: str | None) -> bool:
    """Whether a row of routed experts lists this model type."""
    return any(model_type in row.model_types for row in load_table() if row.kind == "routed")


def has_feature(model_type: str | None, feature: Literal["one_plus_norm", "swiglu_oai", "sigmoid"]) -> bool:
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
    experts. `beside[layer][kind]` are the parts of a small tensor beside the experts: router, norm or correction.
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
                    places.append((row, tensor.role, match["part"] or match["suffix"]))
    return tuple(places)


@cache
def _place_beside(pattern: str) -> tuple[str, str] | None:
    """The kind of small tensor beside the experts that a name stands for, and its part; None where it is none."""
    for kind, names in _load_toml()["beside"].items():
        for name in names:
            rest = pattern.removeprefix(name)
            if rest == "" or (rest != pattern and rest[0] == "." and "." not in rest[1:]):
                return kind, rest[1:] or "weight"
    return None


def match_names(names: Iterable[str], kind: Kind = "routed") -> tuple[list[LayoutMatch], list[LayoutMatch], list[str]]:
    """The complete matches of the names with rows of the table, the incomplete matches, and the unmatched names.

    Unmatched names look like routed experts and are in no complete match.
    """
    matches: dict[tuple[int, str], LayoutMatch] = {}
    beside: dict[str, dict[int, dict[str, Parts]]] = {}
    suspects: list[str] = []
    for name in names:
        if not (match := _LAYER.fullmatch(name)):
            continue
        root, layer = match["root"] or "", int(match["layer"])
        pattern, number = _split_number(match["rest"])
        if kind == "routed" and _LOOKS_ROUTED.search(match["rest"]) and not _NOT_ROUTED.search(match["rest"]):
            suspects.append(name)
        if place := _place_beside(pattern):
            small_tensor, part = place
            beside.setdefault(root, {}).setdefault(layer, {}).setdefault(small_tensor, {})[part] = name
        for row, role, part in _places(pattern, kind):
            if (row, root) not in matches:
                matches[row, root] = LayoutMatch(load_table()[row], root, beside.setdefault(root, {}))
            experts = matches[row, root].layers.setdefault(layer, {}).setdefault(role, {})
            experts.setdefault(number, {})[part] = name
    complete = [candidate for candidate in matches.values() if candidate.is_complete]
    partial = [candidate for candidate in matches.values() if not candidate.is_complete]
    matched = set().union(*(candidate.names for candidate in complete))
    return complete, partial, [name for name in suspects if name not in matched]
