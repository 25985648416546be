"""The verification of a conversion in words and rows, for the terminal and the page."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from ..reports import LayerConversion, MoEWeightsVerification, ProjectionConversion, WeightFault
from ..terms import ROLES
from ..text import format_numbers, format_ranges, percent
from .facts import Table
from .words import name_layers

FAULT_HEADINGS = ("Layer", "Role", "Experts", "What is wrong")
MEANINGS = (
    (
        "Error",
        "The relative error of a converted matrix: the Frobenius norm of its difference from the original, divided by "
        "the norm of the original. The mean over the compared experts, and the largest.",
    ),
    (
        "Expected",
        "The error that this storage format should cost: each group of weights is scaled to its largest and rounded. "
        "It is measured on a sample of the groups.",
    ),
    (
        "Ratio",
        "The largest ratio of an expert's error to the expected error. Errors of up to 0.2 % are always expected, "
        "because of arithmetic in bfloat16.",
    ),
    (
        "Harmless",
        "Experts in another order are no fault if the rows of the router are in the same order. Neurons in another "
        "order are no fault if gate rows, up rows and down columns moved together. A note mentions both.",
    ),
)
HEADINGS = ("Role", "Format", "Bits", "Error", "Worst", "Expected", "Ratio")


def summarise(report: MoEWeightsVerification) -> str:
    """For instance "no faults; no expert errs by more than 1.5 times what its format costs"."""
    if report.passed:
        return f"no expert's error is more than {report.tolerance:g} times what its format costs"
    counts = Counter(fault.fault for fault in report.faults)
    return f"faults: {', '.join(f'{number} {kind}' for kind, number in counts.items())}"


def identify_original(report: MoEWeightsVerification) -> str:
    """For instance "org/name @ 0123456789ab (bf16)"."""
    revision = f" @ {report.against_revision[:12]}" if report.against_revision else ""
    return f"{report.against}{revision} ({report.against_storage})"


def describe_compared(report: MoEWeightsVerification) -> str:
    """For instance "layers 0, 8, 15 of 16, with 8 of 64 experts"."""
    if not report.layers:
        return "nothing: the names and shapes of the tensors already show the faults"
    numbers = [layer.layer for layer in report.layers]
    counts = sorted({len(layer.experts) for layer in report.layers})
    most = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"{name_layers(numbers)} of {len(report.moe_layers)}, {most} of {report.experts} experts in each"


def describe_bits(report: MoEWeightsVerification) -> str:
    """For instance "4.42 per expert weight"; nothing where none were compared."""
    bits = [projection.bits_per_weight for layer in report.layers for projection in layer.projections.values()]
    return f"{fmean(bits):.3g} per expert weight" if bits else ""


def describe_projection(role: str, projection: ProjectionConversion) -> list[str]:
    """The cells of `HEADINGS`."""
    return [
        role,
        projection.format,
        f"{projection.bits_per_weight:.3g}",
        _say(projection.mean),
        _say(projection.max),
        _say(projection.expected_error),
        "–" if projection.ratio is None else f"{projection.ratio:.2f}",
    ]


def _say(error: float | None) -> str:
    return "–" if error is None else percent(error) if error == 0 or error >= 0.001 else f"{100 * error:.1g} %"


def list_faults(report: MoEWeightsVerification) -> Table:
    """A row for each kind of fault in each layer and role, with the experts that have it; the first one's detail."""
    places: dict[tuple[str, int, str | None], list[WeightFault]] = {}
    for fault in report.faults:
        places.setdefault((fault.fault, fault.layer, fault.role), []).append(fault)
    rows = []
    for (kind, layer, role), faults in places.items():
        experts = [fault.expert for fault in faults if fault.expert is not None]
        detail = faults[0].detail
        if len({fault.detail for fault in faults}) > 1:
            detail += f" (expert {experts[0]})"
        who = format_numbers(experts) if len(experts) == len(faults) else "all"
        rows.append([kind, str(layer), *(("–", "–") if kind == "router" else (role or "all", who)), detail])
    return Table("The faults that were found", ["Fault", *FAULT_HEADINGS], rows)


def list_errors(report: MoEWeightsVerification) -> Table:
    """A row for each layer and role that were compared."""
    rows = [
        [f"{layer.layer} {role}", *describe_projection(role, layer.projections[role])[1:]]
        for layer in report.layers
        for role in ROLES
        if role in layer.projections
    ]
    return Table("Relative errors of the experts, by layer and role", ["Layer", *HEADINGS[1:]], rows)


def heat_rows(layers: Sequence[LayerConversion]) -> list[tuple[str, dict[int, float | None], float]]:
    """For each layer and role: its name, the error of each compared expert by number, and what is expected."""
    return [
        (
            f"{layer.layer} {role}",
            dict(zip(layer.experts, layer.projections[role].error, strict=True)),
            layer.projections[role].expected_error,
        )
        for layer in layers
        for role in ROLES
        if role in layer.projections
    ]


def describe_heat(report: MoEWeightsVerification) -> str:
    """The heat map's main numbers in words."""
    ratios = [p.ratio for layer in report.layers for p in layer.projections.values() if p.ratio is not None]
    if not ratios:
        return "No expert could be compared."
    experts = sorted({expert for layer in report.layers for expert in layer.experts})
    return (
        f"The error of experts {format_ranges(experts)} over what their format should cost, by layer and role; the "
        f"largest ratio is {max(ratios):.3g}, and {report.tolerance:g} is allowed."
    )
