"""An overlay, or any model, in another format: standard, MLX, compressed-tensors, or a recipe for GGUF."""

import time
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any, Literal, Unpack, get_args

from ..errors import InvalidRequest, name_model, printable
from ..files import as_path
from ..jobs.resources import Resources
from ..progress import Progress
from ..reports import MoEOverlayExport
from ..terms import OVERLAY_CONFIG
from ..weights.checkpoint import Checkpoint
from ..weights.experts import Experts, split_model
from ..weights.repositories.find import find_repository
from ..weights.repositories.local import Folder
from .analysis import OverlayJob
from .bit_budget import BitRule, OverlayOptions, overlay_rule
from .checkpoint.auxiliary import left_out_note
from .checkpoint.export import export_overlay
from .checkpoint.reader import read_overlay
from .checkpoint.rebuilt import rebuilt_checkpoint
from .fit import KEEP, REST_BITS, parse_rest_bits
from .packed import loader_notes, quantise_packed
from .quantised import Place, verified_note
from .recipe import write_recipe
from .stock import quantise

ExportFormat = Literal["standard", "mlx", "compressed-tensors", "gguf-recipe"]


def export(
    source: str | Path,
    target: Path,
    kind: ExportFormat,
    rest_bits: int | str | None,
    force: bool,
    progress: Progress,
    **options: Unpack[OverlayOptions],
) -> MoEOverlayExport:
    """Write an overlay, or any model, in another format into `target`; `options` choose the widths of its experts.

    Raises InvalidRequest for an unknown format, and for options that the format has no use for.
    """
    if kind not in get_args(ExportFormat):
        raise InvalidRequest(f"there is no format {kind!r}", f"give {', '.join(get_args(ExportFormat))}")
    started = time.perf_counter()
    model = str(source)
    given = {name: value for name, value in options.items() if value not in (None, False, {})}
    with name_model(model):
        if kind == "standard":
            if given or rest_bits is not None:
                raise InvalidRequest(
                    "a standard checkpoint is not quantised: it takes no widths",
                    "leave them out, or give another --format",
                )
            facts = _rebuild(as_path(source), target, force, progress)
        else:
            if given.get("trellis"):
                raise InvalidRequest(f"{kind} can't hold trellises", "leave them out, or write an overlay")
            rule = overlay_rule(**{**given, "coded": True})  # type: ignore[arg-type]
            assert isinstance(rule, BitRule)
            facts = _quantise(model, target, kind, rule, rest_bits, force, progress)
        seconds = time.perf_counter() - started
        names = {"overlay": printable(model), "folder": printable(str(target))}
        return MoEOverlayExport(**names, format=kind, seconds=seconds, **facts)


def _rebuild(source: Path, folder: Path, force: bool, progress: Progress) -> dict[str, Any]:
    """Write a standard checkpoint; returns what the report says of it."""
    overlay = read_overlay(source)
    export_overlay(source, folder, force=force, resources=Resources.current(), progress=progress)
    return {
        "family": overlay.family,
        "layers": overlay.layers,
        "bytes": _tensor_bytes(folder),
        "notes": tuple(left_out_note(overlay.checkpoint)),
    }


def _quantise(
    model: str,
    target: Path,
    kind: ExportFormat,
    rule: BitRule,
    rest_bits: int | str | None,
    force: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Write what has widths; returns what the report says of it."""
    name, stack = split_model(model)
    stored = Checkpoint(find_repository(name))
    experts = Experts(rebuilt_checkpoint(stored), stack=stack)
    job = OverlayJob(model, None, "all", progress, experts=experts)
    facts: dict[str, Any] = {"family": experts.family, "layers": experts.layers, "rule": str(rule)}
    if kind == "compressed-tensors":
        if rest_bits not in (None, KEEP):
            raise InvalidRequest(f"{kind} quantises only the experts", "leave out --rest-bits")
        widths, verified = quantise_packed(job, rule, target, force, progress)
        notes = (*experts.notes, *verified_note(job), *loader_notes(widths), *left_out_note(experts.checkpoint))
        return {
            **facts,
            "widths": _by_layer(widths),
            "verification": tuple(verified),
            "bytes": _tensor_bytes(target),
            "notes": notes,
            "commands": (f"vllm serve {quote(str(target))}",),
        }
    bits = parse_rest_bits(REST_BITS if rest_bits is None else rest_bits)
    if kind == "mlx":
        report = quantise(job, rule, target, bits, force, progress, larger=True)
        codes = {(number, role): each.delta for number, roles in report.codes.items() for role, each in roles.items()}
        return {
            **facts,
            "widths": _by_layer(codes),
            "verification": report.verification,
            "bytes": report.bytes_after,
            "notes": report.notes,
            "commands": (f"mlx_lm.generate --model {quote(str(target))}",),
        }
    is_overlay = OVERLAY_CONFIG in stored.config
    recipe = write_recipe(job, rule, target, bits, is_overlay, force)
    return {
        **facts,
        "widths": _by_layer(recipe.widths),
        "weight_error": recipe.weight_error,
        "bytes": recipe.nbytes,
        "notes": tuple(experts.notes),
        "commands": recipe.commands,
    }


def _by_layer(widths: Mapping[Place, str | None]) -> dict[int, dict[str, str]]:
    layers: dict[int, dict[str, str]] = {}
    for (number, role), width in widths.items():
        layers.setdefault(number, {})[role] = width or "bf16"
    return layers


def _tensor_bytes(folder: Path) -> int:
    """The bytes of all tensors of the checkpoint in a folder."""
    checkpoint = Checkpoint(Folder(folder))
    return checkpoint.count_bytes(checkpoint.names)
