"""The overlay on disk: its version, the names and shapes of its tensors, and what config.json says of it.

The writer, the reader and the MLX runtime all take the format from here, and only from here.

Version 1 keeps each role of a layer as a bf16 base and two bf16 factors per expert; version 2 keeps base and deltas in
codes, whose parts `RoleCodes.layout` tells. Both must stay readable. Numbers are rounded in `coding.split_delta`, or by
a code, laid out by the writer, checked and decoded by `OverlayCheckpoint`, or by the MLX modules, and counted by
`low_rank.overlay_bytes`, or by `code_bytes`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...terms import OVERLAY_CONFIG, ROLES
from ..codes import BankShape, LayerCodes, RoleCodes, index_layout, list_matrices, parse_code
from ..codes.code import PartLayout
from ..codes.low_rank import FactorsCode

VERSION, CODED_VERSION = 1, 2
READ = "1 and 2"  # the versions, for messages
INDEX = "index"  # which neurons of a layer's bank the experts' refer to
AXES = {"base": 2, "left": 3, "right": 3}  # the parts of a role, with the number of axes that their tensors have

Ranks = dict[str, int]
"""Role -> rank, for one layer."""

_NUMBER = r"\d{1,9}"
_TENSOR_NAME = re.compile(
    rf"(?P<prefix>.+\.(?P<layer>{_NUMBER}))\.overlay\.(?:(?P<role>{'|'.join(ROLES)})\.(?P<part>{'|'.join(AXES)}"
    rf"|(?:base|delta|rest)(?:\.[a-z]+)+)|{INDEX})"
)


@dataclass(frozen=True, slots=True)
class OverlayTensor:
    """What the name of an overlay's tensor says: the layer's `prefix` ("model.layers.3") and number, role and part.

    The part is "base", "left" or "right" in version 1, and a code's, such as "delta.levels", in version 2. The index of
    a layer's bank is the part "index" of the role "".
    """

    prefix: str
    layer: int
    role: str
    part: str


def tensor_name(prefix: str, role: str, part: str) -> str:
    """The name of a part of a role, such as "model.layers.3.overlay.up.left"."""
    return f"{prefix}.overlay.{role}.{part}"


def index_name(prefix: str) -> str:
    """The name of the index of a layer's bank, such as "model.layers.3.overlay.index"."""
    return f"{prefix}.overlay.{INDEX}"


def parse_tensor_name(name: str) -> OverlayTensor | None:
    """What a tensor's name says, or None for a tensor that is not the overlay's."""
    match = _TENSOR_NAME.fullmatch(name)
    if not match:
        return None
    return OverlayTensor(match["prefix"], int(match["layer"]), match["role"] or "", match["part"] or INDEX)


def part_shapes(shape: tuple[int, int], experts: int, rank: int) -> dict[str, tuple[int, ...]]:
    """The shape of each part of a role whose matrices have the shape (out, in)."""
    out, inner = shape
    return {"base": (out, inner), "left": (experts, out, rank), "right": (experts, rank, inner)}


@dataclass(frozen=True, slots=True)
class CodedExperts:
    """The sizes of a coded layer, and the codes of its roles."""

    experts: int
    hidden: int
    intermediate: int
    codes: LayerCodes

    def shape(self, role: str) -> tuple[int, int]:
        """(out, in) of a role's matrices."""
        return (self.hidden, self.intermediate) if role == "down" else (self.intermediate, self.hidden)

    def layout(self, role: str) -> dict[str, PartLayout]:
        """The parts of a role by name, such as "delta.levels"."""
        return self.codes[role].layout(self.shape(role), self.experts)

    @property
    def index(self) -> PartLayout | None:
        """The index of the layer's bank, None where it has none."""
        return index_layout(self.codes, self.experts)

    def to_json(self) -> dict[str, Any]:
        """The layer's entry in config.json."""
        sizes = {"experts": self.experts, "hidden": self.hidden, "intermediate": self.intermediate}
        return sizes | codes_to_json(self.codes)


def codes_to_json(codes: LayerCodes) -> dict[str, Any]:
    """`codes`: by role the codes of base, deltas and unshared neurons, as strings; and the sizes of a bank."""
    texts = {
        role: {"base": str(each.base) if each.base else None, "delta": str(each.delta)}
        | ({"rest": str(each.rest)} if each.rest else {})
        | ({"unbiased": True} if each.unbiased else {})
        for role, each in codes.items()
    }
    bank = next((each.bank for each in codes.values() if each.bank), None)
    return ({"bank": bank.size, "matched": bank.matched} if bank else {}) | {"codes": texts}


def parse_codes(facts: Mapping[str, Any]) -> dict[str, RoleCodes]:
    """The inverse of `codes_to_json`; raises ValueError, KeyError or TypeError for invalid values."""
    sizes = {name: facts[name] for name in ("bank", "matched") if name in facts}
    if sizes and not (len(sizes) == 2 and all(type(size) is int for size in sizes.values())):
        raise TypeError("bank and matched must both be integers")
    if sizes and not 0 < sizes["matched"] <= sizes["bank"] < 2**31:
        raise ValueError(f"{sizes['matched']} neurons do not fit a bank of {sizes['bank']}")
    codes = {}
    for role, texts in facts["codes"].items():
        sides = (texts["base"], texts["delta"], texts.get("rest"))
        if sides[1] is None or not all(text is None or isinstance(text, str) for text in sides):
            raise TypeError("a code must be a string")
        base, delta, rest = (None if text is None else parse_code(text) for text in sides)
        assert delta is not None
        bank = BankShape(sizes["bank"], sizes["matched"], int(role == "down")) if sizes and base else None
        if rest and not bank:
            raise ValueError("a code of the rest needs a bank")
        codes[role] = RoleCodes(base, delta, rest, bank, texts.get("unbiased") is True)
    return codes


def check_index(index: NDArray[np.integer], size: int) -> str | None:
    """What is wrong with the index [experts, matched] of a bank of `size` neurons, None where it is sound."""
    ordered = np.sort(index, axis=1)
    if ordered[:, -1].max() >= size:
        return f"it names neuron {ordered[:, -1].max()} of a bank of {size}"
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        return "it names a neuron twice for one expert"
    return None


class OverlayConfigError(Exception):
    """An `overlay_config` that can't be read. It has no message: the reader and the runtime each have their own.

    `value` is the unknown version, or the layer as the config names it; `roles` are those for which each layer needs a
    rank or codes. The problem is "layer" if a layer is not a number or its ranks are not an object, and "code" if the
    sizes or codes of version 2 are not valid.
    """

    def __init__(
        self,
        problem: Literal["missing", "version", "no layers", "layer", "roles", "rank", "code"],
        value: Any = None,
        roles: Sequence[str] = (),
    ) -> None:
        super().__init__(problem, value)
        self.problem, self.value, self.roles = problem, value, roles


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlayConfig:
    """What config.json says of an overlay.

    `source` and `revision` say which model it was made from, `family` is that model's row of the layout table, and
    `names` are what a plain checkpoint calls the experts' tensors, by role there, below the layer's prefix. `rule` says
    in words how ranks or codes were chosen. `layers` has the ranks of each overlaid layer in version 1, `coded` its
    sizes and codes in version 2; the other one is empty.
    """

    version: int = VERSION
    source: str
    revision: str | None
    family: str
    dtype: str = "bfloat16"
    names: dict[str, str]
    rule: str
    layers: dict[int, Ranks] = field(default_factory=dict)
    coded: dict[int, CodedExperts] = field(default_factory=dict)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The overlaid layers."""
        return tuple(self.layers or self.coded)

    @classmethod
    def read(cls, config: Mapping[str, Any], roles_of: Callable[[Any], Sequence[str]]) -> "OverlayConfig":
        """Read it out of a model's config.

        `roles_of` gives the roles of a family's experts. It is called, before the layers are read, with the value of
        `family`, which may be of any type, and may raise. Only version and layers must be there: a text that is missing
        is read as an empty one. Raises OverlayConfigError.
        """
        facts = config.get(OVERLAY_CONFIG)
        if not isinstance(facts, dict):
            raise OverlayConfigError("missing")
        version = facts.get("version")
        if version not in (VERSION, CODED_VERSION) or type(version) is not int:
            raise OverlayConfigError("version", version)
        roles = roles_of(facts.get("family"))
        texts = {key: value for key, value in facts.items() if isinstance(value, str)}
        names = facts.get("names")
        names = names if isinstance(names, dict) else {}
        listed = facts.get("layers")
        return cls(
            version=version,
            source=texts.get("source", ""),
            revision=texts.get("revision"),
            family=texts.get("family", ""),
            dtype=texts.get("dtype", ""),
            names={role: name for role, name in names.items() if isinstance(name, str)},
            rule=texts.get("rule", ""),
            layers=_read_layers(listed, roles) if version == VERSION else {},
            coded=_read_coded(listed, roles) if version == CODED_VERSION else {},
        )

    def to_json(self) -> dict[str, Any]:
        """The value of `overlay_config` in config.json."""
        return {
            "version": self.version,
            "source": self.source,
            "revision": self.revision,
            "family": self.family,
            "dtype": self.dtype,
            "names": self.names,
            "rule": self.rule,
            "layers": {str(layer): ranks for layer, ranks in self.layers.items()}
            or {str(layer): experts.to_json() for layer, experts in self.coded.items()},
        }


def _read_layers(listed: Any, roles: Sequence[str]) -> dict[int, Ranks]:
    """The ranks of each layer, in order; raises OverlayConfigError."""
    layers = {}
    for key, ranks in listed.items() if isinstance(listed, dict) else ():
        if not re.fullmatch(_NUMBER, key) or not isinstance(ranks, dict):
            raise OverlayConfigError("layer", key, roles)
        if ranks.keys() != set(roles):
            raise OverlayConfigError("roles", key, roles)
        if not all(type(rank) is int and rank >= 0 for rank in ranks.values()):
            raise OverlayConfigError("rank", key, roles)
        layers[int(key)] = {role: ranks[role] for role in roles}
    if not layers:
        raise OverlayConfigError("no layers")
    return dict(sorted(layers.items()))


def _read_coded(listed: Any, roles: Sequence[str]) -> dict[int, CodedExperts]:
    """The sizes and codes of each layer, in order; raises OverlayConfigError."""
    layers = {}
    for key, facts in listed.items() if isinstance(listed, dict) else ():
        if not re.fullmatch(_NUMBER, key) or not isinstance(facts, dict) or not isinstance(facts.get("codes"), dict):
            raise OverlayConfigError("layer", key, roles)
        if facts["codes"].keys() != set(roles):
            raise OverlayConfigError("roles", key, roles)
        sizes: list[Any] = [facts.get(name) for name in ("experts", "hidden", "intermediate")]
        try:
            codes = parse_codes({**facts, "codes": {role: facts["codes"][role] for role in roles}})
            for each in codes.values():
                list_matrices(each, (1, 1), 1)
                if each.base is None and isinstance(each.delta, FactorsCode):
                    raise ValueError("factors need a base: alone, a few bytes would stand for a matrix of any size")
        except (AttributeError, KeyError, TypeError, ValueError):
            raise OverlayConfigError("code", key, roles) from None
        if not all(type(size) is int and 0 < size < 2**31 for size in sizes):
            raise OverlayConfigError("code", key, roles)
        experts, hidden, intermediate = sizes
        for each in codes.values():
            if each.bank and (
                each.bank.matched > intermediate or bool(each.rest) != (each.bank.matched < intermediate)
            ):
                raise OverlayConfigError("code", key, roles)
        layers[int(key)] = CodedExperts(experts, hidden, intermediate, codes)
    if not layers:
        raise OverlayConfigError("no layers")
    return dict(sorted(layers.items()))
