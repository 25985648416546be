"""Models quantised in the format of compressed-tensors, which transformers and vLLM load: a width for each layer.

vLLM runs the projections of a layer in one kernel, which needs one width for all of them.
"""

from collections.abc import Callable
from pathlib import Path

from ..errors import InvalidRequest, printable
from ..progress import Progress
from ..reports import LayerVerification
from .analysis import OverlayJob
from .bit_budget import BitRule
from .checkpoint.card import CARD, write_packed_card
from .checkpoint.folder import Contents, check_folder
from .checkpoint.packed_writer import METHOD, PackedModel, check_modules, packed_contents
from .checkpoint.writer import check_copyable, expert_names
from .codes.packed import packed_widths, parse_packed
from .quantised import Checks, Place, list_widths, try_all, write_quantised
from .width_budget import Trials, Widths, choose_widths, join_trials

USUAL_BITS = (4, 8)  # of which every vLLM has kernels for experts


def quantise_packed(
    job: OverlayJob, rule: BitRule, folder: Path, force: bool, progress: Progress
) -> tuple[Widths[Place], list[LayerVerification]]:
    """Write the job's model with its experts in packed integers into `folder`, and verify some of its layers.

    Widths are of 4 or 8 bits, unless only others meet the rule. Raises InvalidRequest where none do, UnknownFormat for
    a family whose experts' matrices are not modules of their own.
    """
    experts, checkpoint = job.opened.experts, job.opened.experts.checkpoint
    check_copyable(experts)
    layers = {layer.number: layer for layer in job.layers}
    rest = sorted(set(checkpoint.names) - expert_names(job.layers))
    for layer in job.layers:
        check_modules(layer)
    rest_stored = sum(checkpoint.info(name).nbytes for name in rest)
    least = sum(layer.parameters for layer in job.layers) // 4 + rest_stored
    check_folder(folder, checkpoint.repository.folder, force, least)
    rule_text = f"{job.describe(rule)}; {METHOD}, rest kept"

    def open_contents(widths: Widths[Place], checks: Checks, card: Callable[[], str]) -> Contents:
        codes = {number: parse_packed(width) if width else None for (number, _), width in widths.items()}
        listed = list_widths(widths)
        return packed_contents(
            checkpoint,
            PackedModel(layers, codes, rest),
            files={CARD: lambda: write_packed_card(printable(job.opened.name), listed, rule_text, card()).encode()},
            checks=checks,
            resources=job.opened.resources,
            progress=progress,
        )

    def choose() -> Widths[Place]:
        tried = try_all(job, METHOD, packed_widths)
        trials = {
            number: join_trials([tried[number, role] for role in layer.roles]) for number, layer in layers.items()
        }

        def spread(widths: Widths[int]) -> Widths[Place]:
            return {(number, role): widths[number] for number, layer in layers.items() for role in layer.roles}

        return spread(_choose(rule, trials, lambda widths: open_contents(spread(widths), {}, str).nbytes))

    written = write_quantised(
        job,
        folder,
        kind=METHOD,
        rule=rule,
        rule_text=rule_text,
        choose=choose,
        open_contents=open_contents,
        force=force,
        progress=progress,
    )
    job.end()
    return written


def _choose(rule: BitRule, trials: Trials[int], total_bytes: Callable[[Widths[int]], int]) -> Widths[int]:
    """The widths of the usual bits that the rule chooses, or else of any."""
    usual = {
        number: trial.only({width for width in trial.sizes if parse_packed(width).bits in USUAL_BITS})
        for number, trial in trials.items()
    }
    try:
        return choose_widths(rule, usual, total_bytes)
    except InvalidRequest:
        return choose_widths(rule, trials, total_bytes)


def loader_notes(widths: Widths[Place]) -> list[str]:
    """What loaders need for experts of these widths."""
    codes = {parse_packed(width) for width in widths.values() if width}
    notes = []
    if others := sorted({code.bits for code in codes} - set(USUAL_BITS)):
        notes.append(f"experts of {', '.join(map(str, others))} bits need a vLLM that has kernels for these")
    if len(codes) > 1:
        notes.append("transformers up to 5.24 takes all experts to have the width of the first group: load it in vLLM")
    if None in widths.values():
        notes.append("layers whose rows have no whole groups of 32 stay in bf16")
    return notes
