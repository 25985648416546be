"""Overlay checkpoints: written, verified while they are written, and rebuilt into standard ones."""

import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import name_model, printable
from ..jobs.model import evenly_spaced
from ..jobs.resources import Resources
from ..progress import Progress
from ..reports import LayerVerification, MoEOverlayCompression, MoEOverlayExport
from ..text import format_ranges
from ..weights.checkpoint import Checkpoint
from ..weights.repositories.local import Folder
from .allocation import RankRule
from .analysis import INPUTS, TOLERANCE, OverlayJob
from .checkpoint.card import card_table
from .checkpoint.export import export_overlay
from .checkpoint.reader import read_overlay
from .checkpoint.writer import check_target, planned_ranks, write_overlay
from .curves import LayerCurves
from .fidelity import check_layer
from .layer import layer_verification

VERIFIED = 3  # layers of a written overlay that are verified


def compress(
    model: str,
    folder: Path,
    layers: Sequence[int] | str,
    rule: RankRule,
    experts: int | None,
    force: bool,
    progress: Progress,
) -> MoEOverlayCompression:
    """Write the model with its experts as an overlay into `folder`, and verify some of its layers."""
    with name_model(model):
        job = OverlayJob(model, None, layers, progress)
        opened, numbers = job.opened, [layer.number for layer in job.layers]
        check_target(opened.experts, folder, numbers, force)
        rule_text = f"{rule}; {experts or 'all'} experts of layers {format_ranges(numbers)}"
        chosen = planned_ranks(opened.experts, folder, rule_text)
        curves: dict[int, LayerCurves] = {}
        if chosen is None:
            chosen, curves = job.choose_ranks(rule, experts)
        else:
            # a stopped run chose the ranks; what it kept of its measurements is deleted when this job ends
            job.resumable("measure", rule.energy, experts)
        places = evenly_spaced(len(job.layers), VERIFIED) if job.knows_activation else ()
        checked = [job.layers[place] for place in places]
        checks = {layer.number: job.fidelity_check(layer, INPUTS, 0) for layer in checked}
        verified: list[LayerVerification] = []

        def verify() -> str:
            for layer in checked:
                ranks, check = chosen[layer.number], checks[layer.number]
                if check.is_complete:
                    fidelity = check.result()
                else:  # a stopped run has written the layer, and the check has not seen its experts
                    fidelity = check_layer(layer, ranks, check, opened.resources, progress)
                verified.append(layer_verification(layer.number, ranks, fidelity))
            return card_table(verified)

        write_overlay(
            opened.experts,
            chosen,
            folder,
            force=force,
            resources=opened.resources,
            progress=progress,
            source=printable(model),
            rule=rule_text,
            checks=checks,
            card=verify,
        )
        job.end()
        before, after = _tensor_bytes(opened.experts.checkpoint), _tensor_bytes(read_overlay(folder).checkpoint)
        return MoEOverlayCompression(
            **opened.identity(),
            folder=printable(str(folder)),
            rule=str(rule),
            ranks=chosen,
            bytes_before=before,
            bytes_after=after,
            ratio=before / after,
            verification=tuple(verified),
            notes=(*job.notes(curves), *_notes(verified, before, after)),
            cost=opened.cost(),
        )


def export(overlay: str, folder: Path, force: bool, progress: Progress) -> MoEOverlayExport:
    """Rebuild a standard checkpoint, into `folder`, from the overlay checkpoint in the folder `overlay`."""
    started, source = time.perf_counter(), Path(overlay).expanduser()
    with name_model(overlay):
        opened = read_overlay(source)
        export_overlay(source, folder, force=force, resources=Resources.current(), progress=progress)
        return MoEOverlayExport(
            overlay=printable(overlay),
            folder=printable(str(folder)),
            family=opened.family,
            layers=opened.layers,
            bytes=_tensor_bytes(Checkpoint(Folder(folder))),
            seconds=time.perf_counter() - started,
        )


def _tensor_bytes(checkpoint: Checkpoint) -> int:
    return sum(checkpoint.info(name).nbytes for name in checkpoint.names)


def _notes(verified: Sequence[LayerVerification], before: int, after: int) -> list[str]:
    notes = []
    if after >= before:
        notes.append("the overlay is no smaller than the model: its ranks are too high for these experts")
    worst = max((layer.output_error.max for layer in verified), default=0.0)
    if worst > TOLERANCE:
        notes.append(f"the worst verified expert's output error is {100 * worst:.1f} %")
    if not verified:
        notes.append("the experts' activation is not known: nothing was verified")
    return notes
