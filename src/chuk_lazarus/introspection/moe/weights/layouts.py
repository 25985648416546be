"""The layout table, and matching a checkpoint's tensor names against it.

Names are matched, never made up from the config: layers and experts are found, not computed.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from math import prod
from typing import Any

ROLES = ("gate", "up", "down")
_WITH_PARTS = (*ROLES, "gate_up")  # stored tensors, whose parts may be set off by an underscore

_LAYER = re.compile(
    r"(?:(?P<root>.*?)\.)?(?:layers|blocks|block|blk|decoder_layer|h)\.(?P<layer>\d{1,9})\.(?P<rest>.+)"
)
_EXPERT = re.compile(r"(?<=\.)\d{1,18}(?=\.)")
_PART = re.compile(r"[._](?P<part>[A-Za-z][\w.]*)")
_LOOKS_ROUTED = re.compile(r"(?:^|\.)(?:experts|switch_mlp|switch_glu)(?:[._]|$)")
_NOT_ROUTED = re.compile(r"shared_expert|share_expert|shared_mlp|self_attention|e_score_correction_bias|residual_mlp")


@dataclass(frozen=True, slots=True)
class StoredAxes:
    """How one stored tensor relates to the canonical form, from a string such as "E (2 I) H".

    `groups` are the stored axes of a single expert, always two; `stacked` says whether one tensor holds all experts,
    and `flattened` whether its first axis is experts times rows.
    """

    groups: tuple[tuple[str, ...], tuple[str, ...]]
    stacked: bool
    flattened: bool

    @classmethod
    def parse(cls, text: str) -> "StoredAxes":
        """Raises ValueError for a string that is no such description."""
        groups = [tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", text)]
        stacked = text.startswith(("E", "(E"))
        flattened = stacked and groups[0] != ("E",)
        if stacked:
            groups = [groups[0][1:], *groups[1:]] if flattened else groups[1:]
        if len(groups) != 2 or ("H",) not in groups or not {("I",), ("2", "I"), ("I", "2")} & set(groups):
            raise ValueError(f"not the axes of an expert: {text}")
        return cls((groups[0], groups[1]), stacked, flattened)

    def solve(self, shape: Sequence[int], sizes: Mapping[str, int]) -> dict[str, int] | None:
        """The sizes of E, I and H that a tensor of this shape tells beyond those given, or None if it can't be such a
        tensor.

        A group with two unknown axes tells nothing yet.
        """
        groups: list[tuple[str, ...]] = list(self.groups)
        if self.flattened:
            groups[0] = ("E", *groups[0])
        elif self.stacked:
            groups.insert(0, ("E",))
        if len(shape) != len(groups) or 0 in shape:
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
    """One tensor of a layout: `role` is gate, up, down or gate_up (both in one)."""

    role: str
    names: tuple[str, ...]
    axes: StoredAxes

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(self.role.split("_"))

    @property
    def leaf(self) -> str:
        """The last part of its name, such as "down_proj"."""
        return self.names[0].rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Layout:
    """One row of the table."""

    name: str
    model_types: frozenset[str]
    tensors: tuple[StoredTensor, ...]
    routers: tuple[str, ...]
    activation: str | None
    scoring: str | None
    plain: str | None

    @property
    def is_flattened(self) -> bool:
        """Whether a tensor's first axis is experts times rows, so that no shape tells the number of experts."""
        return self.tensors[0].axes.flattened

    @property
    def has_turns(self) -> bool:
        """Whether a tensor holds gates and ups in turns."""
        return any(("I", "2") in tensor.axes.groups for tensor in self.tensors)

    @property
    def is_stacked(self) -> bool:
        """Whether each tensor holds all experts, and not one."""
        return self.tensors[0].axes.stacked

    def solve(self, shapes: Mapping[str, Sequence[int]], experts: int | None) -> dict[str, int] | None:
        """The sizes E, I, H for stored tensors of these shapes (by role), or None where the layout does not fit
        them."""
        sizes = {} if experts is None else {"E": experts}
        for tensor in (*self.tensors, *self.tensors):  # twice: a later tensor may tell what an earlier one left open
            found = tensor.axes.solve(shapes[tensor.role], sizes)
            if found is None:
                return None
            sizes = found
        return sizes if sizes.keys() == {"E", "I", "H"} else None


@cache
def _load_toml() -> dict[str, Any]:
    return tomllib.loads(files(__package__).joinpath("layouts.toml").read_text())


@cache
def load_table() -> tuple[Layout, ...]:
    """The rows of layouts.toml; raises ValueError or KeyError when the table itself is wrong."""
    rows = _load_toml()["layout"]

    def expand(template: str, blocks: list[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(template.replace("{block}", block) for block in blocks))

    return tuple(
        Layout(
            row["name"],
            frozenset(row["model_types"]),
            tuple(
                StoredTensor(
                    entry["role"], expand(entry["name"], row.get("blocks", [""])), StoredAxes.parse(entry["axes"])
                )
                for entry in row["tensors"]
            ),
            tuple(name for router in row["routers"] for name in expand(router, row.get("blocks", [""]))),
            row.get("activation"),
            row.get("scoring"),
            row.get("plain"),
        )
        for row in rows
    )


def has_one_plus_norm(model_type: str | None) -> bool:
    """Whether models of this type multiply by 1 + weight in their norms."""
    return model_type in _load_toml()["one_plus_norm"]


Parts = dict[str, str]
"""Part of a stored tensor ("weight", "scales", ...) -> the name of the tensor that holds it."""


@dataclass(slots=True)
class Matches:
    """What the names of a checkpoint hold for one layout below one root, such as "model".

    `layers[layer][role][expert]` are the parts of a stored tensor; the expert is None where one tensor holds them all.
    """

    layout: Layout
    root: str
    layers: dict[int, dict[str, dict[int | None, Parts]]] = field(default_factory=dict)
    routers: dict[int, Parts] = field(default_factory=dict)
    beside: dict[int, dict[str, str]] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Every tensor that is matched as part of a routed expert."""
        return {
            name
            for roles in self.layers.values()
            for experts in roles.values()
            for parts in experts.values()
            for name in parts.values()
        }

    @property
    def is_complete(self) -> bool:
        """Whether at least one layer has all the layout's tensors."""
        wanted = {tensor.role for tensor in self.layout.tensors}
        return any(roles.keys() == wanted for roles in self.layers.values())


def split_name(name: str) -> tuple[str, str]:
    """A tensor's layer, such as "model.layers.3", and its name there, with {expert} for the expert's number.

    Raises ValueError for a name that is in no layer.
    """
    if not (match := _LAYER.fullmatch(name)):
        raise ValueError(f"{name} is in no layer")
    return name[: match.start("rest") - 1], _EXPERT.sub("{expert}", match["rest"], count=1)


@cache
def _places(pattern: str) -> tuple[tuple[int, str, str], ...]:
    """All (row, role, part) that a name with {expert} for its number can be; router and the like are roles here."""
    found = []
    for row, layout in enumerate(load_table()):
        for name, role in (
            *((name, tensor.role) for tensor in layout.tensors for name in tensor.names),
            *((router, "router") for router in layout.routers),
            *((name, kind) for kind, names in _load_toml()["beside"].items() for name in names),
        ):
            rest = pattern.removeprefix(name)
            if rest == "":
                found.append((row, role, "weight"))
            elif rest != pattern and (match := _PART.fullmatch(rest)) and (role in _WITH_PARTS or rest[0] == "."):
                found.append((row, role, match["part"]))
    return tuple(found)


def match_names(names: Iterable[str]) -> tuple[list[Matches], list[Matches], list[str]]:
    """All matches of the names with rows of the table: complete ones, then others, then the names that stay over.

    Those that stay over look like routed experts and are in no complete match.
    """
    matches: dict[tuple[int, str], Matches] = {}
    suspects: list[str] = []
    for name in names:
        if not (match := _LAYER.fullmatch(name)):
            continue
        root, layer, rest = match["root"] or "", int(match["layer"]), match["rest"]
        number = _EXPERT.search(rest)
        pattern = f"{rest[: number.start()]}{{expert}}{rest[number.end() :]}" if number else rest
        if _LOOKS_ROUTED.search(rest) and not _NOT_ROUTED.search(rest):
            suspects.append(name)
        for row, role, part in _places(pattern):
            found = matches.setdefault((row, root), Matches(load_table()[row], root))
            if role == "router":
                found.routers.setdefault(layer, {})[part] = name
            elif role in _load_toml()["beside"]:
                found.beside.setdefault(layer, {})[role] = name
            else:
                experts = found.layers.setdefault(layer, {}).setdefault(role, {})
                experts.setdefault(int(number[0]) if number else None, {})[part] = name
    complete = [found for found in matches.values() if found.is_complete]
    partial = [found for found in matches.values() if found.layers and not found.is_complete]
    matched = set().union(*(found.names for found in complete))
    return complete, partial, [name for name in suspects if name not in matched]
