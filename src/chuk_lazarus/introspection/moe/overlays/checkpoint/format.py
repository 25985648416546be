"""The overlay on disk: its version, the names and shapes of its tensors, and what config.json says of it.

The writer, the reader and the MLX runtime all take the format from here, and only from here.

Version 1 keeps each role of a layer as a bf16 base and two bf16 factors per expert. A version with other codes starts
here: its parts go into `AXES` and `part_shapes`, its fields into `OverlayConfig`, and `OverlayConfig.read` branches on
the version. Numbers are rounded in `coding.split_delta`, laid out by `writer._overlay_tensors` and `_fill_layer`,
checked and decoded by `OverlayCheckpoint`, or by the MLX modules, and counted by `low_rank.overlay_bytes`. Version 1
must stay readable.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ...terms import OVERLAY_CONFIG, ROLES

VERSION = 1
AXES = {"base": 2, "left": 3, "right": 3}  # the parts of a role, with the number of axes that their tensors have

Ranks = dict[str, int]
"""Role -> rank, for one layer."""

_NUMBER = r"\d{1,9}"
_TENSOR_NAME = re.compile(
    rf"(?P<prefix>.+\.(?P<layer>{_NUMBER}))\.overlay\.(?P<role>{'|'.join(ROLES)})\.(?P<part>{'|'.join(AXES)})"
)


@dataclass(frozen=True, slots=True)
class OverlayTensor:
    """What the name of an overlay's tensor says: the layer's `prefix` ("model.layers.3") and number, role and part."""

    prefix: str
    layer: int
    role: str
    part: str


def tensor_name(prefix: str, role: str, part: str) -> str:
    """The name of a part of a role, such as "model.layers.3.overlay.up.left"."""
    return f"{prefix}.overlay.{role}.{part}"


def parse_tensor_name(name: str) -> OverlayTensor | None:
    """What a tensor's name says, or None for a tensor that is not the overlay's."""
    match = _TENSOR_NAME.fullmatch(name)
    return OverlayTensor(match["prefix"], int(match["layer"]), match["role"], match["part"]) if match else None


def part_shapes(shape: tuple[int, int], experts: int, rank: int) -> dict[str, tuple[int, ...]]:
    """The shape of each part of a role whose matrices have the shape (out, in)."""
    out, inner = shape
    return {"base": (out, inner), "left": (experts, out, rank), "right": (experts, rank, inner)}


class OverlayConfigError(Exception):
    """An `overlay_config` that can't be read. It has no message, as the reader and the runtime each word their own.

    `value` is the version that is not known, or the layer as the config calls it; `roles` are those that each layer
    needs a rank for. The problem is "layer" where a layer is not a number or its ranks are not an object.
    """

    def __init__(
        self,
        problem: Literal["missing", "version", "no layers", "layer", "roles", "rank"],
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
    in words how the ranks were chosen; `layers` has the ranks of each overlaid layer.
    """

    version: int = VERSION
    source: str
    revision: str | None
    family: str
    dtype: str = "bfloat16"
    names: dict[str, str]
    rule: str
    layers: dict[int, Ranks]

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
        if facts.get("version") != VERSION:
            raise OverlayConfigError("version", facts.get("version"))
        roles = roles_of(facts.get("family"))
        texts = {key: value for key, value in facts.items() if isinstance(value, str)}
        names = facts.get("names")
        names = names if isinstance(names, dict) else {}
        return cls(
            source=texts.get("source", ""),
            revision=texts.get("revision"),
            family=texts.get("family", ""),
            dtype=texts.get("dtype", ""),
            names={role: name for role, name in names.items() if isinstance(name, str)},
            rule=texts.get("rule", ""),
            layers=_read_layers(facts.get("layers"), roles),
        )

    def to_json(self) -> dict[str, Any]:
        """The value of `overlay_config` in config.json."""
        return {**asdict(self), "layers": {str(layer): ranks for layer, ranks in self.layers.items()}}


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
