"""The plan of unfinished work: what an interrupted run had chosen, for the run that continues it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ...weights.checkpoint import Checkpoint
from ...weights.fingerprint import fingerprint
from .folder import PLAN, name_unfinished


def make_plan(checkpoint: Checkpoint, *, writes: str, rule: str, version: int, layers: Any) -> dict[str, Any]:
    """The plan of a folder: what it will hold, by which rule, and what was chosen for its `layers` (JSON)."""
    return {
        "writes": writes,
        "rule": rule,
        "ranks": layers,
        "checksum": _checksum(layers),
        "version": version,
        **fingerprint(checkpoint),
    }


def planned_layers(checkpoint: Checkpoint, folder: Path, rule: str, version: int) -> dict[str, Any] | None:
    """The layers in the plan of an interrupted run for `folder`; None if there is no plan of the same work."""
    try:
        plan = json.loads((name_unfinished(Path(os.path.realpath(folder))) / PLAN).read_bytes())
        is_ours = plan["checksum"] == _checksum(plan["ranks"]) and plan["rule"] == rule
        if is_ours and plan.items() >= {"version": version, **fingerprint(checkpoint)}.items():
            layers: dict[str, Any] = plan["ranks"]
            return {str(int(layer)): of_layer for layer, of_layer in layers.items()}
    except (OSError, AttributeError, KeyError, RecursionError, TypeError, ValueError):
        pass  # there is no plan, or it was changed
    return None


def _checksum(layers: Any) -> str:
    """A checksum that shows whether the layers in a plan were changed."""
    return hashlib.sha256(json.dumps(layers, sort_keys=True).encode()).hexdigest()[:16]
