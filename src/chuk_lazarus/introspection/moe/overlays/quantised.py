"""Writes a job's model as a plain quantised checkpoint in any format: widths chosen, experts verified."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter

from ..jobs.model import evenly_spaced
from ..progress import Progress
from ..reports import LayerVerification, ProjectionCodes
from ..weights.expert_layer import ExpertLayer
from .analysis import INPUTS, OverlayJob, rounding_bits_beside
from .bit_budget import BitRule
from .checkpoint.card import card_table
from .checkpoint.folder import Contents, write_model
from .checkpoint.plan import make_plan, planned_layers
from .codes.code import Shape
from .fidelity import FidelityCheck
from .layer import layer_verification
from .width_budget import Width, Widths, WidthTrial, try_widths

VERIFIED_EXPERTS = 8  # of a layer
VERSION = 1  # of the plans of such folders

Place = tuple[int, str]
"""A layer's number and a role."""

Checks = Mapping[int, FidelityCheck]


def try_all(job: OverlayJob, kind: str, widths: Callable[[Shape], Sequence[Width]]) -> dict[Place, WidthTrial]:
    """The trials of all projections of the job's layers with widths of one `kind`."""

    def try_one(layer: ExpertLayer, progress: Progress) -> dict[str, WidthTrial]:
        return try_widths(layer, widths, job.opened.resources)

    results = job.resumable("widths", kind).each(TypeAdapter(dict[str, WidthTrial]), try_one)
    layers = zip(job.layers, results, strict=True)
    return {(layer.number, role): trial for layer, roles in layers for role, trial in roles.items()}


def write_quantised(
    job: OverlayJob,
    folder: Path,
    *,
    kind: str,
    rule: BitRule,
    rule_text: str,
    choose: Callable[[], Widths[Place]],
    open_contents: Callable[[Widths[Place], Checks, Callable[[], str]], Contents],
    force: bool,
    progress: Progress,
) -> tuple[Widths[Place], list[LayerVerification]]:
    """Write the folder with the widths that `choose` gives, or that an interrupted run has chosen; returns them, and
    the errors of some layers, which are measured during writing.

    `open_contents` takes the widths, the checks that compare experts during writing, and a function that gives the
    errors in Markdown when all are written.
    """
    checkpoint = job.opened.experts.checkpoint
    planned = planned_layers(checkpoint, folder, rule_text, VERSION)
    if planned is None:
        widths = choose()
    else:
        widths = {
            (int(number), role): text or None for number, roles in planned.items() for role, text in roles.items()
        }
        job.resumable("widths", kind)
    layers = {layer.number: layer for layer in job.layers}
    checked = [layers[number] for number in job.verified_layers(tuple(layers))]
    bits = rounding_bits_beside(rule)
    checks = {
        layer.number: job.fidelity_check(layer, INPUTS, 0, bits, evenly_spaced(layer.count, VERIFIED_EXPERTS))
        for layer in checked
    }
    verified: list[LayerVerification] = []

    def verify() -> str:
        codes = width_codes(widths)
        for number, check in checks.items():
            if check.is_complete:  # an interrupted run may have written the layer
                verified.append(layer_verification(number, {}, check.result(), codes[number]))
        return card_table(verified)

    by_layer: dict[str, dict[str, str]] = {}
    for (number, role), width in widths.items():
        by_layer.setdefault(str(number), {})[role] = width or ""
    plan = make_plan(checkpoint, writes=kind, rule=rule_text, version=VERSION, layers=by_layer)
    write_model(folder, open_contents(widths, checks, verify), plan, checkpoint.repository.folder, force, progress)
    return widths, verified


def verified_note(job: OverlayJob) -> list[str]:
    """A note where only some experts of a layer are verified."""
    most = max(layer.count for layer in job.layers)
    few = most > VERIFIED_EXPERTS
    return [f"output errors are measured on {VERIFIED_EXPERTS} of {most} experts per layer"] if few else []


def list_widths(widths: Widths[Place]) -> dict[str, list[int]]:
    """The layers of each combination of widths."""
    layers: dict[str, list[int]] = {}
    for number, roles in width_codes(widths).items():
        listing = ", ".join(f"{role} {codes.delta}" for role, codes in roles.items())
        layers.setdefault(listing, []).append(number)
    return layers


def width_codes(widths: Widths[Place]) -> dict[int, dict[str, ProjectionCodes]]:
    """The widths by layer and role, as codes without a base."""
    codes: dict[int, dict[str, ProjectionCodes]] = {}
    for (number, role), width in widths.items():
        codes.setdefault(number, {})[role] = ProjectionCodes(base=None, delta=width or "bf16")
    return codes
