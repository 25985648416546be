"""The verification of a conversion, as tables."""

from typing import TYPE_CHECKING

from ...reports import MoEWeightsVerification
from ...terms import ROLES
from .. import facts, verdicts
from ..words import identify
from .grid import LEFT, WORDS, Fact, draw_facts, draw_table, paint, stack

if TYPE_CHECKING:
    from rich.console import RenderableType

MOST_FAULTS = 20  # lines of faults; the JSON has all


def render_weights(report: MoEWeightsVerification) -> "RenderableType":
    """Passed or failed, the faults, and the errors beside those that the formats explain, a row for each projection."""
    verdict = paint("PASSED", "bold green") if report.passed else paint("FAILED", "bold red")
    verdict.append(f" ({verdicts.summarise(report)})", style="default")
    facts: list[Fact] = [
        ("Model", identify(report)),
        ("Original", verdicts.identify_original(report)),
        ("Compared", verdicts.describe_compared(report)),
        ("Verdict", verdict),
    ]
    blocks: list[RenderableType] = [draw_facts(facts)]
    if report.faults:
        blocks.append(_draw_faults(verdicts.list_faults(report)))
    if report.layers:
        rows = [
            [str(layer.layer) if not place else "", *verdicts.describe_projection(role, layer.projections[role])]
            for layer in report.layers
            for place, role in enumerate(role for role in ROLES if role in layer.projections)
        ]
        columns = dict.fromkeys(("Role", "Format"), LEFT)
        blocks.append(draw_table(["Layer", *verdicts.HEADINGS], rows, columns, leave=("Worst", "Bits")))
    if report.notes:
        blocks.append(draw_facts([], report.notes))
    return stack("MOE WEIGHTS VERIFICATION", *blocks)


def _draw_faults(faults: facts.Table) -> "RenderableType":
    rows, left = list(faults.rows[:MOST_FAULTS]), faults.rows[MOST_FAULTS:]
    rows += [["...", "", "", "", f"and {len(left)} lines more; the JSON has all"]] if left else []
    columns = {"Fault": LEFT, "Role": LEFT, "Experts": WORDS, "What is wrong": WORDS}
    return draw_table(faults.headings, rows, columns)
