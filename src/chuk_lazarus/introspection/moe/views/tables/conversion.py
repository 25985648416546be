"""The verification of a conversion, as tables."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...reports import MoEWeightsVerification, WeightFault
from ...terms import ROLES
from .. import verdicts
from ..words import identify
from .grid import LEFT, Fact, draw_facts, draw_table, paint, stack

if TYPE_CHECKING:
    from rich.console import RenderableType

MOST_FAULTS = 20  # that are listed; the JSON has all


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
        blocks.append(_draw_faults(report.faults))
    if report.layers:
        rows = [
            [str(layer.layer) if not place else "", *verdicts.describe_projection(role, layer.projections[role])]
            for layer in report.layers
            for place, role in enumerate(role for role in ROLES if role in layer.projections)
        ]
        columns = dict.fromkeys(("Role", "Format"), LEFT)
        blocks.append(draw_table(["Layer", *verdicts.HEADINGS], rows, columns))
    if report.notes:
        blocks.append(draw_facts([], report.notes))
    return stack("MOE WEIGHTS VERIFICATION", *blocks)


def _draw_faults(faults: Sequence[WeightFault]) -> "RenderableType":
    shown, left = faults[:MOST_FAULTS], faults[MOST_FAULTS:]
    rows = [[fault.fault, *verdicts.place_fault(fault), fault.detail] for fault in shown]
    rows += [["...", "", "", "", f"and {len(left)} more; the JSON has all"]] if left else []
    headings = ["Fault", *verdicts.FAULT_HEADINGS]
    whole = {"no_wrap": True, **LEFT}
    columns = {"Fault": whole, "Role": whole, "What is wrong": {**LEFT, "overflow": "fold"}}
    return draw_table(headings, rows, columns)
