"""Overlay checkpoints: written, verified while they are written."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from ..errors import InvalidRequest, name_model, printable
from ..progress import Progress
from ..reports import LayerVerification, MoEOverlayCompression
from ..text import format_ranges
from .allocation import RankRule
from .analysis import INPUTS, TOLERANCE, OverlayJob, rounding_bits_beside
from .bit_budget import BitRule
from .checkpoint.auxiliary import left_out_note
from .checkpoint.card import card_table
from .checkpoint.folder import check_smaller
from .checkpoint.format import Ranks
from .checkpoint.reader import read_overlay
from .checkpoint.writer import check_target, planned_codes, planned_ranks, write_coded_overlay, write_overlay
from .codes import LayerCodes
from .curves import LayerCurves
from .fidelity import check_coded_layer, check_layer
from .layer import bank_notes, coded_bytes, layer_verification, projection_codes, ranked_bytes, sum_parts
from .stock import quantise

Format = Literal["auto", "overlay", "mlx"]
TRELLIS_BITS = 4  # per weight, below which trellises have a clearly smaller error
TRELLIS_NOTE = "at so few bits --format overlay --trellis has a smaller error, but needs chuk-lazarus to run"
LEAST_BITS = 1.0  # per weight that a coded overlay is assumed to need on disk, if its rule does not say


def compress(
    model: str,
    folder: Path,
    layers: Sequence[int] | str,
    rule: RankRule | BitRule,
    experts: int | None,
    force: bool,
    calibrate: Path | None,
    kind: Format,
    rest_bits: int | None,
    progress: Progress,
) -> MoEOverlayCompression:
    """Write the model with its experts as an overlay into `folder`, or quantised, and verify some of its layers.

    A result that is not smaller than the model is written only if that is forced, or if its ranks or their error were
    asked for. With the format "auto", experts for which no base pays are quantised for mlx-lm, if the rule is one of
    bits. Raises InvalidRequest for an unknown format, or if a rule and a format do not go together.
    """
    if kind not in get_args(Format):
        raise InvalidRequest(f"there is no format {kind!r}", "give auto, overlay or mlx")
    if kind == "mlx":
        check_stock(rule, layers, calibrate)
    with name_model(model):
        job = OverlayJob(model, None, layers, progress)
        if kind == "mlx" or (kind == "auto" and _may_be_stock(rule, layers, calibrate) and not job.has_bases()):
            assert isinstance(rule, BitRule)
            report = quantise(job, rule, folder, rest_bits, force, progress, larger=force)
            return (
                report
                if report.bits_per_weight >= TRELLIS_BITS
                else report.model_copy(update={"notes": (*report.notes, TRELLIS_NOTE)})
            )
        opened, numbers = job.opened, [layer.number for layer in job.layers]
        bits = (rule.bits or LEAST_BITS) if isinstance(rule, BitRule) else None
        check_target(opened.experts, folder, numbers, force, bits)
        job.calibrate(calibrate, rule)
        curves: dict[int, LayerCurves] = {}
        ranks: dict[int, Ranks] = {}
        codes: dict[int, LayerCodes] = {}
        if isinstance(rule, BitRule):
            words = job.describe_folder(rule, numbers)
            rule_text = words["rule"]
            planned_of_layers = planned_codes(opened.experts, folder, rule_text)
            codes = planned_of_layers or job.choose_codes(rule, numbers)
            if planned_of_layers:
                job.resumable("trial")
        else:
            rule_text = f"{rule}; {experts or 'all'} experts of layers {format_ranges(numbers)}"
            planned = planned_ranks(opened.experts, folder, rule_text)
            if planned is None:
                ranks, curves = job.choose_ranks(rule, experts)
            else:
                # an interrupted run chose the ranks; its kept measurements are deleted when this job ends
                ranks = planned
                job.resumable("measure", rule.energy, experts)
        checked = [opened.experts.layer(number) for number in job.verified_layers(numbers)]
        rounding_bits = rounding_bits_beside(rule)
        checks = {layer.number: job.fidelity_check(layer, INPUTS, 0, rounding_bits) for layer in checked}
        verified: list[LayerVerification] = []

        def verify() -> str:
            for layer in checked:
                check = checks[layer.number]
                if check.is_complete:
                    fidelity = check.result()
                elif codes:  # an interrupted run has written the layer, so the check has not seen its experts
                    moments = job.moments_of(layer)
                    fidelity = check_coded_layer(layer, codes[layer.number], check, opened.resources, progress, moments)
                else:
                    fidelity = check_layer(layer, ranks[layer.number], check, opened.resources, progress)
                number = layer.number
                of_layer = projection_codes(codes.get(number, {}))
                verified.append(layer_verification(number, ranks.get(number, {}), fidelity, of_layer))
            return card_table(verified)

        if codes:
            parts = coded_bytes(job.layers, [codes[number] for number in numbers])
            write = partial(
                write_coded_overlay, opened.experts, codes, options=words["options"], moments=job.moments_of
            )
        else:
            parts = ranked_bytes(job.layers, [ranks[number] for number in numbers])
            write = partial(write_overlay, opened.experts, ranks)
        if not force and (isinstance(rule, BitRule) or rule.is_usual):
            check_smaller(sum(layer.stored_bytes for layer in job.layers), sum_parts(parts))
        write(
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
        before, after = (
            each.count_bytes(each.names) for each in (opened.experts.checkpoint, read_overlay(folder).checkpoint)
        )
        return MoEOverlayCompression(
            **opened.identity(),
            folder=printable(str(folder)),
            rule=job.describe(rule),
            ranks=ranks,
            codes={number: projection_codes(of_layer) for number, of_layer in codes.items()},
            bytes_before=before,
            bytes_after=after,
            ratio=before / after,
            bits_per_weight=8 * sum_parts(parts) / sum(layer.parameters for layer in job.layers),
            bytes_by_part=parts,
            verification=tuple(verified),
            notes=(
                *job.notes(curves),
                *bank_notes(codes),
                *_notes(verified, before, after),
                *left_out_note(opened.experts.checkpoint),
            ),
            cost=opened.cost(),
        )


def check_stock(rule: RankRule | BitRule, layers: Sequence[int] | str, calibrate: Path | None) -> None:
    """Raise InvalidRequest for options that a model quantised for mlx-lm can't have."""
    if not isinstance(rule, BitRule):
        raise InvalidRequest("a checkpoint for mlx-lm can't have ranks", "give --bits, --fit, --as-good-as or --coded")
    if rule.trellis:
        raise InvalidRequest("mlx-lm can't run trellises", "leave out --trellis, or write an overlay: --format overlay")
    if calibrate:
        raise InvalidRequest("only overlays can be calibrated", "leave out --calibrate, or give --format overlay")
    if layers != "all":
        raise InvalidRequest("a checkpoint for mlx-lm always has all layers", "leave out --layers")


def _may_be_stock(rule: RankRule | BitRule, layers: Sequence[int] | str, calibrate: Path | None) -> bool:
    try:
        check_stock(rule, layers, calibrate)
    except InvalidRequest:
        return False
    return True


def _notes(verified: Sequence[LayerVerification], before: int, after: int) -> list[str]:
    notes = []
    if after >= before:
        notes.append("the overlay is not smaller than the model: its ranks or bits are too high for these experts")
    worst = max((layer.output_error.max for layer in verified), default=0.0)
    if worst > TOLERANCE:
        notes.append(f"the worst verified expert's output error is {100 * worst:.1f} %")
    if not verified:
        notes.append("the experts' activation is not known: nothing was verified")
    return notes
