"""Models quantised in the format of compressed-tensors, which transformers and vLLM load: a width for each layer.

vLLM runs the projections of a layer in one kernel, which needs one width for all of them. transformers (up to 5.24)
decodes all experts by the first group of the config: if another group had other bits but as many scales, it would
silently read wrong numbers. So widths of one checkpoint that differ in bits also differ in their group size, and it
fails instead.
"""

from collections.abc import Callable
from pathlib import Path

from ..errors import InvalidRequest, printable
from ..progress import Progress
from ..reports import LayerVerification
from .analysis import OverlayJob
from .bit_budget import BitRule
from .checkpoint.auxiliary import read_auxiliary_files
from .checkpoint.card import CARD, write_packed_card
from .checkpoint.folder import Contents, check_folder
from .checkpoint.packed_writer import METHOD, PackedModel, check_modules, packed_contents
from .checkpoint.writer import check_copyable, expert_names
from .codes.code import Shape
from .codes.packed import PackedCode, packed_widths, parse_packed
from .quantised import Checks, Place, list_widths, try_all, write_quantised
from .width_budget import Trials, Widths, choose_widths, join_trials

USUAL_BITS = (4, 8)  # of which every vLLM has kernels for experts
# the widths that one checkpoint may have, those of the usual bits first; in each line a group goes with one width
WIDTH_SETS = (
    ("int4:128", "int4:32", "int8:64"),
    ("int4:64", "int8:32"),
    ("int3:32", "int4:128"),
    ("int2:32", "int3:64", "int4:128"),
    ("int2:64", "int3:128", "int4:32"),
    ("int2:128",),
)


def quantise_packed(
    job: OverlayJob, rule: BitRule, folder: Path, force: bool, progress: Progress
) -> tuple[Widths[Place], list[LayerVerification]]:
    """Write the job's model with its experts in packed integers into `folder`, and verify some of its layers.

    Widths are of 4 or 8 bits, unless only others meet the rule (WIDTH_SETS). Raises InvalidRequest where none do,
    UnknownFormat for a family whose experts' matrices are not modules of their own.
    """
    experts, checkpoint = job.opened.experts, job.opened.experts.checkpoint
    check_copyable(experts)
    layers = {layer.number: layer for layer in job.layers}
    rest = sorted(set(checkpoint.names) - expert_names(job.layers))
    for layer in job.layers:
        check_modules(layer)
    rest_stored = checkpoint.count_bytes(rest)
    least = sum(layer.parameters for layer in job.layers) // 4 + rest_stored
    check_folder(folder, checkpoint.repository.folder, force, least)
    auxiliary = read_auxiliary_files(checkpoint)
    rule_text = f"{job.describe(rule)}; {METHOD}, rest kept"

    def open_contents(widths: Widths[Place], checks: Checks, card: Callable[[], str]) -> Contents:
        codes = {number: parse_packed(width) if width else None for (number, _), width in widths.items()}
        listed = list_widths(widths)
        return packed_contents(
            checkpoint,
            PackedModel(layers, codes, rest),
            files={
                **auxiliary,
                CARD: lambda: write_packed_card(printable(job.opened.name), listed, rule_text, card()).encode(),
            },
            checks=checks,
            resources=job.opened.resources,
            progress=progress,
        )

    def choose() -> Widths[Place]:
        tried = try_all(job, METHOD, _widths)
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


def _widths(shape: Shape) -> list[PackedCode]:
    """The codes of all sets that fit a matrix of that shape."""
    wanted = {width for widths in WIDTH_SETS for width in widths}
    return [code for code in packed_widths(shape) if str(code) in wanted]


def _choose(rule: BitRule, trials: Trials[int], total_bytes: Callable[[Widths[int]], int]) -> Widths[int]:
    """The widths that the rule chooses from the first set that can meet it; raises InvalidRequest if none can."""
    for widths in WIDTH_SETS:
        try:
            return choose_widths(rule, {number: trial.only(widths) for number, trial in trials.items()}, total_bytes)
        except InvalidRequest:
            continue
    choose_widths(rule, trials, total_bytes)  # says what the least or the finest is
    raise InvalidRequest("only widths that loaders would misread meet the rule", "ask for more bits")


def loader_notes(widths: Widths[Place]) -> list[str]:
    """What loaders need for experts of these widths."""
    codes = {parse_packed(width) for width in widths.values() if width}
    notes = []
    if others := sorted({code.bits for code in codes} - set(USUAL_BITS)):
        notes.append(f"experts of {', '.join(map(str, others))} bits need a vLLM build with kernels for them")
    if len(codes) > 1:
        notes.append("vLLM loads experts of mixed widths; transformers up to 5.24 needs a single width")
    if None in widths.values():
        notes.append("layers whose rows do not divide into groups of 32 stay in bf16")
    return notes
