"""Models whose experts share nothing: quantised for mlx-lm itself, in as many bits as fit where they count."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from ..errors import InvalidRequest, printable
from ..jobs.layout import count_other_bytes
from ..jobs.model import evenly_spaced
from ..numerics.rates import Rate
from ..progress import Progress
from ..reports import LayerEstimate, LayerVerification, MoEOverlayCompression, OverlayBytes, ProjectionCodes
from ..weights.checkpoint import Checkpoint
from ..weights.expert_layer import ExpertLayer
from ..weights.experts import Experts
from ..weights.repositories.local import Folder
from .analysis import INPUTS, OverlayJob, rounding_bits_beside
from .bit_budget import BitRule
from .checkpoint.card import CARD, card_table, write_stock_card
from .checkpoint.folder import check_folder, write_model
from .checkpoint.plan import make_plan, planned_layers
from .checkpoint.stock_writer import StockModel, remove_rest, stock_contents, write_rest
from .checkpoint.writer import check_copyable, expert_names
from .codes.affine import AffineCode, parse_affine
from .fit import REST_BITS, SCALE_BITS
from .layer import layer_verification, plain_layer_estimate
from .width_budget import Trials, Widths, WidthTrial, count_bytes, try_widths, widths_reaching, widths_within

VERIFIED_EXPERTS = 8  # of a layer
TRELLIS_BITS = 4  # a weight, below which trellises err clearly less
VERSION = 1  # of the plans of such folders
FIT_ROUNDS = 8  # of looking for what fits a folder, whose config's text depends on the widths

Place = tuple[int, str]
"""A layer's number and a role."""


def quantise(
    job: OverlayJob, rule: BitRule, folder: Path, rest_bits: int | None, force: bool, progress: Progress
) -> MoEOverlayCompression:
    """Write the job's model, quantised for mlx-lm, into `folder`, and verify some of its layers.

    Raises InvalidRequest for a rule that can't be met and where MLX is not installed, UnknownFormat for a model that
    mlx-lm has no class for.
    """
    experts, checkpoint = job.opened.experts, job.opened.experts.checkpoint
    check_copyable(experts)
    if folder.exists():  # which a run may have made that was stopped before it could clean up
        remove_rest(folder)
    stock = _open_stock(experts)
    all_layers = {number: experts.layer(number) for number in experts.layers}
    names = sorted(set(checkpoint.names) - expert_names([*map(experts.layer, (*experts.layers, *experts.mtp_layers))]))
    rest_stored = sum(checkpoint.info(name).nbytes for name in names)
    least = sum(layer.parameters for layer in all_layers.values()) // 4 + 2 * rest_stored
    check_folder(folder, checkpoint.repository.folder, force, least)
    rest = stock.rest(write_rest(checkpoint, names, folder, progress))
    rest_codes = stock.rest_codes(rest, rest_bits)
    rule_text = f"{job.describe(rule)}; {'rest kept' if rest_bits is None else f'rest in {rest_bits} bits'}"

    source = printable(job.opened.name)

    def describe(widths: Widths[Place]) -> StockModel:
        return StockModel(all_layers, stock.paths, widths, rest, rest_codes)

    def open_contents(model: StockModel, card: Any = str, checks: Any = None) -> Any:
        return stock_contents(
            checkpoint,
            model,
            files={CARD: lambda: write_stock_card(source, _list_widths(model.widths), rule_text, card()).encode()},
            checks=checks or {},
            resources=job.opened.resources,
            progress=progress,
        )

    planned = planned_layers(checkpoint, folder, rule_text, VERSION)
    if planned is None:
        trials = _try_all(job)
        widths = _choose(rule, trials, lambda widths: open_contents(describe(widths)).nbytes)
    else:
        widths = {
            (int(number), role): parse_affine(text) if text else None
            for number, roles in planned.items()
            for role, text in roles.items()
        }
        job.resumable("widths")
    model = describe(widths)
    stock.check(model.codes, model.shapes)
    checked = [all_layers[number] for number in job.verified_layers(tuple(all_layers))]
    bits = rounding_bits_beside(rule)
    checks = {
        layer.number: job.fidelity_check(layer, INPUTS, 0, bits, evenly_spaced(layer.count, VERIFIED_EXPERTS))
        for layer in checked
    }
    verified: list[LayerVerification] = []

    def verify() -> str:
        for layer in checked:
            if checks[layer.number].is_complete:  # a run that was stopped may have written the layer
                number = layer.number
                verified.append(layer_verification(number, {}, checks[number].result(), stock_codes(widths)[number]))
        return card_table(verified)

    contents = open_contents(model, verify, checks)
    by_layer: dict[str, dict[str, str]] = {}
    for (number, role), code in widths.items():
        by_layer.setdefault(str(number), {})[role] = str(code or "")
    plan = make_plan(checkpoint, writes="mlx", rule=rule_text, version=VERSION, layers=by_layer)
    write_model(folder, contents, plan, checkpoint.repository.folder, force, progress)
    remove_rest(folder)
    job.end()
    return _report(job, rule_text, folder, model, verified, stock.left_out)


def estimate_widths(
    job: OverlayJob, rule: BitRule, layers: Sequence[ExpertLayer], rates: Mapping[int, Mapping[str, Rate]]
) -> list[LayerEstimate]:
    """The widths of all these layers by the rule, and what they err.

    A layer that is not among the job's, whose experts are looked at, is taken to be as the nearest that is. What is no
    expert is taken to have 16 bits as stored, and the usual ones in the folder.
    """
    measured = _try_all(job)
    numbers = sorted({number for number, _ in measured})
    trials = {}
    for layer in layers:
        nearest = min(numbers, key=lambda number: abs(number - layer.number))
        for role in layer.roles:
            trial = measured[nearest, role]
            trials[layer.number, role] = replace(trial, shape=layer.shape(role), experts=layer.count)
    rest = int((count_other_bytes(job.opened.experts) or 0) * (REST_BITS + SCALE_BITS) / 16)
    widths = _choose(rule, trials, lambda widths: rest + count_bytes(trials, widths))
    codes, results = stock_codes(widths), []
    for layer in layers:
        of_layer = {role: (trials[layer.number, role], widths[layer.number, role]) for role in layer.roles}
        lost = [trial.error(code) for trial, code in of_layer.values()]
        size = sum(trial.nbytes(code) for trial, code in of_layer.values())
        results.append(plain_layer_estimate(layer, codes[layer.number], size, sqrt(float(np.mean(lost))), rates))
    return results


def _open_stock(experts: Experts) -> Any:
    """mlx-lm's model of the checkpoint, without weights."""
    try:
        from .runtime.stock import StockNames
    except ImportError:
        raise InvalidRequest(
            "MLX and mlx-lm are not installed", "install chuk-lazarus[mlx], or write an overlay: --format overlay"
        ) from None
    config = experts.checkpoint.model_config.without_quantization()
    return StockNames(config, {number: experts.layer(number).roles for number in experts.layers})


def _try_all(job: OverlayJob) -> Trials[Place]:
    def try_one(layer: ExpertLayer, progress: Progress) -> dict[str, WidthTrial]:
        return try_widths(layer, job.opened.resources, progress)

    results = job.resumable("widths").each(TypeAdapter(dict[str, WidthTrial]), try_one)
    layers = zip(job.layers, results, strict=True)
    return {(layer.number, role): trial for layer, roles in layers for role, trial in roles.items()}


def _choose(rule: BitRule, trials: Trials[Place], folder_bytes: Any) -> Widths[Place]:
    """The widths that the rule chooses; raises InvalidRequest where none meet it."""
    if rule.bits is not None:
        return widths_within(trials, int(rule.bits / 8 * sum(trial.weights for trial in trials.values())))
    if rule.fit is not None:
        return _fit(rule.fit, trials, folder_bytes)

    def mean_error(widths: Widths[Place]) -> float:
        return float(np.mean([trials[place].error(code) for place, code in widths.items()]))

    if rule.max_error is not None:
        goal, allowed = f"within a weight error of {rule.max_error:g}", rule.max_error**2
    else:
        assert rule.as_good_as is not None
        goal = f"as good as plain quantisation at {rule.as_good_as} bits"
        allowed = float(np.mean([trial.plain_errors[rule.as_good_as] for trial in trials.values()]))
    widths = widths_reaching(trials, lambda widths: mean_error(widths) <= allowed)
    if mean_error(widths) > allowed:
        factor = sqrt(mean_error(widths) / allowed) if allowed else inf
        raise InvalidRequest(f"no widths are {goal}", f"the finest err {factor:.3g} times as much")
    return widths


def _fit(size: int, trials: Trials[Place], folder_bytes: Any) -> Widths[Place]:
    """The widths of a whole folder of at most `size` bytes."""
    least = widths_within(trials, sum(trial.nbytes(next(iter(trial.ladder), None)) for trial in trials.values()))
    taken = folder_bytes(least)
    if taken > size:
        raise InvalidRequest(
            f"a folder of {size:,} bytes is out of reach", f"the least takes {taken:,} (fewer bits for the rest help)"
        )
    others = taken - count_bytes(trials, least)
    for _ in range(FIT_ROUNDS):
        widths = widths_within(trials, size - others)
        taken = folder_bytes(widths)
        if taken <= size:
            return widths
        others = max(others, taken - count_bytes(trials, widths))  # the texts depend on the widths
    return least


def _report(
    job: OverlayJob,
    rule: str,
    folder: Path,
    model: StockModel,
    verified: Sequence[LayerVerification],
    left_out: Sequence[str],
) -> MoEOverlayCompression:
    checkpoint, written = job.opened.experts.checkpoint, Checkpoint(Folder(folder))
    before, after = (sum(each.info(name).nbytes for name in each.names) for each in (checkpoint, written))
    weights = sum(layer.parameters for layer in job.layers)
    parts = [tensor for layer in model.experts for tensor in model.expert_tensors(layer)]
    scales = sum(part.nbytes for part in parts if part.name.endswith((".scales", ".biases")))
    levels = sum(part.nbytes for part in parts if part.name.endswith(".weight"))
    notes = list(job.opened.experts.notes)
    most = max(layer.count for layer in job.layers)
    if most > VERIFIED_EXPERTS:
        notes.append(f"output errors are of {VERIFIED_EXPERTS} of {most} experts of a layer")
    if after >= before:
        notes.append("the folder is no smaller than the model: its bits are too many")
    if 8 * (levels + scales) / weights < TRELLIS_BITS:
        notes.append("--format overlay --trellis errs less in so few bits, and needs chuk-lazarus to run")
    if job.opened.experts.mtp_layers:
        notes.append("layers for multi-token prediction are left out: mlx-lm does not run them")
    if left_out:
        notes.append(f"mlx-lm's class has no {', '.join(left_out)}: left out")
    return MoEOverlayCompression(
        **job.opened.identity(),
        format="mlx",
        folder=printable(str(folder)),
        rule=rule,
        ranks={},
        codes=stock_codes(model.widths),
        bytes_before=before,
        bytes_after=after,
        ratio=before / after,
        bits_per_weight=8 * (levels + scales) / weights,
        bytes_by_part=OverlayBytes(bases=0, deltas=levels, scales=scales),
        verification=tuple(verified),
        notes=tuple(notes),
        cost=job.opened.cost(),
    )


def _list_widths(widths: Mapping[Place, AffineCode | None]) -> dict[str, list[int]]:
    """The layers of each combination of widths."""
    layers: dict[str, list[int]] = {}
    for number, roles in stock_codes(widths).items():
        listing = ", ".join(f"{role} {codes.delta}" for role, codes in roles.items())
        layers.setdefault(listing, []).append(number)
    return layers


def stock_codes(widths: Mapping[Place, AffineCode | None]) -> dict[int, dict[str, ProjectionCodes]]:
    """The widths by layer and role, as codes without a base."""
    codes: dict[int, dict[str, ProjectionCodes]] = {}
    for (number, role), code in widths.items():
        codes.setdefault(number, {})[role] = ProjectionCodes(base=None, delta=str(code or "bf16"))
    return codes
