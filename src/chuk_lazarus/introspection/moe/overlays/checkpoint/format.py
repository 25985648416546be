"""The overlay on disk: its version, the names of its tensors, and what config.json says of it."""

import re
from typing import Any

from ...errors import ModelUnreadable
from ...terms import ROLES
from ...weights.layouts import Layout

VERSION = 1
OVERLAY_TENSOR = re.compile(r"(?P<prefix>.+\.(?P<layer>\d{1,9}))\.overlay\.(?P<role>gate|up|down)\.(?:base|left|right)")


def parse_ranks(layers: Any, row: Layout) -> dict[int, dict[str, int]]:
    """layer -> role -> rank out of a config; raises ModelUnreadable."""
    found = {role for tensor in row.tensors for role in tensor.roles}
    roles = [role for role in ROLES if role in found]
    result = {}
    for number, ranks in layers.items() if isinstance(layers, dict) else ():
        if not re.fullmatch(r"\d{1,9}", number) or not isinstance(ranks, dict) or ranks.keys() != set(roles):
            raise ModelUnreadable(f"overlay_config: layer {number} does not have a rank for each of {', '.join(roles)}")
        if not all(type(rank) is int and rank >= 0 for rank in ranks.values()):
            raise ModelUnreadable(f"overlay_config: layer {number} has a rank that is none")
        result[int(number)] = {role: ranks[role] for role in roles}
    if not result:
        raise ModelUnreadable("overlay_config lists no layers with their ranks")
    return dict(sorted(result.items()))
