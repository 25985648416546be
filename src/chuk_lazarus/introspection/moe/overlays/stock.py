"""Models whose experts share nothing, quantised for mlx-lm itself, with more bits where they lower the error most."""

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest, printable
from ..jobs.layout import count_other_bytes
from ..numerics.rates import Rate
from ..progress import Progress
from ..reports import LayerEstimate, LayerVerification, MoEOverlayCompression, OverlayBytes
from ..weights.checkpoint import Checkpoint
from ..weights.expert_layer import ExpertLayer
from ..weights.experts import Experts
from ..weights.repositories.local import Folder
from .analysis import OverlayJob
from .bit_budget import BitRule
from .checkpoint.auxiliary import left_out_note, read_auxiliary_files
from .checkpoint.card import CARD, write_stock_card
from .checkpoint.folder import Contents, check_folder, check_smaller
from .checkpoint.stock_writer import StockModel, remove_rest, stock_contents, write_rest
from .checkpoint.writer import check_copyable, expert_names
from .codes.affine import affine_widths, parse_affine
from .fit import REST_BITS, SCALE_BITS
from .layer import plain_layer_estimate
from .quantised import Checks, Place, list_widths, try_all, verified_note, width_codes, write_quantised
from .width_budget import Widths, choose_widths, count_bytes, resize_trial

MLX = "mlx"


def quantise(
    job: OverlayJob,
    rule: BitRule,
    folder: Path,
    rest_bits: int | None,
    force: bool,
    progress: Progress,
    *,
    larger: bool,
) -> MoEOverlayCompression:
    """Write the job's model, quantised for mlx-lm, into `folder`, and verify some of its layers.

    `larger` says whether it may be as large as the model, or larger. Raises InvalidRequest for a rule that can't be
    met, LibraryMissing if MLX is not installed, UnknownFormat for a model that mlx-lm has no class for.
    """
    experts, checkpoint = job.opened.experts, job.opened.experts.checkpoint
    check_copyable(experts)
    if folder.exists():  # which a run may have made that was stopped before it could clean up
        remove_rest(folder)
    stock = _open_stock(experts)
    all_layers = {number: experts.layer(number) for number in experts.layers}
    names = sorted(set(checkpoint.names) - expert_names([*map(experts.layer, (*experts.layers, *experts.mtp_layers))]))
    rest_stored = checkpoint.count_bytes(names)
    least = sum(layer.parameters for layer in all_layers.values()) // 4 + 2 * rest_stored
    check_folder(folder, checkpoint.repository.folder, force, least)
    auxiliary = read_auxiliary_files(checkpoint)
    rest = stock.rest(write_rest(checkpoint, names, folder, progress))
    rest_codes = stock.rest_codes(rest, rest_bits)
    rule_text = f"{job.describe(rule)}; {'rest kept' if rest_bits is None else f'rest in {rest_bits} bits'}"

    def open_contents(widths: Widths[Place], checks: Checks, card: Callable[[], str]) -> Contents:
        listed = list_widths(widths)
        return stock_contents(
            checkpoint,
            describe(widths),
            files={
                **auxiliary,
                CARD: lambda: write_stock_card(printable(job.opened.name), listed, rule_text, card()).encode(),
            },
            checks=checks,
            resources=job.opened.resources,
            progress=progress,
        )

    def describe(widths: Widths[Place]) -> StockModel:
        codes = {place: parse_affine(width) if width else None for place, width in widths.items()}
        return StockModel(all_layers, stock.paths, codes, rest, rest_codes)

    def choose() -> Widths[Place]:
        trials = try_all(job, MLX, affine_widths)
        try:
            widths = choose_widths(rule, trials, lambda widths: open_contents(widths, {}, str).nbytes)
            if not larger:
                after = sum(shard.nbytes for shard in open_contents(widths, {}, str).shards)
                check_smaller(rest_stored + sum(layer.stored_bytes for layer in all_layers.values()), after)
            return widths
        except InvalidRequest:  # no run will continue with the rest
            remove_rest(folder)
            raise

    def open_checked(widths: Widths[Place], checks: Checks, card: Callable[[], str]) -> Contents:
        model = describe(widths)
        stock.check(model.codes, model.shapes)
        return open_contents(widths, checks, card)

    widths, verified = write_quantised(
        job,
        folder,
        kind=MLX,
        rule=rule,
        rule_text=rule_text,
        choose=choose,
        open_contents=open_checked,
        force=force,
        progress=progress,
    )
    remove_rest(folder)
    job.end()
    return _report(job, rule_text, folder, describe(widths), widths, verified, stock.left_out)


def estimate_widths(
    job: OverlayJob, rule: BitRule, layers: Sequence[ExpertLayer], rates: Mapping[int, Mapping[str, Rate]]
) -> list[LayerEstimate]:
    """The widths of all these layers by the rule, and their error.

    A layer that is not one of the job's is assumed to be like the nearest that is. Everything but experts is assumed to
    have 16 bits as stored, and the default bits in the folder.
    """
    measured = try_all(job, MLX, affine_widths)
    numbers = sorted({number for number, _ in measured})
    trials = {}
    for layer in layers:
        nearest = min(numbers, key=lambda number: abs(number - layer.number))
        for role in layer.roles:
            shape = layer.shape(role)
            trials[layer.number, role] = resize_trial(measured[nearest, role], shape, layer.count, affine_widths(shape))
    rest = int((count_other_bytes(job.opened.experts) or 0) * (REST_BITS + SCALE_BITS) / 16)
    widths = choose_widths(rule, trials, lambda widths: rest + count_bytes(trials, widths))
    codes, results = width_codes(widths), []
    for layer in layers:
        of_layer = {role: (trials[layer.number, role], widths[layer.number, role]) for role in layer.roles}
        error = sqrt(sum(trial.error(width) for trial, width in of_layer.values()) / len(of_layer))
        size = sum(trial.nbytes(width) for trial, width in of_layer.values())
        results.append(plain_layer_estimate(layer, codes[layer.number], size, error, rates))
    return results


def _open_stock(experts: Experts) -> Any:
    """mlx-lm's model of the checkpoint, without weights."""
    from .runtime.stock import StockNames

    config = experts.checkpoint.model_config.without_quantization()
    return StockNames(config, {number: experts.layer(number).roles for number in experts.layers})


def _report(
    job: OverlayJob,
    rule: str,
    folder: Path,
    model: StockModel,
    widths: Widths[Place],
    verified: Sequence[LayerVerification],
    left_out: Sequence[str],
) -> MoEOverlayCompression:
    checkpoint, written = job.opened.experts.checkpoint, Checkpoint(Folder(folder))
    before, after = (each.count_bytes(each.names) for each in (checkpoint, written))
    weights = sum(layer.parameters for layer in job.layers)
    parts = [tensor for layer in model.layers for tensor in model.expert_tensors(layer)]
    scales = sum(part.nbytes for part in parts if part.name.endswith((".scales", ".biases")))
    levels = sum(part.nbytes for part in parts if part.name.endswith(".weight"))
    notes = [*job.opened.experts.notes, *verified_note(job), *left_out_note(job.opened.experts.checkpoint)]
    if after >= before:
        notes.append("the folder is not smaller than the model: ask for fewer bits")
    if job.opened.experts.mtp_layers:
        notes.append("layers for multi-token prediction are left out: mlx-lm does not run them")
    if left_out:
        notes.append(f"mlx-lm's model class has no {', '.join(left_out)}: left out")
    return MoEOverlayCompression(
        **job.opened.identity(),
        format="mlx",
        folder=printable(str(folder)),
        rule=rule,
        ranks={},
        codes=width_codes(widths),
        bytes_before=before,
        bytes_after=after,
        ratio=before / after,
        bits_per_weight=8 * (levels + scales) / weights,
        bytes_by_part=OverlayBytes(bases=0, deltas=levels, scales=scales),
        verification=tuple(verified),
        notes=tuple(notes),
        cost=job.opened.cost(),
    )
